"""The platform's services on nodes in three zones, simulated: all of them fit, spread, and stay through a lost zone."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator

import pytest

from tests.local_cluster import LocalCluster
from tests.platform_run import Platform

ZONES = ("a", "b", "c")
#: The fewest replicas of the specification; cache and export have no drawn count.
MINIMA = {
    ("production-api", "api-gateway"): 3,
    ("production-api", "nlp"): 2,
    ("production-api", "query"): 4,
    ("production-data", "data-access"): 3,
}
SITE = {"kubernetes_platform_image": "registry.test/{service}:1", "kubernetes_platform_wait": False}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with LocalCluster(controller_manager=True, scheduler=True, nodes=6) as cluster:
        for number in range(6):
            zone = f"topology.kubernetes.io/zone={ZONES[number % 3]}"
            cluster.kubectl("label", "node", f"node-{number}", zone)
        found = Platform(cluster, SITE)
        found.apply()
        yield found


def running(platform: Platform) -> dict[tuple[str, str], list[str]]:
    """The nodes of each service's pods that are ready and stay."""
    found = collections.defaultdict(list)
    for pod in platform.get("pods", "-A", "-l", "app.kubernetes.io/part-of=censuschat")["items"]:
        meta = pod["metadata"]
        ready = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}.get("Ready")
        if ready == "True" and not meta.get("deletionTimestamp"):
            key = (meta["namespace"], meta["labels"]["app.kubernetes.io/name"])
            found[key].append(pod["spec"]["nodeName"])
    return found


def wait(platform: Platform, holds: Callable[[dict[tuple[str, str], list[str]]], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not holds(found := running(platform)):
        assert time.monotonic() < deadline, dict(found)
        time.sleep(0.5)


def complete(found: dict[tuple[str, str], list[str]]) -> bool:
    return all(len(found[key]) >= count for key, count in MINIMA.items()) and len(found) == 6


def zones(nodes: list[str]) -> collections.Counter[str]:
    return collections.Counter(ZONES[int(node.removeprefix("node-")) % 3] for node in nodes)


def test_all_services_run_at_their_minimum_inside_the_quotas_and_evenly_over_the_zones(platform: Platform) -> None:
    # The autoscaler brings the minimum by itself, without any metrics; it looks every 15 s.
    wait(platform, complete, 60)
    for key, nodes in running(platform).items():
        spread = [zones(nodes)[zone] for zone in ZONES]
        assert max(spread) - min(spread) <= 1, (key, spread)
        # Two pods on one node only where there are more pods than nodes.
        assert len(set(nodes)) == len(nodes), (key, nodes)


def test_what_is_left_of_three_zones_carries_on(platform: Platform) -> None:
    wait(platform, complete, 60)
    lost = [f"node-{number}" for number in range(6) if ZONES[number % 3] == "a"]
    # As the node lifecycle controller does with nodes that do not answer, without its five minutes of patience and by a
    # taint of our own, which it does not take back.
    for node in lost:
        platform.cluster.kubectl("taint", "node", node, "trial/lost:NoExecute")
        platform.cluster.kubectl("delete", "pod", "-A", "--field-selector", f"spec.nodeName={node}", "--wait=false")
    wait(platform, lambda found: complete(found) and not any(set(nodes) & set(lost) for nodes in found.values()), 60)


def test_a_drain_takes_one_pod_of_a_service_at_a_time(platform: Platform) -> None:
    wait(platform, complete, 60)
    deadline = time.monotonic() + 30
    while True:
        budgets = platform.get("pdb", "-A")["items"]
        allowed = {b["metadata"]["name"]: b["status"].get("disruptionsAllowed") for b in budgets}
        if allowed == dict.fromkeys(("api-gateway", "nlp", "query", "data-access", "cache", "export"), 1):
            return
        assert time.monotonic() < deadline, allowed
        time.sleep(0.5)


def test_a_region_that_stands_by_keeps_one_of_each_and_grows_when_it_serves(platform: Platform) -> None:
    """Runs last: it scales the others' services."""
    spec = platform.get("hpa", "query", "-n", "production-api")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (4, 25)
    platform.apply(kubernetes_platform_region_active=False)
    spec = platform.get("hpa", "query", "-n", "production-api")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 25)
    cache = platform.get("deployment", "cache", "-n", "production-cache")["spec"]["replicas"]
    assert cache == 1
    platform.apply()
    wait(platform, lambda found: complete(found) and len(found[("production-cache", "cache")]) == 3, 60)
