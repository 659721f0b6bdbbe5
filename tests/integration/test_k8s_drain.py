"""k8s_drain against a real API with simulated nodes: budgets, refusals, ends of waits, undo, check mode."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.kube import kubeconfig
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import Client
from ansible_collections.censuschat.infra.plugins.module_utils.kube.drain import Drainer, Options, Report
from ansible_collections.censuschat.infra.plugins.module_utils.kube.drain_plan import Allowed
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError

from lab.paths import REPO
from tests.local_cluster import LocalCluster

NAMESPACE = "trial-drain"
NODE = "node-0"
POD: dict[str, Any] = {"containers": [{"name": "main", "image": "web:1"}], "terminationGracePeriodSeconds": 0}


def apply(kube: LocalCluster, *documents: dict[str, Any]) -> None:
    kube.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(documents))


def workload(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {**POD, **spec.pop("pod", {})}}
    body = {"selector": {"matchLabels": labels}, "template": template, **spec}
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": metadata, "spec": body}


def budget(name: str, least: int) -> dict[str, Any]:
    spec = {"minAvailable": least, "selector": {"matchLabels": {"app": name}}}
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": spec}


def pods_of(kube: LocalCluster, node: str, app: str = "") -> list[str]:
    selector = ["-l", f"app={app}"] if app else []
    found = kube.kubectl("get", "pods", "-A", f"--field-selector=spec.nodeName={node}", "-o", "name", *selector)
    return found.split()


@pytest.fixture(name="pinned", autouse=True)
def all_pods_on_one_node(kube: LocalCluster) -> Iterator[None]:
    """The other nodes are closed while a test places its pods; everything of it goes afterwards."""
    for node in ("node-1", "node-2"):
        kube.kubectl("cordon", node)
    apply(kube, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    yield
    for kind in ("deployment", "daemonset", "pdb"):
        kube.kubectl("delete", kind, "--all", "-n", NAMESPACE)
    kube.kubectl("delete", "pods", "--all", "-n", NAMESPACE, "--force", "--grace-period=0")
    for node in ("node-0", "node-1", "node-2"):
        kube.kubectl("uncordon", node)


def placed(kube: LocalCluster, *documents: dict[str, Any]) -> None:
    """Applies workloads, waits until their pods are on the node, and opens the other nodes."""
    apply(kube, *documents)
    for document in documents:
        if document["kind"] in ("Deployment", "DaemonSet"):
            name = f"{document['kind'].lower()}/{document['metadata']['name']}"
            kube.kubectl("rollout", "status", name, "-n", NAMESPACE, "--timeout=60s")
    for node in ("node-1", "node-2"):
        kube.kubectl("uncordon", node)


def drainer(kube: LocalCluster, **options: Any) -> Drainer:
    return Drainer(Client(kubeconfig.load(str(kube.kubeconfig))), Options(node=options.pop("node", NODE), **options))


def closed(kube: LocalCluster, node: str = NODE) -> bool:
    return kube.kubectl("get", "node", node, "-o", "jsonpath={.spec.unschedulable}") == "true"


def outcome(report: Report, name: str) -> dict[str, str]:
    (found,) = [p for p in report.pods if p["name"].startswith(name)]
    return found


def test_a_node_is_drained_and_opened_again(kube: LocalCluster) -> None:
    placed(kube, workload("Deployment", "web", replicas=2), workload("DaemonSet", "agent"))
    foretold = drainer(kube, check=True).drain()
    assert foretold.changed
    assert not closed(kube)
    report = drainer(kube, timeout=30).drain()
    assert report.problems == []
    assert [p["result"] for p in foretold.pods] == [p["result"] for p in report.pods]
    assert outcome(report, "agent")["result"] == "skipped"
    assert sorted(p["result"] for p in report.pods) == ["evicted", "evicted", "skipped"]
    assert closed(kube)
    assert pods_of(kube, NODE, "web") == []
    assert not drainer(kube).drain().changed
    assert drainer(kube).uncordon().changed
    assert not closed(kube)
    assert not drainer(kube).uncordon().changed


def test_a_budget_that_blocks_is_named_and_the_node_opened_again(kube: LocalCluster) -> None:
    placed(kube, workload("Deployment", "tight", replicas=1), budget("tight", 1))
    foretold = drainer(kube, check=True).drain()
    assert foretold.problems == []
    assert "it would wait for" in outcome(foretold, "tight")["message"]
    begun = time.monotonic()
    report = drainer(kube, timeout=2).drain()
    assert time.monotonic() - begun < 10
    (problem,) = report.problems
    assert f"pod {NAMESPACE}/tight-" in problem
    assert "of Deployment tight" in problem
    assert f"PodDisruptionBudget {NAMESPACE}/tight (needs 1 healthy pods of 1 and has 1)" in problem
    assert report.undone
    assert not closed(kube)
    assert len(pods_of(kube, NODE, "tight")) == 1


def test_a_drain_goes_on_when_the_budget_gives_way(kube: LocalCluster) -> None:
    placed(kube, workload("Deployment", "pair", replicas=2), budget("pair", 1))
    report = drainer(kube, timeout=30).drain()
    assert report.problems == []
    assert [p["result"] for p in report.pods] == ["evicted", "evicted"]


def test_pods_that_would_be_lost_are_refused_before_anything_is_touched(kube: LocalCluster) -> None:
    lonely = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "lonely", "namespace": NAMESPACE},
        "spec": {**POD, "nodeName": NODE},
    }
    scratch = {"volumes": [{"name": "scratch", "emptyDir": {}}]}
    placed(kube, lonely, workload("Deployment", "scratch", replicas=1, pod=scratch), workload("Deployment", "web"))
    report = drainer(kube, timeout=5).drain()
    assert len(report.problems) == 2
    assert f"pod {NAMESPACE}/lonely: no controller would make it again" in report.problems[0]
    assert "it would lose the data of its emptyDir scratch" in report.problems[1]
    assert not closed(kube)
    assert not report.changed
    assert len(pods_of(kube, NODE)) == 3
    allowed = drainer(kube, timeout=30, allowed=Allowed(empty_dir=True, unmanaged=True)).drain()
    assert allowed.problems == []
    assert pods_of(kube, NODE) == []


def test_a_pod_that_does_not_end_is_named_with_what_holds_it(kube: LocalCluster) -> None:
    held = workload("Deployment", "held", replicas=1)
    slow = workload("Deployment", "slow", replicas=1, pod={"terminationGracePeriodSeconds": 30})
    for body in (held, slow):
        body["spec"]["template"]["metadata"]["labels"]["trial/never-ends"] = "yes"
    held["spec"]["template"]["metadata"]["finalizers"] = ["trial.test/held"]
    placed(kube, held, slow)
    try:
        of_held, of_slow = drainer(kube, timeout=1).drain().problems
    finally:
        # The pod that took its place elsewhere has the finalizer as well.
        kube.kubectl("delete", "deployment", "held", "-n", NAMESPACE)
        for pod in kube.kubectl("get", "pods", "-n", NAMESPACE, "-l", "app=held", "-o", "name").split():
            kube.kubectl("patch", pod, "-n", NAMESPACE, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    assert "of Deployment held: evicted, but it has not ended; it waits for its finalizers trial.test/held" in of_held
    assert "of Deployment slow: evicted, but it has not ended; it has 30 s of grace" in of_slow


def test_a_node_that_is_not_there(kube: LocalCluster) -> None:
    with pytest.raises(KubeError, match="the cluster has no node 'node-9'; it has: node-0, node-1, node-2"):
        drainer(kube, node="node-9").drain()


def test_the_module_as_users_run_it(kube: LocalCluster, tmp_path: Path) -> None:
    placed(kube, workload("Deployment", "tight", replicas=1), budget("tight", 1))
    drain = {"name": NODE, "timeout": 1}
    tasks = [
        {"name": "Refused", "censuschat.infra.k8s_drain": drain, "register": "refused", "ignore_errors": True},
        {"name": "Close", "censuschat.infra.k8s_drain": {"name": NODE, "state": "cordoned"}, "register": "cordoned"},
        {
            "name": "Tell",
            "ansible.builtin.debug": {"msg": "TOLD {{ [refused.failed, refused.msg, cordoned.cordon] | to_json }}"},
        },
    ]
    defaults = {"group/censuschat.infra.k8s": {"kubeconfig": str(kube.kubeconfig)}}
    head = {"name": "Trial", "hosts": "localhost", "gather_facts": False, "module_defaults": defaults, "tasks": tasks}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([head]))
    program = str(Path(sys.executable).parent / "ansible-playbook")
    interpreter = f"ansible_python_interpreter={sys.executable}"
    command = [program, "-i", "localhost,", "-c", "local", "-e", interpreter, str(tmp_path / "play.yml")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    failed, said, cordon = json.loads(
        done.stdout.partition("TOLD ")[2].splitlines()[0].rstrip("\"'").replace('\\"', '"')
    )
    assert failed
    assert f"node {NODE} is not drained: pod {NAMESPACE}/tight-" in said
    assert said.endswith("The node takes pods again.")
    assert cordon == "cordoned"
