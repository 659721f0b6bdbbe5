"""Runs whose processes really die: on one machine, on another with the same journal, in the middle of an undoing.

Two machines are two UTS namespaces of this one, with names and state directories of their own, and PostgreSQL between.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from runbooks import locks
from runbooks.errors import Refused
from runbooks.journal import Journal
from runbooks.lock_stores import open_store
from tests.local_postgresql import LocalPostgreSQL

ROOT = Path(__file__).resolve().parents[2]
STARTS = 50
LEASE_S = 9
CANARY = "canary-5150-z"

STEP = """
- name: {title}
  hosts: all
  gather_facts: false
  tasks:
    - name: Do it once
      ansible.builtin.lineinfile:
        path: "{{{{ place }}}}/effects"
        line: "{word} {{{{ token | length }}}}"
        create: true
        mode: "0600"
    - name: Take its time
      ansible.builtin.wait_for:
        path: "{{{{ place }}}}/{word}-may-go-on"
        sleep: 1
"""
DEFINITION = {
    "name": "mend",
    "title": "Mend the fence",
    "purpose": "Two steps that wait until they may go on, for the tests of dying.",
    "owner": "CensusChat platform team",
    "severity": "low",
    "parameters": {"token": {"title": "The key of the shed", "type": "string", "secret": True}},
    "reach": [],
    "steps": [
        {
            "id": "saw",
            "title": "Saw the plank",
            "playbook": "saw.yml",
            "budget_s": 60,
            "touches": ["the plank"],
            "undo": {"title": "Glue the plank", "playbook": "glue.yml"},
        },
    ],
}


class Machine:
    """A machine of a name of its own, with a state directory of its own."""

    def __init__(self, name: str, place: Path, server: LocalPostgreSQL) -> None:
        self.name, self.place = name, place
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RUNBOOK_DEFINITIONS": str(place / "definitions"),
            "RUNBOOK_PARAM_TOKEN": CANARY,
            "XDG_STATE_HOME": str(place / name),
            "XDG_CONFIG_HOME": str(place / "config"),
            "PGPASSFILE": str(server.passfile),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "runbooks", *words, "-i", str(self.place / "inventory.yml")]
        return subprocess.Popen(
            ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name, *command],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=90)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def wait_for(self, line: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        effects = self.place / "effects"
        while not effects.exists() or line not in effects.read_text():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{line} did not come"
            time.sleep(0.05)


@pytest.fixture(scope="module", name="server")
def postgresql() -> Iterator[LocalPostgreSQL]:
    with LocalPostgreSQL() as server:
        yield server


@pytest.fixture
def place(tmp_path: Path, server: LocalPostgreSQL) -> Path:
    (tmp_path / "definitions").mkdir()
    (tmp_path / "definitions/mend.yml").write_text(yaml.safe_dump(DEFINITION))
    for name, word in (("saw", "sawn"), ("glue", "glued")):
        text = STEP.format(title=name.capitalize(), word=word)
        (tmp_path / "definitions" / f"{name}.yml").write_text("---" + text)
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "environment_name": f"unit-{time.monotonic_ns()}",
        "place": str(tmp_path),
        "runbook_journal": server.url,
        "runbook_lease_s": LEASE_S,
    }
    (tmp_path / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"here": {}}, "vars": variables}}))
    return tmp_path


def others_that_know(secret: str, engine: int) -> list[str]:
    """Processes other than the one that was given it, in whose command line or environment a secret stands."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in (engine, os.getpid()):
            for file in ("cmdline", "environ"):
                try:
                    if secret.encode() in (process / file).read_bytes():
                        found.append(f"{process.name} {file}")
                except OSError:
                    continue
    return found


def test_another_machine_goes_on_when_the_first_has_died(place: Path, server: LocalPostgreSQL) -> None:
    first, second = Machine("machine-a", place, server), Machine("machine-b", place, server)
    engine = first.start("run", "mend", "--yes")
    first.wait_for("sawn", engine)
    assert others_that_know(CANARY, engine.pid) == []

    refused = second.call("run", "mend", "--yes")
    assert refused.returncode == 3, refused.stderr
    assert "is being worked on by run" in refused.stderr
    assert f"(process {engine.pid} on machine-a)" in refused.stderr

    engine.kill()
    engine.communicate()
    (place / "sawn-may-go-on").touch()
    resumed = second.call("resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (place / "effects").read_text() == f"sawn {len(CANARY)}\n"
    status = json.loads(second.call("status", "--json").stdout)
    assert (status["state"], status["resumed"], status["steps"]["saw"]["attempts"]) == ("succeeded", 1, 2)

    undo = second.start("undo")
    second.wait_for("glued", undo)
    undo.kill()
    undo.communicate()
    (place / "glued-may-go-on").touch()
    again = first.call("undo")
    assert again.returncode == 0, again.stderr
    assert (place / "effects").read_text() == f"sawn {len(CANARY)}\nglued {len(CANARY)}\n"
    assert json.loads(first.call("status", "--json").stdout)["state"] == "undone"

    kept = b"".join(p.read_bytes() for p in place.rglob("*") if p.is_file())
    assert CANARY.encode() not in kept


def test_of_fifty_starts_at_once_on_a_shared_journal_one_runs(tmp_path: Path, server: LocalPostgreSQL) -> None:
    os.environ["PGPASSFILE"] = str(server.passfile)
    environment, gate = f"unit-{time.monotonic_ns()}", threading.Barrier(STARTS)

    def start(number: int) -> int | str:
        journal = Journal(server.url, environment, tmp_path)
        wish = locks.Wish(environment, ("environment",), f"r{number}", "mend", locks.Process.current(), 60.0)
        gate.wait()
        try:
            return locks.acquire(open_store(journal), wish, lambda _: True)
        except Refused as refused:
            return refused.code
        finally:
            journal.close()

    with ThreadPoolExecutor(STARTS) as pool:
        said = list(pool.map(start, range(STARTS)))
    assert sorted(map(str, said)) == ["1", *["lock-held"] * (STARTS - 1)]
