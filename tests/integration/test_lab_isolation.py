"""No packet of a node or a pod leaves the lab, and no stranger answers in the place of a Service.

Runs on a lab with its clusters. Addresses outside are those kept for documentation (RFC 5737): nobody's. In the
node with the pod everything is tried twice: as it is, and with a default route that somebody has planted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab import cli, fabric, programs, report, verbs
from lab.paths import REPO
from lab.programs.catalogue import catalogue
from lab.topology import Node, Topology
from tests.integration.packets import AT_ONCE_S, CONNECT, REFUSED, UNREACHABLE, connect, overheard

OUTSIDE = ("192.0.2.1", "198.51.100.1")
NAMESPACE = "lab-isolation"
#: Where a pod may run as whoever the namespace's Pod Security level asks for.
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod(name: str, image: str, node: str, policy: str = "Never") -> dict[str, Any]:
    """A pod on one node that does nothing until it is told to end."""
    idle = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": policy,
        "command": ["/usr/bin/python3", "-c", idle],
        "securityContext": RESTRICTED,
    }
    metadata = {"name": name, "namespace": NAMESPACE}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 1}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


class Cluster:
    """One region's cluster, through the operator's kubeconfig."""

    def __init__(self, lab: Topology, region: str) -> None:
        config = report.kubeconfig(region)
        if not config.is_file():
            pytest.fail(f"{region} has no cluster; make it with playbooks/cluster.yml")
        self.config = config
        self.site = lab.site(region)
        # A worker where there is one: the control plane of a small cluster is one as well.
        members = [node for node in lab.nodes if node.site == region and node.kubernetes]
        self.node: Node = max(members, key=lambda node: node.kubernetes == "worker")
        self.kubectl = (str(programs.ready(catalogue().default) / "bin" / "kubectl"), f"--kubeconfig={config}")

    def run(self, *arguments: str, objects: list[dict[str, Any]] | None = None) -> str:
        stdin = None if objects is None else json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        done = subprocess.run(
            (*self.kubectl, *arguments), input=stdin, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def connect(self, address: object, port: int, patience: float = AT_ONCE_S) -> tuple[str, float]:
        """As `packets.connect`, from the pod."""
        inside = ("exec", f"--namespace={NAMESPACE}", "probe", "--", "/usr/bin/python3", "-c", CONNECT)
        outcome, seconds = self.run(*inside, str(address), str(port), str(patience)).split()
        return outcome, float(seconds)


@pytest.fixture(scope="module", params=["us-east-1", "us-west-2"])
def cluster(running_lab: Topology, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster with a pod on one of its nodes."""
    there = Cluster(running_lab, request.param)
    python = programs.versions(catalogue().default)["python"]
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    # The controller makes the account of a new namespace a moment later; a pod names one that is there at once.
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": NAMESPACE}}
    probe = pod("probe", f"censuschat.test/python:{python}", there.node.name)
    try:
        there.run("apply", "--server-side", "--force-conflicts", "--filename=-", objects=[namespace, account, probe])
        there.run("wait", f"--namespace={NAMESPACE}", "--for=condition=Ready", "pod/probe", "--timeout=60s")
        yield there
    finally:
        there.run("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")


def counted(space: str) -> dict[str, int]:
    """The packets on the named counters of the lab's table in a namespace."""
    listing = ("nft", "--json", "list", "counters", "table", "inet", fabric.TABLE)
    said = subprocess.run(("ip", "netns", "exec", space, *listing), capture_output=True, text=True, check=True).stdout
    return {item["counter"]["name"]: item["counter"]["packets"] for item in json.loads(said)["nftables"][1:]}


@contextlib.contextmanager
def default_route(lab: Topology, node: Node) -> Iterator[None]:
    """A default route on a node through its router, as a mistake or an intruder would leave it."""
    where = ("ip", "-n", fabric.space_of(node.name), "route")
    route = ("default", "via", str(lab.site(node.site).router))
    subprocess.run((*where, "add", *route), check=True)
    try:
        yield
    finally:
        subprocess.run((*where, "del", *route), check=True)


@contextlib.contextmanager
def nothing_leaves(lab: Topology) -> Iterator[None]:
    """Fails when the machine's own links show a packet of or for the addresses outside, or the router let one go."""
    elsewhere = {socket.inet_aton(address) for address in OUTSIDE}
    sign = lab.nodes[0]
    left = counted(fabric.ROUTER)["left"]
    with overheard(*elsewhere, sign.address.packed) as heard:
        yield
        # The ear hears: a connection of the machine to a node is among it.
        socket.create_connection((str(sign.address), 22), timeout=AT_ONCE_S).close()
    assert any(packet[16:20] == sign.address.packed for _, packet in heard)
    assert [link for link, packet in heard if {packet[12:16], packet[16:20]} & elsewhere] == []
    assert counted(fabric.ROUTER)["left"] == left == 0


def refused(connection: Callable[..., tuple[str, float]], *arguments: Any) -> list[str]:
    """What came of a connection to each address outside, when it came at once."""
    outcomes = [connection(*arguments, address, 80) for address in OUTSIDE]
    assert all(seconds < AT_ONCE_S for _, seconds in outcomes), outcomes
    return [outcome for outcome, _ in outcomes]


def test_an_address_outside_is_refused_on_the_node_and_in_a_pod(running_lab: Topology, cluster: Cluster) -> None:
    space = fabric.space_of(cluster.node.name)
    with nothing_leaves(running_lab):
        before = counted(space)["outside"]
        assert set(refused(connect, space) + refused(cluster.connect)) <= UNREACHABLE
        # The node finds no route and does not even send; the pod's packets come as far as the node's fence.
        assert counted(space)["outside"] == before + len(OUTSIDE)
        with default_route(running_lab, cluster.node):
            assert set(refused(connect, space) + refused(cluster.connect)) <= UNREACHABLE
        assert counted(space)["outside"] == before + 3 * len(OUTSIDE)


def test_without_the_nodes_fence_the_router_refuses(running_lab: Topology, cluster: Cluster) -> None:
    space = fabric.space_of(cluster.node.name)
    with nothing_leaves(running_lab), verbs.alone():
        before = counted(fabric.ROUTER)["outside"]
        # What a pod with all privileges could do.
        subprocess.run(("ip", "netns", "exec", space, "nft", "delete", "table", "inet", fabric.TABLE), check=True)
        try:
            with default_route(running_lab, cluster.node):
                assert set(refused(connect, space)) <= UNREACHABLE
        finally:
            # As `lab up` does.
            fabric.apply(fabric.plan(running_lab, fabric.observe()))
        assert counted(fabric.ROUTER)["outside"] == before + len(OUTSIDE)
    assert counted(space) == {"unprogrammed": 0, "outside": 0}


def test_a_service_address_that_kube_proxy_does_not_know_is_refused_at_once(
    running_lab: Topology, cluster: Cluster
) -> None:
    services = cluster.site.services
    assert services
    api, nobodys = services[1], services[-2]
    space = fabric.space_of(cluster.node.name)
    # Those that it does know are answered, from the node and from the pod.
    assert connect(space, api, 443)[0] == cluster.connect(api, 443)[0] == "connected"
    before = counted(space)["unprogrammed"]
    with nothing_leaves(running_lab):
        outcomes = [connect(space, nobodys, 443), cluster.connect(nobodys, 443)]
    assert [outcome for outcome, _ in outcomes] == [REFUSED, REFUSED]
    assert max(seconds for _, seconds in outcomes) < AT_ONCE_S
    assert counted(space)["unprogrammed"] == before + 2


@pytest.mark.parametrize(
    ("policy", "reasons"),
    [("Never", {"ErrImageNeverPull"}), ("IfNotPresent", {"ErrImagePull", "ImagePullBackOff"})],
    ids=["never", "if not present"],
)
def test_an_image_that_is_not_there_is_named_and_not_pulled(
    running_lab: Topology, cluster: Cluster, policy: str, reasons: set[str]
) -> None:
    image = f"censuschat.test/nowhere:{policy.lower()}"
    name = f"absent-{policy.lower()}"
    waiting: dict[str, str] = {}
    with nothing_leaves(running_lab):
        cluster.run("apply", "--filename=-", objects=[pod(name, image, cluster.node.name, policy)])
        deadline = time.monotonic() + 30
        while waiting.get("reason") not in reasons and time.monotonic() < deadline:
            time.sleep(0.5)
            seen = json.loads(cluster.run("get", f"--namespace={NAMESPACE}", "pod", name, "--output=json"))
            states = [status["state"] for status in seen["status"].get("containerStatuses", [])]
            waiting = next((state["waiting"] for state in states if "waiting" in state), {})
        cluster.run("delete", f"--namespace={NAMESPACE}", "pod", name, "--wait=false")
    assert waiting.get("reason") in reasons
    assert image in waiting["message"]


def test_a_wait_for_a_deployment_whose_image_is_not_there_names_it_at_once(cluster: Cluster) -> None:
    image = "censuschat.test/nowhere:deployed"
    template = pod("absent", image, cluster.node.name)
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "absent", "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": {"app": "absent"}},
            "template": {"metadata": {"labels": {"app": "absent"}}, "spec": template["spec"]},
        },
    }
    arguments = {"kubeconfig": str(cluster.config), "definition": [deployment], "wait": True, "wait_timeout": 300}
    python = f"ansible_python_interpreter={sys.executable}"
    module = ("-m", "censuschat.infra.k8s_apply", "-a", json.dumps(arguments))
    began = time.monotonic()
    done = subprocess.run(
        (sys.executable, "-m", "ansible", "adhoc", "localhost", "-c", "local", "-e", python, *module),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        timeout=400,
    )
    cluster.run("delete", f"--namespace={NAMESPACE}", "deployment", "absent", "--wait=false")
    assert done.returncode != 0
    assert image in done.stdout and "ErrImageNeverPull" in done.stdout, done.stdout
    # It can never be ready: the wait's budget is not used up.
    assert time.monotonic() - began < 150


@pytest.mark.parametrize("cluster", ["us-west-2"], indirect=True)
def test_a_restarted_node_comes_back_with_its_fence_and_its_pods(cluster: Cluster) -> None:
    """In one region, the standby: what it restarts may be the whole cluster of a small lab."""
    space = fabric.space_of(cluster.node.name)
    services = cluster.site.services
    assert services

    def started() -> tuple[int, bool]:
        seen = json.loads(cluster.run("get", f"--namespace={NAMESPACE}", "pod", "probe", "--output=json"))
        status = seen["status"]["containerStatuses"][0]
        return status["restartCount"], status["ready"]

    def works() -> bool:
        # The API may be on the very node.
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            return started() == (1, True) and cluster.connect(services[1], 443)[0] == "connected"
        return False

    assert started() == (0, True)
    fenced = counted(space)
    assert cli.main(["restart", cluster.node.name]) == 0
    # The table was there all the time: its counters go on.
    assert counted(space)["unprogrammed"] >= fenced["unprogrammed"]
    # Also while kube-proxy is still on its way.
    outcome, seconds = connect(space, services[-2], 443)
    assert outcome == REFUSED and seconds < AT_ONCE_S
    deadline = time.monotonic() + 90
    while not works():
        assert time.monotonic() < deadline, f"the pod on {cluster.node.name} is not back 90 s after the restart"
        time.sleep(1)
    assert cluster.connect(services[-2], 443)[0] == REFUSED
    # The next test finds the cluster as this one did.
    for what in (f"node/{cluster.node.name}", "--namespace=kube-system pod --all"):
        cluster.run("wait", "--for=condition=Ready", "--timeout=60s", *what.split())
