"""What `lab status` shows: every node, every service, every cut, as they are now."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import fabric, nodes, processes
from lab.paths import LABEL, PREFIX, STATE
from lab.topology import Topology

#: Processes without which the lab is not up; clients come and go.
SERVICES = ("packages", "aws", "dns")


@dataclass(frozen=True)
class NodeState:
    name: str
    region: str
    zone: str
    role: str
    address: str
    container: str
    ssh: bool
    cut: bool
    #: What its cluster says of it: "Ready", "NotReady", "cordoned" too when nothing is placed on it, "not a member",
    #: "API silent"; empty outside Kubernetes, without a cluster and in a region that is cut off.
    cluster: str = ""


@dataclass(frozen=True)
class LabState:
    """The lab at one moment. `up`: every node runs and answers unless it is cut off, every service runs.

    What runs on the nodes, a cluster included, is not part of it.
    """

    inventory: str
    nodes: tuple[NodeState, ...]
    services: dict[str, int]
    cut: tuple[str, ...]
    network: bool
    took_s: float

    @property
    def up(self) -> bool:
        return not missing(self)


def missing(state: LabState) -> list[str]:
    """What is not as it should be: nodes (those in a cut region cannot answer), services, the network."""
    absent = [n.name for n in state.nodes if n.container != "running" or not (n.ssh or n.cut)]
    services = [name for name in SERVICES if name not in state.services]
    return absent + services + ([] if state.network else ["network"])


def observe(inventory: Path, lab: Topology) -> LabState:
    """Looks at containers, ssh ports, processes, clusters and the cut set; changes nothing. About half a second."""
    began = time.monotonic()
    network = fabric.observe(links=False)
    cut = tuple(site.name for site in lab.sites if str(site.network) in network.cut)
    have = containers()

    def answers(address: str) -> bool:
        try:
            # A node that is busy takes its time; one that is down is refused at once.
            with socket.create_connection((address, 22), timeout=3.0) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    reachable = [str(node.address) for node in lab.nodes if node.site not in cut]
    with ThreadPoolExecutor(max_workers=16) as pool:
        regions = [site.name for site in lab.sites if site.name not in cut and kubeconfig(site.name).is_file()]
        asked = pool.map(members, regions)
        ssh = dict(zip(reachable, pool.map(answers, reachable), strict=True))
        clusters = dict(zip(regions, asked, strict=True))
    seen = tuple(
        NodeState(
            node.name,
            node.site,
            node.zone,
            node.role,
            str(node.address),
            have.get(PREFIX + node.name, "absent"),
            ssh.get(str(node.address), False),
            node.site in cut,
            standing(node.name, clusters[node.site]) if node.kubernetes and node.site in clusters else "",
        )
        for node in lab.nodes
    )
    there = fabric.ROUTER in network.spaces and bool(network.rules)
    return LabState(str(inventory), seen, processes.observe(), cut, there, round(time.monotonic() - began, 2))


def kubeconfig(region: str, state: Path = STATE) -> Path:
    """The operator's way into a region's cluster; the file is there once the cluster has been made."""
    return state / "kubernetes" / f"{region}.kubeconfig"


def members(region: str, patience: int = 2) -> dict[str, Any] | None:
    """The Node objects of a region's cluster by name; None when its API does not answer within `patience` seconds."""
    kubectl = sorted(nodes.programs().glob("v*/bin/kubectl"))
    if not kubectl:
        return None
    flags = (f"--kubeconfig={kubeconfig(region)}", f"--request-timeout={patience}s")
    command = (str(kubectl[-1]), *flags, "get", "nodes", "--output=json")
    try:
        # kubectl prints an empty list also when nobody answers; only its exit code tells.
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * patience)
        return {item["metadata"]["name"]: item for item in json.loads(done.stdout)["items"]}
    except (subprocess.SubprocessError, OSError, ValueError, KeyError):
        return None


def standing(name: str, cluster: Mapping[str, Any] | None) -> str:
    """What a cluster says of a node, in the words of NodeState.cluster."""
    if cluster is None:
        return "API silent"
    if name not in cluster:
        return "not a member"
    conditions = {c["type"]: c["status"] for c in cluster[name].get("status", {}).get("conditions", [])}
    ready = "Ready" if conditions.get("Ready") == "True" else "NotReady"
    return ready + (", cordoned" if cluster[name].get("spec", {}).get("unschedulable") else "")


def containers() -> dict[str, str]:
    """The state, in podman's words, of each container of the lab by name; none when podman is not there."""
    command = ("podman", "ps", "--all", "--filter", f"label={LABEL}", "--format", "json")
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return {}
    return {item["Names"][0]: item["State"] for item in json.loads(said or "[]")}


def as_json(state: LabState) -> str:
    return json.dumps({"up": state.up, **dataclasses.asdict(state)}, indent=2)


def as_table(state: LabState) -> str:
    """The same for people, in the width of their terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), force_terminal=Console().is_terminal, width=max(Console().width, 80))
    table = Table(box=None, header_style="bold", pad_edge=False)
    clusters = any(node.cluster for node in state.nodes)
    for column in ("node", "zone", "address", "container", "ssh", *(["cluster"] if clusters else [])):
        table.add_column(column)
    region = ""
    for node in state.nodes:
        if node.region != region:
            region = node.region
            table.add_section()
            table.add_row(f"[bold]{region}[/bold]" + (" [red bold]CUT OFF[/red bold]" if node.cut else ""))
        container = node.container if node.container == "running" else f"[red]{node.container}[/red]"
        ssh = "[yellow]unseen (cut)[/yellow]" if node.cut else "yes" if node.ssh else "[red]no[/red]"
        cluster = node.cluster if node.cluster in ("", "Ready") else f"[yellow]{node.cluster}[/yellow]"
        row = (f"  {node.name}", node.zone, node.address, container, ssh, *([cluster] if clusters else []))
        table.add_row(*row)
    console.print(table)
    for name in SERVICES:
        pid = state.services.get(name)
        console.print(f"{name:9} " + (f"running (pid {pid})" if pid else "[red]not running[/red]"), highlight=False)
    clients = sorted(set(state.services) - set(SERVICES))
    if clients:
        console.print(f"clients   {', '.join(clients)}", highlight=False)
    if not state.network:
        console.print("[red]the network is not there[/red]")
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    if not state.up:
        return text + f"the lab is not all up ({', '.join(missing(state))}); `lab up` finishes it"
    return text + "the lab is up" + (f"; cut off: {', '.join(state.cut)}" if state.cut else "")
