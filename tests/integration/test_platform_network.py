"""The platform's network policies between real pods: every drawn path is open, and every other one is closed.

The paths are written down here from the specification's two diagrams; the policies are the role's, rendered for
namespaces with a prefix, so that what runs in the lab's own namespaces is not touched. Each pod asks each other one, on
the services' port and on another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects import manifests, model

from lab.paths import STATE
from lab.topology import Topology
from tests.platform_catalogue import catalogue, site
from tests.pods import Ask, Pods, ProbePod

REGION = "us-west-2"
PREFIX = "platform-"
#: The services' port, and one on which only whole namespaces are opened.
SERVED, OTHER = 8080, 9999
DATABASE, REDIS = 6432, 6380

# The namespace diagram's arrows: all ports.
NAMESPACE_PATHS = {
    ("production-api", "production-data"),
    ("production-api", "production-cache"),
    ("production-data", "production-cache"),
    ("staging-api", "staging-data"),
    ("staging-api", "staging-cache"),
    ("development-api", "development-data"),
    ("monitoring", "production-api"),
    ("monitoring", "staging-api"),
    ("monitoring", "development-api"),
    ("security", "production-api"),
    ("security", "staging-api"),
    ("security", "development-api"),
}
# The mesh diagram's arrows between services, within a stage: the services' port.
SERVICE_PATHS = {
    ("api-gateway", "nlp"),
    ("api-gateway", "query"),
    ("query", "data-access"),
    ("query", "cache"),
    ("export", "data-access"),
}
# The pods: each service where the specification draws it, one of a kind in the other stages.
PODS = [
    "production-api/api-gateway",
    "production-api/nlp",
    "production-api/query",
    "production-data/data-access",
    "production-data/export",
    "production-cache/cache",
    "staging-api/api-gateway",
    "staging-data/data-access",
    "staging-cache/cache",
    "development-api/api-gateway",
    "development-data/data-access",
    "monitoring/prometheus",
    "security/vault",
    "istio-ingress/gateway",
    # A namespace that the platform does not know.
    "outside/stranger",
]


def drawn(source: str, target: str, port: int) -> bool:
    """Whether the specification draws the path."""
    (here, who), (there, whom) = source.split("/"), target.split("/")
    if (here, there) in NAMESPACE_PATHS:
        return True
    if port != SERVED:
        return False
    stage = here.split("-")[0] == there.split("-")[0]
    # The way in: the gateway of the mesh, which stands where ingress-nginx is drawn, to the API gateway.
    return ((who, whom) in SERVICE_PATHS and stage) or (here == "istio-ingress" and whom == "api-gateway")


def prefixed(data: dict[str, Any]) -> dict[str, Any]:
    """The catalogue with other names for its namespaces."""

    def name(text: str) -> str:
        return text if text == "kube-system" else PREFIX + text

    def ends(items: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
        return [{key: name(value) if key in keys else value for key, value in item.items()} for item in items]

    return {
        **data,
        "namespaces": {name(key): value for key, value in data["namespaces"].items()},
        "paths": ends(data["paths"], "from", "to"),
        "calls": ends(data["calls"], "from_namespace", "to_namespace"),
        "access": {**data["access"], "namespace": name(data["access"]["namespace"])},
    }


@pytest.fixture(scope="module")
def nodes_address(running_lab: Topology) -> str:
    """The network of the region's nodes, where the balancers of the databases listen."""
    return next(str(n.address) for n in running_lab.nodes if n.site == REGION and n.role == "app")


@pytest.fixture(scope="module")
def pods(running_lab: Topology, nodes_address: str) -> Iterator[Pods]:
    network = f"{nodes_address}/32"
    described = site(blocks={"api_servers": [network], "nodes": [network], "databases": [network], "entrance": []})
    objects = [
        manifest
        for manifest in manifests.manifests(model.read(prefixed(catalogue()), described))
        if manifest["kind"] == "NetworkPolicy"
    ]
    names = sorted({PREFIX + pod.split("/")[0] for pod in PODS})
    with Pods(STATE / "kubernetes" / f"{REGION}.kubeconfig") as made:
        made.apply(*({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in names))
        try:
            nodes = made.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}").split()
            ports = [SERVED, OTHER]
            made.create(
                *(
                    ProbePod(PREFIX + namespace, name, {"app.kubernetes.io/name": name}, ports, node=node)
                    for (namespace, name), node in zip((pod.split("/") for pod in PODS), itertools.cycle(nodes))
                )
            )
            # Before the policies all is open: what is closed afterwards is closed by them.
            first = [Ask(PREFIX + a, PREFIX + b, SERVED) for a, b in itertools.pairwise([*PODS, PODS[0]])]
            assert set(made.probes(first)) == {"open"}
            made.apply(*(o for o in objects if o["metadata"]["namespace"] in names))
            made.until(Ask(PREFIX + PODS[0], PREFIX + PODS[-1], SERVED), "dropped", 10)
            yield made
        finally:
            made.kubectl("delete", "namespace", "--wait=false", *names)


def test_every_drawn_path_is_open_and_every_other_one_is_closed(pods: Pods) -> None:
    asks = [Ask(PREFIX + a, PREFIX + b, port) for a, b in itertools.permutations(PODS, 2) for port in (SERVED, OTHER)]
    wanted = {
        ask: "open" if drawn(ask.source.removeprefix(PREFIX), ask.target.removeprefix(PREFIX), ask.port) else "dropped"
        for ask in asks
    }
    answers = pods.settled(wanted, limit=30)
    wrong = {f"{a.source} -> {a.target}:{a.port}": answers[a] for a in asks if answers[a] != wanted[a]}
    assert not wrong
    assert sum(answer == "open" for answer in answers.values()) == OPEN


#: Of 15 * 14 * 2 questions. Namespaces, on both ports: 3 services of the API to 2 of the data and 1 of the cache, those
#: 2 to the cache, staging 1 + 1, development 1, monitoring and security to 3 + 1 + 1 each. Services, on one port: the
#: gateway to NLP and query, export to data access, and the way in to three gateways; the others are in those above.
OPEN = 2 * (3 * 2 + 3 * 1 + 2 * 1 + 1 + 1 + 1 + 2 * (3 + 1 + 1)) + 3 + 3


def test_names_are_resolved_from_everywhere_inside(pods: Pods) -> None:
    server = pods.kubectl("get", "service", "-n", "kube-system", "kube-dns", "-o", "jsonpath={.spec.clusterIP}")
    inside = [PREFIX + pod for pod in PODS if not pod.startswith("outside/")]
    asks = [Ask(pod, server, 53) for pod in inside]
    assert dict(zip(asks, pods.probes(asks), strict=True)) == dict.fromkeys(asks, "open")


def test_only_the_data_services_reach_the_databases(pods: Pods, nodes_address: str) -> None:
    """The balancers on the nodes. Whether one listens is not the question: refused means that the way is open."""
    allowed = {("data-access", DATABASE), ("data-access", REDIS), ("cache", REDIS)}
    inside = [pod for pod in PODS if not pod.startswith("outside/")]
    asks = [Ask(PREFIX + pod, nodes_address, port) for pod in inside for port in (DATABASE, REDIS)]
    for ask, answer in zip(asks, pods.probes(asks), strict=True):
        arrived = answer in ("open", "refused")
        assert arrived is ((ask.source.split("/")[1], ask.port) in allowed), (ask, answer)
