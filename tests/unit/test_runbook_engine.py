"""The engine as a person meets it: runs, failures, kills, signals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runbooks.session import signals
from runbooks.step import leftovers
from tests.unit.runbook.place import INVENTORY, ROOT, Place, make_place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def test_list_starts_fast_and_without_ansible(place: Place) -> None:
    """Processor time, because other work on the machine must not decide."""
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Paint the shed" in place.process("list").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.2
    code = "import sys, runbooks.cli as c; c.main(['list']); print(sorted(m for m in sys.modules if m == 'ansible'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=place.environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


def test_run_passes_outputs_on_and_reports(place: Place) -> None:
    done = place.run("--coats", "2", "--param", "colour=blue")
    assert done.returncode == 0, done.stderr
    assert (place.directory / "here2").read_text() == "blue 2\n"
    assert "The shed is blue, after blue" in done.stderr
    status = place.status()
    assert status["state"] == "succeeded"
    assert [s["outcome"] for s in status["steps"].values()] == ["ok", "ok", "ok"]
    report = json.loads((place.directory / "runs" / status["run"] / "report.json").read_text())
    assert report["figures"]["rto_s"] is None
    changed = [c for s in report["steps"] for c in s["changed"]]
    assert {"task": "Put the paint on", "hosts": ["here1", "here2"]} in changed
    assert "<!doctype html>" in Path(report["paths"]["html"]).read_text()
    assert not list((place.directory / "state").rglob("step-*")), "nothing of a step stays"


def test_host_that_may_be_missing_is_left_out(place: Place) -> None:
    text = INVENTORY.read_text().replace(
        "    here2:\n", "    here2:\n    gone: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}\n"
    )
    path = place.directory / "inventory.yml"
    path.write_text(text)
    done = place.command("run", "rollcall", "-i", str(path), "--yes")
    assert done.returncode == 0, done.stderr
    assert "Left out, because they do not answer: gone" in done.stderr
    assert "here1, here2 and localhost are here without gone" in done.stderr


def test_default_is_observed(place: Place) -> None:
    done = place.run(runbook="observed")
    assert done.returncode == 0, done.stderr
    assert place.status()["parameters"] == {"colour": "blue"}


def test_failed_step_tells_which_host_and_why_and_resume_goes_on_there(place: Place) -> None:
    done = place.run("--fail-at", "paint")
    assert done.returncode == 1
    assert "here2 - Spill the paint: The bucket of here2 has a hole" in done.stderr
    assert "here1 - Keep a secret: the details are secret (no_log)" in done.stderr
    assert "canary-4711" not in done.stderr + done.stdout
    status = place.status()
    assert done.stderr.strip().splitlines()[-1].endswith(f"next: runbook resume {status['run']}")
    assert status["steps"]["admire"]["attempts"] == 0
    again = place.command("resume", status["run"])
    assert again.returncode == 1
    state = place.status()
    assert (state["steps"]["look"]["attempts"], state["steps"]["paint"]["attempts"], state["resumed"]) == (1, 2, 1)
    assert place.effects() == ["red"], "the second attempt found the work of the first"
    assert b"canary-4711" not in place.everything()


def test_killed_run_refuses_others_and_resumes_without_a_second_effect(place: Place) -> None:
    engine = place.start("--slow", "30")
    place.wait_for("effects")
    run = place.status()["run"]

    second = place.run()
    assert second.returncode == 3
    assert f"being worked on by run {run}" in second.stderr
    assert str(engine.pid) in second.stderr

    assert leftovers(run)
    engine.kill()
    engine.wait()
    deadline = time.monotonic() + 10
    while leftovers(run):
        assert time.monotonic() < deadline, "the playbook went on without its engine"
        time.sleep(0.05)
    assert place.command("status").stdout.splitlines()[0].endswith("dead")
    assert list((place.directory / "state").rglob("step-*")), "the killed engine's files are still there"
    third = place.run()
    assert not list((place.directory / "state").rglob("step-*"))
    assert third.returncode == 3
    assert third.stderr.strip().endswith(f"next: runbook resume {run}")

    (place.directory / "dry").touch()
    resumed = place.command("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert place.effects() == ["red"]
    status = place.status()
    assert (status["run"], status["state"]) == (run, "succeeded")
    assert [s["attempts"] for s in status["steps"].values()] == [1, 2, 1]
    assert leftovers(run) == []
    assert place.command("resume", run).returncode == 0
    assert place.effects() == ["red"]


def test_signal_interrupts_and_says_how_to_go_on(place: Place) -> None:
    engine = place.start("--slow", "60")
    place.wait_for("effects")
    began = time.monotonic()
    engine.send_signal(signal.SIGINT)
    output, _ = engine.communicate(timeout=20)
    assert engine.returncode == 130, output
    assert time.monotonic() - began < 8
    status = place.status()
    assert (status["state"], status["steps"]["paint"]["outcome"]) == ("interrupted", "interrupted")
    assert f"next: runbook resume {status['run']}" in output
    assert "SIGINT" in output
    assert leftovers(status["run"]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_a_program_are_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.asked == number.name
    assert signal.getsignal(number) is before


def test_gate_refuses_with_its_own_exit_code_and_a_superseded_run_is_not_resumed(place: Place) -> None:
    for _ in range(2):
        done = place.run("--fail-at", "look")
        assert done.returncode == 3
        assert "It rains: wait until it is dry" in done.stderr
    assert not (place.directory / "effects").exists()
    runs = json.loads(place.command("runs", "--json").stdout)
    assert [r["state"] for r in runs] == ["refused", "refused"]
    done = place.command("resume", runs[0]["run"])
    assert done.returncode == 3
    assert f"superseded by {runs[1]['run']}" in done.stderr


def test_programs_that_the_tests_need() -> None:
    assert shutil.which("ssh"), "the preflight asks nodes over ssh"
