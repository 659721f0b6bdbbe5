# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of mounts: read mountinfo and fstab, write fstab, mount and remount."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ansible_collections.censuschat.infra.plugins.module_utils.node import plan_mounts
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_mounts import FSTAB, Mount, MountsSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    container,
    observe_path,
    write_atomically,
)


def observe() -> MountsSeen:
    """All mounts as the kernel has them, and fstab."""
    live = plan_mounts.parse_mountinfo(_text("/proc/self/mountinfo"))
    fstab = observe_path(FSTAB, read=True).content or ""
    return MountsSeen(live, fstab, bool(container()))


def write_fstab(actions: Sequence[Action]) -> None:
    """Put the lines of all `actions` into fstab in one write."""
    now = observe_path(FSTAB, read=True)
    text = now.content or ""
    for action in actions:
        text = plan_mounts.with_line(text, *action.payload)
    owner, group, mode = (now.owner, now.group, now.mode) if now.kind == "file" else ("root", "root", 0o644)
    write_atomically(FSTAB, text, owner, group, mode)


def apply(action: Action, commands: Commands) -> None:
    """Bring one live mount to its options."""
    want: Mount = action.payload
    if action.kind == "mount":
        mount(want.path, commands)
        return
    # Only what was asked for is named: the kernel keeps the other options of the mount.
    options = [o for o in want.options if o not in ("defaults", "auto", "noauto", "nofail") and not o.startswith("x-")]
    done = commands.run(["mount", "-o", f"remount,{','.join(options)}", want.path])
    if done.code != 0:
        raise NodeError(
            f"{want.path} cannot be remounted with {','.join(options)}: {done.tail(2)}; "
            "fstab has them for the next boot"
        )


def mount(path: str, commands: Commands) -> None:
    """Mount what fstab has for `path`, together with what lies there.

    Running programs find their files there again; this module's own code is one of them where it lies below /tmp.
    """
    line = plan_mounts.fstab_line(observe_path(FSTAB, read=True).content or "", path)
    source, _path, kind, options = line.split()[:4]
    bound = plan_mounts.sockets_below(path, _text("/proc/net/unix"))
    if bound:
        raise NodeError(
            f"{path} cannot be mounted while programs listen on sockets there ({', '.join(bound[:3])}): "
            f"end them and run again, or reboot; {FSTAB} has it for the next boot"
        )
    with _aside(["mount", "-t", kind, "-o", options, source], f"mounting {path}", commands) as staging:
        _take_along(path, staging, commands)
        commands.must(["mount", "--bind", staging, path], f"mounting {path}")


def unmount(path: str, commands: Commands) -> None:
    """Unmount `path` and leave in the directory below it what the mount held."""
    parent, name = os.path.split(path)
    with _aside(["mount", "--bind", parent], f"reaching what is below the mount {path}", commands) as staging:
        _take_along(path, os.path.join(staging, name), commands)
        commands.must(["umount", path], f"unmounting {path} (whatever uses it has to end first)")


@contextmanager
def _aside(argv: Sequence[str], what: str, commands: Commands) -> Iterator[str]:
    """Have something mounted on a directory of its own for a while."""
    staging = tempfile.mkdtemp(prefix="censuschat-mount-", dir="/run")
    try:
        commands.must([*argv, staging], what)
    except NodeError:
        os.rmdir(staging)
        raise
    try:
        yield staging
    finally:
        commands.must(["umount", staging], f"unmounting {staging}")
        os.rmdir(staging)


def _take_along(path: str, target: str, commands: Commands) -> None:
    commands.must(
        ["cp", "--archive", "--one-file-system", f"{path}/.", target],
        f"copying what is in {path} to where it will be seen (make room, or empty {path})",
    )


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as handle:
        return handle.read()
