"""What a run shows while it runs: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from runbooks.definition import Definition, Step
from runbooks.journal import RunState
from runbooks.step import Activity, Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from runbooks.request import Request

MARKS = {
    "ok": "✓",
    "failed": "✗",
    "timed out": "✗",
    "interrupted": "■",
    "running": "▶",
    "waiting": "·",
    "undone": "↶",
    "undo failed": "✗",
    "undo unfinished": "■",
    "undo by hand": "!",
}
UNDONE = {
    "ok": "undone",
    "told": "undo by hand",
    "begun": "undo unfinished",
    "failed": "undo failed",
    "timed out": "undo failed",
    "interrupted": "undo unfinished",
}
"""What a step is called whose undo has been tried."""
SIGN_OF_LIFE_S = 30.0
"""Seconds between two lines of a step that goes on, where there is no table."""
STYLES = {"ok": "green", "failed": "bold red", "timed out": "bold red", "interrupted": "yellow", "running": "cyan"}


def seconds(value: float) -> str:
    """A duration for people: 8.4 s, 3 min 05 s."""
    return f"{value:.1f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60):02d} s"


class Progress:
    """Plain lines on a stream: one when a step begins, one when it ends, the failures in full."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._total, self._number = 0, 0
        self._undoing, self._over = False, False
        self._step: Step | None = None
        self._activity = Activity()
        self._began = self._next = 0.0

    def _line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.stream, flush=True)

    @contextmanager
    def showing(self, request: Request, state: RunState) -> Iterator[None]:
        """For as long as the steps run."""
        self._total = len(state.steps)
        self._number = self._total - len(state.pending)
        self._line(headline(request))
        for text in notes(request, state):
            self._line(text)
        yield

    def begin(self, step: Step, undo: str = "") -> None:
        """undo: the title of the undoing that begins instead of the step."""
        self._number += 0 if undo else 1
        self._step, self._began, self._over, self._activity = step, time.monotonic(), False, Activity()
        self._next = min(SIGN_OF_LIFE_S, step.budget_s)
        self._line(f"{self._where(undo)} {step.id}: {undo or step.title} (budget {seconds(step.budget_s)})")

    def _where(self, undo: object) -> str:
        self._undoing = bool(undo)
        return "[undo]" if undo else f"[{self._number}/{self._total}]"

    def activity(self, activity: Activity) -> None:
        """What the step does now; plain lines tell it only with the time."""
        self._activity = activity

    def tick(self) -> None:
        """Called all the time while a playbook runs: a line when its budget is used up, and one now and then."""
        if self._step is None:
            return
        took = time.monotonic() - self._began
        if took >= self._next:
            over = took >= self._step.budget_s
            first = over and not self._over
            self._over = over
            budget = f"its budget of {seconds(self._step.budget_s)}"
            text = f"is over {budget}" if first else f"{seconds(took)} of {budget}" if not over else f"{seconds(took)}"
            self._line(f"{self._where(self._undoing)} {self._step.id}: {text}, at: {self._activity}")
            due = [took + SIGN_OF_LIFE_S]
            self._next = min(due if over else [*due, max(self._step.budget_s, took)])

    def end(self, step: Step, result: Result, elapsed: float) -> None:
        self._step = None
        self._line(f"{self._where(self._undoing)} {ending(step, result, elapsed)}")
        for line in failure_lines(result):
            print(line, file=self.stream, flush=True)

    def note(self, text: str) -> None:
        self._line(text)


def given(definition: Definition, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without those that are as they are when nobody thinks of them."""
    known = definition.parameters
    return {name: value for name, value in parameters.items() if name not in known or known[name].default != value}


def headline(request: Request) -> str:
    runbook = request.definition
    parameters = " ".join(f"{k}={v}" for k, v in given(runbook, request.parameters).items())
    return f"{runbook.title}: {runbook.name} {parameters} on {request.environment.name}, run {request.run}"


def notes(request: Request, state: RunState) -> list[str]:
    texts = []
    if request.left_out:
        texts.append(f"Left out, because they do not answer: {', '.join(request.left_out)}")
    done = [s for s in state.steps if s not in state.pending]
    if done:
        texts.append(f"Done by the run before: {', '.join(done)}")
    return texts


def ending(step: Step, result: Result, elapsed: float) -> str:
    over = f", over its budget of {seconds(step.budget_s)}" if elapsed > step.budget_s else ""
    says = f": {result.says}" if result.says else ""
    return f"{step.id}: {result.outcome} after {seconds(elapsed)}{over}{says}"


def failure_lines(result: Result) -> list[str]:
    lines = []
    for failure in result.failures:
        where = " - ".join(p for p in (failure["host"], failure["task"]) if p)
        first, *more = failure["message"].splitlines() or [""]
        lines.append(f"    {where}: {first}" if where else f"    {first}")
        lines += [f"        {line}" for line in more]
    return lines


class LiveProgress(Progress):
    """A table that is redrawn four times a second."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._mutex = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        self._now = ""
        self._headline = ""
        self._failures: list[str] = []
        self._console: Console | None = None
        self._shown = 0.0

    @contextmanager
    def showing(self, request: Request, state: RunState) -> Iterator[None]:
        from rich.console import Console
        from rich.live import Live

        self._shown = time.monotonic()
        console = self._console = Console(file=self.stream)
        self._headline = headline(request)
        for text in notes(request, state):
            console.print(text, style="yellow", markup=False)
        for step in request.definition.steps:
            done = state.steps[step.id]
            kept = step.id not in state.pending
            self._rows[step.id] = {
                "step": step,
                "state": done.outcome if kept else "waiting",
                "began": None,
                "elapsed": done.elapsed_s if kept else None,
                "says": done.says if kept else "",
            }
        try:
            with Live(get_renderable=self._table, console=console, refresh_per_second=4):
                yield
        finally:
            for line in self._failures:
                console.print(line, style="red", markup=False, highlight=False)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self._headline), title_justify="left", expand=True, box=None, padding=(0, 1))
        table.add_column("")
        table.add_column("Step", no_wrap=True)
        table.add_column("Took", justify="right", no_wrap=True)
        table.add_column("Budget", justify="right", no_wrap=True)
        table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
        with self._mutex:
            budget = sum(row["step"].budget_s for row in self._rows.values() if row["state"] != "undone")
            total = f"in all {seconds(time.monotonic() - self._shown)}, budget {seconds(budget)}"
            table.caption, table.caption_justify = Text(total, style="dim"), "left"
            for row in self._rows.values():
                step, state = row["step"], row["state"]
                took = time.monotonic() - row["began"] if state == "running" else row["elapsed"]
                late = took is not None and took > step.budget_s
                text = self._now or step.title if state == "running" else row["says"] or step.title
                style = STYLES.get(state, "dim")
                table.add_row(
                    Text(MARKS[state], style=style),
                    Text(step.id, style=style),
                    Text("" if took is None else seconds(took), style="yellow" if late else ""),
                    seconds(step.budget_s),
                    Text(text, style="dim" if state == "waiting" else ""),
                )
        return table

    def begin(self, step: Step, undo: str = "") -> None:
        with self._mutex:
            self._now, self._undoing = undo, bool(undo)
            self._rows[step.id].update(state="running", began=time.monotonic())

    def activity(self, activity: Activity) -> None:
        with self._mutex:
            self._now = str(activity)

    def end(self, step: Step, result: Result, elapsed: float) -> None:
        with self._mutex:
            state = UNDONE.get(result.outcome, "") if self._undoing else result.outcome
            self._rows[step.id].update(state=state, elapsed=elapsed, says=result.says)
        self._failures += failure_lines(result)

    def note(self, text: str) -> None:
        if self._console is None:
            self._line(text)
        else:  # Above the table, which would be torn otherwise.
            self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False)


class JsonProgress(Progress):
    """One line of JSON an event, on standard output."""

    def _event(self, event: str, **data: Any) -> None:
        document = {"event": event, "at": round(time.time(), 3), **data}
        print(json.dumps(document, default=str), file=self.stream, flush=True)

    @contextmanager
    def showing(self, request: Request, state: RunState) -> Iterator[None]:
        self._event(
            "run",
            run=request.run,
            runbook=request.definition.name,
            environment=request.environment.name,
            parameters=request.parameters,
            steps=list(state.steps),
            pending=state.pending,
            left_out=request.left_out,
        )
        yield

    def begin(self, step: Step, undo: str = "") -> None:
        self._undoing = bool(undo)
        kind = "undo_started" if undo else "step_started"
        self._event(kind, step=step.id, title=undo or step.title, budget_s=step.budget_s)

    def end(self, step: Step, result: Result, elapsed: float) -> None:
        self._event(
            "undo_finished" if self._undoing else "step_finished",
            step=step.id,
            outcome=result.outcome,
            elapsed_s=round(elapsed, 3),
            budget_s=step.budget_s,
            says=result.says,
            changed=result.changed,
            failures=result.failures,
        )

    def note(self, text: str) -> None:
        self._event("note", text=text)


def choose(stream: TextIO | None = None, *, as_json: bool = False) -> Progress:
    """A live table when the stream is a terminal."""
    if as_json:
        return JsonProgress(sys.stdout)
    stream = stream or sys.stderr
    return LiveProgress(stream) if stream.isatty() else Progress(stream)
