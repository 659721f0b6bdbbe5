"""What the verbs of `lab` do: checks first, then the playbook of the verb, with its progress shown."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lab import lock, machine, nodes, topology
from lab.cli import EXIT_BUSY, EXIT_FAILED, Refusal
from lab.paths import REPO, STATE

PROFILES = {"": "lab", "small": "lab-small", "ha": "lab-ha"}
PLAYBOOKS = REPO / "lab" / "playbooks"
#: The inventories that ship, by the option of `up` that takes them.
INVENTORIES = {profile: REPO / "inventories" / name for profile, name in PROFILES.items()}
#: Which inventory the lab was made from.
RECORD = STATE / "lab.json"
LOCK = Path("/run/lock/censuschat-lab.lock")


def recorded() -> Path | None:
    """The inventory of the lab that is there, whole or in part; None when there is none."""
    try:
        return Path(json.loads(RECORD.read_text(encoding="utf-8"))["inventory"])
    except (OSError, ValueError, KeyError):
        return None


def current() -> tuple[Path, topology.Topology]:
    """The inventory and topology of the lab that is there; refuses when there is none."""
    need_root()
    inventory = recorded()
    if inventory is None:
        raise Refusal("no lab is up; start it with: scripts/run lab up")
    return inventory, read(inventory)


def read(inventory: Path) -> topology.Topology:
    try:
        return topology.load(inventory)
    except topology.TopologyError as error:
        raise Refusal(str(error)) from error


def need_root() -> None:
    if os.geteuid() != 0:
        raise Refusal("the lab needs root (network namespaces, containers with systemd); run it with sudo")


@contextlib.contextmanager
def alone(patience: float = 60.0) -> Iterator[int]:
    """Holds the lock of all commands that change the lab; refuses when another one keeps it for `patience` seconds."""
    try:
        with lock.alone(LOCK, patience) as descriptor:
            yield descriptor
    except lock.BusyError:
        raise Refusal("another lab command is still changing the lab; try again later", EXIT_BUSY) from None


def play(verb: str, inventory: Path, held: int | None = None, **variables: str | bool) -> int:
    """Runs the verb's playbook with progress lines; returns 0, or 1 when a task failed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ANSIBLE_CONFIG": str(PLAYBOOKS / "ansible.cfg"),
        "ANSIBLE_FORKS": str(max(4, 2 * (os.cpu_count() or 1))),
    }
    if verb == "up" or machine.PODMAN_SETTINGS.exists():
        # `up` writes them before its first use of podman.
        environment["CONTAINERS_CONF"] = str(machine.PODMAN_SETTINGS)
    extra = json.dumps({"lab_inventory": str(inventory), **variables})
    ansible = (sys.executable, "-m", "ansible", "playbook")
    command = (*ansible, "-i", str(inventory), "-e", extra, str(PLAYBOOKS / f"{verb}.yml"))
    kept = () if held is None else (held,)
    done = subprocess.run(command, env=environment, check=False, stdin=subprocess.DEVNULL, pass_fds=kept)
    return EXIT_FAILED if done.returncode else 0


def up(arguments: argparse.Namespace) -> int:
    inventory = Path(arguments.inventory).resolve() if arguments.inventory else INVENTORIES[arguments.profile]
    lab = read(inventory)
    there = recorded() if os.geteuid() == 0 else None
    refuse_another(there, inventory)
    # What a running lab takes itself does not count against it.
    found = machine.problems(machine.observe(lab), lab, resuming=there is not None)
    if found:
        raise Refusal(" ".join(found))
    if any(node.kubernetes for node in lab.nodes):
        prepare_programs()
    with alone() as held:
        # Another `up` may have begun while the programs were made.
        refuse_another(recorded(), inventory)
        began = time.monotonic()
        STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
        nodes.write(RECORD, json.dumps({"inventory": str(inventory)}) + "\n")
        code = play("up", inventory, held)
        if code == 0:
            print(
                f"the lab is up: {len(lab.nodes)} nodes, {time.monotonic() - began:.0f} s; see: scripts/run lab status"
            )
        else:
            print(
                "the lab is not up; `lab up` resumes once the cause is mended, `lab down` removes it", file=sys.stderr
            )
        return code


def refuse_another(there: Path | None, inventory: Path) -> None:
    """Raises Refusal when a lab of another inventory is there: its nodes are others to their clusters."""
    if there is not None and there != inventory:
        raise Refusal(f"a lab made from {there} is there already; remove it first with: scripts/run lab down")


def prepare_programs() -> None:
    """Makes the cache hold the programs of the inventories' Kubernetes version, the catalogue's default.

    Minutes when they have to be made, nothing when they are there. Raises Refusal naming the program that is missing.
    """
    from lab.programs import command

    command.run(argparse.Namespace(kubernetes="", only="main", source="auto", update=False))


def down(arguments: argparse.Namespace) -> int:
    need_root()
    # An `up` that was killed may still be making an image; nothing of it may come after the removal.
    with alone(patience=300) as held:
        there = recorded()
        if arguments.inventory and there not in (None, Path(arguments.inventory).resolve()):
            print(f"left alone: the lab that is there is made from {there}")
            return 0
        code = play("down", INVENTORIES[""], held, lab_images=arguments.images)
        if code == 0:
            images = "its images too" if arguments.images else "its images stay cached (--images removes them)"
            print(f"the lab is gone; {images}")
        return code


def cut(arguments: argparse.Namespace) -> int:
    return sever("cut", arguments.region)


def heal(arguments: argparse.Namespace) -> int:
    return sever("heal", arguments.region)


def sever(verb: str, region: str) -> int:
    """Cuts or heals a region."""
    inventory, lab = current()
    try:
        lab.site(region)
    except topology.TopologyError as error:
        raise Refusal(str(error)) from error
    return play(verb, inventory, lab_region=region)


def restart(arguments: argparse.Namespace) -> int:
    inventory, lab = current()
    try:
        node = lab.node(arguments.host)
    except topology.TopologyError as error:
        raise Refusal(str(error)) from error
    return play("restart", inventory, lab_host=node.name)


def status(arguments: argparse.Namespace) -> int:
    """0 when every node answers (those in a cut region cannot) and every service runs; 1 otherwise."""
    need_root()
    inventory = recorded()
    if inventory is None:
        print(json.dumps({"up": False, "inventory": None, "nodes": []}) if arguments.json else "no lab is up")
        return EXIT_FAILED
    lab = read(inventory)
    from lab import report

    state = report.observe(inventory, lab)
    print(report.as_json(state) if arguments.json else report.as_table(state))
    return 0 if state.up else EXIT_FAILED
