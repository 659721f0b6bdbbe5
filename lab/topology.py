"""The lab as its inventory describes it: sites, nodes, clients and their addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import yaml

#: Debian's releases that nodes can have, by their names in the archive; the first is what a node has unless it says.
SUITES = ("bookworm", "trixie")
#: The role of nodes with nothing but the base image on them.
PLAIN = "plain"


class TopologyError(ValueError):
    """The inventory does not describe a lab; the message says where and why."""


@dataclass(frozen=True)
class Site:
    """A network of the lab. Its router is the network's first address.

    `pods` and `services`: the ranges of its cluster's pods and Service addresses; None where there is no cluster.
    """

    name: str
    network: IPv4Network
    pods: IPv4Network | None = None
    services: IPv4Network | None = None

    @property
    def router(self) -> IPv4Address:
        return self.network.network_address + 1

    @property
    def bridge(self) -> str:
        """The name of its bridge, at most the 15 characters the kernel takes."""
        return f"br-{self.name}"[:15]


@dataclass(frozen=True)
class Node:
    """A machine of the lab: a container in a network namespace of its own."""

    name: str
    site: str
    address: IPv4Address
    zone: str
    role: str
    #: What it is to its region's cluster: "control-plane", "worker", or "" for a node outside Kubernetes.
    kubernetes: str = ""
    #: Debian's release on it.
    suite: str = SUITES[0]

    @property
    def image(self) -> str:
        """Which of the lab's images it is made from."""
        return label(self.role, self.suite)


def label(role: str, suite: str) -> str:
    """The name of a role's image among all images; the first suite's bears none of its own."""
    return role if suite == SUITES[0] else f"{role}-{suite}"


@dataclass(frozen=True)
class Client:
    """A network namespace without a node, for processes of the machine that act inside a region."""

    site: str
    address: IPv4Address

    @property
    def name(self) -> str:
        return f"client-{self.site}"


@dataclass(frozen=True)
class Operator:
    """The machine itself, as the lab sees it."""

    network: IPv4Network
    address: IPv4Address
    packages_port: int

    @property
    def router(self) -> IPv4Address:
        return self.network.network_address + 1


@dataclass(frozen=True)
class Topology:
    supernet: IPv4Network
    operator: Operator
    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    clients: tuple[Client, ...]

    def site(self, name: str) -> Site:
        """The site of that name; raises TopologyError, naming those there are."""
        for site in self.sites:
            if site.name == name:
                return site
        raise TopologyError(f"{name!r} is not a region of the lab; there are: {', '.join(s.name for s in self.sites)}")

    def node(self, name: str) -> Node:
        """The node of that name; raises TopologyError, naming those there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise TopologyError(f"{name!r} is not a node of the lab; there are: {', '.join(n.name for n in self.nodes)}")


#: A node's image follows from the group it is in.
ROLES = ("app", "db", "witness", PLAIN)
#: Group -> what its hosts are to their cluster. A control plane that is in no other group has the image of `app`.
KUBERNETES = {"kube_control_plane": "control-plane", "kube_node": "worker"}


def parse(hosts: Mapping[str, Any], networks: Mapping[str, Any]) -> Topology:
    """Builds the topology from an inventory's groups and the `lab_networks` variable."""
    variables: dict[str, dict[str, Any]] = {}
    groups: dict[str, set[str]] = {}

    def walk(group: str, body: Mapping[str, Any] | None, above: tuple[str, ...]) -> None:
        within = (*above, group)
        for name, values in ((body or {}).get("hosts") or {}).items():
            variables.setdefault(name, {}).update(values or {})
            for member_of in within:
                groups.setdefault(member_of, set()).add(name)
        for child, inner in ((body or {}).get("children") or {}).items():
            walk(child, inner, within)

    for top, body in hosts.items():
        walk(top, body, ())

    try:
        supernet = IPv4Network(networks["supernet"])
        operator = Operator(
            IPv4Network(networks["operator"]["cidr"]),
            IPv4Address(networks["operator"]["address"]),
            int(networks["operator"]["packages_port"]),
        )
        pods, services = (
            {name: IPv4Network(cidr) for name, cidr in networks[kind].items()} for kind in ("pods", "services")
        )
        sites = tuple(
            Site(name, IPv4Network(cidr), pods.get(name), services.get(name))
            for name, cidr in networks["sites"].items()
        )
        clients = tuple(Client(site, IPv4Address(address)) for site, address in networks["clients"].items())
    except (KeyError, AddressValueError, ValueError, TypeError) as error:
        raise TopologyError(f"lab_networks in group_vars/all/main.yml is not usable: {error!r}") from error

    nodes = []
    for name in sorted(groups.get("nodes", set())):
        values = variables[name]
        kubernetes = next((what for group, what in KUBERNETES.items() if name in groups.get(group, set())), "")
        role = next((r for r in ROLES if name in groups.get(r, set())), "app" if kubernetes else None)
        try:
            address = IPv4Address(values["ansible_host"])
            suite = str(values.get("lab_suite", SUITES[0]))
            node = Node(name, values["region"], address, values["zone"], role or "", kubernetes, suite)
        except (KeyError, AddressValueError) as error:
            raise TopologyError(
                f"host {name} of the inventory needs region, zone and ansible_host: {error!r}"
            ) from error
        if role is None:
            raise TopologyError(f"host {name} of the inventory is in none of the groups {', '.join(ROLES)}")
        if suite not in SUITES:
            raise TopologyError(f"host {name}'s lab_suite is {suite!r}; there are: {', '.join(SUITES)}")
        if suite != SUITES[0] and role != PLAIN:
            # The packages of a role's image have the versions of one release in their names.
            raise TopologyError(f"host {name} is of group {role}, whose image is {SUITES[0]}'s; {suite} is for {PLAIN}")
        nodes.append(node)
    topology = Topology(supernet, operator, sites, tuple(nodes), clients)
    check(topology)
    return topology


def check(topology: Topology) -> None:
    """Raises TopologyError when addresses do not fit their networks or are taken twice."""
    taken: dict[IPv4Address, str] = {topology.operator.address: "the operator"}
    if not topology.nodes:
        raise TopologyError("the inventory's group `nodes` is empty")
    for site in topology.sites:
        if not site.network.subnet_of(topology.supernet):
            raise TopologyError(f"{site.name}'s network {site.network} is not inside {topology.supernet}")
        taken[site.router] = f"the router of {site.name}"
    for name, where, address in [(n.name, n.site, n.address) for n in topology.nodes] + [
        (c.name, c.site, c.address) for c in topology.clients
    ]:
        site = topology.site(where)
        if address not in site.network:
            raise TopologyError(f"{name}'s address {address} is not in {where}'s network {site.network}")
        if address in taken:
            raise TopologyError(f"{name} and {taken[address]} both have the address {address}")
        taken[address] = name
    for node in topology.nodes:
        site = topology.site(node.site)
        if node.kubernetes and not (site.pods and site.services):
            raise TopologyError(
                f"{node.name} is a Kubernetes node, but lab_networks has no pods or services of {site.name}"
            )
    taken_ranges = [(topology.supernet, "the nodes")]
    for site in topology.sites:
        for network, whose in (
            (site.pods, f"the pods of {site.name}"),
            (site.services, f"the Services of {site.name}"),
        ):
            # An address that is also another's would be answered by a stranger.
            for other, owner in taken_ranges:
                if network and network.overlaps(other):
                    raise TopologyError(f"{whose} have addresses of {owner}: {network} overlaps {other}")
            if network:
                taken_ranges.append((network, whose))


def load(inventory: Path) -> Topology:
    """Reads an inventory directory; raises TopologyError in one sentence when it is missing or wrong."""
    hosts, variables = inventory / "hosts.yml", inventory / "group_vars" / "all" / "main.yml"
    try:
        with hosts.open(encoding="utf-8") as stream:
            groups = yaml.safe_load(stream)
        with variables.open(encoding="utf-8") as stream:
            values = yaml.safe_load(stream)
    except OSError as error:
        raise TopologyError(f"{error.filename} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TopologyError(f"{inventory} is not valid YAML: {error}") from error
    return parse(groups or {}, (values or {}).get("lab_networks") or {})
