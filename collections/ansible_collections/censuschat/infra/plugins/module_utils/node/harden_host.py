# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine of node_harden: observe for all controls at once, plan each, keep, apply, observe again, report each."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    harden_observe,
    harden_plan,
    harden_seen,
    host_apparmor,
    host_audit,
    host_firewall,
    host_mounts,
    host_pam,
    plan_accounts,
    plan_apparmor,
    plan_audit,
    plan_firewall,
    plan_inventory,
    plan_mounts,
    plan_pam,
    plan_running,
    sshd_host,
    sshd_plan,
    state_host,
    state_plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.guard import Guard
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import (
    MODPROBE_FILE,
    SYSCTL_FILE,
    Setting,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_seen import Seen
from ansible_collections.censuschat.infra.plugins.module_utils.node.held import Held
from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import PAM_FILES, Keeper, new_id
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_firewall import Firewall
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, Desired
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    container,
    observe_path,
    reason,
    set_attributes,
    write_atomically,
)

# Kinds that are carried out for all controls together; the rest goes control by control.
_FILES = ("sysctl_file", "module_file", "audit_file")
_PAM = ("pam_profile", "pam_enable", "pam_disable")
_FIREWALL = ("firewall", "firewall_file", "firewall_boot")
_GUARDED = (*_PAM, "pam_line", *_FIREWALL)
_UNITS = ("systemd", "service")
_TOGETHER = (*_FILES, "fstab", "audit_rule", *_GUARDED)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the module returns. `sshd` holds settings that the action plugin has to bring in with proof, `token` a
    change of firewall or PAM that waits for its proof.

    `changed` leaves sshd out: whether its settings come to stay is not known yet. `run` is "" when nothing was changed.
    """

    results: list[dict[str, Any]]
    changed: bool
    actions: list[Action]
    sshd: dict[str, Any]
    run: str = ""
    token: str = ""
    guarded: tuple[str, ...] = ()
    """Ids of the controls that wait for the proof."""


class Hardening:
    """One call: all controls of one node."""

    def __init__(self, controls: Sequence[Mapping[str, Any]], provable: bool, commands: Commands) -> None:
        self.controls = [Held.of(c) for c in controls]
        self.provable = provable
        self.commands = commands
        self.keep = Keeper(new_id())
        self.guard = Guard(commands)
        self.token = ""
        self.seen = Seen()
        self.login = sshd_host.present_login()

    def run(self, *, check: bool, audit: bool) -> Outcome:
        """Plan, and unless `check` or `audit` apply; the report is the same in all three."""
        self._applicability()
        self._settle(check=check or audit)
        self._plan(self._active)
        planned = {c.id: list(c.actions) for c in self.controls}
        if not check and not audit and any(c.actions for c in self._active):
            try:
                planned = self._apply()
                self._verify(planned)
            finally:
                self.keep.after()
        sshd = self._sshd(planned, check=check or audit)
        for control in self.controls:
            control.actions = planned[control.id]
            if control.not_applicable and control.asked_for:
                control.error = (
                    f"this node cannot hold it: {control.not_applicable}; do not include it for this node, "
                    "or exclude it with a reason"
                )
                control.not_applicable = ""
        # A control that failed half-way through an apply has changed the node; one that cannot be planned has not.
        actions = [] if audit else [a for c in self.controls for a in c.actions if not (check and c.error)]
        changing = bool(sshd) and not check and not audit
        return Outcome(
            results=[c.result(audit) for c in self.controls],
            changed=any(check or a.kind not in ("sshd", "sshd_reload") for a in actions),
            actions=actions,
            sshd=sshd if changing else {},
            run=self.keep.run if self.keep.used or changing else "",
            token=self.token,
            guarded=tuple(c.id for c in self._active if any(a.kind in _GUARDED for a in c.actions))
            if self.token
            else (),
        )

    @property
    def _active(self) -> list[Held]:
        return [c for c in self.controls if c.active]

    def _applicability(self) -> None:
        kind = container()
        for control in self.controls:
            control.not_applicable = self._why_not(control, kind)

    def _settle(self, *, check: bool) -> None:
        """Have what an earlier run left unproven undone before anything of it is taken for the present state."""
        try:
            self.guard.settle(check=check)
        except NodeError as error:
            for control in self.controls:
                if control.profiles or control.pam_lines or control.firewall:
                    control.error = str(error)

    def _why_not(self, control: Held, kind: str) -> str:
        lead = f"{control.otherwise}: " if control.otherwise else ""
        if kind and "container" not in control.applies_to:
            return self._of_the_machine(control, kind)
        if not kind and "vm" not in control.applies_to:
            return control.holds.get("vm") or "only a container holds this"
        if control.requires_path and not os.path.lexists(control.requires_path):
            return f"{lead}{control.requires_path} does not exist on this node"
        if control.unless_path and os.path.lexists(control.unless_path):
            return f"{lead}{control.unless_path} exists on this node"
        if control.sshd and not os.path.exists("/usr/sbin/sshd"):
            return "no ssh server is installed"
        return ""

    def _of_the_machine(self, control: Held, kind: str) -> str:
        """Why a container cannot hold a control of its machine; "" where the machine already has its kernel values."""
        why = control.holds.get("container") or f"a {kind} container shares this with the machine that runs it"
        if control.keys != ("sysctl",):
            return why
        now = harden_observe.kernel(control.sysctl)
        for key, value in control.sysctl.items():
            if now.get(key) != harden_plan.normal(value):
                return f"{why}; the machine has {key} = {now.get(key, '(no such key)')}"
        return ""

    def _plan(self, controls: Sequence[Held]) -> None:
        self.seen = seen = harden_seen.observe(controls, self.commands)
        tables = [c.firewall.table for c in self._meant if c.firewall]
        for control in controls:
            if not control.active:
                continue
            missing = harden_seen.missing_key(control, seen)
            if missing:
                control.not_applicable = f"the running kernel has no {missing}"
                continue
            try:
                control.actions = self._actions(control, seen, tables)
                if control.firewall and any(a.kind == "firewall" for a in control.actions):
                    host_firewall.check(control.firewall, self.commands)
                control.violations = self._violations(control, seen)
            except NodeError as error:
                control.error = str(error)
        agreed = iter(harden_plan.agree([a for c in controls for a in c.actions]))
        for control in controls:
            control.actions = [next(agreed) for _action in control.actions]

    def _actions(self, control: Held, seen: Seen, tables: Sequence[str]) -> list[Action]:
        blind = [
            seen.problems[name]
            for name in ("inventories", "audit", "firewall")
            if getattr(control, name) and name in seen.problems
        ]
        if blind:
            raise NodeError(blind[0])
        apart = [plan_mounts.problem(m, seen.mounts)[1] for m in control.mounts]
        if apart and all(apart):
            control.not_applicable = apart[0]
            return []
        rules = plan_audit.plan(control.audit, seen.audit) if control.audit else []
        node = state_plan.plan(control.node, seen.node)
        if not any(a.kind == "package" for a in node):
            # The package that is about to be installed may be the one that loads them.
            rules, _problem = plan_audit.split(rules, seen.audit)
        wall = control.firewall
        if wall and self.login:
            problem = plan_firewall.refused(plan_firewall.text_of(wall), self.login.port)
            if problem:
                raise NodeError(problem)
        return _unique(
            [
                *harden_plan.plan_sysctl(control.sysctl, seen.facts),
                *harden_plan.plan_modules(control.modules, seen.facts),
                *(a for s in control.settings for a in harden_plan.plan_setting(s, seen.facts)),
                *(a for p in control.permissions for a in harden_plan.plan_permission(p, seen.facts)),
                *(a for i in control.inventories for a in plan_inventory.plan(i, seen.found, seen.found_states)),
                *node,
                *plan_mounts.plan(control.mounts, seen.mounts),
                *plan_pam.plan_profiles(control.profiles, seen.pam),
                *plan_pam.plan_lines(control.pam_lines, seen.pam),
                *rules,
                *(plan_apparmor.plan(seen.apparmor) if control.apparmor else ()),
                *(plan_firewall.plan(wall, seen.firewall[wall.table], tables) if wall else ()),
            ]
        )

    def _violations(self, control: Held, seen: Seen) -> list[str]:
        """What a person has to judge; not known yet of a control that is about to install or start something."""
        stripped = [path for c in self._active for i in c.inventories for path in i.strip]
        found = [
            *plan_accounts.judge(control.accounts, seen.accounts),
            *(v for d in control.documents for v in harden_plan.judge_document(d, seen.facts)),
            *(v for i in control.inventories for v in plan_inventory.judge(i, seen.found, stripped)),
            *(v for m in control.mounts for v in plan_mounts.problem(m, seen.mounts)[:1] if v),
        ]
        if any(a.kind in ("package", "service", "pam_enable") for a in control.actions):
            return found
        unloaded = plan_audit.split(plan_audit.plan(control.audit, seen.audit), seen.audit)[1] if control.audit else ""
        return [
            *found,
            *([unloaded] if unloaded else ()),
            *plan_pam.missing(control.pam_lines, seen.pam),
            *(plan_apparmor.judge(seen.apparmor) if control.apparmor else ()),
            *(v for r in control.running for v in plan_running.judge(r, seen.node.units, seen.newer)),
            *(plan_running.judge_clock(seen.synchronised) if control.clock else ()),
        ]

    def _apply(self) -> dict[str, list[Action]]:
        """Apply, after all packages in one go. Returns what was done for each control.

        NodeError ends the whole call: what would be replaced cannot be kept, and nothing further was changed.
        """
        done = {c.id: [a for a in c.actions if a.kind == "package"] for c in self.controls}
        packages = [a for c in self._active for a in done[c.id]]
        if packages:
            self.keep.before(packages, self.seen.node.units)
            try:
                wanted = harden_seen.union(c.node for c in self._active)
                state_host.Executor(wanted, self.commands).install(packages)
            except NodeError as error:
                for control in self._active:
                    if done[control.id]:
                        control.error = package_problem(str(error))
            # Packages bring files, users and units of their own.
            errors = {c.id: c.error for c in self.controls}
            self._applicability()
            for control in self.controls:
                control.error = errors[control.id]
            self._plan(self._active)
        direct = [a for c in self._active for a in c.actions if a.kind != "package" and a.kind not in _FIREWALL]
        self.keep.before(direct, self.seen.node.units)
        self._together(("sysctl_file",), lambda _actions: self._write(SYSCTL_FILE, self._sysctl_text()), done)
        self._together(("module_file",), lambda _actions: self._write(MODPROBE_FILE, self._modules_text()), done)
        self._together(("audit_file",), lambda _actions: self._write(plan_audit.RULES_FILE, self._audit_text()), done)
        self._together(("fstab",), host_mounts.write_fstab, done)
        self._one_by_one(lambda action: action.kind not in ("package", *_UNITS, *_TOGETHER), done)
        # Files are in place now; systemd reads them once, and what starts finds all of them.
        self._together(("systemd",), self._reload_systemd, done)
        switched = self._switch()
        self._one_by_one(lambda action: action.kind == "service", done, switched=switched)
        self._together(("audit_rule",), lambda _actions: host_audit.load(self.commands), done)
        self._apply_guarded(done)
        for control in self.controls:
            control.changed = bool(done[control.id])
        return done

    def _one_by_one(
        self, chosen: Callable[[Action], bool], done: dict[str, list[Action]], *, switched: bool = False
    ) -> None:
        """Carry out the chosen actions control by control; what `_switch` did, or another control, is not repeated."""
        served: set[tuple[str, str]] = set()
        for control in self._active:
            executor = state_host.Executor(control.node, self.commands)
            try:
                for action in filter(chosen, control.actions):
                    name = (action.target, str(action.payload)) if action.kind == "service" else ("", "")
                    if not (switched and state_host.switches(action)) and name not in served:
                        self._apply_one(action, executor)
                    served |= {name} if name[0] else set()
                    done[control.id].append(action)
            except NodeError as error:
                control.error = str(error)
            except OSError as error:
                control.error = reason(error, str(error.filename or "the node"))

    def _reload_systemd(self, _actions: Sequence[Action]) -> None:
        self.commands.must(["systemctl", "daemon-reload"], "telling systemd about changed unit files")

    def _together(
        self, kinds: Sequence[str], apply: Callable[[list[Action]], None], done: dict[str, list[Action]]
    ) -> None:
        """Carry out the actions of `kinds` of all controls at once; an error is one of each control that has such."""
        wanting = [(c, [a for a in c.actions if a.kind in kinds]) for c in self._active]
        wanting = [(control, actions) for control, actions in wanting if actions]
        if not wanting:
            return
        try:
            apply([a for _control, actions in wanting for a in actions])
        except (NodeError, OSError) as error:
            for control, _actions in wanting:
                control.error = str(error) if isinstance(error, NodeError) else reason(error, "the node")
            return
        for control, actions in wanting:
            done[control.id] += actions

    def _switch(self) -> bool:
        """Enable, mask and so on for all controls together; False when that failed and each is to try its own."""
        try:
            state_host.Executor(Desired(), self.commands).switch([a for c in self._active for a in c.actions])
        except NodeError:
            return False
        return True

    @property
    def _meant(self) -> list[Held]:
        """The controls that files of all controls speak for: one that failed otherwise keeps its lines there."""
        return [c for c in self.controls if not c.not_applicable]

    def _sysctl_text(self) -> str:
        return harden_plan.render_sysctl({key: value for c in self._meant for key, value in c.sysctl.items()})

    def _modules_text(self) -> str:
        return harden_plan.render_modules([m for c in self._meant for m in c.modules])

    def _audit_text(self) -> str:
        return plan_audit.render([r for c in self._meant for r in c.audit], harden_plan.HEADER)

    def _write(self, path: str, content: str) -> None:
        mode = 0o640 if path == plan_audit.RULES_FILE else 0o644
        # A node without kmod or auditd has no such directory, and the file is to count when they come.
        try:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        except OSError as error:
            raise NodeError(f"{path} cannot be written: {reason(error, os.path.dirname(path))}") from error
        write_atomically(path, content, "root", "root", mode)

    def _apply_one(self, action: Action, executor: state_host.Executor) -> None:
        if action.kind == "sysctl":
            path = harden_observe.kernel_path(action.target)
            try:
                with open(path, "w", encoding="utf-8") as handle:
                    handle.write(action.payload)
            except OSError as error:
                raise NodeError(f"the kernel refuses {action.target} = {action.payload}: {error.strerror}") from error
        elif action.kind == "module":
            self.commands.must(["modprobe", "-r", action.payload], f"unloading kernel module {action.payload}")
        elif action.kind == "setting":
            setting: Setting = action.payload
            now = observe_path(setting.path, read=True)
            owner, group, mode = (now.owner, now.group, now.mode) if now.kind == "file" else ("root", "root", 0o644)
            write_atomically(setting.path, harden_plan.set_keys(now.content or "", setting), owner, group, mode)
        elif action.kind == "permission":
            set_attributes(action.target, *action.payload)
        elif action.kind in ("mount", "remount"):
            host_mounts.apply(action, self.commands)
        elif action.kind == "apparmor":
            host_apparmor.apply(action, self.commands)
        else:
            executor.apply(action)

    def _apply_guarded(self, done: dict[str, list[Action]]) -> None:
        """PAM and firewall: the node undoes them by itself unless a new connection proves them."""
        mine = [c for c in self._active if any(a.kind in _GUARDED for a in c.actions)]
        if not mine:
            return
        actions = [a for c in mine for a in c.actions if a.kind in _GUARDED]
        walls = [c.firewall for c in mine if c.firewall and any(a.kind in _FIREWALL for a in c.actions)]
        loading = any(a.kind == "firewall" for a in actions)
        risky = loading or any(a.kind in (*_PAM, "pam_line") for a in actions)
        try:
            self._arm(actions, walls, risky=risky)
            self._together(_PAM, lambda some: host_pam.update(some, self.commands), done)
            self._together(("pam_line",), host_pam.write_lines, done)
            self._together(_FIREWALL, lambda some: self._firewall(some, walls), done)
        except NodeError as error:
            for control in mine:
                control.error = str(error)
            return
        failed = [c for c in mine if c.error]
        if failed and self.token:
            self.guard.revert(self.token)
            self.token = ""
            for control in mine:
                control.error = control.error or f"undone together with {failed[0].id}, which failed: {failed[0].error}"

    def _arm(self, actions: Sequence[Action], walls: Sequence[Firewall], *, risky: bool) -> None:
        if self.login is None or not risky:
            return
        if not self.provable:
            raise NodeError(
                f"this run came in by ssh as {self.login.user}, but its connection plugin cannot prove a new one, "
                "so firewall and PAM were not changed: use ansible.builtin.ssh"
            )
        files = sorted({a.target for a in actions if a.kind == "pam_line"} | set(PAM_FILES))
        pam = any(a.kind in (*_PAM, "pam_line") for a in actions)
        tables = host_firewall.before([w.table for w in walls], self.commands) if walls else {}
        deferred = [[a.kind, a.target, a.payload] for a in actions if a.kind in ("firewall_file", "firewall_boot")]
        plan = {"run": self.keep.run, "walls": [dataclasses.asdict(w) for w in walls], "actions": deferred}
        self.token = self.guard.arm(files if pam else [], tables, plan)

    def _firewall(self, actions: Sequence[Action], walls: Sequence[Firewall]) -> None:
        if any(a.kind == "firewall" for a in actions):
            for table, text in host_firewall.before([w.table for w in walls], self.commands).items():
                self.keep.table(table, text)
            host_firewall.load(walls, self.commands)
        if not self.token:
            self.keep.before([a for a in actions if a.kind != "firewall"], self.seen.node.units)
            host_firewall.keep(actions, walls, self.commands)

    def _verify(self, done: Mapping[str, Sequence[Action]]) -> None:
        """Observe again: what still differs did not take effect, whatever the commands said."""
        again = [c for c in self._active if done[c.id] or c.violations]
        if not again:
            return
        self._plan(again)
        for control in again:
            # What the firewall's proof decides is written when it is there.
            left = [a for a in control.actions if not (self.token and a.kind in _FIREWALL)]
            if control.active and left and done[control.id]:
                differs = "; ".join(f"{a.target}: {a.detail}" for a in left)
                control.error = f"applied, but the node still differs: {differs}"

    def _sshd(self, planned: dict[str, list[Action]], *, check: bool) -> dict[str, Any]:
        """Plan sshd for all its controls together; the settings to bring in, or {} when there is nothing to do."""
        controls = [c for c in self._active if c.sshd]
        settings = {key: value for c in controls for key, value in c.sshd.items()}
        if not settings:
            return {}
        try:
            undone = sshd_host.settle(self.commands, check=check)
            units = {} if undone else self.seen.node.units
            known = {name: units[name] for name in sshd_host.UNITS if name in units}
            observed = sshd_host.observe(self.commands, known if len(known) == len(sshd_host.UNITS) else None)
            actions = sshd_plan.plan(settings, observed, in_main=True)
            sshd_host.prove_candidate(settings, actions, self.provable, self.commands)
        except NodeError as error:
            for control in controls:
                control.error = str(error)
            return {}
        before = {c.id: len(planned[c.id]) for c in controls}
        for control in controls:
            stale = sshd_plan.stale_keys(control.sshd, observed, in_main=True)
            lines = [line for key in stale for line in sshd_plan.lines_of(key, control.sshd[key])]
            if lines:
                text = "".join(f"{line}\n" for line in lines)
                planned[control.id].append(Action("sshd", sshd_plan.DROP_IN, "; ".join(lines), after=text))
            elif any(a.kind == "sshd_reload" and "newer" in a.detail for a in actions):
                planned[control.id] += [a for a in actions if a.kind == "sshd_reload"]
        if actions and not any(len(planned[c.id]) > before[c.id] for c in controls):
            # Each setting is there, and the file around them is not as it should be.
            planned[controls[0].id] += [
                Action("sshd", a.target, a.detail, None, a.before, a.after) for a in actions if a.kind == "sshd_file"
            ]
        return settings if actions else {}


def finish(token: str, *, keep: bool, commands: Commands) -> None:
    """End a change of firewall or PAM that waited for its proof: keep it, or undo it now."""
    guard = Guard(commands)
    if not keep:
        guard.revert(token)
        return
    plan = guard.confirm(token)
    actions = [Action(kind, target, "", payload) for kind, target, payload in plan["actions"]]
    if not plan["walls"]:
        return
    walls = [Firewall.of(wall) for wall in plan["walls"]]
    keeper = Keeper(plan["run"])
    units = state_host.observe_units([plan_firewall.SERVICE], commands)
    keeper.before(actions, units)
    try:
        host_firewall.keep(actions, walls, commands)
    finally:
        keeper.after()


def package_problem(said: str) -> str:
    """What apt said, with the remedy where it is known."""
    held = re.search(r"Could not get lock (\S+?)\.? (?:- open|It is held by process (\d+)(?: \(([^)]*)\))?)", said)
    if held or "Could not get lock" in said:
        holder = (
            f"process {held.group(2)} ({held.group(3) or 'unknown'})" if held and held.group(2) else "somebody else"
        )
        return (
            f"dpkg's lock was held by {holder} for {state_host.LOCK_WAIT_S} s: wait until it has ended "
            "(`ps -p PID`, or look at unattended-upgrades), then run again"
        )
    if "No space left on device" in said:
        return "apt has no space left: free some (`df -h /var /`, `apt-get clean`), then run again"
    if "dpkg was interrupted" in said:
        return "an earlier installation was interrupted: run `dpkg --configure -a` on the node, then run again"
    # Of the many lines the causes count, each once.
    causes = [line.strip() for line in said.splitlines()[1:] if re.match(r"E: |\s+\S", line)]
    return "; ".join([said.splitlines()[0].partition(": Err:")[0], *dict.fromkeys(causes)]).replace("; ", ": ", 1)


def _unique(actions: Sequence[Action]) -> list[Action]:
    """`conf.all` and `conf.*` name the same running value: one action each."""
    return list({(a.kind, a.target, a.detail): a for a in actions}.values())
