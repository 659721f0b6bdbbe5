"""The engine as a person meets it: real processes, real playbooks on this machine, no lab."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ansible.utils.display  # noqa: F401 - looks at the real output streams, so it is loaded before they are replaced
import pytest

from runbooks.cli import main
from runbooks.engine import signals
from runbooks.step import leftovers

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = ROOT / "tests/unit/runbook/inventory.yml"


@dataclass
class Place:
    """A place of its own for one test: state, effects, environment."""

    directory: Path
    environment: dict[str, str]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """In this process, which has Ansible loaded already; what it starts are real processes."""
        out, err = io.StringIO(), io.StringIO()
        with (
            unittest.mock.patch.dict(os.environ, self.environment, clear=True),
            unittest.mock.patch("sys.stdin", io.StringIO()),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main(words)
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def process(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As a person does it."""
        return subprocess.run(
            [sys.executable, "-m", "runbooks", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=60,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "runbooks", "run", "paint", "-i", str(INVENTORY), "--yes", *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *words: str, runbook: str = "paint") -> subprocess.CompletedProcess[str]:
        return self.command("run", runbook, "-i", str(INVENTORY), "--yes", *words)

    def wait_for(self, path: str, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.directory / path).exists():
            assert time.monotonic() < deadline, f"{path} did not come"
            time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def effects(self) -> list[str]:
        return (self.directory / "effects").read_text().split()

    def everything(self) -> bytes:
        """All that was kept on disk."""
        return b"".join(p.read_bytes() for p in self.directory.rglob("*") if p.is_file())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield make_place(tmp_path)


def make_place(directory: Path) -> Place:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RUNBOOK_DEFINITIONS": str(ROOT / "tests/unit/runbook/definitions"),
        "RUNBOOK_TEST_PLACE": str(directory),
        "XDG_STATE_HOME": str(directory / "state"),
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    }
    return Place(directory, environment)


# -- bad input: one sentence, exit code 2, nothing touched

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
    sentence, _, command = lines[0].partition("; next: ")
    assert sentence.startswith("error: ")
    for part in named:
        assert part in sentence
    assert next_command in command
    assert not (place.directory / "effects").exists()
    assert not list(place.directory.rglob("journal.sqlite"))


# -- runs


def test_list_starts_fast_and_without_ansible(place: Place) -> None:
    """Processor time, because other work on the machine must not decide."""
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Paint the shed" in place.process("list").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.2
    code = "import sys, runbooks.cli as c; c.main(['list']); print(sorted(m for m in sys.modules if m == 'ansible'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=place.environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


def test_run_passes_outputs_on_and_reports(place: Place) -> None:
    done = place.run("--coats", "2", "--param", "colour=blue")
    assert done.returncode == 0, done.stderr
    assert (place.directory / "here2").read_text() == "blue 2\n"
    assert "The shed is blue, after blue" in done.stderr
    status = place.status()
    assert status["state"] == "succeeded"
    assert [s["outcome"] for s in status["steps"].values()] == ["ok", "ok", "ok"]
    report = json.loads((place.directory / "runs" / status["run"] / "report.json").read_text())
    assert report["figures"]["rto_s"] is None
    changed = [c for s in report["steps"] for c in s["changed"]]
    assert {"task": "Put the paint on", "hosts": ["here1", "here2"]} in changed
    assert "<!doctype html>" in Path(report["paths"]["html"]).read_text()
    assert not list((place.directory / "state").rglob("step-*")), "nothing of a step stays"


def test_host_that_may_be_missing_is_left_out(place: Place) -> None:
    text = INVENTORY.read_text().replace(
        "    here2:\n", "    here2:\n    gone: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}\n"
    )
    done = place.command("run", "rollcall", "-i", inventory(place, text), "--yes")
    assert done.returncode == 0, done.stderr
    assert "Left out, because they do not answer: gone" in done.stderr
    assert "here1, here2 and localhost are here without gone" in done.stderr


def test_default_is_observed(place: Place) -> None:
    done = place.run(runbook="observed")
    assert done.returncode == 0, done.stderr
    assert place.status()["parameters"] == {"colour": "blue"}


def test_failed_step_tells_which_host_and_why_and_resume_goes_on_there(place: Place) -> None:
    done = place.run("--fail-at", "paint")
    assert done.returncode == 1
    assert "here2 - Spill the paint: The bucket of here2 has a hole" in done.stderr
    assert "here1 - Keep a secret: the details are secret (no_log)" in done.stderr
    assert "canary-4711" not in done.stderr + done.stdout
    status = place.status()
    assert done.stderr.strip().splitlines()[-1].endswith(f"next: runbook resume {status['run']}")
    assert status["steps"]["admire"]["attempts"] == 0
    again = place.command("resume", status["run"])
    assert again.returncode == 1
    state = place.status()
    assert (state["steps"]["look"]["attempts"], state["steps"]["paint"]["attempts"], state["resumed"]) == (1, 2, 1)
    assert place.effects() == ["red"], "the second attempt found the work of the first"
    assert b"canary-4711" not in place.everything()


def test_killed_run_refuses_others_and_resumes_without_a_second_effect(place: Place) -> None:
    engine = place.start("--slow", "30")
    place.wait_for("effects")
    run = place.status()["run"]

    second = place.run()
    assert second.returncode == 3
    assert f"being worked on by run {run}" in second.stderr
    assert str(engine.pid) in second.stderr

    assert leftovers(run)
    engine.kill()
    engine.wait()
    deadline = time.monotonic() + 10
    while leftovers(run):
        assert time.monotonic() < deadline, "the playbook went on without its engine"
        time.sleep(0.05)
    assert place.command("status").stdout.splitlines()[0].endswith("dead")
    assert list((place.directory / "state").rglob("step-*")), "the killed engine's files are still there"
    third = place.run()
    assert not list((place.directory / "state").rglob("step-*"))
    assert third.returncode == 3
    assert third.stderr.strip().endswith(f"next: runbook resume {run}")

    (place.directory / "dry").touch()
    resumed = place.command("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert place.effects() == ["red"]
    status = place.status()
    assert (status["run"], status["state"]) == (run, "succeeded")
    assert [s["attempts"] for s in status["steps"].values()] == [1, 2, 1]
    assert leftovers(run) == []
    assert place.command("resume", run).returncode == 0
    assert place.effects() == ["red"]


def test_signal_interrupts_and_says_how_to_go_on(place: Place) -> None:
    engine = place.start("--slow", "60")
    place.wait_for("effects")
    began = time.monotonic()
    engine.send_signal(signal.SIGINT)
    output, _ = engine.communicate(timeout=20)
    assert engine.returncode == 130, output
    assert time.monotonic() - began < 8
    status = place.status()
    assert (status["state"], status["steps"]["paint"]["outcome"]) == ("interrupted", "interrupted")
    assert f"next: runbook resume {status['run']}" in output
    assert "SIGINT" in output
    assert leftovers(status["run"]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_a_program_are_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.asked == number.name
    assert signal.getsignal(number) is before


def test_gate_refuses_with_its_own_exit_code_and_a_superseded_run_is_not_resumed(place: Place) -> None:
    for _ in range(2):
        done = place.run("--fail-at", "look")
        assert done.returncode == 3
        assert "It rains: wait until it is dry" in done.stderr
    assert not (place.directory / "effects").exists()
    runs = json.loads(place.command("runs", "--json").stdout)
    assert [r["state"] for r in runs] == ["refused", "refused"]
    done = place.command("resume", runs[0]["run"])
    assert done.returncode == 3
    assert f"superseded by {runs[1]['run']}" in done.stderr


def test_programs_that_the_tests_need() -> None:
    assert shutil.which("ssh"), "the preflight asks nodes over ssh"
