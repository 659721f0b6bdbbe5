"""What the agent knows: typed values of the API's objects, and how they are read."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Json = Mapping[str, Any]
#: Protocols that a NetworkPolicy can name.
PROTOCOLS = ("TCP", "UDP", "SCTP")


class Unreadable(ValueError):
    """An object says something that this agent does not know; the message says what."""


class Expression(NamedTuple):
    """One requirement on labels."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def accepts(self, labels: Mapping[str, str]) -> bool:
        if self.operator == "In":
            return labels.get(self.key) in self.values
        if self.operator == "NotIn":
            return labels.get(self.key) not in self.values
        return (self.key in labels) is (self.operator == "Exists")


class Selector(NamedTuple):
    """A label selector: all of its requirements must hold, and none of them means everything."""

    expressions: tuple[Expression, ...] = ()

    def accepts(self, labels: Mapping[str, str]) -> bool:
        return all(expression.accepts(labels) for expression in self.expressions)


class Block(NamedTuple):
    """A range of addresses without some of its parts."""

    cidr: str
    excepted: tuple[str, ...] = ()


class Peer(NamedTuple):
    """One entry of `from` or `to`: a block, or pods by their own and their namespace's labels.

    Without a namespace selector the pods are those of the policy's namespace.
    """

    block: Block | None = None
    pods: Selector | None = None
    namespaces: Selector | None = None


class PolicyPort(NamedTuple):
    """One entry of `ports`: no port is all of the protocol's."""

    protocol: str = "TCP"
    port: int | str | None = None
    end: int | None = None


class Rule(NamedTuple):
    """One entry of `ingress` or `egress`; no peers are all peers, no ports all ports."""

    peers: tuple[Peer, ...] = ()
    ports: tuple[PolicyPort, ...] = ()


class Policy(NamedTuple):
    """A NetworkPolicy; None where it does not isolate in that direction."""

    namespace: str
    name: str
    selector: Selector
    ingress: tuple[Rule, ...] | None = None
    egress: tuple[Rule, ...] | None = None


class Pod(NamedTuple):
    """A pod with its network. `ports` are its containers' named ports."""

    namespace: str
    name: str
    uid: str = ""
    node: str = ""
    addresses: tuple[str, ...] = ()
    labels: Mapping[str, str] = {}
    ports: tuple[tuple[str, str, int], ...] = ()
    host_network: bool = False
    finished: bool = False


class Node(NamedTuple):
    name: str
    address: str = ""
    pod_cidr: str = ""


class Cluster(NamedTuple):
    """All that the compile step looks at. `namespaces` are their labels."""

    pod_cidr: str
    nodes: Mapping[str, Node] = {}
    namespaces: Mapping[str, Mapping[str, str]] = {}
    pods: Sequence[Pod] = ()
    policies: Sequence[Policy] = ()


def selector_of(said: Json | None) -> Selector | None:
    """Reads a label selector; None stays None. Raises Unreadable for an operator that Kubernetes does not document."""
    if said is None:
        return None
    found = [Expression(key, "In", frozenset((value,))) for key, value in (said.get("matchLabels") or {}).items()]
    for entry in said.get("matchExpressions") or ():
        if entry.get("operator") not in ("In", "NotIn", "Exists", "DoesNotExist"):
            raise Unreadable(f"a label selector has the operator {entry.get('operator')!r}")
        found.append(Expression(entry["key"], entry["operator"], frozenset(entry.get("values") or ())))
    return Selector(tuple(found))


def peer_of(said: Json) -> Peer:
    block = said.get("ipBlock")
    if block is not None:
        for cidr in (block["cidr"], *(block.get("except") or ())):
            try:
                ipaddress.ip_network(cidr, strict=False)
            except ValueError as error:
                raise Unreadable(f"an ipBlock has the range {cidr!r}") from error
        return Peer(block=Block(block["cidr"], tuple(block.get("except") or ())))
    peer = Peer(None, selector_of(said.get("podSelector")), selector_of(said.get("namespaceSelector")))
    if peer == Peer():
        raise Unreadable("a peer has neither a selector nor an ipBlock")
    return peer


def port_of(said: Json) -> PolicyPort:
    port = PolicyPort(said.get("protocol") or "TCP", said.get("port"), said.get("endPort"))
    if port.protocol not in PROTOCOLS:
        raise Unreadable(f"a port has the protocol {port.protocol!r}")
    return port


def rules_of(said: Sequence[Json] | None, peers: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            tuple(peer_of(peer) for peer in rule.get(peers) or ()),
            tuple(port_of(port) for port in rule.get("ports") or ()),
        )
        for rule in said or ()
    )


def policy_of(said: Json) -> Policy:
    """Reads a NetworkPolicy, with the API's defaults for policyTypes. Raises Unreadable."""
    meta, spec = said["metadata"], said.get("spec") or {}
    kinds = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    return Policy(
        meta["namespace"],
        meta["name"],
        selector_of(spec.get("podSelector")) or Selector(),
        rules_of(spec.get("ingress"), "from") if "Ingress" in kinds else None,
        rules_of(spec.get("egress"), "to") if "Egress" in kinds else None,
    )


def closed_policy_of(said: Json) -> Policy:
    """What stands for a policy that cannot be read: its namespace's pods are isolated both ways."""
    meta = said["metadata"]
    return Policy(meta["namespace"], meta["name"], Selector(), (), ())


def pod_of(said: Json) -> Pod:
    meta, spec, status = said["metadata"], said.get("spec") or {}, said.get("status") or {}
    addresses = [entry["ip"] for entry in status.get("podIPs") or () if entry.get("ip")]
    if not addresses and status.get("podIP"):
        addresses = [status["podIP"]]
    # An init container that goes on (restartPolicy Always) is a side-car with ports of its own.
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    ports = [
        (port["name"], port.get("protocol") or "TCP", int(port["containerPort"]))
        for container in containers
        for port in container.get("ports") or ()
        if port.get("name")
    ]
    return Pod(
        meta["namespace"],
        meta["name"],
        meta.get("uid", ""),
        spec.get("nodeName", ""),
        tuple(addresses),
        meta.get("labels") or {},
        tuple(ports),
        bool(spec.get("hostNetwork")),
        status.get("phase") in ("Succeeded", "Failed"),
    )


def node_of(said: Json) -> Node:
    """Reads a Node: its first internal IPv4 address and its IPv4 pod block."""
    spec, status = said.get("spec") or {}, said.get("status") or {}
    internal = [a["address"] for a in status.get("addresses") or () if a.get("type") == "InternalIP"]
    blocks = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    return Node(
        said["metadata"]["name"],
        next((a for a in internal if ":" not in a), ""),
        next((b for b in blocks if ":" not in b), ""),
    )


def namespace_of(said: Json) -> tuple[str, Mapping[str, str]]:
    """A namespace's name and labels; the API server itself adds kubernetes.io/metadata.name."""
    return said["metadata"]["name"], said["metadata"].get("labels") or {}
