"""Bad input, as a person gives it: one sentence, exit code 2, nothing touched."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from runbooks import preflight
from runbooks.definition import Reach
from runbooks.environment import Environment
from runbooks.errors import Problem
from tests.unit.runbook.place import INVENTORY, Place, make_place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


UNREACHABLE = """
all:
  hosts: {far: {ansible_host: 127.0.0.1, ansible_port: 1, ansible_user: nobody, KEY}}
  vars: {environment_name: far, colours: [red], runbook_help: {unreachable: lab status, ssh_key: lab up}}
"""
FAKE_SSH = "#!/bin/sh\necho 'nobody@127.0.0.1: Permission denied (publickey).' >&2\nexit 255\n"


def inventory(place: Place, text: str) -> str:
    path = place.directory / "inventory.yml"
    path.write_text(text)
    return str(path)


def with_old_key(place: Place) -> str:
    """A node that answers and does not know the key any more."""
    programs = place.directory / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(FAKE_SSH)
    (programs / "ssh").chmod(0o755)
    key = place.directory / "key"
    key.touch(0o600)
    place.environment["PATH"] = f"{programs}:{place.environment['PATH']}"
    return inventory(place, UNREACHABLE.replace("KEY", f"ansible_ssh_private_key_file: {key}"))


def run(path: str, *words: str) -> list[str]:
    return ["run", "paint", "-i", path, "--yes", *words]


BAD_INPUT: dict[str, Any] = {
    "unknown runbook": (
        lambda _: ["run", "pain", "-i", str(INVENTORY), "--yes"],
        ["no runbook 'pain'", "did you mean paint"],
        "runbook list",
    ),
    "wrong parameter type": (
        lambda _: run(str(INVENTORY), "--coats", "many"),
        ["coats", "paint", "a whole number", "'many'"],
        "runbook show paint",
    ),
    "value that is no choice": (
        lambda _: run(str(INVENTORY), "--param", "colour=green"),
        ["colour", "one of red, blue", "'green'"],
        "runbook show paint",
    ),
    "unknown parameter": (
        lambda _: run(str(INVENTORY), "--param", "size=3"),
        ["no parameter 'size'", "coats"],
        "runbook show paint",
    ),
    "unknown flag": (lambda _: run(str(INVENTORY), "--size", "3"), ["--size 3"], "runbook --help"),
    "missing inventory": (lambda _: run("nowhere/hosts.yml"), ["no inventory at nowhere/hosts.yml"], "ls -d nowhere/*"),
    "no inventory given": (lambda _: ["run", "paint", "--yes"], ["Which environment"], "run paint -i INVENTORY"),
    "broken inventory": (
        lambda p: run(inventory(p, "all: [unclosed")),
        ["cannot be read", "inventory.yml"],
        "ansible-inventory -i",
    ),
    "inventory of no environment": (
        lambda p: run(inventory(p, "all: {hosts: {a: }}")),
        ["does not set environment_name"],
        "ansible-inventory -i",
    ),
    "unreachable lab": (
        lambda p: run(inventory(p, UNREACHABLE.replace(", KEY", ""))),
        ["Environment far is unreachable", "1 of the 1 nodes needed to paint", "far: ", "refused"],
        "lab status",
    ),
    "lab that is not up": (
        lambda p: run(inventory(p, UNREACHABLE.replace("KEY", "ansible_ssh_private_key_file: /nowhere/key"))),
        ["/nowhere/key", "does not exist", "environment far is not up"],
        "lab status",
    ),
    "stale ssh key": (
        lambda p: run(with_old_key(p)),
        ["is refused by 1 of the 1 nodes", "far", "Permission denied"],
        "lab up",
    ),
    "no terminal to ask at": (
        lambda _: ["run", "paint", "-i", str(INVENTORY)],
        ["no terminal to ask at"],
        "--yes",
    ),
    "no such run": (lambda _: ["resume", "yesterday"], ["no run yesterday"], "runbook runs"),
    "no command": (lambda _: [], ["required", "COMMAND"], "runbook --help"),
}


# These are tried as a person tries them; the others in this process, which is quicker.
AS_A_PERSON = ("unknown runbook", "wrong parameter type", "missing inventory", "unreachable lab", "stale ssh key")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_nothing_touched(place: Place, case: str) -> None:
    words, named, next_command = BAD_INPUT[case]
    arguments = words(place)
    done = place.process(*arguments) if case in AS_A_PERSON else place.command(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    sentence, _, command = lines[0].partition(". next: ")
    assert sentence.startswith("error: ")
    for part in named:
        assert part in sentence
    assert next_command in command
    assert not (place.directory / "effects").exists()
    assert not list(place.directory.rglob("journal.sqlite"))


@pytest.mark.parametrize(("topic", "command"), [("unreachable", "lab status"), ("aws", "aws sts get-caller-identity")])
def test_a_server_that_does_not_answer_is_named_with_its_own_next_command(
    place: Place, topic: str, command: str
) -> None:
    text = UNREACHABLE.replace(", KEY", "").replace("lab status,", "lab status, aws: aws sts get-caller-identity,")
    environment = Environment(Path(inventory(place, text)))
    reach = Reach("to run the application", None, "all", "{{ server }}", topic)
    with pytest.raises(Problem, match=r"https://127.0.0.1:1 does not answer .*, which is needed to run the") as problem:
        preflight.check(environment, [reach], {"server": "https://127.0.0.1:1"})
    assert problem.value.next_command == command


def test_a_port_is_asked_for_instead_of_a_login(place: Place) -> None:
    text = """
all:
  hosts: {one: {ansible_host: 127.0.0.1}, two: {ansible_host: 127.0.0.2}, three: {ansible_host: 127.0.0.3}}
  vars: {environment_name: ports, runbook_help: {unreachable: lab status}}
"""
    environment = Environment(Path(inventory(place, text)))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = first.getsockname()[1]
        reach = [Reach("to run the application in its cluster", "all", "majority", None, port=port)]
        with pytest.raises(Problem) as problem:
            preflight.check(environment, reach, {})
        assert f"Port {port} of 2 of the 3 nodes needed to run the application" in str(problem.value)
        assert "does not answer (two, three: " in str(problem.value)
        assert problem.value.next_command == "lab status"
        stack.enter_context(socket.create_server(("127.0.0.2", port)))
        assert preflight.check(environment, reach, {}) == []
