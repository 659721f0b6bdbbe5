"""A run from inside plain ``ansible-playbook`` or an AWX job: the doors beside the command line.

The engine does all that it does for the command line, in a thread of its own, but for one thing: where it would start a
process for a playbook of a step, it lets Ansible go on, which comes to the plays of that step by itself, and it goes on
when they have ended. Only one of the two is ever at work. So the same code takes the same locks, asks for the same
windows, approvals and gates, and writes the same journal.
"""

from __future__ import annotations

import atexit
import io
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from runbooks import definition as definitions
from runbooks import engine, errors, request
from runbooks.commands import ending
from runbooks.definition import Definition, Step
from runbooks.effects import Effects
from runbooks.errors import Problem
from runbooks.generate import GATE_VARIABLE as GATE
from runbooks.generate import NAME_VARIABLE as NAME
from runbooks.generate import STEP_VARIABLE as STEP
from runbooks.journal import Journal
from runbooks.notify import Notifier
from runbooks.progress import Progress
from runbooks.records import Door as DoorName
from runbooks.records import StepOutcome
from runbooks.request import Request
from runbooks.session import Interrupted, Order, Session, Stop, Warm
from runbooks.slices import Slice, SliceWork, of_job
from runbooks.step import MARK, Events, Result
from runbooks.work import Ending, Work

WATCH_S = 0.2
"""Seconds between two looks at a step's time and at the lease."""
FAREWELL_S = 20.0
"""Seconds that the engine has to write the end of a run whose ansible-playbook ends early."""


@dataclass(frozen=True, slots=True)
class Call:
    """How ansible-playbook was called. plays: Ansible's objects, in their order. extra: its extra variables, alive.

    check: in check mode, which makes no run. odd: an option that leaves tasks out (--start-at-task, --step).
    """

    playbook: Path
    inventories: Sequence[str]
    plays: Sequence[Any]
    extra: dict[str, Any]
    tags: Sequence[str] = ("all",)
    skip_tags: Sequence[str] = ()
    check: bool = False
    odd: str = ""


@dataclass(slots=True)
class Entry:
    """What ansible-playbook is about to do: which runbook, and which play is which playbook of it.

    A unit is a step's id, or that with its gate: "route", "route.before.0". alone: the steps are a part of the run's
    steps, and what comes after is another job of an AWX workflow. slice: this is one of several jobs on the same step.
    """

    definition: Definition
    units: list[str]
    door: DoorName
    run: str
    alone: bool
    slice: Slice | None = None


# -- what was called


def entry(call: Call) -> Entry | None:
    """The runbook that this playbook is of; None when it is none. Raises Problem."""
    name = next((play.vars[NAME] for play in call.plays if NAME in play.vars), None)
    if name is not None:
        definition = definitions.load(str(name))
        chosen = _chosen(definition, call)
    else:
        found = None if call.check else _step_of(call)
        if found is None:
            return None
        definition, step = found
        chosen = [step.id]
        for play in call.plays:
            play.vars = {**play.vars, STEP: step.id}
    if call.odd:
        raise Problem(
            f"{call.odd} would leave tasks of runbook {definition.name} out, unseen by its journal",
            code="door-leaves-out",
            next_command="runbook resume RUN",
        )
    workflow, job = (_awx(call.extra, what) for what in ("workflow_job_id", "job_id"))
    told = str(call.extra.get("runbook_run") or "")
    run = (told or f"awx-{workflow or job}") if job else request.new_run(definition)
    alone = bool(job and (workflow or told))
    if not alone:
        definition = replace(definition, steps=tuple(step for step in definition.steps if step.id in chosen))
    units = [unit for unit in dict.fromkeys(map(unit_of, call.plays)) if unit and unit.split(".")[0] in chosen]
    part = of_job(call.extra, told, workflow, job)
    return Entry(definition, units, "awx" if job else "ansible-playbook", run, alone, part)


def unit_of(play: Any) -> str:
    step, gate = play.vars.get(STEP, ""), play.vars.get(GATE, "")
    return f"{step}.{gate}" if gate else str(step)


def _awx(extra: Mapping[str, Any], what: str) -> str:
    return str(extra.get(f"awx_{what}") or extra.get(f"tower_{what}") or "")


def _chosen(definition: Definition, call: Call) -> list[str]:
    """The steps that the tags leave. Raises Problem when that is none."""
    steps = [step.id for step in definition.steps]
    wanted = [s for s in steps if not call.tags or {"all", "tagged", s} & set(call.tags)]
    chosen = [s for s in wanted if s not in call.skip_tags]
    if not chosen:
        raise Problem(
            f"The tags {', '.join(call.tags)} name no step of runbook {definition.name}, it has: {', '.join(steps)}",
            code="door-no-step",
            next_command=f"runbook show {definition.name}",
        )
    return chosen


def _step_of(call: Call) -> tuple[Definition, Step] | None:
    """The step whose playbook was called by itself. Raises Problem when it is that of several runbooks."""
    path = call.playbook.resolve()
    found = {}
    for name in definitions.files():
        definition = definitions.load(name)
        for step in definition.steps:
            if step.playbook == path:
                found[name] = definition, step
    wanted = call.extra.get("runbook")
    if wanted in found:
        return found[wanted]
    if len(found) > 1 or (found and wanted):
        raise Problem(
            f"The playbook {call.playbook.name} is a step of the runbooks {', '.join(sorted(found))}, and "
            + (f"not of {wanted}" if wanted else "it is not said for which it is run"),
            code="door-which-runbook",
            next_command=f"ansible-playbook {call.playbook} -e runbook={min(found)}",
        )
    return next(iter(found.values()), None)


# -- the two that take turns


class Cold(Warm):
    """Nothing warms up: Ansible runs already."""

    def plan(self, playbooks: Iterable[tuple[Path, float]]) -> None:
        pass


class Quiet(Progress):
    """Ansible itself shows the progress; what else is to be said goes to ``tell``."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(io.StringIO())
        self._tell = tell

    def note(self, text: str) -> None:
        self._tell(text)


@dataclass(slots=True)
class Turn:
    """Ansible's turn with one unit. variables: the outputs of the steps before. ``result`` is what a process of its own
    would have yielded."""

    unit: str
    timeout_s: float
    effects: Effects
    variables: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    events: Events = field(default_factory=Events)
    outputs: Any = None
    entered: bool = False
    failed: bool = False

    def __post_init__(self) -> None:
        from ansible.executor.stats import AggregateStats

        self.outputs = AggregateStats()

    def take(self, kind: str, task: str, host: str, res: Mapping[str, Any]) -> None:
        self.events.take({"event": kind, "event_data": {"task": task, "host": host, "res": res}})
        if kind == "runner_on_ok":
            for one in [res, *(r for r in res.get("results") or [] if isinstance(r, Mapping))]:
                self._output(one.get("ansible_stats"))

    def _output(self, stats: Any) -> None:
        """Collected as Ansible itself does it for its own statistics, but for one unit alone."""
        if not isinstance(stats, Mapping) or stats.get("per_host"):
            return
        add = self.outputs.update_custom_stats if stats.get("aggregate") else self.outputs.set_custom_stats
        for name, value in stats.get("data", {}).items():
            add(name, value)

    def so_far(self) -> dict[str, Any]:
        return dict(self.outputs.custom.get("_run", {}))

    def result(self, outcome: StepOutcome | None = None, reason: str = "") -> Result:
        self.events.outputs = self.so_far()
        if not self.entered and outcome is None:
            outcome, reason = "failed", "ansible-playbook ended before it came to this step"
        return self.events.result(outcome or ("failed" if self.failed else "ok"), reason)


@dataclass(frozen=True, slots=True)
class Ended:
    """What the engine came to. problem: what a person is to be told."""

    code: int
    problem: Problem | None = None


class Within(Work):
    """Work in the ansible-playbook that this process is."""

    def __init__(self, door: Door, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._door = door

    def _announce(self) -> None:
        # An AWX workflow is one run for people, however many jobs go on with it.
        if not (self._door.entry.alone and self._state.resumed):
            super()._announce()

    def _pending(self) -> list[Step]:
        mine = {unit.split(".")[0] for unit in self._door.entry.units}
        return [step for step in super()._pending() if step.id in mine]

    def steps(self) -> Ending:
        left = [step.id for step in super()._pending()]
        mine = [step.id for step in self._pending()]
        if mine and left[0] != mine[0]:
            return Ending("waiting", errors.REFUSED, f"step {left[0]} comes before {mine[0]}")
        ended = super().steps()
        left = [step for step in left if step not in mine]
        if ended.state == "succeeded" and left:
            return Ending("waiting", errors.OK, f"the workflow's next job goes on with {left[0]}", quiet=True)
        return ended

    def _run(self, playbook: Path, timeout_s: float, what: str) -> Result:
        if what not in self._door.entry.units:
            return super()._run(playbook, timeout_s, what)
        effects = Effects(self._journal, self.request.hidden(), what)
        return self._door.hand_over(Turn(what, timeout_s, effects, dict(self._outputs)))


class WithinSlice(SliceWork, Within):
    """Work in the ansible-playbook of one slice of a step."""

    def __init__(self, door: Door, part: Slice, *arguments: Any) -> None:
        super().__init__(door, *arguments)
        self.slice = part


class Door:
    """Ansible's side. All methods but ``hand_over`` are called by the callback, in ansible-playbook's main thread.

    tell: shows a line. They raise SystemExit when the playbook must end; ``problem`` has been told then.
    """

    def __init__(self, call: Call, entry: Entry, tell: Callable[[str], None]) -> None:
        self.entry = entry
        self._call, self._tell = call, tell
        self._to_ansible: queue.SimpleQueue[Turn | Ended] = queue.SimpleQueue()
        self._to_engine: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._now: Turn | Ended | None = None
        self._stop = Stop()
        self._why: tuple[StepOutcome, str] | None = None
        self._work: Within | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._engine, name="runbook", daemon=True)

    # -- the engine's thread

    def _engine(self) -> None:
        try:
            ended = self._checked() if self._call.check else self._worked()
        except Problem as problem:
            ended = Ended(problem.exit_code, problem)
        except Interrupted:
            ended = Ended(errors.INTERRUPTED)
        except Exception as error:  # Ansible must not go on, whatever it was.
            from runbooks.cli import fault

            ended = Ended(errors.FAILED, fault(error))
        self._to_ansible.put(ended)

    def _session(self, path: Path) -> Session:
        order = Order(
            plan=str(self._call.extra.get("runbook_plan") or "") or None,
            emergency=str(self._call.extra.get("runbook_emergency") or ""),
        )
        return Session(self.entry.run, Cold(self.entry.run, path), Quiet(self._tell), self._stop, order)

    def _checked(self) -> Ended:
        """Check mode: the parameters are what they would be, and nothing else is done."""
        path = self._inventory()
        session = self._session(path)
        try:
            self._provide(request.prepare(self.entry.definition, path, self._given(), session, planning=True))
        finally:
            session.warm.close()
        return Ended(errors.OK)

    def _worked(self) -> Ended:
        path, entry = self._inventory(), self.entry
        session, given = self._session(path), self._given()
        share = entry.slice.share if entry.slice else ""
        # What is left of a dead run is found by it, but not by a slice beside it.
        os.environ[MARK] = f"{entry.run}/slice" if share else entry.run
        way = engine.Way(entry.door, self._within, Cold, share)
        try:
            if share or (entry.alone and self._is_known(path)):
                ended = engine.resume(entry.run, session.progress, self._stop, session.order, path, way=way)
            else:
                ended = engine.start(request.prepare(entry.definition, path, given, session), session, way)
        finally:
            session.warm.close()
        if isinstance(self._work, SliceWork) and self._work.left:
            problem = self._work.own
            return Ended(errors.OK if problem is None else errors.FAILED, problem)
        if ended.state.state == "waiting" and ended.code == errors.OK:
            return Ended(errors.OK)  # It goes on in another job.
        return Ended(ending.end(ended, as_json=False))

    def _within(self, request: Request, journal: Journal, session: Session, fence: int, notifier: Notifier) -> Work:
        self._provide(request)
        self._stop = session.stop
        self._tell(f"Run {request.run} of runbook {request.definition.name} on {request.environment.name}")
        arguments = (request, journal, session, fence, notifier)
        part = self.entry.slice
        self._work = WithinSlice(self, part, *arguments) if part else Within(self, *arguments)
        return self._work

    def _is_known(self, path: Path) -> bool:
        from runbooks.environment import Environment
        from runbooks.journal import opened

        environment = Environment(path)
        if not environment.has_journal():
            return False
        with opened(environment.open_journal()) as journal:
            return self.entry.run in journal.runs()

    def _inventory(self) -> Path:
        if len(self._call.inventories) != 1 or "," in self._call.inventories[0]:
            raise Problem(
                f"A runbook runs in one environment, so ansible-playbook takes one inventory for it, not "
                f"{' and '.join(self._call.inventories) or 'none'}",
                code="door-inventory",
                next_command=f"ansible-playbook -i INVENTORY {self._call.playbook}",
            )
        return Path(self._call.inventories[0])

    def _given(self) -> dict[str, str]:
        """The parameters among the extra variables, as the command line would have them.

        A secret one goes on in the environment variable that it is read from.
        """
        given = {}
        for name, parameter in self.entry.definition.parameters.items():
            value = self._call.extra.get(name)
            if value is None or value == "":
                continue
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if parameter.secret:
                os.environ[parameter.variable] = text
            else:
                given[name] = text
        return given

    def _provide(self, request: Request) -> None:
        """Give the plays what the engine would have given them, and leave out of them who does not answer."""
        for name in self.entry.definition.parameters:
            os.environ.pop(self.entry.definition.parameters[name].variable, None)
            if name in self._call.extra:  # Of the parameter's type: -e again=false is a string.
                self._call.extra[name] = request.variables()[name]
        for play in self._call.plays:
            play.vars = {**play.vars, **request.variables(), "runbook_door": self.entry.door}
            hosts = [play.hosts] if isinstance(play.hosts, str) else list(play.hosts)
            play.hosts = [*hosts, *(f"!{host}" for host in request.left_out)]
        if request.left_out:
            self._tell(f"Left out, because they do not answer: {', '.join(request.left_out)}")

    def hand_over(self, turn: Turn) -> Result:
        """Let Ansible go on with a unit, and wait for its end."""
        self._show(turn.variables, self.entry.units[self.entry.units.index(turn.unit) :])
        self._to_ansible.put(turn)
        return self._to_engine.get()

    # -- Ansible's thread

    def open(self) -> None:
        """Before the first play."""
        self._thread.start()
        if not self._call.check:
            atexit.register(self._at_exit)
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._wait()

    def play(self, play: Any) -> None:
        """A play begins."""
        unit = unit_of(play)
        if self._call.check or unit not in self.entry.units:
            return
        turn = self._now
        if isinstance(turn, Turn) and turn.unit != unit:
            self._give_back(turn.result())
            turn = self._now
        if not isinstance(turn, Turn):
            # The run is over, or an earlier job of it did this step: its tasks must not run.
            raise SystemExit(turn.code if turn is not None else errors.FAILED)
        if turn.unit != unit:
            self._give_back(turn.result("failed", f"ansible-playbook came to {unit} instead of it"))
        turn.entered = True
        # Ansible has made its copy of the play before it says so.
        play.vars = {**play.vars, **turn.variables}

    def started(self, task: Any, host: str) -> None:
        if isinstance(self._now, Turn):
            self._now.effects.intended(task, host)

    def done(self, task: Any, host: str, result: Mapping[str, Any], how: Literal["ok", "failed", "skipped"]) -> None:
        turn = self._now
        if isinstance(turn, Turn):
            turn.effects.done(task, host, result, how)
            kind = f"runner_on_{how}"
            turn.take(kind, task.get_name(), host, result)
            self._pass_on(turn)

    def failed(self, task: Any, host: str, result: Mapping[str, Any], *, unreachable: bool, ignored: bool) -> None:
        turn = self._now
        if isinstance(turn, Turn):
            how = "unreachable" if unreachable else "failed"
            turn.effects.done(task, host, result, how)
            if not ignored and (unreachable or not is_rescued(task)):
                turn.take(f"runner_on_{how}", task.get_name(), host, result)
                turn.failed = True

    def close(self, *, failed: bool) -> None:
        """After the last play, if Ansible came that far. Raises SystemExit when the run did not succeed.

        failed: what Ansible's statistics say of all plays; those of earlier units did not fail, or it had ended there.
        """
        while isinstance(self._now, Turn):
            self._now.failed = self._now.failed or failed
            self._give_back(self._now.result())
        self._closed.set()
        if isinstance(self._now, Ended) and self._now.code != errors.OK:
            raise SystemExit(self._now.code)

    def _pass_on(self, turn: Turn) -> None:
        """Outputs are there before Ansible looks for the hosts of a later step's plays."""
        outputs = {name: value for name, value in turn.so_far().items() if name != "says"}
        self._show(outputs, self.entry.units[self.entry.units.index(turn.unit) + 1 :])

    def _show(self, variables: Mapping[str, Any], units: Sequence[str]) -> None:
        """Make them variables of the plays of these units, as ``vars`` of an import_playbook would be."""
        for play in self._call.plays if variables else ():
            if unit_of(play) in units:
                play.vars = {**play.vars, **variables}

    def _give_back(self, result: Result) -> None:
        self._to_engine.put(result)
        self._wait()

    def _wait(self) -> None:
        self._now = self._to_ansible.get()
        if isinstance(self._now, Ended):
            self._closed.set()
            if self._now.problem is not None:
                self._tell_problem(self._now.problem)
            if self._now.code != errors.OK:
                raise SystemExit(self._now.code)

    def _tell_problem(self, problem: Problem) -> None:
        print(f"error: {problem}", file=sys.stderr, flush=True)

    # -- when Ansible ends early

    def _watch(self) -> None:
        """End ansible-playbook when a step takes too long or the run's lock is lost: nobody else looks at it."""
        while not self._closed.wait(WATCH_S):
            turn = self._now
            lost = self._stop.lost()
            late = isinstance(turn, Turn) and time.monotonic() - turn.began > turn.timeout_s
            if lost or late:
                self._why = (
                    ("interrupted", lost)
                    if lost or not isinstance(turn, Turn)
                    else ("timed out", f"stopped after {turn.timeout_s:.0f} s, its time limit")
                )
                # Ansible ends its workers on it.
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _at_exit(self) -> None:
        """Ansible has ended without its last word: an interrupt, or a playbook that it could not go on with."""
        if self._closed.is_set():
            return
        outcome, reason = self._why or ("interrupted", "")
        if not reason:
            self._stop.asked = self._stop.asked or "the end of ansible-playbook"
        turn = self._now
        if isinstance(turn, Turn):
            self._to_engine.put(turn.result(outcome, reason))
        with suppress(queue.Empty):
            ended = self._to_ansible.get(timeout=FAREWELL_S)
            if isinstance(ended, Ended) and ended.problem is not None:
                self._tell_problem(ended.problem)


def is_rescued(task: Any) -> bool:
    """Whether a failure of the task is caught: it stands in the main part of a block that has a rescue."""
    child, parent = task, task._parent
    while parent is not None:
        inside = getattr(parent, "block", None) or []
        if getattr(parent, "rescue", None) and any(each._uuid == child._uuid for each in inside):
            return True
        child, parent = parent, parent._parent
    return False
