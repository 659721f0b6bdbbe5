"""What a runbook is: its definition file, checked against definition.schema.json, as typed values."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runbooks.errors import Problem

SHIPPED = Path(__file__).parent / "definitions"
SCHEMA = Path(__file__).parent / "definition.schema.json"

PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
TYPE_NAMES = {"string": "a string", "integer": "a whole number", "number": "a number", "boolean": "true or false"}

EVENTS = (
    "started",
    "waiting",
    "emergency",
    "failed",
    "refused",
    "interrupted",
    "succeeded",
    "resumed",
    "undone",
)
"""What a run tells people of."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Something that must answer before the run: hosts of a pattern (over ssh, or at a port), or a URL's server."""

    why: str
    hosts: str | None
    need: str | int
    url: str | None
    help: str = "unreachable"
    """Which of the environment's next commands (runbook_help) helps when the URL's server does not answer."""
    port: int | None = None


@dataclass(frozen=True, slots=True)
class DefaultFrom:
    """A playbook that only observes, and which of its outputs is the parameter's default."""

    playbook: Path
    output: str
    reach: tuple[Reach, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter; choices and default may be templates over the inventory's variables.

    minimum and maximum are inclusive; pattern must match all of a string. The value of a secret one is never shown.
    """

    name: str
    title: str
    type: str
    choices: list[Any] | str | None = None
    default: Any | None = None
    default_from: DefaultFrom | None = None
    minimum: float | None = None
    maximum: float | None = None
    pattern: str | None = None
    secret: bool = False

    @property
    def required(self) -> bool:
        return self.default is None and self.default_from is None

    @property
    def variable(self) -> str:
        """The environment variable that a secret value is read from."""
        return f"RUNBOOK_PARAM_{self.name.upper()}"

    def parse(self, text: str) -> str | int | float | bool:
        """The value that a person wrote. Raises ValueError with what was expected, without the value."""
        value: str | int | float | bool = text
        if self.type == "boolean" and text.lower() in ("true", "false", "yes", "no"):
            value = text.lower() in ("true", "yes")
        elif self.type in ("integer", "number"):
            try:
                value = int(text) if self.type == "integer" else float(text)
            except ValueError:
                raise ValueError(TYPE_NAMES[self.type]) from None
        expected = self.expected(value)
        if expected:
            raise ValueError(expected)
        return value

    def expected(self, value: Any) -> str:
        """What a value of it is, when this is none ("a whole number from 1 to 9"); empty when it is.

        Choices are left out: they may need the environment.
        """
        right = isinstance(value, PYTHON_TYPES[self.type]) and (self.type == "boolean" or not isinstance(value, bool))
        if not right:
            return TYPE_NAMES[self.type]
        if self.type == "string":
            if not value:
                return "a string that is not empty"
            return f"a string that matches {self.pattern}" if not re.fullmatch(self.pattern or "(?s:.*)", value) else ""
        low, high = self.minimum, self.maximum
        # Written so that what is not a number (nan) is outside.
        if (low is None or value >= low) and (high is None or value <= high):
            return ""
        if low is not None and high is not None:
            return f"{TYPE_NAMES[self.type]} from {low:g} to {high:g}"
        return f"{TYPE_NAMES[self.type]} of at {'least ' if high is None else 'most '}{low if high is None else high:g}"


@dataclass(frozen=True, slots=True)
class Gate:
    """A playbook that only observes, and fails with what blocks."""

    title: str
    playbook: Path


@dataclass(frozen=True, slots=True)
class Undo:
    """What takes a step's effects back: a playbook; or, as ``says``, why none does and what does instead."""

    title: str = ""
    playbook: Path | None = None
    says: str = ""


@dataclass(frozen=True, slots=True)
class Approvals:
    """need: how many people must approve the plan. of: whose approval counts; empty: everyone the inventory trusts."""

    need: int = 0
    of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """When AWX starts the runbook by itself, and with which parameters."""

    name: str
    rrule: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: an idempotent playbook. budget_s is what it should take, timeout_s when it is stopped (seconds).

    hosts: the pattern of the hosts it works on, possibly a template. slices: into how many jobs AWX splits them.
    """

    id: str
    title: str
    playbook: Path
    budget_s: float
    timeout_s: float
    touches: tuple[str, ...]
    gate: bool
    hosts: str = "all"
    before: tuple[Gate, ...] = ()
    after: tuple[Gate, ...] = ()
    undo: Undo | None = None
    on_failure: Literal["stop", "undo"] = "stop"
    approval: bool = False
    slices: int = 1

    def playbooks(self) -> Iterator[tuple[str, Path]]:
        """Where in the step a playbook is named, and its file."""
        yield "playbook", self.playbook
        for where, gates in (("before", self.before), ("after", self.after)):
            for number, gate in enumerate(gates):
                yield f"{where}.{number}.playbook", gate.playbook
        if self.undo and self.undo.playbook:
            yield "undo.playbook", self.undo.playbook


@dataclass(frozen=True, slots=True)
class Definition:
    """One runbook. targets: name -> seconds or a template that yields them.

    locks: the resources that a run holds alone. windows: "inherit" keeps to the environment's, "any" needs none.
    """

    name: str
    title: str
    purpose: str
    owner: str
    severity: str
    parameters: Mapping[str, Parameter]
    reach: tuple[Reach, ...]
    targets: Mapping[str, Any]
    steps: tuple[Step, ...]
    path: Path
    locks: tuple[str, ...] = ("environment",)
    approvals: Approvals = field(default_factory=Approvals)
    windows: Literal["inherit", "any"] = "inherit"
    notifications: tuple[str, ...] = EVENTS
    schedule: tuple[Schedule, ...] = ()

    def step(self, name: str) -> Step:
        """Raises KeyError when there is no such step."""
        try:
            return next(step for step in self.steps if step.id == name)
        except StopIteration:
            raise KeyError(name) from None


def files() -> dict[str, Path]:
    """Name -> file of every runbook there is; RUNBOOK_DEFINITIONS (directories, ':') comes before the shipped ones."""
    own = [Path(p) for p in os.environ.get("RUNBOOK_DEFINITIONS", "").split(":") if p]
    return {path.stem: path for directory in reversed([*own, SHIPPED]) for path in sorted(directory.glob("*.yml"))}


def titles() -> dict[str, str]:
    """Name -> title of every runbook, without checking or even parsing more of them where that is possible."""
    return {name: _title(path) for name, path in sorted(files().items())}


def _title(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as stream:
            line = next((line for line in stream if line.startswith("title:")), "")
    except OSError as error:
        raise _broken(path, str(error)) from error
    # Plain words on one line are what they look like; anything else is for the parser.
    plain = re.fullmatch(r"title: +([A-Za-z][\w ,()'-]*)\n", line)
    return plain[1].strip() if plain else str(_read(path).get("title", ""))


def load(name: str) -> Definition:
    """The runbook of that name.

    Raises Problem when there is none, or when its definition breaks the schema.
    """
    path = files().get(name)
    if path is None:
        import difflib

        near = difflib.get_close_matches(name, files(), n=1)
        hint = f", did you mean {near[0]}" if near else ""
        raise Problem(
            f"There is no runbook {name!r} in {SHIPPED}{hint}", code="runbook-unknown", next_command="runbook list"
        )
    data = _read(path)
    _check(data, path)
    base = path.resolve().parent
    definition = Definition(
        name=data["name"],
        title=data["title"],
        purpose=" ".join(data["purpose"].split()),
        owner=data["owner"],
        severity=data["severity"],
        parameters={key: _parameter(key, value, base) for key, value in data["parameters"].items()},
        reach=_reach(data["reach"]),
        targets=data.get("targets", {}),
        steps=tuple(_step(step, base) for step in data["steps"]),
        path=path,
        locks=tuple(data.get("locks", ["environment"])),
        approvals=_approvals(data.get("approvals", {})),
        windows=data.get("windows", "inherit"),
        notifications=tuple(data.get("notifications", EVENTS)),
        schedule=tuple(Schedule(s["name"], s["rrule"], s.get("parameters", {})) for s in data.get("schedule", [])),
    )
    for where, playbook in _playbooks(definition):
        if not playbook.is_file():
            raise _broken(path, f"{where}: the playbook {playbook} does not exist")
    _hold_together(definition)
    return definition


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with path.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - a safe loader
    except (OSError, yaml.YAMLError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(data, dict):
        raise _broken(path, "it is not a mapping")
    return data


def _check(data: dict[str, Any], path: Path) -> None:
    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if error is not None:
        where = ".".join(str(p) for p in error.absolute_path) or "it"
        raise _broken(path, f"{where}: {_explained(error.message, error.validator, error.schema)}")
    if data["name"] != path.stem:
        raise _broken(path, f"its name is {data['name']}, the file's is {path.stem}")
    ids = [step["id"] for step in data["steps"]]
    if len(set(ids)) != len(ids):
        raise _broken(path, f"two steps have one id: {', '.join(sorted({i for i in ids if ids.count(i) > 1}))}")


def _explained(message: str, keyword: str, schema: Mapping[str, Any]) -> str:
    """A fault in words: what is wrong, and what is allowed when that does not say it."""
    if keyword == "additionalProperties":
        return f"{message}; allowed: {', '.join(schema['properties'])}"
    if keyword == "not":
        # The bare message of a "not" repeats the whole rule; its description is the rule in words.
        return str(schema["description"])
    return f"{message}; {schema['description']}" if "description" in schema else message


def _playbooks(definition: Definition) -> Iterator[tuple[str, Path]]:
    for parameter in definition.parameters.values():
        if parameter.default_from:
            yield f"parameters.{parameter.name}.default_from.playbook", parameter.default_from.playbook
    for number, step in enumerate(definition.steps):
        yield from ((f"steps.{number}.{where}", playbook) for where, playbook in step.playbooks())


def _hold_together(definition: Definition) -> None:
    """What a schema cannot say. Raises Problem."""
    path = definition.path
    for parameter in definition.parameters.values():
        where = f"parameters.{parameter.name}"
        if parameter.pattern is not None:
            try:
                re.compile(parameter.pattern)
            except re.error as error:
                raise _broken(path, f"{where}.pattern: it is no regular expression ({error})") from error
        if parameter.minimum is not None and parameter.maximum is not None and parameter.minimum > parameter.maximum:
            raise _broken(path, f"{where}.minimum: {parameter.minimum:g} is more than its maximum")
        fixed = [("default", parameter.default)] if parameter.default is not None else []
        if isinstance(parameter.choices, list):
            fixed += [(f"choices.{number}", choice) for number, choice in enumerate(parameter.choices)]
        for name, value in fixed:
            expected = "" if isinstance(value, str) and "{{" in value else parameter.expected(value)
            if expected:
                raise _broken(path, f"{where}.{name}: {value!r} is not {expected}")
    approvals = definition.approvals
    if approvals.of and approvals.need > len(approvals.of):
        raise _broken(path, f"approvals.need: {approvals.need} of {len(approvals.of)} people cannot be had")
    if definition.steps and definition.steps[0].slices > 1:
        raise _broken(path, "steps.0.slices: the first step begins the run, plans it and sees all hosts, in one job")
    for number, step in enumerate(definition.steps):
        if step.on_failure == "undo" and not (step.undo and step.undo.playbook):
            raise _broken(path, f"steps.{number}.on_failure: undo needs an undo with a playbook")
    for number, schedule in enumerate(definition.schedule):
        _check_schedule(definition, f"schedule.{number}", schedule)


def _check_schedule(definition: Definition, where: str, schedule: Schedule) -> None:
    for name, value in schedule.parameters.items():
        parameter = definition.parameters.get(name)
        if parameter is None:
            known = ", ".join(definition.parameters) or "none"
            raise _broken(definition.path, f"{where}.parameters: there is no parameter {name}; allowed: {known}")
        if parameter.secret:
            raise _broken(definition.path, f"{where}.parameters.{name}: a secret does not stand in a definition")
        expected = parameter.expected(value)
        if expected:
            raise _broken(definition.path, f"{where}.parameters.{name}: {value!r} is not {expected}")
    for parameter in definition.parameters.values():
        if parameter.required and parameter.name not in schedule.parameters:
            raise _broken(definition.path, f"{where}.parameters: the parameter {parameter.name} has no default")


def _broken(path: Path, why: str) -> Problem:
    return Problem(
        f"The runbook's definition {path} is broken: {why}",
        code="definition-broken",
        next_command=f"git log -3 -- {path}",
    )


def _reach(items: list[dict[str, Any]]) -> tuple[Reach, ...]:
    return tuple(
        Reach(i["why"], i.get("hosts"), i.get("need", "all"), i.get("url"), i.get("help", "unreachable"), i.get("port"))
        for i in items
    )


def _parameter(name: str, data: dict[str, Any], base: Path) -> Parameter:
    source = data.get("default_from")
    return Parameter(
        name,
        data["title"],
        data["type"],
        data.get("choices"),
        data.get("default"),
        None
        if source is None
        else DefaultFrom((base / source["playbook"]).resolve(), source["output"], _reach(source["reach"])),
        data.get("minimum"),
        data.get("maximum"),
        data.get("pattern"),
        data.get("secret", False),
    )


def _gates(items: Sequence[Mapping[str, str]], base: Path) -> tuple[Gate, ...]:
    return tuple(Gate(item["title"], (base / item["playbook"]).resolve()) for item in items)


def _approvals(data: Mapping[str, Any]) -> Approvals:
    return Approvals(data.get("need", 0), tuple(data.get("of", ())))


def _undo(data: Mapping[str, str] | None, base: Path) -> Undo | None:
    if data is None:
        return None
    if "says" in data:
        return Undo(says=data["says"])
    return Undo(data["title"], (base / data["playbook"]).resolve())


def _step(data: dict[str, Any], base: Path) -> Step:
    budget = float(data["budget_s"])
    return Step(
        data["id"],
        data["title"],
        (base / data["playbook"]).resolve(),
        budget,
        float(data.get("timeout_s", max(10 * budget, 120.0))),
        tuple(data["touches"]),
        data.get("gate", False),
        data.get("hosts", "all"),
        _gates(data.get("before", []), base),
        _gates(data.get("after", []), base),
        _undo(data.get("undo"), base),
        data.get("on_failure", "stop"),
        data.get("approval", False),
        data.get("slices", 1),
    )
