"""Real Alertmanager messages to a real ansible-rulebook: a run that starts by itself, and one that is proposed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runbooks import events
from tests.unit.runbook.place import INVENTORY, ROOT, Place, make_place
from tests.unit.runbook.post_office import closed_port, office, ok

OUTER, CANARY = "outer-canary-4711", "witness-canary-4711"
WITNESSES = ("frankfurt", "dublin", "tokyo")
TEMPLATE = "{{ lookup('ansible.builtin.pipe', 'touch %s/taken-for-a-template') }}"


def message(place: Place, *names: str) -> dict[str, Any]:
    alerts = [
        {
            "status": "firing",
            "labels": {"alertname": name, "region": "us-east-1", "severity": "critical"},
            "annotations": {"summary": TEMPLATE % place.directory},
            "startsAt": "2026-11-21T18:00:00.123456789Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "http://prometheus.example.com/graph?g0.expr=up",
            "fingerprint": "b8a3f0c2d1e4a596",
        }
        for name in names
    ]
    return {
        "version": "4",
        "groupKey": '{}:{region="us-east-1"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "runbooks",
        "groupLabels": {"region": "us-east-1"},
        "commonLabels": {"region": "us-east-1", "severity": "critical"},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager.example.com",
        "alerts": alerts,
    }


def inventory(place: Place, slack: str) -> Path:
    rule = {"runbook": "paint", "parameters": {"colour": "red"}}
    described = {
        "regions": {"us-east-1": {}, "us-west-2": {}},
        "runbook_notifications": {"slack": {"webhook": f"{slack}/{CANARY}"}},
        "runbook_events": {
            "witnesses": {
                name: {"site": name, "token_sha256": events.digest(f"{CANARY}-{name}")} for name in WITNESSES
            },
            "rules": {
                "region-lost": {**rule, "lost": {"alertname": "RegionLost"}, "action": "start"},
                "region-slow": {
                    **rule,
                    "lost": {"alertname": "RegionSlow"},
                    "parameters": {"colour": "{{ colours[0 if event_region == 'us-west-2' else 1] }}", "coats": 2},
                },
            },
        },
    }
    path = place.directory / "inventory.yml"
    lines = [f"    {name}: {json.dumps(value)}\n" for name, value in described.items()]
    path.write_text(INVENTORY.read_text() + "".join(lines))
    return path


@contextmanager
def rulebook(place: Place, path: Path) -> Iterator[int]:
    """ansible-rulebook with the rulebook of the collection; the port where it takes alerts."""
    port, log = closed_port(), place.directory / "rulebook.log"
    variables = place.directory / "vars.yml"
    variables.write_text(
        json.dumps(
            {"runbook_event_inventory": str(path), "runbook_event_host": "127.0.0.1", "runbook_event_port": port}
        )
    )
    beside = ROOT / "collections/ansible_collections/censuschat/infra/extensions/eda/localhost.yml"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                *("ansible-rulebook", "--rulebook", "censuschat.infra.alerts", "--vars", str(variables)),
                *("--env-vars", "RUNBOOK_EVENT_TOKEN", "--inventory", str(beside), "-vv", "--shutdown-delay", "1"),
            ],
            cwd=ROOT,
            env={**place.environment, "RUNBOOK_EVENT_TOKEN": OUTER, "XDG_CONFIG_HOME": str(place.directory / "config")},
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
        )
    try:

        def listens() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(listens, "the rulebook listens", log)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(true: Callable[[], bool], what: str, log: Path, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}\n{log.read_text()[-8000:]}"
        time.sleep(0.1)


def post(port: int, bearer: str, token: str, document: dict[str, Any]) -> int:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {bearer}", "X-Witness-Token": token}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(document).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_alerts_of_three_witnesses_start_and_propose(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    log = tmp_path / "rulebook.log"
    with office(ok) as chat:
        path = inventory(place, chat.url)
        with rulebook(place, path) as port:
            both = message(place, "RegionLost", "RegionSlow")
            assert post(port, "wrong", f"{CANARY}-tokyo", both) == 401
            assert post(port, OUTER, f"{CANARY}-nobody", both) == 200
            for witness in (*WITNESSES, WITNESSES[2]):
                assert post(port, OUTER, f"{CANARY}-{witness}", both) == 200

            def told() -> str:
                return "\n".join(str(g["body"]["text"]) for g in chat.got)

            until(lambda: "paint succeeded" in told(), "the run succeeds", log)
            until(lambda: "paint planned" in told(), "the plan is made", log)
            # What came last has been taken in too: the rule engine works in turn.
            until(lambda: log.read_text().count("Ansible runner rc") == 5, "all is taken in", log)
        said = told()

    shown = json.loads(place.command("event", "show", "-i", str(path), "--json").stdout)
    lost, slow = (next(s for s in shown if s["run"] == f"event:region-{name}:us-east-1") for name in ("lost", "slow"))
    runs = json.loads(place.command("runs", "-i", str(path), "--json").stdout)
    assert [(r["runbook"], r["state"]) for r in runs] == [("paint", "succeeded")]
    assert place.effects() == ["red"], "four messages, one effect"
    (started,), (proposed,) = lost["decided"], slow["decided"]
    assert (started["action"], started["outcome"], started["run"]) == ("start", "started", runs[0]["run"])
    assert (proposed["action"], proposed["outcome"]) == ("propose", "proposed")
    assert lost["lost"] == {name: [name] for name in sorted(WITNESSES)}

    assert "[high] unit: paint proposed" in said
    assert f"runbook run paint -i {path} --param colour=blue --param coats=2" in said
    assert "--plan " in said
    assert not (tmp_path / "taken-for-a-template").exists()
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p != path)
    assert CANARY.encode() not in kept, "no token is in the journal, the reports, the logs"
    assert OUTER.encode() not in kept
    assert CANARY not in said
    assert b"none of the witnesses" in kept
