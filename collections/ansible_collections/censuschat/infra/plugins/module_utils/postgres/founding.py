# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of patroni_founding: pure. A region founds a new database only when no region has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


class FoundingError(Exception):
    """A failure the user can act on."""


@dataclasses.dataclass(frozen=True)
class Store:
    """What a region's store holds of the database cluster.

    system: the database's system identifier, once it was founded or cloned.
    configured: a dynamic configuration is there.
    """

    region: str
    reachable: bool
    system: str = ""
    configured: bool = False
    reason: str = ""

    @property
    def virgin(self) -> bool:
        return self.reachable and not self.system and not self.configured


def plan(own: Store, peers: Sequence[Store]) -> tuple[bool, str]:
    """Whether `own` founds the database now, and why (not). FoundingError when that cannot be known."""
    if not own.reachable:
        raise FoundingError(
            f"the store of {own.region} does not answer ({own.reason}): bring its etcd up first, then run again"
        )
    if own.system:
        return False, f"{own.region} has database {own.system}"
    if own.configured:
        return False, f"{own.region} is being founded"
    for peer in peers:
        if peer.system:
            return False, f"{peer.region} has database {peer.system}; {own.region} clones it"
    silent = [p for p in peers if not p.reachable]
    if silent:
        raise FoundingError(
            f"{own.region} has no database, and whether {silent[0].region} has one cannot be known: its store does not "
            f"answer ({silent[0].reason}). Founding a second database would split the data. Bring that store up, then "
            "run again"
        )
    return True, "no region has a database"
