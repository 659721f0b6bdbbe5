# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The platform as Kubernetes objects: a pure function, in an order in which a reader understands them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects import access, network, nodes, workload
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.model import Namespace, Platform, Range

Manifest = dict[str, Any]


def manifests(platform: Platform) -> list[Manifest]:
    """Every object of the platform, each with its apiVersion, kind, name and namespace."""
    found = [*_namespaces(platform), *_priorities(platform), *network.policies(platform), *access.objects(platform)]
    for service in platform.services:
        found += workload.objects(platform, service)
    return [*found, *nodes.objects(platform)]


def _namespaces(platform: Platform) -> Iterator[Manifest]:
    for namespace in platform.namespaces:
        yield _namespace(platform, namespace)
        hard: dict[str, str] = {}
        if namespace.quota:
            # Drawn as "resource limits": what the pods may use together. Requests cannot exceed limits; they are
            # counted too, so that `kubectl describe quota` shows what is reserved.
            for amount, text in namespace.quota.quantities().items():
                hard |= {f"limits.{amount}": text, f"requests.{amount}": text}
        if namespace.pods is not None:
            hard["pods"] = str(namespace.pods)
        if hard:
            yield _in(namespace, "v1", "ResourceQuota", "quota", {"hard": hard})
        if namespace.kind:
            yield _in(namespace, "v1", "LimitRange", "limits", _limits(platform.ranges[namespace.kind]))


def _namespace(platform: Platform, namespace: Namespace) -> Manifest:
    labels = {
        "censuschat.io/stage": namespace.stage,
        "pod-security.kubernetes.io/enforce": namespace.pod_security,
        "pod-security.kubernetes.io/enforce-version": "latest",
        # What a stricter level would say is said, and stops nobody.
        "pod-security.kubernetes.io/warn": "restricted" if namespace.stage != "system" else namespace.pod_security,
        "pod-security.kubernetes.io/audit": "restricted" if namespace.stage != "system" else namespace.pod_security,
    }
    if namespace.tier:
        labels["censuschat.io/tier"] = namespace.tier
        if platform.on("mesh"):
            labels["istio-injection"] = "enabled"
    labels |= dict(namespace.labels)
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace.name, "labels": labels}}


def _limits(allowed: Range) -> dict[str, Any]:
    """The range is drawn per pod. A container that says nothing gets the least, which spares the quota most."""
    low = allowed.low.quantities()
    return {
        "limits": [
            {"type": "Pod", "min": low, "max": allowed.high.quantities()},
            {"type": "Container", "default": low, "defaultRequest": low},
        ]
    }


def _priorities(platform: Platform) -> Iterator[Manifest]:
    for priority in platform.priorities:
        yield {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": priority.name},
            "value": priority.value,
            "globalDefault": False,
            "preemptionPolicy": "PreemptLowerPriority" if priority.preempts else "Never",
            "description": priority.description,
        }


def _in(namespace: Namespace, version: str, kind: str, name: str, spec: dict[str, Any]) -> Manifest:
    metadata = {"name": name, "namespace": namespace.name}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
