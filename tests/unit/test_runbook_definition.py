"""Runbook definitions: the shipped ones hold, broken ones are refused in one sentence."""

from __future__ import annotations

import copy
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


BROKEN = {
    "a key is missing": (_remove_owner, "'owner' is a required property"),
    "an unknown key": (lambda d: d.update(colour="red"), "'colour' was unexpected"),
    "no step": (lambda d: d.update(steps=[]), "steps"),
    "a type that does not exist": (lambda d: d["parameters"]["plates"].update(type="dozen"), "'dozen' is not one of"),
    "a budget of nothing": (lambda d: d["steps"][0].update(budget_s=0), "steps.0.budget_s"),
    "two steps of one id": (_two_ids, "two steps have one id: wash"),
    "another name than its file": (lambda d: d.update(name="dry"), "its name is dry, the file's is wash"),
    "a playbook that is not there": (lambda d: d["steps"][0].update(playbook="../dry.yml"), "dry.yml does not exist"),
    "two defaults": (
        lambda d: d["parameters"]["plates"].update(default_from={"playbook": "p", "output": "o", "reach": []}),
        "parameters.plates",
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
    parsed = definition.Parameter("p", "P", kind, None, None, None).parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(("kind", "text"), [("string", ""), ("integer", "2.5"), ("number", "many"), ("boolean", "1")])
def test_parameter_refuses(kind: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"a |true"):
        definition.Parameter("p", "P", kind, None, None, None).parse(text)
