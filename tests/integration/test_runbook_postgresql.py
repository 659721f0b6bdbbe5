"""The journal on a real PostgreSQL: the same records as on SQLite, for several machines, over lost connections."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbooks import chain, cli, keys, locks
from runbooks.database import PostgreSQL
from runbooks.errors import Problem, Refused
from runbooks.journal import Journal, LockLost, remember
from runbooks.lock_stores import open_store
from runbooks.locks import Wish
from tests.local_postgresql import LocalPostgreSQL, Proxy

START: dict[str, Any] = {
    "runbook": "paint",
    "environment": "unit",
    "inventory": "/i",
    "parameters": {},
    "steps": ["look", "paint"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPostgreSQL]:
    with LocalPostgreSQL() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSFILE", str(running.passfile))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield running


@pytest.fixture
def journal(server: LocalPostgreSQL, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    """One environment a test."""
    opened = Journal(server.url, request.node.name, tmp_path)
    yield opened
    opened.close()


def twin(journal: Journal) -> Journal:
    return Journal(journal.location, journal.environment, journal.directory)


def faults(journal: Journal) -> list[chain.Fault]:
    trusted = {keys.public(keys.journal_key()): "journal"}
    return list(chain.check(journal.links(), trusted, journal.environment))


def test_run_adds_up_and_its_chain_holds(journal: Journal) -> None:
    journal.begin("r1", START, fence=1)
    journal.append("step_started", "look", {})
    journal.append("step_finished", "look", {"outcome": "ok", "elapsed_s": 0.25, "outputs": {"seen": "blué\u2028"}})
    journal.finish("failed", "no paint")
    state = journal.state("r1")
    assert (state.state, state.pending, state.outputs) == ("failed", ["paint"], {"seen": "blué\u2028"})
    assert [link.seq for link in journal.links()] == [1, 2, 3, 4]
    assert faults(journal) == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runbooks.journal SET kind = 'note'",
        "DELETE FROM runbooks.journal",
        "TRUNCATE runbooks.journal",
    ],
)
def test_records_stay_as_they_are(journal: Journal, server: LocalPostgreSQL, statement: str) -> None:
    journal.record("note", "", None, {})
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        server.sql(statement)


def test_older_fence_writes_nothing_more(journal: Journal) -> None:
    journal.begin("r1", START, fence=5)
    callback = twin(journal)
    callback.attach("r1", 5, "ansible-playbook")
    callback.append("effect_intended", "look", {})
    other = twin(journal)
    with pytest.raises(LockLost):
        other.take_over("r1", {}, fence=5)
    other.take_over("r1", {}, fence=6)
    before = len(journal.records("r1"))
    for late in (journal, callback):
        with pytest.raises(LockLost):
            late.append("effect_done", "look", {})
    with pytest.raises(LockLost):
        journal.finish("succeeded")
    with pytest.raises(LockLost):
        twin(journal).attach("r1", 5)
    assert len(journal.records("r1")) == before
    other.finish("succeeded")
    with pytest.raises(LockLost):
        other.append("effect_done", "look", {})
    assert faults(journal) == []


def test_append_whose_commit_was_in_doubt_is_there_once(journal: Journal, server: LocalPostgreSQL) -> None:
    armed = threading.Event()

    def cut(data: bytes) -> bool:
        if armed.is_set() and b"COMMIT" in data:
            armed.clear()
            return True
        return False

    with Proxy(server.port, cut) as proxy:
        through = Journal(server.url_of(server.user, proxy.port), journal.environment, journal.directory)
        armed.set()
        through.begin("r1", START, fence=1)
        for step in range(5):
            armed.set()
            through.append("note", None, {"step": step})
        assert through.change_book(lambda book, now: ({"fence": 1}, 1)) == 1
        armed.set()
        seen: list[Any] = []

        def grow(book: dict[str, Any] | None, now: float) -> tuple[dict[str, Any], int]:
            seen.append(book)
            fence = int((book or {})["fence"]) + 1
            return {"fence": fence}, fence

        assert through.change_book(grow) == 2
        through.close()
        assert proxy.cuts == 7
    assert seen == [{"fence": 1}]
    assert [record.data.get("step") for record in journal.records("r1")] == [None, 0, 1, 2, 3, 4]
    assert journal.book()[0] == {"fence": 2}
    assert faults(journal) == []


def test_server_that_restarts_costs_waiting_only_and_one_that_stays_away_is_told(
    journal: Journal, server: LocalPostgreSQL
) -> None:
    journal.begin("r1", START, fence=1)
    server.stop(signal.SIGQUIT)  # As if its machine had died.
    back = threading.Timer(1.5, server.start)
    back.start()
    journal.append("note", None, {"after": "the restart"})
    back.join()
    server.stop()
    try:
        began = time.monotonic()
        with pytest.raises(Problem) as caught:
            journal.change_book(lambda book, now: ({}, None), patience_s=1.0)
        assert time.monotonic() - began < 5
        assert caught.value.code == "journal-unreachable"
        assert server.password not in str(caught.value)
    finally:
        server.start()
    assert [record.kind for record in journal.records("r1")] == ["run_started", "note"]
    assert faults(journal) == []


def test_holder_whose_server_is_away_stops_before_another_can_take_its_lock(
    journal: Journal, server: LocalPostgreSQL
) -> None:
    lease_s = 3.0
    holder, other = open_store(twin(journal)), open_store(twin(journal))
    wish = Wish(journal.environment, ("environment",), "r1", "paint", locks.Process.current(), lease_s, False)
    asked = time.monotonic()
    fence = locks.acquire(holder, wish, lambda run: True)
    journal.begin("r1", START, fence=fence)
    with locks.Lease(holder.another(), fence, lease_s, asked) as lease:
        time.sleep(1.0)
        assert lease.lost() == ""
        server.stop(signal.SIGQUIT)
        try:
            gone = time.monotonic()
            while not lease.lost():
                time.sleep(0.02)
            stopped = time.monotonic()
        finally:
            server.start()
        assert stopped - gone <= lease_s * locks.GIVE_UP + 0.5
    # Its process may still be ending things: nobody takes the lock before the lease has ended on the server's clock.
    resuming = replace(wish, resuming=True, process=replace(wish.process, machine="another", host="another"))
    refusals = 0
    deadline = time.monotonic() + 2 * lease_s
    while True:
        try:
            taken = locks.acquire(other, resuming, lambda run: True)
            break
        except Refused:
            assert time.monotonic() < deadline
            refusals += 1
            time.sleep(0.05)
    assert refusals
    assert taken > fence
    later = twin(journal)
    later.take_over("r1", {}, fence=taken)
    with pytest.raises(LockLost):
        journal.append("effect_done", "look", {})
    later.finish("succeeded")
    assert faults(journal) == []


def test_frozen_client_does_not_hold_the_others_up(journal: Journal, server: LocalPostgreSQL) -> None:
    journal.record("note", "", None, {})
    frozen = psycopg.connect(server.url, options=PostgreSQL.OPTIONS.replace("timeout=10s", "timeout=1s"))
    frozen.execute("SELECT 1 FROM book WHERE environment = %s FOR UPDATE", (journal.environment,))
    began = time.monotonic()
    journal.record("note", "", None, {"behind": "the frozen"})
    assert 0.5 < time.monotonic() - began < 5
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        frozen.execute("SELECT 1")
    frozen.close()


def test_fifty_that_append_at_once_keep_one_chain(journal: Journal) -> None:
    def writer(number: int) -> None:
        own = twin(journal)
        for turn in range(4):
            own.record("note", f"r{number}", None, {"turn": turn})
        own.close()

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(writer, range(50)))
    assert [link.seq for link in journal.links()] == list(range(1, 201))
    assert faults(journal) == []


def test_twenty_that_change_the_book_at_once_lose_no_change(journal: Journal) -> None:
    def count(book: dict[str, int] | None, now: float) -> tuple[dict[str, int], int]:
        after = (book or {"n": 0})["n"] + 1
        return {"n": after}, after

    def add(_: int) -> int:
        own = twin(journal)
        try:
            return own.change_book(count)
        finally:
            own.close()

    with ThreadPoolExecutor(20) as pool:
        answers = sorted(pool.map(add, range(20)))
    assert answers == list(range(1, 21))
    assert journal.book() == ({"n": 20}, 20)
    with pytest.raises(ZeroDivisionError):
        journal.change_book(lambda book, now: ({"n": 1 // 0}, None))
    assert journal.book() == ({"n": 20}, 20)


def test_clock_of_the_locks_is_the_servers(journal: Journal, server: LocalPostgreSQL) -> None:
    now = journal.change_book(lambda book, now: (None, now))
    there = float(server.sql("SELECT extract(epoch FROM clock_timestamp())")[0][0])
    assert 0 <= there - now < 5
    assert journal.book() == (None, 0)


def test_role_of_the_documentation_suffices_and_can_change_nothing(server: LocalPostgreSQL, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "runbooks/docs/journal.md").read_text(encoding="utf-8")
    block = text.split("```sql\n")[1].split("```")[0]
    server.sql(block)
    server.sql("ALTER ROLE runbook_writer PASSWORD 'only for the test'")
    server.allow("runbook_writer", "only for the test")
    writer = Journal(server.url_of("runbook_writer"), "least", tmp_path)
    writer.begin("r1", START, fence=1)
    writer.append("note", None, {})
    assert writer.change_book(lambda book, now: ({"fence": 1}, "changed")) == "changed"
    writer.finish("succeeded")
    assert faults(writer) == []
    writer.close()
    for statement in (
        "UPDATE runbooks.journal SET kind = 'note'",
        "DELETE FROM runbooks.journal",
        "TRUNCATE runbooks.journal",
        "DELETE FROM runbooks.book",
        "DROP TABLE runbooks.journal",
        "ALTER TABLE runbooks.journal DISABLE TRIGGER ALL",
        "CREATE TABLE runbooks.other ()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            server.sql(statement, "runbook_writer")


def test_evidence_of_a_shared_journal_is_judged_offline_and_its_owner_cannot_cheat(
    journal: Journal, server: LocalPostgreSQL, capsys: pytest.CaptureFixture[str]
) -> None:
    anchor, exported, trusted = (journal.directory / name for name in ("anchor", "run.jsonl", "keys.yml"))
    for fence, run in enumerate(("r1", "r2"), 1):
        writer = Journal(journal.location, journal.environment, journal.directory, anchors=[{"file": str(anchor)}])
        writer.begin(run, START, fence=fence)
        writer.append("effect_intended", "look", {"task": "paint"})
        writer.finish("succeeded")
        writer.close()
    remember(journal.environment, journal.directory, journal.location, [{"file": str(anchor)}])
    trusted.write_text(f"here: {keys.public(keys.journal_key())}\n", encoding="utf-8")
    assert cli.main(["evidence", "verify", "r2"]) == 0
    assert cli.main(["evidence", "export", "r1", str(exported)]) == 0
    assert cli.main(["evidence", "verify", "--export", str(exported), "--keys", str(trusted)]) == 0
    shown = capsys.readouterr()
    assert "anchored up to record 6" in shown.out
    assert server.password not in shown.out + shown.err + exported.read_text(encoding="utf-8")
    mine = f"environment = '{journal.environment}'"
    server.sql("ALTER TABLE runbooks.journal DISABLE TRIGGER ALL")
    for change, says in (
        (f"UPDATE runbooks.journal SET wall = wall + 1 WHERE {mine} AND seq = 2", "record 2: it was edited"),
        (f"UPDATE runbooks.journal SET wall = wall - 1 WHERE {mine} AND seq = 2", ""),
        (f"DELETE FROM runbooks.journal WHERE {mine} AND seq = 6", "the end was cut off"),
        (f"DELETE FROM runbooks.journal WHERE {mine} AND seq = 4", "record 4 is missing"),
    ):
        server.sql(change)
        assert cli.main(["evidence", "verify", "r2"]) == (1 if says else 0)
        assert says in capsys.readouterr().err
    server.sql("ALTER TABLE runbooks.journal ENABLE TRIGGER ALL")


def test_password_is_shown_nowhere(
    journal: Journal, server: LocalPostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = server.password
    with_password = server.url.replace("@", f":{canary}@")
    for url in (with_password, f"{server.url}?password={canary}"):
        with pytest.raises(Problem) as caught:
            Journal(url, "unit", tmp_path)
        assert caught.value.code == "journal-password-in-url"
        assert canary not in str(caught.value)
    wrong = tmp_path / "wrong"
    wrong.write_text(f"*:*:*:*:{canary}x\n", encoding="utf-8")
    wrong.chmod(0o600)
    journal.begin("r1", START, fence=1)
    journal.finish("succeeded")
    monkeypatch.setenv("PGPASSFILE", str(wrong))
    with pytest.raises(Problem) as caught:
        Journal(server.url, "unit", tmp_path, patience_s=0.1)
    assert caught.value.code == "journal-unreachable"
    assert canary not in str(caught.value)
    assert canary not in server.log()
    assert canary not in str(server.sql("SELECT * FROM runbooks.journal"))


def test_processes_of_several_machines_share_it(journal: Journal) -> None:
    """Each with a key of its own, as on machines of their own."""
    journal.record("note", "here", None, {})
    code = (
        "import sys; from runbooks.journal import Journal; from runbooks import keys\n"
        "j = Journal(sys.argv[1], sys.argv[2]); j.record('note', 'there', None, {})\n"
        "print(keys.public(keys.journal_key()))"
    )
    command = [sys.executable, "-c", code, journal.location, journal.environment]
    done = subprocess.run(
        ["env", f"XDG_CONFIG_HOME={journal.directory}", *command], capture_output=True, text=True, check=True
    )
    there = done.stdout.strip()
    assert [fault.seq for fault in faults(journal)] == [2]
    trusted = {keys.public(keys.journal_key()): "here", there: "there"}
    assert list(chain.check(journal.links(), trusted, journal.environment)) == []
