# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""One look at the node for all controls at once: what costs a process is asked once, the slow ones at one time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    harden_observe,
    harden_plan,
    host_apparmor,
    host_audit,
    host_clock,
    host_firewall,
    host_inventory,
    host_mounts,
    host_pam,
    sshd_host,
    state_host,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import (
    MODPROBE_FILE,
    SYSCTL_FILE,
    Facts,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.held import Held
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_accounts import AccountsSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_apparmor import ApparmorSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_audit import AuditSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_firewall import SERVICE, FirewallSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_mounts import MountsSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Desired, Observed, Service
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    PathState,
    container,
    observe_path,
)


@dataclasses.dataclass
class Seen:
    """The node as observed. `problems` says why a domain could not be looked at, by its name in Held."""

    facts: Facts = dataclasses.field(default_factory=Facts)
    node: Observed = dataclasses.field(default_factory=Observed)
    accounts: AccountsSeen = dataclasses.field(default_factory=AccountsSeen)
    mounts: MountsSeen = dataclasses.field(default_factory=MountsSeen)
    pam: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    audit: AuditSeen = dataclasses.field(default_factory=AuditSeen)
    firewall: Mapping[str, FirewallSeen] = dataclasses.field(default_factory=dict)
    found: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    found_states: Mapping[str, PathState] = dataclasses.field(default_factory=dict)
    apparmor: ApparmorSeen = dataclasses.field(default_factory=ApparmorSeen)
    synchronised: bool = True
    newer: Mapping[str, PathState] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


class Aside:
    """A look that runs beside the others; `result` waits for it and raises what it raised."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look = look
        self._value: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._look()
        except (NodeError, OSError, ValueError) as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def observe(active: Sequence[Held], commands: Commands) -> Seen:
    """Look at all that the controls `active` speak of."""
    seen = Seen()
    scans = list(dict.fromkeys(i.scan for c in active for i in c.inventories))
    if scans or any(c.mounts for c in active):
        seen.mounts = host_mounts.observe()
    walk = Aside(lambda: host_inventory.observe(scans, seen.mounts.live, commands)) if scans else None
    audit = Aside(lambda: host_audit.observe(commands)) if any(c.audit for c in active) else None
    seen.node = state_host.observe(_asked(active), commands)
    walls = [c.firewall for c in active if c.firewall]
    wall = Aside(lambda: host_firewall.observe(walls, seen.node.units, commands)) if walls else None
    wanted = [p for c in active for p in c.permissions]
    seen.facts = Facts(
        container=container(),
        kernel=harden_observe.kernel({key for c in active for key in c.sysctl}),
        modules=harden_observe.modules() if any(c.modules for c in active) else frozenset(),
        files={path: observe_path(path, read=True).content for path in _files(active)},
        permissions=harden_observe.permissions(wanted),
        documents=_documents(active),
    )
    if any(c.accounts for c in active):
        seen.accounts = harden_observe.accounts()
    profiles, lines = [p for c in active for p in c.profiles], [p for c in active for p in c.pam_lines]
    seen.pam = host_pam.observe(profiles, lines)
    if any(c.apparmor for c in active):
        seen.apparmor = host_apparmor.observe()
    if any(c.clock for c in active):
        seen.synchronised = host_clock.synchronised()
    seen.newer = {path: observe_path(path) for c in active for r in c.running for path in r.newer_than}
    for name, aside in (("inventories", walk), ("audit", audit), ("firewall", wall)):
        try:
            value = aside.result() if aside else None
        except (NodeError, OSError, ValueError) as error:
            seen.problems[name] = str(error)
            continue
        if value is not None and name == "inventories":
            seen.found, seen.found_states = value
        elif value is not None:
            setattr(seen, name, value)
    return seen


def _files(active: Sequence[Held]) -> set[str]:
    return {SYSCTL_FILE, MODPROBE_FILE, *(s.path for c in active for s in c.settings)}


def _documents(active: Sequence[Held]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The documents of all controls; one that cannot be read is an error of the controls that want it."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for control in active:
        try:
            for document in control.documents:
                if document.paths not in found:
                    found[document.paths] = harden_observe.read_document(document)
        except NodeError as error:
            control.error = str(error)
    return found


def _asked(active: Sequence[Held]) -> Desired:
    """All controls' node states as one, with the units that are looked at only, so that systemd is asked once."""
    names = [unit for c in active for r in c.running for unit in r.units]
    names += [SERVICE] if any(c.firewall for c in active) else []
    names += sshd_host.UNITS if any(c.sshd for c in active) else []
    return union([*(c.node for c in active), Desired(services=tuple(Service(n) for n in dict.fromkeys(names)))])


def union(desired: Iterable[Desired]) -> Desired:
    """Several node states as one."""
    items = list(desired)
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(Desired):
        if field.name != "hostname":
            joined[field.name] = tuple(dict.fromkeys(x for d in items for x in getattr(d, field.name)))
    return Desired(**joined)


def missing_key(control: Held, seen: Seen) -> str:
    """The first sysctl key when the running kernel has none of the control's; else ""."""
    keys = list(control.sysctl)
    here = [k for k in keys if any(harden_plan.key_matches(live, k) for live in seen.facts.kernel)]
    return keys[0] if keys and not here else ""
