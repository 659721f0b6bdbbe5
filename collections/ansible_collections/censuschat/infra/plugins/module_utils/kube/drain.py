# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Taking the pods off a node through the eviction API, with an end to every wait."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import MERGE, ApiError, Client
from ansible_collections.censuschat.infra.plugins.module_utils.kube.drain_plan import (
    EVICT,
    LEAVING,
    REFUSE,
    STAY,
    Allowed,
    Pod,
    budgets,
    controller,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import Document, KubeError
from ansible_collections.censuschat.infra.plugins.module_utils.kube.waits import conditions

_MANY = "more than one PodDisruptionBudget"
_POLL_FIRST_S, _POLL_MOST_S = 0.2, 2.0
_ASK_AGAIN_S = 1.0
"""How often an eviction that a budget forbids is asked for again."""


@dataclasses.dataclass(frozen=True)
class Options:
    """timeout: seconds for everything together. grace_period: seconds a pod has to end; None: what the pod says."""

    node: str
    timeout: float = 300.0
    grace_period: int | None = None
    allowed: Allowed = dataclasses.field(default_factory=Allowed)
    undo: bool = True
    check: bool = False
    manager: str = "censuschat-infra"


@dataclasses.dataclass
class Report:
    """What was done. problems: why the node is not drained, one line each."""

    cordon: str = ""
    pods: list[dict[str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    undone: bool = False

    @property
    def changed(self) -> bool:
        return (bool(self.cordon) and not self.undone) or any(p["result"] == "evicted" for p in self.pods)


class Drainer:
    """One node."""

    def __init__(self, client: Client, options: Options) -> None:
        self.client, self.options = client, options
        self.report = Report()
        self._owners: dict[tuple[str, str], str] = {}

    def uncordon(self) -> Report:
        """The node takes pods again."""
        if self._node().get("spec", {}).get("unschedulable"):
            self._cordon(False)
        return self.report

    def cordon(self) -> Report:
        """The node takes no new pods; those it has stay."""
        if not self._node().get("spec", {}).get("unschedulable"):
            self._cordon(True)
        return self.report

    def drain(self) -> Report:
        """Cordons and evicts. Nothing is touched when a pod forbids it. On failure the node is as before (undo)."""
        node = self._node()
        pods = plan(self._bodies().values(), self.options.allowed)
        refused = [p for p in pods if p.fate == REFUSE]
        if refused:
            self.report.problems = [f"{p}: {p.why}" for p in refused]
            for pod in pods:
                self._record(
                    pod, "refused" if pod.fate == REFUSE else "skipped" if pod.fate == STAY else "left", pod.why
                )
            return self.report
        for pod in pods:
            if pod.fate == STAY:
                self._record(pod, "skipped", pod.why)
        cordoned = bool(node.get("spec", {}).get("unschedulable"))
        if not cordoned:
            self._cordon(True)
        try:
            self._evict_all([p for p in pods if p.fate in (EVICT, LEAVING)])
        finally:
            if self.report.problems and not cordoned and self.options.undo and not self.options.check:
                self._cordon(False)
                self.report.undone = True
        return self.report

    # ---- the node ----

    def _node(self) -> Document:
        node = self.client.get(f"/api/v1/nodes/{self.options.node}")
        if node is None:
            names = [n["metadata"]["name"] for page in self.client.pages("/api/v1/nodes") for n in page]
            raise KubeError(f"the cluster has no node {self.options.node!r}; it has: {', '.join(names[:20]) or 'none'}")
        return node

    def _cordon(self, closed: bool) -> None:
        query = {"fieldManager": self.options.manager, "dryRun": "All" if self.options.check else None}
        body = {"spec": {"unschedulable": closed or None}}
        self.client.request("PATCH", f"/api/v1/nodes/{self.options.node}", query=query, body=body, content_type=MERGE)
        self.report.cordon = "cordoned" if closed else "uncordoned"

    # ---- its pods ----

    def _bodies(self) -> dict[str, Document]:
        """The node's pods by uid."""
        query = {"fieldSelector": f"spec.nodeName={self.options.node}"}
        return {p["metadata"]["uid"]: p for page in self.client.pages("/api/v1/pods", query=query) for p in page}

    def _evict_all(self, pods: list[Pod]) -> None:
        asked: set[str] = set()
        blocked: dict[str, str] = {}
        failed: set[str] = set()
        left = {p.uid: p for p in pods}
        asked |= {p.uid for p in pods if p.fate == LEAVING}
        deadline = time.monotonic() + self.options.timeout
        delay, again = _POLL_FIRST_S, 0.0
        bodies: dict[str, Document] = {}
        while left:
            if time.monotonic() >= again:
                again = time.monotonic() + _ASK_AGAIN_S
                for uid, pod in list(left.items()):
                    if uid in asked or uid in failed:
                        continue
                    said, why = self._evict(pod)
                    if said == "asked":
                        asked.add(uid)
                        blocked.pop(uid, None)
                    elif said == "gone":
                        del left[uid]
                        self._record(pod, "gone")
                    elif said == "blocked":
                        blocked[uid] = why
                    else:
                        failed.add(uid)
                        self.report.problems.append(f"{self._called(pod)}: {why}")
                        self._record(pod, "failed", why)
            if self.options.check:
                for uid, pod in left.items():
                    if uid not in failed:
                        why = f"it would wait for: {blocked[uid]}" if uid in blocked else ""
                        self._record(pod, "evicted" if pod.fate == EVICT else "gone", why)
                return
            bodies = self._bodies()
            for uid in [u for u in left if u not in bodies]:
                pod = left.pop(uid)
                self._record(pod, "evicted" if pod.fate == EVICT else "gone")
            waiting = [u for u in left if u not in failed]
            if not waiting:
                return
            if time.monotonic() + delay > deadline:
                self._give_up([left[u] for u in waiting], bodies, blocked)
                return
            time.sleep(delay)
            delay = min(_POLL_MOST_S, delay * 1.3)

    def _evict(self, pod: Pod) -> tuple[str, str]:
        """(asked | gone | blocked | failed, why)"""
        delete: dict[str, Any] = {"preconditions": {"uid": pod.uid}}
        if self.options.grace_period is not None:
            delete["gracePeriodSeconds"] = self.options.grace_period
        if self.options.check:
            delete["dryRun"] = ["All"]
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod.name, "namespace": pod.namespace},
            "deleteOptions": delete,
        }
        try:
            self.client.request(
                "POST", f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/eviction", body=body, retry=False
            )
        except ApiError as error:
            if error.status in (404, 409):
                return "gone", ""
            if error.status == 429 or (error.status >= 500 and _MANY not in error.message):
                causes = [c.get("message", "") for c in error.causes if c.get("reason") == "DisruptionBudget"]
                return "blocked", "; ".join(causes) or error.message
            return "failed", error.message
        return "asked", ""

    def _give_up(self, pods: list[Pod], bodies: dict[str, Document], blocked: dict[str, str]) -> None:
        try:
            known = [b for page in self.client.pages("/apis/policy/v1/poddisruptionbudgets") for b in page]
        except ApiError:
            known = []
        node = self._node()
        ready = conditions(node.get("status") or {}).get("Ready") or {}
        for pod in pods:
            body = bodies.get(pod.uid) or {"metadata": {"namespace": pod.namespace, "name": pod.name}}
            if pod.uid in blocked:
                why = "blocked by " + ("; ".join(budgets(body, known)) or blocked[pod.uid])
                why += ": more ready pods of its owner, or another budget, let it go"
            else:
                why = "evicted, but it has not ended"
                finalizers = body["metadata"].get("finalizers") or []
                if finalizers:
                    why += f"; it waits for its finalizers {', '.join(finalizers)}"
                elif ready.get("status") != "True":
                    why += "; the node's kubelet does not report (node is not Ready), so nobody ends it"
                else:
                    grace = body["metadata"].get("deletionGracePeriodSeconds")
                    why += f"; it has {grace} s of grace"
            self._record(pod, "blocked", why)
            self.report.problems.append(f"{self._called(pod)}: {why}")

    def _called(self, pod: Pod) -> str:
        """The pod with its owner's owner: people know the Deployment, not its ReplicaSet."""
        kind, name = pod.owner.partition(" ")[::2]
        if kind != "ReplicaSet":
            return str(pod)
        key = (pod.namespace, name)
        if key not in self._owners:
            try:
                body = self.client.get(f"/apis/apps/v1/namespaces/{pod.namespace}/replicasets/{name}")
            except KubeError:
                body = None
            owner = controller(body) if body else None
            self._owners[key] = f"{owner['kind']} {owner['name']}" if owner else pod.owner
        return str(dataclasses.replace(pod, owner=self._owners[key]))

    def _record(self, pod: Pod, result: str, message: str = "") -> None:
        entry = {"namespace": pod.namespace, "name": pod.name, "owner": pod.owner, "result": result}
        if message:
            entry["message"] = message
        self.report.pods.append(entry)
