"""The lab's network: one namespace with a bridge per site and the routes between them.

Each node has a named namespace of its own, made before its container, so that addresses and routes outlive a
restart. Nothing has a default route. The machine is joined by one veth and one route; its own forwarding and
packet filter are not touched.

`plan` is pure: from the topology and what was observed it says which commands make the difference.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from lab.paths import PREFIX
from lab.topology import Site, Topology

ROUTER = f"{PREFIX}fabric"
IN_ROUTER = ("ip", "netns", "exec", ROUTER)
UPLINK = "censuslab0"
TABLE = "censuslab"
#: Loopback and multicast: never forwarded.
NOT_ROUTED = "127.0.0.0/8, 224.0.0.0/4"
#: The router's own kernel settings.
KERNEL = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.disable_ipv6=1",
    "net.ipv6.conf.default.disable_ipv6=1",
    # Every refusal is said, not one a second.
    "net.ipv4.icmp_ratelimit=0",
    # What stays inside a site is bridged past the packet filter, pods' addresses included. (Kernels without
    # br_netfilter do not know the setting, and do so anyway.)
    "net.bridge.bridge-nf-call-iptables=0",
)
#: The machine's own namespace, which has no name.
MACHINE = ""


class FabricError(RuntimeError):
    """A command on the network failed; the message has the command and what it said."""


@dataclass(frozen=True)
class Link:
    addresses: frozenset[str] = frozenset()
    up: bool = False
    master: str = ""


@dataclass(frozen=True)
class Space:
    """A network namespace: its links by name, its routes as (destination, gateway), the mark of a node's fence."""

    links: dict[str, Link] = field(default_factory=dict)
    routes: frozenset[tuple[str, str]] = frozenset()
    forwarding: bool = False
    fence: str = ""


@dataclass(frozen=True)
class Fabric:
    """What is there: namespaces by name, the mark of the loaded rules, the sites cut off (as networks)."""

    spaces: dict[str, Space] = field(default_factory=dict)
    rules: str = ""
    cut: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Action:
    """One command, with its standard input when it takes one."""

    what: str
    command: tuple[str, ...]
    stdin: str = ""


def space_of(name: str) -> str:
    """The namespace of a node or client."""
    return PREFIX + name


def port_of(name: str) -> str:
    """The name of the fabric's end of a node's or client's link (15 characters at most)."""
    return name.replace("client-", "c-", 1) if name.startswith("client-") else name


def desired(topology: Topology) -> dict[str, Space]:
    """The namespaces, links and routes of a lab that is up; the machine's own has only the lab's part."""
    supernet, operator = str(topology.supernet), topology.operator
    router_links = {
        "lo": Link(up=True),
        "operator": Link(frozenset({f"{operator.router}/{operator.network.prefixlen}"}), True),
    }
    for site in topology.sites:
        router_links[site.bridge] = Link(frozenset({f"{site.router}/{site.network.prefixlen}"}), True)
    spaces: dict[str, Space] = {}
    for name, at, address, kubernetes in [(n.name, n.site, n.address, n.kubernetes) for n in topology.nodes] + [
        (c.name, c.site, c.address, "") for c in topology.clients
    ]:
        site = topology.site(at)
        routes = {(supernet, str(site.router))}
        if kubernetes and site.services:
            # A process of the node must find a route before kube-proxy gives its packet another destination.
            routes.add((str(site.services), str(site.router)))
        router_links[port_of(name)] = Link(up=True, master=site.bridge)
        spaces[space_of(name)] = Space(
            {"lo": Link(up=True), "eth0": Link(frozenset({f"{address}/{site.network.prefixlen}"}), True)},
            frozenset(routes),
            fence=mark(fence(topology, site)) if kubernetes else "",
        )
    spaces[ROUTER] = Space(router_links, forwarding=True)
    spaces[MACHINE] = Space(
        {UPLINK: Link(frozenset({f"{operator.address}/{operator.network.prefixlen}"}), True)},
        frozenset({(supernet, str(operator.router))}),
    )
    return spaces


def ruleset(topology: Topology) -> str:
    """The router's packet filter.

    Inside a site everything passes, cut or not. Between sites: nothing to or from a cut one, established flows
    included; then lab to lab only. The machine is reached by nobody, except for answers and the package cache.

    Two counters tell what came to the router for an address that is not the lab's and was refused (`outside`), and what
    was about to go on to the machine all the same (`left`, which stays 0).
    """
    inside = "\n".join(f"    ip saddr {n} ip daddr {n} accept" for n in [s.network for s in topology.sites])
    operator, supernet = topology.operator, topology.supernet
    return f"""
  set cut {{
    type ipv4_addr
    flags interval
  }}
  counter outside {{ }}
  counter left {{ }}
  chain arrive {{
    type filter hook prerouting priority filter; policy accept;
    ip daddr != {{ {supernet}, {NOT_ROUTED} }} counter name outside reject with icmpx admin-prohibited
  }}
  chain leave {{
    type filter hook postrouting priority filter; policy accept;
    oifname "operator" ip daddr != {operator.network} counter name left drop
  }}
  chain between {{
{inside}
    ip saddr @cut drop
    ip daddr @cut drop
    ip saddr != {supernet} reject with icmpx admin-prohibited
    ip daddr != {supernet} reject with icmpx admin-prohibited
    ct state established,related accept
    ip daddr {operator.address} tcp dport {operator.packages_port} accept
    ip daddr {operator.network} reject with icmpx admin-prohibited
    ip saddr {supernet} ip daddr {supernet} accept
    reject with icmpx admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    jump between
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iif lo accept
    ip daddr {operator.router} ip saddr {operator.network} accept
    jump between
  }}
"""


def fence(topology: Topology, site: Site) -> str:
    """The packet filter of a Kubernetes node, for its own packets and its pods'; there before its first component.

    It looks at destinations after kube-proxy has replaced those that it knows, before kube-proxy would drop the other
    Service addresses without a word, and before the kernel misses a route (it says so to each pod once a second only).
    So a Service address that nobody has taken over is refused as a closed port is (`unprogrammed` counts them), and an
    address that is not the lab's is refused even where somebody has planted a default route (`outside`). Should a pod
    with all privileges remove the table, the router still refuses.
    """
    lab = f"{topology.supernet}, {site.pods}, {NOT_ROUTED}"
    return f"""
  counter unprogrammed {{ }}
  counter outside {{ }}
  chain stay {{
    ip daddr {site.services} counter name unprogrammed reject
    ip daddr != {{ {lab} }} counter name outside reject with icmpx admin-prohibited
  }}
  chain output {{
    type filter hook output priority filter - 1; policy accept;
    jump stay
  }}
  chain arrive {{
    type filter hook prerouting priority dstnat + 1; policy accept;
    jump stay
  }}
"""


def load(rules: str, *elements: str) -> str:
    """The text for nft that replaces the lab's table of a namespace, whole and at once."""
    fresh = f"table inet {TABLE}\ndelete table inet {TABLE}\n"
    return f'{fresh}table inet {TABLE} {{\n  comment "{mark(rules)}"\n{rules}}}\n{"".join(elements)}'


def mark(rules: str) -> str:
    """Names a ruleset, so that one look tells whether it is the loaded one."""
    return hashlib.sha256(rules.encode()).hexdigest()[:16]


def plan(topology: Topology, observed: Fabric, cut: Iterable[str] | None = None) -> list[Action]:
    """The commands that bring the network to its state; `cut` names the sites to be cut off (None: as they are)."""
    actions: list[Action] = []
    want = desired(topology)
    new: set[str] = set()
    for name in want:
        if name != MACHINE and name not in observed.spaces:
            new.add(name)
            actions.append(Action(f"namespace {name}", ("ip", "netns", "add", name)))
    if ROUTER in new or not observed.spaces[ROUTER].forwarding:
        actions.append(Action("forwarding between the sites", (*IN_ROUTER, "sysctl", "-e", "-q", "-w", *KERNEL)))
    rules = ruleset(topology)
    if observed.rules != mark(rules):
        # The filter comes before the first link: there is no moment in which the fabric forwards unfiltered.
        keep = [f"add element inet {TABLE} cut {{ {network} }}\n" for network in sorted(observed.cut)]
        actions.append(Action("packet filter", (*IN_ROUTER, "nft", "-f", "-"), load(rules, *keep)))
    for node in topology.nodes:
        name = space_of(node.name)
        if want[name].fence != observed.spaces.get(name, Space()).fence and want[name].fence:
            inside = ("ip", "netns", "exec", name)
            text = load(fence(topology, topology.site(node.site)))
            actions.append(Action(f"fence of {node.name}", (*inside, "nft", "-f", "-"), text))
            # As the router: every refusal is said, not one a second.
            quick = "net.ipv4.icmp_ratelimit=0"
            actions.append(Action(f"refusals of {node.name}", (*inside, "sysctl", "-q", "-w", quick)))
    if cut is not None:
        actions += plan_cut(topology, observed.cut, cut)

    router = observed.spaces.get(ROUTER, Space())
    lines: list[str] = []
    machine = observed.spaces.get(MACHINE, Space())
    for site in topology.sites:
        if site.bridge not in router.links:
            lines.append(f"link add {site.bridge} type bridge forward_delay 0")
    for name in want:
        peer = name.removeprefix(PREFIX)
        if name not in (MACHINE, ROUTER) and ("eth0" not in observed.spaces.get(name, Space()).links):
            if port_of(peer) in router.links:
                lines.append(f"link del {port_of(peer)}")
            lines.append(f"link add {port_of(peer)} type veth peer name eth0 netns {name}")
    if lines:
        actions.append(Action("links", ("ip", "-n", ROUTER, "-batch", "-"), "\n".join(lines) + "\n"))
    rebuilt = {line.split()[2] for line in lines if line.startswith("link add")}
    if UPLINK not in machine.links or "operator" not in router.links:
        rebuilt |= {"operator", UPLINK}
        if UPLINK in machine.links:
            # Its other end is in a fabric that was deleted and has not quite gone yet.
            actions.append(Action(f"left-over link {UPLINK}", ("ip", "link", "del", UPLINK)))
        ends = ("type", "veth", "peer", "name", "operator", "netns", ROUTER)
        actions.append(Action(f"link {UPLINK} to the machine", ("ip", "link", "add", UPLINK, *ends)))
    for name, space in want.items():
        seen = observed.spaces.get(name, Space())
        settings = plan_settings(space, seen, rebuilt if name in (ROUTER, MACHINE) else set())
        if settings:
            where: tuple[str, ...] = ("-n", name) if name else ()
            what = f"addresses and routes of {name or 'the machine'}"
            actions.append(Action(what, ("ip", *where, "-batch", "-"), "\n".join(settings) + "\n"))
    return actions


def plan_settings(want: Space, seen: Space, rebuilt: set[str]) -> list[str]:
    """Lines for `ip -batch`: masters, addresses, links up, routes; no default route stays."""
    lines: list[str] = []
    for name, link in want.links.items():
        have = Link() if name in rebuilt else seen.links.get(name, Link())
        if link.master and link.master != have.master:
            lines.append(f"link set {name} master {link.master}")
        if name != "lo":
            lines += [f"addr add {address} dev {name}" for address in sorted(link.addresses - have.addresses)]
            # A single address is one that floats between nodes: it is theirs to give up.
            surplus = sorted(a for a in have.addresses - link.addresses if not a.endswith("/32"))
            lines += [f"addr del {address} dev {name}" for address in surplus]
        if link.up and not have.up:
            lines.append(f"link set {name} up")
    # A route goes with its link.
    have_routes = frozenset[tuple[str, str]]() if rebuilt & set(want.links) and want.routes else seen.routes
    lines += [f"route replace {to} via {via}" for to, via in sorted(want.routes - have_routes)]
    if UPLINK not in want.links:
        # The machine's default route is its own affair; a node's would be a mistake or a test's leftover.
        lines += [f"route del {to} via {via}" for to, via in sorted(seen.routes) if to == "default"]
    return lines


def plan_cut(topology: Topology, observed: frozenset[str], cut: Iterable[str]) -> list[Action]:
    """The commands after which exactly these sites are cut off; raises TopologyError for an unknown one."""
    wanted = {str(topology.site(name).network) for name in cut}
    lines = [f"add element inet {TABLE} cut {{ {n} }}" for n in sorted(wanted - observed)]
    lines += [f"delete element inet {TABLE} cut {{ {n} }}" for n in sorted(observed - wanted)]
    if not lines:
        return []
    return [Action("cut set", (*IN_ROUTER, "nft", "-f", "-"), "\n".join(lines) + "\n")]


def plan_absent(observed: Fabric) -> list[Action]:
    """The commands that remove every namespace of the lab and the machine's link; routes and peers go with them."""
    actions = []
    if UPLINK in observed.spaces.get(MACHINE, Space()).links:
        actions.append(Action(f"link {UPLINK}", ("ip", "link", "del", UPLINK)))
    actions += [
        Action(f"namespace {name}", ("ip", "netns", "del", name))
        for name in sorted(observed.spaces)
        if name != MACHINE and name.startswith(PREFIX)
    ]
    return actions


def run(command: Sequence[str], stdin: str = "") -> str:
    """Runs a command; raises FabricError with what it said when it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        raise FabricError(f"`{' '.join(command)}` failed: {said}\n{stdin}".strip())
    return done.stdout


def observe(links: bool = True) -> Fabric:
    """What is there now. Without `links` only the cut set is read, which is all a cut needs."""
    names = [n["name"] for n in json.loads(run(("ip", "-j", "netns", "list")) or "[]") if n["name"].startswith(PREFIX)]
    spaces: dict[str, Space] = {}
    for name in [MACHINE, *names]:
        spaces[name] = _observe_space(name) if links else Space()
    rules, cut = "", frozenset[str]()
    if ROUTER in names:
        rules, listed = _observe_rules(ROUTER)
        elements = re.search(r"set cut \{.*?elements = \{(.*?)\}", listed, re.DOTALL)
        if elements:
            cut = frozenset(str(IPv4Network(item.strip())) for item in elements.group(1).split(",") if item.strip())
    return Fabric(spaces, rules, cut)


def _observe_rules(name: str) -> tuple[str, str]:
    """The mark of the lab's table in a namespace, and the table; both empty when it is not there.

    An `up` that was interrupted right before leaves none, which is not a failure.
    """
    command = ("ip", "netns", "exec", name, "nft", "-s", "list", "table", "inet", TABLE)
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r'^\tcomment "([0-9a-f]+)"$', listed, re.MULTILINE)
    return (found.group(1) if found else ""), listed


def _observe_space(name: str) -> Space:
    where: tuple[str, ...] = ("-n", name) if name else ()
    links = {}
    for item in json.loads(run(("ip", "-j", *where, "addr", "show")) or "[]"):
        if "ifname" not in item or (name == MACHINE and item["ifname"] != UPLINK):
            continue
        inet = [a for a in item.get("addr_info", []) if a["family"] == "inet"]
        addresses = frozenset(f"{a['local']}/{a['prefixlen']}" for a in inet)
        links[item["ifname"]] = Link(addresses, "UP" in item.get("flags", []), item.get("master", ""))
    routes = frozenset(
        (r["dst"], r["gateway"])
        for r in json.loads(run(("ip", "-j", *where, "route", "show")) or "[]")
        if "gateway" in r and (name != MACHINE or r.get("dev") == UPLINK)
    )
    forwarding = False
    if name == ROUTER:
        forwarding = run(("ip", "netns", "exec", name, "sysctl", "-n", "net.ipv4.ip_forward")).strip() == "1"
    fenced = _observe_rules(name)[0] if name not in (ROUTER, MACHINE) else ""
    return Space(links, routes, forwarding, fenced)


def apply(actions: Iterable[Action]) -> None:
    """Runs the planned commands in order; raises FabricError at the first that fails."""
    for action in actions:
        run(action.command, action.stdin)
