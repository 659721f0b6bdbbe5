# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which Redis is the primary: what was observed, what is wanted, and the actions between them.

``plan`` and ``parse_info`` are pure. The role of a Redis is kept in two places that must agree: in the running server,
and in a file that the server's configuration includes, so that a restart keeps the role.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

MANAGED = "# Written by censuschat.infra.redis_replication; included by redis.conf.\n"


class State(enum.Enum):
    """What is wanted of a Redis."""

    PRIMARY = "primary"
    REPLICA = "replica"
    OBSERVED = "observed"


class ReplicationError(Exception):
    """Redis could not be asked or did not obey; says what, where, why and what to do next."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where another Redis is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Desired:
    """``primary`` is whom a replica follows. ``bootstrap``: leave a node whose role was decided before as it is."""

    state: State
    primary: Address | None = None
    bootstrap: bool = False


@dataclasses.dataclass(frozen=True)
class Observed:
    """One Redis. ``running``: it answered. ``primary``: whom it follows, None when it is a primary itself.

    ``link_up``: a replica's connection to its primary is up and its first copy is complete. ``offset``: bytes of the
    replication stream written (primary) or received (replica). ``replicas``: connected to it. ``file``: what the
    included file says, None when there is none.
    """

    running: bool
    primary: Address | None = None
    link_up: bool = False
    offset: int = 0
    replicas: int = 0
    file: str | None = None

    @property
    def role(self) -> str | None:
        """primary, replica, or None when it does not run."""
        if not self.running:
            return None
        return "replica" if self.primary else "primary"


@dataclasses.dataclass(frozen=True)
class Action:
    """One change: ``file`` (write the included file), ``command`` (tell the running server)."""

    kind: str
    target: str
    detail: str


def file_for(desired: Desired) -> str:
    """The included file that keeps the wanted role over a restart."""
    if desired.state is State.REPLICA and desired.primary is not None:
        return f"{MANAGED}replicaof {desired.primary.host} {desired.primary.port}\n"
    return MANAGED


def plan(observed: Observed, desired: Desired, path: str) -> list[Action]:
    """The actions that take ``observed`` to ``desired``; none when it is there.

    The file comes first: a server that is told and then restarted before its file is written would fall back.
    """
    if desired.state is State.OBSERVED or (desired.bootstrap and observed.file is not None):
        return []
    actions = []
    wanted = file_for(desired)
    follow = desired.primary if desired.state is State.REPLICA else None
    said = f"replica of {follow}" if follow else "primary"
    if observed.file != wanted:
        actions.append(Action("file", path, said))
    # A server that does not run (check mode on a bare node) starts as a primary.
    if (observed.primary if observed.running else None) != follow:
        actions.append(
            Action("command", f"REPLICAOF {follow.host} {follow.port}" if follow else "REPLICAOF NO ONE", said)
        )
    return actions


def parse_info(text: str) -> Observed:
    """What ``INFO replication`` says of a running Redis. Raises ReplicationError when it is not that."""
    info = dict(line.split(":", 1) for line in text.replace("\r", "").splitlines() if ":" in line)
    role = info.get("role")
    if role == "master":
        return Observed(
            running=True, offset=_number(info, "master_repl_offset"), replicas=_number(info, "connected_slaves")
        )
    if role == "slave":
        return Observed(
            running=True,
            primary=Address(info.get("master_host", ""), _number(info, "master_port")),
            link_up=info.get("master_link_status") == "up" and info.get("master_sync_in_progress") == "0",
            offset=_number(info, "slave_repl_offset"),
            replicas=_number(info, "connected_slaves"),
        )
    raise ReplicationError(f"INFO replication gave no role but: {' '.join(text.split())[:200]!r}")


def _number(info: Mapping[str, str], name: str) -> int:
    try:
        return int(info[name])
    except (KeyError, ValueError):
        return 0
