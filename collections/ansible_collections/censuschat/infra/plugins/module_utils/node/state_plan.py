# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of node_state: pure, from desired and observed state to the actions, in their order."""

from __future__ import annotations

import os

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import (
    Action,
    Desired,
    Directory,
    File,
    Observed,
    Package,
    Service,
    UnitState,
    User,
    UserState,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, PathState, shown

_UNIT_DIRECTORIES = ("/etc/systemd/system/", "/usr/lib/systemd/system/", "/lib/systemd/system/", "/run/systemd/system/")
APT = "/etc/apt/"


def plan(desired: Desired, observed: Observed) -> list[Action]:
    """The actions that bring `observed` to `desired`; an empty list when nothing is to be done."""
    actions = [Action("absent", path, "left by an interrupted run", path) for path in observed.leftovers]
    contents = _contents(desired, observed)
    # What packages are taken from comes before the packages.
    actions += [a for a in contents if a.target.startswith(APT)]
    actions += _packages(desired, observed)
    installing = any(a.kind == "package" and a.detail.startswith("install") for a in actions)
    if desired.hostname and set(observed.hostnames) != {desired.hostname}:
        now = " / ".join(dict.fromkeys(observed.hostnames))
        actions.append(Action("hostname", desired.hostname, f"is {now}", desired.hostname, before=f"{now}\n"))
    actions += _accounts(desired, observed)
    actions += [a for a in contents if not a.target.startswith(APT)]
    touched = frozenset(a.target for a in contents)
    stale = any(observed.units[s.name].need_reload for s in desired.services if s.name in observed.units)
    if stale or any(p.startswith(_UNIT_DIRECTORIES) for p in touched):
        actions.append(Action("systemd", "daemon-reload", "unit files changed"))
    for service in desired.services:
        actions += _service(service, desired, observed, touched, installing)
    return actions


def _contents(desired: Desired, observed: Observed) -> list[Action]:
    """Directories, files, links and what is to be absent."""
    contents = [a for d in desired.directories for a in _directory(d, observed.path(d.path))]
    contents += [a for f in desired.files for a in _file(f, observed.path(f.path))]
    contents += [
        Action(
            "link",
            x.path,
            f"-> {x.target}",
            x,
            before=_link_text(observed.path(x.path)),
            after=f"-> {x.target}\n",
        )
        for x in desired.links
        if observed.path(x.path).target != x.target
    ]
    contents += [
        Action("absent", path, "remove", path, before=f"{observed.path(path).kind}\n", after="absent\n")
        for path in desired.absent
        if observed.path(path).kind != "absent"
    ]
    given = [*(d.path for d in desired.directories), *(f.path for f in desired.files), *(x.path for x in desired.links)]
    for directory in desired.directories:
        for path in (os.path.join(directory.path, name) for name in observed.entries.get(directory.path, ())):
            if path not in desired.absent and not any(g == path or g.startswith(f"{path}/") for g in given):
                why = f"remove: {directory.path} holds only what it is given"
                contents.append(Action("absent", path, why, path, before="present\n", after="absent\n"))
    return contents


def _packages(desired: Desired, observed: Observed) -> list[Action]:
    actions = [
        Action("hold", p, "unhold", p, before="held\n", after="not held\n")
        for p in desired.packages_unheld
        if p in observed.held
    ]
    for package in dict.fromkeys(desired.packages):
        there = package.name in observed.installed
        version = observed.versions.get(package.name, "")
        if there and package.version in ("", version):
            continue
        detail = "install"
        if package.version:
            detail += f" {package.version}" + (f", is {version}" if there else "")
        if package.url:
            detail += f", from {package.url}"
        before = (version or "installed") if there else "absent"
        actions.append(
            Action("package", package.name, detail, package, f"{before}\n", f"{package.version or 'installed'}\n")
        )
    actions += [
        Action("package", p, "remove", Package(p), before="installed\n", after="absent\n")
        for p in desired.packages_absent
        if p in observed.installed
    ]
    actions += [
        Action("hold", p, "hold", p, before="not held\n", after="held\n")
        for p in desired.packages_held
        if p not in observed.held
    ]
    return actions


def _accounts(desired: Desired, observed: Observed) -> list[Action]:
    actions = [
        Action("group", g.name, "create", g, before="absent\n", after="present\n")
        for g in desired.groups
        if g.name not in observed.groups
    ]
    for user in desired.users:
        detail = _user_detail(user, observed.users.get(user.name))
        if detail:
            actions.append(Action("user", user.name, detail, user))
    return actions


def _user_detail(user: User, now: UserState | None) -> str:
    if user.absent:
        return "remove, its home stays" if now else ""
    if now is None:
        return "create" + (f", groups {','.join(user.groups)}" if user.groups else "")
    parts = []
    if user.uid not in (None, now.uid):
        raise NodeError(
            f"user {user.name} has the uid {now.uid} and not {user.uid}: its files would stay the old number's; "
            "give the present one, or remove the account and its files first"
        )
    missing = [g for g in user.groups if g not in now.groups]
    if missing:
        parts.append(f"add to groups {','.join(missing)}")
    if user.shell is not None and user.shell != now.shell:
        parts.append(f"shell {now.shell} -> {user.shell}")
    if user.home is not None and user.home != now.home:
        parts.append(f"home {now.home} -> {user.home}")
    return "; ".join(parts)


def _attributes(owner: str, group: str, mode: int) -> str:
    return f"{owner}:{group} {mode:04o}"


def _link_text(now: PathState) -> str:
    return "absent\n" if now.kind == "absent" else f"{now.kind} {now.target}".strip() + "\n"


def _directory(want: Directory, now: PathState) -> list[Action]:
    after = _attributes(want.owner, want.group, want.mode)
    if now.kind == "absent":
        return [Action("directory", want.path, f"create {after}", want, before="absent\n", after=after + "\n")]
    if now.kind != "directory":
        raise NodeError(f"{want.path} should be a directory but is a {now.kind}: move it away, then run again")
    before = _attributes(now.owner, now.group, now.mode)
    if before == after:
        return []
    return [Action("directory", want.path, f"{before} -> {after}", want, before=before + "\n", after=after + "\n")]


def _file(want: File, now: PathState) -> list[Action]:
    if now.kind in ("directory", "other"):
        raise NodeError(f"{want.path} should be a file but is a {now.kind}: move it away, then run again")
    after = _attributes(want.owner, want.group, want.mode)
    if now.kind != "file":
        return [
            Action("file", want.path, f"create {after}", want, after=shown(want.content, want.secret) or "(empty)\n")
        ]
    before = _attributes(now.owner, now.group, now.mode)
    same = now.content == want.content
    if same and before == after:
        return []
    if same:
        return [Action("file", want.path, f"{before} -> {after}", want, before=before + "\n", after=after + "\n")]
    detail = "content" if before == after else f"content, {before} -> {after}"
    if want.secret:
        return [Action("file", want.path, detail, want, before="(old secret, not shown)\n", after=shown("", True))]
    return [
        Action("file", want.path, detail, want, before=shown(now.content), after=shown(want.content) or "(empty)\n")
    ]


def _service(
    want: Service, desired: Desired, observed: Observed, touched: frozenset[str], installing: bool
) -> list[Action]:
    now = observed.units.get(want.name, UnitState(want.name))
    actions: list[Action] = []

    def act(verb: str, why: str) -> None:
        actions.append(Action("service", want.name, f"{verb}: {why}", verb, after=f"{verb}: {why}\n"))

    if want.masked:
        if now.file_state != "masked":
            act("mask", "is to be masked")
        if now.running:
            act("stop", f"is {now.active}")
        return actions
    wanted = want.enabled is True or want.state == "started"
    if now.load == "not-found" and wanted and not installing and not _delivered(want.name, desired):
        raise NodeError(
            f"unit {want.name} does not exist: no installed package brings it and no file of this call delivers it"
        )
    masked = now.file_state == "masked" or now.load == "masked"
    if masked and wanted:
        act("unmask", "is masked")
    if want.enabled is True and (masked or now.file_state in ("", "disabled", "bad")):
        act("enable", f"is {now.file_state or 'not installed'}")
    elif want.enabled is False and now.file_state in ("enabled", "enabled-runtime"):
        act("disable", f"is {now.file_state}")
    if want.state == "stopped":
        if now.running:
            act("stop", f"is {now.active}")
    elif want.state == "started" and not now.running:
        act("start", f"is {now.active}")
    elif now.running:
        why = _newer(want.restart_on, now.active_since, observed, touched)
        if why:
            act("restart", why)
        else:
            why = _newer(want.reload_on, max(now.changed_at, now.active_since), observed, touched)
            if not why and want.reload_on and now.reload_result not in ("", "success"):
                why = f"its last reload failed ({now.reload_result})"
            if why:
                act("reload", why)
    return actions


def _newer(paths: tuple[str, ...], since: float, observed: Observed, touched: frozenset[str]) -> str:
    for path in paths:
        if path in touched:
            return f"{path} changes"
    for path in paths:
        now = observed.path(path)
        if now.kind != "absent" and now.ctime > since:
            return f"{path} is newer than the running service"
    return ""


def _delivered(unit: str, desired: Desired) -> bool:
    names = {unit}
    if "@" in unit:
        prefix, rest = unit.split("@", 1)
        names.add(f"{prefix}@.{rest.rsplit('.', 1)[1]}")
    paths = [*(f.path for f in desired.files), *(x.path for x in desired.links)]
    return any(p.startswith(_UNIT_DIRECTORIES) and os.path.basename(p) in names for p in paths)
