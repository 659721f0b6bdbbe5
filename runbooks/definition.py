"""What a runbook is: its definition file, checked against definition.schema.json, as typed values."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runbooks.errors import Problem

SHIPPED = Path(__file__).parent / "definitions"
SCHEMA = Path(__file__).parent / "definition.schema.json"

PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


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
    """One parameter; choices and default may be templates over the inventory's variables."""

    name: str
    title: str
    type: str
    choices: list[Any] | str | None
    default: Any | None
    default_from: DefaultFrom | None

    @property
    def required(self) -> bool:
        return self.default is None and self.default_from is None

    def parse(self, text: str) -> str | int | float | bool:
        """The value that a person wrote. Raises ValueError with what was expected."""
        if self.type == "string":
            if not text:
                raise ValueError("a string that is not empty")
            return text
        if self.type == "boolean":
            if text.lower() not in ("true", "false", "yes", "no"):
                raise ValueError("true or false")
            return text.lower() in ("true", "yes")
        try:
            return int(text) if self.type == "integer" else float(text)
        except ValueError:
            raise ValueError("a whole number" if self.type == "integer" else "a number") from None


@dataclass(frozen=True, slots=True)
class Step:
    """One step: an idempotent playbook. budget_s is what it should take, timeout_s when it is stopped (seconds)."""

    id: str
    title: str
    playbook: Path
    budget_s: float
    timeout_s: float
    touches: tuple[str, ...]
    gate: bool


@dataclass(frozen=True, slots=True)
class Definition:
    """One runbook. targets: name -> seconds or a template that yields them."""

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


def files() -> dict[str, Path]:
    """Name -> file of every runbook there is; RUNBOOK_DEFINITIONS (directories, ':') comes before the shipped ones."""
    own = [Path(p) for p in os.environ.get("RUNBOOK_DEFINITIONS", "").split(":") if p]
    return {path.stem: path for directory in reversed([*own, SHIPPED]) for path in sorted(directory.glob("*.yml"))}


def titles() -> dict[str, str]:
    """Name -> title of every runbook, without checking more of them."""
    return {name: str(_read(path).get("title", "")) for name, path in sorted(files().items())}


def load(name: str) -> Definition:
    """The runbook of that name.

    Raises Problem when there is none, or when its definition breaks the schema.
    """
    path = files().get(name)
    if path is None:
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
    )
    playbooks = [s.playbook for s in definition.steps]
    playbooks += [p.default_from.playbook for p in definition.parameters.values() if p.default_from]
    for playbook in playbooks:
        if not playbook.is_file():
            raise _broken(path, f"its playbook {playbook} does not exist")
    return definition


def _read(path: Path) -> dict[str, Any]:
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
        raise _broken(path, f"{'.'.join(str(p) for p in error.absolute_path) or 'it'}: {error.message}")
    if data["name"] != path.stem:
        raise _broken(path, f"its name is {data['name']}, the file's is {path.stem}")
    ids = [step["id"] for step in data["steps"]]
    if len(set(ids)) != len(ids):
        raise _broken(path, f"two steps have one id: {', '.join(sorted({i for i in ids if ids.count(i) > 1}))}")


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
    )


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
    )
