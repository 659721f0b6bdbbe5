# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Pure: which pods of a node are evicted, which stay, which forbid a drain, and what holds one back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import Document

EVICT, STAY, REFUSE, LEAVING = "evict", "stay", "refuse", "leaving"
_MIRROR = "kubernetes.io/config.mirror"


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod of the node and what is to become of it: evict, stay, refuse, or it is leaving already."""

    namespace: str
    name: str
    uid: str
    owner: str
    fate: str
    why: str = ""

    def __str__(self) -> str:
        return f"pod {self.namespace}/{self.name}" + (f" of {self.owner}" if self.owner else "")


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a drain may cost."""

    empty_dir: bool = False
    unmanaged: bool = False


def plan(pods: Iterable[Document], allowed: Allowed) -> list[Pod]:
    """The pods of a node with their fates, in the order of their names."""
    return sorted((_fate(pod, allowed) for pod in pods), key=lambda p: (p.namespace, p.name))


def controller(body: Document) -> Mapping[str, Any] | None:
    """The owner that makes another pod when this one goes."""
    for owner in (body.get("metadata") or {}).get("ownerReferences") or []:
        if owner.get("controller"):
            found: Mapping[str, Any] = owner
            return found
    return None


def _fate(pod: Document, allowed: Allowed) -> Pod:
    metadata = pod["metadata"]
    owner = controller(pod)
    named = f"{owner['kind']} {owner['name']}" if owner else ""

    def fate(word: str, why: str = "") -> Pod:
        return Pod(metadata["namespace"], metadata["name"], metadata["uid"], named, word, why)

    if _MIRROR in (metadata.get("annotations") or {}):
        return fate(STAY, "a static pod of the node")
    if owner and owner["kind"] == "DaemonSet":
        return fate(STAY, "its DaemonSet runs on every node")
    if metadata.get("deletionTimestamp"):
        return fate(LEAVING, "it was being deleted already")
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return fate(EVICT)
    if not owner and not allowed.unmanaged:
        return fate(REFUSE, "no controller would make it again: delete it, or allow it with delete_unmanaged")
    volumes = [
        str(v.get("name"))
        for v in (pod.get("spec") or {}).get("volumes") or []
        if v.get("emptyDir") is not None and (v["emptyDir"] or {}).get("medium") != "Memory"
    ]
    if volumes and not allowed.empty_dir:
        return fate(
            REFUSE,
            f"it would lose the data of its emptyDir {', '.join(volumes)}: allow that with delete_empty_dir_data",
        )
    return fate(EVICT)


def budgets(pod: Document, all_budgets: Sequence[Document]) -> list[str]:
    """The PodDisruptionBudgets of a pod that allow no disruption now, each in words."""
    labels = pod["metadata"].get("labels") or {}
    found = []
    for budget in all_budgets:
        metadata, status = budget["metadata"], budget.get("status") or {}
        if metadata["namespace"] != pod["metadata"]["namespace"]:
            continue
        if not selects((budget.get("spec") or {}).get("selector"), labels) or status.get("disruptionsAllowed"):
            continue
        found.append(
            f"PodDisruptionBudget {metadata['namespace']}/{metadata['name']} "
            f"(needs {status.get('desiredHealthy', '?')} healthy pods of "
            f"{status.get('expectedPods', '?')} and has {status.get('currentHealthy', '?')})"
        )
    return found


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; null selects nothing, an empty one everything."""
    if selector is None:
        return False
    if any(labels.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for term in selector.get("matchExpressions") or []:
        key, operator, values = term.get("key"), term.get("operator"), term.get("values") or []
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }.get(str(operator), False)
        if not holds:
            return False
    return True
