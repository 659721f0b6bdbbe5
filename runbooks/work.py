"""What a run does while it holds its locks: its steps one after the other, each between its gates, or their undoing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runbooks import errors, outlook, plan, windows
from runbooks.definition import Gate, Step
from runbooks.errors import Problem
from runbooks.journal import Journal, LockLost
from runbooks.locks import Process
from runbooks.notify import Notifier
from runbooks.records import RunOutcome
from runbooks.request import GATE_S, Request
from runbooks.session import Session
from runbooks.step import Activity, Result

EMERGENCY_S = 3600.0
"""How long an emergency lasts unless the inventory says otherwise (runbook_emergency_s)."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the work ended. reason: the cause, in one sentence; empty when it succeeded."""

    state: RunOutcome
    code: int
    reason: str = ""
    quiet: bool = False
    """Nobody needs to be told: it goes on by itself."""
    part: bool = False
    """Other processes may be at work on the same step: the run ends so only when none is."""

    def event(self) -> str:
        """The notification that says so."""
        return "failed" if self.state == "aborted" else self.state


def check_settings(request: Request) -> None:
    """Raises Problem when the inventory's settings for the work are wrong: before the run has begun, not in it."""
    windows.load(request.environment, request.definition)
    emergency_s(request)


def emergency_s(request: Request) -> float:
    """How long an emergency lasts in the environment, in seconds. Raises Problem."""
    given = request.environment.get("runbook_emergency_s", EMERGENCY_S)
    try:
        return float(given)
    except (TypeError, ValueError):
        raise Problem(
            f"runbook_emergency_s of environment {request.environment.name} is {given!r}, not a number of seconds",
            code="emergency-wrong",
            next_command=f"ansible-inventory -i {request.environment.path} --list",
        ) from None


class Work:
    """One attempt at a run. Its methods raise LockLost when the run is no longer this process's to go on with."""

    def __init__(self, request: Request, journal: Journal, session: Session, fence: int, notifier: Notifier) -> None:
        self.request = request
        self._journal, self._session, self._fence, self._notifier = journal, session, fence, notifier
        self._calendar = windows.load(request.environment, request.definition)
        self._who = Process.current().who
        self._state = journal.state(request.run)
        self._outputs = dict(self._state.outputs)

    def radius(self) -> str:
        """What this run has touched, in words, as far as this process knows."""
        return outlook.radius(self._state, self.request.definition)

    # -- going forward

    def steps(self) -> Ending:
        """Do the steps that are left."""
        self._announce()
        self._declare_emergency()
        for step in self._pending():
            ending = self._interrupted() or self._held_back(step) or self._gates_before(step)
            if ending is None:
                ending = self._step(step)
            if ending is not None:
                return ending
        return Ending("succeeded", errors.OK)

    def _announce(self) -> None:
        self._notifier.event("resumed" if self._state.resumed else "started", None, self._title())

    def _pending(self) -> list[Step]:
        return [step for step in self.request.definition.steps if step.id in self._state.pending]

    def _title(self) -> str:
        return f"{self.request.definition.title}: run {self.request.run} on {self.request.environment.name}"

    def _declare_emergency(self) -> None:
        reason = self._session.order.emergency
        if not reason:
            return
        expires = time.time() + emergency_s(self.request)
        data = {"reason": self.request.clean(reason), "who": self._who, "expires": expires}
        self._journal.append("emergency_declared", None, data)
        self._state.emergency_until = expires
        until = time.strftime("%H:%M:%S %Z", time.localtime(expires))
        self._session.progress.note(f"EMERGENCY until {until}: {reason}. No approval and no window is waited for")
        self._notifier.event("emergency", None, f"{self._title()}: {reason}", key=f"emergency-{int(expires)}")

    def _interrupted(self) -> Ending | None:
        if self._session.stop.lost():
            raise LockLost(self.request.run)
        asked = self._session.stop.asked
        return Ending("interrupted", errors.INTERRUPTED, f"stopped by {asked}") if asked else None

    def _held_back(self, step: Step) -> Ending | None:
        """What keeps a step from beginning: an emergency that is over, a window, an approval of its own."""
        lifted = outlook.emergency(self._state)
        if self._session.order.emergency and not lifted:
            return Ending(
                "refused",
                errors.REFUSED,
                f"{step.title}: the emergency is over, so the step was not begun (renew it by runbook resume "
                f"{self.request.run} --emergency --reason REASON)",
            )
        if self._calendar.windows is not None or self._calendar.blackouts:
            verdict = self._calendar.fits(windows.now(), step.budget_s)
            data = {
                "open": verdict.open,
                "why": verdict.why,
                "next_open": None if verdict.next_open is None else verdict.next_open.timestamp(),
                "needs_s": step.budget_s,
                "lifted": lifted and not verdict.open,
            }
            self._journal.append("window_checked", step.id, data)
            if not verdict.open and not lifted:
                return Ending("refused", errors.REFUSED, f"{step.title}: not begun, {verdict.why}")
        wanted = plan.step_wants(self.request, self._journal, step, self._state.plan, who=self._who)
        if wanted is not None and not lifted:
            return Ending("waiting", errors.WAITING, f"{step.title}: {wanted.what}")
        return None

    def _gates_before(self, step: Step) -> Ending | None:
        for number, gate in enumerate(step.before):
            result = self._gate(step, "before", number, gate)
            if result.outcome == "interrupted":
                return self._interrupted()
            if result.outcome != "ok":
                return Ending("refused", errors.REFUSED, f"{step.title}: gate {gate.title!r}: {result.text()}")
        return None

    def _gate(self, step: Step, when: Literal["before", "after"], number: int, gate: Gate) -> Result:
        self._session.progress.activity(Activity(f"gate: {gate.title}"))
        began = time.monotonic()
        result = self._play(gate.playbook, GATE_S, f"{step.id}.{when}.{number}")
        said = {
            "when": when,
            "title": gate.title,
            "outcome": result.outcome,
            "says": result.says or result.text(),
            "elapsed_s": round(time.monotonic() - began, 3),
        }
        self._journal.append("note", step.id, {"text": f"gate {gate.title}: {said['says']}", "gate": said})
        return result

    def _step(self, step: Step) -> Ending | None:
        known = self._state.steps[step.id]
        self._journal.append("step_started", step.id, {"budget_s": step.budget_s})
        known.attempts, known.outcome, known.undone = known.attempts + 1, None, None
        self._session.progress.begin(step)
        began = time.monotonic()
        result = self._performed(step)
        return self._finished(step, result, time.monotonic() - began)

    def _performed(self, step: Step) -> Result:
        """A step's playbook and the gates after it."""
        result = self._play(step.playbook, step.timeout_s, step.id)
        for number, gate in enumerate(step.after if result.outcome == "ok" else ()):
            judged = self._gate(step, "after", number, gate)
            if judged.outcome != "ok":
                result.outcome = judged.outcome
                result.failures += [{**f, "task": f"gate {gate.title!r}: {f['task']}"} for f in judged.failures]
                break
        return result

    def _finished(self, step: Step, result: Result, elapsed: float) -> Ending | None:
        """Record how a step ended; the run's ending, when it ends with it."""
        self._journal.append("step_finished", step.id, document(result, elapsed))
        self._state.steps[step.id].outcome = result.outcome
        self._session.progress.end(step, result, elapsed)
        self._outputs |= result.outputs
        if result.outcome == "ok":
            return None
        if result.outcome == "interrupted":
            return self._interrupted()
        reason = f"{step.title}: {result.text()}"
        if step.gate and result.outcome == "failed":
            return Ending("refused", errors.REFUSED, reason)
        if step.on_failure == "undo":
            self._session.progress.note(f"{step.id} {result.outcome}: its effects and those before it are taken back")
            undone = self.undo()
            if undone.state != "undone":
                return undone
            return Ending("undone", errors.FAILED, f"{reason}; {undone.reason}")
        return Ending("failed", errors.FAILED, reason)

    # -- taking back

    def undo(self) -> Ending:
        """Take back what the steps did that began, the newest first. Neither windows nor approvals are waited for:
        what is taken back was allowed, and half a change is worse than an untimely whole one."""
        told = []
        for name in reversed(self._state.begun):
            step, known = self.request.definition.step(name), self._state.steps[name]
            ending = self._interrupted()
            if ending is not None:
                return ending
            if step.undo is not None and step.undo.playbook is not None:
                ending = self._undo(step, step.undo.playbook, step.undo.title)
                if ending is not None:
                    return ending
                known.undone = "ok"
            elif known.undone != "told":
                says = step.undo.says if step.undo else f"Nothing takes back {', '.join(step.touches)}"
                if not step.touches and not says:
                    known.undone = "ok"
                    continue
                self._journal.append("undo_finished", name, {"outcome": "told" if step.touches else "ok", "says": says})
                known.undone = "told" if step.touches else "ok"
                self._session.progress.note(f"undo {name}: {says}")
                told += [says] if step.touches else []
        return Ending("undone", errors.OK, f"left to do by hand: {'; '.join(told)}" if told else "")

    def _undo(self, step: Step, playbook: Path, title: str) -> Ending | None:
        self._journal.append("undo_started", step.id, {"title": title, "budget_s": step.budget_s})
        self._state.undoing = True
        self._session.progress.begin(step, undo=title)
        began = time.monotonic()
        result = self._play(playbook, step.timeout_s, f"{step.id}.undo")
        elapsed = time.monotonic() - began
        self._journal.append("undo_finished", step.id, document(result, elapsed))
        self._session.progress.end(step, result, elapsed)
        if result.outcome == "interrupted":
            return self._interrupted()
        if result.outcome != "ok":
            return Ending("failed", errors.FAILED, f"Undo of {step.title}: {result.text()}")
        return None

    # -- one playbook

    def _stopped(self) -> bool:
        self._session.progress.tick()
        return self._session.stop()

    def _play(self, playbook: Path, timeout_s: float, what: str) -> Result:
        """Run a playbook of the run. Raises LockLost instead of a result that must not be recorded any more."""
        result = self._run(playbook, timeout_s, what)
        if self._session.stop.lost():
            raise LockLost(self.request.run)
        clean = self.request.clean
        return Result(
            result.outcome,
            clean(result.outputs),
            clean(result.says),
            clean(result.changed),
            clean(result.failures),
        )

    def _run(self, playbook: Path, timeout_s: float, what: str) -> Result:
        """Run a playbook as a process of its own. what: the step, with the gate or the undo that it is."""
        request, session = self.request, self._session
        process = session.warm.take(playbook, timeout_s)
        environment = {
            "RUNBOOK_RUN": request.run,
            "RUNBOOK_STEP": what,
            "RUNBOOK_FENCE": str(self._fence),
            "RUNBOOK_JOURNAL": self._journal.location,
            "RUNBOOK_ENVIRONMENT": request.environment.name,
            "RUNBOOK_DOOR": "runbook",
            "RUNBOOK_SECRETS": ",".join(request.secrets),
        }
        try:
            return process.run(
                {**request.variables(), **self._outputs},
                request.left_out,
                environment=environment,
                on_activity=session.progress.activity,
                interrupted=self._stopped,
            )
        finally:
            process.close()


def document(result: Result, elapsed: float) -> dict[str, Any]:
    """A result as the journal has it. elapsed: seconds."""
    return {
        "outcome": result.outcome,
        "elapsed_s": round(elapsed, 3),
        "outputs": result.outputs,
        "says": result.says,
        "changed": result.changed,
        "failures": result.failures,
    }
