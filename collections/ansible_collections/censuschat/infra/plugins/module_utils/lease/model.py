# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The typed words of the write lease: what is stored, what a guard knows, what it may do.

All instants are seconds of CLOCK_BOOTTIME of the machine that took them: they can be subtracted from each other and
mean nothing elsewhere. The wall clock appears in records only to be read by people.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any


class LeaseError(Exception):
    """Something about the lease that an operator must read: what, where, why, what next."""


def boottime() -> float:
    """Seconds since boot, time spent in suspend included (CLOCK_MONOTONIC would hide a suspend)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclasses.dataclass(frozen=True)
class Figures:
    """The four times of the lease, in seconds. Their order is the whole safety argument."""

    ttl_s: float
    """How long the lease outlives its last renewal, counted by the store."""
    renew_s: float
    """How often a guard renews."""
    close_after_s: float
    """Age of the last confirmed renewal at which a guard closes the gate, ends sessions and demotes."""
    kernel_after_s: float
    """Age at which the kernel closes the gate by itself, whatever the guard does."""

    def problems(self) -> list[str]:
        """Why these figures must not be used; empty when they may."""
        found = []
        if not 0 < self.renew_s < self.close_after_s < self.kernel_after_s < self.ttl_s:
            found.append(
                "0 < renew < close_after < kernel_after < ttl does not hold: "
                f"renew {self.renew_s:g}, close_after {self.close_after_s:g}, "
                f"kernel_after {self.kernel_after_s:g}, ttl {self.ttl_s:g}"
            )
        if self.close_after_s < 2 * self.renew_s:
            found.append(
                f"close_after {self.close_after_s:g} leaves no second try after a lost renewal (renew {self.renew_s:g})"
            )
        if self.ttl_s < 5:
            found.append(f"ttl {self.ttl_s:g} is near etcd's own minimum; take at least 5")
        return found


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """Who was last given the right to write. Never deleted; only ever replaced by a higher epoch."""

    epoch: int
    region: str
    taken_at_wall: float = 0.0
    by: str = ""


@dataclasses.dataclass(frozen=True)
class LeaseRecord:
    """Who may write now. Bound to a store lease, so it goes when nobody renews."""

    epoch: int
    region: str
    lease_id: int = 0
    """The store's id of the lease the key is bound to (not part of the value)."""


@dataclasses.dataclass(frozen=True)
class HandOver:
    """A planned change of region: the holder of `epoch` is to close, ship everything and step down."""

    to: str
    epoch: int
    by: str = ""
    require_shipped: bool = True


@dataclasses.dataclass(frozen=True)
class GateRecord:
    """A node whose gate may be open. Its guard writes it anew in every renewal, after arming and before confirming, and
    deletes it after it closed for good.

    So a record that has not been written for kernel_after_s is that of a closed gate, whatever became of its guard, of
    the lease and of the store's own clocks.
    """

    node: str
    region: str
    epoch: int
    kernel_after_s: float = 60.0
    """How long this node's kernel keeps the gate open after arming. The default is for records that do not say."""
    revision: int = dataclasses.field(default=0, compare=False)
    """The store's revision of the newest writing (not part of the value)."""


@dataclasses.dataclass(frozen=True)
class Follower:
    """How the other region follows, as the primary's guard sees it: what a hand-over may be begun upon."""

    node: str
    epoch: int
    streaming: bool


@dataclasses.dataclass(frozen=True)
class Shipped:
    """Proof of a hand-over: after its gate closed, `node` saw the other region hold all WAL up to `lsn`."""

    epoch: int
    node: str
    lsn: str


@dataclasses.dataclass(frozen=True)
class StoreView:
    """One linearizable read of everything the lease store says."""

    epoch: EpochRecord | None = None
    lease: LeaseRecord | None = None
    handover: HandOver | None = None
    gates: tuple[GateRecord, ...] = ()
    shipped: Shipped | None = None
    follower: Follower | None = None
    epoch_revision: int = 0
    """Store revision of the epoch key (0: absent): what a taker compares, so that two takers cannot both win."""

    def active_handover(self) -> HandOver | None:
        """The hand-over that concerns the present epoch; one left over from an older epoch is void."""
        if self.handover and self.epoch and self.handover.epoch == self.epoch.epoch:
            return self.handover if self.handover.to != self.epoch.region else None
        return None

    def shipped_proof(self) -> Shipped | None:
        if self.shipped and self.epoch and self.shipped.epoch == self.epoch.epoch:
            return self.shipped
        return None

    def is_followed(self) -> bool:
        """Whether the other region streams from the holder with little left to send."""
        return bool(
            self.follower and self.lease and self.follower.epoch == self.lease.epoch and self.follower.streaming
        )

    def holders_gates(self) -> tuple[GateRecord, ...]:
        """Gates of the region of the newest epoch: the only ones that may be open, whether its lease lives or not.

        Another region's gates were closed when that epoch was taken, or it could not have been taken.
        """
        return tuple(g for g in self.gates if self.epoch and g.region == self.epoch.region)

    def open_gates(self) -> tuple[GateRecord, ...]:
        """Gates that may be open under the present lease."""
        return tuple(g for g in self.gates if self.lease and g.epoch == self.lease.epoch)


def encode(record: EpochRecord | LeaseRecord | HandOver | GateRecord | Follower | Shipped) -> str:
    """The record as the JSON that is stored."""
    fields = dataclasses.asdict(record)
    for not_stored in ("lease_id", "revision"):
        fields.pop(not_stored, None)
    return json.dumps(fields, sort_keys=True)


def decode(kind: type[Any], text: str, where: str, **extra: Any) -> Any:
    """The record of `kind` in `text`; unknown fields are ignored, so that versions can run side by side.

    Raises LeaseError naming `where` when it is not such a record: what cannot be read must not be acted upon.
    """
    try:
        raw: Mapping[str, Any] = json.loads(text)
        known = {f.name: f.type for f in dataclasses.fields(kind)}
        values = {name: value for name, value in raw.items() if name in known}
        record = kind(**{**values, **extra})
        if "epoch" in known and (not isinstance(record.epoch, int) or isinstance(record.epoch, bool)):
            raise TypeError("epoch is not a number")
        for name in ("region", "node", "to"):
            if name in known and not isinstance(getattr(record, name), str):
                raise TypeError(f"{name} is not text")
    except (ValueError, TypeError, AttributeError) as error:
        raise LeaseError(f"{where} does not hold a {kind.__name__}: {error}") from error
    return record
