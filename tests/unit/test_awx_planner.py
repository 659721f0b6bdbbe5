"""The plan of an AWX's content, from cases that are data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import SECRET, ContentError, things
from ansible_collections.censuschat.infra.plugins.module_utils.awx.planner import (
    Observed,
    Wish,
    plan,
    secret_names,
    shown,
)

CASES = yaml.safe_load((Path(__file__).parent / "cases/awx/planner.yml").read_text(encoding="utf-8"))


def observed(case: dict[str, Any]) -> Observed:
    found = things(case["there"]) if case["there"] else {}
    others: dict[str, dict[str, int]] = {}
    for key in found:
        others.setdefault(key[0], {})[key[-1]] = 1
    return Observed(
        found,
        {**others, **case.get("others", {})},
        {name: set(playbooks) for name, playbooks in case.get("playbooks", {}).items()},
        case.get("states", {}),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
def test_plan(case: dict[str, Any]) -> None:
    wanted, there, wish = things(case["wanted"]), observed(case), Wish(case.get("prune", ""))
    if "refused" in case:
        with pytest.raises(ContentError) as caught:
            plan(wanted, there, wish)
        assert case["refused"] in str(caught.value)
        return
    lines = []
    for step in plan(wanted, there, wish):
        fields = f": {', '.join(step.names())}" if step.names() else ""
        lines.append(f"{step.verb} {step.key[0]} {' / '.join(step.key[1:])}{fields}")
    assert lines == case["plan"]


TYPE = {"name": "t", "inputs": {"fields": [{"id": "user"}, {"id": "key", "secret": True}]}}


def credential(**inputs: str) -> dict[str, Any]:
    return {
        "organization": "o",
        "credential_types": [TYPE],
        "credentials": [{"name": "c", "credential_type": "t", "inputs": inputs}],
    }


@pytest.mark.parametrize(
    ("given", "has", "fields"),
    [
        ({"key": "k"}, {"user": "u", "key": SECRET}, []),
        ({}, {"user": "u", "key": SECRET}, []),
        ({"key": "k"}, {"user": "u"}, ["inputs"]),
        ({"key": "k"}, {"user": "other", "key": SECRET}, ["inputs"]),
    ],
)
def test_a_secret_is_compared_by_whether_there_is_one(
    given: dict[str, str], has: dict[str, str], fields: list[str]
) -> None:
    wanted = things(credential(user="u"), {"credentials": {"c": given}})
    there = Observed(things(credential(**has)))
    steps = plan(wanted, there, Wish())
    assert [name for step in steps for name in step.names()] == fields
    said = [shown(step, secret_names(wanted[step.key], wanted, there)) for step in steps]
    assert "'k'" not in str(said)
    if said:
        assert said[0]["after"]["inputs"]["key"] == "(secret)"


def test_secrets_of_what_the_content_does_not_have_are_refused_without_telling_them() -> None:
    with pytest.raises(ContentError) as caught:
        things(credential(user="u"), {"credentials": {"d": {"key": "canary"}}, "projects": {"p": {"x": "canary"}}})
    assert "credential d, which the content does not have" in str(caught.value)
    assert "unknown part projects" in str(caught.value)
    assert "canary" not in str(caught.value)
