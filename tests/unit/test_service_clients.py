"""Whether the service's clients are back, from their ledgers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.service.clients import (
    RECENT_S,
    Entry,
    LedgerError,
    read,
    waiting,
)

from runbooks.ledger import LedgerWriter

NOW = 1000.0


def record(kind: str, t: float, client: str = "fresh", side: str = "outside", region: str = "west") -> Entry:
    return Entry(t, client, side, kind, region if kind == "ack" else "")


@pytest.mark.parametrize(
    ("records", "missing", "back"),
    [
        ([], [], []),
        ([record("ack", 990, region="east"), record("fail", 999)], ["fresh"], []),
        ([record("ack", 990, region="east"), record("ack", 999)], [], ["fresh"]),
        ([record("ack", 999), record("ack", 998, "kept", region="east")], ["kept"], ["fresh"]),
        ([record("ack", 990, region="east"), record("stop", 999)], [], []),
        ([record("ack", NOW - RECENT_S - 1, region="east")], [], []),
        ([record("fail", 999)], [], []),
        ([record("ack", 999, "session", side="east", region="east")], [], []),
    ],
    ids=[
        "no ledger",
        "still waiting",
        "back",
        "one of two back",
        "stopped",
        "long silent",
        "never served",
        "inside the lost region",
    ],
)
def test_who_is_back(records: list[Entry], missing: list[str], back: list[str]) -> None:
    assert waiting(records, "west", NOW) == (missing, back)


def test_the_ledgers_that_clients_write_are_read_up_to_a_line_that_is_being_written(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "fresh.jsonl", "fresh", "outside")
    writer.write("ack", n=1, region="west", timeline=1)
    with (tmp_path / "fresh.jsonl").open("a") as stream:
        stream.write('{"t": 1, "wa')
    (entry,) = read(tmp_path)
    assert (entry.client, entry.side, entry.kind, entry.region) == ("fresh", "outside", "ack", "west")
    assert waiting([entry], "west", time.monotonic()) == ([], ["fresh"])


def test_a_ledger_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"t": 1}\n')
    with pytest.raises(LedgerError, match=r"odd\.jsonl, line 1, is no record"):
        read(tmp_path)
