"""The ledger: its writer and reader, and the figures as cases (data/ledger/cases.yml)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbooks import ledger

CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "data/ledger/cases.yml").read_text())
SIDES = {"o": "outside", "e": "us-east-1", "w": "us-west-2"}
REGIONS = {"E": "us-east-1", "W": "us-west-2"}


def record(row: list[Any], wall_jump: float) -> ledger.Record:
    t, client, kind, *rest = row
    n = rest[0] if rest else None
    writer = rest[1] if len(rest) > 1 else None
    return ledger.Record(
        t=t,
        wall=1e9 + t + (wall_jump if kind == "ack" and n == 2 else 0),
        client=client,
        side=SIDES[client[0]],
        kind=kind,
        n=n if kind in ("ack", "fail") else None,
        region=REGIONS[writer[0]] if writer else None,
        timeline=int(writer[1:]) if writer else None,
        found=tuple(n or ()) if kind == "readback" else None,
        detail={"boot": n} if kind == "start" else None,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_measure(case: dict[str, Any]) -> None:
    records = [record(row, case.get("wall_jump", 0)) for row in case["records"]]
    start, end = case.get("window", (None, None))
    if "error" in case:
        with pytest.raises(ledger.LedgerError, match=case["error"]):
            ledger.measure(records, start=start, end=end)
        return
    figures = ledger.measure(records, start=start, end=end, to_region=case.get("to_region"))
    data = figures.to_dict()
    data["lost_numbers"] = [w.n for w in figures.lost]
    for name, want in case["expect"].items():
        if name.startswith("client_"):
            got = data["clients"][name.removeprefix("client_")]
            assert {key: got[key] for key in want} == want
        elif isinstance(want, int | float):
            assert data[name] == pytest.approx(want, abs=1e-6), name
        else:
            assert (list(data[name]) if isinstance(want, list) else data[name]) == want, name
    json.dumps(data)


def test_cases_have_names_of_their_own() -> None:
    names = [case["name"] for case in CASES]
    assert len(names) == len(set(names)) > 20


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ledger.LedgerWriter(path, "outside-fresh", "outside") as writer:
        written = [
            writer.start(),
            writer.write("ack", n=1, region="us-east-1", timeline=1, address="10.77.1.11"),
            writer.write("fail", n=2, detail="timed out"),
            writer.write("readback", found=[1], t=time.monotonic() - 5),
        ]
    assert ledger.read(path) == written
    assert written[3].wall == pytest.approx(time.time() - 5, abs=1)
    assert written[0].detail["boot"] == ledger.boot_id()


def test_a_torn_last_line_is_left_out_and_cut_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ledger.LedgerWriter(path, "c", "outside") as writer:
        first = writer.write("ack", n=1, region="us-east-1", timeline=1)
    with path.open("a") as file:
        file.write('{"t":3.0,"wall":1,"client":"c","si')
    assert ledger.read(path) == [first]
    with ledger.LedgerWriter(path, "c", "outside") as writer:
        second = writer.write("ack", n=2, region="us-east-1", timeline=1)
    assert ledger.read(path) == [first, second]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "not an object"),
        ('{"t":1,"wall":1,"client":"c","side":"outside","kind":"applause"}', "unknown kind"),
        ('{"t":1,"wall":1,"client":"c","side":"outside","kind":"ack","n":1}', "needs n, region and timeline"),
        ('{"t":"1","wall":1,"client":"c","side":"outside","kind":"stop"}', "'t' is missing or of the wrong type"),
        ('{"t":1,"wall":1,"client":"c","side":"outside","kind":"readback"}', "needs found"),
        ('{"t":1,"wall":1,"client":"c","side":"outside","kind":"stop","x":1}', "unknown field 'x'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n" + '{"t":1,"wall":1,"client":"c","side":"outside","kind":"stop"}\n')
    with pytest.raises(ledger.LedgerError, match=f"a.jsonl:1: not a record: .*{why}"):
        ledger.read(path)


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(ledger.LedgerError, match=r"none\.jsonl: No such file"):
        ledger.read(tmp_path / "none.jsonl")


def test_a_killed_writer_loses_no_record(tmp_path: Path) -> None:
    """SIGKILL right after a record: it is in the file, whole."""
    path = tmp_path / "a.jsonl"
    code = (
        "import sys; from pathlib import Path; from runbooks import ledger\n"
        "w = ledger.LedgerWriter(Path(sys.argv[1]), 'c', 'outside')\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; w.write('ack', n=n, region='us-east-1', timeline=1); print(n, flush=True)\n"
    )
    root = Path(ledger.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    said = 0
    while said < 200:
        said = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    if rest:
        said = int(rest[-1])
    assert [r.n for r in ledger.read(path)][:said] == list(range(1, said + 1))
