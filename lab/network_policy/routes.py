"""The ways to the other nodes' pods: one route for each pod block, through the node that has it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .model import Node
from .table import Runner, run

#: The mark of our routes in the kernel's table; others are left alone.
PROTOCOL = "178"


def wanted(nodes: Mapping[str, Node], own: str) -> dict[str, str]:
    """Destination to gateway, for every other node that has a block and an address."""
    others = [node for node in nodes.values() if node.name != own and node.pod_cidr and node.address]
    return {node.pod_cidr: node.address for node in others}


def plan(want: Mapping[str, str], have: Mapping[str, str]) -> list[str]:
    """The lines for `ip -batch` that make the difference."""
    lines = [f"route del {cidr} via {via} proto {PROTOCOL}" for cidr, via in sorted(have.items()) if cidr not in want]
    return lines + [
        f"route replace {cidr} via {via} proto {PROTOCOL}"
        for cidr, via in sorted(want.items())
        if have.get(cidr) != via
    ]


def observed(runner: Runner = run) -> dict[str, str]:
    said = json.loads(runner(("ip", "-j", "route", "show", "proto", PROTOCOL), "") or "[]")
    return {route["dst"]: route.get("gateway", "") for route in said}


def converge(want: Mapping[str, str], runner: Runner = run) -> list[str]:
    """Brings the routes to their state; the lines it took. Raises CommandError after having tried all of them."""
    lines = plan(want, observed(runner))
    if lines:
        runner(("ip", "-force", "-batch", "-"), "\n".join(lines) + "\n")
    return lines
