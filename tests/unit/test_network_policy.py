"""The lab's network agent: what policies mean (cases as data), and all else that needs no node."""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lab.network_policy import cni, model, routes, table
from lab.network_policy.rules import Allow, NodeRules, PodRules, block_ranges, closed, compile_node, merge
from tests.policy_cases import CASES, WORLD, Question, address_of, cluster, questions


def number(address: str) -> int:
    return int(ipaddress.IPv4Address(address))


def lets(allowed: tuple[Allow, ...] | None, peer: str, protocol: str, port: int) -> bool:
    """Whether one direction's rules let a packet pass."""
    if allowed is None:
        return True
    return any(
        any(first <= number(peer) <= last for first, last in allow.peers)
        and (allow.ports is None or any(p == protocol and first <= port <= last for p, first, last in allow.ports))
        for allow in allowed
    )


def passes(nodes: dict[str, NodeRules], question: Question) -> bool:
    """What the nodes of both ends say."""
    source, target = address_of(question.source), address_of(question.target)
    if source == target:
        return True
    rules = {pod.address: pod for node in nodes.values() for pod in node.pods}
    nobody = PodRules("")
    return lets(rules.get(source, nobody).egress, target, question.protocol, question.port) and lets(
        rules.get(target, nobody).ingress, source, question.protocol, question.port
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_policies_mean_what_the_api_documents(case: dict[str, Any]) -> None:
    known = cluster(case)
    nodes = {name: compile_node(known, name) for name in WORLD["nodes"]}
    wrong = [question for question in questions(case) if passes(nodes, question) is not question.allowed]
    assert not wrong


def test_case_names_are_unique() -> None:
    names = [case["name"] for case in CASES]
    assert sorted(set(names)) == sorted(names)


def pod(name: str, **said: Any) -> model.Pod:
    namespace, short = name.split("/")
    return model.Pod(namespace, short, **{"uid": name, "node": "n1", **said})


DENY = model.Policy("shop", "deny", model.Selector(), (), ())


def test_a_node_has_rules_for_its_own_pods_and_knows_all() -> None:
    known = model.Cluster(
        "10.78.0.0/16",
        pods=[pod("shop/a", addresses=("10.78.0.2",)), pod("shop/b", node="n2", addresses=("10.78.1.2",))],
        policies=[DENY],
    )
    assert compile_node(known, "n1") == NodeRules(
        "10.78.0.0/16", ("10.78.0.2", "10.78.1.2"), (PodRules("10.78.0.2", (), ()),)
    )


@pytest.mark.parametrize(
    "said",
    [{"host_network": True, "addresses": ("10.77.1.11",)}, {"finished": True, "addresses": ("10.78.0.9",)}, {}],
    ids=["on the host's network", "finished", "without an address"],
)
def test_pods_without_a_network_of_their_own_have_no_rules(said: dict[str, Any]) -> None:
    rules = compile_node(model.Cluster("10.78.0.0/16", pods=[pod("shop/a", **said)], policies=[DENY]), "n1")
    assert rules == NodeRules("10.78.0.0/16")


def test_pods_on_the_host_network_are_no_peers() -> None:
    by_label = model.Rule((model.Peer(None, model.Selector(), None),))
    known = model.Cluster(
        "10.78.0.0/16",
        pods=[pod("shop/a", addresses=("10.78.0.2",)), pod("shop/h", addresses=("10.77.1.11",), host_network=True)],
        policies=[model.Policy("shop", "own", model.Selector(), (by_label,))],
    )
    (rules,) = compile_node(known, "n1").pods
    assert rules.ingress == (Allow(((number("10.78.0.2"), number("10.78.0.2")),)),)


def test_the_order_of_the_objects_does_not_change_the_table() -> None:
    for case in CASES:
        known = cluster(case)
        turned = known._replace(pods=known.pods[::-1], policies=known.policies[::-1])
        assert table.render(compile_node(known, "n1")) == table.render(compile_node(turned, "n1")), case["name"]


@pytest.mark.parametrize(
    ("cidr", "excepted", "expected"),
    [
        ("10.0.0.0/30", [], [("10.0.0.0", "10.0.0.3")]),
        ("10.0.0.1/30", [], [("10.0.0.0", "10.0.0.3")]),
        ("10.0.0.0/30", ["10.0.0.0/30"], []),
        ("10.0.0.0/29", ["10.0.0.0/31"], [("10.0.0.2", "10.0.0.7")]),
        ("10.0.0.0/29", ["10.0.0.6/31"], [("10.0.0.0", "10.0.0.5")]),
        ("10.0.0.0/29", ["10.0.0.2/31", "10.0.0.3/32"], [("10.0.0.0", "10.0.0.1"), ("10.0.0.4", "10.0.0.7")]),
        ("10.0.0.0/29", ["10.9.0.0/16"], [("10.0.0.0", "10.0.0.7")]),
        ("0.0.0.0/0", ["128.0.0.0/1"], [("0.0.0.0", "127.255.255.255")]),
        ("fd00::/8", [], []),
    ],
)
def test_blocks_become_ranges(cidr: str, excepted: list[str], expected: list[tuple[str, str]]) -> None:
    found = block_ranges(model.Block(cidr, tuple(excepted)))
    assert found == [(number(first), number(last)) for first, last in expected]


def test_ranges_that_touch_are_one() -> None:
    assert merge([(5, 6), (1, 2), (3, 3), (10, 12), (11, 11)]) == ((1, 3), (5, 6), (10, 12))


# --- reading the API's objects -------------------------------------------------------------------------------------


def test_a_pod_is_read_with_the_named_ports_of_its_containers_and_sidecars() -> None:
    read = model.pod_of(
        {
            "metadata": {"namespace": "shop", "name": "web", "uid": "u1", "labels": {"app": "web"}},
            "spec": {
                "nodeName": "n1",
                "containers": [{"ports": [{"containerPort": 80}, {"name": "http", "containerPort": 8080}]}],
                "initContainers": [{"ports": [{"name": "admin", "containerPort": 9, "protocol": "UDP"}]}],
            },
            "status": {"phase": "Running", "podIP": "10.78.0.2", "podIPs": [{"ip": "10.78.0.2"}]},
        }
    )
    assert read == model.Pod(
        "shop", "web", "u1", "n1", ("10.78.0.2",), {"app": "web"}, (("http", "TCP", 8080), ("admin", "UDP", 9))
    )


@pytest.mark.parametrize(("phase", "finished"), [("Succeeded", True), ("Failed", True), ("Running", False)])
def test_a_finished_pod_is_known_as_such(phase: str, finished: bool) -> None:
    assert model.pod_of({"metadata": {"namespace": "a", "name": "b"}, "status": {"phase": phase}}).finished is finished


def test_a_node_is_read_by_its_internal_address_and_ipv4_block() -> None:
    addresses = [
        {"type": "Hostname", "address": "n1"},
        {"type": "InternalIP", "address": "fd00::1"},
        {"type": "InternalIP", "address": "10.77.1.11"},
    ]
    said = {
        "metadata": {"name": "n1"},
        "spec": {"podCIDR": "fd00::/64", "podCIDRs": ["fd00::/64", "10.78.0.0/24"]},
        "status": {"addresses": addresses},
    }
    assert model.node_of(said) == model.Node("n1", "10.77.1.11", "10.78.0.0/24")
    assert model.node_of({"metadata": {"name": "new"}}) == model.Node("new")


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}}, "operator 'Gt'"),
        ({"ingress": [{"from": [{}]}]}, "neither a selector nor an ipBlock"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]}]}, "10.0.0.0/99"),
        ({"ingress": [{"ports": [{"protocol": "GRE", "port": 1}]}]}, "protocol 'GRE'"),
    ],
)
def test_a_policy_that_says_something_unknown_is_refused_by_name(spec: dict[str, Any], word: str) -> None:
    with pytest.raises(model.Unreadable, match=word):
        model.policy_of({"metadata": {"namespace": "shop", "name": "new"}, "spec": spec})


def test_what_stands_for_such_a_policy_closes_its_namespace() -> None:
    closing = model.closed_policy_of({"metadata": {"namespace": "shop", "name": "new"}})
    assert closing == model.Policy("shop", "new", model.Selector(), (), ())


# --- the table's text ----------------------------------------------------------------------------------------------


def test_the_closed_table_knows_no_pod() -> None:
    text = table.render(closed("10.78.0.0/17"))
    assert "elements" not in text
    assert 'iifname "veth*" ip saddr != @known drop' in text


def test_replicas_share_one_chain() -> None:
    pods = [pod(f"shop/r{n}", addresses=(f"10.78.0.{n}",)) for n in range(2, 12)]
    rule = model.Rule((), (model.PolicyPort("TCP", 80),))
    known = model.Cluster("10.78.0.0/16", pods=pods, policies=[model.Policy("shop", "p", model.Selector(), (rule,))])
    text = table.render(compile_node(known, "n1"))
    assert text.count("chain ingress_") == 1
    assert text.count(": jump ingress_") == 10


def test_a_table_is_known_by_its_mark() -> None:
    text = table.render(closed("10.78.0.0/17"))
    said: list[tuple[str, ...]] = []

    def kernel(argv: Any, _: str) -> str:
        said.append(tuple(argv))
        return text

    assert table.loaded(kernel) == table.mark_of(text) != ""
    assert said == [("nft", "-t", "list", "table", "inet", "censuschat_network")]


def test_no_table_has_no_mark() -> None:
    def kernel(argv: Any, _: str) -> str:
        raise table.CommandError("nft: No such file or directory")

    assert table.loaded(kernel) == ""


def test_a_program_that_fails_is_quoted() -> None:
    with pytest.raises(table.CommandError, match=r"ls /nowhere failed with 2: .*No such file"):
        table.run(("ls", "/nowhere"))


# --- routes --------------------------------------------------------------------------------------------------------

NODES = {
    "n1": model.Node("n1", "10.77.1.11", "10.78.0.0/24"),
    "n2": model.Node("n2", "10.77.1.12", "10.78.1.0/24"),
    "n3": model.Node("n3", "10.77.1.13"),
    "n4": model.Node("n4", "", "10.78.3.0/24"),
}


def test_routes_lead_to_the_other_nodes_that_have_a_block() -> None:
    assert routes.wanted(NODES, "n1") == {"10.78.1.0/24": "10.77.1.12"}


@pytest.mark.parametrize(
    ("have", "lines"),
    [
        ({}, ["route replace 10.78.1.0/24 via 10.77.1.12 proto 178"]),
        ({"10.78.1.0/24": "10.77.1.12"}, []),
        ({"10.78.1.0/24": "10.77.1.99"}, ["route replace 10.78.1.0/24 via 10.77.1.12 proto 178"]),
        (
            {"10.78.9.0/24": "10.77.1.19", "10.78.1.0/24": "10.77.1.12"},
            ["route del 10.78.9.0/24 via 10.77.1.19 proto 178"],
        ),
    ],
    ids=["missing", "there", "elsewhere", "of a node that is gone"],
)
def test_only_the_difference_of_routes_is_made(have: dict[str, str], lines: list[str]) -> None:
    said: list[tuple[tuple[str, ...], str]] = []

    def kernel(argv: Any, text: str) -> str:
        said.append((tuple(argv), text))
        return json.dumps([{"dst": dst, "gateway": via} for dst, via in have.items()])

    assert routes.converge(routes.wanted(NODES, "n1"), kernel) == lines
    batch = [(("ip", "-force", "-batch", "-"), "\n".join(lines) + "\n")] if lines else []
    assert said == [(("ip", "-j", "route", "show", "proto", "178"), ""), *batch]


# --- the node's CNI ------------------------------------------------------------------------------------------------


def test_the_configuration_gives_each_pod_a_link_and_keeps_its_address() -> None:
    said = json.loads(cni.configuration("10.78.2.0/24"))
    (plugin,) = said["plugins"]
    assert (said["name"], plugin["type"], plugin["ipMasq"]) == ("censuschat", "ptp", False)
    assert plugin["ipam"]["ranges"] == [[{"subnet": "10.78.2.0/24"}]]
    assert plugin["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}]


def keep(path: Path, address: str, uid: str, when: float, name: str = "a") -> None:
    """A result as libcni keeps it."""
    arguments = [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", name], ["K8S_POD_UID", uid]]
    result = {"cniVersion": "1.0.0", "ips": [{"address": f"{address}/24", "gateway": "10.78.0.1"}]}
    path.write_text(json.dumps({"kind": "cniCacheV1", "cniArgs": arguments, "result": result}))
    os.utime(path, (when, when))


def test_leases_are_what_libcni_has_kept_of_this_network(tmp_path: Path) -> None:
    keep(tmp_path / "censuschat-s2-eth0", "10.78.0.3", "u2", 20.0, "b")
    keep(tmp_path / "censuschat-s1-eth0", "10.78.0.2", "u1", 10.0)
    (tmp_path / "cni-loopback-s1-lo").write_text("{}")
    (tmp_path / "censuschat-half-eth0").write_text('{"kind": "cniCa')
    assert cni.leases(tmp_path) == [
        cni.Lease("10.78.0.2", "shop", "a", "u1", 10.0),
        cni.Lease("10.78.0.3", "shop", "b", "u2", 20.0),
    ]
    # Of an earlier boot.
    assert [lease.name for lease in cni.leases(tmp_path, since=15.0)] == ["b"]
    assert cni.leases(tmp_path / "nowhere") == []


LEASE = cni.Lease("10.78.0.2", "shop", "a", "shop/a", 10.0)


@pytest.mark.parametrize(
    ("pods", "given", "addresses"),
    [
        ([pod("shop/a")], [LEASE], {"shop/a": ("10.78.0.2",)}),
        ([pod("shop/a", addresses=("10.78.0.2",))], [LEASE], {"shop/a": ("10.78.0.2",)}),
        ([pod("shop/a", uid="mirror")], [LEASE], {"shop/a": ("10.78.0.2",)}),
        (
            [pod("shop/a"), pod("shop/old", addresses=("10.78.0.2",))],
            [LEASE],
            {"shop/a": ("10.78.0.2",), "shop/old": ()},
        ),
        (
            [pod("shop/a"), pod("shop/b")],
            [LEASE, LEASE._replace(uid="shop/b", name="b", given=11.0)],
            {"shop/a": (), "shop/b": ("10.78.0.2",)},
        ),
        ([pod("shop/a", node="n2")], [LEASE], {"shop/a": ()}),
        ([pod("shop/b", addresses=("10.78.0.7",))], [LEASE], {"shop/b": ("10.78.0.7",)}),
        ([pod("shop/a", host_network=True, addresses=("10.77.1.11",))], [LEASE], {"shop/a": ("10.77.1.11",)}),
    ],
    ids=[
        "not yet in the API",
        "in both",
        "by name where the identity is another",
        "taken over from a pod that has ended",
        "the newest of two",
        "of another node",
        "of a pod that is not known yet",
        "host network",
    ],
)
def test_the_node_knows_its_pods_addresses_before_the_api_does(
    pods: list[model.Pod], given: list[cni.Lease], addresses: dict[str, tuple[str, ...]]
) -> None:
    merged = cni.with_leases(pods, given, "n1")
    assert {f"{p.namespace}/{p.name}": p.addresses for p in merged} == addresses
