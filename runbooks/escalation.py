"""What waits for a person and nobody has acknowledged: said again after 15 minutes, and again, until somebody is there.

It reads the journal only, so it works when the engine's process is gone, and it is for a timer: two machines that do it
at the same moment tell people once, because the first intent in the journal counts (``runbooks.notify``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runbooks import alerts, definition, notify, outlook
from runbooks.errors import Problem
from runbooks.notify import Delivery, Notifier

if TYPE_CHECKING:
    from runbooks.environment import Environment
    from runbooks.journal import Journal, Record

STALE_S = 24 * 3600.0
"""Seconds after which a matter is left to the reports: who sets up the timer today is not woken for last week."""
ABANDONED_S = 60.0
"""Seconds after which the sender of a run that is over is not sending any more (longer than ``notify.GIVE_UP_S``)."""
RUNS = 50
"""How many of the newest runs are looked at."""
UNTOLD_S = 3600.0
"""Seconds after its end in which the timer tells how a run ended, where the process that ended it did not."""
ENDED = ("succeeded", "failed", "refused", "interrupted", "undone", "aborted")
STARTS = ("run_started", "run_resumed", "run_finished")


@dataclass(frozen=True, slots=True)
class Matter:
    """Something that waits for a person. key: the same for the same matter forever. since: unix seconds."""

    key: str
    what: str
    since: float
    next_command: str


def matter(records: Sequence[Record], shown: str, severity: str) -> Matter | None:
    """What a run waits for, if anything. shown: its state as seen from outside ("dead": its process is gone)."""
    last = next((r for r in reversed(records) if r.kind in STARTS), None)
    if last is None:
        return None
    run, reason = last.run, str(last.data.get("reason", ""))
    since, key = last.wall, f"{shown}:{last.seq}"
    if shown == "waiting":
        # Each approval of several begins the wait for the next one.
        given = [r.wall for r in records if r.kind == "approval_given" and r.seq > last.seq]
        found = Matter(key, reason or "it waits for an approval", max([since, *given]), f"runbook approve {run}")
    elif shown == "dead":
        # Since its last sign of life, and not since its start.
        written = max(r.wall for r in records if r.fence is not None or r is last)
        found = Matter(key, "its process is gone with its work unfinished", written, f"runbook resume {run}")
    elif (
        shown in ("failed", "refused", "interrupted", "undone")
        and severity == "critical"
        and (shown != "undone" or reason)
    ):
        found = Matter(key, reason or f"it ended {shown}", since, f"runbook resume {run}")
    else:
        return None
    if any(r.kind == "acknowledged" and r.seq > last.seq for r in records):
        return None
    return found


def due(since: float, now: float, after_s: float, most: int) -> int:
    """The number of the escalation that is due: 0 for none. One that was missed is not made up for."""
    if now - since > STALE_S + after_s * most:
        return 0
    return max(0, min(int((now - since) // after_s), most))


def untold(records: Sequence[Record], shown: str, now: float) -> str | None:
    """The reason of an end that its process could have told, and did not: it was killed between the two."""
    last = next((r for r in reversed(records) if r.kind in STARTS), None)
    if last is None or shown not in ENDED or not ABANDONED_S < now - last.wall < UNTOLD_S:
        return None
    told = any(r.kind == "notify_intended" and r.data["event"] == shown and r.seq > last.seq for r in records)
    return None if told else str(last.data.get("reason", ""))


def look(journal: Journal) -> Iterator[tuple[str, str, Matter | None]]:
    """The newest runs of an environment: run, its state as seen from outside, and what it waits for."""
    for run in list(reversed(journal.runs()))[:RUNS]:
        state = journal.state(run)
        shown = outlook.shown_state(journal, state)
        runbook, severity = None, "critical"
        with contextlib.suppress(Problem):
            runbook = definition.load(state.runbook)
            severity = runbook.severity
        found = matter(journal.records(run), shown, severity)
        if found is not None and outlook.successor(journal, state, runbook) is not None:
            found = None
        yield run, shown, found


def proposals(journal: Journal, environment: Environment, now: float) -> Iterator[tuple[str, str, Matter | None]]:
    """The same of what alerts have proposed."""
    try:
        waiting = alerts.unanswered(journal, environment, now)
    except Problem:
        # What alerts may do is broken; that is said where an alert comes in.
        return
    for rule, run, decided in waiting:
        what = f"{decided.reason}, and runbook {rule.runbook} has not been run since"
        yield run, "proposed", Matter(f"proposed:{decided.seq}", what, decided.at, "runbook event show")


def escalate(
    journal: Journal, environment: Environment, patience_s: float, clock: Callable[[], float] = time.time
) -> list[tuple[str, Matter, int]]:
    """Tell what is due now; run, matter and number of what was due. Also takes up what dead processes left unsent."""
    configured = notify.configuration(environment)
    found: list[tuple[str, Matter, int]] = []
    notifiers: list[Notifier] = []
    now = clock()

    def abandoned(delivery: Delivery) -> bool:
        return now - delivery.at > ABANDONED_S

    for run, shown, waits in (*look(journal), *proposals(journal, environment, now)):
        number = 0 if waits is None else due(waits.since, now, configured.escalate_after_s, configured.escalations)
        dead = waits is not None and shown == "dead" and now - waits.since < STALE_S
        records = journal.records(run)
        told = notify.deliveries(records).values()
        ended = untold(records, shown, now)
        unsettled = shown != "running" and any(d.outcome in (None, "failed") and now - d.at < STALE_S for d in told)
        if not (number or dead or unsettled or ended is not None):
            continue
        notifier = Notifier(journal, environment, run)
        notifiers.append(notifier)
        if unsettled:
            notifier.settle(abandoned)
        if ended is not None:
            notifier.event(shown, None, ended)
        if waits is not None and dead:
            notifier.event("dead", None, waits.what, waits.key, waits.next_command)
        if waits is not None and number:
            minutes = round((now - waits.since) / 60)
            text = f"Nobody has acknowledged this for {minutes} min: {waits.what}"
            notifier.event("escalated", None, text, f"escalated:{waits.key}:{number}", f"runbook notify ack {run}")
            found.append((run, waits, number))
    until = time.monotonic() + patience_s
    for notifier in notifiers:
        notifier.close(max(0.1, until - time.monotonic()))
    return found
