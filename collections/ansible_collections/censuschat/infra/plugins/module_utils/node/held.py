# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""A control as the node holds it: its parsed state, what is planned for it, and what became of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import (
    Document,
    Permission,
    Setting,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_firewall import Firewall
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_inventory import Inventory
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_mounts import Mount
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_pam import Profile, ServiceLine
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_running import Running
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, Desired
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

# A diff of more entries than this is for the node, not for a report.
DIFF_ENTRIES = 40


@dataclasses.dataclass
class Held:
    """One control on this node."""

    id: str
    applies_to: tuple[str, ...]
    holds: Mapping[str, str]
    requires_path: str
    unless_path: str
    otherwise: str
    sysctl: Mapping[str, str]
    modules: tuple[str, ...]
    settings: tuple[Setting, ...]
    permissions: tuple[Permission, ...]
    inventories: tuple[Inventory, ...]
    accounts: Mapping[str, Any]
    documents: tuple[Document, ...]
    sshd: Mapping[str, Any]
    node: Desired
    mounts: tuple[Mount, ...]
    profiles: tuple[Profile, ...]
    pam_lines: tuple[ServiceLine, ...]
    audit: tuple[str, ...]
    firewall: Firewall | None
    apparmor: bool
    clock: bool
    running: tuple[Running, ...]
    keys: tuple[str, ...] = ()
    """The kinds of state that it is made of."""
    asked_for: bool = False
    """Named by the user, not only by the profile: then a node that cannot hold it is an error."""
    actions: list[Action] = dataclasses.field(default_factory=list)
    violations: list[str] = dataclasses.field(default_factory=list)
    not_applicable: str = ""
    error: str = ""
    changed: bool = False

    @staticmethod
    def of(data: Mapping[str, Any]) -> Held:
        """Read a control as the controller sends it."""
        state = data["state"]
        permissions = state.get("permissions") or ()
        suid = [Inventory.of_suid(state["suid"])] if state.get("suid") else []
        try:
            return Held(
                id=data["id"],
                applies_to=tuple(data["applies_to"]),
                holds=data.get("holds") or {},
                requires_path=data.get("requires_path") or "",
                unless_path=data.get("unless_path") or "",
                otherwise=data.get("otherwise") or "",
                keys=tuple(state),
                asked_for=bool(data.get("asked_for")),
                sysctl={key: str(value) for key, value in (state.get("sysctl") or {}).items()},
                modules=tuple(state.get("blocked_modules") or ()),
                settings=tuple(
                    Setting(s["path"], s.get("separator", " "), {k: str(v) for k, v in s["values"].items()})
                    for s in state.get("settings") or ()
                ),
                permissions=tuple(Permission.of(p) for p in permissions if "scan" not in p),
                inventories=(*suid, *(Inventory.of_scan(p) for p in permissions if "scan" in p)),
                accounts=state.get("accounts") or {},
                documents=tuple(
                    Document(tuple(d["paths"]), d["kind"], d["expect"], d["remedy"])
                    for d in state.get("documents") or ()
                ),
                sshd=state.get("sshd") or {},
                node=Desired.of(state.get("node") or {}),
                mounts=tuple(Mount.of(m) for m in state.get("mounts") or ()),
                profiles=tuple(Profile.of(p) for p in state.get("pam") or ()),
                pam_lines=tuple(ServiceLine.of(p) for p in state.get("pam_service") or ()),
                audit=tuple((state.get("audit") or {}).get("rules") or ()),
                firewall=Firewall.of(state["firewall"]) if state.get("firewall") else None,
                apparmor=bool((state.get("apparmor") or {}).get("enforce")),
                clock=bool((state.get("time") or {}).get("synchronised")),
                running=tuple(Running.of(r) for r in state.get("running") or ()),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise NodeError(f"control {data.get('id')}: its state cannot be read: {error}") from error

    @property
    def active(self) -> bool:
        return not self.not_applicable and not self.error

    def result(self, audit: bool) -> dict[str, Any]:
        """The control's line of the report, with a diff of what was or would be done."""
        problems = [*([self.error] if self.error else []), *self.violations]
        details = [f"{a.target}: {a.detail}" for a in self.actions]
        line: dict[str, Any] = {"id": self.id, "result": "pass", "detail": "", "diff": []}
        if self.not_applicable:
            return {**line, "result": "not_applicable", "detail": self.not_applicable}
        line["diff"] = [
            {"what": f"{a.target} ({a.kind})", "before": a.before, "after": a.after or f"{a.detail}\n"}
            for a in self.actions[:DIFF_ENTRIES]
        ]
        if problems or (audit and details):
            return {**line, "result": "failed", "detail": "; ".join([*problems, *(details if audit else [])])}
        if self.changed or details:
            return {**line, "result": "changed", "detail": "; ".join(details)}
        return line
