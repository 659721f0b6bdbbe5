"""The command line: every command speaks JSON, imports what it needs only, and completes with the tab key."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runbooks import cli
from runbooks.cli import COMMANDS, Parser
from tests.unit.runbook.place import ROOT
from tests.unit.runbook.workshop import DEFINITION, Workshop, make_workshop

HEAVY = ("ansible", "ansible_runner", "boto3", "jsonschema", "rich", "psycopg", "cryptography")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_says_what_it_is_for(name: str) -> None:
    top = cli.parser([name])
    found = [p for p in parsers(top) if p.prog.startswith(f"runbook {name}")]
    assert found
    for parser in found:
        assert isinstance(parser, Parser)
        assert "--json" in parser._option_string_actions
        assert parser.format_help()
        shown = [action for action in parser._actions if action.option_strings and not isinstance(action, Parser)]
        assert all(action.help for action in shown), parser.prog
    assert COMMANDS[name][1]


def test_no_command_imports_what_is_slow_before_it_is_run() -> None:
    code = (
        "import sys, json\nfrom runbooks import cli\n"
        "for name in cli.COMMANDS: cli.parser([name])\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_list_parses_no_yaml_and_no_schema() -> None:
    code = (
        "import sys, json\nfrom runbooks import cli\ncli.main(['list'])\n"
        f"print(json.dumps([m for m in ('yaml', *{HEAVY!r}) if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fail-over" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return make_workshop(tmp_path, monkeypatch)


def completed(line: str, directory: Path) -> list[str]:
    """What the shell is told, as the shell asks."""
    answer = directory / "answer"
    subprocess.run(
        [sys.executable, "-m", "runbooks"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        },
        check=True,
        timeout=60,
    )
    return answer.read_text().split("\n")


def test_commands_runbooks_parameters_choices_and_runs_complete(shop: Workshop) -> None:
    parameters = {
        "colour": {"title": "Paint", "type": "string", "choices": ["red", "royal-blue"], "default": "red"},
        "again": {"title": "Twice", "type": "boolean", "default": False},
    }
    shop.define(parameters={**DEFINITION["parameters"], **parameters})
    shop.run(run="20270314-031500-mend-ab12")
    for line, expected in {
        "runbook ab": ["abort"],
        "runbook run me": ["mend"],
        "runbook run mend --col": ["--colour"],
        "runbook run mend --colour r": ["red", "royal-blue"],
        "runbook run mend --again ": ["true", "false"],
        "runbook status 2027": ["20270314-031500-mend-ab12"],
        "runbook run mend --colour 'r": ["red", "royal-blue"],
    }.items():
        assert [word.strip(" '") for word in completed(line, shop.directory)] == expected, line
