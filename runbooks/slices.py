"""A step that AWX splits into several jobs: what each of them does, and which of them ends the step.

AWX gives each job every Nth host and starts it whenever there is room: side by side, or one after the other. They are
one run, with one fence. Whoever comes first takes the run's locks, the others join. Each writes how its own part began
and ended; the one whose part is the last of the N in the journal ends the step, with the worst outcome of all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from runbooks import errors
from runbooks.definition import Step
from runbooks.errors import Problem
from runbooks.records import Record, StepOutcome
from runbooks.step import Result
from runbooks.work import Ending, Work, document

WORST: tuple[StepOutcome, ...] = ("ok", "interrupted", "failed", "timed out")
"""From the best to the worst."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One job of a sliced one. sliced: the id of AWX's job for all of them; job: its own; of: how many there are."""

    sliced: str
    job: str
    of: int

    @property
    def share(self) -> str:
        """What the jobs hold the run's locks for together."""
        return f"slices of AWX job {self.sliced}"


def of_job(extra: Mapping[str, Any], told: str, workflow: str, job: str) -> Slice | None:
    """The slice that an AWX job is; None when it is none. told: the run that it was told. Raises Problem.

    AWX tells a slice neither its number nor how many there are: the job template's variables say how many, and the
    workflow's job that a slice is told of is the sliced one, not the runbook's.
    """
    of = int((extra.get("runbook_awx") or {}).get("slices") or 1)
    if not job or of < 2 or told == f"awx-{workflow}":
        return None
    if not told or not workflow:
        raise Problem(
            f"AWX job {job} is one slice of {of} by itself, so nobody would know when all of them have ended",
            code="slice-alone",
            next_command=f"runbook resume {told or 'RUN'}",
        )
    return Slice(workflow, job, of)


def parts(records: Iterable[Record], step: str, sliced: str) -> dict[str, dict[str, Any]]:
    """Job -> how its part of a step ended (without an outcome: it has begun), in the order in which they ended."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        told = record.data.get("slice")
        if record.kind == "note" and record.step == step and told and told["sliced"] == sliced:
            found.pop(told["job"], None)
            found[told["job"]] = told
    return found


def together(ended: Iterable[Mapping[str, Any]]) -> Result:
    """What came of a step, from its parts: the worst outcome, and all that was said, changed and failed."""
    whole = Result("ok")
    changed: dict[str, set[str]] = {}
    for part in ended:
        whole.outcome = max(whole.outcome, part["outcome"], key=WORST.index)
        whole.outputs |= part["outputs"]
        whole.says = part["says"] or whole.says
        whole.failures += part["failures"]
        for each in part["changed"]:
            changed.setdefault(each["task"], set()).update(each["hosts"])
    whole.changed = [{"task": task, "hosts": sorted(hosts)} for task, hosts in changed.items()]
    return whole


class SliceWork(Work):
    """The work of one slice on its step."""

    slice: Slice
    own: Problem | None = None
    """What is wrong with this slice, where another one ends the step."""
    left = False
    """Another slice ends the step."""

    def _held_back(self, step: Step) -> Ending | None:
        return None  # In the step, as the gates: whatever keeps a slice from it is how its part ended.

    def _gates_before(self, step: Step) -> Ending | None:
        return None

    def _step(self, step: Step) -> Ending | None:
        mine: dict[str, Any] = {"sliced": self.slice.sliced, "job": self.slice.job, "of": self.slice.of}
        mine |= {"hosts": self.request.environment.hosts(), "left_out": self.request.left_out}
        began = time.monotonic()
        held = super()._held_back(step) or super()._gates_before(step)
        if held is None:
            data = {"budget_s": step.budget_s, "slices": {"sliced": self.slice.sliced, "of": self.slice.of}}
            name = f"{self.request.run}/{step.id}/{self.slice.sliced}"
            self._journal.append("step_started", step.id, data, once=name)
            self._journal.append("note", step.id, {"text": f"{self._name()} began", "slice": mine})
            self._state.steps[step.id].attempts += 1
            self._session.progress.begin(step)
            result = self._performed(step)
        else:
            outcome: StepOutcome = "interrupted" if held.state == "interrupted" else "failed"
            result = Result(outcome, failures=[{"host": "", "task": "", "message": held.reason}])
        # Once its last part is written, another one may end the run and give the locks back: nothing is lost then.
        lease, self._session.stop.lease = self._session.stop.lease, None
        mine |= document(result, time.monotonic() - began)
        text = f"{self._name()}: {result.outcome}" + (f" ({result.text()})" if result.failures else "")
        self._journal.append("note", step.id, {"text": text, "slice": mine})
        found = parts(self._journal.records(self.request.run), step.id, self.slice.sliced)
        ended = [part for part in found.values() if "outcome" in part]
        if len(ended) < self.slice.of or ended[-1]["job"] != self.slice.job:
            return self._leave(step, result, found)
        self._session.stop.lease = lease
        known = self._journal.state(self.request.run).steps[step.id]
        if not known.attempts or known.outcome is not None:
            return held  # None of them has begun it.
        self._state.steps[step.id] = known
        whole = together(ended)
        # Undoing is the workflow's own job, which has all hosts: this one has a part of them.
        done = self._finished(replace(step, on_failure="stop"), whole, max(0.0, time.time() - (known.started or 0.0)))
        if done is None and whole.outcome != "ok":
            return Ending("interrupted", errors.INTERRUPTED, f"{step.title}: one of its slices was stopped")
        return done

    def _name(self) -> str:
        return f"slice of AWX job {self.slice.job} (one of {self.slice.of})"

    def _leave(self, step: Step, result: Result, found: Mapping[str, Mapping[str, Any]]) -> Ending:
        """Its part is done, and others are not: how the run stands if nobody else is at work on it."""
        self.left = True
        if result.outcome != "ok":
            self.own = Problem(
                f"This slice of {step.id} {result.outcome}: {result.text()}",
                code="slice-failed",
                touched="The other slices go on",
                next_command=f"runbook status {self.request.run}",
            )
        silent = [job for job, part in found.items() if "outcome" not in part]
        told = f"{step.title}: {len(found) - len(silent)} of {self.slice.of} slices have ended"
        if silent:
            reason = f"{told}, AWX job {', '.join(silent)} without a word"
            return Ending("interrupted", errors.INTERRUPTED, reason, part=True)
        return Ending("waiting", errors.OK, told, quiet=True, part=True)
