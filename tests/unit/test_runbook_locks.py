"""Locks: who gets one, who is refused with what words, and that of many at once exactly one gets it, in every store."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from runbooks import locks
from runbooks.errors import Problem, Refused
from runbooks.journal import Journal
from runbooks.lock_stores import JournalStore, open_store
from runbooks.locks import Book, Holder, Lease, Lost, Process, Store, Wish

CASES = yaml.safe_load((Path(__file__).parent / "data/locks.yml").read_text())
FAR = Process("ann", "far", "boot/1", 7, "99")
NEAR = Process.current()
STARTS = 50


def wish(run: str = "a", *names: str, **more: Any) -> Wish:
    return Wish("unit", names or ("environment",), run, "paint", NEAR, 60.0, **more)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_taking(case: dict[str, Any]) -> None:
    held = {
        name: Holder(h["run"], "paint", NEAR if h.get("mine") else FAR, 90.0, h["ends"], h["fence"])
        for name, h in case["held"].items()
    }
    asked = dict(case["wish"])
    over = frozenset(asked.pop("over", ()))
    wanted = wish(asked.pop("run"), *asked.pop("names"), over=over, **asked)
    book = Book(case.get("last", 1), held) if held or "last" in case else Book()
    if "refused" in case:
        with pytest.raises(Refused) as caught:
            locks.take(book, wanted, 100.0, set(case.get("gone", ())))
        assert caught.value.code == case["refused"]
        for words in case.get("words", ()):
            assert words in str(caught.value)
        assert str(caught.value).endswith(f"next: {case['next']}" if "next" in case else "")
        return
    after, fence = locks.take(book, wanted, 100.0, set(case.get("gone", ())))
    assert (fence, after.fence) == (case["fence"], case["fence"])
    assert {name: holder.run for name, holder in after.held.items()} == case["holds"]
    assert all(h.ends == 160.0 for h in after.held.values() if h.fence == fence)
    assert Book.of(after.document()) == after


def test_only_the_holder_renews_parks_and_releases() -> None:
    book, fence = locks.take(Book(), wish("a", "cache", "queue"), 100.0, ())
    assert {h.ends for h in locks.renew(book, fence, 110.0, 60.0).held.values()} == {170.0}
    assert {h.ends for h in locks.park(book, fence).held.values()} == {None}
    with pytest.raises(Lost):
        locks.renew(book, fence + 1, 110.0, 60.0)
    with pytest.raises(Lost):
        locks.park(book, fence + 1)
    assert locks.release(book, fence + 1) == book
    assert locks.release(book, fence).held == {}
    assert locks.release(book, fence).fence == fence, "the next one's fence is higher all the same"


def test_a_container_with_the_same_name_and_boot_is_another_machine() -> None:
    here = Process.current()
    other = Process(here.who, here.host, here.machine.partition("/")[0] + "/1", 999999, "1")
    assert not other.gone()
    assert Process(here.who, here.host, here.machine, 999999, "1").gone()
    assert not here.gone()


# -- the stores


@pytest.fixture(scope="module")
def aws() -> Iterator[dict[str, str]]:
    """An AWS of this machine: moto's server, with a table and a bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "endpoint_url": f"http://{host}:{port}",
        "region_name": "us-east-1",
        "aws_access_key_id": "unit",
        "aws_secret_access_key": "unit",
    }
    boto3.client("dynamodb", **options).create_table(
        TableName="locks",
        KeySchema=[{"AttributeName": "environment", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "environment", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    boto3.client("s3", **options).create_bucket(Bucket="locks")
    yield options
    server.stop()


@pytest.fixture(params=["journal", "dynamodb://locks", "s3://locks/runbooks"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path, aws: dict[str, str]) -> Callable[[], Store]:
    """Each call is another machine's view of the same store, of an environment of the test's own."""
    environment = f"unit-{time.monotonic_ns()}"

    def make() -> Store:
        journal = Journal(tmp_path, environment)
        return open_store(journal, "" if request.param == "journal" else request.param, aws)

    return make


def anyone(_: str) -> bool:
    return True


def test_of_many_at_once_one_gets_it(make_store: Callable[[], Store]) -> None:
    """Threads that begin together, each with a connection of its own; the fences of the winners only grow."""
    fences = []
    for round_ in range(2):
        gate = threading.Barrier(STARTS)

        def start(number: int, round_: int = round_, gate: threading.Barrier = gate) -> int | Refused:
            store = make_store()
            gate.wait()
            try:
                return locks.acquire(store, wish(f"r{round_}-{number}"), anyone)
            except Refused as refused:
                return refused
            finally:
                store.close()

        with ThreadPoolExecutor(STARTS) as pool:
            results = list(pool.map(start, range(STARTS)))
        won = [r for r in results if isinstance(r, int)]
        assert len(won) == 1
        assert {r.code for r in results if isinstance(r, Refused)} == {"lock-held"}
        fences += won
        make_store().change(lambda book, _: (locks.release(book, won[0]), None))  # noqa: B023 - used at once
    assert fences[0] < fences[1]


def test_a_put_whose_answer_is_lost_is_not_refused_by_itself(
    make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    if isinstance(store, JournalStore):
        # Its transaction says by itself whether it was done (tests of the journal).
        assert locks.acquire(store, wish(), anyone) == 1
        return
    put = store._put  # type: ignore[attr-defined]
    lost: list[Any] = []

    def put_and_lose(document: Any, version: Any) -> bool:
        done = put(document, version)
        if done and not lost:
            lost.append(version)
            return False
        return bool(done)

    monkeypatch.setattr(store, "_put", put_and_lose)
    fence = locks.acquire(store, wish(), anyone)
    assert lost
    book, _ = store.read()
    assert {h.fence for h in book.held.values()} == {fence} == {2}


def test_a_lease_is_renewed_and_says_when_another_has_it(make_store: Callable[[], Store]) -> None:
    store = make_store()
    asked = locks.clock()
    fence = locks.acquire(store, Wish("unit", ("environment",), "a", "paint", NEAR, 4.0), anyone)
    # Whole seconds of a server's clock: what is seen is that the end moves on.
    first = store.read()[0].held["environment"].ends
    assert first is not None
    with Lease(store.another(), fence, 4.0, asked) as lease:
        deadline = time.monotonic() + 10
        while (store.read()[0].held["environment"].ends or 0) <= first:
            assert time.monotonic() < deadline, "it was not renewed"
            time.sleep(0.05)
        assert lease.lost() == ""
        store.change(lambda book, _: (locks.release(book, fence), None))
        while not lease.lost():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert lease.lost() == "another process has taken its lock"


class Silent:
    """A store that does not answer any more: it hangs, or says so."""

    where = "a store that is cut off"

    def __init__(self, hangs: bool) -> None:
        self.hangs, self.released = hangs, threading.Event()

    def another(self) -> Store:
        return self

    def close(self) -> None: ...

    def read(self) -> tuple[Book, float]:
        return Book(), time.time()

    def change(self, plan: Callable[[Book, float], tuple[Book, Any]]) -> Any:
        if self.hangs:
            self.released.wait(30)
        raise Problem("It does not answer", code="lock-store-unreachable", next_command="ls")


@pytest.mark.parametrize("hangs", [False, True])
def test_who_cannot_renew_stops_itself_before_the_lease_ends(hangs: bool) -> None:
    store = Silent(hangs)
    began = locks.clock()
    with Lease(store, 1, 1.2, began) as lease:
        assert lease.lost() == ""
        while not lease.lost():
            assert locks.clock() - began < 1.2, "the lease has ended and it goes on"
            time.sleep(0.02)
        store.released.set()
    assert locks.clock() - began >= 0.8
    assert "could not be renewed in a store that is cut off" in lease.lost()


def test_a_store_that_does_not_answer_is_one_problem(tmp_path: Path) -> None:
    options = {"endpoint_url": "http://127.0.0.1:1", "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "unit", "aws_secret_access_key": "unit"}
    for where in ("dynamodb://locks", "s3://locks"):
        with pytest.raises(Problem, match=f"The locks in {where} cannot be reached") as caught:
            open_store(Journal(tmp_path, "unit"), where, options | keys).read()
        assert caught.value.code == "lock-store-unreachable"


@pytest.mark.parametrize("where", ["redis://locks", "dynamodb://", "s3:bucket", "dynamodb://table/more"])
def test_a_store_of_no_kind_is_refused(tmp_path: Path, where: str) -> None:
    with pytest.raises(Problem, match="neither dynamodb://TABLE nor s3://BUCKET/PREFIX"):
        open_store(Journal(tmp_path, "unit"), where)


START = """
import pathlib, sys, time
from runbooks import locks
from runbooks.errors import Refused
from runbooks.journal import Journal
from runbooks.lock_stores import open_store
journal = Journal(pathlib.Path(sys.argv[1]), "unit")
print("ready", flush=True)
sys.stdin.readline()
try:
    wish = locks.Wish("unit", ("environment",), sys.argv[2], "paint", locks.Process.current(), 60.0)
    fence = locks.acquire(open_store(journal), wish, lambda run: True)
    journal.begin(sys.argv[2], {"runbook": "paint", "environment": "unit", "inventory": "/i", "parameters": {},
                                "steps": []}, fence=fence)
    print("won", flush=True)
    sys.stdin.readline()
except Refused as refused:
    print(refused.code, flush=True)
"""


def test_of_fifty_processes_that_start_at_once_exactly_one_runs(tmp_path: Path) -> None:
    Journal(tmp_path, "unit").close()
    command = [sys.executable, "-c", START, str(tmp_path)]
    starts = [
        subprocess.Popen([*command, f"r{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(STARTS)
    ]
    try:
        for process in starts:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in starts:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in starts if process.stdout]
    finally:
        for process in starts:
            process.communicate(timeout=30)
    assert sorted(said) == ["lock-held"] * (STARTS - 1) + ["won"]
    journal = Journal(tmp_path, "unit")
    assert len(journal.runs()) == 1
    journal.close()
