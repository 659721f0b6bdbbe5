# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of a rollback: pure, from the journals of the runs to undo and what stands now to the actions.

Several runs may have changed one thing: what the oldest of them replaced is put back, and all that any of them left is
known as ours. What is none of that was made by something else since, and is refused.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import Stands
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, shown

# Files that hold secrets: what changes in them is not shown.
_SECRET = ("/etc/shadow", "/etc/gshadow", "/etc/ssh/ssh_host_", "/var/lib/pam/")
# Its stop flushes the tables of all, once our drop-in is gone; ours are taken away by themselves.
_NEVER_STOPPED = ("nftables.service",)
_SSHD = ("/etc/ssh/sshd_config", "/etc/systemd/system/ssh.socket.d/")
# Values from which the kernel takes no other until the next boot (kernel.org, admin-guide/sysctl/kernel and Yama).
_UNTIL_BOOT = {
    "kernel.kexec_load_disabled": "1",
    "kernel.modules_disabled": "1",
    "kernel.unprivileged_bpf_disabled": "1",
    "kernel.yama.ptrace_scope": "3",
}
# What takes a mount option away again.
_INVERSE = {"noexec": "exec", "nodev": "dev", "nosuid": "suid", "ro": "rw", "noatime": "atime"}


@dataclasses.dataclass(frozen=True)
class Chain:
    """What the runs did to one path: what stood before the first, and all states that are known as theirs.

    `settled` is false when the last of them was interrupted before it could tell what it had made. `run` is the one
    whose directory has the bytes of `before`.
    """

    path: str
    before: Stands
    run: str
    known: tuple[Stands, ...]
    settled: bool
    attributes: bool = False
    """Only owner, group and mode were changed: its bytes are somebody else's."""


@dataclasses.dataclass(frozen=True)
class Now:
    """The node as it is, for what the journals speak of."""

    paths: Mapping[str, Stands] = dataclasses.field(default_factory=dict)
    kernel: Mapping[str, str] = dataclasses.field(default_factory=dict)
    units: Mapping[str, UnitState] = dataclasses.field(default_factory=dict)
    mounts: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    installed: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    audit_locked: bool = False


@dataclasses.dataclass(frozen=True)
class Rollback:
    """What to do in order, what is refused, and what is left as it is, each a sentence."""

    actions: tuple[Action, ...] = ()
    refused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def chosen(to: str, kept: Sequence[str]) -> list[str]:
    """The runs to undo, oldest first: `to` and all after it, or all since a time in UTC such as 20261121T214500.

    Nodes give their runs ids of their own; a time is what a rollback of several nodes can share.
    """
    if re.fullmatch(r"[0-9]{8}T[0-9]{6}", to):
        return [run for run in kept if run >= to]
    if to not in kept:
        known = ", ".join(kept[-5:]) if kept else "none"
        raise NodeError(f"run {to!r} is not kept on this node; the last ones are: {known}")
    return [run for run in kept if run >= to]


def chains(lines: Iterable[Mapping[str, Any]]) -> dict[str, Chain]:
    """Each path of the journals' lines (oldest first), in the order in which it was first changed."""
    found: dict[str, Chain] = {}
    for line in lines:
        if line["kind"] == "path":
            before = Stands.of(line["before"])
            attributes = bool(line.get("attributes"))
            old = found.get(line["path"])
            if old is None:
                found[line["path"]] = Chain(line["path"], before, line["run"], (before,), False, attributes)
                continue
            if old.attributes and not attributes:
                # Its bytes are ours from here on; its owner and mode were before.
                about = {"owner": old.before.owner, "group": old.before.group, "mode": old.before.mode}
                whole = dataclasses.replace(before, **about)
                old = dataclasses.replace(old, before=whole, run=line["run"], attributes=False)
            found[line["path"]] = dataclasses.replace(old, known=(*old.known, before), settled=False)
        elif line["kind"] == "after" and line["path"] in found:
            old = found[line["path"]]
            known = (*old.known, Stands.of(line["after"]))
            found[line["path"]] = dataclasses.replace(old, known=known, settled=True)
    return found


def plan(lines: Sequence[Mapping[str, Any]], now: Now, *, force: bool = False) -> Rollback:
    """The actions that bring the node back to where it was before the first of `lines`."""
    paths, refused = _plan_paths(chains(lines), now, force=force)
    touched = {a.target for a in paths}
    first = _first(lines)
    packages, left = _plan_packages(first, now)
    actions = [*packages, *paths]
    if any(path.startswith(("/etc/systemd/system/", "/usr/lib/systemd/system/")) for path in touched):
        actions.append(Action("systemd", "daemon-reload", "unit files changed"))
    kernel, until_boot = _plan_kernel(first, now)
    actions += kernel
    left += until_boot
    actions += _plan_mounts(first, now)
    actions += [
        Action("modprobe", entry["name"], "load", entry["name"], "not loaded\n", "loaded\n")
        for (kind, _name), entry in first.items()
        if kind == "module" and entry["name"].replace("-", "_") not in now.modules
    ]
    actions += _plan_units(lines, first, now, touched)
    again = {entry["kind"] for entry in first.values()}
    audited = "audit" in again and any(path.startswith("/etc/audit/") for path in touched)
    if audited and now.audit_locked:
        left.append("the loaded audit rules stay until the next boot: they are locked (-e 2)")
    elif audited:
        actions.append(Action("audit_load", "audit rules", "load the rules of the files"))
    actions += [
        Action("apparmor_load", path, "load", path)
        for (kind, path), _entry in first.items()
        if kind == "profile" and path in touched
    ]
    # A table is what its files say: without a file of it restored there is nothing to load or to unload.
    actions += [
        Action("table", name, "as it was" if entry["before"] else "not loaded", entry["before"])
        for (kind, name), entry in first.items()
        if kind == "table" and f"/etc/nftables.conf.d/{name}.nft" in touched
    ]
    return Rollback(tuple(actions), tuple(refused), tuple(left))


def _first(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The oldest line of each thing that is no path."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for line in lines:
        if line["kind"] not in ("path", "after", "rollback"):
            name = line.get("name") or line.get("key") or line.get("path") or ""
            found.setdefault((line["kind"], name), line)
    return found


def _plan_paths(found: Mapping[str, Chain], now: Now, *, force: bool) -> tuple[list[Action], list[str]]:
    actions, refused = [], []
    # In reverse: what was made last goes first, so that a directory is empty when its turn comes.
    for chain in reversed(list(found.values())):
        stands = now.paths.get(chain.path, Stands())
        only = chain.attributes
        if stands.same(chain.before, attributes=only) or (only and stands.kind != chain.before.kind):
            continue
        if chain.settled and not force and not any(_ours(stands, known, chain) for known in chain.known):
            refused.append(
                f"{chain.path} was changed by something else since: look at it, then force the rollback or put it back"
            )
            continue
        shown_now = dataclasses.replace(stands, data="") if only else stands
        before, after = text_of(shown_now, chain.path), text_of(chain.before, chain.path)
        # The bytes of these come back with proof; who may read them is no matter of logging in.
        kind = "sshd_file" if chain.path.startswith(_SSHD) and not only else "restore"
        detail = "remove" if chain.before.kind == "absent" else f"{chain.before.kind} as it was"
        actions.append(Action(kind, chain.path, detail, chain, before, after))
    return actions, refused


def _ours(stands: Stands, known: Stands, chain: Chain) -> bool:
    """Whether what stands is a state that a run knew; one noted without bytes is known by its attributes."""
    return stands.same(known, attributes=chain.attributes or (known.kind == "file" and not known.digest))


def text_of(stands: Stands, path: str) -> str:
    """What stands at `path` as a diff shows it; what may be secret is not shown."""
    if stands.kind == "absent":
        return "absent\n"
    about = f"{stands.kind} {stands.owner}:{stands.group} {stands.mode}".rstrip() + "\n"
    if path.startswith(_SECRET) or not stands.data:
        return about
    return about + shown(base64.b64decode(stands.data).decode("utf-8", "surrogateescape"))


def _plan_packages(first: Mapping[tuple[str, str], Mapping[str, Any]], now: Now) -> tuple[list[Action], list[str]]:
    actions, left = [], []
    for (kind, name), entry in first.items():
        if kind == "package" and entry["verb"] == "remove" and name not in now.installed:
            actions.append(Action("package", name, "install", name, "absent\n", "installed\n"))
        elif kind == "package" and entry["verb"] == "install" and name in now.installed:
            left.append(f"package {name} stays installed: remove it by hand if nothing needs it")
        elif kind == "account":
            left.append(f"{name} stays as the run made it ({entry['detail']}): put it right by hand where it matters")
        elif kind == "hold" and (entry["verb"] == "hold") == (name in now.held):
            actions.append(Action("hold", name, "unhold" if entry["verb"] == "hold" else "hold"))
    return actions, left


def _plan_kernel(first: Mapping[tuple[str, str], Mapping[str, Any]], now: Now) -> tuple[list[Action], list[str]]:
    actions, left = [], []
    for (kind, key), entry in first.items():
        value = now.kernel.get(key, "")
        if kind != "kernel" or key not in now.kernel or value == entry["before"]:
            continue
        if _UNTIL_BOOT.get(key) == value:
            left.append(f"{key} stays {value} until the next boot, which gives it {entry['before']}: the kernel's rule")
            continue
        detail = f"{value} -> {entry['before']}"
        actions.append(Action("sysctl", key, detail, entry["before"], f"{key} = {value}\n"))
    return actions, left


def _plan_mounts(first: Mapping[tuple[str, str], Mapping[str, Any]], now: Now) -> list[Action]:
    actions = []
    for (kind, path), entry in first.items():
        if kind != "mount" or path not in now.mounts:
            continue
        if not entry["before"]:
            actions.append(Action("umount", path, "unmount", path, "mounted\n", "not mounted\n"))
            continue
        before = set(entry["before"].split(","))
        back = [_INVERSE[o] for o in sorted(now.mounts[path] - before) if o in _INVERSE]
        if back:
            actions.append(Action("remount_back", path, f"remount with {','.join(back)}", back))
    return actions


def _plan_units(
    lines: Sequence[Mapping[str, Any]],
    first: Mapping[tuple[str, str], Mapping[str, Any]],
    now: Now,
    touched: set[str],
) -> list[Action]:
    verbs: dict[str, set[str]] = {}
    for line in lines:
        if line["kind"] == "unit":
            verbs.setdefault(line["name"], set()).add(line["verb"])
    actions = []
    for (kind, name), entry in first.items():
        if kind != "unit":
            continue
        before, unit = entry["before"], now.units.get(name, UnitState(name))
        steps = _switches(before, unit)
        if before.get("running") and not unit.running:
            steps.append(("start", f"is {unit.active}"))
        elif not before.get("running") and unit.running and name not in _NEVER_STOPPED:
            steps.append(("stop", f"is {unit.active}"))
        elif unit.running and touched and verbs[name] & {"restart", "reload"} and name != "ssh.service":
            steps.append(("restart" if "restart" in verbs[name] else "reload", "its files change"))
        actions += [Action("service", name, f"{verb}: {why}", verb, after=f"{verb}: {why}\n") for verb, why in steps]
    return actions


def _switches(before: Mapping[str, Any], unit: UnitState) -> list[tuple[str, str]]:
    if "file_state" not in before:
        return []
    was, now = str(before["file_state"]), unit.file_state
    steps = []
    if was == "masked" and now != "masked":
        steps.append(("mask", f"is {now or 'not masked'}"))
    elif was != "masked" and now == "masked":
        steps.append(("unmask", "is masked"))
    if was == "enabled" and now not in ("enabled", "masked"):
        steps.append(("enable", f"is {now}"))
    elif was in ("", "disabled") and now == "enabled":
        steps.append(("disable", "is enabled"))
    return steps
