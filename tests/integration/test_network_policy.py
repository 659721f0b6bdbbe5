"""NetworkPolicy in the lab's real clusters: allowed and denied paths between real pods, and how soon they are so.

What each policy means is tested in tests/unit and, packet by packet, in test_network_table.py; here it is the whole way
from an object in the API to the kernel of the right nodes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.network_policy.agent import LOOK_S
from lab.paths import STATE
from lab.topology import Topology
from tests.nodes import on
from tests.pods import Ask, Pods, PodsError, ProbePod

REGION = "us-east-1"
SHOP, BANK = "network-shop", "network-bank"
WEB, DB, API, TELLER = f"{SHOP}/web", f"{SHOP}/db", f"{SHOP}/api", f"{BANK}/teller"
#: From the change of an object to its effect on every node, in seconds: what the lab promises.
SOON_S = 2.0
DENY: dict[str, Any] = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.fixture(scope="module")
def pods(running_lab: Topology) -> Iterator[Pods]:
    """Two pods on one node and two on another, in two namespaces."""
    with Pods(STATE / "kubernetes" / f"{REGION}.kubeconfig") as made:
        for namespace in (SHOP, BANK):
            made.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        try:
            nodes = json.loads(made.kubectl("get", "nodes", "-o", "json"))["items"]
            names = [node["metadata"]["name"] for node in nodes if not node["spec"].get("taints")]
            # A small lab has one node; the default one has three.
            here, there = names[0], names[-1]
            made.create(
                ProbePod(SHOP, "web", {"app": "web"}, [8080], {"http": 8080}, here),
                ProbePod(SHOP, "db", {"app": "db"}, [5432, 5433, 5434, 5435, (53, "UDP"), (54, "UDP")], {}, here),
                ProbePod(SHOP, "api", {"app": "api"}, [9090, 9091], {"http": 9090}, there),
                ProbePod(BANK, "teller", {"app": "web"}, [8080], {}, there),
            )
            yield made
        finally:
            made.kubectl("delete", "namespace", SHOP, BANK, "--wait=false")


def node_of(pods: Pods, pod: str) -> str:
    namespace, name = pod.split("/")
    return pods.kubectl("get", "pod", "-n", namespace, name, "-o", "jsonpath={.spec.nodeName}")


def databases(lab: Topology) -> list[str]:
    """The addresses of the region's database nodes."""
    return [str(node.address) for node in lab.nodes if node.role == "db" and node.site == REGION]


Enforce = Callable[..., None]


@pytest.fixture
def enforce(pods: Pods) -> Iterator[Enforce]:
    """Applies policies of a namespace and waits until the first question has its new answer, which is to be soon."""

    def apply(namespace: str, *specs: dict[str, Any], ask: Ask, becomes: str) -> None:
        meta = [{"namespace": namespace, "name": f"policy-{number}"} for number in range(len(specs))]
        kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
        pods.apply(*({**kind, "metadata": m, "spec": spec} for m, spec in zip(meta, specs, strict=True)))
        print(f"{becomes} after {pods.until(ask, becomes, SOON_S):.2f} s")

    yield apply
    for namespace in (SHOP, BANK):
        pods.kubectl("delete", "networkpolicy", "-n", namespace, "--all")
    everything = [Ask(WEB, DB, 5432), Ask(WEB, API, 9090), Ask(TELLER, WEB, 8080), Ask(API, TELLER, 8080)]
    for ask in everything:
        pods.until(ask, "open", SOON_S)


def test_without_policies_pods_nodes_and_services_are_reached(pods: Pods, running_lab: Topology) -> None:
    node, database = str(running_lab.node(node_of(pods, WEB)).address), databases(running_lab)[0]
    api = pods.kubectl("get", "service", "-n", "default", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
    names = pods.kubectl("get", "service", "-n", "kube-system", "kube-dns", "-o", "jsonpath={.spec.clusterIP}")
    asks = [
        Ask(WEB, DB, 5432),
        Ask(WEB, DB, 53, "UDP"),
        Ask(WEB, API, 9090),
        Ask(API, WEB, 8080),
        Ask(TELLER, DB, 53, "UDP"),
        Ask(WEB, node, 22),
        Ask(API, node, 22),
        Ask(WEB, database, 22),
        Ask(WEB, api, 443),
        Ask(API, api, 443),
        Ask(WEB, names, 53),
        Ask(API, names, 53),
    ]
    assert dict(zip(asks, pods.probes(asks), strict=True)) == dict.fromkeys(asks, "open")
    # Nobody listens, and that is the pod's own word.
    assert pods.probe(WEB, DB, 1) == pods.probe(WEB, API, 1, "UDP") == "refused"


def test_nothing_outside_the_lab_is_reached(pods: Pods) -> None:
    asks = [Ask(source, target, 80) for source in (WEB, API) for target in ("192.0.2.1", "10.77.0.2", "10.80.0.1")]
    assert "open" not in pods.probes(asks)


def test_a_default_deny_holds_soon_in_both_directions_and_ends_soon(
    pods: Pods, enforce: Enforce, running_lab: Topology
) -> None:
    node, database = str(running_lab.node(node_of(pods, WEB)).address), databases(running_lab)[0]
    enforce(SHOP, DENY, ask=Ask(WEB, DB, 5432), becomes="dropped")
    pods.until(Ask(TELLER, API, 9090), "dropped", SOON_S)
    ends = [(WEB, DB, 5432), (WEB, API, 9090), (API, WEB, 8080), (TELLER, WEB, 8080), (WEB, TELLER, 8080)]
    asks = [Ask(*end) for end in ends] + [Ask(WEB, DB, 53, "UDP"), Ask(TELLER, DB, 53, "UDP")]
    assert pods.probes(asks) == ["dropped"] * len(asks)
    # The node it runs on has the region's database behind its balancer: it is a destination like any other.
    assert pods.probe(WEB, node, 22) == pods.probe(WEB, database, 22) == "dropped"
    pods.kubectl("delete", "networkpolicy", "-n", SHOP, "--all")
    print(f"open after {pods.until(Ask(WEB, DB, 5432), 'open', SOON_S):.2f} s")


def test_selectors_and_ports_open_just_the_drawn_path(pods: Pods, enforce: Enforce) -> None:
    def to(app: str, port: int | str) -> dict[str, Any]:
        return {"to": [{"podSelector": {"matchLabels": {"app": app}}}], "ports": [{"port": port}]}

    def of(app: str, port: int | str) -> dict[str, Any]:
        return {"from": [{"podSelector": {"matchLabels": {"app": app}}}], "ports": [{"port": port}]}

    enforce(
        SHOP,
        DENY,
        {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"], "egress": [to("api", "http")]},
        {
            "podSelector": {"matchLabels": {"app": "api"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [of("web", "http")],
            "egress": [to("db", 5432)],
        },
        {"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [of("api", 5432)]},
        ask=Ask(WEB, DB, 5432),
        becomes="dropped",
    )
    pods.until(Ask(WEB, API, 9090), "open", SOON_S)
    pods.until(Ask(API, DB, 5432), "open", SOON_S)
    stopped = [
        Ask(WEB, API, 9091),
        Ask(API, WEB, 8080),
        Ask(API, DB, 5433),
        Ask(DB, API, 9090),
        Ask(TELLER, API, 9090),
        Ask(TELLER, DB, 5432),
        Ask(API, TELLER, 8080),
    ]
    assert pods.probes(stopped) == ["dropped"] * len(stopped)


def test_namespaces_blocks_ranges_and_udp(pods: Pods, enforce: Enforce, running_lab: Topology) -> None:
    first, second, *_ = databases(running_lab)
    network = str(running_lab.site(REGION).network)
    from_bank = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": BANK}}}
    ranges = [{"port": 5433, "endPort": 5434}, {"port": 53, "protocol": "UDP"}]
    block = {"ipBlock": {"cidr": network, "except": [f"{second}/32"]}}
    enforce(
        SHOP,
        {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [from_bank], "ports": ranges}],
            "egress": [{"to": [block], "ports": [{"port": 22}]}],
        },
        ask=Ask(WEB, DB, 5432),
        becomes="dropped",
    )
    answers = {
        Ask(TELLER, DB, 5432): "dropped",
        Ask(TELLER, DB, 5433): "open",
        Ask(TELLER, DB, 5434): "open",
        Ask(TELLER, DB, 5435): "dropped",
        Ask(TELLER, DB, 53, "UDP"): "open",
        Ask(TELLER, DB, 54, "UDP"): "dropped",
        Ask(WEB, DB, 5433): "dropped",
        Ask(WEB, first, 22): "open",
        Ask(WEB, second, 22): "dropped",
        Ask(WEB, first, 5432): "dropped",
        Ask(API, first, 22): "open",
        Ask(API, TELLER, 8080): "dropped",
    }
    pods.until(Ask(API, TELLER, 8080), "dropped", SOON_S)
    assert dict(zip(answers, pods.probes(list(answers)), strict=True)) == answers


def test_a_service_is_judged_by_the_pod_behind_it(pods: Pods, enforce: Enforce) -> None:
    def service(name: str, port: int) -> dict[str, Any]:
        spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": port}]}
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": SHOP, "name": name}, "spec": spec}

    pods.apply(service("api", 9090), service("db", 5432))
    listed = json.loads(pods.kubectl("get", "services", "-n", SHOP, "-o", "json"))["items"]
    virtual = {item["metadata"]["name"]: item["spec"]["clusterIP"] for item in listed}
    for address in virtual.values():
        pods.until(Ask(WEB, address, 80), "open", 10)
    spec = {
        "podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "api"}}}], "ports": [{"port": 9090}]}],
    }
    enforce(SHOP, spec, ask=Ask(WEB, virtual["db"], 80), becomes="dropped")
    assert pods.probe(WEB, virtual["api"], 80) == "open"


def test_a_policy_ends_the_connection_that_it_forbids(pods: Pods, enforce: Enforce) -> None:
    assert pods.hold(TELLER, DB, 5432, "theirs") == pods.hold(WEB, DB, 5432, "ours") == "open"
    assert pods.say(TELLER, "theirs") == pods.say(WEB, "ours") == "open"
    own: dict[str, Any] = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}
    enforce(SHOP, own, ask=Ask(TELLER, DB, 5432), becomes="dropped")
    assert pods.say(WEB, "ours") == "open"
    assert pods.say(TELLER, "theirs") == "ended"


def test_enforcement_outlives_the_agent(pods: Pods, enforce: Enforce) -> None:
    enforce(SHOP, DENY, ask=Ask(WEB, DB, 5432), becomes="dropped")
    node = node_of(pods, WEB)
    on(node, "systemctl stop censuschat-network.service")
    try:
        assert pods.probe(WEB, DB, 5432) == "dropped"
        # A flushed table is put back by whoever comes first, here the unit that Debian flushes with.
        on(node, "systemctl restart censuschat-network-table.service")
        assert pods.probe(WEB, DB, 5432) == "dropped"
    finally:
        on(node, "systemctl start censuschat-network.service")
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert pods.probe(WEB, DB, 5432) == "dropped"
    # And it goes on where it was: the next change counts.
    pods.kubectl("delete", "networkpolicy", "-n", SHOP, "--all")
    pods.until(Ask(WEB, DB, 5432), "open", SOON_S)


def test_a_lost_table_is_put_back(pods: Pods, enforce: Enforce) -> None:
    enforce(SHOP, DENY, ask=Ask(WEB, DB, 5432), becomes="dropped")
    node = node_of(pods, WEB)
    on(node, "nft delete table inet censuschat_network")
    assert pods.probe(WEB, DB, 5432) == "open"
    print(f"put back after {pods.until(Ask(WEB, DB, 5432), 'dropped', LOOK_S + SOON_S):.1f} s")


def test_a_new_pod_is_isolated_from_its_first_packet(pods: Pods, enforce: Enforce) -> None:
    """It calls from its first moment on; the kubelet's probe reaches it all the same."""
    enforce(SHOP, DENY, ask=Ask(WEB, DB, 5432), becomes="dropped")
    eager = ProbePod(SHOP, "eager", {"app": "eager"}, [8080], node=node_of(pods, WEB))
    manifest = eager.manifest(pods.image)
    calls = (
        "import socket, time\n"
        "listener = socket.create_server(('0.0.0.0', 8080))\n"
        "end, reached, tried = time.time() + 4, 0, 0\n"
        "while time.time() < end:\n"
        "    tried += 1\n"
        "    try:\n"
        f"        socket.create_connection(('{pods.address(TELLER)}', 8080), 0.2).close()\n"
        "        reached += 1\n"
        "    except OSError:\n"
        "        time.sleep(0.01)\n"
        "print('reached', reached, 'tried', tried > 5, flush=True)\n"
        "while True:\n"
        "    listener.accept()[0].close()\n"
    )
    manifest["spec"]["containers"][0]["command"] = ["/usr/bin/python3", "-c", calls]
    pods.apply(manifest)
    try:
        pods.kubectl("wait", "-n", SHOP, "--for=condition=Ready", "--timeout=30s", "pod/eager")
        end = time.monotonic() + 15
        while not (said := pods.kubectl("logs", "-n", SHOP, "eager")):
            assert time.monotonic() < end, "the pod never said what it reached"
            time.sleep(0.2)
        assert said == "reached 0 tried True\n"
    finally:
        pods.kubectl("delete", "pod", "-n", SHOP, "eager", "--now", "--wait=false")


def test_an_agent_is_small_and_may_only_read(pods: Pods) -> None:
    for node in pods.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}").split():
        pid = on(node, "systemctl show -P MainPID censuschat-network.service").strip()
        status = dict(line.split(":", 1) for line in on(node, f"cat /proc/{pid}/status").splitlines())
        assert int(status["VmRSS"].split()[0]) < 30 * 1024, f"kB on {node}"
    account = "--as=system:serviceaccount:kube-system:censuschat-network"
    for verb, what in (("list", "pods"), ("watch", "networkpolicies.networking.k8s.io"), ("list", "nodes")):
        assert pods.kubectl("auth", "can-i", verb, what, "-A", account) == "yes\n"
    for verb, what in (("get", "secrets"), ("list", "secrets"), ("create", "pods"), ("patch", "nodes")):
        with pytest.raises(PodsError, match="no"):
            pods.kubectl("auth", "can-i", verb, what, "-A", account)
