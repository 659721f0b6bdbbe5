# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Pure: when is a live object ready, when will it never be, and in what words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import Document, Key

READY, PENDING, BROKEN = "ready", "pending", "broken"


@dataclasses.dataclass(frozen=True)
class State:
    """ready, pending or broken (waiting longer cannot help), and why."""

    state: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What an object is waited for: a condition of its status with a value, or a field with a value."""

    type: str = ""
    status: str = "True"
    field: str = ""
    value: str = ""


WAITED = frozenset(
    {
        ("apiextensions.k8s.io", "CustomResourceDefinition"),
        ("apiregistration.k8s.io", "APIService"),
        ("apps", "DaemonSet"),
        ("apps", "Deployment"),
        ("apps", "StatefulSet"),
        ("batch", "Job"),
        ("", "Pod"),
    }
)
"""Group and kind of what `wait` waits for."""


def waited(key: Key) -> bool:
    return (key.group, key.kind) in WAITED


def assess(key: Key, live: Document | None, condition: Condition | None = None) -> State:
    """The state of a live object; None: it is not there."""
    if live is None:
        return State(PENDING, "it does not exist")
    if (live.get("metadata") or {}).get("deletionTimestamp"):
        return State(BROKEN, "it is being deleted")
    if condition is not None:
        return _custom(live, condition)
    status = live.get("status") or {}
    if key.kind == "CustomResourceDefinition":
        return _established(status)
    if key.kind == "APIService":
        return _when(status, "Available")
    if key.kind == "Pod":
        return _pod(status)
    if key.kind == "Job":
        return _job(live, status)
    generation = (live.get("metadata") or {}).get("generation", 0)
    if status.get("observedGeneration", 0) < generation:
        return State(PENDING, "its controller has not seen the change yet")
    if key.kind == "Deployment":
        return _deployment(live, status)
    if key.kind == "StatefulSet":
        return _stateful_set(live, status)
    if key.kind == "DaemonSet":
        return _daemon_set(live, status)
    return State(READY)


def conditions(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Conditions of a status by type."""
    return {str(c.get("type")): c for c in status.get("conditions") or [] if isinstance(c, dict)}


def _custom(live: Document, condition: Condition) -> State:
    if condition.type:
        found = conditions(live.get("status") or {}).get(condition.type)
        now = str(found.get("status")) if found else "not reported"
        if now == condition.status:
            return State(READY)
        why = f": {found.get('reason') or ''} {found.get('message') or ''}".rstrip(": ") if found else ""
        return State(PENDING, f"condition {condition.type} is {now}, not {condition.status}{why}")
    value: Any = live
    for part in condition.field.lstrip(".").split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    now = ("true" if value else "false") if isinstance(value, bool) else "not set" if value is None else str(value)
    if now == condition.value or (not condition.value and value is not None):
        return State(READY)
    return State(PENDING, f"{condition.field} is {now}, not {condition.value or 'set'}")


def _when(status: Mapping[str, Any], name: str) -> State:
    found = conditions(status).get(name)
    if found and found.get("status") == "True":
        return State(READY)
    why = f": {found.get('message') or found.get('reason') or ''}" if found else ""
    return State(PENDING, f"not {name}{why}")


def _established(status: Mapping[str, Any]) -> State:
    found = conditions(status)
    names = found.get("NamesAccepted")
    if names and names.get("status") == "False":
        return State(BROKEN, f"its names are not accepted: {names.get('message') or names.get('reason')}")
    return _when(status, "Established")


def _pod(status: Mapping[str, Any]) -> State:
    phase = status.get("phase")
    if phase == "Succeeded":
        return State(READY)
    if phase == "Failed":
        return State(BROKEN, f"it failed: {status.get('message') or status.get('reason') or 'see its logs'}")
    return _when(status, "Ready")


def _job(live: Document, status: Mapping[str, Any]) -> State:
    found = conditions(status)
    if (found.get("Failed") or {}).get("status") == "True":
        failed = found["Failed"]
        return State(BROKEN, f"it failed: {failed.get('reason') or ''} {failed.get('message') or ''}".rstrip())
    if (found.get("Complete") or {}).get("status") == "True":
        return State(READY)
    if (live.get("spec") or {}).get("suspend"):
        return State(READY)
    wanted = (live.get("spec") or {}).get("completions", 1)
    return State(PENDING, f"{status.get('succeeded') or 0} of {wanted} completions")


def _deployment(live: Document, status: Mapping[str, Any]) -> State:
    wanted = _count(live, 1)
    progressing = conditions(status).get("Progressing") or {}
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        return State(BROKEN, f"no progress within its deadline: {progressing.get('message')}")
    updated, total = status.get("updatedReplicas") or 0, status.get("replicas") or 0
    available = status.get("availableReplicas") or 0
    if updated < wanted:
        return State(PENDING, f"{updated} of {wanted} replicas are updated")
    if total > updated:
        return State(PENDING, f"{total - updated} old replicas are still there")
    if available < wanted:
        return State(PENDING, f"{available} of {wanted} replicas are available")
    return State(READY)


def _stateful_set(live: Document, status: Mapping[str, Any]) -> State:
    wanted = _count(live, 1)
    spec = live.get("spec") or {}
    ready, updated = status.get("readyReplicas") or 0, status.get("updatedReplicas") or 0
    if ready < wanted:
        return State(PENDING, f"{ready} of {wanted} replicas are ready")
    strategy = spec.get("updateStrategy") or {}
    if strategy.get("type") == "OnDelete":
        return State(READY)
    partition = (strategy.get("rollingUpdate") or {}).get("partition") or 0
    if updated < wanted - partition:
        return State(PENDING, f"{updated} of {wanted - partition} replicas are updated")
    if not partition and status.get("currentRevision") != status.get("updateRevision"):
        return State(PENDING, "its replicas are not all of the new revision")
    return State(READY)


def _daemon_set(live: Document, status: Mapping[str, Any]) -> State:
    wanted = status.get("desiredNumberScheduled") or 0
    if ((live.get("spec") or {}).get("updateStrategy") or {}).get("type") != "OnDelete":
        updated = status.get("updatedNumberScheduled") or 0
        if updated < wanted:
            return State(PENDING, f"{updated} of {wanted} nodes are updated")
    available = status.get("numberAvailable") or 0
    return State(READY) if available >= wanted else State(PENDING, f"{available} of {wanted} nodes are available")


def _count(live: Document, default: int) -> int:
    replicas = (live.get("spec") or {}).get("replicas")
    return default if replicas is None else int(replicas)


HOPELESS = frozenset({"ErrImageNeverPull", "InvalidImageName"})
"""Why a container waits that waiting does not mend. A pull that fails may succeed later; these are not tried again."""


def hopeless(pods: list[Document]) -> str:
    """The first container that will never start, with its image; empty when there is none."""
    for pod in pods:
        status = pod.get("status") or {}
        for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in HOPELESS:
                return (
                    f"container {container.get('name')} cannot start: {waiting['reason']}, image "
                    f"{container.get('image')}: {waiting.get('message') or 'no message'}"
                )
    return ""


def newest(live: Document, pods: list[Document], replica_sets: list[Document]) -> list[Document]:
    """Those pods of a workload that are of its present revision, not of one that is being replaced."""
    kind = live.get("kind")
    if kind == "Deployment":
        revision = (live["metadata"].get("annotations") or {}).get("deployment.kubernetes.io/revision")
        hashes = {
            (r["metadata"].get("labels") or {}).get("pod-template-hash")
            for r in replica_sets
            if revision
            and (r["metadata"].get("annotations") or {}).get("deployment.kubernetes.io/revision") == revision
        }
        return [p for p in pods if (p["metadata"].get("labels") or {}).get("pod-template-hash") in hashes]
    if kind == "StatefulSet":
        update = (live.get("status") or {}).get("updateRevision")
        return [p for p in pods if (p["metadata"].get("labels") or {}).get("controller-revision-hash") == update]
    if kind == "DaemonSet" and pods:
        last = max(pods, key=lambda p: str(p["metadata"].get("creationTimestamp")))
        revision = (last["metadata"].get("labels") or {}).get("controller-revision-hash")
        return [p for p in pods if (p["metadata"].get("labels") or {}).get("controller-revision-hash") == revision]
    return pods


def pod_trouble(pods: list[Document]) -> str:
    """What keeps pods from being ready, in the words of their statuses; empty when they say nothing."""
    found: dict[str, int] = {}
    for pod in pods:
        status = pod.get("status") or {}
        words = ""
        for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            waiting = (container.get("state") or {}).get("waiting") or {}
            last = (container.get("lastState") or {}).get("terminated") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                words = f"container {container.get('name')}: {waiting['reason']}"
                if waiting.get("message"):
                    words += f" ({waiting['message']})"
                if last.get("exitCode"):
                    words += f", last exit code {last['exitCode']}"
                break
        if not words:
            scheduled = conditions(status).get("PodScheduled") or {}
            if scheduled.get("status") == "False":
                words = f"{scheduled.get('reason')}: {scheduled.get('message')}"
        if words:
            found[words] = found.get(words, 0) + 1
    return "; ".join(f"{text[:300]} ({count} pods)" if count > 1 else text[:300] for text, count in found.items())
