# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine of node_harden: observe for all controls at once, plan each, apply, observe again, report each."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    harden_plan,
    sshd_host,
    sshd_plan,
    state_host,
    state_plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import (
    MODPROBE_FILE,
    SYSCTL_FILE,
    Account,
    Document,
    Facts,
    Permission,
    Setting,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, Desired, Observed
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    container,
    observe_path,
    set_attributes,
    write_atomically,
)

_NODE_LISTS = ("groups", "users", "directories", "files", "links", "absent", "services")


@dataclasses.dataclass
class Held:
    """A control on this node: its parsed state, what is planned for it, and what became of it."""

    id: str
    applies_to: tuple[str, ...]
    requires_path: str
    otherwise: str
    sysctl: Mapping[str, str]
    modules: tuple[str, ...]
    settings: tuple[Setting, ...]
    permissions: tuple[Permission, ...]
    accounts: Mapping[str, bool]
    documents: tuple[Document, ...]
    sshd: Mapping[str, Any]
    node: Desired
    actions: list[Action] = dataclasses.field(default_factory=list)
    violations: list[str] = dataclasses.field(default_factory=list)
    not_applicable: str = ""
    error: str = ""
    changed: bool = False

    @staticmethod
    def of(data: Mapping[str, Any]) -> Held:
        """Read a control as the controller sends it."""
        state = data["state"]
        try:
            return Held(
                id=data["id"],
                applies_to=tuple(data["applies_to"]),
                requires_path=data.get("requires_path") or "",
                otherwise=data.get("otherwise") or "",
                sysctl={key: str(value) for key, value in (state.get("sysctl") or {}).items()},
                modules=tuple(state.get("blocked_modules") or ()),
                settings=tuple(
                    Setting(s["path"], s.get("separator", " "), {k: str(v) for k, v in s["values"].items()})
                    for s in state.get("settings") or ()
                ),
                permissions=tuple(
                    Permission(
                        paths=tuple(p["paths"]),
                        owner=p.get("owner", ""),
                        groups=tuple(p.get("groups") or ()),
                        mode=int(p.get("mode", "7777"), 8),
                    )
                    for p in state.get("permissions") or ()
                ),
                accounts=state.get("accounts") or {},
                documents=tuple(
                    Document(tuple(d["paths"]), d["kind"], d["expect"], d["remedy"])
                    for d in state.get("documents") or ()
                ),
                sshd=state.get("sshd") or {},
                node=Desired.of(state.get("node") or {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise NodeError(f"control {data.get('id')}: its state cannot be read: {error}") from error

    @property
    def active(self) -> bool:
        return not self.not_applicable and not self.error

    def result(self, audit: bool) -> dict[str, str]:
        """The control's line of the report."""
        problems = [*([self.error] if self.error else []), *self.violations]
        details = [f"{a.target}: {a.detail}" for a in self.actions]
        if self.not_applicable:
            return {"id": self.id, "result": "not_applicable", "detail": self.not_applicable}
        if problems or (audit and details):
            return {"id": self.id, "result": "failed", "detail": "; ".join([*problems, *(details if audit else [])])}
        if self.changed or details:
            return {"id": self.id, "result": "changed", "detail": "; ".join(details)}
        return {"id": self.id, "result": "pass", "detail": ""}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the module returns. `sshd` holds settings that the action plugin has to bring in with proof.

    `changed` leaves these out: whether they come to stay is not known yet.
    """

    results: list[dict[str, str]]
    changed: bool
    actions: list[Action]
    sshd: dict[str, Any]


class Hardening:
    """One call: all controls of one node."""

    def __init__(self, controls: Sequence[Mapping[str, Any]], provable: bool, commands: Commands) -> None:
        self.controls = [Held.of(c) for c in controls]
        self.provable = provable
        self.commands = commands
        self._refuse_conflicts()

    def run(self, *, check: bool, audit: bool) -> Outcome:
        """Plan, and unless `check` or `audit` apply; the report is the same in all three."""
        self._applicability()
        self._plan()
        planned = {c.id: list(c.actions) for c in self.controls}
        if not check and not audit and any(c.actions for c in self.controls):
            planned = self._apply()
            self._verify(planned)
        sshd = self._sshd(planned, check=check or audit)
        for control in self.controls:
            control.actions = planned[control.id]
        # A control that failed half-way through an apply has changed the node; one that cannot be planned has not.
        actions = [] if audit else [a for c in self.controls for a in c.actions if not (check and c.error)]
        return Outcome(
            results=[c.result(audit) for c in self.controls],
            changed=any(check or a.kind not in ("sshd", "sshd_reload") for a in actions),
            actions=actions,
            sshd={} if check or audit else sshd,
        )

    def _refuse_conflicts(self) -> None:
        keys: dict[str, tuple[str, str]] = {}
        for control in self.controls:
            claims = [*control.sysctl.items(), *((k.lower(), str(v)) for k, v in control.sshd.items())]
            claims += [(f"{s.path}: {k}", v) for s in control.settings for k, v in s.values.items()]
            claims += [(f.path, f.content) for f in control.node.files]
            for key, value in claims:
                other, theirs = keys.setdefault(key, (control.id, value))
                if theirs != value:
                    raise NodeError(f"controls {other} and {control.id} want different things of {key}: exclude one")

    def _applicability(self) -> None:
        kind = container()
        for control in self.controls:
            if kind and "container" not in control.applies_to:
                control.not_applicable = f"a {kind} container shares this with the machine that runs it"
            elif not kind and "vm" not in control.applies_to:
                control.not_applicable = "only a container holds this"
            elif control.requires_path and not os.path.lexists(control.requires_path):
                kind_of_node = f"{control.otherwise}: " if control.otherwise else ""
                control.not_applicable = f"{kind_of_node}{control.requires_path} does not exist on this node"
            elif control.sshd and not os.path.exists("/usr/sbin/sshd"):
                control.not_applicable = "no ssh server is installed"

    @property
    def _active(self) -> list[Held]:
        return [c for c in self.controls if c.active]

    def _plan(self) -> None:
        facts, observed = self._observe()
        for control in self._active:
            missing = [k for k in control.sysctl if not any(fnmatch.fnmatchcase(live, k) for live in facts.kernel)]
            if control.sysctl and len(missing) == len(control.sysctl):
                control.not_applicable = f"the running kernel has no {missing[0]}"
                continue
            try:
                control.actions = _unique(
                    [
                        *harden_plan.plan_sysctl(control.sysctl, facts),
                        *harden_plan.plan_modules(control.modules, facts),
                        *(a for s in control.settings for a in harden_plan.plan_setting(s, facts)),
                        *(a for p in control.permissions for a in harden_plan.plan_permission(p, facts)),
                        *state_plan.plan(control.node, observed),
                    ]
                )
                control.violations = [
                    *harden_plan.judge_accounts(control.accounts, facts),
                    *(v for d in control.documents for v in harden_plan.judge_document(d, facts)),
                ]
            except NodeError as error:
                control.error = str(error)

    def _observe(self) -> tuple[Facts, Observed]:
        active = self._active
        files = {SYSCTL_FILE, MODPROBE_FILE, *(s.path for c in active for s in c.settings)}
        patterns = {path for c in active for p in c.permissions for path in p.paths}
        matched = {path for pattern in patterns for path in glob.glob(pattern, include_hidden=True)}
        facts = Facts(
            container=container(),
            kernel=observe_kernel({key for c in active for key in c.sysctl}),
            modules=observe_modules() if any(c.modules for c in active) else frozenset(),
            files={path: observe_path(path, read=True).content for path in files},
            permissions={path: observe_path(path) for path in matched},
            accounts=observe_accounts() if any(c.accounts for c in active) else (),
            documents=self._read_documents(),
        )
        return facts, state_host.observe(_union(c.node for c in active), self.commands)

    def _read_documents(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """The documents of all active controls; one that cannot be read is an error of the controls that want it."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for control in self._active:
            try:
                for document in control.documents:
                    if document.paths not in found:
                        found[document.paths] = read_document(document)
            except NodeError as error:
                control.error = str(error)
        return found

    def _apply(self) -> dict[str, list[Action]]:
        """Apply control by control, after all packages in one go. Returns what was done for each."""
        packages = [a for c in self.controls for a in c.actions if a.kind == "package"]
        done = {c.id: [a for a in c.actions if a.kind == "package"] for c in self.controls}
        if packages:
            try:
                state_host.Executor(_union(c.node for c in self._active), self.commands).install(packages)
            except NodeError as error:
                for control in self.controls:
                    if done[control.id]:
                        control.error = str(error)
            self._plan()
        self._write_union("sysctl_file", SYSCTL_FILE, harden_plan.render_sysctl(self._all_sysctl()))
        modules = [m for c in self._active for m in c.modules]
        self._write_union("module_file", MODPROBE_FILE, harden_plan.render_modules(modules))
        switched = self._switch()
        for control in self._active:
            executor = state_host.Executor(control.node, self.commands)
            try:
                for action in control.actions:
                    if action.kind != "package":
                        if not (switched and state_host.switches(action)):
                            self._apply_one(action, executor)
                        done[control.id].append(action)
            except (NodeError, OSError) as error:
                control.error = str(error)
            control.changed = bool(done[control.id])
        return done

    def _switch(self) -> bool:
        """Enable, mask and so on for all controls together; False when that failed and each is to try its own."""
        try:
            state_host.Executor(Desired(), self.commands).switch([a for c in self._active for a in c.actions])
        except NodeError:
            return False
        return True

    def _all_sysctl(self) -> dict[str, str]:
        return {key: value for c in self._active for key, value in c.sysctl.items()}

    def _write_union(self, kind: str, path: str, content: str) -> None:
        wanting = [c for c in self._active if any(a.kind == kind for a in c.actions)]
        if not wanting:
            return
        try:
            write_atomically(path, content, "root", "root", 0o644)
        except NodeError as error:
            for control in wanting:
                control.error = str(error)

    def _apply_one(self, action: Action, executor: state_host.Executor) -> None:
        if action.kind in ("sysctl_file", "module_file"):
            return
        if action.kind == "sysctl":
            path = kernel_path(action.target)
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
        else:
            executor.apply(action)

    def _verify(self, done: Mapping[str, Sequence[Action]]) -> None:
        """Observe again: what still differs did not take effect, whatever the commands said."""
        self._plan()
        for control in self._active:
            if control.actions and done[control.id]:
                left = "; ".join(f"{a.target}: {a.detail}" for a in control.actions)
                control.error = f"applied, but the node still differs: {left}"

    def _sshd(self, planned: dict[str, list[Action]], *, check: bool) -> dict[str, Any]:
        """Plan sshd for all its controls together; the settings to bring in, or {} when there is nothing to do."""
        controls = [c for c in self._active if c.sshd]
        settings = {key: value for c in controls for key, value in c.sshd.items()}
        if not settings:
            return {}
        try:
            sshd_host.settle(self.commands, check=check)
            observed = sshd_host.observe(self.commands)
            actions = sshd_plan.plan(settings, observed)
            sshd_host.prove_candidate(settings, actions, self.provable, self.commands)
        except NodeError as error:
            for control in controls:
                control.error = str(error)
            return {}
        for control in controls:
            stale = sshd_plan.stale_keys(control.sshd, observed)
            lines = [line for key in stale for line in sshd_plan.lines_of(key, control.sshd[key])]
            if lines:
                text = "".join(f"{line}\n" for line in lines)
                planned[control.id].append(Action("sshd", sshd_plan.DROP_IN, "; ".join(lines), after=text))
            elif any(a.kind == "sshd_reload" and "newer" in a.detail for a in actions):
                planned[control.id] += [a for a in actions if a.kind == "sshd_reload"]
        return settings if actions else {}


def kernel_path(key: str) -> str:
    """The /proc/sys path of a sysctl key; a slash in the key stands for a dot in a name, as in sysctl.d."""
    return "/proc/sys/" + "/".join(part.replace("/", ".") for part in key.split("."))


def observe_kernel(keys: Iterable[str]) -> dict[str, str]:
    """The running values of `keys`, each `*` expanded; keys the kernel does not have are left out."""
    values: dict[str, str] = {}
    for key in keys:
        for path in glob.glob(kernel_path(key)):
            name = ".".join(part.replace(".", "/") for part in path[len("/proc/sys/") :].split("/"))
            try:
                with open(path, encoding="utf-8") as handle:
                    values[name] = harden_plan.normal(handle.read())
            except OSError:
                continue
    return values


def observe_modules() -> frozenset[str]:
    """The names of the loaded kernel modules."""
    with open("/proc/modules", encoding="utf-8") as handle:
        return frozenset(line.split(" ", 1)[0] for line in handle)


def read_document(document: Document) -> dict[str, Any]:
    """A program's configuration as it counts: all files of the document's paths, later ones over earlier ones."""
    try:
        import yaml  # Debian's python3-yaml, which a cluster's nodes have; other controls do without.
    except ImportError:
        raise NodeError("python3-yaml is missing on this node, which YAML is read with: install it") from None
    merged: dict[str, Any] = {}
    for pattern in document.paths:
        for path in sorted(glob.glob(pattern)):
            try:
                with open(path, encoding="utf-8") as handle:
                    content = yaml.safe_load(handle) or {}
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise NodeError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
            if not isinstance(content, Mapping):
                raise NodeError(f"{path} is not a mapping")
            merged = harden_plan.merge(merged, content)
    return harden_plan.flags_of(merged) if document.kind == "flags" else merged


def observe_accounts() -> tuple[Account, ...]:
    """All local accounts, with whether their password is empty, locked or set."""
    shadow: dict[str, list[str]] = {}
    with open("/etc/shadow", encoding="utf-8") as handle:
        for line in handle:
            entry = line.rstrip("\n").split(":")
            shadow[entry[0]] = entry
    accounts = []
    with open("/etc/passwd", encoding="utf-8") as handle:
        for line in handle:
            fields = line.rstrip("\n").split(":")
            if len(fields) == 7:
                entry = shadow.get(fields[0], [fields[0], "*", "", "", ""])
                secret = harden_plan.EMPTY if not entry[1] else harden_plan.SET
                secret = harden_plan.LOCKED if entry[1][:1] in ("!", "*") else secret
                days = int(entry[4]) if entry[4].isdigit() else harden_plan.NEVER_DAYS
                lasts = days if days < harden_plan.NEVER_DAYS else None
                accounts.append(Account(fields[0], int(fields[2]), fields[6], secret, lasts))
    return tuple(accounts)


def _union(desired: Iterable[Desired]) -> Desired:
    """All controls' node states as one, to be observed in one go."""
    items = list(desired)
    lists: dict[str, Any] = {
        name: tuple(dict.fromkeys(x for d in items for x in getattr(d, name))) for name in _NODE_LISTS
    }
    return Desired(
        packages_present=tuple(dict.fromkeys(p for d in items for p in d.packages_present)),
        packages_absent=tuple(dict.fromkeys(p for d in items for p in d.packages_absent)),
        **lists,
    )


def _unique(actions: Iterable[Action]) -> list[Action]:
    """`conf.all` and `conf.*` name the same running value: one action each."""
    return list({(a.kind, a.target, a.detail): a for a in actions}.values())
