"""The planners of patroni_cluster and patroni_founding as cases (data/patroni/), and how answers are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.cluster import (
    Local,
    Member,
    Node,
    View,
    Want,
    config_patch,
    guarded,
    lsn,
    missing,
    position,
    repair,
)
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.founding import FoundingError, Store, plan
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.host import member_of, node_of

DATA = Path(__file__).parent / "data/patroni"
MISSING: list[dict[str, Any]] = yaml.safe_load((DATA / "missing.yml").read_text())
REPAIR: list[dict[str, Any]] = yaml.safe_load((DATA / "repair.yml").read_text())


def node(name: str, fields: dict[str, Any]) -> Node:
    return Node(f"https://{name}:8008", **{**fields, "followers": frozenset(fields.get("followers", ()))})


def view_of(case: dict[str, Any]) -> View:
    members = tuple(
        Member(name=name, role=role, state="running", host=name, url=f"https://{name}:8008", timeline=timeline)
        for name, (role, timeline) in case.get("members", {}).items()
    )
    return View(
        members=members,
        config=case.get("config", {}),
        leader=node(members[0].name, case["leader"]) if "leader" in case else None,
        peers=tuple(node(f"peer{i}", p) for i, p in enumerate(case.get("peers", []))),
        error=case.get("error", ""),
    )


@pytest.mark.parametrize("case", MISSING, ids=lambda case: case["name"])
def test_missing(case: dict[str, Any]) -> None:
    want = Want(**{"state": "running", "members": 3, **case.get("want", {})})
    assert missing(want, view_of(case)) == case["missing"]


@pytest.mark.parametrize("case", REPAIR, ids=lambda case: case["name"])
def test_repair(case: dict[str, Any]) -> None:
    role = "leader" if case.get("primary") else "standby_leader"
    timelines = {"a": 4, "b": 4, "c": 4, **({case["local"]: case["timeline"]} if case["local"] in "abc" else {})}
    view = View(
        members=tuple(
            Member(n, role if n == "a" else "replica", case.get("state", "running"), n, f"https://{n}:8008", t)
            for n, t in timelines.items()
        ),
        config={"pause": True} if case.get("paused") else {},
        leader=Node("https://a:8008", "master" if case.get("primary") else "standby_leader", "running", 4),
        local=Local(name=case["local"], receiving=case.get("receiving", False)),
        peers=(Node("https://p:8008", "master", followers=frozenset(() if case.get("orphan") else ("a",))),),
    )
    want = Want(state="standby", repair=case.get("asked", True))
    assert repair(want, view, case["unwell_s"], case.get("rewound", False), grace_s=10) == case["step"]


@pytest.mark.parametrize(
    ("want", "have", "patch"),
    [
        ({"ttl": 20}, {"ttl": 20, "loop_wait": 5}, {}),
        ({"ttl": 20}, {"ttl": 30}, {"ttl": 20}),
        ({"ttl": 20}, {}, {"ttl": 20}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}}, {"a": {"c": 2}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": {"b": 1}}),
        ({"p": {"max_connections": 100}}, {"p": {"max_connections": "100"}}, {}),
        ({"m": True}, {"m": True}, {}),
        ({"m": True}, {"m": "true"}, {"m": True}),
        ({"m": False}, {}, {"m": False}),
        ({"ttl": 1}, {"ttl": True}, {"ttl": 1}),
        ({"a": {"b": None}}, {"a": {"b": 1}}, {"a": {"b": None}}),
        ({"a": None}, {}, {}),
    ],
)
def test_config_patch_is_the_smallest(want: dict[str, Any], have: dict[str, Any], patch: dict[str, Any]) -> None:
    assert config_patch(want, have) == patch


def test_what_decides_the_primary_region_is_the_guards() -> None:
    assert guarded({"ttl": 20, "standby_cluster": None, "pause": False}) == ["standby_cluster", "pause"]


@pytest.mark.parametrize("text", ["0/0", "0/3000148", "1/0", "A/FFFFFFFF", "7FFFFFFF/1"])
def test_positions_are_read_and_written(text: str) -> None:
    assert lsn(position(text)) == text


OWN = Store("us-east-1", reachable=True)
PEER = Store("us-west-2", reachable=True)


@pytest.mark.parametrize(
    ("own", "peer", "found", "reason"),
    [
        (OWN, PEER, True, "no region has a database"),
        (Store("us-east-1", True, system="7", configured=True), PEER, False, "us-east-1 has database 7"),
        (Store("us-east-1", True, configured=True), PEER, False, "us-east-1 is being founded"),
        (OWN, Store("us-west-2", True, system="7"), False, "us-west-2 has database 7; us-east-1 clones it"),
        # An own database says enough: the peer need not be known.
        (Store("us-east-1", True, system="7"), Store("us-west-2", False), False, "us-east-1 has database 7"),
    ],
)
def test_who_founds(own: Store, peer: Store, found: bool, reason: str) -> None:
    assert plan(own, [peer]) == (found, reason)


@pytest.mark.parametrize(
    ("own", "peer", "message"),
    [
        (Store("us-east-1", False, reason="refused"), PEER, r"the store of us-east-1 does not answer \(refused\)"),
        (OWN, Store("us-west-2", False, reason="timed out"), "whether us-west-2 has one cannot be known"),
    ],
)
def test_no_founding_on_a_guess(own: Store, peer: Store, message: str) -> None:
    with pytest.raises(FoundingError, match=message):
        plan(own, [peer])


def test_patronis_answers() -> None:
    # Taken from Patroni 3.0.2: GET /patroni of a primary and of a standby leader, an entry of GET /cluster.
    primary = {
        "state": "running",
        "role": "master",
        "xlog": {"location": 88575848},
        "timeline": 1,
        "replication": [
            {"usename": "replicator", "client_addr": "10.77.1.22", "state": "streaming", "sync_state": "async"},
            {"usename": "replicator", "client_addr": "10.77.1.23", "state": "catchup", "sync_state": "sync"},
        ],
    }
    assert node_of("u", primary) == Node("u", "master", "running", 1, 88575848, 88575848, frozenset({"10.77.1.22"}))
    standby = {
        "state": "running",
        "role": "standby_leader",
        "xlog": {"received_location": 500, "replayed_location": 400, "paused": False},
        "timeline": 2,
    }
    assert node_of("u", standby) == Node("u", "standby_leader", "running", 2, 500, 400)
    # A standby that has replayed its own WAL and received nothing yet has at least what it replayed.
    assert node_of("u", {"xlog": {"received_location": 300, "replayed_location": 400}}).received == 400
    assert node_of("u", {"state": "stopped", "role": "replica"}) == Node("u", "replica", "stopped")
    entry = {
        "name": "use1-db1",
        "role": "leader",
        "state": "running",
        "api_url": "https://10.77.1.21:8008/patroni",
        "host": "10.77.1.21",
        "port": 5432,
        "timeline": 1,
        "pending_restart": True,
    }
    assert member_of(entry) == Member(
        "use1-db1", "leader", "running", "10.77.1.21", "https://10.77.1.21:8008", 1, pending_restart=True
    )
