# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of patroni_cluster: pure. What a region's cluster still lacks, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# The guard of the write lease owns these: whoever else writes them could make a second primary.
GUARDED = ("standby_cluster", "pause")


@dataclasses.dataclass(frozen=True)
class Member:
    """A member as the region's store knows it; role is leader, standby_leader, sync_standby or replica."""

    name: str
    role: str
    state: str
    host: str
    url: str
    timeline: int = 0
    pending_restart: bool = False


@dataclasses.dataclass(frozen=True)
class Node:
    """What one node's Patroni says of its own PostgreSQL. Positions are bytes.

    received: WAL that is on its disk; for a primary what it wrote. followers: addresses that stream from it.
    """

    url: str
    role: str = ""
    state: str = ""
    timeline: int = 0
    received: int = 0
    replayed: int = 0
    followers: frozenset[str] = frozenset()

    @property
    def primary(self) -> bool:
        return self.role in ("master", "primary") and self.state == "running"


@dataclasses.dataclass(frozen=True)
class Local:
    """PostgreSQL of the node the module runs on. receiving: its WAL receiver streams."""

    name: str = ""
    receiving: bool = False
    database_state: str = ""
    checkpoint: int = 0


@dataclasses.dataclass(frozen=True)
class View:
    """A region's cluster and its peers at one moment. `error` says why there is no view."""

    members: tuple[Member, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    leader: Node | None = None
    local: Local = Local()
    peers: tuple[Node, ...] = ()
    error: str = ""

    @property
    def leading(self) -> Member | None:
        return next((m for m in self.members if m.role in ("leader", "standby_leader")), None)

    @property
    def standby(self) -> bool:
        return bool(self.config.get("standby_cluster"))

    @property
    def paused(self) -> bool:
        return bool(self.config.get("pause"))

    @property
    def role(self) -> str:
        """primary, standby, or none while there is no leader that plays its part."""
        if self.leading is None or self.leader is None or self.leader.state != "running":
            return "none"
        if self.leader.primary:
            return "primary"
        return "standby" if self.leader.role == "standby_leader" else "none"

    @property
    def upstream(self) -> Node | None:
        """The peer that is primary."""
        return next((p for p in self.peers if p.primary), None)

    @property
    def streaming(self) -> tuple[str, ...]:
        """Names of the members that stream from the leader."""
        followers = self.leader.followers if self.leader else frozenset()
        return tuple(sorted(m.name for m in self.members if m.host in followers))

    @property
    def follows(self) -> bool:
        """Whether this node's replica streams its leader's timeline.

        On an abandoned timeline the receiver streams for a moment, is told that it ended, and starts over.
        """
        own = next((m for m in self.members if m.name == self.local.name), None)
        timeline = self.leader.timeline if self.leader else 0
        return self.local.receiving and own is not None and own.timeline >= timeline

    @property
    def behind(self) -> int | None:
        """Bytes that the peer region's primary has written and this leader has not replayed."""
        if self.leader is None or self.upstream is None:
            return None
        return max(0, self.upstream.received - self.leader.replayed)


@dataclasses.dataclass(frozen=True)
class Want:
    """The condition to wait for. state: observed, running, primary or standby."""

    state: str = "observed"
    members: int = 0
    lag_bytes: int | None = None
    timeline: int = 0
    replayed: int = 0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repair: bool = False


def missing(want: Want, view: View) -> list[str]:
    """What is still missing, in sentences; empty when the cluster is as wanted."""
    if want.state == "observed":
        return []
    if view.error:
        return [view.error]
    if view.leading is None or view.leader is None:
        return ["the region has no leader"]
    name = view.leading.name
    if view.role == "none":
        return [f"leader {name} is {view.leader.role or 'without a role'}, {view.leader.state or 'without a state'}"]
    if want.state in ("primary", "standby") and view.role != want.state:
        return [f"the region is {view.role}, not {want.state}"]
    lacks: list[str] = []
    if want.members and 1 + len(view.streaming) < want.members:
        absent = [m.name for m in view.members if m.name not in view.streaming and m.name != name]
        lacks.append(
            f"{len(view.streaming)} of {want.members - 1} members stream from {name}"
            + (f"; not: {', '.join(absent)}" if absent else "")
        )
    synchronous = any(m.role == "sync_standby" and m.name in view.streaming for m in view.members)
    if view.role == "primary" and want.members > 1 and view.config.get("synchronous_mode") and not synchronous:
        lacks.append(f"{name} has no synchronous standby")
    if view.role == "standby" and view.peers:
        lacks += _upstream_lacks(want, view, name)
    if want.timeline and view.leader.timeline < want.timeline:
        lacks.append(f"{name} is on timeline {view.leader.timeline}, not yet on {want.timeline}")
    if want.replayed and view.leader.replayed < want.replayed:
        lacks.append(f"{name} has replayed {lsn(view.leader.replayed)}, not yet {lsn(want.replayed)}")
    if view.paused:
        lacks.append("Patroni is paused")
    return lacks


def _upstream_lacks(want: Want, view: View, name: str) -> list[str]:
    leading = view.leading
    if leading is None or not any(leading.host in p.followers for p in view.peers):
        return [f"{name} does not stream from the other region"]
    if want.lag_bytes is None:
        return []
    if view.behind is None:
        return ["the other region has no primary"]
    if view.behind > want.lag_bytes:
        return [f"{name} is {view.behind} bytes behind, more than {want.lag_bytes}"]
    return []


def config_patch(want: Mapping[str, Any], have: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest merge patch after which `have` contains `want`.

    What `want` does not name stays; what it sets to None goes.
    """
    patch: dict[str, Any] = {}
    for key, value in want.items():
        now = have.get(key)
        if isinstance(value, Mapping):
            inner = config_patch(value, now if isinstance(now, Mapping) else {})
            if inner:
                patch[key] = inner
        elif not _same(value, now) and not (value is None and key not in have):
            patch[key] = value
    return patch


def _same(want: Any, have: Any) -> bool:
    # PostgreSQL's parameters may be stored as text where a number was meant.
    if isinstance(want, bool) or isinstance(have, bool):
        return want is have
    return have is not None and str(want) == str(have)


def repair(want: Want, view: View, unwell_s: float, rewound: bool, grace_s: float) -> str:
    """What to do with this node: "rewind", "reinitialize" or "".

    A replica of a standby region that has WAL of an abandoned timeline is not noticed by Patroni 3.0: it neither
    follows nor rewinds. Stopped, it is recovered with pg_rewind; when that did not help it is cloned from its leader.
    unwell_s: for how long it has not followed. Only a replica is touched, and only below a leader that is well.
    """
    local = next((m for m in view.members if m.name == view.local.name), None)
    if not want.repair or local is None or view.leader is None or local == view.leading:
        return ""
    if view.follows or unwell_s < grace_s or view.role == "none" or view.paused:
        return ""
    if view.role == "standby" and view.leading and not any(view.leading.host in p.followers for p in view.peers):
        return ""
    if local.state == "creating replica":
        return ""  # Patroni is cloning it already, however long that takes; it has no timeline yet.
    diverged = view.role == "standby" and 0 < local.timeline < view.leader.timeline
    if diverged and not rewound:
        return "rewind"
    # A rewind and a start take their time; a clone in between would throw them away.
    return "reinitialize" if unwell_s >= 4 * grace_s else ""


def lsn(position: int) -> str:
    """A byte position as PostgreSQL writes it, as in 0/3000148."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def position(text: str) -> int:
    """The byte position of an LSN as PostgreSQL writes it; ValueError when it is none."""
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def guarded(config: Mapping[str, Any]) -> Sequence[str]:
    """Keys of `config` that only the guard of the write lease may change."""
    return [key for key in GUARDED if key in config]
