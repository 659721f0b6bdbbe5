"""How a run stands as seen from outside its process: its state, what it touched, the one command that comes next."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runbooks import locks
from runbooks.errors import NOTHING, Problem, Refused, Stopped
from runbooks.journal import Journal, RunState
from runbooks.lock_stores import open_store
from runbooks.records import Record

if TYPE_CHECKING:
    from runbooks.definition import Definition


def shown_state(journal: Journal, state: RunState) -> str:
    """The state of the records; "dead" when they say "running" and the run's process is gone."""
    if state.state != "running":
        return state.state
    try:
        standing = locks.run_standing(_store(journal, state), state.run)
    except Problem:  # The store with its lease does not answer: the records are all there is.
        return "running"
    return "running" if standing == "active" else "dead"


def _store(journal: Journal, state: RunState) -> locks.Store:
    """Where the run's locks are. Another store than the journal's database is asked as the inventory says."""
    if not state.lock_store:
        return open_store(journal)
    from runbooks.environment import Environment
    from runbooks.holding import Locks

    return Locks(Environment(Path(state.inventory)), journal).store


def emergency(state: RunState) -> bool:
    """Whether an emergency that was declared for the run goes on."""
    return state.emergency_until is not None and time.time() < state.emergency_until


def successor(journal: Journal, state: RunState, definition: Definition | None = None) -> str | None:
    """A newer run of the environment that has worked on what this one has; None when there is none."""
    runs = journal.runs()
    for run in reversed(runs[runs.index(state.run) + 1 :]):
        if definition is None:
            return run
        other = journal.state(run)
        if other.begun and _meet(definition, other.runbook):
            return run
    return None


def _meet(definition: Definition, other: str) -> bool:
    """Whether two runbooks lock something that is in each other's way; a runbook that is no longer there does."""
    from runbooks import definition as definitions

    try:
        names = definitions.load(other).locks
    except Problem:
        return True
    return any(locks.in_the_way(held, wanted) for held in names for wanted in definition.locks)


def radius(state: RunState, definition: Definition | None, records: Iterable[Record] = ()) -> str:
    """The blast radius: what the steps that have begun touch, by whether they ended well.

    records: the run's, for what is known of the effects of the steps that did not.
    """
    effects = _effects(records)
    touches = {} if definition is None else {step.id: step.touches for step in definition.steps}
    done: list[str] = []
    open_: list[str] = []
    for name in state.begun:
        words = ", ".join(touches.get(name, ("what is not known: the runbook has changed",)))
        if words:
            step = state.steps[name]
            if step.outcome == "ok" and step.undone is None:
                done.append(f"{name} ({words})")
            else:
                open_.append(f"{name} ({words}{effects.get(name, '')})")
    parts = []
    if done:
        parts.append(f"Done and kept: {', '.join(done)}")
    if open_:
        parts.append(f"{'begun' if parts else 'Begun'} and perhaps in part done: {', '.join(open_)}")
    return "; ".join(parts) or NOTHING


def _effects(records: Iterable[Record]) -> dict[str, str]:
    """Step -> what its newest attempt changed, and what it was about to change when nothing more was heard of it."""
    changed: dict[str, int] = {}
    open_: dict[str, dict[tuple[str, str], int]] = {}
    for record in records:
        step = record.step or ""
        if record.kind in ("step_started", "undo_started"):
            changed[step], open_[step] = 0, {}
        elif record.kind in ("effect_intended", "effect_done") and step in open_:
            place = (str(record.data.get("task")), str(record.data.get("host")))
            step_open = open_[step]
            step_open[place] = step_open.get(place, 0) + (1 if record.kind == "effect_intended" else -1)
            changed[step] += bool(record.data.get("changed"))
    told = {}
    for step, count in changed.items():
        unknown = [f"{task!r} on {host}" for (task, host), left in open_[step].items() if left > 0]
        words = f": {count} change{'' if count == 1 else 's'} recorded" if count else ""
        if unknown:
            more = f" and {len(unknown) - 2} more" if len(unknown) > 2 else ""
            words += f"{',' if words else ':'} the outcome of {', '.join(unknown[:2])}{more} is not known"
        told[step] = words
    return told


def next_command(journal: Journal, state: RunState, shown: str) -> str | None:
    """What to run next for a run that did not succeed; None where there is nothing to do."""
    problem = aftermath(journal, state, shown)
    return None if problem is None else problem.next_command


def aftermath(journal: Journal, state: RunState, shown: str) -> Problem | None:
    """Cause, blast radius and next command of a run that is over or stands still; None where all is well."""
    from runbooks import definition as definitions

    try:
        definition = definitions.load(state.runbook)
    except Problem:
        definition = None
    run, reason, touched = state.run, state.reason, radius(state, definition, journal.records(state.run))
    newest = successor(journal, state, definition)
    resume, anew = f"runbook resume {run}", f"runbook plan {state.runbook} -i {state.inventory}"
    if shown in ("running", "succeeded"):
        return None
    if shown == "undone" and not reason:
        return None
    if shown == "undone":
        return Problem(f"Run {run} was undone: {reason}", code="run-undone", touched=touched, next_command=anew)
    if shown == "aborted":
        return Problem(f"Run {run} was given up: {reason}", code="run-aborted", touched=touched, next_command=anew)
    if newest is not None:
        return Refused(
            f"Run {run} is {shown}, and {newest} has worked on the environment since",
            code="run-succeeded-by-another",
            touched=touched,
            next_command=f"runbook status {newest}",
        )
    if state.undoing:
        return Problem(
            f"Run {run} is {shown} in the middle of its undoing: {reason or 'its process is gone'}",
            code="undo-unfinished",
            touched=touched,
            next_command=f"runbook undo {run}",
        )
    if shown == "dead":
        step = next((s.step for s in state.steps.values() if s.attempts and s.outcome is None), "")
        return Problem(
            f"Run {run} is dead: its process is gone{f' in step {step}' if step else ' between two steps'}",
            code="run-dead",
            touched=touched,
            next_command=resume,
        )
    if shown == "waiting":
        return Refused(
            f"Run {run} waits: {reason}",
            code="run-waiting",
            touched=touched,
            next_command=f"runbook approve {run} -i {state.inventory} --as NAME",
        )
    if shown == "refused":
        return Refused(f"Run {run} refused: {reason}", code="run-refused", touched=touched, next_command=resume)
    if shown == "interrupted":
        return Stopped(f"Run {run} interrupted: {reason}", code="run-interrupted", touched=touched, next_command=resume)
    if any(step.outcome == "timed out" for step in state.steps.values()):
        return Problem(f"Run {run} timed out: {reason}", code="run-timed-out", touched=touched, next_command=resume)
    return Problem(f"Run {run} failed: {reason}", code="run-failed", touched=touched, next_command=resume)
