"""The report and the console for runs in every state: what they say, what they escape, and whom they let in."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runbooks import definition, page, report, story
from runbooks.cli import main
from runbooks.console import Desk, Doorkeeper, Row, Server, home, matching
from runbooks.environment import Environment
from runbooks.errors import Problem
from runbooks.journal import Journal, Record
from tests.unit.runbook import past
from tests.unit.runbook.place import INVENTORY, ROOT

STATES = {
    "succeeded": ("good", "Done.", None),
    "failed": ("bad", "Failed. It rained", "runbook resume r1"),
    "refused": ("bad", "Refused, and nothing was changed by the step that refused. It rained", "runbook resume r1"),
    "interrupted": ("warn", "Interrupted. It rained", "runbook resume r1"),
    "waiting": ("warn", "Waiting. It rained", None),
    "undone": ("warn", "Undone. It rained", None),
    "aborted": ("warn", "Given up. It rained", None),
}


@pytest.fixture(scope="module")
def shed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNBOOK_DEFINITIONS", str(ROOT / "tests/unit/runbook/definitions"))
        patch.setenv("RUNBOOK_TEST_PLACE", str(tmp_path_factory.mktemp("shed")))
        yield Environment(INVENTORY)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "runs", "shed")) as opened:
        yield opened


def built(journal: Journal, run: str, environment: Environment | None, **more: Any) -> dict[str, Any]:
    runbook, _ = report.definition_of("paint")
    return report.build(journal, run, runbook, environment, **more)


# -- the report of a run in each state


@pytest.mark.parametrize("state", STATES)
def test_run_that_ended(journal: Journal, shed: Environment, state: str) -> None:
    steps = past.STEPS if state == "succeeded" else past.STEPS[:1]
    past.ended(journal, "r1", state, "" if state == "succeeded" else "it rained", steps)
    result = built(journal, "r1", shed)
    level, text, command = STATES[state]
    assert result["verdict"] == {"level": level, "text": text}
    if command is not None or state == "succeeded":
        assert result["next"] == command
    written = report.html(result)
    assert text in written
    assert written.count("not reached") == len(past.STEPS) - len(steps)
    assert json.loads(json.dumps(result))["shown_state"] == state


def test_running(journal: Journal, shed: Environment) -> None:
    past.begin(journal, "r1")
    past.do(journal, "look")
    journal.append("step_started", "paint", {"budget_s": 10})
    past.effect(journal, "paint", "Put the paint on", "here1")
    result = built(journal, "r1", shed, measure=False)
    assert (result["shown_state"], result["next"], result["elapsed_s"]) == ("running", None, None)
    assert result["verdict"]["text"] == "Running, at step 2 of 3 (paint)."
    written = report.html(result)
    assert "1 of 3 steps done" in written
    assert ">under way<" in written


def test_dead(journal: Journal, shed: Environment) -> None:
    past.dead(journal, "r1")
    result = built(journal, "r1", shed)
    assert (result["shown_state"], result["next"]) == ("dead", "runbook resume r1")
    assert result["verdict"]["text"] == "Its process is gone with the work unfinished, at step 2 of 3 (paint)."
    came = [(c["came"], c["hosts"]) for c in page.changes(result["steps"][1], running=False)]
    assert came == [("changed", ["here1"]), ("unknown", ["here2"])]
    assert "outcome not recorded" in report.html(result)
    [bar] = page.chart(result)["lanes"][2]["bars"]
    assert (bar["kind"], bar["title"]) == ("died", "attempt 1: died")


def test_resumed(journal: Journal, shed: Environment) -> None:
    past.dead(journal, "r1")
    fence = past.begin(journal, "r1", resuming=True)
    past.do(journal, "paint")
    past.do(journal, "admire")
    past.finish(journal, fence, "succeeded")
    result = built(journal, "r1", shed)
    assert [(h["how"], h["fence"]) for h in result["holders"]] == [("started", 1), ("resumed", 2)]
    assert [t["outcome"] for t in result["steps"][1]["tries"]] == ["died", "ok"]
    assert result["verdict"]["level"] == "good"
    assert [m["name"] for m in page.chart(result)["marks"]] == ["resumed"]
    # The task of the dead attempt has an outcome now: the step that was run again waited for all of its tasks.
    assert [c["came"] for c in page.changes(result["steps"][1], running=False)] == ["changed"]


def test_superseded_run_points_at_its_successor(journal: Journal, shed: Environment) -> None:
    past.ended(journal, "r1", "failed")
    past.ended(journal, "r2", "succeeded")
    assert built(journal, "r1", shed)["next"] == "runbook status r2"


def test_everything_that_can_be_told(journal: Journal, shed: Environment) -> None:
    run = past.full(journal)
    result = built(journal, run, shed)
    assert result["plan"]["plan"] == past.HASH
    assert [a["name"] for a in result["approvals"]] == ["ada", "grace"]
    assert result["emergencies"][0]["reason"] == "the shed burns"
    assert [(w["step"], w["open"], w["lifted"]) for w in result["windows"]] == [("look", False, True)]
    [message] = result["notifications"]
    assert (message["receiver"], message["outcome"]) == ("slack", "sent")
    paint = result["steps"][1]
    assert (paint["undo"]["outcome"], paint["undo"]["says"]) == ("ok", "Grey again")
    assert [(e["host"], e["changed"]) for e in paint["effects"]] == [("here1", True), ("here2", True), ("here1", False)]
    assert (paint["budget_s"], paint["estimate_s"], paint["over_s"]) == (10, 1.25, 0)
    written = report.html(result)
    for text in (
        "Emergency, by ada",
        "lifted by the emergency",
        "2 approvals needed; it began with that of ada, grace",
        "Gate after: The paint is dry: dry to the touch",
        "/shed/wall +2 -1",
        "undo ok",
        "Acknowledged by ada",
    ):
        assert text in written
    # One line for both hosts, where the same was done; none for a task that found its part done.
    assert [(c["task"], c["came"], c["hosts"]) for c in page.changes(paint, running=False)] == [
        ("Put the paint on", "changed", ["here1", "here2"])
    ]


def test_evidence_holds_or_is_said_to_be_broken(journal: Journal, shed: Environment) -> None:
    past.ended(journal, "r1", "succeeded")
    evidence = built(journal, "r1", shed)["evidence"]
    assert (evidence["state"], evidence["level"], evidence["faults"]) == ("holds", "good", [])
    assert evidence["facts"]["Signed by"] == "journal"
    assert evidence["facts"]["Anchors"] == "none"
    with closing(sqlite3.connect(journal.location)) as db, db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        db.execute("UPDATE journal SET data = replace(data, '1.5', '0.5') WHERE kind = 'step_finished'")
    result = built(journal, "r1", shed)
    assert (result["evidence"]["state"], result["evidence"]["level"]) == ("broken", "bad")
    written = report.html(result)
    assert "The evidence of this run is broken" in written
    assert "runbook evidence verify r1" in written


def test_long_chain_is_examined_in_part(journal: Journal, shed: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    past.ended(journal, "r1", "succeeded")
    past.ended(journal, "r2", "succeeded")
    monkeypatch.setattr(report, "VERIFIED_WHOLE", 5)
    facts = built(journal, "r1", shed)["evidence"]["facts"]
    assert facts["Examined"] == "8 records, from the first to the last of this run"


def test_without_definition_and_inventory(journal: Journal, tmp_path: Path) -> None:
    fence = past.begin(journal, "r1", inventory=tmp_path / "gone.yml", runbook="forgotten")
    past.do(journal, "look")
    past.finish(journal, fence, "succeeded")
    runbook, why = report.definition_of("forgotten")
    assert runbook is None
    assert "no runbook 'forgotten'" in why
    environment, why = report.environment_of(str(tmp_path / "gone.yml"))
    assert environment is None
    assert "no inventory" in why
    result = report.build(journal, "r1", None, None)
    assert result["no_targets"] == "there is no definition of forgotten any more"
    assert result["steps"][0]["budget_s"] == 10, "what the record says, where the definition does not"
    assert "Its targets are not known" in report.html(result)


def test_missing_step_over_budget(journal: Journal, shed: Environment) -> None:
    fence = past.begin(journal, "r1")
    journal.append("step_started", "look", {"budget_s": 10})
    journal.append("step_finished", "look", past.finished(elapsed_s=12.25))
    past.finish(journal, fence, "interrupted")
    result = built(journal, "r1", shed)
    assert result["steps"][0]["over_s"] == 2.25
    assert "2.2 s over" in report.html(result)
    assert result["steps"][1]["over_s"] is None


def test_run_from_before_the_chain(tmp_path: Path, shed: Environment) -> None:
    """A journal as the first engine wrote it: no hashes, no fences, no effects."""
    directory = tmp_path / "old"
    directory.mkdir()
    with closing(sqlite3.connect(directory / "journal.sqlite")) as db, db:
        db.execute(
            "CREATE TABLE journal (seq INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, wall REAL NOT NULL, "
            "mono REAL NOT NULL, kind TEXT NOT NULL, step TEXT, data TEXT NOT NULL)"
        )
        rows = [
            ("run_started", None, {**past.start(), "who": "ada", "host": "h", "boot": "b", "pid": 1}),
            ("step_started", "look", {"budget_s": 10}),
            ("step_finished", "look", past.finished(changed=[{"task": "Sweep", "hosts": ["here1"]}])),
            ("run_finished", None, {"state": "failed", "reason": "rain"}),
        ]
        for kind, step, data in rows:
            db.execute(
                "INSERT INTO journal (run, wall, mono, kind, step, data) VALUES ('r0', 1000.5, 5.5, ?, ?, ?)",
                (kind, step, json.dumps(data)),
            )
    with closing(Journal(directory, "shed")) as journal:
        result = built(journal, "r0", shed)
    assert result["verdict"]["text"] == "Failed. Rain"
    assert page.changes(result["steps"][0], running=False)[0]["task"] == "Sweep"
    assert "Sweep" in report.html(result)


def test_unknown_records_cost_their_own_line_only() -> None:
    def record(kind: str, **data: Any) -> Record:
        return Record(1, "r", 1.0, 1.0, kind, "look", data)

    kinds = [*story.TELLERS, "spilled_paint"]
    told = story.tell(record(kind) for kind in kinds)
    assert "spilled paint" in [event.text for event in told.timeline]
    assert told.steps["look"].attempts


def test_gates_and_undo_count_for_their_step() -> None:
    def effect(step: str) -> Record:
        return Record(1, "r", 1.0, 1.0, "effect_intended", step, {"task": "t", "hosts": ["h"]})

    told = story.tell(effect(step) for step in ("paint", "paint.before.1", "paint.after.2", "paint.undo"))
    assert list(told.steps) == ["paint"]
    assert len(told.steps["paint"].effects) == 4


def test_hostile_text_stays_text(journal: Journal, shed: Environment) -> None:
    run = past.hostile(journal)
    result = built(journal, run, shed)
    for text in (report.html(result), page.report(result, console={})):
        assert "<script>document" not in text
        assert "<img" not in text
        assert text.count("&lt;script&gt;document") > 10


# -- who is let in


def test_link_lets_one_browser_in_once() -> None:
    door = Doorkeeper(80, frozenset({"127.0.0.1:80"}), None)
    code = door.code
    session = door.enter(code)
    assert session is not None
    assert door.enter(code) is None
    assert door.code != code
    assert door.admits(f"x=y; {door.cookie}={session}", None)
    assert not door.admits(f"{door.cookie}={session}x", None)
    assert not door.admits(None, None)
    assert not door.admits(None, f"Bearer {code}"), "without a token file no header lets in"


def test_token_lets_in_by_header_only() -> None:
    door = Doorkeeper(80, frozenset(), "t" * 20)
    assert door.admits(None, "Bearer " + "t" * 20)
    assert door.admits(None, "Basic " + base64.b64encode(b"anybody:" + b"t" * 20).decode())
    for wrong in ("Bearer", "Bearer x", "Basic !", "Basic " + base64.b64encode(b"\xff:t").decode(), "Digest t"):
        assert not door.admits(None, wrong)
    assert door.enter(door.code) is None


class Visitor:
    """A client of a console that serves in this process."""

    def __init__(self, server: Server) -> None:
        self.server, self.port = server, server.server_address[1]
        session = server.door.enter(server.door.code)
        self.cookie = f"{server.door.cookie}={session}"

    def ask(
        self, path: str, *, method: str = "GET", host: str | None = None, cookie: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            sent = {"Cookie": self.cookie if cookie is None else cookie, "Host": host or f"127.0.0.1:{self.port}"}
            connection.request(method, path, headers={**sent, **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()


@pytest.fixture
def desk(journal: Journal, shed: Environment) -> Desk:
    directory = journal.directory
    return Desk(lambda: {"shed": lambda: Journal(directory, "shed")}, {"shed": str(INVENTORY)})


@pytest.fixture
def visitor(desk: Desk) -> Iterator[Visitor]:
    server = Server(("127.0.0.1", 0), desk, frozenset({"127.0.0.1", "localhost"}), None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    with server:
        yield Visitor(server)
        server.shutdown()
        thread.join()
    desk.close()


def test_pages_for_who_was_let_in(visitor: Visitor, journal: Journal) -> None:
    past.ended(journal, "r1", "failed", "it rained")
    status, headers, body = visitor.ask("/")
    assert (status, headers["Cache-Control"], headers["Referrer-Policy"]) == (200, "no-store", "no-referrer")
    assert "runbook resume r1" in body
    status, headers, body = visitor.ask("/runs/r1")
    assert status == 200
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Failed. It rained" in body
    assert json.loads(visitor.ask("/runs/r1.json")[2])["state"] == "failed"
    assert [row["run"] for row in json.loads(visitor.ask("/runs.json")[2])] == ["r1"]
    assert visitor.ask("/console.js")[1]["Content-Type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/runs/",
        "/runs/r9",
        "/runs/../r1",
        "/runs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/../../etc/passwd",
        "//x/",
        "/%00",
    ],
)
def test_no_other_paths(visitor: Visitor, path: str) -> None:
    status, _, body = visitor.ask(path)
    assert status == 404
    assert "root:" not in body


def test_nobody_else_is_let_in(visitor: Visitor, journal: Journal) -> None:
    past.ended(journal, "r1", "failed", "a secret reason")
    for path in ("/", "/runs/r1", "/runs/r1.json", "/runs.json", "/console.js", "/enter/", "/enter/guessed"):
        for cookie in ("", f"{visitor.server.door.cookie}=guessed", "no cookie at all;;"):
            status, headers, body = visitor.ask(path, cookie=cookie)
            assert status == 401
            assert "Set-Cookie" not in headers
            assert "secret" not in body
    port = visitor.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}"):
        assert visitor.ask("/", host=host)[0] == 421
    assert visitor.ask("/", host=f"LOCALHOST:{port}")[0] == 200
    assert visitor.ask("/runs.json", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"})[0] == 403


def test_entering_sets_a_cookie_that_scripts_and_other_sites_do_not_get(visitor: Visitor) -> None:
    link = "/enter/" + visitor.server.door.code
    assert visitor.ask(link, method="HEAD", cookie="")[0] == 401
    assert visitor.ask(link, cookie="", **{"Sec-Purpose": "prefetch"})[0] == 401
    status, headers, body = visitor.ask(link, cookie="")
    assert status == 200
    assert headers["Set-Cookie"].startswith(f"runbook_console_{visitor.port}=")
    for word in ("HttpOnly", "SameSite=Strict", "Path=/"):
        assert word in headers["Set-Cookie"]
    assert 'content="0; url=/"' in body


def test_it_only_shows(visitor: Visitor) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = visitor.ask("/", method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
    status, headers, body = visitor.ask("/", method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 1000


def test_unchanged_is_said_shortly(visitor: Visitor, journal: Journal) -> None:
    past.ended(journal, "r1", "failed")
    _, headers, _ = visitor.ask("/runs/r1")
    assert visitor.ask("/runs/r1", **{"If-None-Match": headers["ETag"]})[0] == 304
    journal.record("acknowledged", "r1", None, {"name": "ada"})
    deadline = time.monotonic() + 5
    while visitor.ask("/runs/r1", **{"If-None-Match": headers["ETag"]})[0] == 304:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Acknowledged by ada" in visitor.ask("/runs/r1")[2]


def test_slow_clients_delay_nobody(visitor: Visitor) -> None:
    """Forty clients that say half a word and wait."""
    idle = [socket.create_connection(("127.0.0.1", visitor.port)) for _ in range(40)]
    try:
        for each in idle:
            each.sendall(b"GET / HT")
        began = time.monotonic()
        assert visitor.ask("/")[0] == 200
        assert time.monotonic() - began < 2
    finally:
        for each in idle:
            each.close()


def test_journal_that_is_lost_is_said_and_comes_back(desk: Desk, visitor: Visitor, journal: Journal) -> None:
    past.ended(journal, "r1", "failed")
    assert visitor.ask("/")[0] == 200
    own = desk._shelves["shed"].journal
    changed = own.changed

    def lost(after: int) -> tuple[int, set[str]]:
        raise Problem("The journal does not answer", code="journal-unreachable", next_command="ls")

    own.changed = lost  # type: ignore[method-assign]
    time.sleep(0.6)
    assert "The journal of shed cannot be read: The journal does not answer" in visitor.ask("/")[2]
    assert ">paint</a>" in visitor.ask("/")[2], "what was known stays"
    own.changed = changed  # type: ignore[method-assign]
    time.sleep(0.6)
    assert "cannot be read" not in visitor.ask("/")[2]


# -- the history


def row(**more: Any) -> Row:
    base: dict[str, Any] = dict.fromkeys(Row.__slots__, "")
    return Row(**{**base, "started": 1000.0, "asked": 1000.0, "next": None, "elapsed_s": None, **more})


def test_filters() -> None:
    rows = [
        row(
            run="a",
            environment="shed",
            state="failed",
            reason="It RAINED",
            started=time.mktime((2027, 3, 14, 12, 0, 0, 0, 0, -1)),
        ),
        row(run="b", environment="barn", state="succeeded"),
    ]
    assert [r.run for r in matching(rows, {})] == ["a", "b"]
    assert [r.run for r in matching(rows, {"q": "rain"})] == ["a"]
    assert [r.run for r in matching(rows, {"environment": "barn", "state": ""})] == ["b"]
    assert [r.run for r in matching(rows, {"environment": "barn", "state": "failed"})] == []
    assert [r.run for r in matching(rows, {"since": "2027-03-14"})] == ["a"]
    assert [r.run for r in matching(rows, {"since": "yesterday"})] == ["a", "b"]


def test_history_in_pages(desk: Desk, journal: Journal) -> None:
    for number in range(53):
        past.finish(journal, past.begin(journal, f"r{number:02d}"), "succeeded")
    first = home(desk, {"state": "succeeded"})
    assert first.count('<th scope="row">') == 50
    assert "53 of 53 runs" in first
    assert 'href="/?state=succeeded&amp;page=2">Older' in first
    second = home(desk, {"page": "2"})
    assert second.count('<th scope="row">') == 3
    assert home(desk, {"page": "99"}).count('<th scope="row">') == 3
    assert "No run is like that" in home(desk, {"q": "nothing"})
    desk.close()


# -- the command


def test_others_do_not_reach_it_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--bind", "0.0.0.0"]) == 3
    said = capsys.readouterr().err
    assert "not encrypted" in said
    assert "next: ssh -L 8765:127.0.0.1:8765" in said
    assert main(["serve", "--bind", "example.com"]) == 2
    assert "--bind wants an address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [("t" * 20, 0o644, "can be read by others (mode 644)"), ("short", 0o600, "has 5 characters, it needs 16")],
)
def test_token_file_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, mode: int, says: str
) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    assert main(["serve", "--token-file", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert main(["serve", "--token-file", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_taken_port_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "runbooks", "serve", "--port", "0", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        port = int(json.loads(process.stdout.readline())["url"].rsplit(":", 1)[1].strip("/"))
        # Somebody is connected and says nothing.
        with socket.create_connection(("127.0.0.1", port)):
            process.send_signal(number)
            out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


def test_definition_is_named_in_the_report_of_shipped_runbooks() -> None:
    for name in definition.files():
        assert report.definition_of(name)[0] is not None


def test_run_whose_reading_failed_is_read_again(desk: Desk, visitor: Visitor, journal: Journal) -> None:
    past.ended(journal, "r1", "failed")
    journal.record("alert_seen", "event:7", None, {})
    assert visitor.ask("/runs/r1")[0] == 200
    own = desk._shelves["shed"].journal
    state = own.state

    def lost(run: str) -> Any:
        raise Problem("The journal does not answer", code="journal-unreachable", next_command="ls")

    own.state = lost  # type: ignore[method-assign]
    past.ended(journal, "r2", "succeeded")
    time.sleep(0.6)
    assert "does not answer" in visitor.ask("/")[2]
    own.state = state  # type: ignore[method-assign]
    time.sleep(0.6)
    assert visitor.ask("/runs/r2")[0] == 200
