# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Giving the write lease to a region on an operator's behalf: pure decisions, and the loop that carries them out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from .model import HandOver, LeaseError, LeaseRecord, StoreView, boottime
from .quiet import QuietWatch

CHECK_S, QUIET_S = 0.6, 0.35
"""Parts of a lease's time to live. In check mode a holder is watched for the first: guards renew five times in a time
to live at least, so one that lives renews often enough meanwhile to be refused. One that is quiet for the second does
not live."""
RENEWALS_TO_REFUSE = 3
"""Renewals seen while waiting after which the holder counts as alive. One or two may have been under way."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the operator wants. region: who is to hold the lease; wait_s: the longest wait for it, in seconds."""

    state: str
    region: str
    ttl_s: float
    wait_s: float
    by: str = ""
    initial: bool = False
    """Only if nobody ever held the lease (a new environment)."""
    require_shipped: bool = True
    epoch_floor: int = 0
    """Go above this epoch: for a lease store that lost its memory."""


@dataclasses.dataclass(frozen=True)
class Waiting:
    """What the wait has shown so far."""

    elapsed_s: float = 0.0
    renewals_seen: int = 0
    last_renewal_age_s: float = math.inf
    """Seconds since the holder's newest renewal was first seen."""
    awake: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Nodes of the region of the newest epoch whose gates may be open, and for how many seconds if nothing comes."""
    revision: int = 0
    """The newest revision of that region's gate records."""


# ---- decisions ----


@dataclasses.dataclass(frozen=True)
class Done:
    detail: str


@dataclasses.dataclass(frozen=True)
class TakeIt:
    detail: str
    quiet_revision: int = 0


@dataclasses.dataclass(frozen=True)
class AskHolder:
    """Ask the holder to hand over."""

    handover: HandOver
    lease: LeaseRecord


@dataclasses.dataclass(frozen=True)
class Swap:
    """Finish a hand-over whose conditions hold."""

    handover: HandOver
    quiet_revision: int = 0


@dataclasses.dataclass(frozen=True)
class Withdraw:
    """Withdraw a hand-over; with `then`, fail with that message."""

    handover: HandOver
    then: str = ""


@dataclasses.dataclass(frozen=True)
class Release:
    """End a lease under which no gate is open."""

    lease: LeaseRecord
    revision: int = 0
    """The newest revision of the gates' records that were seen."""


@dataclasses.dataclass(frozen=True)
class Wait:
    detail: str


@dataclasses.dataclass(frozen=True)
class Refuse:
    detail: str


Decision: TypeAlias = "Done | TakeIt | AskHolder | Swap | Withdraw | Release | Wait | Refuse"


def decide(view: StoreView, request: Request, waiting: Waiting) -> Decision:
    """The next thing to do about the request."""
    if request.state == "released":
        return _decide_released(view, request)
    if request.initial and view.epoch is not None:
        return Done(f"epoch {view.epoch.epoch} exists already, so this is no new environment: nothing is taken")
    if view.lease is not None and view.lease.epoch <= request.epoch_floor:
        # Guards that have seen a higher epoch do not renew this one, so it ends by itself.
        detail = f"{view.lease.region} holds epoch {view.lease.epoch}, not above {request.epoch_floor}"
        if waiting.elapsed_s >= request.wait_s:
            return Refuse(
                f"{detail}, and a guard renews it: is epoch_floor right? 'censuschat-guard status' knows epochs"
            )
        return Wait(detail)
    if request.state == "handed_over":
        return _decide_handover(view, request, waiting)
    return _decide_held(view, request, waiting)


def _decide_held(view: StoreView, request: Request, waiting: Waiting) -> Decision:
    lease, handover = view.lease, view.active_handover()
    if lease is None:
        last = f"epoch {view.epoch.epoch} of {view.epoch.region} has ended" if view.epoch else "nobody ever held it"
        return _take(view, request, waiting, last)
    if lease.region == request.region:
        if handover is not None:
            return Withdraw(handover)
        return Done(f"{lease.region} holds epoch {lease.epoch}")
    if waiting.renewals_seen >= RENEWALS_TO_REFUSE:
        age = f", the last {waiting.last_renewal_age_s:.1f} s ago"
        return Refuse(
            f"{lease.region} holds the write lease with epoch {lease.epoch} and keeps renewing it "
            f"({waiting.renewals_seen} renewals in {waiting.elapsed_s:.0f} s{age}): it is alive, and taking its place "
            f"would make two writers. To move the right to write to {request.region} in a planned way, use "
            f"state=handed_over region={request.region}. To see why {lease.region} is alive, run "
            "'censuschat-guard status' on its database nodes."
        )
    if waiting.elapsed_s >= request.wait_s:
        return Refuse(
            f"{lease.region} still holds the write lease with epoch {lease.epoch} after {waiting.elapsed_s:.0f} s, "
            f"last renewal seen {waiting.last_renewal_age_s:.0f} s ago: run this again"
        )
    return Wait(f"{lease.region} holds epoch {lease.epoch}, last renewal seen {waiting.last_renewal_age_s:.0f} s ago")


def _decide_released(view: StoreView, request: Request) -> Decision:
    """Only a lease that nobody writes under ends at once: anybody else's is handed over, or runs out."""
    lease = view.lease
    if lease is None:
        return Done("nobody holds it")
    if lease.region != request.region:
        return Refuse(
            f"{lease.region} holds the lease with epoch {lease.epoch}: it is not {request.region}'s to release"
        )
    if view.open_gates() or view.active_handover():
        nodes = ", ".join(sorted(gate.node for gate in view.open_gates())) or "a hand-over"
        return Refuse(
            f"{lease.region} uses the lease with epoch {lease.epoch} ({nodes}), and ending it would close its "
            "database. Nothing was touched. To move the right to write, use state=handed_over region=REGION."
        )
    return Release(lease, max((gate.revision for gate in view.gates), default=0))


def _take(view: StoreView, request: Request, waiting: Waiting, detail: str) -> Decision:
    """Take the free lease, as soon as no gate of another region can be open.

    That the lease has ended is not enough of a proof: a leader of the store that hung may end leases that were renewed
    through its successor (etcd issue 15247), and then the holder's gates are open for some seconds more.
    """
    if request.epoch_floor and waiting.elapsed_s < request.ttl_s:
        return Wait("the store forgot who had open gates: all of them close by themselves first")
    if view.epoch is None or view.epoch.region == request.region:
        return TakeIt(detail)
    if waiting.awake:
        nodes, longest = ", ".join(sorted(waiting.awake)), max(waiting.awake.values())
        return Wait(f"gates of {view.epoch.region} that may be open: {nodes}, for {longest:.0f} s more at most")
    return TakeIt(detail, waiting.revision)


def _decide_handover(view: StoreView, request: Request, waiting: Waiting) -> Decision:
    lease, handover = view.lease, view.active_handover()
    if lease is not None and lease.region == request.region:
        if handover is not None:
            return Refuse(
                f"{lease.region} holds epoch {lease.epoch} and is being handed over to {handover.to}: finish that, or "
                f"withdraw it with state=held region={lease.region}"
            )
        return Done(f"{lease.region} holds epoch {lease.epoch}")
    if lease is None:
        if view.epoch is None:
            return Refuse(f"nobody ever held the write lease: take it with state=held region={request.region}")
        if view.epoch.region == request.region:
            return _take(view, request, waiting, f"epoch {view.epoch.epoch} of {request.region} itself has ended")
        proven = view.shipped_proof() is not None or not request.require_shipped
        if handover is not None and handover.to == request.region and proven:
            return _take(view, request, waiting, f"epoch {view.epoch.epoch} has ended after its hand-over")
        return Refuse(
            f"{view.epoch.region} lost the write lease (epoch {view.epoch.epoch}) without a proof that "
            f"{request.region} has all its data: there is nobody to hand over. Wait until {view.epoch.region} has it "
            f"again, or fail over and accept the loss of what was not shipped: state=held region={request.region}"
        )
    if handover is None:
        if request.require_shipped and not view.is_followed():
            # Nothing is closed before the rest is a matter of seconds.
            missing = f"{request.region} does not follow {lease.region} closely yet"
            if waiting.elapsed_s >= request.wait_s:
                return Refuse(
                    f"{missing} after {waiting.elapsed_s:.0f} s, so handing over would lose writes or keep clients "
                    f"waiting. Nothing was touched and {lease.region} goes on with epoch {lease.epoch}. Look at "
                    f"replication ('patronictl list' in {request.region}), then run this again."
                )
            return Wait(missing)
        wanted = HandOver(request.region, lease.epoch, request.by, request.require_shipped)
        return AskHolder(wanted, lease)
    if handover.to != request.region:
        return Refuse(
            f"{lease.region} is being handed over to {handover.to} already: finish that, or withdraw it with "
            f"state=held region={lease.region}"
        )
    gates = ", ".join(sorted(waiting.awake))
    proven = view.shipped_proof() is not None or not handover.require_shipped
    if not gates and proven:
        return Swap(handover, waiting.revision)
    missing = "; ".join(
        part
        for part in (
            f"gates not closed for good yet: {gates}" if gates else "",
            "" if proven else f"no proof yet that {request.region} has received all data",
        )
        if part
    )
    if waiting.elapsed_s >= request.wait_s:
        return Withdraw(
            handover,
            f"{lease.region} did not hand over within {request.wait_s:.0f} s ({missing}). The hand-over was withdrawn "
            f"and {lease.region} goes on with epoch {lease.epoch}. 'censuschat-guard status' on its nodes says what is "
            "in the way.",
        )
    return Wait(missing)


# ---- carrying it out ----


class Store(Protocol):
    """What is needed of the lease store."""

    def observe(self) -> StoreView: ...

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
    ) -> LeaseRecord: ...

    def swap(
        self, view: StoreView, handover: HandOver, *, ttl_s: float, wall: float, by: str, quiet_revision: int = 0
    ) -> LeaseRecord: ...

    def put_handover(self, handover: HandOver, lease_id: int) -> bool: ...

    def cancel_handover(self, handover: HandOver) -> bool: ...

    def release(self, lease: LeaseRecord, revision: int) -> bool: ...


@dataclasses.dataclass
class Outcome:
    """What was done. Times in seconds."""

    changed: bool = False
    detail: str = ""
    waited_s: float = 0.0
    method: str = "already_held"
    view: StoreView = dataclasses.field(default_factory=StoreView)
    previous: StoreView = dataclasses.field(default_factory=StoreView)
    actions: list[str] = dataclasses.field(default_factory=list)


def settle(
    store: Store,
    request: Request,
    *,
    check: bool = False,
    seen: Mapping[str, tuple[int, float]] | None = None,
    poll_s: float = 0.5,
    confirm_s: float = 20.0,
    clock: Callable[[], float] = boottime,
    sleep: Callable[[float], Any] = time.sleep,
) -> Outcome:
    """Bring the lease to what the request wants. Raises LeaseError (a refusal) or etcd.EtcdError.

    check: decide and change nothing, after having watched whether a holder lives. confirm_s: how long the region's
    guards may take, after a change, to open their first gate; a lease that no guard renews would end again by itself.
    seen: what the guard of this machine has noted about the holder's gates (QuietWatch), which saves the wait.
    """
    began = clock()
    watch = QuietWatch(seen)
    outcome = Outcome(previous=store.observe())
    view = outcome.previous
    while True:
        now = clock()
        watch.note(view, now)
        waiting = Waiting(now - began, watch.renewals, watch.age_s(now), watch.left_s(now), watch.revision)
        decision = decide(view, request, waiting)
        outcome.detail, outcome.view = _text(decision, request), view
        if isinstance(decision, Done):
            break
        if isinstance(decision, Refuse):
            raise LeaseError(decision.detail)
        if check and _undecided(decision, view, request, waiting):
            sleep(poll_s)
            view = store.observe()
            continue
        if check:
            outcome.changed = True
            outcome.actions.append(outcome.detail)
            outcome.method = _method(outcome.previous, decision, request)
            return outcome
        if isinstance(decision, Wait):
            sleep(poll_s)
        else:
            outcome.changed = True
            outcome.actions.append(outcome.detail)
            if _carry_out(store, decision, view, request):
                outcome.method = _method(outcome.previous, decision, request)
                outcome.waited_s = round(clock() - began, 2)
        view = store.observe()
    if outcome.changed and view.lease is not None and confirm_s > 0:
        outcome.view = _confirmed(store, view, confirm_s=confirm_s, poll_s=poll_s, clock=clock, sleep=sleep)
    return outcome


def _carry_out(store: Store, decision: Decision, view: StoreView, request: Request) -> bool:
    """Whether the lease changed its holder."""
    wall = time.time()
    match decision:
        case TakeIt():
            store.take(
                view,
                request.region,
                ttl_s=request.ttl_s,
                wall=wall,
                by=request.by,
                quiet_revision=decision.quiet_revision,
                epoch_floor=request.epoch_floor,
            )
            return True
        case Swap(handover, revision):
            store.swap(view, handover, ttl_s=request.ttl_s, wall=wall, by=request.by, quiet_revision=revision)
            return True
        case AskHolder(handover, lease):
            store.put_handover(handover, lease.lease_id)
        case Release(lease, revision):
            store.release(lease, revision)
        case Withdraw(handover, then):
            withdrawn = store.cancel_handover(handover)
            if then and withdrawn:
                raise LeaseError(then)
        case _:
            pass
    return False


def _undecided(decision: Decision, view: StoreView, request: Request, waiting: Waiting) -> bool:
    """Whether a moment more would show that the holder lives, so that the request would be refused."""
    if not isinstance(decision, Wait) or request.state != "held" or view.lease is None:
        return False
    quiet = waiting.renewals_seen == 0 and waiting.elapsed_s > QUIET_S * request.ttl_s
    return not quiet and waiting.elapsed_s < CHECK_S * request.ttl_s


def _method(previous: StoreView, decision: Decision, request: Request) -> str:
    if previous.epoch is None:
        return "never_held"
    handed = isinstance(decision, Swap) or (request.state == "handed_over" and not isinstance(decision, TakeIt))
    return "handed_over" if handed else "expired"


def _text(decision: Decision, request: Request) -> str:
    match decision:
        case TakeIt(detail, _):
            return f"take the lease for {request.region} ({detail})"
        case AskHolder(handover, lease):
            return f"ask {lease.region} to hand epoch {lease.epoch} over to {handover.to}"
        case Swap(handover, _):
            return f"give the lease to {handover.to}: all gates are closed and everything was received"
        case Withdraw(handover, _):
            return f"withdraw the hand-over to {handover.to}"
        case Release(lease):
            return f"release epoch {lease.epoch} of {lease.region}, which opens no gate"
        case Wait(detail):
            return f"wait: {detail}"
        case Done(detail) | Refuse(detail):
            return detail


def _confirmed(
    store: Store,
    view: StoreView,
    *,
    confirm_s: float,
    poll_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], Any],
) -> StoreView:
    end = clock() + confirm_s
    taken = view.lease
    while taken is not None:
        if view.lease is not None and view.open_gates():
            return view
        if view.lease is None or view.lease.epoch != taken.epoch or clock() >= end:
            break
        sleep(poll_s)
        view = store.observe()
    epoch = taken.epoch if taken else 0
    region = taken.region if taken else ""
    raise LeaseError(
        f"{region} was given the write lease with epoch {epoch}, but none of its guards has renewed it within "
        f"{confirm_s:.0f} s. The lease ends by itself and nobody writes. Run 'censuschat-guard status' and "
        f"'journalctl -u censuschat-guard' on {region}'s database nodes, then run this again."
    )
