# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who may do what: people who look, people who operate, and an emergency account whose access ends by itself.

An emergency access is a token of a service account that nobody else can use. The API server itself gives it its end and
refuses it afterwards. It is bound to a Secret, the grant, which says who asked and why; deleting the grant ends the
access at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.model import SYSTEM, Access, Platform

Manifest = dict[str, Any]

#: The emergency account, in the namespace of Access.
ACCOUNT = "break-glass"
#: The type of the Secrets that are grants.
GRANT_TYPE = "censuschat.io/break-glass-grant"
REASON = "censuschat.io/reason"
REQUESTED_BY = "censuschat.io/requested-by"

_READ = ["get", "list", "watch"]
_WRITE = [*_READ, "create", "update", "patch", "delete"]
_RBAC = "rbac.authorization.k8s.io"


def objects(platform: Platform) -> Iterator[Manifest]:
    """Roles, their bindings, and the admission policies around the emergency account."""
    access = platform.access
    yield _role("censuschat-viewer", *_viewing())
    yield _role("censuschat-cluster-viewer", *_viewing_cluster())
    yield _role("censuschat-operator", *_operating())
    yield _role("censuschat-cluster-operator", *_operating_cluster())
    yield _role("censuschat-break-glass", *_emergency())
    yield _role("censuschat-break-glass-secrets", _rule("", ["secrets"], _WRITE))
    lookers = _bind_cluster(
        "censuschat-cluster-viewers", "censuschat-cluster-viewer", access.viewers + access.operators
    )
    lookers["subjects"].append(_account(access))
    yield lookers
    yield _bind_cluster("censuschat-cluster-operators", "censuschat-cluster-operator", access.operators)
    for namespace in platform.namespaces:
        if namespace.stage != SYSTEM:
            yield _bind(namespace.name, "censuschat-viewers", "censuschat-viewer", access.viewers + access.operators)
            yield _bind(namespace.name, "censuschat-operators", "censuschat-operator", access.operators)
            yield {
                **_bind(namespace.name, "censuschat-break-glass", "censuschat-break-glass-secrets", ()),
                "subjects": [_account(access)],
            }
    yield from _break_glass(access)


def _break_glass(access: Access) -> Iterator[Manifest]:
    place = {"name": ACCOUNT, "namespace": access.namespace}
    yield {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": place,
        "automountServiceAccountToken": False,
    }
    yield {
        **_bind_cluster("censuschat-break-glass", "censuschat-break-glass", ()),
        "subjects": [_account(access)],
    }
    rules = [
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": [ACCOUNT], "verbs": ["create"]},
        _rule("", ["secrets"], ["get", "list", "create", "delete"]),
    ]
    yield {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": {**place, "name": "grants"}, "rules": rules}
    binding = _bind(access.namespace, "grants", "grants", access.on_call)
    binding["roleRef"]["kind"] = "Role"
    yield binding
    yield from _admission(
        access,
        "censuschat-break-glass-token",
        ["serviceaccounts/token"],
        ["CREATE"],
        [
            (
                f"has(object.spec.expirationSeconds) && object.spec.expirationSeconds <= {access.max_s}",
                f"an emergency access lasts {access.max_s} seconds at most",
            ),
            # The one length that an API server may stretch to a year (service-account-extend-token-expiration).
            ("object.spec.expirationSeconds != 3607", "3607 seconds would be extended by the API server"),
            (
                "object.spec.?boundObjectRef.?kind.orValue('') == 'Secret'",
                "an emergency access must be bound to its grant, a Secret that says who asked and why",
            ),
        ],
    )
    annotations = "has(object.metadata.annotations)"
    yield from _admission(
        access,
        "censuschat-break-glass-grant",
        ["secrets"],
        ["CREATE", "UPDATE"],
        [
            ("request.operation == 'CREATE'", "a grant cannot be changed; delete it and make a new one"),
            (f"object.type == '{GRANT_TYPE}'", f"this namespace holds Secrets of type {GRANT_TYPE} only"),
            (
                f"{annotations} && '{REASON}' in object.metadata.annotations"
                f" && object.metadata.annotations['{REASON}'].size() >= 10",
                f"a grant says why in its annotation {REASON}, in 10 characters or more",
            ),
            (
                f"{annotations} && '{REQUESTED_BY}' in object.metadata.annotations"
                f" && object.metadata.annotations['{REQUESTED_BY}'] == request.userInfo.username",
                f"a grant names the user who makes it in its annotation {REQUESTED_BY}",
            ),
        ],
    )


def _admission(
    access: Access, name: str, resources: list[str], operations: list[str], validations: Sequence[tuple[str, str]]
) -> Iterator[Manifest]:
    version = "admissionregistration.k8s.io/v1"
    # With its defaults spelt out: the API server counts the whole of matchConstraints as one field, and a second run
    # would otherwise seem to change it.
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": operations, "resources": resources, "scope": "*"}
    yield {
        "apiVersion": version,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "matchPolicy": "Equivalent",
                "objectSelector": {},
                "resourceRules": [rule],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": access.namespace}},
            },
            "validations": [{"expression": text, "message": message} for text, message in validations],
        },
    }
    yield {
        "apiVersion": version,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }


def _viewing() -> Iterator[dict[str, Any]]:
    """All that runs in a namespace, except what is secret."""
    core = ["configmaps", "endpoints", "events", "limitranges", "persistentvolumeclaims", "pods", "pods/log"]
    yield _rule("", [*core, "resourcequotas", "serviceaccounts", "services"], _READ)
    yield _rule("apps", ["controllerrevisions", "daemonsets", "deployments", "replicasets", "statefulsets"], _READ)
    yield _rule("batch", ["cronjobs", "jobs"], _READ)
    yield _rule("autoscaling", ["horizontalpodautoscalers"], _READ)
    yield _rule("autoscaling.k8s.io", ["verticalpodautoscalers"], _READ)
    yield _rule("keda.sh", ["scaledobjects"], _READ)
    yield _rule("policy", ["poddisruptionbudgets"], _READ)
    yield _rule("networking.k8s.io", ["ingresses", "networkpolicies"], _READ)
    yield _rule("discovery.k8s.io", ["endpointslices"], _READ)
    yield _rule("events.k8s.io", ["events"], _READ)
    yield _rule("metrics.k8s.io", ["pods"], ["get", "list"])


def _viewing_cluster() -> Iterator[dict[str, Any]]:
    yield _rule("", ["namespaces", "nodes", "persistentvolumes"], _READ)
    yield _rule("scheduling.k8s.io", ["priorityclasses"], _READ)
    # kubectl reads them to validate what it is given.
    yield _rule("apiextensions.k8s.io", ["customresourcedefinitions"], _READ)
    yield _rule("storage.k8s.io", ["storageclasses"], _READ)
    yield _rule("metrics.k8s.io", ["nodes"], ["get", "list"])


def _operating() -> Iterator[dict[str, Any]]:
    """Restart, scale, undo a rollout, remove a pod; neither secrets nor a shell in a container."""
    yield _rule("apps", ["deployments", "statefulsets"], ["patch", "update"])
    yield _rule("apps", ["deployments/scale", "statefulsets/scale"], ["get", "patch", "update"])
    yield _rule("", ["pods"], ["delete"])
    yield _rule("", ["pods/portforward"], ["create"])
    yield _rule("batch", ["jobs"], ["create", "delete"])


def _operating_cluster() -> Iterator[dict[str, Any]]:
    """What it takes to drain a node."""
    yield _rule("", ["nodes"], ["patch", "update"])
    yield _rule("", ["pods"], ["get", "list", "watch"])
    yield _rule("", ["pods/eviction"], ["create"])
    yield _rule("apps", ["daemonsets"], ["get", "list"])


def _emergency() -> Iterator[dict[str, Any]]:
    """Everything that runs, in every namespace; not who may do what.

    Neither RBAC nor tokens, certificates and admission are in it, so that an access cannot outlive its token by making
    itself another one. Whoever may start pods in kube-system can get around that; the audit log shows it.
    """
    core = ["configmaps", "endpoints", "events", "persistentvolumeclaims", "pods", "services"]
    yield _rule("", core, _WRITE)
    yield _rule("", ["pods/eviction", "pods/exec", "pods/portforward", "pods/attach"], ["create", "get"])
    yield _rule("", ["pods/log"], ["get"])
    yield _rule("", ["nodes"], [*_READ, "patch", "update"])
    yield _rule("", ["limitranges", "namespaces", "persistentvolumes", "resourcequotas", "serviceaccounts"], _READ)
    yield _rule("", ["limitranges", "resourcequotas"], ["patch", "update"])
    yield _rule("apps", ["*"], _WRITE)
    yield _rule("batch", ["*"], _WRITE)
    yield _rule("autoscaling", ["*"], _WRITE)
    yield _rule("autoscaling.k8s.io", ["*"], _WRITE)
    yield _rule("keda.sh", ["*"], _WRITE)
    yield _rule("policy", ["poddisruptionbudgets"], _WRITE)
    yield _rule("networking.k8s.io", ["*"], _WRITE)
    yield _rule("discovery.k8s.io", ["endpointslices"], _READ)
    yield _rule("metrics.k8s.io", ["*"], ["get", "list"])


def _rule(group: str, resources: list[str], verbs: list[str]) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)}


def _role(name: str, *rules: dict[str, Any]) -> Manifest:
    return {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": list(rules)}


def _account(access: Access) -> dict[str, str]:
    return {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": access.namespace}


def _bind(namespace: str, name: str, role: str, groups: Sequence[str]) -> Manifest:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": name, "namespace": namespace},
        "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": _RBAC, "kind": "Group", "name": group} for group in groups],
    }


def _bind_cluster(name: str, role: str, groups: Sequence[str]) -> Manifest:
    binding = _bind("", name, role, groups)
    return {**binding, "kind": "ClusterRoleBinding", "metadata": {"name": name}}
