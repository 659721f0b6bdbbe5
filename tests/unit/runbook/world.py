"""A journal and an inventory's variables without Ansible, for what is tested beside the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from runbooks.definition import EVENTS, Definition
from runbooks.environment import Environment
from runbooks.journal import Journal
from runbooks.notify import Notifier


@dataclass
class Variables:
    """What ``Environment`` is asked for here."""

    name: str
    variables: dict[str, Any] = field(default_factory=dict)
    path: Path = Path("inventories/unit")

    def raw(self, name: str) -> Any:
        return self.variables.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.variables.get(name, default)

    def template(self, value: Any, **_: Any) -> Any:
        return value


@dataclass
class World:
    """One environment. wanted: the events that the runbook's definition names."""

    directory: Path
    journal: Journal
    variables: Variables
    wanted: tuple[str, ...] = EVENTS

    @classmethod
    @contextmanager
    def made(cls, directory: Path, notifications: Mapping[str, Any] | None = None) -> Iterator[Self]:
        journal = Journal(directory / "runs", "unit")
        try:
            world = cls(directory, journal, Variables("unit"))
            world.notifications = notifications or {}
            yield world
        finally:
            journal.close()

    @property
    def environment(self) -> Environment:
        return cast(Environment, self.variables)

    @property
    def notifications(self) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self.variables.variables["runbook_notifications"])

    @notifications.setter
    def notifications(self, value: Mapping[str, Any]) -> None:
        self.variables.variables["runbook_notifications"] = dict(value)

    def begin(self, run: str, runbook: str = "paint") -> None:
        self.journal.begin(run, {**start(runbook), "environment": "unit"}, fence=1)

    def take_over(self, run: str) -> None:
        fences = [r.fence for r in self.journal.records(run) if r.fence is not None]
        self.journal.take_over(run, {}, fence=max(fences) + 1)

    def notifier(self, run: str) -> Notifier:
        definition = Definition(
            name="paint",
            title="Paint the shed",
            purpose="",
            owner="",
            severity="critical",
            parameters={},
            reach=(),
            targets={},
            steps=(),
            path=Path("paint.yml"),
            notifications=self.wanted,
        )
        return Notifier(self.journal, self.environment, run, definition)

    def kept(self) -> bytes:
        """All that is on disk."""
        return b"".join(p.read_bytes() for p in self.directory.rglob("*") if p.is_file())


def start(runbook: str) -> dict[str, Any]:
    """The data of a run's start."""
    return {"runbook": runbook, "inventory": "inventories/unit", "parameters": {}, "steps": ["one"], "left_out": []}
