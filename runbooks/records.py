"""What the journal holds: its records, and the state of a run that they add up to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

StepOutcome = Literal["ok", "failed", "timed out", "interrupted"]
# "running" is what the records say; whether its process still lives is a question for the lock.
RunOutcome = Literal["running", "succeeded", "failed", "refused", "interrupted", "aborted", "waiting", "undone"]
Door = Literal["runbook", "ansible-playbook", "awx"]

KINDS = (
    "plan_made",
    "approval_given",
    "run_started",
    "run_resumed",
    "run_finished",
    "step_started",
    "step_finished",
    "undo_started",
    "undo_finished",
    "effect_intended",
    "effect_done",
    "window_checked",
    "emergency_declared",
    "notify_intended",
    "notify_done",
    "acknowledged",
    "alert_seen",
    "alert_decided",
    "alert_refused",
    "note",
)


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the journal. wall: unix seconds; mono: CLOCK_MONOTONIC seconds of the machine that wrote it.

    fence: the lock's, for what the holder of a run's lock wrote; None for the rest. A record with an empty hash is
    older than the chain.
    """

    seq: int
    run: str
    wall: float
    mono: float
    kind: str
    step: str | None
    data: dict[str, Any]
    fence: int | None = None
    door: str | None = None
    id: str = ""
    hash: str = ""
    key: str = ""


@dataclass(slots=True)
class StepState:
    """What the journal says about one step; times in unix seconds, None while there is none."""

    step: str
    attempts: int = 0
    outcome: StepOutcome | None = None
    started: float | None = None
    started_mono: float | None = None
    ended: float | None = None
    elapsed_s: float | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    changed: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    undone: StepOutcome | Literal["begun", "told"] | None = None
    """How its undo went; told: a person was told what to do, because no playbook can."""


@dataclass(slots=True)
class RunState:
    """What the journal says about one run."""

    run: str
    runbook: str
    environment: str
    inventory: str
    who: str
    host: str
    parameters: dict[str, Any]
    started: float
    started_mono: float
    boot: str
    steps: dict[str, StepState]
    left_out: list[str] = field(default_factory=list)
    state: RunOutcome = "running"
    reason: str = ""
    ended: float | None = None
    ended_mono: float | None = None
    resumed: int = 0
    asked: float = 0.0
    undoing: bool = False
    """Its undo has begun: it can only be undone now, not resumed."""
    plan: str | None = None
    lifted: bool = False
    """It began under an emergency, without the approvals that it would need."""
    emergency_until: float | None = None
    secrets: dict[str, str] = field(default_factory=dict)
    """Name -> fingerprint of the secret parameters; their values are nowhere."""
    lock_store: str = ""

    @property
    def outputs(self) -> dict[str, Any]:
        """The outputs of all successful steps; a later step's wins."""
        return {k: v for step in self.steps.values() if step.outcome == "ok" for k, v in step.outputs.items()}

    @property
    def begun(self) -> list[str]:
        """The steps that may have had effects which nothing has taken back, in their order."""
        return [name for name, step in self.steps.items() if step.attempts and step.undone != "ok"]

    @property
    def pending(self) -> list[str]:
        """The steps from the first one that has no successful outcome."""
        ids = list(self.steps)
        first = next((i for i, step in enumerate(ids) if self.steps[step].outcome != "ok"), len(ids))
        return ids[first:]


def fold(records: Iterable[Record]) -> RunState:
    """The state that one run's records add up to. Raises ValueError when they do not begin with its start.

    Kinds that say nothing about the state (plans, approvals, effects, notifications) may stand anywhere.
    """
    state: RunState | None = None
    first = ""
    for record in records:
        data = record.data
        first = first or record.kind
        if record.kind == "run_started":
            state = RunState(
                run=record.run,
                runbook=data["runbook"],
                environment=data["environment"],
                inventory=data["inventory"],
                who=data["who"],
                host=data["host"],
                parameters=data["parameters"],
                started=record.wall,
                started_mono=record.mono,
                boot=data["boot"],
                steps={step: StepState(step) for step in data["steps"]},
                left_out=data.get("left_out", []),
                asked=data.get("asked", record.wall),
                plan=data.get("plan"),
                lifted=data.get("approvals_lifted", False),
                secrets=data.get("secrets", {}),
                lock_store=data.get("lock_store", ""),
            )
        elif state is None:
            if record.kind.startswith(("step_", "run_", "effect_", "undo_")):
                raise ValueError(f"the journal of run {record.run} begins with {record.kind}")
        elif record.kind == "run_resumed":
            state.state, state.reason, state.ended, state.ended_mono = "running", "", None, None
            state.resumed += 1
            state.left_out = data.get("left_out", state.left_out)
            state.undoing = state.undoing or data.get("undo", False)
            state.plan, state.lifted = data.get("plan", state.plan), data.get("approvals_lifted", state.lifted)
        elif record.kind == "emergency_declared":
            state.emergency_until = data["expires"]
        elif record.kind == "run_finished":
            state.state, state.reason = data["state"], data.get("reason", "")
            state.ended, state.ended_mono = record.wall, record.mono
        elif record.kind == "step_started" and record.step is not None:
            step = state.steps[record.step]
            step.attempts += 1
            step.started, step.started_mono, step.ended, step.outcome = record.wall, record.mono, None, None
            step.elapsed_s, step.failures, step.undone = None, [], None
        elif record.kind == "step_finished" and record.step is not None:
            step = state.steps[record.step]
            step.outcome, step.ended, step.elapsed_s = data["outcome"], record.wall, data["elapsed_s"]
            step.outputs, step.says = data.get("outputs", {}), data.get("says", "")
            step.changed, step.failures = data.get("changed", []), data.get("failures", [])
        elif record.kind == "undo_started" and record.step is not None:
            state.undoing, state.steps[record.step].undone = True, "begun"
        elif record.kind == "undo_finished" and record.step is not None:
            state.undoing, state.steps[record.step].undone = True, data["outcome"]
    if state is None:
        raise ValueError(f"the journal holds no start, it begins with {first}" if first else "no records")
    return state


def dumps(data: dict[str, Any]) -> str:
    """The data of a record as its text in the journal."""
    return json.dumps(data, separators=(",", ":"), default=str)
