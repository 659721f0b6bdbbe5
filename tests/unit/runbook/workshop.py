"""A runbook whose playbooks are scripted: a step's process says what the test tells it to say."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbooks import definition as definitions
from runbooks import engine
from runbooks.environment import Environment
from runbooks.journal import Journal, Record
from runbooks.progress import Progress
from runbooks.request import prepare
from runbooks.session import Order, Session, Stop
from runbooks.step import Result

DEFINITION: dict[str, Any] = {
    "name": "mend",
    "title": "Mend the fence",
    "purpose": "Four steps with gates, undoing and an approval, for the tests of the engine.",
    "owner": "CensusChat platform team",
    "severity": "low",
    "parameters": {"colour": {"title": "Which paint", "type": "string", "default": "red"}},
    "reach": [],
    "steps": [
        {
            "id": "saw",
            "title": "Saw the plank",
            "playbook": "saw.yml",
            "budget_s": 10,
            "touches": ["the plank"],
            "before": [{"title": "There is wood", "playbook": "wood.yml"}],
            "undo": {"title": "Glue the plank", "playbook": "glue.yml"},
        },
        {
            "id": "nail",
            "title": "Nail it on",
            "playbook": "nail.yml",
            "budget_s": 10,
            "touches": ["the post"],
            "after": [{"title": "It holds", "playbook": "holds.yml"}],
            "undo": {"says": "Pull the nails out by hand"},
        },
        {
            "id": "paint",
            "title": "Paint it",
            "playbook": "paint.yml",
            "budget_s": 10,
            "touches": ["the fence"],
            "undo": {"title": "Strip the paint", "playbook": "strip.yml"},
        },
    ],
}
PLAYBOOKS = ("saw", "wood", "glue", "nail", "holds", "paint", "strip")
FAILURE = [{"host": "here", "task": "Do it", "message": "no luck"}]

Script = Callable[[Mapping[str, Any], Callable[[], bool]], Result]


@dataclass
class Workshop:
    """A place with a runbook whose playbooks are scripted. played: what was run, with the variables it got."""

    directory: Path
    inventory: Path
    scripts: dict[str, Script] = field(default_factory=dict)
    played: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    stream: io.StringIO = field(default_factory=io.StringIO)

    def define(self, **changes: Any) -> None:
        data = {**DEFINITION, **changes}
        (self.directory / "definitions/mend.yml").write_text(yaml.safe_dump(data))

    def variables(self, **variables: Any) -> None:
        defaults = {"environment_name": "unit", "runbook_state": str(self.directory / "runs")}
        hosts = {"here": {"ansible_connection": "local"}}
        self.inventory.write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": {**defaults, **variables}}}))

    def session(self, run: str, order: Order, stop: Stop | None = None) -> Session:
        return Session(run, Bench(self), Progress(self.stream), stop or Stop(), order)  # type: ignore[arg-type]

    def run(
        self, *, order: Order | None = None, run: str = "r1", given: Mapping[str, str] | None = None
    ) -> engine.Ended:
        session = self.session(run, order or Order())
        request = prepare(definitions.load("mend"), self.inventory, given or {}, session)
        return engine.start(request, session)

    def resume(self, order: Order | None = None, run: str = "r1") -> engine.Ended:
        return engine.resume(run, Progress(self.stream), Stop(), order or Order(), self.inventory, way=self.way())

    def undo(self, run: str = "r1") -> engine.Ended:
        return engine.undo(run, Progress(self.stream), Stop(), Order(), self.inventory, way=self.way())

    def way(self) -> engine.Way:
        return engine.Way(warm=lambda *_: Bench(self))  # type: ignore[arg-type]

    def journal(self) -> Journal:
        return Environment(self.inventory).open_journal()

    def records(self, *kinds: str, run: str = "r1") -> list[Record]:
        journal = self.journal()
        try:
            return [record for record in journal.records(run) if record.kind in kinds]
        finally:
            journal.close()

    def holder(self) -> str | None:
        journal = self.journal()
        try:
            document, _ = journal.book()
        finally:
            journal.close()
        held = (document or {"held": {}})["held"]
        return next((holder["run"] for holder in held.values()), None)

    def names(self) -> list[str]:
        return [name for name, _, _ in self.played]

    def told(self) -> str:
        return self.stream.getvalue()


class Bench:
    """Stands for ``Warm``: its processes are the workshop's scripts."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def plan(self, playbooks: Any) -> None:
        list(playbooks)

    def take(self, playbook: Path, _timeout_s: float) -> Scripted:
        return Scripted(self.workshop, playbook.stem)

    def close(self) -> None: ...


class Scripted:
    """Stands for a playbook's process."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self.workshop, self.name = workshop, name

    def run(self, variables: Mapping[str, Any], _leave_out: Any, **more: Any) -> Result:
        self.workshop.played.append((self.name, dict(variables), dict(more.get("environment", {}))))
        script = self.workshop.scripts.get(self.name)
        return script(variables, more["interrupted"]) if script else Result("ok", says=f"{self.name} is done")

    def close(self) -> None: ...


def fails(_variables: Any = None, _interrupted: Any = None) -> Result:
    return Result("failed", failures=[dict(f) for f in FAILURE])


class Killed(BaseException):
    """What SIGKILL looks like from inside: no code of the engine's runs after it."""


def make_workshop(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop of the test's own."""
    (directory / "definitions").mkdir()
    for name in PLAYBOOKS:
        (directory / "definitions" / f"{name}.yml").write_text("---\n[]\n")
    monkeypatch.setenv("RUNBOOK_DEFINITIONS", str(directory / "definitions"))
    monkeypatch.setenv("XDG_STATE_HOME", str(directory / "state"))
    workshop = Workshop(directory, directory / "inventory.yml")
    workshop.define()
    workshop.variables()
    return workshop
