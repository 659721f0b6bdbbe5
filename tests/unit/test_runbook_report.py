"""The report: figures from the ledgers only, measured against the environment's targets, on a page of its own."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from runbooks import definition, page, report
from runbooks.environment import Environment
from runbooks.journal import Journal
from runbooks.ledger import Record, boot_id
from tests.unit.runbook import past

INVENTORY = """
all:
  hosts: {{a: {{ansible_connection: local}}}}
  vars:
    environment_name: unit
    runbook_state: {place}/runs
    runbook_ledgers: {place}/ledgers
    targets: {{rto_critical_s: {rto}, rto_database_s: {rto}, rpo_s: 300}}
"""
RUN = "20270314-031500-fail-over-ab12"
STEPS = ("check", "fence", "promote", "start", "route", "verify")


class Stage:
    """A fail-over that happened just now: its journal, and the ledgers of the clients that saw it."""

    def __init__(self, place: Path, rto: int = 60) -> None:
        self.place = place
        inventory = place / "inventory.yml"
        inventory.write_text(INVENTORY.format(place=place, rto=rto))
        self.environment = Environment(inventory)
        self.journal = Journal(self.environment.state_directory, "unit")
        self.definition = definition.load("fail-over")
        self.now, self.wall = time.monotonic(), time.time()

    def run(self, *, ends: str = "succeeded", reason: str = "", steps: tuple[str, ...] = STEPS) -> None:
        fence = past.begin(
            self.journal,
            RUN,
            runbook="fail-over",
            inventory=self.environment.path,
            parameters={"to": "us-west-2"},
            steps=list(STEPS),
        )
        for step in steps:
            outputs = {"lease_waited_s": 11.5} if step == "fence" else {}
            self.journal.append("step_started", step, {})
            self.journal.append(
                "step_finished",
                step,
                {
                    "outcome": "ok",
                    "elapsed_s": 12.0 if step == "fence" else 1.5,
                    "outputs": outputs,
                    "says": f"{step} <done>",
                    "changed": [{"task": f"do {step}", "hosts": ["usw2-db1"]}],
                },
            )
        past.finish(self.journal, fence, ends, reason)

    def ledger(self, *, gap: float = 20.0, lost: int = 0, readback: bool = True) -> None:
        """One client: ten writes in the east, a gap, ten in the west; the last ``lost`` eastern ones are gone."""
        first = self.now - gap - 10
        rows = [self.record(first - 1, "start", detail={"boot": boot_id()})]
        east = [first + i for i in range(10)]
        west = [east[-1] + gap + i * 0.1 for i in range(10)]
        for n, t in enumerate([*east, *west]):
            side = {"region": "us-east-1", "timeline": 1} if t in east else {"region": "us-west-2", "timeline": 2}
            rows.append(self.record(t, "ack", n=n, **side))
        rows.append(self.record(west[-1] + 0.1, "stop"))
        if readback:
            found = tuple(n for n in range(20) if not 10 - lost <= n < 10)
            rows.append(self.record(west[-1] + 1, "readback", found=found))
        path = self.place / "ledgers" / "outside-fresh.jsonl"
        path.parent.mkdir()
        path.write_text("".join(row.to_line() for row in rows))

    def record(self, t: float, kind: Any, **more: Any) -> Record:
        return Record(t, self.wall + t - self.now, "outside-fresh", "outside", kind, **more)

    def report(self) -> dict[str, Any]:
        return report.build(self.journal, RUN, self.definition, self.environment)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def stage(place: Path) -> Iterator[Stage]:
    made = Stage(place)
    yield made
    made.journal.close()


def met(result: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["met"] for check in result["checks"]}


def test_figures_come_from_the_ledgers(stage: Stage) -> None:
    stage.ledger(gap=20)
    stage.run()
    result = stage.report()
    assert result["figures"]["rto_s"] == pytest.approx(20, abs=0.001)
    assert result["figures"]["rto_database_s"] == pytest.approx(20, abs=0.001)
    assert (result["figures"]["lost_acknowledged"], result["figures"]["rpo_s"]) == (0, 0)
    assert result["figures"]["two_writers_ms"] == 0
    assert result["figures"]["lease_wait_s"] == 11.5
    assert [name for name, value in met(result).items() if value] == [
        "rto_s",
        "rto_database_s",
        "rpo_s",
        "two_writers_ms",
    ]
    assert result["verdict"] == {"level": "good", "text": "Done, and every target was met."}
    assert report.exit_code(result) == 0


def test_missed_target_is_the_verdict_and_the_exit_code(place: Path) -> None:
    stage = Stage(place, rto=10)
    stage.ledger(gap=20, lost=2)
    stage.run()
    result = stage.report()
    assert met(result)["rto_s"] is False
    assert result["figures"]["lost_acknowledged"] == 2
    assert result["verdict"]["level"] == "bad"
    assert "Service back for its clients" in result["verdict"]["text"]
    assert report.exit_code(result) == 1
    stage.journal.close()


def test_without_ledgers_nothing_is_measured(stage: Stage) -> None:
    stage.run()
    result = stage.report()
    figures = {k: v for k, v in result["figures"].items() if k != "lease_wait_s"}
    assert set(figures.values()) == {None}
    assert set(met(result).values()) == {None}
    assert "Not measured: no client wrote at the time of the run" in result["verdict"]["text"]
    assert report.exit_code(result) == 0
    assert "not measured" in report.html(result)


def test_lost_writes_are_not_known_before_the_readback(stage: Stage) -> None:
    stage.ledger(readback=False)
    stage.run()
    result = stage.report()
    assert result["figures"]["lost_acknowledged"] is None
    assert met(result)["rpo_s"] is None
    assert met(result)["rto_s"] is True
    assert result["verdict"]["level"] == "warn"


def test_ledgers_that_were_put_aside_are_found(stage: Stage) -> None:
    stage.ledger(gap=20)
    stage.run()
    archive = stage.place / "ledgers" / "archive" / "20270314T031600"
    archive.mkdir(parents=True)
    (stage.place / "ledgers" / "outside-fresh.jsonl").rename(archive / "outside-fresh.jsonl")
    later = stage.record(time.monotonic() + 1, "ack", n=50, region="us-west-2", timeline=2)
    (stage.place / "ledgers" / "outside-fresh.jsonl").write_text(later.to_line())
    assert stage.report()["figures"]["rto_s"] == pytest.approx(20, abs=0.001)


def test_torn_ledger_is_said_and_not_guessed(stage: Stage) -> None:
    (stage.place / "ledgers").mkdir()
    (stage.place / "ledgers" / "x.jsonl").write_text("no record\n{}\n")
    stage.run()
    result = stage.report()
    assert "x.jsonl:1: not a record" in result["not_measured"]
    assert result["figures"]["rto_s"] is None


def test_failed_run_says_so_first(stage: Stage) -> None:
    stage.run(ends="failed", reason="Promote the database: usw2-db1: no leader", steps=STEPS[:2])
    result = stage.report()
    assert result["verdict"]["level"] == "bad"
    assert "no leader" in result["verdict"]["text"]
    assert report.exit_code(result) == 1
    text = report.html(result)
    assert text.count("not reached") == 4


class Page(HTMLParser):
    """What a page would load, and whether it is well-formed enough to nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "action") and v and not v.startswith("#")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_nothing_beside_it_and_escapes_what_it_shows(stage: Stage) -> None:
    stage.ledger()
    stage.run()
    text = report.html(stage.report())
    parsed = Page(text)
    assert (parsed.loads, parsed.open) == ([], [])
    assert not re.search(r"url\(|@import|https?://|<script|style=", text)
    assert "fence &lt;done&gt;" in text
    assert text.index('class="verdict') < text.index("What happened, when")
    for part in ("waiting for the lease", "first write after", "do promote", RUN):
        assert part in text


def test_style_is_the_one_that_the_policy_allows(stage: Stage) -> None:
    stage.run()
    text = report.html(stage.report())
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src &#39;sha256-{digest}&#39;" in text
    assert "default-src &#39;none&#39;" in text


def test_bars_lie_within_the_chart(stage: Stage) -> None:
    stage.ledger(gap=20)
    stage.run()
    chart = page.chart(stage.report())
    assert [lane["name"] for lane in chart["lanes"]] == ["checks", *STEPS]
    bars = [bar for lane in chart["lanes"] for bar in lane["bars"]]
    assert all(b["left"] >= 0 and b["left"] + b["width"] <= 100.001 and b["width"] > 0 for b in bars)
    marks = {m["name"]: m["at"] for m in chart["marks"]}
    assert marks["outage"] < marks["back"]
    assert chart["span_s"] >= 20
