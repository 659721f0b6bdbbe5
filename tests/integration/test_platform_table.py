"""Every figure of the specification that Kubernetes holds, compared with what a real API server holds.

The role runs first. The tables here are written down from the specification, not read from the role's data. Then the
API server is asked to break them: a pod beyond a quota, one outside a range, one that could leave its container, an
access without an end.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from lab.paths import REPO
from tests.local_cluster import LocalCluster
from tests.platform_run import CRDS, Platform

GI, MI = 2**30, 2**20

# Namespace: CPU, memory in GiB ("Resource Limits").
QUOTAS = {
    "production-api": (8, 16),
    "production-data": (16, 64),
    "production-cache": (4, 8),
    "staging-api": (4, 8),
    "staging-data": (8, 32),
    "staging-cache": (2, 4),
    "development-api": (2, 4),
    "development-data": (4, 16),
}
SYSTEM = ("kube-system", "monitoring", "security", "istio-ingress")
# Kind of pod: least and most CPU, least and most memory ("CPU Allocation", "Memory Allocation").
RANGES = {
    "api": (0.5, 2, 512 * MI, 2 * GI),
    "data": (2, 8, 4 * GI, 16 * GI),
    "cache": (0.25, 1, 256 * MI, 1 * GI),
    "job": (0.1, 0.5, 128 * MI, 512 * MI),
}
KINDS = {
    "production-api": "api",
    "staging-api": "api",
    "development-api": "api",
    "production-data": "data",
    "staging-data": "data",
    "development-data": "data",
    "production-cache": "cache",
    "staging-cache": "cache",
    # Not drawn: background jobs have a range and no namespace, so the test's site adds one.
    "production-jobs": "job",
}
# Service: namespace, min, max, CPU %, memory %, pods up, per s, pods down, per s, custom metric ("HPA Policies").
SCALING = {
    "api-gateway": ("production-api", 3, 20, 70, 80, 2, 30, 1, 120, "1000"),
    "nlp": ("production-api", 2, 15, 60, 75, 1, 45, 1, 180, "10"),
    "query": ("production-api", 4, 25, 75, 85, 2, 20, 1, 90, "2"),
    # The specification names connection pool usage without a figure.
    "data-access": ("production-data", 3, 12, 65, 70, 1, 60, 1, 240, None),
}
HOMES = {**{name: row[0] for name, row in SCALING.items()}, "cache": "production-cache", "export": "production-data"}
# "Cluster Auto-scaling" and "Production Nodes".
NODES_MIN, NODES_MAX, SPOT_PERCENT, PENDING_S, UTILIZATION, IDLE_S = 6, 50, 30, 60, 0.5, 600
NODE_CPU, NODE_GI, SYSTEM_DISK_GI, DATA_DISK_GI = 8, 16, 100, 500

SITE: dict[str, Any] = {
    "kubernetes_platform_stages": ["production", "staging", "development"],
    "kubernetes_platform_image": "registry.test/{service}:1",
    "kubernetes_platform_wait": False,
    "kubernetes_platform_blocks": {
        "api_servers": ["10.0.0.10/32"],
        "nodes": ["10.0.0.0/24"],
        "databases": ["10.0.1.0/24"],
        "entrance": ["10.0.2.0/24"],
    },
    "kubernetes_platform_namespaces": {
        "production-jobs": {"stage": "production", "tier": "jobs", "kind": "job", "quota": {"cpu": 1, "memory": "1Gi"}}
    },
    "kubernetes_platform_vpa": True,
    "kubernetes_platform_karpenter": True,
    "kubernetes_platform_cluster_autoscaler": True,
    "kubernetes_platform_nodes": {"node_class": {"role": "censuschat-nodes", "cluster_tag": "censuschat"}},
}


class Trial(Platform):
    """The role's cluster, and what its API server says to us."""

    def refused(self, manifest: dict[str, Any]) -> str:
        """Why the API server does not create the object; empty when it would."""
        done = subprocess.run(
            [
                self.cluster.bin / "kubectl",
                f"--kubeconfig={self.cluster.kubeconfig}",
                "create",
                "--dry-run=server",
                "-f-",
            ],
            input=json.dumps(manifest),
            capture_output=True,
            text=True,
        )
        return done.stderr if done.returncode else ""

    def may(self, group: str, verb: str, what: str, namespace: str) -> bool:
        """Whether a member of the group may; `what` is RESOURCE, RESOURCE/SUBRESOURCE or RESOURCE/SUBRESOURCE:NAME."""
        spec = {"user": "someone", "groups": [group], "resourceAttributes": attributes(verb, what, namespace)}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        done = self.cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(review))
        return bool(json.loads(done)["status"]["allowed"])


def attributes(verb: str, what: str, namespace: str) -> dict[str, str]:
    what, _, name = what.partition(":")
    resource, _, subresource = what.partition("/")
    rbac = "rbac.authorization.k8s.io"
    groups = {"deployments": "apps", "rolebindings": rbac, "clusterroles": rbac}
    return {
        "verb": verb,
        "group": groups.get(resource, ""),
        "resource": resource,
        "subresource": subresource,
        "name": name,
        "namespace": namespace,
    }


@pytest.fixture(scope="module")
def platform() -> Iterator[Trial]:
    with LocalCluster(controller_manager=True) as cluster:
        cluster.kubectl("apply", "--server-side", "-f", str(CRDS))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        found = Trial(cluster, SITE)
        assert found.apply()["changed"]
        yield found


def cpu(text: str) -> float:
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)


def memory(text: str) -> int:
    for unit, factor in (("Gi", GI), ("Mi", MI)):
        if text.endswith(unit):
            return int(text[:-2]) * factor
    return int(text)


def pod(namespace: str, cpus: str, amount: str, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "trial",
        "image": "registry.test/trial:1",
        "resources": {kind: {"cpu": cpus, "memory": amount} for kind in ("requests", "limits")},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    safe = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "trial", "namespace": namespace},
        "spec": {"containers": [container], "securityContext": safe, **spec},
    }


# ---- the table ----


@pytest.mark.parametrize("namespace", QUOTAS)
def test_quota(platform: Trial, namespace: str) -> None:
    cpus, gib = QUOTAS[namespace]
    hard = platform.get("resourcequota", "-n", namespace)["items"]
    assert len(hard) == 1
    for side in ("limits", "requests"):
        assert cpu(hard[0]["spec"]["hard"][f"{side}.cpu"]) == cpus
        assert memory(hard[0]["spec"]["hard"][f"{side}.memory"]) == gib * GI


@pytest.mark.parametrize("namespace", KINDS)
def test_range(platform: Trial, namespace: str) -> None:
    low_cpu, high_cpu, low_memory, high_memory = RANGES[KINDS[namespace]]
    (limits,) = platform.get("limitrange", "-n", namespace)["items"]
    (per_pod,) = [limit for limit in limits["spec"]["limits"] if limit["type"] == "Pod"]
    assert (cpu(per_pod["min"]["cpu"]), cpu(per_pod["max"]["cpu"])) == (low_cpu, high_cpu)
    assert (memory(per_pod["min"]["memory"]), memory(per_pod["max"]["memory"])) == (low_memory, high_memory)


def test_namespaces_and_their_pod_security(platform: Trial) -> None:
    found = {n["metadata"]["name"]: n["metadata"]["labels"] for n in platform.get("namespaces")["items"]}
    assert {*QUOTAS, *SYSTEM} <= set(found)
    for name in QUOTAS:
        assert found[name]["pod-security.kubernetes.io/enforce"] == "restricted", name
    levels = {name: found[name]["pod-security.kubernetes.io/enforce"] for name in SYSTEM}
    assert levels == {
        "kube-system": "privileged",
        "monitoring": "privileged",
        "security": "baseline",
        "istio-ingress": "restricted",
    }


@pytest.mark.parametrize("service", SCALING)
def test_horizontal_policy(platform: Trial, service: str) -> None:
    namespace, low, high, cpus, memories, up, up_s, down, down_s, _ = SCALING[service]
    spec = platform.get("hpa", service, "-n", namespace)["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (low, high)
    targets = {m["resource"]["name"]: m["resource"]["target"]["averageUtilization"] for m in spec["metrics"]}
    assert targets == {"cpu": cpus, "memory": memories}
    for side, pods, seconds in (("scaleUp", up, up_s), ("scaleDown", down, down_s)):
        wanted = [{"type": "Pods", "value": pods, "periodSeconds": seconds}]
        assert spec["behavior"][side]["policies"] == wanted, side
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": service}


@pytest.mark.parametrize("service", HOMES)
def test_service(platform: Trial, service: str) -> None:
    namespace = HOMES[service]
    low_cpu, high_cpu, low_memory, high_memory = RANGES[KINDS[namespace]]
    template = platform.get("deployment", service, "-n", namespace)["spec"]["template"]["spec"]
    (container,) = template["containers"]
    for side in ("requests", "limits"):
        assert low_cpu <= cpu(container["resources"][side]["cpu"]) <= high_cpu
        assert low_memory <= memory(container["resources"][side]["memory"]) <= high_memory
    assert {"readinessProbe", "livenessProbe"} <= set(container)
    assert template["automountServiceAccountToken"] is False
    assert template["topologySpreadConstraints"][0]["topologyKey"] == "topology.kubernetes.io/zone"
    assert platform.get("pdb", service, "-n", namespace)["spec"]["maxUnavailable"] == 1
    vpa = platform.get("vpa", service, "-n", namespace)["spec"]
    wanted = "Off" if service in SCALING else "InPlaceOrRecreate"
    assert vpa["updatePolicy"]["updateMode"] == wanted
    assert platform.get("service", service, "-n", namespace)["spec"]["ports"][0]["port"] == 8080


def test_node_limits_for_karpenter(platform: Trial) -> None:
    pools = {p["metadata"]["name"]: p["spec"] for p in platform.get("nodepool")["items"]}
    count = {name: cpu(spec["limits"]["cpu"]) / NODE_CPU for name, spec in pools.items()}
    assert NODES_MIN + sum(count.values()) == NODES_MAX
    assert count["censuschat-spot"] / NODES_MAX * 100 == SPOT_PERCENT
    for spec in pools.values():
        assert spec["disruption"]["consolidateAfter"] == f"{IDLE_S}s"
        assert memory(spec["limits"]["memory"]) / cpu(spec["limits"]["cpu"]) == NODE_GI * GI / NODE_CPU
        wanted = {r["key"]: r["values"] for r in spec["template"]["spec"]["requirements"]}
        assert wanted["node.kubernetes.io/instance-type"][0] == "c5.2xlarge"
    node = platform.get("ec2nodeclass", "censuschat")["spec"]
    assert node["metadataOptions"]["httpTokens"] == "required"  # IMDSv2
    disks = [
        (memory(d["ebs"]["volumeSize"]), d["ebs"]["volumeType"], d["ebs"]["encrypted"])
        for d in node["blockDeviceMappings"]
    ]
    assert disks == [(SYSTEM_DISK_GI * GI, "gp3", True), (DATA_DISK_GI * GI, "gp3", True)]


def test_node_limits_for_the_cluster_autoscaler(platform: Trial) -> None:
    found = platform.get("configmap", "cluster-autoscaler-arguments", "-n", "kube-system")["data"]["arguments"].split()
    spot = NODES_MAX * SPOT_PERCENT // 100
    assert f"--max-nodes-total={NODES_MAX}" in found
    assert f"--nodes={NODES_MIN}:{NODES_MAX - spot}:censuschat-on-demand" in found
    assert f"--nodes=0:{spot}:censuschat-spot" in found
    assert f"--new-pod-scale-up-delay={PENDING_S}s" in found
    assert f"--scale-down-utilization-threshold={UTILIZATION}" in found
    assert f"--scale-down-unneeded-time={IDLE_S}s" in found


# ---- what the API server does with it ----


def test_a_second_run_changes_nothing_and_a_check_neither(platform: Trial) -> None:
    for options in ((), ("--check",)):
        code, text, result = platform.run(*options)
        assert code == 0, text[-4000:]
        assert not result["changed"], result


def test_a_quota_refuses_what_goes_beyond_it(platform: Trial) -> None:
    used = {}
    for _ in range(100):
        used = platform.get("resourcequota", "quota", "-n", "staging-cache")["status"].get("used", {})
        if used.get("limits.cpu") == "900m":
            break
        time.sleep(0.2)
    # One pod of the cache runs, two CPUs are drawn: a pod of one fits, a small one beside it does not.
    assert used["limits.cpu"] == "900m"
    assert platform.refused(pod("staging-cache", "1", "512Mi")) == ""
    platform.cluster.kubectl("create", "-f", "-", stdin=json.dumps(pod("staging-cache", "1", "512Mi")))
    again = pod("staging-cache", "250m", "256Mi")
    again["metadata"]["name"] = "one-too-many"
    assert "exceeded quota: quota" in platform.refused(again)
    platform.cluster.kubectl("delete", "pod", "trial", "-n", "staging-cache", "--force", "--grace-period=0")


@pytest.mark.parametrize(
    ("cpus", "amount", "text"),
    [
        ("400m", "512Mi", "minimum cpu usage per Pod is 500m"),
        ("2100m", "512Mi", "maximum cpu usage per Pod is 2"),
        ("500m", "500Mi", "minimum memory usage per Pod is 512Mi"),
        ("500m", "2049Mi", "maximum memory usage per Pod is 2Gi"),
        ("500m", "512Mi", ""),
    ],
)
def test_a_range_refuses_what_is_outside(platform: Trial, cpus: str, amount: str, text: str) -> None:
    said = platform.refused(pod("production-api", cpus, amount))
    assert text in said if text else said == ""


CAPABLE = {"add": ["NET_ADMIN"], "drop": ["ALL"]}
ESCAPES: dict[str, dict[str, Any]] = {
    "host network": {"hostNetwork": True},
    "host processes": {"hostPID": True},
    "host path": {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]},
    "root": {"securityContext": {"runAsUser": 0}},
    "network administrator": {
        "containers": [{"name": "x", "image": "x", "securityContext": {"capabilities": CAPABLE}}]
    },
}


@pytest.mark.parametrize("spec", ESCAPES.values(), ids=ESCAPES)
def test_pod_security_refuses_what_could_leave_its_container(platform: Trial, spec: dict[str, Any]) -> None:
    assert 'violates PodSecurity "restricted' in platform.refused(pod("production-api", "500m", "512Mi", **spec))


VIEWER, OPERATOR, ON_CALL = "censuschat:viewers", "censuschat:operators", "censuschat:on-call"
TOKEN = "serviceaccounts/token:break-glass"


@pytest.mark.parametrize(
    ("group", "action", "allowed"),
    [
        (VIEWER, "get pods production-api", True),
        (VIEWER, "get pods/log production-data", True),
        (VIEWER, "list nodes default", True),
        (VIEWER, "get secrets production-api", False),
        (VIEWER, "delete pods production-api", False),
        (VIEWER, "get pods security", False),
        (VIEWER, "create pods/exec production-api", False),
        (OPERATOR, "get pods production-api", True),
        (OPERATOR, "patch deployments production-api", True),
        (OPERATOR, "patch deployments/scale staging-data", True),
        (OPERATOR, "patch nodes default", True),
        (OPERATOR, "create pods/eviction monitoring", True),
        (OPERATOR, "get secrets production-api", False),
        (OPERATOR, "create pods/exec production-api", False),
        (OPERATOR, "patch deployments kube-system", False),
        (OPERATOR, "create rolebindings production-api", False),
        (OPERATOR, f"create {TOKEN} break-glass", False),
        (ON_CALL, "create secrets break-glass", True),
        (ON_CALL, f"create {TOKEN} break-glass", True),
        (ON_CALL, "create serviceaccounts/token:default break-glass", False),
        (ON_CALL, "create secrets security", False),
        (ON_CALL, "get pods production-api", False),
        ("censuschat:nobody", "get pods production-api", False),
    ],
)
def test_roles(platform: Trial, group: str, action: str, allowed: bool) -> None:
    verb, what, namespace = action.split()
    assert platform.may(group, verb, what, namespace) is allowed


# ---- the emergency access ----


class OnCall:
    """A person on call: a user of the group, who takes and ends emergency accesses with the module."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        certificate, key = cluster.authority.issue("alice", groups=[ON_CALL])
        files = {"client-certificate": cluster.directory / "alice.crt", "client-key": cluster.directory / "alice.key"}
        files["client-certificate"].write_bytes(certificate)
        files["client-key"].write_bytes(key)
        self.kubeconfig = cluster.write_kubeconfig("alice", {name: str(path) for name, path in files.items()})

    def module(self, **arguments: Any) -> dict[str, Any]:
        """The module's result."""
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.censuschat.infra.plugins.modules.k8s_break_glass"],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": {"kubeconfig": str(self.kubeconfig), **arguments}}),
            env={**os.environ, "PYTHONPATH": str(REPO / "collections")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def kubectl(
        self, *arguments: str, kubeconfig: Path | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.cluster.bin / "kubectl"), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def may(self, kubeconfig: Path, verb: str, what: str, namespace: str) -> bool:
        """A SelfSubjectAccessReview."""
        spec = {"resourceAttributes": attributes(verb, what, namespace)}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec}
        done = self.kubectl("create", "-f", "-", "-o", "json", kubeconfig=kubeconfig, stdin=json.dumps(review))
        assert done.returncode == 0, done.stderr
        return bool(json.loads(done.stdout)["status"]["allowed"])


@pytest.fixture(scope="module")
def on_call(platform: Trial) -> OnCall:
    return OnCall(platform.cluster)


def signed(claims: dict[str, Any], header: dict[str, Any], key: ec.EllipticCurvePrivateKey) -> str:
    """A token with these claims, signed as the API server signs its own."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    r, s = utils.decode_dss_signature(key.sign(b".".join(parts), ec.ECDSA(hashes.SHA256())))
    signature = base64.urlsafe_b64encode(r.to_bytes(32) + s.to_bytes(32)).rstrip(b"=")
    return b".".join([*parts, signature]).decode()


def test_an_emergency_access_ends_by_itself_and_when_it_is_revoked(
    platform: Trial, on_call: OnCall, tmp_path: Path
) -> None:
    config = tmp_path / "inc-1.kubeconfig"
    wanted = {
        "name": "inc-1",
        "reason": "api-gateway crash-loops, rolling back",
        "dest": str(config),
        "duration_s": 900,
    }
    assert not config.exists()
    before = time.time()
    result = on_call.module(**wanted)
    assert result["changed"], result
    assert result["requested_by"] == "alice"
    ends = datetime.datetime.fromisoformat(result["expires"]).timestamp()
    assert 880 < ends - before < 920
    assert config.stat().st_mode & 0o777 == 0o600
    token = json.loads(config.read_text())["users"][0]["user"]["token"]
    assert token not in json.dumps(result)

    # The grant says who and why, for as long as it lasts and in the audit log.
    grant = platform.get("secret", "inc-1", "-n", "break-glass")
    assert grant["metadata"]["annotations"]["censuschat.io/reason"] == wanted["reason"]
    assert "exists and cannot be extended" in on_call.module(**wanted)["msg"]

    for action, allowed in {
        "get pods security": True,
        "create pods/exec production-api": True,
        "delete deployments production-api": True,
        "patch nodes default": True,
        "get secrets production-api": True,
        # Nothing that would let an access outlive its token.
        "get secrets kube-system": False,
        "create secrets break-glass": False,
        "create clusterroles default": False,
        "create rolebindings production-api": False,
        f"create {TOKEN} break-glass": False,
        "create serviceaccounts/token:default production-api": False,
    }.items():
        verb, what, namespace = action.split()
        assert on_call.may(config, verb, what, namespace) is allowed, action

    # The API server itself ends it: the same token with an end that has passed is refused, with its own it is not.
    header, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in token.split(".")[:2])
    private = serialization.load_pem_private_key((platform.cluster.directory / "sa.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert claims["exp"] - claims["iat"] == 900
    past = {**claims, "iat": claims["iat"] - 2000, "nbf": claims["nbf"] - 2000, "exp": claims["exp"] - 2000}
    for changed, code in ((claims, 0), (past, 1)):
        again = platform.cluster.write_kubeconfig("again", {"token": signed(changed, header, private)})
        done = on_call.kubectl("get", "pods", "-n", "security", kubeconfig=again)
        assert done.returncode == code, done.stderr
    assert "Unauthorized" in done.stderr or "must be logged in" in done.stderr

    assert on_call.module(state="revoked", name="inc-1")["revoked"][0].startswith("inc-1: alice since ")
    # A token that was just used is remembered for some seconds.
    deadline = time.monotonic() + 30
    while (done := on_call.kubectl("get", "pods", "-n", "security", kubeconfig=config)).returncode == 0:
        assert time.monotonic() < deadline, "the access outlives its grant"
        time.sleep(1)
    assert "Unauthorized" in done.stderr or "must be logged in" in done.stderr
    assert not on_call.module(state="revoked", name="inc-1")["changed"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"reason": "because"}, "say in 10 characters or more why"),
        ({"duration_s": 7200}, "an emergency access lasts 3600 seconds at most"),
    ],
)
def test_an_emergency_access_without_reason_or_end_is_refused(
    platform: Trial, on_call: OnCall, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    wanted = {
        "name": "inc-2",
        "reason": "long enough a reason",
        "dest": str(tmp_path / "kubeconfig"),
        "duration_s": 600,
    }
    assert text in on_call.module(**{**wanted, **change})["msg"]
    assert platform.get("secrets", "-n", "break-glass")["items"] == []


def test_the_api_server_refuses_what_the_module_would_not_ask(platform: Trial, on_call: OnCall) -> None:
    """Not the module but the cluster keeps the rules: nobody gets round them with kubectl."""

    def create(kind: str, text: str, **annotations: str) -> str:
        metadata = {"name": "inc-3", "namespace": "break-glass", "annotations": annotations}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind}
        done = on_call.kubectl("create", "-f", "-", stdin=json.dumps(secret))
        assert text in done.stderr, done.stderr
        return done.stderr

    why = {"censuschat.io/reason": "long enough a reason"}
    grant = "censuschat.io/break-glass-grant"
    create(grant, "a grant says why")
    create(grant, "a grant names the user who makes it", **why)
    create(grant, "a grant names the user who makes it", **why, **{"censuschat.io/requested-by": "bob"})
    create("Opaque", "holds Secrets of type censuschat.io/break-glass-grant only", **why)
    # The old kind of token, which never ends.
    forever = {"kubernetes.io/service-account.name": "break-glass", **why, "censuschat.io/requested-by": "alice"}
    create("kubernetes.io/service-account-token", "holds Secrets of type", **forever)
    unbound = on_call.kubectl("create", "token", "break-glass", "-n", "break-glass")
    assert "must be bound to its grant" in unbound.stderr
    # A pod with the account would get tokens of its own.
    trial = pod("break-glass", "500m", "512Mi", serviceAccountName="break-glass")
    assert "exceeded quota: quota, requested: pods=1" in platform.refused(trial)


# ---- switches ----


def test_keda_takes_the_autoscalers_place_with_the_same_numbers(platform: Trial) -> None:
    platform.apply(kubernetes_platform_keda=True)
    assert platform.get("hpa", "-A")["items"] == []
    for service, (namespace, low, high, cpus, memories, up, up_s, down, down_s, custom) in SCALING.items():
        spec = platform.get("scaledobject", service, "-n", namespace)["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (low, high)
        triggers = {t["type"]: t for t in spec["triggers"]}
        assert triggers["cpu"]["metadata"]["value"] == str(cpus)
        assert triggers["memory"]["metadata"]["value"] == str(memories)
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior["scaleUp"]["policies"] == [{"type": "Pods", "value": up, "periodSeconds": up_s}]
        assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": down, "periodSeconds": down_s}]
        if custom:
            assert triggers["prometheus"]["metadata"]["threshold"] == custom
        assert triggers["prometheus"]["metadata"]["query"]
    platform.apply()
    assert len(platform.get("hpa", "-A")["items"]) == 12
    assert platform.get("scaledobject", "-A")["items"] == []


def test_a_switch_without_its_custom_resources_is_one_clear_error() -> None:
    with LocalCluster() as cluster:
        code, _, result = Platform(cluster, SITE).run()
    assert code != 0
    assert "VerticalPodAutoscaler" in result["msg"], result


def test_bad_data_touch_nothing(platform: Trial) -> None:
    services = {"nlp": {"replicas": {"min": 99}, "colour": "blue"}}
    before = platform.get("namespace", "production-api")["metadata"]["resourceVersion"]
    code, text, _ = platform.run(kubernetes_platform_services=services)
    assert code != 0
    assert "services.nlp: unknown key colour" in text
    assert "min 99 is more than max 15" in text
    assert platform.get("namespace", "production-api")["metadata"]["resourceVersion"] == before
