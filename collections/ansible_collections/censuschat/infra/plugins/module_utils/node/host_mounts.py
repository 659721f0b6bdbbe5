# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of mounts: read mountinfo and fstab, write fstab, mount and remount."""

from __future__ import annotations

from collections.abc import Sequence

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
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as handle:
        live = plan_mounts.parse_mountinfo(handle.read())
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
        commands.must(["mount", want.path], f"mounting {want.path}")
        return
    # Only what was asked for is named: the kernel keeps the other options of the mount.
    options = [o for o in want.options if o not in ("defaults", "auto", "noauto", "nofail") and not o.startswith("x-")]
    done = commands.run(["mount", "-o", f"remount,{','.join(options)}", want.path])
    if done.code != 0:
        raise NodeError(
            f"{want.path} cannot be remounted with {','.join(options)}: {done.tail(2)}; "
            "fstab has them for the next boot"
        )
