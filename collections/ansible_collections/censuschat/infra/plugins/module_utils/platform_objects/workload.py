# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""One service as Kubernetes objects: its pods, its address, its budget and what scales it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.model import (
    Platform,
    Probe,
    Rate,
    Scaling,
    Service,
    Trigger,
    Vertical,
)
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.network import SERVICE_LABEL
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.nodes import SPOT_TAINT
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.reader import cpu_text, memory_text

Manifest = dict[str, Any]

_PROBES = {"startup": "startupProbe", "readiness": "readinessProbe", "liveness": "livenessProbe"}


def objects(platform: Platform, service: Service) -> Iterator[Manifest]:
    """The objects of one service in its namespace."""
    yield _object(service, "v1", "ServiceAccount", {}, automountServiceAccountToken=False)
    if service.files:
        yield _object(service, "v1", "ConfigMap", {}, data={key_of(path): text for path, text in service.files})
    if service.secrets:
        yield _object(
            service, "v1", "Secret", {}, type="Opaque", data={k: _base64(text) for k, text in service.secrets}
        )
    yield _object(service, "apps/v1", "Deployment", _deployment(platform, service))
    yield _object(service, "v1", "Service", _address(service))
    budget = {
        "maxUnavailable": 1,
        # A pod that does not serve anyway must not keep a node from being drained.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": {SERVICE_LABEL: service.name}},
    }
    yield _object(service, "policy/v1", "PodDisruptionBudget", budget)
    if service.scaling:
        if platform.on("keda"):
            yield _object(service, "keda.sh/v1alpha1", "ScaledObject", _keda(platform, service, service.scaling))
        else:
            yield _object(
                service, "autoscaling/v2", "HorizontalPodAutoscaler", _hpa(platform, service, service.scaling)
            )
    if service.vertical and platform.on("vpa"):
        yield _object(service, "autoscaling.k8s.io/v1", "VerticalPodAutoscaler", _vpa(service, service.vertical))


def _object(service: Service, version: str, kind: str, spec: dict[str, Any], **rest: Any) -> Manifest:
    metadata = {"name": service.name, "namespace": service.namespace, "labels": _labels(service)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest, **({"spec": spec} if spec else {})}


def _labels(service: Service) -> dict[str, str]:
    return {SERVICE_LABEL: service.name, "app.kubernetes.io/part-of": "censuschat", "censuschat.io/kind": service.kind}


def _deployment(platform: Platform, service: Service) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "selector": {"matchLabels": {SERVICE_LABEL: service.name}},
        "revisionHistoryLimit": 5,
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": service.surge, "maxUnavailable": service.unavailable},
        },
        "template": {
            "metadata": {"labels": {**dict(service.labels), **_labels(service)}},
            "spec": _pod(platform, service),
        },
    }
    annotations = {**_sums(service), **_sidecar(platform)}
    if annotations:
        spec["template"]["metadata"]["annotations"] = annotations
    # With an autoscaler the count is its alone; two writers would undo each other at every run.
    if not service.scaling:
        spec["replicas"] = service.replicas(platform.active)
    return spec


def _sidecar(platform: Platform) -> dict[str, str]:
    """How large the mesh makes its sidecar. Istio's own size, up to 2 CPUs, is all that most pods may have."""
    if not platform.on("mesh"):
        return {}
    amount = platform.sidecar.quantities()
    name = "sidecar.istio.io/proxy"
    return {
        f"{name}CPU": amount["cpu"],
        f"{name}CPULimit": amount["cpu"],
        f"{name}Memory": amount["memory"],
        f"{name}MemoryLimit": amount["memory"],
    }


def _sums(service: Service) -> dict[str, str]:
    """Annotations that make a change of mounted contents a change of the pods."""
    sums = {}
    if service.files:
        sums["censuschat.io/files"] = hashlib.sha256(json.dumps(sorted(service.files)).encode()).hexdigest()[:32]
    if service.secrets:
        # Whoever reads Deployments may see this: guessing a secret from it costs a slow hash per guess.
        text = json.dumps(sorted(service.secrets)).encode()
        salt = f"{service.namespace}/{service.name}".encode()
        sums["censuschat.io/secrets"] = hashlib.pbkdf2_hmac("sha256", text, salt, 100_000).hex()[:32]
    return sums


def _pod(platform: Platform, service: Service) -> dict[str, Any]:
    selector = {"matchLabels": {SERVICE_LABEL: service.name}}
    pod: dict[str, Any] = {
        "serviceAccountName": service.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": service.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": service.run_as_user,
            "runAsGroup": service.run_as_user,
            "fsGroup": service.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": platform.zone_spread,
                # A zone whose nodes are gone or tainted does not count: what is left of three zones must carry on.
                "nodeTaintsPolicy": "Honor",
                "labelSelector": selector,
                "matchLabelKeys": ["pod-template-hash"],
            }
        ],
        # Two pods on one node only where there is no other node: demanded, it would end a scale-up at the nodes' count.
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector},
                    }
                ]
            }
        },
        "containers": [_container(service)],
        "volumes": _volumes(service),
    }
    if service.priority:
        pod["priorityClassName"] = service.priority
    if service.spot:
        key, value = SPOT_TAINT
        pod["tolerations"] = [{"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}]
        preferred = {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
        pod["affinity"]["nodeAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 50, "preference": preferred}]
        }
    return {key: value for key, value in pod.items() if value != []}


def _container(service: Service) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": service.name,
        "image": service.image,
        "imagePullPolicy": service.pull_policy,
        "command": list(service.command),
        "args": list(service.args),
        "ports": [{"name": "http", "containerPort": service.port, "protocol": "TCP"}],
        "env": [
            *({"name": name, "value": value} for name, value in service.env),
            *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in service.fields),
        ],
        "resources": {"requests": service.requests.quantities(), "limits": service.limits.quantities()},
        **{_PROBES[kind]: _probe(probe) for kind, probe in service.probes},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": _mounts(service),
    }
    return {key: value for key, value in container.items() if value != []}


def _probe(probe: Probe) -> dict[str, Any]:
    return {
        "httpGet": {"path": probe.path, "port": probe.port},
        "periodSeconds": probe.period_s,
        "timeoutSeconds": probe.timeout_s,
        "failureThreshold": probe.failures,
    }


def _secret(service: Service) -> str:
    return service.secret_name or (service.name if service.secrets else "")


def _volumes(service: Service) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = []
    if service.files:
        items = [{"key": key_of(path), "path": path} for path in dict(service.files)]
        volumes.append({"name": "files", "configMap": {"name": service.name, "items": items}})
    if _secret(service):
        volumes.append({"name": "secrets", "secret": {"secretName": _secret(service), "defaultMode": 0o440}})
    volumes += [{"name": f"writable-{i}", "emptyDir": {}} for i in range(len(service.writable))]
    return volumes


def _mounts(service: Service) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = []
    if service.files:
        mounts.append({"name": "files", "mountPath": service.files_path, "readOnly": True})
    if _secret(service):
        mounts.append({"name": "secrets", "mountPath": service.secrets_path, "readOnly": True})
    mounts += [{"name": f"writable-{i}", "mountPath": path} for i, path in enumerate(service.writable)]
    return mounts


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def key_of(path: str) -> str:
    """A ConfigMap's keys have no slashes."""
    return path.replace("/", "__")


def _address(service: Service) -> dict[str, Any]:
    port: dict[str, Any] = {"name": "http", "port": service.port, "targetPort": service.port, "protocol": "TCP"}
    spec: dict[str, Any] = {"type": "ClusterIP", "selector": {SERVICE_LABEL: service.name}, "ports": [port]}
    if service.node_port is not None:
        port["nodePort"] = service.node_port
        spec |= {"type": "NodePort", "externalTrafficPolicy": "Cluster"}
    return spec


def _behavior(scaling: Scaling) -> dict[str, Any]:
    """The drawn rates. Going down looks back over one period, so that a dip shorter than a step costs no pod."""

    def policy(rate: Rate) -> dict[str, Any]:
        return {
            "selectPolicy": "Max",
            "policies": [{"type": "Pods", "value": rate.pods, "periodSeconds": rate.every_s}],
        }

    return {
        "scaleUp": {"stabilizationWindowSeconds": 0, **policy(scaling.up)},
        "scaleDown": {"stabilizationWindowSeconds": scaling.down.every_s, **policy(scaling.down)},
    }


def _hpa(platform: Platform, service: Service, scaling: Scaling) -> dict[str, Any]:
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": service.name},
        "minReplicas": service.replicas(platform.active),
        "maxReplicas": service.maximum,
        "metrics": [
            {
                "type": "Resource",
                "resource": {"name": name, "target": {"type": "Utilization", "averageUtilization": percent}},
            }
            for name, percent in (("cpu", scaling.cpu), ("memory", scaling.memory))
        ],
        "behavior": _behavior(scaling),
    }


def _keda(platform: Platform, service: Service, scaling: Scaling) -> dict[str, Any]:
    """The same numbers as the HPA's, which KEDA makes from this, and the custom metrics."""
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": service.name},
        "minReplicaCount": service.replicas(platform.active),
        "maxReplicaCount": service.maximum,
        "advanced": {"horizontalPodAutoscalerConfig": {"name": service.name, "behavior": _behavior(scaling)}},
        "triggers": [
            *(
                {"type": name, "metricType": "Utilization", "metadata": {"value": str(percent)}}
                for name, percent in (("cpu", scaling.cpu), ("memory", scaling.memory))
            ),
            *(_trigger(platform, service, trigger) for trigger in scaling.triggers),
        ],
    }


def _trigger(platform: Platform, service: Service, trigger: Trigger) -> dict[str, Any]:
    query = trigger.query.replace("$namespace", service.namespace).replace("$service", service.name)
    return {
        "type": "prometheus",
        "name": trigger.name,
        "metricType": "AverageValue" if trigger.per_pod else "Value",
        "metadata": {"serverAddress": platform.prometheus, "query": query, "threshold": trigger.target},
    }


def _vpa(service: Service, vertical: Vertical) -> dict[str, Any]:
    bounds = {"cpu": (vertical.cpu, cpu_text), "memory": (vertical.memory, memory_text)}
    chosen = {name: (text(bound[0]), text(bound[1])) for name, (bound, text) in bounds.items() if bound}
    policy: dict[str, Any] = {"containerName": service.name, "controlledValues": "RequestsOnly"}
    if chosen:
        policy |= {
            "controlledResources": list(chosen),
            "minAllowed": {name: bound[0] for name, bound in chosen.items()},
            "maxAllowed": {name: bound[1] for name, bound in chosen.items()},
        }
    return {
        "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": service.name},
        "updatePolicy": {"updateMode": vertical.mode},
        "resourcePolicy": {"containerPolicies": [policy]},
    }
