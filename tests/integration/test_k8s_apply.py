"""k8s_apply against a real API: idempotence, check mode, waves, conflicts, prune, undo, waits, bad input, lost API."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import os
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.kube import apply_task
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import Client

from lab.paths import REPO
from tests.local_cluster import ADMIN_TOKEN, Authority, LocalCluster

BIN = Path(sys.executable).parent
DEFAULTS: dict[str, Any] = {
    "kubeconfig": None,
    "context": None,
    "src": [],
    "kustomize": None,
    "namespace": None,
    "apply_set": None,
    "prune": False,
    "delete_named": [],
    "field_manager": "censuschat-infra",
    "force_conflicts": False,
    "preflight": False,
    "wait": False,
    "wait_timeout": 60,
    "wait_for": [],
    "rollback_on_failure": False,
    "parallelism": 8,
    "payload": None,
}
Document = dict[str, Any]
Apply = Callable[..., Document]


@pytest.fixture(name="apply")
def apply_function(kube: LocalCluster, tmp_path: Path) -> Apply:
    return functools.partial(applied, kube, tmp_path)


def applied(
    cluster: LocalCluster,
    directory: Path,
    *documents: Document | str,
    check: bool = False,
    diff: bool = False,
    **parameters: Any,
) -> Document:
    """The module's result for these documents."""
    if documents:
        payload = directory / "payload.json"
        payload.write_text(json.dumps({"definition": list(documents)}))
        parameters["payload"] = str(payload)
    given = {"kubeconfig": str(cluster.kubeconfig), **parameters}
    return apply_task.run({**DEFAULTS, **given}, check=check, diff=diff)


def results(result: Document) -> dict[str, str]:
    """`Kind name` to what became of it."""
    assert "objects" in result, result
    return {f"{o['kind']} {o['name']}": o["result"] for o in result["objects"]}


def counted(result: Document) -> dict[str, int]:
    assert "msg" not in result, result["msg"]
    counts: dict[str, int] = result["counts"]
    return counts


def the(kind: str, name: str, namespace: str = "", api: str = "v1", **fields: Any) -> Document:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **fields}


def deployment(name: str, namespace: str, *, labels: dict[str, str] | None = None, **spec: Any) -> Document:
    matched = {"app": name}
    template = {
        "metadata": {"labels": {**matched, **(labels or {})}},
        "spec": {"containers": [{"name": "main", "image": "web:1"}], "terminationGracePeriodSeconds": 0},
    }
    body = {"replicas": 1, "selector": {"matchLabels": matched}, "template": template, **spec}
    return the("Deployment", name, namespace, "apps/v1", spec=body)


def crd(plural: str, kind: str) -> Document:
    spec_schema = {"type": "object", "properties": {"size": {"type": "integer"}}}
    status_schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": spec_schema, "status": status_schema}}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": kind, "plural": plural}
    spec = {"group": "trial.test", "scope": "Namespaced", "names": names, "versions": [version]}
    return the("CustomResourceDefinition", f"{plural}.trial.test", api="apiextensions.k8s.io/v1", spec=spec)


def everything(namespace: str) -> list[Document]:
    """One of each kind that a platform has, with what the API fills in by itself."""
    pod_labels = {"app": "web"}
    container = {
        "name": "main",
        "image": "web:1",
        "ports": [{"containerPort": 8080}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}],
        "env": [
            {"name": "A", "value": "a"},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
            {"name": "S", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "a"}}},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "64Mi"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        "securityContext": {"capabilities": {"drop": ["ALL"]}, "allowPrivilegeEscalation": False},
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": pod_labels},
    }
    affinity = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "podAffinityTerm": {"topologyKey": "x", "labelSelector": {"matchLabels": pod_labels}}}
    ]}}  # fmt: skip
    template = {
        "metadata": {"labels": pod_labels},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            "topologySpreadConstraints": [spread],
            "affinity": affinity,
            "nodeSelector": {"kubernetes.io/os": "linux"},
        },
    }
    metrics = [
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}}
    ]
    return [
        crd("widgets", "Widget"),
        the("Widget", "one", namespace, "trial.test/v1", spec={"size": 3}),
        the("Namespace", namespace),
        the("PriorityClass", f"{namespace}-high", api="scheduling.k8s.io/v1", value=1000),
        the("ConfigMap", "plain", namespace, data={"a": "b"}),
        the("ConfigMap", "empty", namespace),
        the("Secret", "keys", namespace, stringData={"a": "canary-in-a-secret"}),
        the("ServiceAccount", "web", namespace),
        the("ResourceQuota", "all", namespace, spec={"hard": {"requests.cpu": "8", "requests.memory": "16Gi"}}),
        the("LimitRange", "all", namespace, spec={"limits": [{"type": "Container", "default": {"memory": "64Mi"}}]}),
        the("Role", "r", namespace, "rbac.authorization.k8s.io/v1",
            rules=[{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]),
        the("RoleBinding", "r", namespace, "rbac.authorization.k8s.io/v1",
            roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"},
            subjects=[{"kind": "ServiceAccount", "name": "web", "namespace": namespace}]),
        the("NetworkPolicy", "np", namespace, "networking.k8s.io/v1", spec={
            "podSelector": {"matchLabels": pod_labels},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}],
                         "ports": [{"port": 8080}]}],
        }),
        the("NetworkPolicy", "deny", namespace, "networking.k8s.io/v1",
            spec={"podSelector": {}, "policyTypes": ["Ingress"]}),
        the("Service", "web", namespace, spec={"selector": pod_labels, "ports": [{"port": 80, "targetPort": 8080}]}),
        the("Deployment", "web", namespace, "apps/v1",
            spec={"replicas": 0, "selector": {"matchLabels": pod_labels}, "template": template}),
        the("PodDisruptionBudget", "web", namespace, "policy/v1",
            spec={"minAvailable": 1, "selector": {"matchLabels": pod_labels}}),
        the("HorizontalPodAutoscaler", "web", namespace, "autoscaling/v2", spec={
            "minReplicas": 1, "maxReplicas": 3, "metrics": metrics,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            "behavior": {"scaleUp": {"policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}]}},
        }),
        the("CronJob", "tick", namespace, "batch/v1", spec={
            "schedule": "0 * * * *", "jobTemplate": {"spec": {"template": {"spec": {
                "restartPolicy": "Never", "containers": [{"name": "main", "image": "web:1"}]}}}},
        }),
    ]  # fmt: skip


# ---- the module as users run it ----


def play(directory: Path, tasks: list[Document], *options: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    playbook = directory / "play.yml"
    head = {"name": "Trial", "hosts": "localhost", "gather_facts": False, "vars": variables}
    head["module_defaults"] = {"group/censuschat.infra.k8s": {"kubeconfig": variables.pop("kubeconfig")}}
    playbook.write_text(yaml.safe_dump([{**head, "tasks": tasks}]))
    interpreter = f"ansible_python_interpreter={sys.executable}"
    command = [str(BIN / "ansible-playbook"), "-i", "localhost,", "-c", "local", "-e", interpreter, str(playbook)]
    environment = {**os.environ, "ANSIBLE_STDOUT_CALLBACK": "default", "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run([*command, *options], cwd=REPO, capture_output=True, text=True, env=environment)


def test_a_play_brings_all_sources_and_shows_no_secret(kube: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/config.yml.j2").write_text(
        "{% for n in range(2) %}\n---\napiVersion: v1\nkind: ConfigMap\n"
        'metadata: {name: "templated-{{ n }}"}\ndata: {value: "{{ value }}", sign: =}\n{% endfor %}\n'
    )
    (tmp_path / "files").mkdir()
    (tmp_path / "files/account.yml").write_text(yaml.safe_dump(the("ServiceAccount", "from-file", "as-a-play")))
    (tmp_path / "kustomization").mkdir()
    (tmp_path / "kustomization/kustomization.yaml").write_text("namePrefix: built-\nresources: [cm.yaml]\n")
    (tmp_path / "kustomization/cm.yaml").write_text(yaml.safe_dump(the("ConfigMap", "one", "as-a-play")))
    task = {
        "name": "Apply",
        "censuschat.infra.k8s_apply": {
            "definition": [
                the("Namespace", "as-a-play"),
                the("Secret", "s", "as-a-play", stringData={"password": "canary-{{ value }}"}),
            ],
            "template": ["config.yml.j2"],
            "src": [str(tmp_path / "files")],
            "kustomize": str(tmp_path / "kustomization"),
            "namespace": "as-a-play",
        },
        "register": "done",
        "environment": {"PATH": f"{kube.bin}:{os.environ['PATH']}"},
    }
    tell = {"name": "Tell", "ansible.builtin.debug": {"msg": "told {{ done.counts }}"}}
    again = {**task, "name": "Again", "failed_when": "done is changed"}
    done = play(tmp_path, [task, tell, again], "-vvv", "--diff", kubeconfig=str(kube.kubeconfig), value="of-the-play")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "'created': 6" in done.stdout
    assert "canary-of-the-play" not in done.stdout + done.stderr
    assert "<redacted> (after)" in done.stdout
    held = json.loads(kube.kubectl("get", "cm", "templated-1", "-n", "as-a-play", "-o", "json"))
    assert held["data"] == {"value": "of-the-play", "sign": "="}


def test_check_mode_is_true_before_the_cluster_is_founded(apply: Apply, tmp_path: Path) -> None:
    objects = [the("Namespace", "new"), the("Widget", "x", "new", "trial.test/v1")]
    result = apply(*objects, check=True, kubeconfig=str(tmp_path / "none.kubeconfig"))
    assert counted(result) == {"created": 2}
    assert "not there yet" in result["warned"][0]
    assert "cannot be read" in apply(*objects, kubeconfig=str(tmp_path / "none.kubeconfig"))["msg"]


# ---- idempotence and check mode ----


def writes(kube: LocalCluster) -> float:
    """How many applies that are no dry runs the API has counted."""
    lines = kube.kubectl("get", "--raw", "/metrics").splitlines()
    counts = [line for line in lines if line.startswith("apiserver_request_total{") and 'verb="APPLY"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in counts if 'dry_run=""' in line)


def test_check_mode_says_what_apply_does_and_a_second_run_changes_nothing(kube: LocalCluster, apply: Apply) -> None:
    objects = everything("trial-all")
    predicted = apply(*objects, check=True, diff=True)
    assert counted(predicted) == {"created": len(objects)}
    assert "canary-in-a-secret" not in json.dumps(predicted)
    assert kube.kubectl("get", "ns", "trial-all", "--ignore-not-found") == ""
    made = apply(*objects, diff=True)
    assert results(made) == results(predicted)
    time.sleep(1.5)  # controllers write statuses and defaults of their own
    written = writes(kube)
    second = apply(*objects, wait=True)
    assert writes(kube) == written, "what is in doubt is asked for by dry runs"
    assert counted(second) == {"unchanged": len(objects)}, [o for o in results(second).items() if o[1] != "unchanged"]
    # Decided by comparison: one PATCH at most, for the object of which nothing is ours to own.
    assert second["requests"] < 2 * len(objects)
    assert counted(apply(*objects, check=True)) == {"unchanged": len(objects)}
    changed = copy.deepcopy(objects)
    web = next(o for o in changed if o["kind"] == "Deployment")
    web["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2"
    for check in (True, False):
        result = apply(*changed, check=check, diff=True)
        assert counted(result) == {"unchanged": len(objects) - 1, "configured": 1}
        (shown,) = result["diff"]
        assert shown["before_header"] == "Deployment trial-all/web"
        assert "web:2" in json.dumps(shown["after"])
        assert "web:2" not in json.dumps(shown["before"])
    assert writes(kube) == written + 1


def test_a_field_that_is_no_longer_wanted_goes(kube: LocalCluster, apply: Apply) -> None:
    apply(the("Namespace", "trial-fields"), the("ConfigMap", "a", "trial-fields", data={"x": "1", "y": "2"}))
    assert counted(apply(the("ConfigMap", "a", "trial-fields", data={"x": "1"}))) == {"configured": 1}
    held = json.loads(kube.kubectl("get", "cm", "a", "-n", "trial-fields", "-o", "json"))
    assert held["data"] == {"x": "1"}


def test_a_drifted_value_is_put_back(kube: LocalCluster, apply: Apply) -> None:
    many = [the("ConfigMap", f"c{n}", "trial-drift", data={"n": str(n)}) for n in range(10)]
    assert counted(apply(the("Namespace", "trial-drift"), *many)) == {"created": 11}
    kube.kubectl(
        "patch", "cm", "c3", "-n", "trial-drift", "--type=merge", "-p", '{"data":{"n":"drift","theirs":"kept"}}'
    )
    refused = apply(*many)
    assert '.data.n belongs to "kubectl-patch"' in refused["msg"]
    forced = apply(*many, force_conflicts=True)
    assert counted(forced) == {"unchanged": 9, "configured": 1}
    held = json.loads(kube.kubectl("get", "cm", "c3", "-n", "trial-drift", "-o", "json"))
    assert held["data"] == {"n": "3", "theirs": "kept"}


# ---- the set ----


def test_prune_is_limited_to_the_set_and_spares_namespaces(kube: LocalCluster, apply: Apply) -> None:
    own = {"name": "shop", "namespace": "trial-set"}
    base = [the("Namespace", "trial-set"), the("Namespace", "trial-set-2"), the("ConfigMap", "stays", "trial-set")]
    old = [the("ConfigMap", "goes", "trial-set-2"), the("Secret", "goes", "trial-set", data={})]
    kube.kubectl("create", "ns", "trial-other")
    kube.kubectl("create", "cm", "theirs", "-n", "trial-other")
    assert counted(apply(*base, *old, apply_set=own, prune=True)) == {"created": 5}
    assert counted(apply(*base, *old, apply_set=own, prune=True)) == {"unchanged": 5}
    want = [base[0], base[2]]
    expected = {"unchanged": 2, "pruned": 2, "kept": 1}
    assert counted(apply(*want, apply_set=own, prune=True, check=True)) == expected
    assert counted(apply(*want, apply_set=own, prune=True)) == expected
    assert counted(apply(*want, apply_set=own, prune=True)) == {"unchanged": 2, "kept": 1}
    assert kube.kubectl("get", "cm", "goes", "-n", "trial-set-2", "--ignore-not-found") == ""
    assert "theirs" in kube.kubectl("get", "cm", "-n", "trial-other")
    named = apply(*want, apply_set=own, prune=True, delete_named=["Namespace/trial-set-2"])
    assert counted(named) == {"unchanged": 2, "pruned": 1}
    assert "prune needs apply_set" in apply(*want, prune=True)["msg"]


def test_a_failing_gate_puts_the_whole_set_back(kube: LocalCluster, apply: Apply) -> None:
    names = [the("Namespace", "trial-undo")]
    before = [
        the("ConfigMap", "changed", "trial-undo", data={"a": "old", "only": "before"}),
        deployment("web", "trial-undo"),
    ]
    assert counted(apply(*names, *before, wait=True)) == {"created": 3}
    kube.kubectl("label", "cm", "changed", "-n", "trial-undo", "theirs=kept")
    after = [
        the("ConfigMap", "changed", "trial-undo", data={"a": "new"}),
        the("ConfigMap", "added", "trial-undo"),
        deployment("web", "trial-undo", labels={"trial/stays-unready": "yes"}),
    ]
    failed = apply(*names, *after, wait=True, wait_timeout=2, rollback_on_failure=True)
    assert "Deployment trial-undo/web is not ready" in failed["msg"]
    assert "What this run changed was put back" in failed["msg"]
    assert failed["changed"] is False
    found = results(failed)
    assert (found["ConfigMap changed"], found["ConfigMap added"]) == ("restored", "removed")
    held = json.loads(kube.kubectl("get", "cm", "changed", "-n", "trial-undo", "-o", "json"))
    assert held["data"] == {"a": "old", "only": "before"}
    assert held["metadata"]["labels"] == {"theirs": "kept"}
    assert kube.kubectl("get", "cm", "added", "-n", "trial-undo", "--ignore-not-found") == ""
    # Owners are as before as well: the next apply meets no conflict with this run's remains.
    assert counted(apply(*names, *before, wait=True)) == {"unchanged": 3}


def test_waits_end_well_in_parallel(apply: Apply) -> None:
    pod = {"containers": [{"name": "main", "image": "web:1"}]}
    selector = {"matchLabels": {"app": "x"}}
    template = {"metadata": {"labels": {"app": "x"}}, "spec": pod}
    workload = {"selector": selector, "template": template}
    objects = [
        the("Namespace", "trial-waits"),
        *(deployment(f"d{n}", "trial-waits", replicas=2) for n in range(3)),
        the("StatefulSet", "s", "trial-waits", "apps/v1", spec={**workload, "replicas": 2, "serviceName": "s"}),
        the("DaemonSet", "d", "trial-waits", "apps/v1", spec=workload),
        the("Job", "j", "trial-waits", "batch/v1",
            spec={"template": {"spec": {**pod, "restartPolicy": "Never"}}}),
    ]  # fmt: skip
    target = {"api_version": "v1", "kind": "Namespace", "name": "trial-waits", "namespace": None}
    phase = {**target, "condition": None, "status": "True", "field": "status.phase", "value": "Active"}
    assert counted(apply(*objects, wait=True, wait_timeout=40, wait_for=[phase])) == {"created": len(objects)}


def test_a_wait_for_a_condition_ends_with_its_budget(apply: Apply) -> None:
    objects = [the("Namespace", "trial-gate"), crd("gadgets", "Gadget"),
               the("Gadget", "g", "trial-gate", "trial.test/v1", spec={"size": 1})]  # fmt: skip
    apply(*objects)
    target = {"api_version": "trial.test/v1", "kind": "Gadget", "name": "g", "namespace": "trial-gate"}
    gate = {**target, "condition": "Ready", "status": "True", "field": None, "value": None}
    begun = time.monotonic()
    result = apply(*objects, wait_for=[gate], wait_timeout=1)
    assert time.monotonic() - begun < 4
    assert "Gadget trial-gate/g is not ready: condition Ready is not reported, not True" in result["msg"]


# ---- bad input ----


def until_quota_counts(kube: LocalCluster, used: str) -> None:
    deadline = time.monotonic() + 60
    wanted = f'"count/secrets":"{used}"'
    while wanted not in kube.kubectl("get", "quota", "q", "-n", "trial-bad", "-o", "jsonpath={.status.used}"):
        assert time.monotonic() < deadline, f"the quota does not count {used}"
        time.sleep(0.1)


def test_refused_objects_do_not_keep_the_others_back(kube: LocalCluster, apply: Apply) -> None:
    apply(
        the("Namespace", "trial-bad"),
        the("ResourceQuota", "q", "trial-bad", spec={"hard": {"count/secrets": "1"}}),
    )
    # The controller counts a new quota once, from a view that may be old: what comes before that may stay uncounted.
    until_quota_counts(kube, "0")
    apply(the("Secret", "first", "trial-bad", data={}), deployment("fixed", "trial-bad"))
    until_quota_counts(kube, "1")
    misspelt = deployment("misspelt", "trial-bad")
    misspelt["spec"]["template"]["spec"]["contianers"] = []
    moved = deployment("fixed", "trial-bad")
    moved["spec"]["selector"]["matchLabels"] = moved["spec"]["template"]["metadata"]["labels"] = {"app": "other"}
    canary = "bm90LWEtY2FuYXJ5!"
    result = apply(
        misspelt,
        moved,
        the("Secret", "second", "trial-bad", data={}),
        the("ConfigMap", "lost", "trial-nowhere"),
        the("Secret", "first", "trial-bad", data={"a": canary}),
        the("ConfigMap", "fine", "trial-bad", data={"a": "b"}),
    )
    assert result["counts"] == {"failed": 5, "created": 1}
    failures = "\n".join(result["failures"])
    expected = [
        "definition, document 1: Deployment trial-bad/misspelt: .spec.template.spec.contianers: field not declared",
        "definition, document 2: Deployment trial-bad/fixed: spec.selector: Invalid value",
        "this field cannot be changed: put the old value back",
        "definition, document 3: Secret trial-bad/second: exceeded quota: q",
        "definition, document 4: ConfigMap trial-nowhere/lost: the namespace trial-nowhere does not exist",
        "definition, document 5: Secret trial-bad/first: ",
    ]
    for text in expected:
        assert text in failures
    assert canary not in json.dumps(result)


def test_nothing_is_touched_when_the_set_itself_is_wrong(kube: LocalCluster, apply: Apply, tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_bytes(b"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: caf\xe9}\n")
    (tmp_path / "good.yml").write_text(yaml.safe_dump(the("ConfigMap", "good", "default")))
    result = apply(the("Gizmo", "x", api="trial.test/v9"), src=[str(tmp_path / "bad.yml"), str(tmp_path / "good.yml")])
    assert result["msg"].startswith("Nothing was applied.")
    assert f"{tmp_path}/bad.yml, document 1: line 3: byte 0xe9 is not UTF-8" in result["msg"]
    assert "Gizmo x: the API does not know trial.test/v9: its CustomResourceDefinition is missing" in result["msg"]
    assert kube.kubectl("get", "cm", "good", "--ignore-not-found") == ""


def test_preflight_touches_nothing_when_the_api_would_refuse_one(kube: LocalCluster, apply: Apply) -> None:
    apply(the("Namespace", "trial-preflight"))
    bad = the("ConfigMap", "bad", "trial-preflight", colour="red")
    fine = the("ConfigMap", "fine", "trial-preflight")
    result = apply(fine, bad, preflight=True)
    assert ".colour: field not declared in schema" in result["msg"]
    assert result["changed"] is False
    assert kube.kubectl("get", "cm", "fine", "-n", "trial-preflight", "--ignore-not-found") == ""
    assert counted(apply(fine, preflight=True)) == {"created": 1}


def test_a_forbidden_verb_is_named(kube: LocalCluster, apply: Apply) -> None:
    result = apply(the("ConfigMap", "x", "default"), kubeconfig=str(kube.user_kubeconfig("nobody")))
    assert 'User "trial-user" cannot patch resource "configmaps"' in result["msg"]
    assert "give the user of the kubeconfig a role with that verb" in result["msg"]


def test_a_kubeconfig_of_another_cluster_is_told(kube: LocalCluster, apply: Apply, tmp_path: Path) -> None:
    document = yaml.safe_load(kube.kubeconfig.read_text())
    (tmp_path / "other.crt").write_bytes(Authority("another").pem())
    document["clusters"][0]["cluster"]["certificate-authority"] = str(tmp_path / "other.crt")
    path = tmp_path / "other.kubeconfig"
    path.write_text(yaml.safe_dump(document))
    result = apply(the("ConfigMap", "x"), kubeconfig=str(path))
    assert "has a certificate that is not valid" in result["msg"]
    assert str(path) in result["msg"]
    wrong = kube.write_kubeconfig("wrong-token", {"token": "no-such-token"})
    result = apply(the("ConfigMap", "x"), kubeconfig=str(wrong))
    assert "does not accept the credentials of user 'trial'" in result["msg"]
    assert "no-such-token" not in json.dumps(result)


def test_expired_certificates_are_told_with_their_day(kube: LocalCluster, apply: Apply, tmp_path: Path) -> None:
    ended = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
    certificate, key = kube.authority.issue("late", groups=["system:masters"], not_after=ended)
    (tmp_path / "late.crt").write_bytes(certificate)
    (tmp_path / "late.key").write_bytes(key)
    user = {"client-certificate": str(tmp_path / "late.crt"), "client-key": str(tmp_path / "late.key")}
    result = apply(the("ConfigMap", "x"), kubeconfig=str(kube.write_kubeconfig("late", user)))
    assert f"its client certificate expired on {ended:%Y-%m-%d}" in result["msg"]
    server, server_key = kube.authority.issue("server", addresses=["127.0.0.1"], not_after=ended)
    (tmp_path / "server.pem").write_bytes(server + server_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        url = f"https://127.0.0.1:{http.server_port}"
        path = kube.write_kubeconfig("late-server", {"token": ADMIN_TOKEN}, server=url)
        result = apply(the("ConfigMap", "x"), kubeconfig=str(path))
    finally:
        http.shutdown()
        http.server_close()
    assert "certificate has expired" in result["msg"]
    assert "renew the API server's certificate" in result["msg"]


def test_a_client_certificate_and_a_credential_program_work(kube: LocalCluster, apply: Apply, tmp_path: Path) -> None:
    certificate, key = kube.authority.issue("operator", groups=["system:masters"])
    (tmp_path / "operator.crt").write_bytes(certificate)
    (tmp_path / "operator.key").write_bytes(key)
    user = {"client-certificate": str(tmp_path / "operator.crt"), "client-key": str(tmp_path / "operator.key")}
    path = kube.write_kubeconfig("operator", user)
    assert counted(apply(the("ConfigMap", "by-certificate", "default"), kubeconfig=str(path))) == {"created": 1}
    script = tmp_path / "credential"
    soon = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)).isoformat(timespec="seconds")
    status = json.dumps({"token": ADMIN_TOKEN, "expirationTimestamp": soon})
    script.write_text(
        f"#!/bin/sh\necho call >> {tmp_path}/calls\n"
        f"""echo '{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{status}}}'\n"""
    )
    script.chmod(stat.S_IRWXU)
    program = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(script), "interactiveMode": "Never"}
    path = kube.write_kubeconfig("program", {"exec": program})
    gate = {
        "api_version": "v1", "kind": "ConfigMap", "name": "never", "namespace": "default",
        "condition": None, "status": "True", "field": "data", "value": None,
    }  # fmt: skip
    result = apply(the("ConfigMap", "by-program", "default"), kubeconfig=str(path), wait_for=[gate], wait_timeout=3)
    assert result["counts"] == {"created": 1}
    assert len((tmp_path / "calls").read_text().splitlines()) >= 2, "the expired token was not got anew"


# ---- an API that goes away ----


@pytest.fixture(name="lone", scope="module")
def api_that_may_die() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        yield cluster


def test_the_next_call_completes_what_a_dead_api_left(
    lone: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_task, "Client", functools.partial(Client, patience=1.0))
    objects = [the("Namespace", "half"), *(the("ConfigMap", f"c{n}", "half", data={"n": str(n)}) for n in range(600))]
    killer = threading.Thread(target=_kill_when_some_are_there, args=(lone, "half"))
    killer.start()
    result = applied(lone, tmp_path, *objects, parallelism=2)
    killer.join()
    assert "cannot be reached" in result["msg"]
    assert "run again to complete the set" in result["msg"]
    assert len(result["failures"]) < 5, "one sentence, not one for each object"
    done = result["counts"]["created"]
    assert 0 < done < 601
    lone.start_api()
    second = counted(applied(lone, tmp_path, *objects))
    assert second["created"] == 601 - second.get("unchanged", 0)
    # A request under way when it died may have been done without an answer.
    assert done <= second["unchanged"] <= done + 2
    assert counted(applied(lone, tmp_path, *objects)) == {"unchanged": 601}


def test_an_api_that_comes_back_in_time_is_not_a_failure(
    lone: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a loaded machine an API server takes longer to start than the 30 s that the module waits.
    monkeypatch.setattr(apply_task, "Client", functools.partial(Client, patience=90.0))
    objects = [the("Namespace", "back"), *(the("ConfigMap", f"c{n}", "back", data={"n": str(n)}) for n in range(600))]

    # Here and not in a thread: a program of the cluster ends with the thread that started it.
    with ThreadPoolExecutor(1) as pool:
        applying = pool.submit(applied, lone, tmp_path, *objects, parallelism=2)
        _kill_when_some_are_there(lone, "back")
        lone.start_api()
        counts = counted(applying.result())
    assert counts["created"] + counts.get("configured", 0) + counts.get("unchanged", 0) == 601


def _kill_when_some_are_there(cluster: LocalCluster, namespace: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if cluster.kubectl("get", "cm", "c40", "-n", namespace, "--ignore-not-found", check=False):
            break
    cluster.stop_api(kill=True)
