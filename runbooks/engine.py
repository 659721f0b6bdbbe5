"""Runs a runbook step by step, and takes a run up again where its predecessor died.

Everything is validated before anything is touched. Before each step its intent is in the journal, after it its outcome;
a step that had its effect but not its record is run again and observes that there is nothing left to do.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from runbooks import definition as definitions
from runbooks import errors, preflight
from runbooks.definition import Definition, Parameter, Step
from runbooks.environment import Environment
from runbooks.errors import Problem, Refused, one_line
from runbooks.journal import Heartbeat, Journal, LockLost, RunOutcome, RunState, find, pid_start, remember, state_home
from runbooks.progress import Progress
from runbooks.step import PlaybookProcess, Result, end_leftovers

OBSERVE_S = 60.0
"""Seconds after which a playbook that observes a default is stopped."""


class Interrupted(Exception):
    """The operator asked to stop (SIGINT, SIGTERM, SIGHUP)."""


@dataclass(slots=True)
class Stop:
    """Whether the run is to end at the next moment that it can."""

    asked: str = ""
    lost: Heartbeat | None = None

    def __call__(self) -> bool:
        return bool(self.asked) or (self.lost is not None and self.lost.lost.is_set())


@contextmanager
def signals() -> Iterator[Stop]:
    """Turn the signals that end a program into a request to stop."""
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.asked = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class Request:
    """A run that may begin: everything checked, nothing touched. left_out: hosts that may be missing and are."""

    run: str
    definition: Definition
    environment: Environment
    parameters: dict[str, Any]
    left_out: list[str] = field(default_factory=list)

    def variables(self) -> dict[str, Any]:
        return {"runbook_run": self.run, "runbook_left_out": self.left_out, **self.parameters}


class Warm:
    """Playbook processes that warm up for their turn, one after the other so that they leave the machine to the step
    that runs, and the directory they all live in."""

    def __init__(self, run: str, inventory: Path) -> None:
        self._run, self._inventory = run, inventory.resolve()
        self._directory = state_home() / "steps" / f"{os.getpid()}.{pid_start(os.getpid())}"
        _remove_remains(self._directory.parent)
        self._mutex = threading.Lock()
        self._waiting: list[tuple[Path, float]] = []
        self._ready: list[PlaybookProcess] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def plan(self, playbooks: Iterable[tuple[Path, float]]) -> None:
        """Warm these up in the background, in their order: each with the seconds after which it is stopped."""
        with self._mutex:
            self._waiting += playbooks
            if self._thread is None:
                self._thread = threading.Thread(target=self._warm_up, name="warm", daemon=True)
                self._thread.start()

    def _warm_up(self) -> None:
        while not self._closed.is_set():
            with self._mutex:
                process = self._make(*self._waiting.pop(0)) if self._waiting else None
                if process is not None:
                    self._ready.append(process)
            while not self._closed.wait(0.05) and process is not None and not process.warm():
                pass

    def _make(self, playbook: Path, timeout_s: float) -> PlaybookProcess:
        return PlaybookProcess(playbook, self._inventory, self._run, self._directory, timeout_s)

    def take(self, playbook: Path, timeout_s: float) -> PlaybookProcess:
        """The process of this playbook: the one that is warming up, or a new one."""
        with self._mutex:
            self._waiting = [entry for entry in self._waiting if entry[0] != playbook]
            found = next((process for process in self._ready if process.playbook == playbook), None)
            if found is None:
                return self._make(playbook, timeout_s)
            self._ready.remove(found)
            return found

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for process in self._ready:
            process.cancel()
        for process in self._ready:
            process.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _remove_remains(directory: Path) -> None:
    """Files of engines that were killed: they hold the environment that a playbook ran in."""
    for remains in directory.glob("*.*"):
        pid, _, start = remains.name.partition(".")
        if pid.isdigit() and pid_start(int(pid)) != start:
            shutil.rmtree(remains, ignore_errors=True)


@dataclass(slots=True)
class Session:
    """This process at work on one run."""

    run: str
    warm: Warm
    progress: Progress
    stop: Stop
    asked: float = field(default_factory=time.time)
    """Unix seconds when the operator gave the command."""


# -- before anything is touched


def prepare(definition: Definition, inventory: Path, given: Mapping[str, str], session: Session) -> Request:
    """Check everything that a new run needs. Raises Problem with the first fault, Refused when it may not run now."""
    unknown = sorted(set(given) - set(definition.parameters))
    if unknown:
        raise Problem(
            f"Runbook {definition.name} has no parameter {unknown[0]!r}, it has: "
            f"{', '.join(definition.parameters) or 'none'}",
            code="parameter-unknown",
            next_command=f"runbook show {definition.name}",
        )
    parsed = {name: _parse(definition, definition.parameters[name], text) for name, text in given.items()}
    # Everything warms up while the rest is checked.
    observed = [p.default_from for p in definition.parameters.values() if p.default_from and p.name not in parsed]
    session.warm.plan((source.playbook, OBSERVE_S) for source in observed)
    session.warm.plan((step.playbook, step.timeout_s) for step in definition.steps)
    environment = Environment(inventory)
    for name, value in parsed.items():
        _check_choice(definition, environment, definition.parameters[name], value)
    _refuse_when_busy(environment, resuming=None)
    for parameter in definition.parameters.values():
        if parameter.name not in parsed:
            parsed[parameter.name] = _default(definition, environment, parameter, parsed, session)
            _check_choice(definition, environment, parameter, parsed[parameter.name])
    left_out = preflight.check(environment, definition.reach, parsed)
    return Request(session.run, definition, environment, parsed, left_out)


def _parse(definition: Definition, parameter: Parameter, text: str) -> Any:
    try:
        return parameter.parse(text)
    except ValueError as error:
        raise Problem(
            f"Parameter {parameter.name} of runbook {definition.name} must be {error}, not {text!r}",
            code="parameter-type",
            next_command=f"runbook show {definition.name}",
        ) from None


def _check_choice(definition: Definition, environment: Environment, parameter: Parameter, value: Any) -> None:
    if not isinstance(value, definitions.PYTHON_TYPES[parameter.type]):
        raise Problem(
            f"Parameter {parameter.name} of runbook {definition.name} must be a {parameter.type}, not {value!r}",
            code="parameter-type",
            next_command=f"runbook show {definition.name}",
        )
    if parameter.choices is None:
        return
    choices = list(environment.template(parameter.choices))
    if value not in choices:
        raise Problem(
            f"Parameter {parameter.name} of runbook {definition.name} must be one of "
            f"{', '.join(map(str, choices))}, not {value!r}",
            code="parameter-choice",
            next_command=f"runbook show {definition.name}",
        )


def _default(
    definition: Definition, environment: Environment, parameter: Parameter, known: Mapping[str, Any], session: Session
) -> Any:
    source = parameter.default_from
    if source is None:
        if parameter.default is None:
            raise Problem(
                f"Runbook {definition.name} needs the parameter {parameter.name} ({parameter.title})",
                code="parameter-missing",
                next_command=f"runbook show {definition.name}",
            )
        return environment.template(parameter.default, **known)
    left_out = preflight.check(environment, source.reach, known, patient=False)
    process = session.warm.take(source.playbook, OBSERVE_S)
    try:
        result = process.run(known, left_out, on_activity=lambda _: None, interrupted=session.stop)
    finally:
        process.close()
    if session.stop():
        raise Interrupted
    if result.outcome != "ok" or source.output not in result.outputs:
        why = one_line(failure_text(result.failures)) or f"no output {source.output}"
        flag = "--" + parameter.name.replace("_", "-")
        raise Problem(
            f"What {parameter.name} should be could not be observed in environment {environment.name}: {why}",
            code="default-unobserved",
            next_command=f"runbook run {definition.name} -i {environment.path} {flag} VALUE",
        )
    return result.outputs[source.output]


def _refuse_when_busy(environment: Environment, resuming: str | None) -> None:
    """Without making a journal where there is none."""
    directory = environment.state_directory
    if (directory / "journal.sqlite").exists():
        journal = Journal(directory, environment.name)
        try:
            journal.refuse_when_busy(resuming)
        finally:
            journal.close()


def new_run(definition: Definition) -> str:
    """An id that sorts by time and says what it is."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{definition.name}-{secrets.token_hex(2)}"


# -- the run


def start(request: Request, session: Session) -> tuple[RunState, int]:
    """Run from the first step; the run's final state and the exit code. Raises Refused when another run was faster."""
    journal = Journal(request.environment.state_directory, request.environment.name)
    try:
        journal.begin(
            request.run,
            {
                "runbook": request.definition.name,
                "environment": request.environment.name,
                "inventory": str(request.environment.path),
                "parameters": request.parameters,
                "steps": [step.id for step in request.definition.steps],
                "left_out": request.left_out,
                "asked": session.asked,
            },
        )
        remember(request.environment.name, journal.directory)
        return _go(request, journal, session)
    finally:
        journal.close()


def resume(name: str | None, progress: Progress, stop: Stop) -> tuple[RunState, int, Request]:
    """Take a run up again from its first step without a successful outcome.

    Raises Problem when it cannot be, Refused when its process lives or a newer run has been there.
    """
    journal, run = find(name)
    try:
        state = journal.state(run)
        definition = definitions.load(state.runbook)
        if list(state.steps) != [step.id for step in definition.steps]:
            raise Refused(
                f"Runbook {state.runbook} has other steps now than when run {run} began",
                code="definition-changed",
                next_command=f"runbook abort {run}",
            )
        if state.state == "aborted":
            raise Refused(
                f"Run {run} was given up: {state.reason}",
                code="run-aborted",
                next_command=f"runbook run {state.runbook} --help",
            )
        newest = journal.runs()[-1]
        if newest != run and state.state != "succeeded":
            raise Refused(
                f"Run {run} has been superseded by {newest} in environment {journal.environment}",
                code="run-superseded",
                next_command=f"runbook status {newest}",
            )
        environment = Environment(Path(state.inventory))
        request = Request(run, definition, environment, state.parameters, state.left_out)
        if state.state == "succeeded":
            return state, errors.OK, request
        journal.refuse_when_busy(resuming=run)
        warm = Warm(run, environment.path)
        session = Session(run, warm, progress, stop)
        try:
            request.left_out = preflight.check(environment, definition.reach, state.parameters)
            journal.take_over(run, {"left_out": request.left_out})
            ended = end_leftovers(run)
            if ended:
                progress.note(f"Ended {ended} process(es) that the dead run had left behind")
            warm.plan((step.playbook, step.timeout_s) for step in definition.steps if step.id in state.pending)
            return *_go(request, journal, session), request
        finally:
            warm.close()
    finally:
        journal.close()


def _go(request: Request, journal: Journal, session: Session) -> tuple[RunState, int]:
    state = journal.state(request.run)
    with Heartbeat(journal) as heartbeat, session.progress.showing(request, state):
        session.stop.lost = heartbeat
        succeeded = False
        try:
            outcome, code, reason = _steps(request, journal, session)
            succeeded = outcome == "succeeded"
        except LockLost:
            raise _taken_over(request) from None
        finally:
            # While the lock is held still: whoever takes it next must not meet a worker of this run.
            if not succeeded:
                end_leftovers(request.run)
        try:
            journal.finish(outcome, reason)
        except LockLost:
            raise _taken_over(request) from None
    return journal.state(request.run), code


def _taken_over(request: Request) -> Refused:
    return Refused(
        f"Run {request.run} has been taken over by another process",
        code="run-taken-over",
        next_command=f"runbook status {request.run}",
    )


def _steps(request: Request, journal: Journal, session: Session) -> tuple[RunOutcome, int, str]:
    """The steps that are left; how it ended, the exit code and why."""
    state = journal.state(request.run)
    steps = [step for step in request.definition.steps if step.id in state.pending]
    outputs = state.outputs
    for step in steps:
        if session.stop():
            break
        journal.append("step_started", step.id, {"budget_s": step.budget_s})
        session.progress.begin(step)
        began = time.monotonic()
        result = _step(request, step, {**request.variables(), **outputs}, session)
        elapsed = time.monotonic() - began
        journal.append(
            "step_finished",
            step.id,
            {
                "outcome": result.outcome,
                "elapsed_s": round(elapsed, 3),
                "outputs": result.outputs,
                "says": result.says,
                "changed": result.changed,
                "failures": result.failures,
            },
        )
        session.progress.end(step, result, elapsed)
        outputs = {**outputs, **result.outputs}
        if result.outcome == "interrupted":
            break
        if result.outcome != "ok":
            if step.gate:
                return "refused", errors.REFUSED, f"{step.title}: {failure_text(result.failures)}"
            return "failed", errors.FAILED, f"{step.title}: {failure_text(result.failures)}"
    else:
        return "succeeded", errors.OK, ""
    return "interrupted", errors.INTERRUPTED, f"stopped by {session.stop.asked or 'the loss of its lock'}"


def _step(request: Request, step: Step, variables: dict[str, Any], session: Session) -> Result:
    process = session.warm.take(step.playbook, step.timeout_s)
    try:
        return process.run(variables, request.left_out, on_activity=session.progress.activity, interrupted=session.stop)
    finally:
        process.close()


def failure_text(failures: Sequence[Mapping[str, str]]) -> str:
    """The failures in plain words, one a host."""
    return "; ".join(": ".join(p for p in (f["host"], f["task"], f["message"]) if p) for f in failures)
