"""The network agent's view of a real API server: its account's rights, pages, changes, restarts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.network_policy import api, model
from tests.local_cluster import LocalCluster

ACCESS = "collections/ansible_collections/censuschat/infra/roles/kubernetes_network/files/access.yml"
ACCOUNT = "system:serviceaccount:kube-system:censuschat-network"
#: More than two pages of a list.
MANY = 2 * api.PAGE + 7


def until(holds: Any, limit: float = 15.0) -> float:
    """Waits until something holds; the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        made.kubectl("apply", "--server-side", "-f", str(Path(__file__).parents[2] / ACCESS))
        pods = [manifest(f"pod-{number}") for number in range(MANY)]
        made.kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": pods}))
        yield made
        # It would wait for the watches that go on for ever.
        made.stop_api(kill=True)


def manifest(name: str) -> dict[str, Any]:
    spec = {"containers": [{"name": "c", "image": "none"}]}
    meta = {"name": name, "namespace": "default", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def access(cluster: LocalCluster, name: str, group: str) -> api.Access:
    """The API as somebody with a client certificate."""
    path = cluster.directory / f"{name}.pem"
    path.write_bytes(b"".join(cluster.authority.issue(name, groups=[group])))
    return api.Access(cluster.url, str(cluster.directory / "ca.crt"), str(path), ACCOUNT)


def pods_of(kubelet: api.Access, changed: threading.Event) -> api.Copy[model.Pod]:
    return api.Copy(kubelet, "/api/v1/pods", model.pod_of, changed.set)


@pytest.fixture(scope="module")
def kubelet(cluster: LocalCluster) -> api.Access:
    return access(cluster, "system:node:n1", "system:nodes")


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/pods",
        "/api/v1/nodes",
        "/api/v1/namespaces",
        "/apis/networking.k8s.io/v1/networkpolicies",
    ],
)
def test_a_kubelets_certificate_reads_what_the_agent_needs(kubelet: api.Access, path: str) -> None:
    said = json.load(kubelet.get(kubelet.connect(10), path, limit=1))
    assert said["metadata"]["resourceVersion"]


@pytest.mark.parametrize("path", ["/api/v1/secrets", "/api/v1/namespaces/kube-system/configmaps", "/api/v1/nodes/n1"])
def test_and_nothing_else(kubelet: api.Access, path: str) -> None:
    with pytest.raises(api.Refused, match=rf'403 .*"{ACCOUNT}" cannot'):
        kubelet.get(kubelet.connect(10), path)


def test_nobody_but_a_kubelet_may_act_as_the_agent(cluster: LocalCluster) -> None:
    stranger = access(cluster, "stranger", "people")
    with pytest.raises(api.Refused, match=r"403 .*cannot impersonate"):
        stranger.get(stranger.connect(10), "/api/v1/pods")


def test_a_copy_follows_the_api_through_its_restart(cluster: LocalCluster, kubelet: api.Access) -> None:
    changed = threading.Event()
    copy = pods_of(kubelet, changed)
    copy.start()
    assert changed.wait(10)
    known = copy.snapshot()
    assert known is not None
    assert len(known) == MANY

    cluster.kubectl("create", "-f", "-", stdin=json.dumps(manifest("late")))
    print(f"new after {until(lambda: len(copy.snapshot() or ()) == MANY + 1):.2f} s")
    cluster.stop_api(kill=True)
    time.sleep(0.5)
    assert len(copy.snapshot() or ()) == MANY + 1
    cluster.start_api()
    cluster.kubectl("delete", "pod", "late", "--grace-period=0", "--force")
    print(f"gone after {until(lambda: len(copy.snapshot() or ()) == MANY):.2f} s")


def test_a_version_too_old_is_told_as_such(cluster: LocalCluster, kubelet: api.Access) -> None:
    copy = pods_of(kubelet, threading.Event())
    copy.list()
    copy._version = "1"
    with pytest.raises(api.Gone):
        copy.watch()
