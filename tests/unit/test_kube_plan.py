"""The pure parts of k8s_apply and k8s_drain: reading, the checked set, the comparison, waits, prune, drain."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.kube import drain_plan, planner, waits
from ansible_collections.censuschat.infra.plugins.module_utils.kube.apply import explain
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import ApiError
from ansible_collections.censuschat.infra.plugins.module_utils.kube.discovery import AnyKinds, Kinds
from ansible_collections.censuschat.infra.plugins.module_utils.kube.documents import (
    YamlProblem,
    expand,
    load_yaml,
    read_files,
    read_text,
)
from ansible_collections.censuschat.infra.plugins.module_utils.kube.fields import Censor, diff_pair, unchanged
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import (
    InputError,
    Key,
    Resource,
    Source,
    Wanted,
)

CASES = Path(__file__).parent / "cases"
VERBS = frozenset({"get", "list", "patch", "delete"})
SERVED = (
    Resource("", "v1", "ConfigMap", "configmaps", True, VERBS),
    Resource("", "v1", "Secret", "secrets", True, VERBS),
    Resource("", "v1", "Namespace", "namespaces", False, VERBS),
    Resource("apps", "v1", "Deployment", "deployments", True, VERBS),
    Resource("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", False, VERBS),
    Resource(
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
        False,
        VERBS,
    ),
)


def cases(folder: str) -> list[Any]:
    files = sorted((CASES / folder).glob("*.yml"))
    assert files
    return [pytest.param(yaml.safe_load(f.read_text()), id=f.stem) for f in files]


# ---- reading and the set ----


@pytest.mark.parametrize("case", cases("kube_set"))
def test_set(case: dict[str, Any]) -> None:
    items = list(read_text("set.yml", case["manifest"]))
    if "problems" in case:
        with pytest.raises(InputError) as caught:
            planner.build(items, Kinds(SERVED), "fallback")
        assert caught.value.problems == case["problems"]
        return
    wanted, _coming = planner.build(items, Kinds(SERVED), "fallback")
    assert [[str(w.key) for w in wave] for wave in planner.in_waves(wanted)] == case["waves"]
    for name, body in case.get("bodies", {}).items():
        assert [w.body for w in wanted if str(w.key) == name] == [body]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("Off", False),
        ("012", 10),
        ("0o12", 10),
        ("0x1F", 31),
        ("1_000", 1000),
        ("-7", -7),
        ("1e3", 1000.0),
        ("1.5", 1.5),
        ("1.2.3", "1.2.3"),
        ("1:30", "1:30"),
        ("2026-11-21", "2026-11-21"),
        ("=", "="),
        ("y", "y"),
        ("~", None),
        ('"yes"', "yes"),
    ],
)
def test_scalars_are_read_as_kubectl_reads_them(text: str, value: Any) -> None:
    (document,) = load_yaml(f"a: {text}")
    assert document == {"a": value}
    assert type(document["a"]) is type(value)


def test_a_merged_key_may_be_overridden() -> None:
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")[0]["b"] == {"x": 3, "y": 2}


def test_bytes_that_are_not_utf8_are_named() -> None:
    with pytest.raises(YamlProblem) as caught:
        load_yaml(b"---\na: 1\n---\nb: 2\n---\nc: caf\xe9\n")
    assert str(caught.value) == "line 6: byte 0xe9 is not UTF-8; save the file as UTF-8"
    assert caught.value.number == 3


def test_sources_are_files_directories_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.yml", "a.yaml", "deep/c.json", "deep/notes.txt"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in expand([str(tmp_path)])] == ["a.yaml", "b.yml", "c.json"]
    assert [p.name for p in expand([str(tmp_path / "*.y*ml"), str(tmp_path / "b.yml")])] == ["a.yaml", "b.yml"]
    with pytest.raises(InputError) as caught:
        expand([str(tmp_path / "none.yml"), str(tmp_path / "*.toml")])
    assert len(caught.value.problems) == 2


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("a: [")
    (tmp_path / "good.yml").write_text("a: 1\n---\nb: 2\n")
    bad, *good = read_files([tmp_path / "bad.yml", tmp_path / "good.yml"])
    assert isinstance(bad, str)
    assert str(tmp_path / "bad.yml") in bad
    assert [str(item[0]) for item in good] == [f"{tmp_path}/good.yml, document {number}" for number in (1, 2)]


def test_ten_megabytes_in_one_object_are_refused_before_anything_is_sent() -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "big"}, "data": {"x": "y" * 10 * 2**20}}
    with pytest.raises(InputError) as caught:
        planner.build([(Source("big.yml", 1), body)], Kinds(SERVED), "default")
    assert caught.value.problems == [
        "big.yml, document 1: ConfigMap default/big has 10.0 MiB; the API takes at most 3 MiB in one object; "
        "split its data"
    ]


def test_a_cluster_to_be_founded_serves_every_kind() -> None:
    body = {"apiVersion": "any.example.com/v1", "kind": "Thing", "metadata": {"name": "a"}}
    wanted, _coming = planner.build([(Source("x", 1), body)], AnyKinds(), "")
    assert [str(w.key) for w in wanted] == ["Thing a"]


def _wanted(resource: Resource, namespace: str, name: str) -> Wanted:
    return Wanted(Key(resource.group, resource.kind, namespace, name), resource, {}, Source("x", 1))


def test_many_of_a_kind_are_listed_and_few_are_read_singly() -> None:
    config, secret = SERVED[0], SERVED[1]
    few = [_wanted(secret, "a", str(i)) for i in range(7)]
    many = [_wanted(config, "a", str(i)) for i in range(8)]
    plan = {(r.resource.kind, r.namespace): r.listed for r in planner.reads([*few, *many])}
    assert plan == {("Secret", "a"): False, ("ConfigMap", "a"): True}
    spread = [_wanted(config, f"n{n}", str(i)) for n in range(4) for i in range(8)]
    (read,) = planner.reads(spread)
    assert (read.namespace, read.listed, len(read.keys)) == ("", True, 32)


# ---- comparison ----


@pytest.mark.parametrize("case", cases("kube_unchanged"))
def test_unchanged(case: dict[str, Any]) -> None:
    assert unchanged(case["desired"], case["live"], "us") is case["unchanged"]
    for path, value in case.get("changes", {}).items():
        desired = copy.deepcopy(case["desired"])
        _put(desired, path, value)
        assert not unchanged(desired, case["live"], "us"), path


def _put(body: Any, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        body = body[int(part)] if part.isdigit() else body[part]
    body[last] = value


def test_a_diff_of_a_secret_shows_names_only() -> None:
    def secret(**data: str) -> dict[str, Any]:
        note = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(data)}
        return {"kind": "Secret", "metadata": {"name": "s", "annotations": note}, "data": data}

    before, after = diff_pair(secret(same="Y2FuYXJ5", old="Y2FuYXJ5"), secret(same="Y2FuYXJ5", old="c3BhcnJvdw=="))
    text = json.dumps([before, after])
    assert "Y2FuYXJ5" not in text
    assert "c3BhcnJvdw" not in text
    assert before["data"]["same"] == after["data"]["same"]
    assert before["data"]["old"] != after["data"]["old"]


def test_messages_do_not_carry_secrets() -> None:
    encoded = base64.b64encode(b"canary-value").decode()
    censor = Censor([{"kind": "Secret", "data": {"a": encoded}, "stringData": {"b": "another-canary"}}])
    said = censor(f"bad values canary-value, {encoded} and another-canary in Secret a")
    assert said == "bad values <redacted>, <redacted> and <redacted> in Secret a"


# ---- refusals ----


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            409,
            {
                "reason": "Conflict",
                "details": {
                    "causes": [
                        {
                            "reason": "FieldManagerConflict",
                            "message": 'conflict with "kubectl" using apps/v1',
                            "field": ".spec.replicas",
                        }
                    ]
                },
            },
            '.spec.replicas belongs to "kubectl" using apps/v1; take the fields out of the manifest, or take them over '
            "with force_conflicts: true",
        ),
        (
            500,
            {
                "message": "failed to create typed patch object (a/b; v1, Kind=X): "
                ".spec.colour: field not declared in schema"
            },
            ".spec.colour: field not declared in schema (apps/v1 has no such field; is it misspelt or in the wrong "
            "place?)",
        ),
        (
            403,
            {"message": 'configmaps "x" is forbidden: exceeded quota: q, requested: c=1, used: c=1, limited: c=1'},
            "exceeded quota: q, requested: c=1, used: c=1, limited: c=1; ask for less, or raise the ResourceQuota",
        ),
        (
            404,
            {"message": 'namespaces "shop" not found'},
            "the namespace shop does not exist; add it to the set, or make it first",
        ),
    ],
)
def test_refusals_say_what_to_do(status: int, body: dict[str, Any], said: str) -> None:
    assert explain(ApiError(status, body), _wanted(SERVED[3], "shop", "web"), "us") == said


# ---- waits ----


def _workload(kind: str, status: dict[str, Any], **spec: Any) -> waits.State:
    group = "batch" if kind == "Job" else "apps"
    live = {"kind": kind, "metadata": {"name": "x", "generation": 2}, "spec": spec, "status": status}
    return waits.assess(Key(group, kind, "a", "x"), live)


SEEN = {"observedGeneration": 2}
DEPLOYED = {**SEEN, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}
STATEFUL = {**SEEN, "readyReplicas": 1, "updatedReplicas": 1, "currentRevision": "a", "updateRevision": "a"}
DAEMON = {**SEEN, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberAvailable": 2}
STUCK = {"type": "Progressing", "reason": "ProgressDeadlineExceeded"}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (_workload("Deployment", {"observedGeneration": 1}), waits.PENDING),
        (_workload("Deployment", SEEN, replicas=0), waits.READY),
        (_workload("Deployment", DEPLOYED, replicas=2), waits.READY),
        (_workload("Deployment", {**DEPLOYED, "replicas": 3}, replicas=2), waits.PENDING),
        (_workload("Deployment", {**DEPLOYED, "availableReplicas": 1}, replicas=2), waits.PENDING),
        (_workload("Deployment", {**DEPLOYED, "conditions": [STUCK]}, replicas=2), waits.BROKEN),
        (_workload("Job", {"conditions": [{"type": "Failed", "status": "True"}]}), waits.BROKEN),
        (_workload("Job", {"conditions": [{"type": "Complete", "status": "True"}]}), waits.READY),
        (_workload("Job", {"succeeded": 1}, completions=2), waits.PENDING),
        (_workload("DaemonSet", DAEMON), waits.READY),
        (_workload("DaemonSet", {**DAEMON, "numberAvailable": 1}), waits.PENDING),
        (_workload("StatefulSet", STATEFUL), waits.READY),
        (_workload("StatefulSet", {**STATEFUL, "updateRevision": "b"}), waits.PENDING),
    ],
)
def test_workloads_are_ready_when_all_of_the_new_revision_serve(state: waits.State, expected: str) -> None:
    assert state.state == expected, state


def test_custom_conditions_and_fields() -> None:
    key = Key("example.com", "Database", "a", "x")
    live = {
        "metadata": {},
        "status": {"phase": "Bound", "conditions": [{"type": "Ready", "status": "False", "reason": "Slow"}]},
    }
    ready = waits.assess(key, live, waits.Condition(type="Ready"))
    assert ready == waits.State(waits.PENDING, "condition Ready is False, not True: Slow")
    assert waits.assess(key, live, waits.Condition(field="status.phase", value="Bound")).state == waits.READY
    assert (
        waits.assess(key, live, waits.Condition(field="status.conditions.0.type", value="Ready")).state == waits.READY
    )
    assert waits.assess(key, live, waits.Condition(field="status.address")).state == waits.PENDING
    assert waits.assess(key, None).state == waits.PENDING


def _pod(revision: str, reason: str = "") -> dict[str, Any]:
    waiting = {"waiting": {"reason": reason, "message": "not on the node"}} if reason else {}
    return {
        "metadata": {"labels": {"pod-template-hash": revision}},
        "status": {"containerStatuses": [{"name": "main", "image": "web:9", "state": waiting}]},
    }


def test_an_image_that_never_comes_ends_a_wait_only_for_the_present_revision() -> None:
    def replica_set(revision: str, number: str) -> dict[str, Any]:
        return {
            "metadata": {
                "labels": {"pod-template-hash": revision},
                "annotations": {"deployment.kubernetes.io/revision": number},
            }
        }

    live = {"kind": "Deployment", "metadata": {"annotations": {"deployment.kubernetes.io/revision": "2"}}}
    sets = [replica_set("old", "1"), replica_set("new", "2")]
    stuck, fine = _pod("old", "ErrImageNeverPull"), _pod("new")
    assert waits.hopeless(waits.newest(live, [stuck, fine], sets)) == ""
    said = waits.hopeless(waits.newest(live, [fine, _pod("new", "ErrImageNeverPull")], sets))
    assert "web:9" in said
    assert "ErrImageNeverPull" in said
    assert waits.hopeless([_pod("new", "ImagePullBackOff")]) == ""
    assert "ImagePullBackOff" in waits.pod_trouble([_pod("new", "ImagePullBackOff")])


# ---- prune ----


def _member(resource: Resource, name: str, *, owned: bool = False) -> planner.Member:
    namespace = "shop" if resource.namespaced else ""
    return planner.Member(Key(resource.group, resource.kind, namespace, name), resource, "uid", owned, False)


def test_prune_takes_what_is_not_wanted_and_never_a_namespace_or_crd_unless_named() -> None:
    config, namespace, crd = SERVED[0], SERVED[2], SERVED[4]
    members = [
        _member(namespace, "old"),
        _member(namespace, "named"),
        _member(crd, "things.example.com"),
        _member(config, "wanted"),
        _member(config, "gone"),
        _member(config, "copied", owned=True),
    ]
    gone, kept = planner.prune(members, [members[3].key], ["Namespace/named"])
    assert [str(m.key) for m in gone] == ["ConfigMap shop/gone", "Namespace named"]
    assert [str(m.key) for m in kept] == ["CustomResourceDefinition things.example.com", "Namespace old"]


def test_an_apply_set_is_not_taken_from_another_tool() -> None:
    mine = planner.ApplySet("platform", "kube-system")
    assert mine.problem(mine.parent([], [])) == ""
    theirs = {"metadata": {"annotations": {planner.TOOLING: "kubectl/v1.35"}}}
    assert "belongs to another tool" in mine.problem(theirs)
    assert "is no ApplySet" in mine.problem({"metadata": {}, "data": {"a": "b"}})


# ---- drain ----


def _running(name: str, *, owner: str = "", labels: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    owners = [{"kind": owner, "name": "owner", "controller": True}] if owner else []
    metadata = {"namespace": "a", "name": name, "uid": name, "ownerReferences": owners, "labels": labels or {}}
    metadata.update(more.pop("metadata", {}))
    return {"metadata": metadata, "spec": more.pop("spec", {}), "status": {"phase": more.pop("phase", "Running")}}


@pytest.mark.parametrize(
    ("pod", "allowed", "fate"),
    [
        (_running("x", owner="ReplicaSet"), drain_plan.Allowed(), drain_plan.EVICT),
        (_running("x", owner="DaemonSet"), drain_plan.Allowed(), drain_plan.STAY),
        (
            _running("x", metadata={"annotations": {"kubernetes.io/config.mirror": "h"}}),
            drain_plan.Allowed(),
            drain_plan.STAY,
        ),
        (_running("x"), drain_plan.Allowed(), drain_plan.REFUSE),
        (_running("x"), drain_plan.Allowed(unmanaged=True), drain_plan.EVICT),
        (_running("x", phase="Succeeded"), drain_plan.Allowed(), drain_plan.EVICT),
        (
            _running("x", owner="ReplicaSet", spec={"volumes": [{"name": "data", "emptyDir": {}}]}),
            drain_plan.Allowed(),
            drain_plan.REFUSE,
        ),
        (
            _running("x", owner="ReplicaSet", spec={"volumes": [{"name": "data", "emptyDir": {}}]}),
            drain_plan.Allowed(empty_dir=True),
            drain_plan.EVICT,
        ),
        (
            _running("x", owner="ReplicaSet", spec={"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}),
            drain_plan.Allowed(),
            drain_plan.EVICT,
        ),
        (
            _running("x", owner="ReplicaSet", metadata={"deletionTimestamp": "now"}),
            drain_plan.Allowed(),
            drain_plan.LEAVING,
        ),
    ],
)
def test_fates_of_pods(pod: dict[str, Any], allowed: drain_plan.Allowed, fate: str) -> None:
    (found,) = drain_plan.plan([pod], allowed)
    assert found.fate == fate
    assert bool(found.why) == (fate != drain_plan.EVICT)


def test_the_budget_that_blocks_is_named() -> None:
    def budget(name: str, allowed: int, selector: dict[str, Any]) -> dict[str, Any]:
        return {
            "metadata": {"namespace": "a", "name": name},
            "spec": {"selector": selector},
            "status": {"disruptionsAllowed": allowed, "desiredHealthy": 2, "currentHealthy": 2, "expectedPods": 3},
        }

    pod = _running("x", owner="ReplicaSet", labels={"app": "web"})
    web = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}
    found = drain_plan.budgets(
        pod,
        [budget("free", 1, web), budget("tight", 0, web), budget("other", 0, {"matchLabels": {"app": "db"}})],
    )
    assert found == ["PodDisruptionBudget a/tight (needs 2 healthy pods of 3 and has 2)"]
