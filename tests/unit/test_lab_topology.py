"""Reading the lab from its inventory, and the sentences said when it does not hold together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import topology
from lab.paths import REPO

HOSTS: dict[str, Any] = yaml.safe_load((REPO / "inventories/lab-small/hosts.yml").read_text())
NETWORKS: dict[str, Any] = yaml.safe_load((REPO / "inventories/lab/group_vars/all/main.yml").read_text())[
    "lab_networks"
]


@pytest.mark.parametrize(("inventory", "app", "db"), [("lab", 6, 6), ("lab-small", 2, 4), ("lab-ha", 9, 6)])
def test_the_shipped_inventories(inventory: str, app: int, db: int) -> None:
    lab = topology.load(REPO / "inventories" / inventory)
    roles = [node.role for node in lab.nodes]
    assert (roles.count("app"), roles.count("db"), roles.count("witness")) == (app, db, 1)
    assert {node.site for node in lab.nodes} == {"us-east-1", "us-west-2", "witness"}
    for node in lab.nodes:
        assert node.zone.startswith(node.site)


@pytest.mark.parametrize(
    ("inventory", "planes", "workers", "balancers"),
    [
        ("lab", ["use1-app1", "usw2-app1"], ["use1-app2", "use1-app3", "usw2-app2", "usw2-app3"], []),
        ("lab-small", ["use1-app1", "usw2-app1"], [], []),
        (
            "lab-ha",
            ["use1-cp1", "use1-cp2", "use1-cp3", "usw2-app1"],
            ["use1-app1", "use1-app2", "use1-app3", "usw2-app2", "usw2-app3"],
            ["use1-cp1", "use1-cp2", "use1-cp3"],
        ),
    ],
)
def test_the_clusters_of_the_shipped_inventories(
    inventory: str, planes: list[str], workers: list[str], balancers: list[str]
) -> None:
    lab = topology.load(REPO / "inventories" / inventory)
    assert [node.name for node in lab.nodes if node.kubernetes == "control-plane"] == planes
    assert [node.name for node in lab.nodes if node.kubernetes == "worker"] == workers
    assert {node.role for node in lab.nodes if node.kubernetes} == {"app"}
    groups = yaml.safe_load((REPO / "inventories" / inventory / "hosts.yml").read_text())["all"]["children"]
    assert list(groups["kube_load_balancer"]["hosts"]) == balancers
    assert set(groups["kubernetes"]["children"]) == {"kube_control_plane", "kube_node"}


@pytest.mark.parametrize("inventory", ["lab", "lab-small", "lab-ha"])
def test_every_consensus_group_has_three_members_and_the_lease_one_at_each_site(inventory: str) -> None:
    groups = yaml.safe_load((REPO / "inventories" / inventory / "hosts.yml").read_text())["all"]["children"]
    lab = topology.load(REPO / "inventories" / inventory)
    lease = {lab.node(name).site for name in groups["lease"]["hosts"]}
    assert lease == {site.name for site in lab.sites}
    for region in ("us-east-1", "us-west-2"):
        assert sum(lab.node(name).site == region for name in groups["dcs"]["hosts"]) == 3


def east(hosts: dict[str, Any]) -> Any:
    return hosts["all"]["children"]["nodes"]["children"]["us_east_1"]["hosts"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ansible_host": "10.77.1.22"}, "both have the address 10.77.1.22"),
        ({"ansible_host": "10.77.2.21"}, "is not in us-east-1's network"),
        ({"ansible_host": "10.77.1.1"}, "the router of us-east-1 both have"),
        ({"region": "eu-west-1"}, "'eu-west-1' is not a region of the lab"),
        ({"ansible_host": "db1"}, "needs region, zone and ansible_host"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, str], reason: str) -> None:
    hosts = copy.deepcopy(HOSTS)
    east(hosts)["use1-db1"].update(values)
    with pytest.raises(topology.TopologyError, match=reason):
        topology.parse(hosts, NETWORKS)


def test_a_node_without_a_role_is_refused() -> None:
    hosts = copy.deepcopy(HOSTS)
    east(hosts)["use1-extra"] = {"ansible_host": "10.77.1.99", "region": "us-east-1", "zone": "us-east-1a"}
    with pytest.raises(
        topology.TopologyError, match="use1-extra of the inventory is in none of the groups app, db, wit"
    ):
        topology.parse(hosts, NETWORKS)


def test_networks_outside_the_supernet_are_refused() -> None:
    networks = {**NETWORKS, "supernet": "10.99.0.0/16"}
    with pytest.raises(topology.TopologyError, match=r"is not inside 10\.99\.0\.0/16"):
        topology.parse(HOSTS, networks)


@pytest.mark.parametrize(
    ("kind", "ranges", "reason"),
    [
        (
            "services",
            {"us-east-1": "10.79.0.0/20", "us-west-2": "10.79.0.0/16"},
            "the Services of us-west-2 have addresses of the Services of us-east-1: 10.79.0.0/16 overlaps 10.79.0.0/20",
        ),
        (
            "pods",
            {"us-east-1": "10.77.8.0/24", "us-west-2": "10.78.128.0/17"},
            "the pods of us-east-1 have addresses of the nodes: 10.77.8.0/24 overlaps 10.77.0.0/16",
        ),
        ("pods", {"us-east-1": "10.78.0.0/17"}, "usw2-app1 is a Kubernetes node, but lab_networks has no pods or serv"),
    ],
    ids=["two clusters", "the nodes' own", "none"],
)
def test_ranges_that_a_stranger_could_answer_are_refused(kind: str, ranges: dict[str, str], reason: str) -> None:
    with pytest.raises(topology.TopologyError, match=reason):
        topology.parse(HOSTS, {**NETWORKS, kind: ranges})


def test_a_missing_inventory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(topology.TopologyError, match=r"hosts\.yml cannot be read: No such file"):
        topology.load(tmp_path)
