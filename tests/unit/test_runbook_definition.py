"""Runbook definitions: the shipped ones hold, broken ones are refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbooks import definition
from runbooks.errors import Problem

GOOD: dict[str, Any] = {
    "name": "wash",
    "title": "Wash up",
    "purpose": "So that there are clean plates.",
    "owner": "The one who cooked",
    "severity": "low",
    "parameters": {"plates": {"title": "How many", "type": "integer", "default": 4}},
    "reach": [{"hosts": "all", "why": "to wash"}],
    "steps": [{"id": "wash", "title": "Wash", "playbook": "wash.yml", "budget_s": 60, "touches": ["plates"]}],
}


def write(directory: Path, data: dict[str, Any], name: str = "wash") -> None:
    (directory / "wash.yml").write_text("---\n[]\n")
    definitions = directory / "definitions"
    definitions.mkdir(exist_ok=True)
    (definitions / f"{name}.yml").write_text(yaml.safe_dump(data))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNBOOK_DEFINITIONS", str(tmp_path / "definitions"))
    return tmp_path


def good() -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    data["steps"][0]["playbook"] = "../wash.yml"
    return data


@pytest.mark.parametrize("name", sorted(p.stem for p in definition.SHIPPED.glob("*.yml")))
def test_shipped_definition_holds(name: str) -> None:
    runbook = definition.load(name)
    assert runbook.steps
    assert all(step.timeout_s > step.budget_s for step in runbook.steps)


def test_shipped_runbooks_are_symmetric_in_the_regions() -> None:
    """Regions come from the inventory: no definition and no step names one."""
    root = definition.SHIPPED.parent
    named = [p for p in [*root.glob("definitions/*.yml"), *root.glob("steps/*.yml")] if "us-" in p.read_text()]
    assert named == []


def test_own_definition_is_found_and_defaults_are_filled_in(own: Path) -> None:
    write(own, good())
    runbook = definition.load("wash")
    assert runbook.steps[0].timeout_s == 600
    assert runbook.steps[0].playbook == own / "wash.yml"
    assert runbook.reach[0].need == "all"
    assert "wash" in definition.titles()


def _remove_owner(data: dict[str, Any]) -> None:
    del data["owner"]


def _two_ids(data: dict[str, Any]) -> None:
    data["steps"].append(dict(data["steps"][0]))


def _parameter(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["parameters"]["plates"].update(more)


def _step(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["steps"][0].update(more)


def _secret_plates(data: dict[str, Any]) -> None:
    data["parameters"]["plates"]["secret"] = True


def _scheduled(**parameters: Any) -> Callable[[dict[str, Any]], None]:
    rrule = "DTSTART:20270101T020000Z RRULE:FREQ=MONTHLY;INTERVAL=1"
    return lambda d: d.update(schedule=[{"name": "Monthly", "rrule": rrule, "parameters": parameters}])


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a key is missing": (_remove_owner, "'owner' is a required property"),
    "an unknown key": (lambda d: d.update(colour="red"), "'colour' was unexpected"),
    "a first step in slices": (_step(slices=2), "steps.0.slices: the first step begins the run"),
    "no step": (lambda d: d.update(steps=[]), "steps"),
    "a type that does not exist": (lambda d: d["parameters"]["plates"].update(type="dozen"), "'dozen' is not one of"),
    "a budget of nothing": (lambda d: d["steps"][0].update(budget_s=0), "steps.0.budget_s"),
    "two steps of one id": (_two_ids, "two steps have one id: wash"),
    "another name than its file": (lambda d: d.update(name="dry"), "its name is dry, the file's is wash"),
    "a playbook that is not there": (lambda d: d["steps"][0].update(playbook="../dry.yml"), "dry.yml does not exist"),
    "two defaults": (
        lambda d: d["parameters"]["plates"].update(default_from={"playbook": "p", "output": "o", "reach": []}),
        "parameters.plates: default and default_from exclude each other",
    ),
    "an unknown key, and what is allowed": (lambda d: d.update(colour="red"), "allowed: name, title, purpose"),
    "a range of a string": (_parameter(type="string", default="x", minimum=1), "parameters.plates: Only an integer or"),
    "a pattern of a number": (_parameter(pattern="1+"), "parameters.plates: Only a string has a pattern"),
    "a pattern that is none": (
        _parameter(type="string", default="x", pattern="("),
        "parameters.plates.pattern: it is no",
    ),
    "a range that is empty": (
        _parameter(minimum=5, maximum=3),
        "parameters.plates.minimum: 5 is more than its maximum",
    ),
    "a default out of range": (_parameter(maximum=3), "plates.default: 4 is not a whole number of at most 3"),
    "a choice of another type": (_parameter(choices=[4, "5"]), "plates.choices.1: '5' is not a whole number"),
    "a secret that is known": (_secret_plates, "parameters.plates: A secret has no default and no choices"),
    "more approvals than people": (
        lambda d: d.update(approvals={"need": 2, "of": ["ann"]}),
        "approvals.need: 2 of 1 people cannot be had",
    ),
    "a window of its own": (lambda d: d.update(windows="sunday"), "windows: 'sunday' is not one of ['inherit', 'any']"),
    "an event that does not exist": (
        lambda d: d.update(notifications=["lunch"]),
        "notifications.0: 'lunch' is not one of",
    ),
    "a lock's name": (lambda d: d.update(locks=["The Shed"]), "locks.0: 'The Shed' does not match"),
    "a gate without a playbook": (_step(before=[{"title": "Dry"}]), "steps.0.before.0: 'playbook' is a required"),
    "a gate's playbook that is not there": (
        _step(after=[{"title": "Dry", "playbook": "../dry.yml"}]),
        "steps.0.after.0.playbook: the playbook",
    ),
    "an undo of both kinds": (_step(undo={"says": "No", "playbook": "../wash.yml", "title": "T"}), "steps.0.undo"),
    "an undo that undoes nothing": (
        _step(on_failure="undo", undo={"says": "It cannot be."}),
        "steps.0.on_failure: undo needs an undo with a playbook",
    ),
    "a schedule AWX refuses": (
        lambda d: d.update(schedule=[{"name": "S", "rrule": "DTSTART:20270101T020000Z RRULE:FREQ=SECONDLY"}]),
        "schedule.0.rrule",
    ),
    "a schedule of an unknown parameter": (_scheduled(cups=3), "there is no parameter cups; allowed: plates"),
    "a schedule with a wrong value": (
        _scheduled(plates="4"),
        "schedule.0.parameters.plates: '4' is not a whole number",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_definition_is_refused(own: Path, case: str) -> None:
    change, expected = BROKEN[case]
    data = good()
    change(data)
    write(own, data)
    with pytest.raises(Problem) as caught:
        definition.load("wash")
    assert expected in str(caught.value)
    assert str(own / "definitions" / "wash.yml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_definition_may_say_is_read_and_has_defaults(own: Path) -> None:
    data = good()
    write(own, data)
    plain = definition.load("wash")
    assert (plain.locks, plain.approvals, plain.windows) == (("environment",), definition.Approvals(), "inherit")
    assert plain.notifications == definition.EVENTS
    assert (plain.steps[0].hosts, plain.steps[0].undo, plain.steps[0].on_failure) == ("all", None, "stop")
    gate = {"title": "There is water", "playbook": "../wash.yml"}
    data["steps"].insert(0, {**data["steps"][0], "id": "look"})
    data["steps"][1].update(
        before=[gate],
        after=[gate],
        undo={"title": "Soil them", "playbook": "../wash.yml"},
        on_failure="undo",
        approval=True,
        slices=3,
        hosts="sinks",
    )
    _scheduled(plates=2)(data)
    data.update(locks=["sink"], approvals={"need": 1, "of": ["ann", "bob"]}, windows="any", notifications=["failed"])
    write(own, data)
    full = definition.load("wash")
    step = full.step("wash")
    assert step.before == step.after == (definition.Gate("There is water", own / "wash.yml"),)
    assert step.undo == definition.Undo("Soil them", own / "wash.yml")
    assert (step.on_failure, step.approval, step.slices, step.hosts) == ("undo", True, 3, "sinks")
    assert [where for where, _ in step.playbooks()] == [
        "playbook",
        "before.0.playbook",
        "after.0.playbook",
        "undo.playbook",
    ]
    assert full.approvals == definition.Approvals(1, ("ann", "bob"))
    assert (full.locks, full.windows, full.notifications) == (("sink",), "any", ("failed",))
    assert full.schedule[0].parameters == {"plates": 2}
    with pytest.raises(KeyError):
        full.step("dry")


def test_every_shipped_step_says_how_it_is_undone() -> None:
    unsaid = [
        f"{name}.{step.id}" for name in definition.files() for step in definition.load(name).steps if step.undo is None
    ]
    assert unsaid == []


def test_unknown_runbook_names_the_nearest() -> None:
    with pytest.raises(Problem, match="did you mean fail-over"):
        definition.load("failover")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("string", "a b", "a b"),
        ("integer", "-3", -3),
        ("number", "2.5", 2.5),
        ("boolean", "Yes", True),
        ("boolean", "false", False),
    ],
)
def test_parameter_parses(kind: str, text: str, value: object) -> None:
    parsed = definition.Parameter("p", "P", kind).parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "limits", "expected"),
    [
        ("string", "", {}, "a string that is not empty"),
        ("string", "a1\n", {"pattern": "[a-z]1"}, "a string that matches [a-z]1"),
        ("integer", "2.5", {}, "a whole number"),
        ("integer", "0", {"minimum": 1, "maximum": 9}, "a whole number from 1 to 9"),
        ("integer", "10", {"minimum": 1, "maximum": 9}, "a whole number from 1 to 9"),
        ("number", "many", {}, "a number"),
        ("number", "-0.1", {"minimum": 0}, "a number of at least 0"),
        ("number", "nan", {"maximum": 7.5}, "a number of at most 7.5"),
        ("boolean", "1", {}, "true or false"),
    ],
)
def test_parameter_refuses(kind: str, text: str, limits: dict[str, Any], expected: str) -> None:
    parameter = definition.Parameter("p", "P", kind, **limits)
    with pytest.raises(ValueError, match=r"^a |^true") as caught:
        parameter.parse(text)
    assert str(caught.value) == expected


@pytest.mark.parametrize(("kind", "value"), [("integer", True), ("number", "3"), ("boolean", 1), ("string", 3)])
def test_a_value_of_another_type_is_none_of_the_parameter(kind: str, value: object) -> None:
    assert definition.Parameter("p", "P", kind).expected(value) == definition.TYPE_NAMES[kind]
