"""A worker is rebooted: what is isolated stays so from its first packet on, and what is not comes back."""

from __future__ import annotations

import json
import subprocess
import time

from lab.paths import PREFIX
from tests.faults.conftest import KUBECONFIG, Cluster
from tests.pods import Ask, Pods, PodsError, ProbePod

SPACE = "network-fault"
CALLER, ISOLATED, FREE = f"{SPACE}/caller", f"{SPACE}/isolated", f"{SPACE}/free"
#: How long a rebooted worker may take until its pods are connected, in seconds.
LIMIT_S = 120.0

# Calls from its first moment for four seconds, then says how often it came through; answers on a port meanwhile.
_EAGER = """
import socket, sys, threading, time
def answer(listener):
    while True:
        listener.accept()[0].close()
threading.Thread(target=answer, args=(socket.create_server(("0.0.0.0", 8080)),), daemon=True).start()
end, reached, tried = time.time() + 4, 0, 0
while time.time() < end:
    tried += 1
    try:
        socket.create_connection((sys.argv[1], 8080), 0.2).close()
        reached += 1
    except OSError:
        time.sleep(0.01)
print("reached", reached, "tried", tried > 5, flush=True)
threading.Event().wait()
"""


def address(pods: Pods, pod: str) -> str:
    return pods.kubectl("get", "pod", "-n", SPACE, pod.split("/")[1], "-o", "jsonpath={.status.podIP}")


def said(pods: Pods, restarts: int) -> str:
    """What the isolated pod's container said after that many restarts; empty while it is still trying."""
    count = "jsonpath={.status.containerStatuses[0].restartCount}"
    if pods.kubectl("get", "pod", "-n", SPACE, "isolated", "-o", count) != str(restarts):
        return ""
    try:
        return pods.kubectl("logs", "-n", SPACE, "isolated")
    except PodsError:
        return ""


def until_said(pods: Pods, restarts: int) -> str:
    end = time.monotonic() + LIMIT_S
    while not (text := said(pods, restarts)):
        assert time.monotonic() < end, "the isolated pod never said what it reached"
        time.sleep(0.5)
    return text


def seen(pods: Pods, pod: str) -> str:
    """How the caller reaches the pod; a pod that has no address yet is not reached (an empty one is the caller)."""
    at = address(pods, pod)
    return pods.probe(CALLER, at, 8080, patience=0.5) if at else "nowhere"


def test_a_rebooted_worker_isolates_from_the_first_packet(cluster: Cluster) -> None:
    with Pods(KUBECONFIG) as pods:
        nodes = json.loads(pods.kubectl("get", "nodes", "-o", "json"))["items"]
        # Workers: the questions to the caller go through the control planes.
        control = "node-role.kubernetes.io/control-plane"
        here, *_, there = (node["metadata"]["name"] for node in nodes if control not in node["metadata"]["labels"])
        pods.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}})
        try:
            pods.create(
                ProbePod(SPACE, "caller", {"app": "caller"}, node=here),
                ProbePod(SPACE, "free", {"app": "free"}, node=there),
            )
            policy = {"podSelector": {"matchLabels": {"app": "isolated"}}, "policyTypes": ["Ingress", "Egress"]}
            eager = ProbePod(SPACE, "isolated", {"app": "isolated"}, node=there).manifest(pods.image)
            eager["spec"]["containers"][0]["command"] = ["/usr/bin/python3", "-c", _EAGER, pods.address(CALLER)]
            pods.apply(
                {
                    "apiVersion": "networking.k8s.io/v1",
                    "kind": "NetworkPolicy",
                    "metadata": {"namespace": SPACE, "name": "isolated"},
                    "spec": policy,
                },
                eager,
            )
            assert until_said(pods, 0) == "reached 0 tried True\n"
            assert pods.probe(CALLER, FREE, 8080) == "open"

            began = time.monotonic()
            subprocess.run(("podman", "restart", "-t", "5", PREFIX + there), check=True, capture_output=True)
            print(f"rebooted after {time.monotonic() - began:.1f} s")
            while seen(pods, FREE) != "open":
                assert time.monotonic() - began < LIMIT_S
                assert seen(pods, ISOLATED) != "open"
                time.sleep(0.2)
            print(f"connected after {time.monotonic() - began:.1f} s")
            assert until_said(pods, 1) == "reached 0 tried True\n"
            pods.until(Ask(CALLER, address(pods, ISOLATED), 8080), "dropped", 5)
        finally:
            # Until it is gone: the next run must not begin in a namespace that is ending.
            pods.kubectl("delete", "namespace", SPACE, "--timeout=90s")
