"""The compile step: from the cluster's objects to the rules of one node, as a pure function.

A pod is isolated in a direction when at least one policy of its namespace selects it for that direction; then only what
some rule of those policies names may pass. A connection between two pods needs the egress of the one and the ingress
of the other, each judged on its own node.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .model import PROTOCOLS, Block, Cluster, Peer, Pod, Policy, PolicyPort, Rule

#: First and last address, as numbers.
Range = tuple[int, int]
ALL: tuple[Range, ...] = ((0, 2**32 - 1),)
#: Protocol, first and last port.
Ports = tuple[str, int, int]


class Allow(NamedTuple):
    """Traffic with one of `peers` may pass; `ports` None is every port and every protocol."""

    peers: tuple[Range, ...]
    ports: tuple[Ports, ...] | None = None


class PodRules(NamedTuple):
    """The rules of one pod of the node; None where it is not isolated."""

    address: str
    ingress: tuple[Allow, ...] | None = None
    egress: tuple[Allow, ...] | None = None


class NodeRules(NamedTuple):
    """All of a node's rules. A packet with a pod address that is not in `known` belongs to no pod that we know."""

    pod_cidr: str
    known: tuple[str, ...] = ()
    pods: tuple[PodRules, ...] = ()


def closed(pod_cidr: str) -> NodeRules:
    """The rules before the objects are known: no packet of a pod passes, but what the node itself asks its pods."""
    return NodeRules(pod_cidr)


def compile_node(cluster: Cluster, node: str) -> NodeRules:
    """The rules of the node named.

    Pods on the host's network have the node's address: no policy selects them and no selector finds them, as the API
    leaves it open. Finished pods have given their address back.
    """
    alive = [pod for pod in cluster.pods if pod.addresses and not (pod.host_network or pod.finished)]
    holders: dict[str, Pod] = {}
    for pod in alive:
        for address in _v4(pod.addresses):
            holders[address] = pod
    peers = _Peers(cluster, holders)
    own = [(address, pod) for address, pod in holders.items() if pod.node == node]
    compiled = [
        PodRules(
            address,
            _direction(pod, [(p, p.ingress) for p in cluster.policies if p.ingress is not None], peers, incoming=True),
            _direction(pod, [(p, p.egress) for p in cluster.policies if p.egress is not None], peers, incoming=False),
        )
        for address, pod in sorted(own, key=lambda entry: _number(entry[0]))
    ]
    return NodeRules(cluster.pod_cidr, tuple(sorted(holders, key=_number)), tuple(compiled))


def _direction(
    pod: Pod, policies: Sequence[tuple[Policy, tuple[Rule, ...]]], peers: _Peers, incoming: bool
) -> tuple[Allow, ...] | None:
    """What one pod may do in one direction; None when it is not isolated."""
    mine = [
        (policy, rules)
        for policy, rules in policies
        if policy.namespace == pod.namespace and policy.selector.accepts(pod.labels)
    ]
    if not mine:
        return None
    by_ports: dict[tuple[Ports, ...] | None, list[Range]] = {}
    for policy, rules in mine:
        for rule in rules:
            for ports, ranges in _allowed(pod, policy, rule, peers, incoming):
                by_ports.setdefault(ports, []).extend(ranges)
    # One order for one meaning: the text of the table changes only when the rules do.
    order = sorted(by_ports.items(), key=lambda entry: (entry[0] is not None, entry[0] or ()))
    return tuple(Allow(merged, ports) for ports, ranges in order if (merged := merge(ranges)))


def _allowed(
    pod: Pod, policy: Policy, rule: Rule, peers: _Peers, incoming: bool
) -> Iterable[tuple[tuple[Ports, ...] | None, Iterable[Range]]]:
    """Ports and peers that one rule lets pass."""
    if not rule.ports:
        yield None, peers.ranges(policy, rule)
        return
    numbered = [port for port in rule.ports if not isinstance(port.port, str)]
    if numbered:
        yield merge_ports(_numbered(port) for port in numbered), peers.ranges(policy, rule)
    for port in rule.ports:
        if not isinstance(port.port, str):
            continue
        if incoming:
            # The name is looked up at the destination, which is this pod.
            found = _named(pod, port)
            if found:
                yield found, peers.ranges(policy, rule)
        else:
            for address, holder in peers.pods(policy, rule):
                found = _named(holder, port)
                if found:
                    number = _number(address)
                    yield found, ((number, number),)


def _numbered(port: PolicyPort) -> Ports:
    if port.port is None:
        return port.protocol, 0, 65535
    first = int(port.port)
    return port.protocol, first, first if port.end is None else port.end


def _named(pod: Pod, wanted: PolicyPort) -> tuple[Ports, ...]:
    return merge_ports((p, n, n) for name, p, n in pod.ports if name == wanted.port and p == wanted.protocol)


class _Peers:
    """Finds the addresses of a rule's peers."""

    def __init__(self, cluster: Cluster, holders: Mapping[str, Pod]) -> None:
        self._cluster = cluster
        self._holders = holders
        self._found: dict[tuple[str, Peer], list[tuple[str, Pod]]] = {}

    def ranges(self, policy: Policy, rule: Rule) -> list[Range]:
        if not rule.peers:
            return list(ALL)
        found: list[Range] = []
        for peer in rule.peers:
            if peer.block is not None:
                found += block_ranges(peer.block)
            elif _every_pod(peer):
                # Every pod of the cluster, also one whose address has not been heard of yet.
                found += _ranges_of(self._cluster.pod_cidr)
            else:
                numbers = [_number(address) for address, _ in self._selected(policy.namespace, peer)]
                found += [(number, number) for number in numbers]
        return found

    def pods(self, policy: Policy, rule: Rule) -> list[tuple[str, Pod]]:
        """The pods among a rule's peers: blocks have no named ports."""
        if not rule.peers:
            return list(self._holders.items())
        return [found for peer in rule.peers if not peer.block for found in self._selected(policy.namespace, peer)]

    def _selected(self, namespace: str, peer: Peer) -> list[tuple[str, Pod]]:
        key = (namespace if peer.namespaces is None else "", peer)
        if key not in self._found:
            if peer.namespaces is None:
                names = {namespace}
            else:
                labelled = self._cluster.namespaces.items()
                names = {name for name, labels in labelled if peer.namespaces.accepts(labels)}
            self._found[key] = [
                (address, pod)
                for address, pod in self._holders.items()
                if pod.namespace in names and (peer.pods is None or peer.pods.accepts(pod.labels))
            ]
        return self._found[key]


def _every_pod(peer: Peer) -> bool:
    everything = peer.namespaces is not None and not peer.namespaces.expressions
    return everything and (peer.pods is None or not peer.pods.expressions)


def block_ranges(block: Block) -> list[Range]:
    """The IPv4 ranges of a block; none for an IPv6 block, which no IPv4 packet can match."""
    ranges = _ranges_of(block.cidr)
    for cut in merge(entry for cidr in block.excepted for entry in _ranges_of(cidr)):
        left: list[Range] = []
        for first, last in ranges:
            if cut[1] < first or cut[0] > last:
                left.append((first, last))
                continue
            if first < cut[0]:
                left.append((first, cut[0] - 1))
            if last > cut[1]:
                left.append((cut[1] + 1, last))
        ranges = left
    return ranges


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same addresses in the fewest ranges, in order."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def merge_ports(ports: Iterable[Ports]) -> tuple[Ports, ...]:
    """The same ports in the fewest ranges, in order of protocol and number."""
    given = list(ports)
    return tuple(
        (protocol, *entry)
        for protocol in PROTOCOLS
        for entry in merge((first, last) for name, first, last in given if name == protocol)
    )


def _ranges_of(cidr: str) -> list[Range]:
    network = ipaddress.ip_network(cidr, strict=False)
    if network.version != 4:
        return []
    return [(int(network.network_address), int(network.broadcast_address))]


def _v4(addresses: Iterable[str]) -> list[str]:
    return [address for address in addresses if ":" not in address]


def _number(address: str) -> int:
    return int(ipaddress.IPv4Address(address))
