# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a guard does, as pure functions over what it knows. No clock, no network, no file is touched here."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, TypeAlias

from .model import Figures, GateRecord, HandOver, LeaseRecord, StoreView

MARKER = "censuschat_hand_over"
"""Key in Patroni's dynamic configuration by which a guard knows a pause of its own making from an operator's."""

_LEADERS = ("master", "primary", "standby_leader")
_PRIMARIES = ("master", "primary")


class Standing(enum.Enum):
    """Where this region stands with the lease."""

    HOLDER = "holder"
    HANDING_OVER = "handing over"
    FREE = "nobody holds it, this region was last"
    OTHER = "another region has it"
    NEVER = "nobody ever held it"
    BACKWARDS = "the store forgot an epoch"
    UNKNOWN = "the lease store cannot be asked"


@dataclasses.dataclass(frozen=True)
class PatroniView:
    """What Patroni on this node says. config is its dynamic configuration, the same on all nodes of the region."""

    role: str
    config: Mapping[str, Any]

    @property
    def leads(self) -> bool:
        return self.role in _LEADERS

    @property
    def is_primary(self) -> bool:
        return self.role in _PRIMARIES

    @property
    def marker(self) -> Mapping[str, object]:
        value = self.config.get(MARKER)
        return value if isinstance(value, dict) else {}


@dataclasses.dataclass(frozen=True)
class Observed:
    """Everything a guard knows when it decides. Instants are CLOCK_BOOTTIME seconds of this node."""

    node: str
    region: str
    figures: Figures
    standby_cluster: Mapping[str, Any]
    """What Patroni's dynamic configuration must say for this region to follow the other one."""
    started_at: float
    view: StoreView | None = None
    view_at: float | None = None
    """When the newest answered read was asked for."""
    renewed_at: float | None = None
    """When the newest confirmed generation was armed: before its renewal was sent."""
    shut: bool = False
    """The gate was closed by this guard and nothing was confirmed since."""
    renewal_tried: bool = False
    """A renewal was tried in this cycle."""
    remembered_epoch: int = 0
    """The highest epoch this node has ever seen; survives a restart."""
    patroni: PatroniView | None = None
    differs_since: float | None = None
    """Since when Patroni's configuration has not been what is wanted."""


# ---- actions ----


@dataclasses.dataclass(frozen=True)
class Shut:
    """Close the gate now and end the open sessions."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Renew:
    """Renew the lease; with `opens`, open the gate when that was confirmed."""

    lease: LeaseRecord
    opens: bool


@dataclasses.dataclass(frozen=True)
class Take:
    """Take the free lease back for this region with the next epoch."""

    view: StoreView


@dataclasses.dataclass(frozen=True)
class Remember:
    """Keep the highest epoch seen across restarts."""

    epoch: int


@dataclasses.dataclass(frozen=True)
class SetPatroni:
    """Change Patroni's dynamic configuration."""

    patch: Mapping[str, Any]
    reason: str


@dataclasses.dataclass(frozen=True)
class StopCleanly:
    """Hand-over, on the primary: pause Patroni, stop PostgreSQL so that all WAL is shipped, prove that it was."""

    handover: HandOver


@dataclasses.dataclass(frozen=True)
class Unregister:
    """Say in the store that this node's gate is closed for good under this epoch."""

    gate: GateRecord


Action: TypeAlias = "Shut | Renew | Take | Remember | SetPatroni | StopCleanly | Unregister"


# ---- decisions ----


def standing(o: Observed, now: float) -> Standing:
    """Where the region stands, by the newest view that is still young enough to be believed."""
    if o.view is None or o.view_at is None or now - o.view_at >= o.figures.close_after_s:
        return Standing.UNKNOWN
    epoch, lease = o.view.epoch, o.view.lease
    if o.remembered_epoch > (epoch.epoch if epoch else 0):
        return Standing.BACKWARDS
    if epoch is None:
        return Standing.NEVER
    if lease is not None:
        # A lease key of another epoch than the newest cannot come from our transactions: it gives nobody the right.
        if lease.region != o.region or lease.epoch != epoch.epoch or epoch.region != o.region:
            return Standing.OTHER
        return Standing.HANDING_OVER if o.view.active_handover() else Standing.HOLDER
    if epoch.region != o.region or o.view.active_handover():
        return Standing.OTHER
    return Standing.FREE


def renewal_is_young(o: Observed, now: float) -> bool:
    """Whether this guard's gate is open by a renewal that is not due to be closed."""
    return not o.shut and o.renewed_at is not None and 0 <= now - o.renewed_at < o.figures.close_after_s


def plan(o: Observed, now: float) -> list[Action]:
    """What to do next, most urgent first."""
    actions: list[Action] = []
    where = standing(o, now)
    view = o.view
    if view and view.epoch and view.epoch.epoch > o.remembered_epoch:
        actions.append(Remember(view.epoch.epoch))

    may_stay_open = where in (Standing.HOLDER, Standing.UNKNOWN) and renewal_is_young(o, now)
    first_try = where is Standing.HOLDER and o.renewed_at is None and not o.renewal_tried
    if not o.shut and not may_stay_open and not first_try:
        actions.append(Shut(why_shut(o, where, now)))

    if view and view.lease and not o.renewal_tried and where in (Standing.HOLDER, Standing.HANDING_OVER):
        actions.append(Renew(view.lease, opens=where is Standing.HOLDER))
    if view and where is Standing.FREE and not o.renewal_tried:
        actions.append(Take(view))
    if where is Standing.HANDING_OVER:
        actions += _hand_over(o)
    elif view and o.shut and where in (Standing.OTHER, Standing.FREE, Standing.BACKWARDS):
        actions += [Unregister(g) for g in view.gates if g.node == o.node]
    actions += _patroni(o, where, now)
    return actions


def why_shut(o: Observed, where: Standing, now: float) -> str:
    """Why the gate is closed, for people."""
    if where is Standing.HOLDER or where is Standing.UNKNOWN:
        if o.renewed_at is None:
            return f"no renewal was confirmed since the guard started ({where.value})"
        return f"the last confirmed renewal was sent {now - o.renewed_at:.1f} s ago ({where.value})"
    if where is Standing.OTHER and o.view and o.view.epoch:
        return f"epoch {o.view.epoch.epoch} belongs to {o.view.epoch.region}"
    if where is Standing.BACKWARDS:
        return f"this node has seen epoch {o.remembered_epoch}, the store knows no such epoch"
    return str(where.value)


def _hand_over(o: Observed) -> list[Action]:
    view = o.view
    handover = view.active_handover() if view else None
    # Only what the *next* cycle's view confirms as closed is reported as closed, so `shut` must hold already.
    if view is None or handover is None or not o.shut:
        return []
    proven = view.shipped_proof() is not None or not handover.require_shipped
    patroni = o.patroni
    mine = patroni is not None and patroni.marker.get("node") == o.node
    if not proven:
        if patroni is not None and (patroni.is_primary or mine) and (mine or not patroni.marker):
            return [StopCleanly(handover)]
        if patroni is None or patroni.is_primary or mine:
            return []
    elif handover.require_shipped and (patroni is None or patroni.is_primary or mine):
        # The proof stands but this node has not stepped down yet: it stays in the list until it has.
        return []
    return [Unregister(g) for g in view.gates if g.node == o.node]


def wanted_standby(o: Observed, where: Standing, now: float) -> bool | None:
    """Whether Patroni should follow the other region: True, False, or None to leave it as it is."""
    if where is Standing.HOLDER:
        return False if renewal_is_young(o, now) else None
    if where is Standing.HANDING_OVER and o.view:
        handover = o.view.active_handover()
        proven = o.view.shipped_proof() is not None or (handover is not None and not handover.require_shipped)
        return True if proven and o.shut else None
    if where in (Standing.OTHER, Standing.BACKWARDS):
        return True
    if where is Standing.UNKNOWN and o.shut and o.remembered_epoch:
        # A region that never had an epoch is being built: nothing is served there yet, and Patroni is left alone.
        known = max(x for x in (o.started_at, o.view_at, o.renewed_at) if x is not None)
        return True if now - known >= o.figures.close_after_s else None
    return None


def wanted_patch(o: Observed, where: Standing, now: float) -> dict[str, Any] | None:
    """The change of Patroni's configuration that is needed, None when it is as wanted or must be left alone."""
    standby = wanted_standby(o, where, now)
    if standby is None or o.patroni is None:
        return None
    configured = o.patroni.config.get("standby_cluster")
    present: dict[str, Any] = configured if isinstance(configured, dict) else {}
    ours = bool(o.patroni.marker)
    if standby:
        if present == dict(o.standby_cluster) and not ours:
            return None
        surplus = {name: None for name in present if name not in o.standby_cluster}
        patch: dict[str, Any] = {"standby_cluster": {**o.standby_cluster, **surplus}, "pause": None}
    else:
        if not present and not ours:
            return None
        patch = {"standby_cluster": None, "pause": None}
    if ours:
        patch[MARKER] = None
    return patch


def _patroni(o: Observed, where: Standing, now: float) -> list[Action]:
    patch = wanted_patch(o, where, now)
    if patch is None or o.patroni is None:
        return []
    # The leader's Patroni acts at once on a change made through it; a change made elsewhere waits for its loop.
    # So the others stand back, and step in only when the leader's guard does not do it.
    patience = o.figures.close_after_s - o.figures.renew_s
    waited = 0.0 if o.differs_since is None else now - o.differs_since
    if not o.patroni.leads and o.patroni.marker.get("node") != o.node and waited < patience:
        return []
    follows = patch["standby_cluster"] is not None
    return [
        SetPatroni(patch, f"follow the other region: {where.value}" if follows else "lead: this region holds the lease")
    ]


# ---- the renewal ----


@dataclasses.dataclass(frozen=True)
class Renewal:
    """What one renewal found, in the order it happened."""

    armed_at: float
    """Taken before the generation was armed in the kernel."""
    asked_at: float
    """Taken after the generation was armed and before anything was sent to the store."""
    answered_at: float
    view: StoreView
    lease: LeaseRecord
    registered: bool
    ttl_s: int
    """The store's answer to the renewal; 0 when the lease is gone."""


def why_not_confirm(r: Renewal, o: Observed) -> str:
    """Why the gate must not open on this renewal; empty when it may.

    An answer that came late still counts from before it was asked for: the kernel has been counting since then.
    """
    if not r.armed_at <= r.asked_at <= r.answered_at:
        return "the clock ran backwards during the renewal"
    checked = dataclasses.replace(o, view=r.view, view_at=r.asked_at)
    where = standing(checked, r.asked_at)
    if where is not Standing.HOLDER or r.view.lease is None:
        return where.value
    if r.view.lease.lease_id != r.lease.lease_id:
        return "the lease was taken anew while it was renewed"
    if r.ttl_s <= 0:
        return "the lease is gone"
    if r.ttl_s < o.figures.ttl_s:
        return (
            f"the lease lives only {r.ttl_s} s, less than the {o.figures.ttl_s:g} s that the gate's times are made for"
        )
    if not r.registered:
        return "this node could not be registered under the lease"
    if r.answered_at - r.armed_at >= o.figures.close_after_s:
        return f"the answer took {r.answered_at - r.armed_at:.1f} s"
    return ""
