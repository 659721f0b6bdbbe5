# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of inventories: one walk over all local filesystems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node import plan_inventory
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_mounts import Live
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    PathState,
    observe_path,
)


def observe(
    scans: Sequence[str], mounts: Mapping[str, Live], commands: Commands
) -> tuple[dict[str, tuple[str, ...]], dict[str, PathState]]:
    """What each scan finds, and the owner and mode of what was found."""
    starts = plan_inventory.starts({path: live.kind for path, live in mounts.items()})
    done = commands.run(plan_inventory.find_command(starts, scans))
    # 1: a file or directory went away while find looked at it.
    if done.code not in (0, 1):
        raise NodeError(f"the filesystems cannot be searched: {done.tail(2)}")
    found = plan_inventory.parse_found(done.out)
    return found, {path: observe_path(path) for paths in found.values() for path in paths}
