"""`scripts/bench cluster`: from hardened nodes to a cluster that is Ready, by phase, with 1 and 3 control planes; and
what one more node costs beside 3 others and beside 30.

Each profile starts from a fresh lab whose primary region has been hardened. The further nodes of the second part are
Node objects whose heartbeats the benchmark sends: to the API they are nodes, the machine does not pay for their pods.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.api import Access, Api, ApiError

from lab import demo
from lab.paths import REPO, STATE

REGION, GROUP = "us-east-1", "us_east_1"
INVENTORIES = {1: "inventories/lab", 3: "inventories/lab-ha"}
OPTIONS: dict[int, list[str]] = {1: [], 3: ["--ha"]}
KUBECONFIG = STATE / "kubernetes" / f"{REGION}.kubeconfig"
NEWCOMER = "use1-app3"
HEARTBEAT_S = 8.0
"""Well inside the 40 s after which a node without a heartbeat counts as lost."""


@dataclass(frozen=True)
class Run:
    """One run of a playbook: seconds in all and by play, and the hosts that were spoken to."""

    seconds: float
    phases: dict[str, float]
    hosts: tuple[str, ...]


def playbook(inventory: str, name: str, limit: str, *options: str) -> Run:
    """Run a playbook; SystemExit with its words when it fails."""
    command = ["ansible-playbook", "-i", inventory, "--limit", limit, f"playbooks/{name}.yml", *options]
    environment = {**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}
    started = time.monotonic()
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    took = time.monotonic() - started
    if done.returncode:
        raise SystemExit(
            f"error: `{' '.join(command)}` ended with {done.returncode}:\n{done.stdout[-6000:]}{done.stderr}"
        )
    said: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
    phases = {entry["play"]["name"]: _seconds(entry["play"]["duration"]) for entry in said["plays"] if entry["tasks"]}
    return Run(took, phases, tuple(sorted(host for host in said["stats"] if host != "localhost")))


def _seconds(duration: dict[str, str]) -> float:
    start, end = (datetime.datetime.fromisoformat(duration[key]) for key in ("start", "end"))
    return (end - start).total_seconds()


def build(planes: int) -> None:
    """From hardened nodes to Ready, phase by phase; and a second run, which has nothing to do."""
    inventory = INVENTORIES[planes]
    demo.run("Remove what an earlier lab left", [sys.executable, "-m", "lab", "down"])
    demo.run("Start the lab", [sys.executable, "-m", "lab", "up", *OPTIONS[planes]])
    demo.run("Harden the region", ["ansible-playbook", "-i", inventory, "-l", GROUP, "playbooks/harden.yml"])
    for name in ("cluster", "cluster_again"):
        run = playbook(inventory, "cluster", GROUP)
        for phase, seconds in run.phases.items() if name == "cluster" else ():
            print(f"bench cluster: control_planes={planes} phase={phase.lower().replace(' ', '_')} s={seconds:.1f}")
        print(
            f"bench cluster: control_planes={planes} phase={name} s={run.seconds:.1f} nodes={len(run.hosts)}",
            flush=True,
        )


@contextlib.contextmanager
def further_nodes(number: int) -> Iterator[None]:
    """So many more Node objects that send heartbeats; gone afterwards."""
    names = [f"bench-{index}" for index in range(number)]
    ended = threading.Event()
    with contextlib.closing(Api(Access.of(str(KUBECONFIG)))) as api:

        def beat() -> None:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            for name in names:
                path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
                spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now}
                api.call("PATCH", f"{path}/{name}", {"spec": spec}, "application/merge-patch+json")

        def keep_beating() -> None:
            while not ended.wait(HEARTBEAT_S):
                beat()

        def remove() -> None:
            for name in names:
                for path in ("/api/v1/nodes", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"):
                    with contextlib.suppress(ApiError):
                        api.call("DELETE", f"{path}/{name}")

        heart = threading.Thread(target=keep_beating, daemon=True)
        try:
            for name in names:
                ready = {"type": "Ready", "status": "True", "reason": "Benchmark", "message": "sent by the benchmark"}
                node = {
                    "apiVersion": "v1",
                    "kind": "Node",
                    "metadata": {"name": name},
                    "spec": {"unschedulable": True},
                    "status": {"conditions": [ready], "allocatable": {"pods": "0"}, "capacity": {"pods": "0"}},
                }
                lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
                api.call("POST", "/api/v1/nodes", node)
                api.call("POST", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", lease)
            beat()
            heart.start()
            yield
        finally:
            ended.set()
            if heart.is_alive():
                heart.join()
            remove()


def nodes() -> int:
    with contextlib.closing(Api(Access.of(str(KUBECONFIG)))) as api:
        return len(api.get("/api/v1/nodes")["items"])


def add_node(inventory: str, wanted: int) -> None:
    """Empty a worker, bring the cluster to `wanted` nodes without it, add it again and show what that cost."""
    playbook(inventory, "cluster_remove", NEWCOMER)
    with further_nodes(wanted - nodes()):
        before = nodes()
        run = playbook(inventory, "cluster", NEWCOMER)
        touched = ",".join(run.hosts)
        print(f"bench cluster: add_node nodes_before={before} s={run.seconds:.1f} hosts_touched={touched}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench cluster", description="What a cluster and one more node cost.")
    parser.add_argument("--control-planes", type=int, choices=[1, 3], action="append", help="1, 3 (default: both)")
    parser.add_argument(
        "--keep-lab", action="store_true", help="only add a node, to the clusters of the lab that is up"
    )
    arguments = parser.parse_args()
    if arguments.keep_lab:
        inventory = str(Path(json.loads((STATE / "lab.json").read_text(encoding="utf-8"))["inventory"]))
    else:
        for planes in arguments.control_planes or [3, 1]:
            build(planes)
            inventory = INVENTORIES[planes]
    for wanted in (3, 30):
        add_node(inventory, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
