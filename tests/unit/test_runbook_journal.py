"""The journal and the lock: append-only, one run at a time, a dead run's lock only for its resumption."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runbooks import journal as journals
from runbooks.errors import Problem, Refused
from runbooks.journal import Journal, LockLost, Record, fold

START: dict[str, Any] = {
    "runbook": "paint",
    "environment": "unit",
    "inventory": "/i",
    "parameters": {"colour": "red"},
    "steps": ["look", "paint"],
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def journal(place: Path) -> Iterator[Journal]:
    opened = Journal(place, "unit")
    yield opened
    opened.close()


def die_holding(place: Path, run: str) -> None:
    """Another process begins a run and is gone without a word."""
    code = (
        "import os, sys, pathlib; from runbooks.journal import Journal\n"
        f"j = Journal(pathlib.Path({str(place)!r}), 'unit'); j.begin({run!r}, {START!r})\n"
        "j.append('step_started', 'look', {})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9


def finished(outcome: str, **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "elapsed_s": 1.0, **more}


def test_run_adds_up(journal: Journal) -> None:
    journal.begin("r1", START)
    assert journal.state("r1").pending == ["look", "paint"]
    journal.append("step_started", "look", {})
    journal.append("step_finished", "look", finished("ok", outputs={"seen": "blue"}, says="blue"))
    journal.append("step_started", "paint", {})
    journal.append("step_finished", "paint", finished("failed", failures=[{"host": "h", "task": "t", "message": "m"}]))
    state = journal.state("r1")
    assert state.pending == ["paint"]
    assert state.outputs == {"seen": "blue"}
    assert state.steps["paint"].failures[0]["message"] == "m"
    journal.finish("failed", "paint: m")
    assert (journal.state("r1").state, journal.lock()) == ("failed", None)


def test_resumed_run_goes_on_from_the_first_step_without_success(journal: Journal) -> None:
    journal.begin("r1", START)
    journal.append("step_started", "look", {})
    journal.append("step_finished", "look", finished("ok"))
    journal.append("step_started", "paint", {})
    journal.finish("interrupted", "SIGTERM")
    journal.take_over("r1", {})
    assert journal.state("r1").state == "running"
    journal.append("step_started", "paint", {})
    journal.append("step_finished", "paint", finished("ok"))
    journal.finish("succeeded")
    state = journal.state("r1")
    assert (state.state, state.pending, state.resumed, state.steps["paint"].attempts) == ("succeeded", [], 1, 2)


def test_an_output_of_a_failed_step_is_not_passed_on(journal: Journal) -> None:
    journal.begin("r1", START)
    journal.append("step_started", "look", {})
    journal.append("step_finished", "look", finished("failed", outputs={"seen": "blue"}))
    assert journal.state("r1").outputs == {}


def test_second_run_is_refused_with_who_what_and_since_when(journal: Journal, place: Path) -> None:
    journal.begin("r1", START)
    other = Journal(place, "unit")
    with pytest.raises(Refused) as caught:
        other.begin("r2", START)
    other.close()
    text = str(caught.value)
    assert "r1" in text
    assert str(os.getpid()) in text
    assert socket.gethostname() in text
    assert time.strftime("%Y-%m-%d") in text
    assert journal.runs() == ["r1"]


def test_other_environments_are_not_locked(journal: Journal, place: Path) -> None:
    journal.begin("r1", START)
    other = Journal(place, "other")
    other.begin("r2", {**START, "environment": "other"})
    other.close()


def test_dead_runs_lock_is_for_its_resumption_only(journal: Journal, place: Path) -> None:
    die_holding(place, "dead")
    with pytest.raises(Refused, match=r"still locked by run dead .* next: runbook resume dead"):
        journal.begin("r2", START)
    journal.take_over("dead", {})
    assert journal.state("dead").resumed == 1


def test_living_run_cannot_be_taken_over(journal: Journal, place: Path) -> None:
    journal.begin("r1", START)
    other = Journal(place, "unit")
    with pytest.raises(Refused, match="being worked on by run r1"):
        other.take_over("r1", {})
    with pytest.raises(Refused, match="being worked on by run r1"):
        other.abort("r1", "tired of it")
    other.close()


def test_dead_run_can_be_given_up(journal: Journal, place: Path) -> None:
    die_holding(place, "dead")
    journal.abort("dead", "done by hand")
    assert journal.state("dead").state == "aborted"
    journal.begin("r2", START)


def test_pid_used_again_is_not_the_dead_process(journal: Journal, place: Path) -> None:
    die_holding(place, "dead")
    with sqlite3.connect(place / "journal.sqlite") as db:
        db.execute("UPDATE lock SET pid = ?", (os.getpid(),))
    held = journal.lock()
    assert held is not None
    assert not held.alive()


@pytest.mark.parametrize(("age", "alive"), [(5, True), (journals.SILENT_S + 5, False)])
def test_holder_elsewhere_lives_by_its_heartbeat(journal: Journal, place: Path, age: float, alive: bool) -> None:
    die_holding(place, "far")
    with sqlite3.connect(place / "journal.sqlite") as db:
        db.execute("UPDATE lock SET host = 'far-away', heartbeat = ?", (time.time() - age,))
    held = journal.lock()
    assert held is not None
    assert held.alive() is alive


def test_who_lost_the_lock_writes_nothing_more(journal: Journal, place: Path) -> None:
    journal.begin("r1", START)
    with sqlite3.connect(place / "journal.sqlite") as db:
        db.execute("UPDATE lock SET token = 'another'")
    before = len(journal.records("r1"))
    with pytest.raises(LockLost):
        journal.append("step_started", "look", {})
    with pytest.raises(LockLost):
        journal.beat()
    with pytest.raises(LockLost):
        journal.finish("succeeded")
    assert len(journal.records("r1")) == before


@pytest.mark.parametrize("statement", ["UPDATE journal SET kind = 'x'", "DELETE FROM journal"])
def test_records_stay_as_they_are(journal: Journal, place: Path, statement: str) -> None:
    journal.begin("r1", START)
    with sqlite3.connect(place / "journal.sqlite") as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)


def test_journal_is_for_its_owner_only(journal: Journal, place: Path) -> None:
    assert place.stat().st_mode & 0o077 == 0
    assert (place / "journal.sqlite").stat().st_mode & 0o077 == 0


def test_records_must_begin_with_a_start() -> None:
    with pytest.raises(ValueError, match="begins with step_started"):
        fold([Record(1, "r", 0.0, 0.0, "step_started", "look", {})])


def test_runs_are_found_by_part_of_their_id(
    journal: Journal, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(Problem, match="No runbook has been run"):
        journals.find(None)
    journals.remember("unit", place)
    for run in ("20270101-paint-aaaa", "20270102-paint-bbbb"):
        journal.begin(run, START)
        journal.finish("succeeded")
    assert journals.find("aaaa")[1] == "20270101-paint-aaaa"
    assert journals.find(None)[1] == "20270102-paint-bbbb"
    with pytest.raises(Problem, match="more than one run"):
        journals.find("paint")
    with pytest.raises(Problem, match="There is no run cccc"):
        journals.find("cccc")
