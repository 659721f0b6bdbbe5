"""The cluster that the faults hit: the lab's profile with three control planes, brought up when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import nodes, topology, verbs
from lab.paths import PREFIX, REPO, STATE
from lab.topology import Topology
from tests.faults.client import NAMESPACE, Api, Client
from tests.nodes import on

INVENTORY = REPO / "inventories" / "lab-ha"
REGION = "us-east-1"
CONTROL_PLANES = ("use1-cp1", "use1-cp2", "use1-cp3")
KUBECONFIG = STATE / "kubernetes" / f"{REGION}.kubeconfig"
BIN = Path(sys.executable).parent


class Cluster:
    """The cluster under test and the hands that break and mend it."""

    def __init__(self, lab: Topology) -> None:
        self.lab = lab
        self.api = Api(KUBECONFIG)

    def on(self, node: str, script: str, *, check: bool = True, timeout: float = 120.0) -> str:
        """Run a shell script as root on a node, past sshd."""
        return on(node, script, check=check, timeout=timeout).strip()

    def kill(self, node: str) -> None:
        """The node is gone from one moment to the next."""
        subprocess.run(("podman", "kill", f"{PREFIX}{node}"), check=True, capture_output=True, timeout=60)

    def boot(self, node: str) -> str:
        """Switch the node on again; the command that a person types."""
        subprocess.run((sys.executable, "-m", "lab", "restart", node), cwd=REPO, check=True, timeout=120)
        return f"scripts/run lab restart {node}"

    def play(self, playbook: str, *options: str) -> str:
        """Run a playbook; the command that a person types."""
        command = ("ansible-playbook", "-i", "inventories/lab-ha", f"playbooks/{playbook}.yml", *options)
        done = subprocess.run(
            (str(BIN / command[0]), *command[1:]), cwd=REPO, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        return f"scripts/run {' '.join(command)}"

    def etcd(self, node: str, words: str) -> str:
        """etcdctl on a node, with the certificates that kubeadm gives it."""
        pki = "/etc/kubernetes/pki/etcd"
        files = f"--cacert {pki}/ca.crt --cert {pki}/healthcheck-client.crt --key {pki}/healthcheck-client.key"
        return self.on(node, f"etcdctl --endpoints https://127.0.0.1:2379 {files} {words}")

    def holder(self) -> str:
        """The control plane that has the API's shared address."""
        return next(node for node in CONTROL_PLANES if "10.77.1.100/" in self.on(node, "ip -4 -o address"))

    def well(self) -> list[str]:
        """What is not well: each API server and each member of etcd is asked on its own node."""
        ill = []
        for node in CONTROL_PLANES:
            try:
                ready = self.on(
                    node,
                    "kubectl --kubeconfig /etc/kubernetes/admin.conf --request-timeout=3s "
                    "--server https://127.0.0.1:6443 get --raw /readyz",
                )
                self.etcd(node, "endpoint health --command-timeout 4s 2>&1")
                ill += [] if ready == "ok" else [f"{node}: {ready}"]
            except AssertionError as error:
                ill.append(str(error).replace("\n", " ")[:300])
        return ill

    def wait_well(self, patience_s: float = 180.0) -> None:
        """Wait until the whole control plane serves."""
        deadline = time.monotonic() + patience_s
        while ill := self.well():
            assert time.monotonic() < deadline, f"the control plane is not well: {'; '.join(ill)}"
            time.sleep(2)


def bring_up() -> Topology:
    """The lab of that profile with its hardened nodes and the region's cluster; what is up is left as it is."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if verbs.recorded() != INVENTORY or not KUBECONFIG.is_file():
        steps = [
            (sys.executable, "-m", "lab", "up", "--ha"),
            (str(BIN / "ansible-playbook"), "-i", str(INVENTORY), "playbooks/harden.yml"),
            (str(BIN / "ansible-playbook"), "-i", str(INVENTORY), "-l", "us_east_1:witness1", "playbooks/cluster.yml"),
        ]
        for step in steps:
            done = subprocess.run(step, cwd=REPO, env=environment, timeout=1800, check=False)
            assert done.returncode == 0, f"`{' '.join(step)}` ended with {done.returncode}"
    return topology.load(INVENTORY)


@pytest.fixture(scope="session", name="built")
def built_cluster() -> Cluster:
    """The cluster, brought up when it is not. Fails, and does not skip, when that cannot be."""
    if os.geteuid() != 0:
        pytest.fail("the faults need root; run them with sudo")
    lab = bring_up()
    nodes.wait(tuple(node for node in lab.nodes if node.name in CONTROL_PLANES))
    cluster = Cluster(lab)
    cluster.wait_well()
    body = {"metadata": {"name": NAMESPACE}}
    status, answer = cluster.api.call("POST", "/api/v1/namespaces", body, timeout_s=10)
    assert status in (201, 409), answer
    return cluster


@pytest.fixture(name="cluster")
def whole_cluster(built: Cluster) -> Iterator[Cluster]:
    """The cluster with all three control planes serving, before each fault and after it."""
    built.wait_well()
    yield built
    built.wait_well()


@pytest.fixture(name="client")
def polling_client(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client that polls through the fault."""
    name = request.node.name.removeprefix("test_").replace("_", "-")
    with Client(cluster.api, f"{name}-{int(time.time())}") as client:
        yield client


Report = Callable[[str, Client, str], None]


@pytest.fixture(name="report")
def printed_report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Prints the line of a fault, past pytest's capture."""

    def show(name: str, client: Client, recovered_by: str) -> None:
        with capsys.disabled():
            print(
                f"\nfault: name={name} outage_s={client.outage_s:.1f} failed_polls={client.failed} "
                f'polls={len(client.ready) + len(client.writes)} recovered_by="{recovered_by}"',
                flush=True,
            )

    return show
