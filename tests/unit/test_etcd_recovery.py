"""A member's place in etcd and the restore of all members: each plan, and each refusal, without a host."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep import membership, restore, static_pods
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import UpkeepError
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.membership import Step
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.restore import State, Wanted
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.static_pods import COMPONENTS, Member

MANIFEST = """\
apiVersion: v1
kind: Pod
spec:
  containers:
  - command:
    - etcd
    - --advertise-client-urls=https://10.77.1.31:2379
    - --client-cert-auth=true
    - --initial-cluster=cp1=https://10.77.1.31:2380
    - --name=cp1
    image: registry.k8s.io/etcd:3.6.6-0
    livenessProbe:
      initialDelaySeconds: 10
"""


def member(number: int, name: str | None = None) -> Member:
    address = f"https://10.77.1.3{number}"
    return Member(number, f"cp{number}" if name is None else name, (f"{address}:2380",), (f"{address}:2379",))


THREE = (member(1), member(2), member(3))


def observed(**changes: Any) -> membership.Observed:
    base = membership.Observed(
        manifest=True, serves=True, guarded=True, empty=False, known=THREE, serving=frozenset({"cp1", "cp2", "cp3"})
    )
    return dataclasses.replace(base, **changes)


LOST = {"serves": False, "empty": True, "serving": frozenset({"cp2", "cp3"})}


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, Step.NOTHING),
        ({"guarded": False}, Step.GUARD),
        ({"guarded": False, "known": (member(1),), "serving": frozenset({"cp1"})}, Step.GUARD),
        ({"held": True}, Step.FINISH),
        ({"serves": False, "held": True, "known": None, "serving": frozenset()}, Step.GUARD),
        (LOST, Step.REJOIN),
        ({**LOST, "held": True}, Step.REJOIN),
        ({**LOST, "known": THREE[1:]}, Step.REJOIN),
        ({**LOST, "known": (member(1, ""), *THREE[1:])}, Step.START),
    ],
)
def test_next_step_of_a_member(changes: dict[str, Any], step: Step) -> None:
    assert membership.plan("cp1", "https://10.77.1.31:2380", observed(**changes))[0] is step


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"manifest": False}, "is no control plane: join it"),
        ({"guarded": False, "serving": frozenset({"cp1", "cp3"})}, "not restarted while cp2 does not serve"),
        ({**LOST, "known": None, "serving": frozenset()}, "restore all of them from a snapshot"),
        ({**LOST, "serving": frozenset({"cp2"})}, "of the others only cp2 does: removing a member now could cost"),
        ({**LOST, "empty": False}, "its disk holds data.*discard_data: true"),
        # After its removal two are left, of which one is dead: adding a third would need both.
        ({**LOST, "known": THREE[1:], "serving": frozenset({"cp2"})}, "could cost the quorum"),
    ],
)
def test_a_member_that_must_not_be_touched(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UpkeepError, match=sentence):
        membership.plan("cp1", "https://10.77.1.31:2380", observed(**changes))


def test_data_that_cannot_be_used_is_given_up_only_when_asked() -> None:
    seen = observed(**{**LOST, "empty": False})
    assert membership.plan("cp1", "https://10.77.1.31:2380", seen, discard=True)[0] is Step.REJOIN


def test_removal_of_a_dead_member() -> None:
    assert membership.plan_removal("cp2", THREE, frozenset({"cp1", "cp3"})) == member(2)
    assert membership.plan_removal("cp2", (member(1), member(3)), frozenset({"cp1", "cp3"})) is None
    with pytest.raises(UpkeepError, match="cp2 serves"):
        membership.plan_removal("cp2", THREE, frozenset({"cp1", "cp2", "cp3"}))
    with pytest.raises(UpkeepError, match="has 2 members of which 1 serve, which is no quorum"):
        membership.plan_removal("cp2", THREE, frozenset({"cp1"}))


def test_flags_of_a_manifest_are_set_in_place_or_added() -> None:
    text = membership.with_flags(MANIFEST, {"initial-cluster": "a=b,c=d", "initial-cluster-state": "existing"})
    flags = membership.flags_of(text)
    assert flags["initial-cluster"] == "a=b,c=d"
    assert flags["initial-cluster-state"] == "existing"
    assert membership.with_flags(text, {"initial-cluster-state": "existing"}) == text
    unchanged = [line for line in MANIFEST.splitlines() if "initial-cluster" not in line]
    assert [line for line in text.splitlines() if "initial-cluster" not in line] == unchanged
    with pytest.raises(UpkeepError, match="not kubeadm's"):
        membership.with_flags("kind: Pod\n", {"initial-cluster-state": "existing"})


# ---- restore ----

MEMBERS = {f"cp{n}": f"https://10.77.1.3{n}:2380" for n in (1, 2, 3)}
WANTED = Wanted("cp1", MEMBERS, Path("/s/a_cp1_20261121T143000Z.db"), "ab" * 32, "run1")
RUNNING = restore.Observed(State(), COMPONENTS, ())
STOPPED = restore.Observed(State(WANTED.token), (), COMPONENTS)


def test_each_restore_has_a_token_of_its_own() -> None:
    other = dataclasses.replace(WANTED, run_id="run2")
    assert WANTED.token == dataclasses.replace(WANTED, name="cp2").token
    assert WANTED.token != other.token != dataclasses.replace(other, sha256="cd" * 32).token


def test_the_api_servers_are_held_back_before_etcd() -> None:
    actions = restore.plan("stop", WANTED, RUNNING)
    assert actions[-1] == "hold back etcd"
    assert "hold back kube-apiserver" in actions
    assert restore.plan("stop", WANTED, STOPPED) == []


def test_start_after_stop_and_again_after_a_crash() -> None:
    whole = restore.plan("start", WANTED, STOPPED)
    assert whole[0].startswith("restore cp1 from a_cp1_")
    assert whole[-1] == "prove that the API reads what was restored"
    halfway = restore.Observed(State(WANTED.token, restored=True), ("etcd",), COMPONENTS[1:])
    assert not [a for a in restore.plan("start", WANTED, halfway) if a.startswith("restore")]
    assert restore.plan("stop", WANTED, halfway) == []
    done = restore.Observed(State(WANTED.token, restored=True, finished=True), COMPONENTS, ())
    assert [restore.plan(step, WANTED, done) for step in restore.STEPS] == [[], [], []]


def test_a_second_restore_after_a_finished_one() -> None:
    before = restore.Observed(State("censuschat-old", restored=True, finished=True), COMPONENTS, ())
    assert len(restore.plan("stop", WANTED, before)) == 4
    # Check mode shows what the restore would do, nothing being stopped.
    assert restore.plan("start", WANTED, before, foreseen=True)[0].startswith("restore cp1")


@pytest.mark.parametrize(
    ("step", "wanted", "seen", "sentence"),
    [
        ("start", WANTED, RUNNING, "the step stop has to come before start"),
        ("start", WANTED, dataclasses.replace(STOPPED, running=("kube-apiserver",)), "kube-apiserver runs on cp1"),
        ("stop", WANTED, dataclasses.replace(RUNNING, state=State("censuschat-old")), "an unfinished restore"),
        (
            "stop",
            WANTED,
            restore.Observed(State(WANTED.token, restored=True, finished=True), ("kube-scheduler",), ()),
            "give this restore an id of its own",
        ),
        ("check", dataclasses.replace(WANTED, name="cp9"), RUNNING, "cp9 is not among the members"),
        ("check", dataclasses.replace(WANTED, members=dict(list(MEMBERS.items())[:2])), RUNNING, "name an odd number"),
    ],
)
def test_restore_refuses(step: str, wanted: Wanted, seen: restore.Observed, sentence: str) -> None:
    with pytest.raises(UpkeepError, match=sentence):
        restore.plan(step, wanted, seen)


# ---- static pods ----


def test_a_new_pod_is_asked_for_without_changing_what_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_pods, "MANIFESTS", tmp_path)
    path = tmp_path / "etcd.yaml"
    plain = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: etcd\nspec:\n  containers: []\n"
    path.write_text(plain.replace("  name", "  annotations:\n    other: kept\n  name"))
    before = yaml.safe_load(path.read_text())
    static_pods.renew_pod("etcd")
    static_pods.renew_pod("etcd")
    after = yaml.safe_load(path.read_text())
    stamp = after["metadata"]["annotations"].pop(static_pods.ANNOTATION)
    assert after == before
    path.write_text(plain)
    static_pods.renew_pod("etcd")
    assert yaml.safe_load(path.read_text())["metadata"]["annotations"][static_pods.ANNOTATION] != stamp
    path.write_text("kind: Pod\n")
    with pytest.raises(UpkeepError, match="is not a manifest that kubeadm wrote"):
        static_pods.renew_pod("etcd")


def test_only_a_pods_process_on_the_hosts_network_is_a_static_pod(tmp_path: Path) -> None:
    def process(pid: int, program: str, network: str, cgroup: str) -> None:
        entry = tmp_path / str(pid)
        (entry / "ns").mkdir(parents=True)
        (entry / "ns/net").symlink_to(f"net:[{network}]")
        (entry / "cmdline").write_text(f"{program}\0--name=cp{pid}\0--secure-port=6443\0")
        (entry / "stat").write_text(f"{pid} (et cd) S " + " ".join(["1"] * 18) + " 100 0\n")
        (entry / "cgroup").write_text(f"0::{cgroup}\n")

    (tmp_path / "uptime").write_text("1000.00 1.0\n")
    process(1, "/sbin/init", "1", "/")
    process(20, "/usr/bin/etcd", "1", "/system.slice/etcd-dcs.service")
    process(30, "etcd", "2", "/kubepods/burstable/podx")
    assert static_pods.find("etcd", tmp_path) is None
    process(40, "/usr/local/bin/etcd", "1", "/kubepods/burstable/pody")
    found = static_pods.find("etcd", tmp_path)
    assert found is not None
    assert (found.pid, found.flag("secure-port"), found.flag("absent", "6443")) == (40, "6443", "6443")


def test_held_back_manifests_come_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests, aside = tmp_path / "manifests", tmp_path / "aside"
    manifests.mkdir()
    (manifests / "etcd.yaml").write_text("kind: Pod\n")
    monkeypatch.setattr(static_pods, "MANIFESTS", manifests)
    monkeypatch.setattr(static_pods, "find", lambda _component: None)
    # Another pod's container of that name is not waited for; ours is, until the kubelet has cleared it away.
    (tmp_path / "pods/650b2b08-13a4-44d6/containers/etcd").mkdir(parents=True)
    ours = tmp_path / "pods/fb5fe4e482dfa58e/containers/etcd"
    ours.mkdir(parents=True)
    threading.Timer(0.5, shutil.rmtree, [ours.parent.parent]).start()
    for _ in range(2):
        started = time.monotonic()
        static_pods.hold_back(["etcd", "kube-apiserver"], aside, 1.0, tmp_path / "pods")
        assert not ours.exists() and time.monotonic() - started < 3
        assert [path.name for path in aside.iterdir()] == ["etcd.yaml"]
    for _ in range(2):
        static_pods.let_run(["etcd", "kube-apiserver"], aside)
        assert [path.name for path in manifests.iterdir()] == ["etcd.yaml"]
