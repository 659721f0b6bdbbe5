"""What nobody acknowledges is said again: when, how often, and once also from two machines."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runbooks import alerts, escalation, events
from runbooks.escalation import due, matter
from runbooks.journal import Journal, Record
from tests.unit.runbook.place import ROOT, Place, make_place
from tests.unit.runbook.post_office import Office, accepted, office
from tests.unit.runbook.world import World, start
from tests.unit.test_runbook_events import EAST, WEST, alert, described, message

RUN = "20261121-180000-paint-ab12"


def record(seq: int, kind: str, **data: Any) -> Record:
    return Record(
        seq, RUN, 1000.0 * seq, 0.0, kind, None, data, fence=1 if kind.startswith(("run_", "step_")) else None
    )


STARTED = record(1, "run_started")
FAILED = record(3, "run_finished", state="failed", reason="the bucket has a hole")


@pytest.mark.parametrize(
    ("records", "shown", "severity", "wanted"),
    [
        ([STARTED], "running", "critical", None),
        ([STARTED, FAILED], "failed", "critical", ("failed:3", 3000.0, "the bucket has a hole")),
        ([STARTED, FAILED], "failed", "high", None),
        ([STARTED, record(3, "run_finished", state="undone")], "undone", "critical", None),
        ([STARTED, FAILED, record(4, "acknowledged")], "failed", "critical", None),
        (
            [STARTED, record(2, "acknowledged"), FAILED],
            "failed",
            "critical",
            ("failed:3", 3000.0, "the bucket has a hole"),
        ),
        (
            [STARTED, record(2, "step_started"), record(9, "notify_done")],
            "dead",
            "low",
            ("dead:1", 2000.0, "its process is gone with its work unfinished"),
        ),
        (
            [STARTED, record(3, "run_finished", state="waiting")],
            "waiting",
            "low",
            ("waiting:3", 3000.0, "it waits for an approval"),
        ),
        (
            [STARTED, record(3, "run_finished", state="waiting"), record(5, "approval_given")],
            "waiting",
            "low",
            ("waiting:3", 5000.0, "it waits for an approval"),
        ),
        ([STARTED, record(3, "run_finished", state="succeeded")], "succeeded", "critical", None),
        ([record(1, "approval_given")], "waiting", "critical", None),
    ],
)
def test_what_a_run_waits_for(
    records: list[Record], shown: str, severity: str, wanted: tuple[str, float, str] | None
) -> None:
    found = matter(records, shown, severity)
    assert (None if found is None else (found.key, found.since, found.what)) == wanted


@pytest.mark.parametrize(
    ("waited", "number"),
    [(0, 0), (899, 0), (900, 1), (1799, 1), (1800, 2), (3600, 4), (10 * 3600, 4), (24 * 3600 + 3601, 0), (-50, 0)],
)
def test_when_an_escalation_is_due(waited: float, number: int) -> None:
    assert due(1_000_000.0, 1_000_000.0 + waited, 900, 4) == number


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with World.made(tmp_path) as made:
        made.begin(RUN, "no-such-runbook")
        made.journal.finish("failed", "the bucket has a hole")
        yield made


@pytest.fixture
def pages(world: World) -> Iterator[Office]:
    with office(accepted) as place:
        world.notifications = {"pagerduty": {"routing_key": "k", "url": place.url}}
        yield place


@pytest.mark.parametrize(
    ("records", "shown", "now", "reason"),
    [
        ([STARTED, FAILED], "failed", 3059, None),
        ([STARTED, FAILED], "failed", 3061, "the bucket has a hole"),
        ([STARTED, FAILED], "failed", 6601, None),
        ([STARTED, FAILED, record(4, "notify_intended", event="failed")], "failed", 3061, None),
        ([STARTED, record(2, "notify_intended", event="failed"), FAILED], "failed", 3061, "the bucket has a hole"),
        ([STARTED, record(3, "run_finished", state="succeeded", reason="")], "succeeded", 3061, ""),
        ([STARTED, record(3, "run_finished", state="waiting", reason="next job")], "waiting", 3061, None),
        ([STARTED], "dead", 1061, None),
        ([], "failed", 1061, None),
    ],
)
def test_end_that_nobody_told(records: list[Record], shown: str, now: float, reason: str | None) -> None:
    assert escalation.untold(records, shown, now) == reason


def told(world: World) -> None:
    """The engine has told how the run ended."""
    data = {
        "key": "failed:0",
        "event": "failed",
        "receiver": "pagerduty",
        "attempt": 1,
        "claim": "c",
        "action": "trigger",
    }
    world.journal.record("notify_intended", RUN, None, data)
    done = {"key": "failed:0", "receiver": "pagerduty", "claim": "c", "outcome": "sent"}
    world.journal.record("notify_done", RUN, None, done)


def look(world: World, after_s: float) -> int:
    return len(escalation.escalate(world.journal, world.environment, 5, lambda: time.time() + after_s))


def test_each_escalation_is_said_once_however_often_the_timer_looks(world: World, pages: Office) -> None:
    told(world)
    assert [look(world, after) for after in (10, 890, 905, 910, 1805, 1810)] == [0, 0, 1, 1, 1, 1]
    assert len(pages.got) == 2
    assert pages.got[0]["body"]["payload"]["custom_details"]["next"] == f"runbook notify ack {RUN}"
    assert "for 15 min: the bucket has a hole" in pages.got[0]["body"]["payload"]["custom_details"]["what"]
    assert pages.got[0]["body"]["dedup_key"] == f"unit/{RUN}"


def test_run_that_another_has_followed_is_quiet(world: World, pages: Office) -> None:
    told(world)
    later = RUN.replace("18", "19")
    world.journal.begin(later, {**start("no-such-runbook"), "environment": "unit"}, fence=2)
    world.journal.append("step_started", "one", {})
    world.journal.finish("succeeded")
    assert look(world, 1000) == 0
    assert pages.got == []


def test_proposal_that_nobody_takes_up_is_said_again_until_it_is(world: World, pages: Office) -> None:
    told(world)
    world.journal.record("acknowledged", RUN, None, {"name": "ada"})
    world.variables.variables |= {"runbook_events": described(action="propose"), "regions": {EAST: {}, WEST: {}}}
    for witness in ("frankfurt", "dublin", "tokyo"):
        about, own = alerts.receive(world.journal, world.environment, events.digest(witness), message(alert()))
    assert look(world, 100) == 0, "being planned still"
    world.journal.record(
        "alert_decided", own[0].run, None, {"incident": about[0].tally.incident, "outcome": "proposed"}
    )
    assert [look(world, after) for after in (899, 901, 902, 1801)] == [0, 1, 1, 1]
    assert len(pages.got) == 2, "also when the witnesses' words have grown old"
    assert "has not been run since" in pages.got[0]["body"]["payload"]["custom_details"]["what"]
    for witness in ("frankfurt", "dublin", "tokyo"):
        alerts.receive(world.journal, world.environment, events.digest(witness), message(alert("resolved")))
    assert look(world, 2701) == 0


def test_end_whose_process_was_killed_before_it_was_told(world: World, pages: Office) -> None:
    assert [look(world, after) for after in (30, 70, 80)] == [0, 0, 0]
    (got,) = pages.got
    assert (got["body"]["payload"]["class"], got["body"]["payload"]["custom_details"]["what"]) == (
        "failed",
        "the bucket has a hole",
    )


def test_acknowledged_matter_is_quiet(world: World, pages: Office) -> None:
    told(world)
    world.journal.record("acknowledged", RUN, None, {"name": "ada"})
    assert look(world, 1000) == 0
    assert pages.got == []


def test_what_was_not_sent_is_sent_by_the_timer(world: World) -> None:
    """The network was away when the run failed."""
    with office(lambda n: (400, {}, b"") if n == 1 else accepted(n)) as place:
        world.notifications = {"pagerduty": {"routing_key": "k", "url": place.url}}
        notifier = world.notifier(RUN)
        notifier.event("failed", None, "x")
        notifier.close()
        look(world, 30)
        assert len(place.got) == 1, "its sender may be at it still"
        look(world, 70)
        look(world, 80)
        assert [g["body"]["event_action"] for g in place.got] == ["trigger", "trigger"]


def test_machines_at_once_say_it_once(world: World, pages: Office, tmp_path: Path) -> None:
    """Each with a connection of its own to the journal. The clock is the journal's: what one of them has just intended
    is not what another takes for abandoned."""
    world.notifications = {**world.notifications, "escalate_after_s": 0.01, "escalations": 1}
    told(world)
    time.sleep(0.01)
    together = threading.Barrier(4)

    def one(_: int) -> int:
        with World.made(tmp_path, world.notifications) as own:
            together.wait()
            return look(own, 0)

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(one, range(4))) == [1, 1, 1, 1]
    assert len(pages.got) == 1


# -- as a person meets it


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return make_place(tmp_path)


def inventory(place: Place, notifications: str) -> str:
    path = place.directory / "inventory.yml"
    text = (ROOT / "tests/unit/runbook/inventory.yml").read_text()
    path.write_text(text + f"    runbook_notifications: {notifications}\n")
    return str(path)


def test_commands(place: Place, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("canary-4711")
    with office(accepted) as pages:
        own = inventory(
            place, f"{{pagerduty: {{routing_key_file: '{tmp_path}/key', url: '{pages.url}'}}, escalate_after_s: 0.001}}"
        )
        done = place.command("notify", "test", "-i", own)
        assert (done.returncode, done.stdout.split()) == (0, ["pagerduty", "sent"]), done.stderr
        assert [g["body"]["event_action"] for g in pages.got] == ["trigger", "resolve"]
        pages.got.clear()
        with contextlib.closing(Journal(tmp_path / "runs", "unit")) as journal:
            journal.begin(RUN, {**start("no-such-runbook"), "environment": "unit"}, fence=1)
            journal.finish("failed", "the bucket has a hole")
        done = place.command("notify", "escalate", "-i", own, "--json")
        assert done.returncode == 0, done.stderr
        done = place.command("notify", "ack", RUN[:20], "--as", "ada", "-i", own)
        assert (done.returncode, done.stdout) == (0, f"ada looks after {RUN}: nobody else is called for it\n")
        assert place.command("notify", "escalate", "-i", own).stdout == ""
        told = [g["body"] for g in pages.got]
        assert "canary-4711" not in done.stdout + done.stderr
        (tmp_path / "key").unlink()
        assert b"canary-4711" not in place.everything()
        assert [(t["event_action"], t["dedup_key"]) for t in told] == [
            ("trigger", f"unit/{RUN}"),
            ("acknowledge", f"unit/{RUN}"),
        ]


@pytest.mark.parametrize(
    ("words", "notifications", "sentence"),
    [
        (["test"], "{}", "names no receiver"),
        (["test"], "{slack: {webhook: 'ftp://canary-4711'}}", "slack: webhook is not an https:// address"),
        (["test"], '{slack: {webhook: "{{ no_such }}"}}', "runbook_notifications.slack cannot be read"),
        (["test"], "{slack: {webhook: 'http://127.0.0.1:1/canary-4711'}}", "1 of 1 receivers were not told (slack"),
        (["ack", "event:nothing"], "{}", "The journal knows no event:nothing"),
    ],
)
def test_bad_input_is_exit_2_and_one_sentence(
    place: Place, words: list[str], notifications: str, sentence: str
) -> None:
    done = place.command("notify", *words, "-i", inventory(place, notifications))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "canary-4711" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


def test_environment_must_be_said(place: Place) -> None:
    assert place.command("notify", "escalate").returncode == 2
