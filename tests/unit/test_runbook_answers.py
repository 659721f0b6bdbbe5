"""What asks the service through each address, against the real gateway and query service on loopback."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runbooks import answers
from tests.unit.services_in_memory import Memory, Region

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def regions() -> Iterator[list[Region]]:
    """Two addresses of one region, with a store in common."""
    store = Memory()
    first = Region("us-west-2", "127.0.0.2", 0, store)
    second = Region("us-west-2", "127.0.0.3", first.port, store)
    yield [first, second]
    first.close()
    second.close()


def urls(regions: list[Region]) -> list[str]:
    return [f"http://127.0.0.{n}:{regions[0].port}" for n in (2, 3)]


def run(work: str, timeout: str, *addresses: str, region: str = "us-west-2") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runbooks.answers", work, "--region", region, "--timeout", timeout, *addresses]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)


def test_ready_waits_for_every_address(regions: list[Region]) -> None:
    regions[0].store.broken = "database: no primary"
    threading.Timer(1.0, lambda: setattr(regions[0].store, "broken", None)).start()
    started = time.monotonic()
    assert answers.until(answers.ready, urls(regions), "us-west-2", 10) == {}
    assert 0.9 < time.monotonic() - started < 5


def test_write_leaves_a_row_of_each_address_and_finds_it_again(regions: list[Region]) -> None:
    done = run("write", "5", *urls(regions))
    assert (done.returncode, done.stdout) == (
        0,
        "2 application nodes of us-west-2 took a row and gave it back\n",
    ), done.stderr
    assert {client: len(rows) for client, rows in regions[0].store.rows.items()} == {
        "runbook-127.0.0.2": 1,
        "runbook-127.0.0.3": 1,
    }


@pytest.mark.parametrize("work", ["ready", "write"])
def test_each_address_that_fails_is_named_with_its_last_answer(regions: list[Region], work: str) -> None:
    regions[1].gateway.close()
    done = run(work, "0.5", *urls(regions))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"http://127.0.0.3:{regions[0].port}: no success with {work} for 0.5 s: ConnectionRefusedError"
    )
    regions[1].gateway = Region("us-west-2", "127.0.0.3", 0, regions[0].store).gateway


def test_the_answer_of_another_region_is_none(regions: list[Region]) -> None:
    done = run("ready", "0.3", *urls(regions), region="us-east-1")
    assert done.returncode == 1
    assert done.stderr.count('"region": "us-west-2"') == 2


def test_a_row_that_is_not_given_back_is_not_proven(regions: list[Region], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions[0].store, "numbers", lambda _client: [])
    failures = answers.until(answers.write, urls(regions)[:1], "us-west-2", 0)
    assert "is not in what it gives back" in failures[urls(regions)[0]]
