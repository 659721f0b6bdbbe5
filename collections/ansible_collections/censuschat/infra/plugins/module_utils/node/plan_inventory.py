# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of inventories: SUID and SGID files, files that everyone may write, files of nobody."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import PathState

SUID, WORLD_WRITABLE, NO_STICKY, UNOWNED = "suid", "world_writable", "no_sticky", "unowned"
# Each with the tests of find(1) that find them, all in one walk.
TESTS: Mapping[str, tuple[str, ...]] = {
    SUID: ("-type", "f", "-perm", "/6000"),
    WORLD_WRITABLE: ("-type", "f", "-perm", "-0002"),
    NO_STICKY: ("-type", "d", "-perm", "-0002", "!", "-perm", "-1000"),
    UNOWNED: ("(", "-nouser", "-o", "-nogroup", ")"),
}
# What belongs to images and pods is not the node's: their files have users of their own.
PRUNED = (
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/docker",
    "/var/lib/kubelet/pods",
    "/run/containerd",
    "/run/user",
)
# Filesystems without files that somebody put there.
_KERNEL = "autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs fusectl hugetlbfs mqueue"
_VIRTUAL = frozenset(
    f"{_KERNEL} nsfs proc pstore rpc_pipefs securityfs selinuxfs sysfs tracefs fuse.lxcfs nfs nfs4".split(" ")
)
# More names than this help nobody in a report.
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A scan with what it may find; `strip` and `repair` say what is put right."""

    scan: str
    allowed: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()
    repair: bool = False

    @staticmethod
    def of_suid(data: Mapping[str, Any]) -> Inventory:
        return Inventory(SUID, tuple(data.get("allowed") or ()), tuple(data.get("strip") or ()))

    @staticmethod
    def of_scan(data: Mapping[str, Any]) -> Inventory:
        return Inventory(data["scan"], tuple(data.get("allowed") or ()), repair=bool(data.get("repair")))


def starts(mounts: Mapping[str, str]) -> list[str]:
    """The mount points (path to filesystem type) that a walk begins at, without virtual and pruned ones.

    /dev is one of them whatever its type: in a container its devices have groups of the machine.
    """
    return sorted(
        path
        for path, kind in mounts.items()
        if kind not in _VIRTUAL and path != "/dev" and not any(path == p or path.startswith(f"{p}/") for p in PRUNED)
    )


def find_command(mounts: Sequence[str], scans: Sequence[str]) -> list[str]:
    """One find(1) over all `mounts` that prints a letter for the scan and the path, each ended by a NUL."""
    prune = [word for path in PRUNED for word in ("-o", "-path", path)][1:]
    command = ["find", *mounts, "-xdev", "(", *prune, ")", "-prune", "-o", "("]
    for index, scan in enumerate(scans):
        command += [*((",",) if index else ()), "(", *TESTS[scan], "-printf", f"{scan} %p\\0", ")"]
    return [*command, ")"]


def parse_found(text: str) -> dict[str, tuple[str, ...]]:
    """What `find_command` printed: the scan to its paths, sorted."""
    found: dict[str, list[str]] = {scan: [] for scan in TESTS}
    for entry in text.split("\0"):
        scan, space, path = entry.partition(" ")
        if space and scan in found:
            found[scan].append(path)
    return {scan: tuple(sorted(set(paths))) for scan, paths in found.items()}


def _one_of(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def plan(want: Inventory, found: Mapping[str, Sequence[str]], states: Mapping[str, PathState]) -> list[Action]:
    """The bits to take away or to set; `states` has the mode of each path that was found."""
    actions = []
    for path in found.get(want.scan, ()):
        now = states.get(path, PathState(path))
        if now.kind == "absent" or _one_of(path, want.allowed):
            continue
        if want.scan == SUID and _one_of(path, want.strip):
            mode = now.mode & ~0o6000
        elif want.scan == WORLD_WRITABLE and want.repair:
            mode = now.mode & ~0o0002
        elif want.scan == NO_STICKY and want.repair:
            mode = now.mode | 0o1000
        else:
            continue
        before, after = f"{now.owner}:{now.group} {now.mode:04o}", f"{now.owner}:{now.group} {mode:04o}"
        payload = (now.owner, now.group, mode)
        actions.append(Action("permission", path, f"{before} -> {after}", payload, before + "\n", after + "\n"))
    return actions


def judge(want: Inventory, found: Mapping[str, Sequence[str]], stripped: Sequence[str] = ()) -> list[str]:
    """What was found, is not allowed, and is for a person to judge; one sentence for the scan.

    `stripped` is what any control of the node strips. A control that only strips judges nothing.
    """
    if want.repair or (want.scan == SUID and not want.allowed):
        return []
    known = (*want.allowed, *want.strip, *stripped)
    strange = [p for p in found.get(want.scan, ()) if not _one_of(p, known)]
    if not strange:
        return []
    names = ", ".join(strange[:SHOWN]) + (f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else "")
    said = {
        SUID: "run with the rights of their owner or group and are not in the inventory",
        WORLD_WRITABLE: "may be written by everyone",
        NO_STICKY: "are directories that everyone may write, without the sticky bit",
        UNOWNED: "belong to no user or group of this node",
    }[want.scan]
    return [f"{len(strange)} files {said}: {names}: list them under allowed, or put them right"]
