"""Disposable nodes instead of the two regions: plain Debian ones, made and removed by `lab up` and `lab down`.

They are a lab of one site whose inventory is written for the occasion, so they start, are reached, are kept apart from
everything else and are removed as every lab is, also after an interrupt. One lab lives on a machine at a time: that the
other one is gone is part of what makes figures comparable.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from lab import topology, verbs
from lab.cli import Refusal
from lab.nodes import write
from lab.paths import REPO, STATE, cache
from lab.topology import PLAIN, SUITES

NETWORK = IPv4Network("10.77.9.0/24")
SITE = "trial"
#: The name of a node's link in the fabric has 15 characters at most.
NAME_MAX = 15
FIRST_HOST = 11


class TrialError(RuntimeError):
    """The nodes could not be made, or not be removed; the message says what to do."""


@dataclass(frozen=True)
class Trial:
    """A node that is wanted: its name, its groups of the inventory, Debian's release on it."""

    name: str
    groups: tuple[str, ...] = ()
    suite: str = SUITES[0]


def describe(nodes: Sequence[Trial]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The groups and the variables of an inventory of these nodes. Raises TrialError when they do not fit."""
    for node in nodes:
        if len(node.name) > NAME_MAX:
            raise TrialError(f"the node's name {node.name!r} has more than {NAME_MAX} characters")
    addresses = list(NETWORK.hosts())[FIRST_HOST - 1 :]
    if len(nodes) > len(addresses):
        raise TrialError(f"{len(nodes)} nodes are more than {NETWORK} has addresses for ({len(addresses)})")
    hosts = {
        node.name: {"ansible_host": str(address), "region": SITE, "zone": f"{SITE}-a", "lab_suite": node.suite}
        for node, address in zip(nodes, addresses, strict=False)
    }
    groups: dict[str, dict[str, None]] = {}
    for node in nodes:
        for group in (PLAIN, *node.groups):
            groups.setdefault(group, {})[node.name] = None
    children = {"nodes": {"hosts": hosts}, **{name: {"hosts": members} for name, members in groups.items()}}
    return {"all": {"children": children}}, variables()


def variables() -> dict[str, Any]:
    """The variables of every inventory of disposable nodes: their network, and the way in that all labs have."""
    shipped = REPO / "inventories" / "lab" / "group_vars" / "all" / "main.yml"
    with shipped.open(encoding="utf-8") as stream:
        lab = yaml.safe_load(stream)
    networks = {
        **{key: lab["lab_networks"][key] for key in ("supernet", "operator")},
        "sites": {SITE: str(NETWORK)},
        "pods": {},
        "services": {},
        "clients": {},
    }
    way_in = {key: value for key, value in lab.items() if key.startswith("ansible_")}
    return {"environment_name": SITE, "lab_networks": networks, "lab_state": str(STATE), **way_in}


def write_inventory(directory: Path, nodes: Sequence[Trial]) -> topology.Topology:
    """Writes the inventory of these nodes; returns the topology it describes. Raises TrialError."""
    hosts, values = describe(nodes)
    (directory / "group_vars" / "all").mkdir(parents=True, exist_ok=True)
    write(directory / "hosts.yml", yaml.safe_dump(hosts, sort_keys=False))
    write(directory / "group_vars" / "all" / "main.yml", yaml.safe_dump(values, sort_keys=False))
    return topology.load(directory)


def refuse_beside_another() -> None:
    """Raises Refusal while a lab is there: it would be taken down for the disposable nodes."""
    verbs.need_root()
    there = verbs.recorded()
    if there is not None:
        raise Refusal(
            f"a lab made from {there} is there, and disposable nodes take its place; "
            "remove it first with: scripts/run lab down"
        )


def lab(*arguments: str) -> None:
    """Runs a verb of the lab with its output shown. Raises TrialError when it fails.

    In a session of its own: an interrupt from the keyboard is ours to answer, and must not stop a removal half-way.
    """
    command = (sys.executable, "-m", "lab", *arguments)
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    ) as process:
        try:
            code = process.wait()
        except BaseException:
            # With all that it started; `lab down` waits for what of it is still at work.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    if code:
        raise TrialError(f"`lab {' '.join(arguments)}` ended with {code}; its last lines say why")


@contextlib.contextmanager
def running(nodes: Sequence[Trial], name: str) -> Iterator[tuple[Path, topology.Topology]]:
    """Fresh nodes; gives their inventory and topology. They are removed however the block ends, SIGTERM included.

    After a SIGKILL `lab down` removes them. Raises Refusal beside another lab, TrialError when they do not start.
    """
    refuse_beside_another()
    inventory = cache() / "trial" / name
    described = write_inventory(inventory, nodes)
    with ended_by_exceptions():
        try:
            lab("up", "--inventory", str(inventory))
            yield inventory, described
        finally:
            with undisturbed():
                lab("down", "--inventory", str(inventory))


@contextlib.contextmanager
def ended_by_exceptions() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP end the program as an exception does, so that what is to be removed is."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handlers({signal.SIGTERM: end, signal.SIGHUP: end}):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it neither SIGINT nor SIGTERM nor SIGHUP ends the program."""
    with handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def handlers(wanted: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Other handlers of these signals for a while."""
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
