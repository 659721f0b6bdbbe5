"""What the definitions yield: up to date in the repository, true to the definition, and refused by Ansible as by us."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbooks import cli, definition, generate
from tests.unit.test_runbook_definition import good, write

SHIPPED = sorted(p.stem for p in definition.SHIPPED.glob("*.yml"))


def test_nothing_in_the_repository_has_drifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNBOOK_DEFINITIONS", raising=False)
    assert [str(path) for path in generate.drift(generate.outputs(SHIPPED))] == [], "run: runbook generate"


def test_no_generated_file_is_without_its_definition() -> None:
    root = definition.SHIPPED.parent.parent
    made = [*root.glob("playbooks/runbooks/*.yml"), *root.glob("runbooks/docs/runbooks/*.md")]
    assert sorted({path.stem for path in made}) == SHIPPED


def test_check_names_each_file_that_has_drifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--into", str(tmp_path)]) == 0
    assert cli.main(["generate", "--check", "--into", str(tmp_path)]) == 0
    playbook, page = (
        path(definition.load("fail-over"), tmp_path) for path in (generate.playbook_path, generate.page_path)
    )
    playbook.write_text(playbook.read_text() + "# mine\n")
    page.unlink()
    capsys.readouterr()
    assert cli.main(["generate", "--check", "--into", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert sorted(said.out.splitlines()) == sorted(f"not up to date: {path}" for path in (playbook, page))
    assert "next: runbook generate" in said.err
    assert cli.main(["generate", "--into", str(tmp_path)]) == 0
    assert cli.main(["generate", "--check", "--into", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_playbook_has_the_steps_and_gates_in_their_order(name: str) -> None:
    runbook = definition.load(name)
    path = generate.playbook_path(runbook)
    check, *imports = yaml.safe_load(path.read_text())
    assert check["tags"] == ["always"]
    assert check["vars"] == {"runbook_name": name}
    expected = [
        (step.id, each)
        for step in runbook.steps
        for each in (*(g.playbook for g in step.before), step.playbook, *(g.playbook for g in step.after))
    ]
    found = [
        (play["vars"]["runbook_step"], (path.parent / play["ansible.builtin.import_playbook"]).resolve())
        for play in imports
    ]
    assert found == expected
    assert all(play["tags"] == [play["vars"]["runbook_step"]] for play in imports)


@pytest.mark.parametrize("name", SHIPPED)
def test_page_names_all_that_the_definition_says(name: str) -> None:
    runbook = definition.load(name)
    page = generate.page(runbook)
    words = [
        runbook.title,
        runbook.purpose,
        f"playbooks/runbooks/{name}.yml",
        f"runbook run {name}",
        "workflow template",
    ]
    words += [part for step in runbook.steps for part in (f"`{step.id}`", step.title, *step.touches)]
    words += [gate.title for step in runbook.steps for gate in (*step.before, *step.after)]
    words += [step.undo.says or step.undo.title for step in runbook.steps if step.undo]
    words += [f"`{p.name}`" for p in runbook.parameters.values()]
    assert [word for word in words if word not in page] == []
    nodes = re.findall(r"^  (\w+)[\[({]", page, re.MULTILINE)
    ends = {end for pair in re.findall(r"^  (\w+) -.*?> ?(?:\|.*\| )?(\w+)$", page, re.MULTILINE) for end in pair}
    assert ends <= set(nodes), "the diagram's arrows lead from node to node"
    assert len(nodes) == len(set(nodes))


# -- the generated validation says what the definition says

PARAMETERS: dict[str, Any] = {
    "plates": {"title": "How many", "type": "integer", "minimum": 1, "maximum": 9, "default": 4},
    "soap": {"title": "Which", "type": "string", "choices": "{{ soaps }}", "default": "{{ soaps | first }}"},
    "towel": {"title": "Whose", "type": "string", "pattern": "[a-z]+'s"},
    "hot": {"title": "With hot water", "type": "boolean", "default": True},
}
GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "all is well": ({"towel": "ann's", "plates": 3, "soap": "green"}, ""),
    "what is required is missing": ({}, "missing required arguments: towel"),
    "out of range": ({"towel": "ann's", "plates": 10}, "plates of runbook wash must be a whole number from 1 to 9"),
    "no number": ({"towel": "ann's", "plates": "many"}, "'plates'"),
    "no choice": ({"towel": "ann's", "soap": "red"}, "value of soap must be one of: green, blue, got: red"),
    "another pattern": ({"towel": "ann's\n"}, "towel of runbook wash must be a string that matches [a-z]+'s"),
}


def ansible(directory: Path, given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The generated playbook with its door left out: only what Ansible itself does is asked for."""
    extra: dict[str, Any] = {"soaps": ["green", "blue"], **given}
    return subprocess.run(
        ["ansible-playbook", "-i", "localhost,", "-e", json.dumps(extra), directory / "playbooks/runbooks/wash.yml"],
        env={**os.environ, "ANSIBLE_CALLBACKS_ENABLED": "timer"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def wash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path, {**good(), "parameters": PARAMETERS})
    (tmp_path / "wash.yml").write_text("---\n- hosts: localhost\n  gather_facts: false\n  tasks: []\n")
    monkeypatch.setenv("RUNBOOK_DEFINITIONS", str(tmp_path / "definitions"))
    generate.write(generate.outputs(["wash"]))
    return tmp_path


def test_a_generated_playbook_does_not_run_unwatched(wash: Path) -> None:
    done = ansible(wash, {"towel": "ann's"})
    assert done.returncode == 2
    assert "censuschat.infra.runbook_journal is not enabled" in " ".join(done.stdout.split())


@pytest.mark.parametrize("case", GIVEN)
def test_ansible_checks_the_parameters_by_the_definition(wash: Path, case: str) -> None:
    given, expected = GIVEN[case]
    done = ansible(wash, {"runbook_door": "tried", **given})
    assert (done.returncode, expected in " ".join(done.stdout.split())) == (2 if expected else 0, True), done.stdout
