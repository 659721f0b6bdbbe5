"""Journals with runs in every state, made through the journal's own interface, for the tests of what is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from runbooks import locks
from runbooks.journal import Journal
from runbooks.lock_stores import open_store
from tests.unit.runbook.place import INVENTORY

STEPS = ("look", "paint", "admire")
HASH = "5f1d" * 16
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def start(*, inventory: Path = INVENTORY, **more: Any) -> dict[str, Any]:
    """The data of a start of the runbook paint."""
    return {
        "runbook": "paint",
        "environment": "shed",
        "inventory": str(inventory),
        "parameters": {"colour": "red", "coats": 1, "fail_at": "none", "slow": 0},
        "steps": list(STEPS),
        "left_out": [],
        **more,
    }


def begin(journal: Journal, run: str, *, resuming: bool = False, **more: Any) -> int:
    """Take the environment's lock for a run and record that; its fence."""
    process = locks.Process.current()
    wish = locks.Wish(journal.environment, (locks.ENVIRONMENT,), run, "paint", process, 60.0, resuming)
    fence = locks.acquire(open_store(journal), wish, lambda known: journal.state(known).state == "running")
    if resuming:
        journal.take_over(run, more, fence=fence)
    else:
        journal.begin(run, start(**{"environment": journal.environment, **more}), fence=fence)
    return fence


def finish(journal: Journal, fence: int, state: Any, reason: str = "") -> None:
    """Record a run's end and give its lock back."""
    journal.finish(state, reason)
    open_store(journal).change(lambda book, _now: (locks.release(book, fence), None))


def finished(outcome: str = "ok", **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "elapsed_s": 1.5, "outputs": {}, "says": "", "changed": [], "failures": [], **more}


def do(journal: Journal, step: str, outcome: str = "ok", **more: Any) -> None:
    """One step from its start to its end."""
    journal.append("step_started", step, {"budget_s": 10})
    journal.append("step_finished", step, finished(outcome, **more))


def effect(journal: Journal, step: str, task: str, host: str, **done: Any) -> None:
    """One task on one host, with its outcome when there is one."""
    journal.append("effect_intended", step, {"task": task, "host": host, "action": "ansible.builtin.copy"})
    if done:
        journal.append("effect_done", step, {"task": task, "host": host, "action": "ansible.builtin.copy", **done})


def full(journal: Journal, run: str = "20270314-021500-paint-full") -> str:
    """A run with everything there is to tell: a plan, approvals, an emergency, gates, effects, an undo, messages."""
    journal.record("plan_made", f"plan:{HASH}", None, plan())
    approval = {"plan": HASH, "run": "", "step": "", "key": "ed25519:" + "k" * 44, "signature": "s", "at": 1.0}
    for name in ("ada", "grace"):
        journal.record("approval_given", f"plan:{HASH}", None, {**approval, "name": name, "expires": 4102444800.0})
    fence = begin(journal, run, plan=HASH, approvals=["ada", "grace"], approvals_needed=2, approvals_lifted=False)
    journal.record("emergency_declared", run, None, {"who": "ada", "reason": "the shed burns", "expires": 4102444800.0})
    message = {"event": "started", "severity": "high", "receiver": "slack", "key": "started", "text": "paint began"}
    journal.record("notify_intended", run, None, {**message, "attempt": 1, "claim": "c1"})
    journal.record("notify_done", run, None, {"key": "started", "receiver": "slack", "claim": "c1", "outcome": "sent"})
    window = {"open": False, "why": "Sundays 02:00 to 04:00", "lifted": True}
    journal.append("window_checked", "look", window)
    do(journal, "look", says="It is grey")
    journal.append("step_started", "paint", {"budget_s": 1})
    effect(
        journal,
        "paint",
        "Put the paint on",
        "here1",
        changed=True,
        diff=[{"what": "/shed/wall", "added": 2, "removed": 1}],
    )
    effect(
        journal,
        "paint",
        "Put the paint on",
        "here2",
        changed=True,
        diff=[{"what": "/shed/wall", "added": 2, "removed": 1}],
    )
    effect(journal, "paint", "Close the bucket", "here1", changed=False)
    gate = {"when": "after", "title": "The paint is dry", "outcome": "ok", "says": "dry to the touch"}
    journal.append("note", "paint", {"text": "gate The paint is dry: dry to the touch", "gate": gate})
    journal.append("step_finished", "paint", finished(says="Two walls are red"))
    journal.append("step_started", "admire", {"budget_s": 10})
    effect(journal, "admire", "Look at it", "here1", changed=False, failed=True)
    failure = {"host": "here1", "task": "Look at it", "message": "it drips\non the floor"}
    journal.append("step_finished", "admire", finished("failed", failures=[failure]))
    journal.append("undo_started", "paint", {"title": "Take the paint off"})
    journal.append("undo_finished", "paint", finished(says="Grey again"))
    finish(journal, fence, "failed", "Admire it: here1: Look at it: it drips")
    journal.record("acknowledged", run, None, {"name": "ada", "key": "failed"})
    return run


def plan() -> dict[str, Any]:
    """The record of a plan."""
    change = {"task": "Put the paint on", "host": "here1", "action": "ansible.builtin.copy", "before": "", "after": ""}
    return {
        "hash": HASH,
        "runbook": "paint",
        "environment": "shed",
        "who": "ada",
        "need": 2,
        "estimate_s": 4.0,
        "steps": [
            {"id": step, "changes": [change] if step == "paint" else [], "estimate_s": 1.25, "reached": True}
            for step in STEPS
        ],
    }


def ended(journal: Journal, run: str, state: Any, reason: str = "", steps: tuple[str, ...] = STEPS) -> str:
    """A run that ended so, after these steps."""
    fence = begin(journal, run)
    for step in steps:
        changed = [{"task": "Put the paint on", "hosts": ["here1", "here2"]}] if step == "paint" else []
        do(journal, step, changed=changed)
    finish(journal, fence, state, reason)
    return run


def dead(journal: Journal, run: str) -> str:
    """A run whose process is killed in the middle of a task of its second step."""
    code = (
        "import os, pathlib, sys\nfrom runbooks.journal import Journal\nfrom tests.unit.runbook import past\n"
        f"journal = Journal(pathlib.Path({str(journal.location)!r}), {journal.environment!r})\n"
        f"past.begin(journal, {run!r})\n"
        "past.do(journal, 'look')\n"
        "journal.append('step_started', 'paint', {'budget_s': 10})\n"
        "past.effect(journal, 'paint', 'Put the paint on', 'here1', changed=True)\n"
        "past.effect(journal, 'paint', 'Put the paint on', 'here2')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -9
    return run


def hostile(journal: Journal, run: str = "20270314-050000-paint-evil") -> str:
    """A run of which every text is an attack on the page."""
    fence = begin(journal, run, parameters={HOSTILE: HOSTILE}, left_out=[HOSTILE])
    journal.append("step_started", "look", {})
    effect(journal, "look", HOSTILE, HOSTILE, changed=True, diff=[{"what": HOSTILE, "added": 1}])
    gate = {"when": HOSTILE, "title": HOSTILE, "outcome": HOSTILE, "says": HOSTILE}
    journal.append("note", "look", {"text": HOSTILE, "gate": gate})
    failure = {"host": HOSTILE, "task": HOSTILE, "message": HOSTILE}
    journal.append("step_finished", "look", finished(HOSTILE, says=HOSTILE, failures=[failure]))
    journal.append("undo_started", "look", {"title": HOSTILE})
    journal.append("undo_finished", "look", finished(HOSTILE, says=HOSTILE, failures=[failure]))
    message = dict.fromkeys(("event", "severity", "receiver", "key", "text"), HOSTILE)
    journal.record("notify_intended", run, None, message)
    journal.record("notify_done", run, None, {**message, "outcome": HOSTILE, "detail": HOSTILE})
    journal.record("emergency_declared", run, None, {"who": HOSTILE, "reason": HOSTILE, "expires": 4102444800.0})
    journal.record("approval_given", run, None, {"plan": HOSTILE, "name": HOSTILE, "key": HOSTILE})
    journal.record("acknowledged", run, None, {"name": HOSTILE})
    journal.record("note", run, None, {"text": HOSTILE})
    journal.append("window_checked", "look", {"open": False, "why": HOSTILE})
    finish(journal, fence, "failed", HOSTILE)
    return run
