"""How a run stands as seen from outside its process, and the one command that comes next."""

from __future__ import annotations

from runbooks.journal import Journal, RunState

UNFINISHED = ("dead", "failed", "interrupted", "refused", "waiting")


def shown_state(journal: Journal, state: RunState) -> str:
    """The state of the records; "dead" when they say "running" and the run's process is gone."""
    if state.state != "running":
        return state.state
    lock = journal.lock()
    return "running" if lock is not None and lock.run == state.run and lock.alive() else "dead"


def next_command(journal: Journal, state: RunState, shown: str) -> str | None:
    """What to run next for a run that did not succeed; None where there is nothing to do."""
    if shown == "aborted":
        return f"runbook plan {state.runbook} -i {state.inventory}"
    if shown not in UNFINISHED:
        return None
    newest = journal.runs()[-1]
    return f"runbook resume {state.run}" if newest == state.run else f"runbook status {newest}"
