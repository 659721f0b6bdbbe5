"""A run whose engine is killed, as the people who are called for it meet it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.runbook.place import INVENTORY, make_place
from tests.unit.runbook.post_office import closed_port, office, ok

CANARY = "canary-4711"


def test_people_are_told_once_through_death_and_resumption(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    with office(ok) as chat:
        told = {
            "slack": {"webhook": f"{chat.url}/{CANARY}"},
            # Nobody is there; that a run does not wait for such a one is tests/unit/test_runbook_notify.py's.
            "pagerduty": {"routing_key": CANARY, "url": f"http://127.0.0.1:{closed_port()}"},
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
