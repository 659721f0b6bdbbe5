"""What asks the service through each address, against the real gateway and query service on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.service import answers
from ansible_collections.censuschat.infra.plugins.module_utils.service.answers import (
    READY,
    WRITTEN,
    Done,
    Plan,
    Seen,
    observe,
    plan,
    until,
)

from tests.unit.services_in_memory import Memory, Region

WEST = "us-west-2"


@pytest.fixture
def regions() -> Iterator[list[Region]]:
    """Two addresses of one region, with a store in common."""
    store = Memory()
    first = Region(WEST, "127.0.0.2", 0, store)
    second = Region(WEST, "127.0.0.3", first.port, store)
    yield [first, second]
    first.close()
    second.close()


def urls(regions: list[Region]) -> list[str]:
    return [f"http://127.0.0.{n}:{regions[0].port}" for n in (2, 3)]


A, B = "http://a:1", "http://b:1"


@pytest.mark.parametrize(
    ("seen", "state", "expected"),
    [
        ([Seen(A), Seen(B)], READY, Plan()),
        ([Seen(A), Seen(B, "HTTP 503")], READY, Plan((), (B,))),
        ([Seen(A), Seen(B)], WRITTEN, Plan((A, B))),
        ([Seen(A, row=True), Seen(B)], WRITTEN, Plan((B,))),
        ([Seen(A, "HTTP 503"), Seen(B, row=True)], WRITTEN, Plan((A,), (A,))),
    ],
)
def test_the_plan_is_what_is_left_to_do(seen: list[Seen], state: str, expected: Plan) -> None:
    assert plan(seen, state) == expected


def test_ready_waits_for_every_address(regions: list[Region]) -> None:
    regions[0].store.broken = "database: no primary"
    threading.Timer(1.0, lambda: setattr(regions[0].store, "broken", None)).start()
    started = time.monotonic()
    assert until(urls(regions), WEST, READY, "", 10) == [Done(url) for url in urls(regions)]
    assert 0.9 < time.monotonic() - started < 5


def test_a_row_of_each_address_is_written_once_a_mark(regions: list[Region]) -> None:
    assert until(urls(regions), WEST, WRITTEN, "run1", 5) == [Done(url, True) for url in urls(regions)]
    assert until(urls(regions), WEST, WRITTEN, "run1", 5) == [Done(url, False) for url in urls(regions)]
    until(urls(regions), WEST, WRITTEN, "run2", 5)
    assert regions[0].store.rows == {f"runbook-{mark}-127.0.0.{n}": [1] for mark in ("run1", "run2") for n in (2, 3)}


def test_a_row_whose_acknowledgement_was_lost_is_found_and_told_as_written(
    regions: list[Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = answers.write, []

    def losing(url: str, region: str, client: str) -> None:
        real(url, region, client)
        lost.append(url)
        raise answers.NoAnswerError("the connection broke")

    monkeypatch.setattr(answers, "write", losing)
    first = urls(regions)[:1]
    assert until(first, WEST, WRITTEN, "run1", 5) == [Done(first[0], True)]
    assert (lost, regions[0].store.rows) == (first, {"runbook-run1-127.0.0.2": [1]})


def test_looking_writes_nothing_and_names_what_does_not_answer(regions: list[Region]) -> None:
    regions[0].store.broken = "database: no primary"
    seen = observe([*urls(regions), "http://127.0.0.4:1"], WEST, WRITTEN, "run1")
    assert [s.row for s in seen] == [False] * 3
    assert ["503" in seen[0].fault, "503" in seen[1].fault] == [True, True]
    assert "ConnectionRefusedError" in seen[2].fault
    regions[0].store.broken = None
    assert observe(urls(regions), WEST, WRITTEN, "run1") == [Seen(url) for url in urls(regions)]
    assert regions[0].store.rows == {}


@pytest.mark.parametrize("state", [READY, WRITTEN])
def test_each_address_that_fails_is_named_with_its_last_answer(regions: list[Region], state: str) -> None:
    regions[1].gateway.close()
    first, second = until(urls(regions), WEST, state, "run1", 0.5)
    assert first.fault == ""
    assert second.fault.startswith("ConnectionRefusedError")
    regions[1].gateway = Region(WEST, "127.0.0.3", 0, regions[0].store).gateway


def test_the_answer_of_another_region_is_none(regions: list[Region]) -> None:
    faults = [done.fault for done in until(urls(regions), "us-east-1", READY, "", 0.3)]
    assert all('"region": "us-west-2"' in fault for fault in faults)


def test_a_row_that_is_not_given_back_is_not_proven(regions: list[Region], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions[0].store, "numbers", lambda _client: [])
    (done,) = until(urls(regions)[:1], WEST, WRITTEN, "run1", 0)
    assert "is not in what it gives back" in done.fault
