"""A node's rules as an nftables table, replaced whole in one transaction.

Each pod has a link of its own to the node (CNI plugin ptp), so every packet of a pod is routed and passes these hooks,
also between two pods of one node. They stand behind the destination translation of Services: a rule sees the pod that
answers, not the Service's address.
"""

from __future__ import annotations

import hashlib
import ipaddress
import subprocess
from collections.abc import Callable, Sequence

from .rules import ALL, Allow, NodeRules, Range

NAME = "inet censuschat_network"
#: The node's end of each pod's link, as the CNI plugin ptp names it.
LINKS = '"veth*"'
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
Runner = Callable[[Sequence[str], str], str]


class CommandError(RuntimeError):
    """A program of the node failed; the message has what it said."""


def run(argv: Sequence[str], text: str = "") -> str:
    """Run a program with `text` on standard input; its standard output. Raises CommandError, also after 30 s."""
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, check=False, timeout=30, env=_ENVIRONMENT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise CommandError(f"{' '.join(argv)} failed with {done.returncode}: {done.stderr.strip()[:1000]}")
    return done.stdout


def render(rules: NodeRules) -> str:
    """The text for `nft -f`. The same rules give the same text."""
    chains: dict[str, list[str]] = {}
    maps: dict[str, list[str]] = {"ingress": [], "egress": []}
    for pod in rules.pods:
        for kind, allowed in (("ingress", pod.ingress), ("egress", pod.egress)):
            if allowed is not None:
                lines = [line for allow in allowed for line in _allow(allow, kind)]
                # Pods with the same rules, such as replicas, share a chain.
                chain = f"{kind}_{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"
                chains[chain] = lines
                maps[kind].append(f"{pod.address} : jump {chain}")
    own = [f"{pod.address} . {pod.address}" for pod in rules.pods]
    body = [
        *_named("set known", "ipv4_addr", rules.known),
        *_named("set self", "ipv4_addr . ipv4_addr", own),
        *_chain(
            "denied",
            # A new pod elsewhere, not heard of yet: it tries again by itself, where an answer would be final.
            f"ip saddr {rules.pod_cidr} ip saddr != @known drop",
            "meta l4proto tcp ct state established reject with tcp reset",
            "reject with icmp admin-prohibited",
            "drop",
        ),
    ]
    for chain, lines in sorted(chains.items()):
        body += _chain(chain, *lines, "goto denied")
    body += [
        *_named("map ingress", "ipv4_addr : verdict", maps["ingress"]),
        *_named("map egress", "ipv4_addr : verdict", maps["egress"]),
        *_chain(
            "spoofed",
            "type filter hook prerouting priority raw",
            f"iifname {LINKS} meta nfproto ipv6 drop",
            f"iifname {LINKS} fib saddr . iif oif missing drop",
        ),
        *_chain(
            "forwarded",
            "type filter hook forward priority filter",
            # Answers pass. What the opener of a connection sends is judged packet by packet, so that a policy that
            # comes later ends what it forbids.
            "ct direction reply accept",
            "ct state related meta l4proto icmp accept",
            f"iifname {LINKS} ip saddr != @known drop",
            f"oifname {LINKS} ip daddr != @known drop",
            # A pod cannot be kept from itself.
            "ip saddr . ip daddr @self accept",
            "ip saddr vmap @egress",
            "ip daddr vmap @ingress",
        ),
        # The node's own addresses, behind which its balancer stands. The way from the node to its pods is free: probes.
        *_chain(
            "to_node",
            "type filter hook input priority filter",
            "ct direction reply accept",
            "ct state related meta l4proto icmp accept",
            f"iifname {LINKS} ip saddr != @known drop",
            "ip saddr vmap @egress",
        ),
        # Outside the pods' networks nobody knows a way back to a pod.
        *_chain(
            "leaving",
            "type nat hook postrouting priority srcnat",
            f"ip saddr {rules.pod_cidr} ip daddr != {rules.pod_cidr} oifname != {LINKS} masquerade",
        ),
    ]
    text = "\n".join(body)
    return f'table {NAME}\ndelete table {NAME}\ntable {NAME} {{\n  comment "{mark(text)}"\n{text}\n}}\n'


def mark(text: str) -> str:
    """Names a table's text, so that one look tells whether it is the loaded one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mark_of(text: str) -> str:
    """The mark in a rendered or listed table; empty when there is none."""
    _, found, rest = text.partition('comment "')
    return rest.partition('"')[0] if found else ""


def load(text: str, runner: Runner = run) -> None:
    """Replaces the kernel's table in one transaction; on CommandError the old one still holds."""
    runner(("nft", "-f", "-"), text)


def loaded(runner: Runner = run) -> str:
    """The mark of the table in the kernel; empty when there is none."""
    try:
        return mark_of(runner(("nft", "-t", "list", "table", *NAME.split()), ""))
    except CommandError:
        return ""


def _chain(name: str, *lines: str) -> list[str]:
    return [f"  chain {name} {{", *(f"    {line}" for line in lines), "  }"]


def _named(kind: str, types: str, elements: Sequence[str]) -> list[str]:
    held = [f"    elements = {{ {', '.join(elements)} }}"] if elements else []
    return [f"  {kind} {{", f"    type {types}", *held, "  }"]


def _allow(allow: Allow, kind: str) -> list[str]:
    """The rules that let one entry pass: `return` goes on to the other pod's rules."""
    side = "saddr" if kind == "ingress" else "daddr"
    peers = "" if allow.peers == ALL else f"ip {side} {{ {', '.join(map(_range, allow.peers))} }} "
    if allow.ports is None:
        return [f"{peers}return"]
    lines = []
    for protocol in dict.fromkeys(port[0] for port in allow.ports):
        spans = [(first, last) for name, first, last in allow.ports if name == protocol]
        if spans == [(0, 65535)]:
            lines.append(f"{peers}meta l4proto {protocol.lower()} return")
        else:
            listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
            lines.append(f"{peers}{protocol.lower()} dport {{ {listed} }} return")
    return lines


def _range(span: Range) -> str:
    first, last = (str(ipaddress.IPv4Address(number)) for number in span)
    return first if first == last else f"{first}-{last}"
