# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of etcd_member: pure. A member restarts only when the cluster can do without it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence


class Step(enum.Enum):
    """What to do next with the member."""

    NOTHING = "nothing"
    START = "start"
    RESTART = "restart"
    """Restart at once: the cluster has no quorum that could be lost."""
    RESTART_IN_TURN = "restart in turn"
    """Restart when it is this member's turn and all other members serve."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """The member as it is.

    active: the unit runs. empty: it has no data. stale: files that are newer than the running process.
    serving: names of the members that answer a health check, which needs a quorum.
    """

    active: bool
    empty: bool = False
    stale: tuple[str, ...] = ()
    serving: frozenset[str] = frozenset()


def plan(observed: Observed) -> tuple[Step, str]:
    """The next step and why."""
    if not observed.active:
        return Step.START, "it does not run"
    if not observed.stale:
        return Step.NOTHING, ""
    why = f"{', '.join(observed.stale)} newer than the running member"
    if not observed.serving:
        return Step.RESTART, f"{why}; no member serves, so there is no quorum to lose"
    return Step.RESTART_IN_TURN, why


def may_restart(name: str, members: Sequence[str], serving: frozenset[str]) -> str:
    """Why `name` may not be restarted now; empty when it may."""
    missing = [m for m in members if m != name and m not in serving]
    return f"{', '.join(missing)} not serving" if missing else ""


def may_rejoin(name: str, members: Sequence[str], observed: Observed, serving: frozenset[str]) -> bool:
    """Whether a member that could not start may give up its old place in the cluster and take a new one.

    Only one that had no data, as on a node that was built anew, while the others have a quorum without it: they know it
    as a member that once was there, and refuse it as a new one.
    """
    others = [m for m in members if m != name and m in serving]
    return observed.empty and len(others) > len(members) // 2
