"""The network's planner: from what is there to the commands that make the difference, without a host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab import fabric, topology
from lab.fabric import MACHINE, ROUTER, UPLINK, Fabric, Link, Space
from lab.paths import REPO

LAB = topology.load(REPO / "inventories" / "lab")
UP = Fabric(fabric.desired(LAB), fabric.mark(fabric.ruleset(LAB)))
EAST, WEST = "10.77.1.0/24", "10.77.2.0/24"


def changed(name: str, space: Space) -> Fabric:
    return replace(UP, spaces={**UP.spaces, name: space})


def lines(actions: list[fabric.Action]) -> list[str]:
    """Every command and every line given to one, in order."""
    return [line for action in actions for line in [" ".join(action.command), *action.stdin.splitlines()]]


def test_a_lab_that_is_up_needs_nothing() -> None:
    assert fabric.plan(LAB, UP) == []


def test_a_bare_machine_gets_every_namespace_link_and_address() -> None:
    said = lines(fabric.plan(LAB, Fabric({MACHINE: Space()})))
    for node in LAB.nodes:
        assert f"ip netns add censuslab-{node.name}" in said
        assert f"link add {node.name} type veth peer name eth0 netns censuslab-{node.name}" in said
        assert f"addr add {node.address}/24 dev eth0" in said
    assert f"ip link add {UPLINK} type veth peer name operator netns {ROUTER}" in said
    assert said.count("route replace 10.77.0.0/16 via 10.77.1.1") == 7  # six nodes and the region's client
    # The Services of a region, on its three Kubernetes nodes only, so that what kube-proxy does not know is refused.
    assert said.count("route replace 10.79.0.0/20 via 10.77.1.1") == 3
    assert said.count("route replace 10.79.16.0/20 via 10.77.2.1") == 3
    assert not [line for line in said if "default" in line and line.startswith("route")]


def test_the_filter_is_loaded_before_anything_can_be_forwarded() -> None:
    actions = fabric.plan(LAB, Fabric({MACHINE: Space()}))
    kinds = [action.what for action in actions]
    assert kinds.index("packet filter") < kinds.index("links")
    assert "policy drop" in actions[kinds.index("packet filter")].stdin


def test_every_kubernetes_node_is_fenced_before_it_has_a_link_and_no_other_is() -> None:
    actions = fabric.plan(LAB, Fabric({MACHINE: Space()}))
    kinds = [action.what for action in actions]
    fenced = [kind.removeprefix("fence of ") for kind in kinds if kind.startswith("fence of ")]
    assert fenced == [node.name for node in LAB.nodes if node.kubernetes]
    assert max(kinds.index(f"fence of {name}") for name in fenced) < kinds.index("links")


def test_a_fence_refuses_its_own_regions_services_and_all_that_is_not_the_labs() -> None:
    text = fabric.fence(LAB, LAB.site("us-west-2"))
    assert "ip daddr 10.79.16.0/20 counter name unprogrammed reject\n" in text
    assert "ip daddr != { 10.77.0.0/16, 10.78.128.0/17, 127.0.0.0/8, 224.0.0.0/4 } counter name outside reject" in text


def test_of_the_machine_only_its_own_link_and_route_are_touched() -> None:
    machine = Space(
        {UPLINK: Link(frozenset({"10.77.0.2/24"}), True), "eth0": Link(frozenset({"192.0.2.2/24"}), True)},
        frozenset({("default", "192.0.2.1"), ("10.77.0.0/16", "10.77.0.1")}),
    )
    assert fabric.plan(LAB, changed(MACHINE, machine)) == []


@pytest.mark.parametrize(
    ("name", "space", "expected"),
    [
        pytest.param(
            "censuslab-use1-db1",
            replace(
                UP.spaces["censuslab-use1-db1"],
                routes=frozenset({("10.77.0.0/16", "10.77.1.1"), ("default", "10.77.1.1")}),
            ),
            ["ip -n censuslab-use1-db1 -batch -", "route del default via 10.77.1.1"],
            id="a planted default route goes",
        ),
        pytest.param(
            "censuslab-use1-db1",
            replace(UP.spaces["censuslab-use1-db1"], routes=frozenset()),
            ["ip -n censuslab-use1-db1 -batch -", "route replace 10.77.0.0/16 via 10.77.1.1"],
            id="a lost route comes back",
        ),
        pytest.param(
            "censuslab-witness1",
            Space(
                {"lo": Link(up=True), "eth0": Link(frozenset({"10.77.3.99/24"}), True)},
                frozenset({("10.77.0.0/16", "10.77.3.1")}),
            ),
            [
                "ip -n censuslab-witness1 -batch -",
                "addr add 10.77.3.11/24 dev eth0",
                "addr del 10.77.3.99/24 dev eth0",
            ],
            id="a wrong address is put right",
        ),
        pytest.param(
            "censuslab-use1-app1",
            replace(
                UP.spaces["censuslab-use1-app1"],
                links={
                    "lo": Link(up=True),
                    "eth0": Link(frozenset({"10.77.1.11/24", "10.77.1.100/32"}), True),
                    "cni0": Link(frozenset({"10.78.0.1/24"}), True),
                },
                routes=UP.spaces["censuslab-use1-app1"].routes | {("10.78.1.0/24", "10.77.1.12")},
            ),
            [],
            id="a floating address, a bridge of pods and the routes to others stay",
        ),
        pytest.param(
            ROUTER,
            replace(
                UP.spaces[ROUTER],
                links={**UP.spaces[ROUTER].links, "use1-db1": Link(up=False, master="")},
            ),
            [
                f"ip -n {ROUTER} -batch -",
                "link set use1-db1 master br-us-east-1",
                "link set use1-db1 up",
            ],
            id="a port that lost its bridge is joined again",
        ),
        pytest.param(
            "censuslab-use1-app2",
            replace(UP.spaces["censuslab-use1-app2"], fence="0"),
            [
                "ip netns exec censuslab-use1-app2 nft -f -",
                *fabric.load(fabric.fence(LAB, LAB.site("us-east-1"))).splitlines(),
                "ip netns exec censuslab-use1-app2 sysctl -q -w net.ipv4.icmp_ratelimit=0",
            ],
            id="a changed fence is put back",
        ),
        pytest.param(
            ROUTER,
            replace(UP.spaces[ROUTER], forwarding=False),
            [
                f"ip netns exec {ROUTER} sysctl -e -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.disable_ipv6=1"
                " net.ipv6.conf.default.disable_ipv6=1 net.ipv4.icmp_ratelimit=0"
                " net.bridge.bridge-nf-call-iptables=0"
            ],
            id="the router forwards again",
        ),
    ],
)
def test_drift_is_put_right_and_nothing_else(name: str, space: Space, expected: list[str]) -> None:
    assert lines(fabric.plan(LAB, changed(name, space))) == expected


def test_a_node_whose_link_is_gone_gets_a_new_one_and_a_left_over_port_goes_first() -> None:
    said = lines(fabric.plan(LAB, changed("censuslab-use1-app1", Space({"lo": Link(up=True)}))))
    assert said.index("link del use1-app1") + 1 == said.index(
        "link add use1-app1 type veth peer name eth0 netns censuslab-use1-app1"
    )
    assert "link set use1-app1 master br-us-east-1" in said
    assert "addr add 10.77.1.11/24 dev eth0" in said


def test_a_link_to_a_fabric_that_was_deleted_is_made_anew_with_address_and_route() -> None:
    before = {name: space for name, space in UP.spaces.items() if name != ROUTER}
    said = lines(fabric.plan(LAB, Fabric(before)))
    assert said.index(f"ip link del {UPLINK}") < said.index(
        f"ip link add {UPLINK} type veth peer name operator netns {ROUTER}"
    )
    for line in ("addr add 10.77.0.2/24 dev censuslab0", "link set censuslab0 up"):
        assert line in said
    assert "route replace 10.77.0.0/16 via 10.77.0.1" in said
    assert "addr add 10.77.0.1/24 dev operator" in said


def test_other_rules_are_replaced_in_one_transaction_that_keeps_the_cuts() -> None:
    actions = fabric.plan(LAB, replace(UP, rules="other", cut=frozenset({EAST})))
    assert [action.what for action in actions] == ["packet filter"]
    said = actions[0].stdin.splitlines()
    assert said[0] == "table inet censuslab"
    assert said[1] == "delete table inet censuslab"
    assert said[-1] == f"add element inet censuslab cut {{ {EAST} }}"


@pytest.mark.parametrize(
    ("before", "wanted", "expected"),
    [
        (frozenset(), ["us-east-1"], [f"add element inet censuslab cut {{ {EAST} }}"]),
        (frozenset({EAST}), ["us-east-1"], []),
        (frozenset({EAST}), [], [f"delete element inet censuslab cut {{ {EAST} }}"]),
        (
            frozenset({EAST}),
            ["us-west-2"],
            [f"add element inet censuslab cut {{ {WEST} }}", f"delete element inet censuslab cut {{ {EAST} }}"],
        ),
    ],
)
def test_cuts(before: frozenset[str], wanted: list[str], expected: list[str]) -> None:
    actions = fabric.plan_cut(LAB, before, wanted)
    assert [line for action in actions for line in action.stdin.splitlines()] == expected


def test_an_unknown_region_is_named_with_those_there_are() -> None:
    with pytest.raises(topology.TopologyError, match=r"'eu-west-1' is not a region of the lab.*us-east-1, us-west-2"):
        fabric.plan_cut(LAB, frozenset(), ["eu-west-1"])


def test_inside_a_cut_region_traffic_is_accepted_before_the_cut_is_looked_at() -> None:
    rules = [line.strip() for line in fabric.ruleset(LAB).splitlines()]
    drops = [rules.index("ip saddr @cut drop"), rules.index("ip daddr @cut drop")]
    for site in LAB.sites:
        assert rules.index(f"ip saddr {site.network} ip daddr {site.network} accept") < min(drops)
    # Established flows are no exception to a cut.
    assert rules.index("ct state established,related accept") > max(drops)


def test_removal_takes_the_labs_namespaces_and_link_only() -> None:
    observed = Fabric(
        {
            MACHINE: Space({UPLINK: Link()}),
            "censuslab-use1-db1": Space(),
            ROUTER: Space(),
            "somebody-elses": Space(),
        }
    )
    assert lines(fabric.plan_absent(observed)) == [
        f"ip link del {UPLINK}",
        f"ip netns del {ROUTER}",
        "ip netns del censuslab-use1-db1",
    ]
    assert fabric.plan_absent(Fabric({MACHINE: Space()})) == []


def test_interface_names_fit_the_kernel() -> None:
    for space in fabric.desired(LAB).values():
        assert all(len(name) <= 15 for name in space.links)
