"""A run whose engine is killed, as the people who are called for it meet it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runbooks import alerts, escalation, events
from runbooks.journal import Journal
from tests.local_postgresql import LocalPostgreSQL
from tests.unit.runbook.place import INVENTORY, make_place
from tests.unit.runbook.post_office import closed_port, office, ok
from tests.unit.runbook.world import Variables, World
from tests.unit.test_runbook_events import EAST, WEST, alert, described, message

CANARY = "canary-4711"


def test_people_are_told_once_through_death_and_resumption(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    with office(ok) as chat:
        told = {
            "slack": {"webhook": f"{chat.url}/{CANARY}"},
            # Nobody is there; that a run does not wait for such a one is tests/unit/test_runbook_notify.py's.
            "pagerduty": {"routing_key": CANARY, "url": f"http://127.0.0.1:{closed_port()}"},
            "sms": {"numbers": ["one"], "region": "us-east-1"},
        }
        own = tmp_path / "inventory.yml"
        own.write_text(INVENTORY.read_text() + f"    runbook_notifications: {json.dumps(told)}\n")
        engine = place.start("--slow", "60", "-i", str(own))
        place.wait_for("effects")
        chat.wait(1, 60)
        engine.kill()
        engine.wait()
        run = place.status()["run"]
        for _ in range(2):
            assert place.command("notify", "escalate", "-i", str(own)).returncode == 0
        (tmp_path / "dry").touch()
        resumed = place.command("resume", run)
        assert resumed.returncode == 0, resumed.stderr
        assert "runbook_notifications.sms: a number is written as +15550100" in resumed.stderr
        texts = [str(g["body"]["text"]) for g in chat.wait(4)]

    assert [text.splitlines()[0] for text in texts] == [
        "*[normal] unit: paint started*",
        "*[high] unit: paint dead*",
        "*[normal] unit: paint resumed*",
        "*[normal] unit: paint succeeded*",
    ]
    assert f"Next: runbook resume {run}" in texts[1]
    assert place.effects() == ["red"]
    own.unlink()
    assert CANARY.encode() not in place.everything()
    assert CANARY not in "".join(texts)


def test_machines_that_share_a_postgresql_have_one_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers and receivers of alerts at the same moment: one message, one decision."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run, machines = "20261121-180000-paint-ab12", 6
    with LocalPostgreSQL() as server, office(ok) as chat, contextlib.ExitStack() as stack:
        monkeypatch.setenv("PGPASSFILE", str(server.passfile))
        worlds = []
        for _ in range(machines):
            journal = stack.enter_context(contextlib.closing(Journal(server.url, "unit", tmp_path)))
            world = World(tmp_path, journal, Variables("unit"))
            world.notifications = {"slack": {"webhook": chat.url}}
            world.variables.variables |= {"runbook_events": described(action="start"), "regions": {EAST: {}, WEST: {}}}
            worlds.append(world)
        worlds[0].begin(run, "no-such-runbook")
        worlds[0].journal.finish("failed", "the bucket has a hole")
        together = threading.Barrier(machines)

        def timer(world: World) -> int:
            together.wait()
            return len(escalation.escalate(world.journal, world.environment, 30, lambda: time.time() + 905))

        def alerted(world: World, witness: str) -> int:
            together.wait()
            return len(alerts.receive(world.journal, world.environment, events.digest(witness), message(alert()))[1])

        with ThreadPoolExecutor() as pool:
            assert list(pool.map(timer, worlds)) == [1] * machines
            titles = sorted(str(g["body"]["text"]).splitlines()[0].rpartition(" ")[2] for g in chat.got)
            assert titles == ["escalated*", "failed*"], "the end that nobody told, and that nobody acknowledged it"
            assert sum(pool.map(alerted, worlds, ("frankfurt", "dublin", "tokyo", "west", "dublin-2", "tokyo"))) == 1
