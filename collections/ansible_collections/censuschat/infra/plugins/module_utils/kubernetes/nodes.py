# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of kubernetes_nodes: pure. What a Node object lacks, and which certificate requests may be approved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SERVING = "kubernetes.io/kubelet-serving"
#: The taint that keeps pods off control planes; others on a node are somebody else's.
CONTROL_PLANE_TAINT = "node-role.kubernetes.io/control-plane"


@dataclasses.dataclass(frozen=True)
class Node:
    """What a node of the inventory shall be in the cluster. `schedulable`: takes pods although a control plane."""

    name: str
    address: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    schedulable: bool = True


@dataclasses.dataclass(frozen=True)
class Request:
    """What a certificate signing request asks for: who asks, and the names and addresses it is for."""

    user: str
    names: tuple[str, ...]
    addresses: tuple[str, ...]


def merge_patch(node: Node, observed: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch that brings the Node object to its state; empty when there is nothing to do."""
    labels = observed.get("metadata", {}).get("labels") or {}
    missing = {key: value for key, value in node.labels.items() if labels.get(key) != value}
    patch: dict[str, Any] = {"metadata": {"labels": missing}} if missing else {}
    if "node-role.kubernetes.io/control-plane" not in labels:
        return patch
    taints: Sequence[Mapping[str, Any]] = observed.get("spec", {}).get("taints") or []
    others = [taint for taint in taints if taint.get("key") != CONTROL_PLANE_TAINT]
    if (len(others) == len(taints)) is not node.schedulable:
        kept = others if node.schedulable else [*others, {"key": CONTROL_PLANE_TAINT, "effect": "NoSchedule"}]
        # A merge patch replaces a list whole, and null removes it.
        patch["spec"] = {"taints": kept or None}
    return patch


def described(patch: Mapping[str, Any]) -> str:
    """The patch in words."""
    parts = [f"label {key}={value}" for key, value in patch.get("metadata", {}).get("labels", {}).items()]
    if "spec" in patch:
        parts.append(f"taints {[t['key'] for t in patch['spec']['taints'] or []]}")
    return ", ".join(parts)


def ready(observed: Mapping[str, Any]) -> str:
    """Why the node is not Ready; empty when it is."""
    for condition in observed.get("status", {}).get("conditions") or ():
        if condition.get("type") == "Ready":
            return "" if condition.get("status") == "True" else str(condition.get("message") or condition.get("reason"))
    return "its kubelet has not reported yet"


def refused(request: Request, node: Node) -> str:
    """Why a kubelet's request for a serving certificate is not approved; empty when it may be."""
    if request.user != f"system:node:{node.name}":
        return f"{request.user} is not {node.name}"
    if strange := sorted(set(request.names) - {node.name}):
        return f"it is for other names too: {', '.join(strange)}"
    if strange := sorted(set(request.addresses) - {node.address}):
        return f"it is for other addresses too: {', '.join(strange)}"
    return ""
