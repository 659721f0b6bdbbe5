"""Whether the service's clients are back, from their ledgers."""

from __future__ import annotations

import pytest

from runbooks.ledger import Record
from runbooks.served import RECENT_S, waiting

NOW = 1000.0


def record(kind: str, t: float, client: str = "fresh", side: str = "outside", region: str = "west") -> Record:
    if kind == "ack":
        return Record(t, t, client, side, "ack", n=int(t), region=region, timeline=1)
    return Record(t, t, client, side, "fail" if kind == "fail" else "stop")


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
def test_who_is_back(records: list[Record], missing: list[str], back: list[str]) -> None:
    assert waiting(records, "west", NOW) == (missing, back)
