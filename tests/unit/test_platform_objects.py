"""The platform's objects from its data: what is refused, and what is made of what is accepted."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects import (
    grant,
    manifests,
    model,
    reader,
    report,
)

from tests.platform_catalogue import PAGE, catalogue, page, site

Manifest = dict[str, Any]
CATALOGUE = catalogue()
KEDA = {"switches": {"keda": True}}
LOCAL = {"tier": "api", "kind": "api", "port": 8080}


def rendered(*stages: str, **more: Any) -> dict[tuple[str, str, str], Manifest]:
    """Every object by kind, namespace and name; two with one identity fail."""
    found: dict[tuple[str, str, str], Manifest] = {}
    for manifest in manifests.manifests(model.read(CATALOGUE, site(*stages, **more))):
        metadata = manifest["metadata"]
        key = (manifest["kind"], metadata.get("namespace", ""), metadata["name"])
        assert key not in found, key
        found[key] = manifest
    return found


def of_kind(objects: dict[tuple[str, str, str], Manifest], kind: str) -> Iterator[Manifest]:
    return (manifest for key, manifest in objects.items() if key[0] == kind)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown key", {"colour": 1}, "platform: unknown key colour"),
    ("near miss", {"services": {"nlp": {"replica": {}}}}, "platform.services.nlp: unknown key replica; did you mean"),
    (
        "unknown key, deep",
        {"services": {"nlp": {"scaling": {"up": {"pod": 1}}}}},
        "services.nlp.scaling.up: unknown key pod; did you mean pods?",
    ),
    ("no mapping", {"services": {"nlp": 5}}, "platform.services.nlp: must be a mapping, not int"),
    ("no list", {"paths": {"from": "x"}}, "platform.paths: must be a list"),
    ("unknown stage", {"stages_here": ["prod"]}, "stages_here: prod is not a stage; known are production"),
    ("stage twice", {"stages_here": ["staging", "staging"]}, "stages_here: names staging twice"),
    ("unknown service", {"service_names": ["gateway"]}, "service_names: gateway is not a service"),
    ("unknown in a stage", {"stages": {"staging": {"services": {"nlq": {}}}}}, "stages.staging.services: nlq is not"),
    ("service's name", {"services": {"Big_One": LOCAL}}, "services: 'Big_One' is not a name Kubernetes accepts"),
    ("no image", {"image": ""}, "services.api-gateway.image: is missing"),
    ("min over max", {"services": {"nlp": {"replicas": {"min": 16}}}}, "nlp.replicas: min 16 is more than max 15"),
    ("standby over max", {"services": {"nlp": {"replicas": {"standby": 99}}}}, "standby 99 is more than max 15"),
    ("none", {"services": {"nlp": {"replicas": {"min": 0}}}}, "replicas.min: is 0; it must be from 1"),
    (
        "request below the range",
        {"services": {"nlp": {"resources": {"requests": {"cpu": "100m"}}}}},
        "its request of cpu is outside the range of kind api, 500m CPU and 512Mi to 2 CPU and 2Gi",
    ),
    (
        "limit above the range",
        {"services": {"nlp": {"resources": {"limits": {"memory": "3Gi"}}}}},
        "its limit of memory is outside the range of kind api",
    ),
    (
        "request above limit",
        {"services": {"nlp": {"resources": {"requests": {"cpu": "1"}}}}},
        "nlp in production-api: requests more cpu than its limit",
    ),
    ("CPU", {"services": {"nlp": {"resources": {"limits": {"cpu": "2 cores"}}}}}, "'2 cores' is not an amount of CPU"),
    ("memory", {"ranges": {"api": {"memory": ["1GB", "2GB"]}}}, "'1GB' is not an amount of memory such as 512Mi"),
    ("range upside down", {"ranges": {"api": {"cpu": [2, 1]}}}, "ranges.api.cpu: must be two amounts, the smaller"),
    (
        "quota too small to start",
        {"services": {"nlp": {"replicas": {"min": 12}}}},
        "quota: is 8 CPU and 16Gi, but the fewest replicas of api-gateway, nlp, query are limited to 9500m CPU",
    ),
    ("port", {"services": {"nlp": {"port": 80800}}}, "nlp.port: is 80800; it must be from 1 to 65535"),
    (
        "node port outside",
        {"services": {"nlp": {"node_port": 8080, "clients": ["10.0.0.0/8"]}}},
        "node_port 8080 is outside 30000-32767",
    ),
    (
        "node port twice",
        {
            "services": {
                name: {"node_port": 30080, "clients": ["10.0.0.0/8"]} for name in ("nlp", "query")
            }
        },
        "query in production-api: node_port 30080 is taken by production-api/nlp",
    ),
    (
        "node port in two stages",
        {"services": {"nlp": {"node_port": 30080, "clients": ["10.0.0.0/8"]}}},
        "nlp in staging-api: node_port 30080 is taken by production-api/nlp",
    ),
    ("node port for nobody", {"services": {"nlp": {"node_port": 30080}}}, "nlp.clients: is missing"),
    (
        "clients' addresses",
        {"services": {"nlp": {"node_port": 30080, "clients": ["10.0.0.5/24"]}}},
        "'10.0.0.5/24' is not an address block",
    ),
    ("unknown block", {"services": {"cache": {"egress": [{"block": "redis"}]}}}, "redis is not among the blocks"),
    ("no addresses", {"services": {"cache": {"egress": [{"ports": [1]}]}}}, "egress[0]: names neither cidrs"),
    ("port's name", {"services": {"nlp": {"egress": [{"block": "nodes", "ports": ["http"]}]}}}, "'http' is not a port"),
    ("path", {"paths": [{"from": "monitoring", "to": "prod-api"}]}, "paths[0]: prod-api is not a namespace"),
    ("call", {"calls": [{"from": "nlp", "to": "gateway"}]}, "calls[0].to: gateway is not among"),
    ("half a call", {"calls": [{"from": "nlp"}]}, "calls[0]: needs one of from and from_namespace"),
    ("privileged", {"namespaces": {"production-api": {"pod_security": "privileged"}}}, "reason: is missing; say why"),
    ("security", {"namespaces": {"production-api": {"pod_security": "strict"}}}, "must be one of restricted, baseline"),
    ("kind", {"services": {"nlp": {"kind": "data"}}}, "nlp.kind: is data, but production-api holds pods of kind api"),
    ("period", {"services": {"nlp": {"scaling": {"down": {"every_s": 3600}}}}}, "every_s: is 3600; it must be"),
    ("target", {"services": {"nlp": {"scaling": {"cpu": 170}}}}, "scaling.cpu: is 170; it must be from 1 to 100"),
    ("no liveness", {"services": {"nlp": {"probes": {"liveness": None}}}}, "probes.liveness: is missing"),
    ("two secrets", {"services": {"nlp": {"secrets": {"a": "b"}, "secret_name": "x"}}}, "exclude each other"),
    ("secret's name", {"services": {"nlp": {"secrets": {"a/b": "c"}}}}, "secrets: 'a/b' is not a name"),
    ("file's path", {"services": {"nlp": {"files": {"../etc/passwd": "c"}}}}, "files: '../etc/passwd' is not a name"),
    ("file's content", {"services": {"nlp": {"files": {"a": ["b"]}}}}, "files: a must be a text, not list"),
    ("two files, one key", {"services": {"nlp": {"files": {"a/b": "", "a__b": ""}}}}, "both be kept as a__b"),
    ("variable", {"services": {"nlp": {"env": {"A-B": "1"}}}}, "env: 'A-B' is not a variable's name"),
    ("priority", {"services": {"nlp": {"priority": "high"}}}, "priority high is not among censuschat-background"),
    ("rollout", {"services": {"nlp": {"rollout": {"surge": 0}}}}, "surge and unavailable are both 0"),
    (
        "VPA and HPA on one measurement",
        {"services": {"nlp": {"vertical": {"mode": "InPlaceOrRecreate"}}}, "switches": {"vpa": True}},
        "its VPA must be Off: both would act on the same measurement",
    ),
    ("VPA's range", {"services": {"cache": {"vertical": {"cpu": ["100m", 2]}}}}, "its VPA may set cpu outside"),
    ("VPA's mode", {"services": {"cache": {"vertical": {"mode": "Auto"}}}}, "is 'Auto'; it must be one of InPlace"),
    ("nodes", {"nodes": {"min": 60}}, "platform.nodes: min 60 is more than max 50"),
    ("spot nodes", {"nodes": {"spot_percent": 95}}, "min 6 and 47 spot nodes are more than max 50"),
    ("Karpenter", {"switches": {"karpenter": True}}, "nodes.node_class.role: is missing; Karpenter cannot start nodes"),
    ("KEDA", {**KEDA, "prometheus_url": ""}, "prometheus_url: is missing; KEDA reads"),
    ("switch", {"switches": {"keda": "yes"}}, "switches.keda: must be true or false, not 'yes'"),
    ("emergency access", {"access": {"max_s": 60}}, "access.max_s: is 60; it must be from 600 to 86400"),
]  # fmt: skip


@pytest.mark.parametrize(("over", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_bad_data_is_refused_with_its_place(over: dict[str, Any], text: str) -> None:
    with pytest.raises(reader.PlatformError) as refused:
        model.read(CATALOGUE, site(**over) | over)
    assert text in str(refused.value)


def test_all_problems_are_named_at_once() -> None:
    over = {"services": {"nlp": {"port": 0}, "cache": {"kind": ""}}, "ranges": {"api": {"cpu": ["x", "y"]}}}
    with pytest.raises(reader.PlatformError) as refused:
        model.read(CATALOGUE, site(**over))
    for text in ("3 problems", "ranges.api.cpu", "services.nlp.port", "services.cache.kind"):
        assert text in str(refused.value)


@pytest.mark.parametrize(("text", "millicores"), [("500m", 500), ("2", 2000), ("0.25", 250), ("1.5", 1500), ("0", 0)])
def test_cpu_is_read_and_written(text: str, millicores: int) -> None:
    assert reader.cpu(text) == millicores
    assert reader.cpu(reader.cpu_text(millicores)) == millicores


@pytest.mark.parametrize(
    ("text", "amount", "written"),
    [("512Mi", 2**29, "512Mi"), ("2Gi", 2**31, "2Gi"), ("1024Mi", 2**30, "1Gi"), ("1G", 10**9, "1000000000")],
)
def test_memory_is_read_and_written(text: str, amount: int, written: str) -> None:
    assert reader.memory(text) == amount
    assert reader.memory_text(amount) == written


def test_a_sites_data_are_laid_on_the_catalogue() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4, "e": {"f": 1}}
    assert reader.merge(base, {"a": {"c": [3]}, "d": None, "e": 5}) == {"a": {"b": 1, "c": [3]}, "e": 5}


def test_every_pod_passes_the_restricted_standard_and_has_all_it_needs() -> None:
    objects = rendered()
    deployments = list(of_kind(objects, "Deployment"))
    assert len(deployments) == 6 + 6 + 5  # development has no namespace for the cache
    for deployment in deployments:
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["priorityClassName"].startswith("censuschat-")
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        (spread,) = pod["topologySpreadConstraints"]
        assert (spread["topologyKey"], spread["maxSkew"]) == ("topology.kubernetes.io/zone", 1)
        assert pod["affinity"]["podAntiAffinity"]
        key = ("PodDisruptionBudget", deployment["metadata"]["namespace"], deployment["metadata"]["name"])
        assert objects[key]["spec"]["maxUnavailable"] == 1


def test_only_what_may_be_lost_runs_on_spot_nodes() -> None:
    tolerant = {
        d["metadata"]["name"]
        for d in of_kind(rendered(), "Deployment")
        if d["spec"]["template"]["spec"].get("tolerations")
    }
    assert tolerant == {"export"}


def test_each_isolated_namespace_denies_both_directions_and_each_path_is_open_at_both_ends() -> None:
    objects = rendered()
    for name in ("production-api", "staging-cache", "development-data", "monitoring", "security", "istio-ingress"):
        spec = objects[("NetworkPolicy", name, "default-deny")]["spec"]
        assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    out = objects[("NetworkPolicy", "production-api", "query-to-production-data-data-access")]["spec"]
    assert out["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "query"}}
    assert out["egress"][0]["ports"] == [{"protocol": "TCP", "port": 8080}]
    into = objects[("NetworkPolicy", "production-data", "data-access-from-production-api-query")]["spec"]
    assert into["policyTypes"] == ["Ingress"]
    assert ("NetworkPolicy", "kube-system", "default-deny") not in objects


def test_a_rule_without_addresses_opens_nothing() -> None:
    """An empty list of peers would mean everybody."""
    objects = rendered(blocks={})
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], policy
        for rule in policy["spec"].get("egress", []):
            assert rule["to"], policy
    assert ("NetworkPolicy", "production-data", "data-access-to-blocks") not in objects
    platform = model.read(CATALOGUE, site(blocks={}))
    assert set(platform.missing_blocks) == {"api_servers", "nodes", "entrance", "databases"}


def test_keda_gets_the_numbers_of_the_horizontal_autoscaler() -> None:
    plain, keda = rendered("production"), rendered("production", **KEDA)
    assert not list(of_kind(keda, "HorizontalPodAutoscaler"))
    assert len(list(of_kind(keda, "ScaledObject"))) == 4
    for hpa in of_kind(plain, "HorizontalPodAutoscaler"):
        scaled = keda[("ScaledObject", hpa["metadata"]["namespace"], hpa["metadata"]["name"])]["spec"]
        assert scaled["minReplicaCount"] == hpa["spec"]["minReplicas"]
        assert scaled["maxReplicaCount"] == hpa["spec"]["maxReplicas"]
        assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["spec"]["behavior"]
        wanted = {
            m["resource"]["name"]: str(m["resource"]["target"]["averageUtilization"]) for m in hpa["spec"]["metrics"]
        }
        assert {t["type"]: t["metadata"]["value"] for t in scaled["triggers"][:2]} == wanted
        (custom,) = scaled["triggers"][2:]
        assert "$" not in custom["metadata"]["query"]


def test_the_autoscaler_owns_the_replicas_and_a_region_that_stands_by_keeps_its_own() -> None:
    active, standby = rendered("production"), rendered("production", region_active=False)
    key = ("HorizontalPodAutoscaler", "production-api", "query")
    assert active[key]["spec"]["minReplicas"] == 4
    assert standby[key]["spec"]["minReplicas"] == 1
    assert standby[key]["spec"]["maxReplicas"] == 25
    assert "replicas" not in active[("Deployment", "production-api", "query")]["spec"]
    fixed = {"services": {"query": {"autoscale": False}}}
    for objects, count in (
        (rendered("production", **fixed), 4),
        (rendered("production", region_active=False, **fixed), 1),
    ):
        assert objects[("Deployment", "production-api", "query")]["spec"]["replicas"] == count
        assert key not in objects


def test_a_changed_file_or_secret_changes_the_pods_and_a_secret_is_nowhere_else() -> None:
    def one(secret: str, text: str) -> tuple[dict[tuple[str, str, str], Manifest], dict[str, str]]:
        own = {"nlp": {"files": {"a/b.py": text}, "secrets": {"password": secret}}}
        objects = rendered("production", services=own)
        template = objects[("Deployment", "production-api", "nlp")]["spec"]["template"]
        return objects, template["metadata"]["annotations"]

    objects, first = one("hunter2hunter2", "x")
    assert one("hunter2hunter2", "x")[1] == first
    assert one("hunter2hunter2", "y")[1]["censuschat.io/files"] != first["censuschat.io/files"]
    assert one("other", "x")[1]["censuschat.io/secrets"] != first["censuschat.io/secrets"]
    secret = objects.pop(("Secret", "production-api", "nlp"))
    assert base64.b64decode(secret["data"]["password"]) == b"hunter2hunter2"
    assert "hunter2" not in yaml.safe_dump(list(objects.values()))
    platform = model.read(CATALOGUE, site(services={"nlp": {"secrets": {"password": "hunter2hunter2"}}}))
    assert "hunter2" not in repr(platform)
    pod = objects[("Deployment", "production-api", "nlp")]["spec"]["template"]["spec"]
    assert {"name": "files", "configMap": {"name": "nlp", "items": [{"key": "a__b.py", "path": "a/b.py"}]}} in pod[
        "volumes"
    ]
    assert {"name": "secrets", "secret": {"secretName": "nlp", "defaultMode": 0o440}} in pod["volumes"]


def test_nodes_beyond_the_floor_are_shared_between_on_demand_and_spot() -> None:
    cloud = {"nodes": {"node_class": {"role": "nodes", "cluster_tag": "censuschat"}}, "switches": {"karpenter": True}}
    objects = rendered("production", **cloud)
    cpus = {
        name: objects[("NodePool", "", f"censuschat-{name}")]["spec"]["limits"]["cpu"] for name in ("on-demand", "spot")
    }
    assert cpus == {"on-demand": str(29 * 8), "spot": str(15 * 8)}
    assert objects[("EC2NodeClass", "", "censuschat")]["spec"]["metadataOptions"]["httpTokens"] == "required"
    text = rendered("production", switches={"cluster_autoscaler": True})[
        ("ConfigMap", "kube-system", "cluster-autoscaler-arguments")
    ]["data"]["arguments"]
    assert "--nodes=6:35:censuschat-on-demand\n" in text
    assert "--nodes=0:15:censuschat-spot\n" in text


def test_switches_add_their_objects_and_nothing_else() -> None:
    plain = rendered("production")
    kinds = {key[0] for key in plain}
    assert not kinds & {"ScaledObject", "VerticalPodAutoscaler", "NodePool", "EC2NodeClass"}
    modes = {
        key[2]: vpa["spec"]["updatePolicy"]["updateMode"]
        for key, vpa in rendered("production", switches={"vpa": True}).items()
        if key[0] == "VerticalPodAutoscaler"
    }
    off = dict.fromkeys(("api-gateway", "nlp", "query", "data-access"), "Off")
    assert modes == {**off, "cache": "InPlaceOrRecreate", "export": "InPlaceOrRecreate"}
    mesh = rendered("production", switches={"mesh": True})
    assert mesh[("Namespace", "", "production-api")]["metadata"]["labels"]["istio-injection"] == "enabled"
    assert ("NetworkPolicy", "monitoring", "from-production-api-query") in mesh
    annotations = mesh[("Deployment", "production-api", "query")]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["sidecar.istio.io/proxyCPULimit"] == "100m"


def test_a_sidecar_counts_towards_ranges_and_quotas() -> None:
    mesh = {"switches": {"mesh": True}}
    whole = {"services": {"cache": {"resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}}}
    model.read(CATALOGUE, site("production", **whole))
    with pytest.raises(
        reader.PlatformError, match="its limit of cpu and that of the mesh's sidecar together are outside"
    ):
        model.read(CATALOGUE, site("production", **whole, **mesh))
    # 4 CPU hold two pods of 2, and not their sidecars.
    with pytest.raises(reader.PlatformError, match="is 4 CPU and 16Gi, but the fewest replicas"):
        model.read(CATALOGUE, site("development", **mesh))


def test_a_stage_can_be_added_by_data() -> None:
    own = {
        "stages": {"drill": {"services": {"query": {"replicas": {"min": 1, "max": 1}}}}},
        "namespaces": {
            "drill-api": {"stage": "drill", "tier": "api", "kind": "api", "quota": {"cpu": 4, "memory": "8Gi"}}
        },
        "service_names": ["query"],
    }
    objects = rendered("drill", **own)
    assert ("Deployment", "drill-api", "query") in objects
    assert ("Namespace", "", "production-api") not in objects


def test_findings_are_computed() -> None:
    platform = model.read(CATALOGUE, site("production"))
    texts = {finding.about: finding.text for finding in report.findings(platform)}
    # 8 CPU hold 16 pods of 500m; 9 run at least, so one service can have 7 more.
    assert "api-gateway 10 of 20" in texts["production-api: quota and the most replicas"]
    # 17 more pods, two every 30 s; back one every 2 min.
    assert "takes 270 s at least, back 2040 s" in texts["production-api/api-gateway: rates"]
    roomy = model.read(
        CATALOGUE, site("production", namespaces={"production-api": {"quota": {"cpu": 40, "memory": "90Gi"}}})
    )
    assert "production-api: quota and the most replicas" not in {f.about for f in report.findings(roomy)}


def test_the_page_of_findings_is_that_of_the_data() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "write it anew: scripts/run env PYTHONPATH=collections:. python -m tests.platform_catalogue > " + str(PAGE)
    )


GRANT = grant.Wanted("inc-1", "break-glass", "break-glass", "rolling back by hand", "alice", 900)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "Not A Name"}, "'Not A Name' is not a name Kubernetes accepts"),
        ({"reason": " because  "}, "reason: say in 10 characters or more why"),
        ({"seconds": 599}, "an API server gives no token for less than 600 s"),
        ({"seconds": 3607}, "3607 is the one length that an API server may extend"),
    ],
)
def test_an_emergency_access_needs_a_name_a_reason_and_a_length(change: dict[str, Any], text: str) -> None:
    GRANT.check()
    with pytest.raises(reader.PlatformError, match=text):
        dataclasses.replace(GRANT, **change).check()


def test_an_emergency_token_is_bound_to_its_grant() -> None:
    assert GRANT.grant()["type"] == "censuschat.io/break-glass-grant"
    assert "data" not in GRANT.grant()
    spec = GRANT.request("uid-1")["spec"]
    assert spec["expirationSeconds"] == 900
    assert spec["boundObjectRef"] == {"apiVersion": "v1", "kind": "Secret", "name": "inc-1", "uid": "uid-1"}
    document = grant.kubeconfig("https://api:6443", b"PEM", "", "secret-token", "break-glass")
    assert document["users"] == [{"name": "break-glass", "user": {"token": "secret-token"}}]
    assert base64.b64decode(document["clusters"][0]["cluster"]["certificate-authority-data"]) == b"PEM"
