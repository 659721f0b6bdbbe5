# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The lease protocol on etcd: what is read, and the few transactions that may change it.

Each change compares what its planner saw, so a plan made on an old view fails instead of harming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from . import etcd
from .model import (
    EpochRecord,
    Follower,
    GateRecord,
    HandOver,
    LeaseError,
    LeaseRecord,
    Shipped,
    StoreView,
    decode,
    encode,
)

_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]*$")


def view_of(pairs: Sequence[etcd.KeyValue], prefix: str) -> StoreView:
    """What one read of everything below `prefix` says. Raises LeaseError on a record that cannot be read."""
    found: dict[str, Any] = {}
    gates = []
    for pair in pairs:
        name = pair.key[len(prefix) :]
        where = f"key {pair.key} of the lease store"
        if name == "epoch":
            found["epoch"] = decode(EpochRecord, pair.value, where)
            found["epoch_revision"] = pair.mod_revision
        elif name == "lease":
            if not pair.lease_id:
                raise LeaseError(
                    f"{where} is bound to no lease: it would never end. Delete it and take the lease again."
                )
            found["lease"] = decode(LeaseRecord, pair.value, where, lease_id=pair.lease_id)
        elif name == "handover":
            found["handover"] = decode(HandOver, pair.value, where)
        elif name == "shipped":
            found["shipped"] = decode(Shipped, pair.value, where)
        elif name == "follower":
            found["follower"] = decode(Follower, pair.value, where)
        elif name.startswith("gates/"):
            gates.append(decode(GateRecord, pair.value, where, revision=pair.mod_revision))
    return StoreView(gates=tuple(gates), **found)


class LeaseStore:
    """The write lease of one environment. Methods raise etcd.EtcdError or LeaseError."""

    def __init__(self, client: etcd.Etcd, environment: str) -> None:
        if not _NAME.match(environment):
            raise LeaseError(f"'{environment}' is no name for an environment: small letters, digits, dot and dash")
        self.client = client
        self.prefix = f"/censuschat/{environment}/"

    def key(self, name: str) -> str:
        return self.prefix + name

    def observe(self, deadline: float | None = None) -> StoreView:
        return view_of(self.client.read(self.prefix, deadline), self.prefix)

    def keep_alive(self, lease_id: int, deadline: float | None = None) -> int:
        """Renew; the lease's time to live in seconds as the store counts it, 0 when it is gone."""
        return self.client.keep_alive(lease_id, deadline)

    def _gate_key(self, gate: GateRecord) -> str:
        return self.key(f"gates/{gate.region}/{gate.node}")

    def register(self, gate: GateRecord, lease_id: int, deadline: float | None = None) -> bool:
        """Write the node's record anew: its gate may open. False: the lease changed, or is being handed over."""
        return self.client.transaction(
            [etcd.bound_to(self.key("lease"), lease_id), etcd.absent(self.key("handover"))],
            [etcd.put(self._gate_key(gate), encode(gate))],
            deadline,
        )

    def unregister(self, gate: GateRecord) -> bool:
        """Say that this node's gate is closed for good: delete the record that was seen.

        A record written since then stays, so a request that is carried out late cannot hide a gate that opened again.
        """
        key = self._gate_key(gate)
        return self.client.transaction([etcd.unchanged(key, gate.revision)], [etcd.delete(key)])

    def record_follower(self, follower: Follower, lease_id: int) -> bool:
        """Say how the other region follows; forgotten with the lease."""
        return self.client.transaction(
            [etcd.bound_to(self.key("lease"), lease_id)],
            [etcd.put(self.key("follower"), encode(follower), lease_id)],
        )

    def record_shipped(self, proof: Shipped, handover: HandOver) -> bool:
        """Leave the proof that the other region holds all of this region's WAL."""
        return self.client.transaction(
            [etcd.has_value(self.key("handover"), encode(handover))], [etcd.put(self.key("shipped"), encode(proof))]
        )

    def take(
        self,
        view: StoreView,
        region: str,
        *,
        ttl_s: float,
        wall: float,
        by: str,
        quiet_revision: int = 0,
        epoch_floor: int = 0,
    ) -> LeaseRecord:
        """Take the free lease with the next epoch; exactly one of several takers wins.

        The transaction holds only if no lease exists, the epoch is still the one in `view` and, when that is another
        region's, none of its gate records was written after quiet_revision. epoch_floor: the epoch to go above when
        the store lost its memory. Raises LeaseError when somebody else was faster.
        """
        conditions = [etcd.absent(self.key("lease")), *self._closed(view, region, quiet_revision)]
        return self._replace(view, region, conditions, ttl_s=ttl_s, wall=wall, by=by, epoch_floor=epoch_floor)

    def swap(
        self, view: StoreView, handover: HandOver, *, ttl_s: float, wall: float, by: str, quiet_revision: int = 0
    ) -> LeaseRecord:
        """Finish a hand-over: in one transaction the lease goes from a holder whose gates are all closed to `to`."""
        if view.lease is None:
            raise LeaseError("there is no lease to hand over")
        conditions = [
            etcd.bound_to(self.key("lease"), view.lease.lease_id),
            etcd.has_value(self.key("handover"), encode(handover)),
            *self._closed(view, handover.to, quiet_revision),
        ]
        if handover.require_shipped:
            conditions.append(etcd.present(self.key("shipped")))
        return self._replace(view, handover.to, conditions, ttl_s=ttl_s, wall=wall, by=by)

    def _closed(self, view: StoreView, region: str, quiet_revision: int) -> list[dict[str, Any]]:
        if view.epoch is None or view.epoch.region == region:
            return []
        return [etcd.no_newer(self.key(f"gates/{view.epoch.region}/"), quiet_revision)]

    def _replace(
        self,
        view: StoreView,
        region: str,
        conditions: Sequence[dict[str, Any]],
        *,
        ttl_s: float,
        wall: float,
        by: str,
        epoch_floor: int = 0,
    ) -> LeaseRecord:
        last = max(view.epoch.epoch if view.epoch else 0, epoch_floor)
        lease_id = self.client.grant(ttl_s)
        epoch = EpochRecord(last + 1, region, round(wall, 3), by)
        lease = LeaseRecord(epoch.epoch, region, lease_id)
        # What the other region's closed gates left is of no use any more.
        old = view.epoch.region if view.epoch and view.epoch.region != region else None
        try:
            done = self.client.transaction(
                [etcd.unchanged(self.key("epoch"), view.epoch_revision), *conditions],
                [
                    etcd.put(self.key("epoch"), encode(epoch)),
                    etcd.put(self.key("lease"), encode(lease), lease_id),
                    etcd.delete(self.key("handover")),
                    etcd.delete(self.key("shipped")),
                    *([etcd.delete_below(self.key(f"gates/{old}/"))] if old else []),
                ],
            )
        except etcd.EtcdUnreachable:
            # The answer was lost, not necessarily the change: look who has it.
            done = False
        if not done:
            now = self.observe()
            if now.lease is None or now.lease.lease_id != lease_id:
                self.client.revoke(lease_id)
                holder = (
                    f"{now.lease.region} holds it with epoch {now.lease.epoch}" if now.lease else "the store changed"
                )
                raise LeaseError(f"the lease could not be taken for {region}: {holder}")
        return lease

    def put_handover(self, handover: HandOver, lease_id: int) -> bool:
        """Ask the holder to hand over. False: the lease changed meanwhile."""
        return self.client.transaction(
            [etcd.bound_to(self.key("lease"), lease_id)],
            [etcd.put(self.key("handover"), encode(handover)), etcd.delete(self.key("shipped"))],
        )

    def cancel_handover(self, handover: HandOver) -> bool:
        """Withdraw a hand-over that was not finished. False: it is no longer there."""
        return self.client.transaction(
            [etcd.has_value(self.key("handover"), encode(handover))],
            [etcd.delete(self.key("handover")), etcd.delete(self.key("shipped"))],
        )

    def release(self, lease: LeaseRecord, revision: int) -> bool:
        """End a lease that no gate was opened under since `revision`. False: it changed meanwhile."""
        done = self.client.transaction(
            [etcd.bound_to(self.key("lease"), lease.lease_id), etcd.no_newer(self.key("gates/"), revision)],
            [etcd.delete(self.key("lease"))],
        )
        if done:
            self.client.revoke(lease.lease_id)
        return done
