"""Plans of fail-over and fail-back against the running lab: true, stable, silent about secrets, without an effect."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lab import verbs
from lab.paths import REPO, STATE
from lab.topology import Topology
from runbooks.plan import compare, read
from tests.faults import sweep
from tests.faults.logs import PKI, Logs
from tests.nodes import on

ETCD = (
    f"ETCDCTL_API=3 etcdctl --endpoints https://127.0.0.1:12379 --cacert {PKI}/ca.crt --cert {PKI}/node.crt "
    f"--key {PKI}/node.key get --prefix /censuschat/lab/ -w json"
)
# New timelines are in the servers' logs.
SQL = (
    "SELECT pg_is_in_recovery(), "
    "(SELECT string_agg(rolname, ',' ORDER BY rolname) FROM pg_roles WHERE rolname NOT LIKE 'runbook%'), "
    "(SELECT count(*) FROM rows)"
)


@dataclass(frozen=True, slots=True)
class World:
    """What the servers' logs do not tell: revisions of the lease's records; the databases' parts, roles and rows."""

    lease: tuple[tuple[str, int], ...]
    databases: tuple[tuple[str, str], ...]


def world(lab: Topology, lost: str) -> World:
    kept = []
    for entry in json.loads(on("witness1", ETCD)).get("kvs", []):
        name = base64.b64decode(entry["key"]).decode()
        # What the guards renew every two seconds is theirs.
        if name.rpartition("/")[2] in ("epoch", "handover", "shipped"):
            kept.append((name, entry["mod_revision"]))
    # A region that is lost gives its databases up by itself.
    nodes = [node.name for node in lab.nodes if node.role == "db" and node.site != lost]
    return World(
        tuple(kept),
        tuple((name, on(name, f'psql -Atqc "{SQL}" censuschat', user="postgres")) for name in nodes),
    )


@dataclass
class Planner:
    """Plans in an inventory of the test's own, whose journal is nobody else's."""

    where: sweep.Place

    def plan(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Exit code and plan; fails when a secret of the lab is in what was said or kept."""
        done = subprocess.run(
            [sys.executable, "-m", "runbooks", "plan", *words, "-i", str(self.where.inventory), "--json"],
            cwd=REPO,
            env=self.where.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert done.stdout.startswith("{"), done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        assert "error" not in document, document
        said = (done.stdout + done.stderr).encode()
        said += b"".join(p.read_bytes() for p in (self.where.directory / "runs").rglob("*") if p.is_file())
        assert not [name for name, value in secrets().items() if value in said]
        print(f"plan {' '.join(words)}: {document['took_s']} s, {document['changes']} changes")
        return done.returncode, document


def secrets() -> dict[str, bytes]:
    """The lab's passwords and private keys."""
    files = [*(STATE / "secrets").iterdir(), *(STATE / "pki").glob("*.key")]
    found = {file.name: file.read_bytes().strip() for file in files if file.is_file()}
    long = {name: value.splitlines()[len(value.splitlines()) // 2] for name, value in found.items() if len(value) >= 8}
    assert long
    return long


def planner_of(directory: Path) -> Planner:
    inventory = verbs.recorded()
    assert inventory is not None
    return Planner(sweep.place(directory, inventory, {}))


@pytest.fixture
def planner(running_lab: Topology, tmp_path: Path) -> Planner:
    return planner_of(tmp_path)


@contextlib.contextmanager
def nothing_happens(lab: Topology, *, lost: str = "") -> Iterator[None]:
    """Whatever the servers log, and the world, is as before; apart from the end of a lost region's lease."""
    before = world(lab, lost)
    with Logs(lab) as logs:
        yield
        ended = {"etcd delete lab/lease"} if lost else set()
        # A drill may go on beside it: its things are its own, and named after the runbook.
        mine = [e for e in logs.read() if "runbook" not in e.what and (e.kind != "etcd" or " lab/" in e.key)]
        events = [e for e in mine if e.key not in ended]
    assert events == []
    assert world(lab, lost) == before


def writer() -> str:
    for entry in json.loads(on("witness1", ETCD)).get("kvs", []):
        if base64.b64decode(entry["key"]).decode() == "/censuschat/lab/epoch":
            return str(json.loads(base64.b64decode(entry["value"]))["region"])
    raise AssertionError("nobody ever wrote")


def same(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs between two plans; whoever works on the collection meanwhile changes its code."""
    return compare(*(replace(read(each), code="") for each in (first, second)))


def changes(document: dict[str, Any], step: str) -> list[str]:
    planned = next(s for s in document["steps"] if s["id"] == step)
    return [f"{c['action'].rpartition('.')[2]} {c['host']}: {c['after']}" for c in planned["changes"]]


def test_a_plan_of_a_living_lab_is_true_and_changes_nothing(running_lab: Topology, planner: Planner) -> None:
    here = writer()
    there = next(r for r in ("us-east-1", "us-west-2") if r != here)
    with nothing_happens(running_lab):
        code, refused = planner.plan("fail-over")
        assert code == 3
        fence = next(s for s in refused["steps"] if s["id"] == "fence")
        assert fence["obstacle"]["refused"]
        assert f"{here} holds the write lease" in fence["obstacle"]["why"]
        assert "it is alive" in fence["obstacle"]["why"]

        code, back = planner.plan("fail-back", "--to", there)
        assert code == 0
        assert [s["id"] for s in back["steps"] if s["reached"]] == [s["id"] for s in back["steps"]]
        assert any(f"last_region: {there}" in c for c in changes(back, "hand-over"))
        assert any("turn from standby to primary" in c for c in changes(back, "promote"))
        assert any("redis_replication" in c for c in changes(back, "promote"))
        assert any("route53 localhost" in c for c in changes(back, "route"))
        assert any("one row through http://" in c for c in changes(back, "verify"))
        assert same(back, planner.plan("fail-back", "--to", there)[1]) == []


def test_a_change_of_a_regions_cluster_is_planned_once(running_lab: Topology, tmp_path: Path) -> None:
    """The small lab's regions run as many pods in standby as in full: here the plan has something to apply."""
    inventory = verbs.recorded()
    assert inventory is not None
    ranges = {name: {"cpu": ["10m", 7], "memory": ["32Mi", "7Gi"]} for name in ("api", "data", "cache")}
    planner = Planner(sweep.place(tmp_path, inventory, {"kubernetes_platform_ranges": ranges}))
    there = next(r for r in ("us-east-1", "us-west-2") if r != writer())
    with nothing_happens(running_lab):
        code, back = planner.plan("fail-back", "--to", there)
    assert code == 0
    steps = {s["id"]: s for s in back["steps"]}
    applied = [c for c in steps["promote"]["changes"] if c["action"].endswith("k8s_apply")]
    assert applied
    assert any("LimitRange" in c["what"] and "7Gi" in c["after"] for c in applied), applied
    assert steps["verify"]["repeated"] == len(applied), "what promote applies, verify would find"
    assert any(c["action"].endswith("k8s_apply") for c in steps["stand-down"]["changes"]), "the other region's cluster"
