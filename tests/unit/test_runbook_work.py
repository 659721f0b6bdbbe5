"""What a run does beside its playbooks: gates, windows, approvals, emergencies, undoing, secrets, locks that are lost.

The playbooks are scripted here: a step's process says what the test tells it to say. Real ones are in
test_runbook_engine.py.
"""

from __future__ import annotations

import getpass
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbooks import definition as definitions
from runbooks import engine, keys, outlook
from runbooks.approvals import Approval, Subject, statement
from runbooks.cli import main
from runbooks.definition import Step
from runbooks.errors import Problem, Refused
from runbooks.journal import Journal
from runbooks.lock_stores import JournalStore
from runbooks.locks import Lease
from runbooks.progress import JsonProgress, Progress
from runbooks.request import prepare
from runbooks.session import Order, Stop
from runbooks.step import Activity, Result
from tests.unit.runbook.workshop import DEFINITION, FAILURE, Killed, Workshop, fails, make_workshop


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return make_workshop(tmp_path, monkeypatch)


# -- gates


def test_gates_stand_before_and_after_their_step(shop: Workshop) -> None:
    ended = shop.run()
    assert (ended.code, ended.state.state) == (0, "succeeded")
    assert shop.names() == ["wood", "saw", "nail", "holds", "paint"]
    assert [e["RUNBOOK_STEP"] for _, _, e in shop.played] == ["saw.before.0", "saw", "nail", "nail.after.0", "paint"]
    assert {e["RUNBOOK_FENCE"] for _, _, e in shop.played} == {"1"}
    assert shop.holder() is None


def test_a_gate_before_a_step_refuses_and_names_what_blocks(shop: Workshop) -> None:
    shop.scripts["wood"] = fails
    ended = shop.run()
    assert (ended.code, ended.state.state) == (3, "refused")
    assert ended.state.reason == "Saw the plank: gate 'There is wood': here: Do it: no luck"
    assert shop.names() == ["wood"]
    assert ended.state.steps["saw"].attempts == 0
    gate = shop.records("note")[0].data["gate"]
    assert (gate["when"], gate["outcome"]) == ("before", "failed")
    del shop.scripts["wood"]
    assert shop.resume().code == 0


def test_a_gate_after_a_step_fails_it(shop: Workshop) -> None:
    shop.scripts["holds"] = fails
    ended = shop.run()
    assert (ended.code, ended.state.state, ended.state.steps["nail"].outcome) == (1, "failed", "failed")
    assert "gate 'It holds': Do it: no luck" in ended.state.reason
    assert "paint" not in shop.names()


# -- taking back


def test_undo_takes_back_the_newest_first_and_tells_what_only_a_person_can(shop: Workshop) -> None:
    shop.scripts["paint"] = fails
    assert shop.run().code == 1
    shop.played.clear()
    ended = shop.undo()
    assert (ended.code, ended.state.state) == (0, "undone")
    assert shop.names() == ["strip", "glue"], "also of the step that failed: it may have painted half of it"
    assert ended.state.reason == "left to do by hand: Pull the nails out by hand"
    assert {name: step.undone for name, step in ended.state.steps.items()} == {
        "saw": "ok",
        "nail": "told",
        "paint": "ok",
    }
    assert outlook.radius(ended.state, ended.request.definition) == "Begun and perhaps in part done: nail (the post)"
    with pytest.raises(Refused, match="is over: it was undone"):
        shop.undo()
    with pytest.raises(Refused, match="is over: it was undone"):
        shop.resume()


def test_a_succeeded_run_can_be_undone(shop: Workshop) -> None:
    assert shop.run().code == 0
    assert shop.undo().state.state == "undone"


def test_an_undoing_that_is_killed_in_its_middle_goes_on_there(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shop.run().code == 0

    def killed(_variables: Any, _interrupted: Any) -> Result:
        raise Killed

    shop.scripts["glue"] = killed
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "__exit__", lambda *_: None)
        with pytest.raises(Killed):
            shop.undo()
    del shop.scripts["glue"]
    shop.played.clear()
    gone(shop)
    with pytest.raises(Refused, match="has begun, so it can only be undone") as caught:
        shop.resume()
    assert caught.value.next_command == "runbook undo r1"
    gone(shop)
    ended = shop.undo()
    assert (ended.state.state, shop.names()) == ("undone", ["glue"]), "what was undone already is not undone twice"


def gone(shop: Workshop) -> None:
    """As if the process that holds the lock were one that has ended."""
    journal = shop.journal()

    def change(document: Any, _now: float) -> tuple[Any, None]:
        for holder in document["held"].values():
            holder["process"]["pid_start"] = "1"
        return document, None

    journal.change_book(change)
    journal.close()


def test_a_failing_undo_says_so_and_is_tried_again(shop: Workshop) -> None:
    shop.run()
    shop.scripts["strip"] = fails
    ended = shop.undo()
    assert (ended.code, ended.state.state) == (1, "failed")
    journal = shop.journal()
    problem = outlook.aftermath(journal, ended.state, "failed")
    journal.close()
    assert problem is not None
    assert (problem.code, problem.next_command) == ("undo-unfinished", "runbook undo r1")
    assert "the plank" in problem.touched
    del shop.scripts["strip"]
    assert shop.undo().state.state == "undone"


def test_a_step_can_have_its_failure_undone_at_once(shop: Workshop) -> None:
    steps = [dict(step) for step in DEFINITION["steps"]]
    steps[2]["on_failure"] = "undo"
    shop.define(steps=steps)
    shop.scripts["paint"] = fails
    ended = shop.run()
    assert (ended.code, ended.state.state) == (1, "undone")
    assert shop.names()[-2:] == ["strip", "glue"]
    assert ended.state.reason.startswith("Paint it: here: Do it: no luck; left to do by hand: Pull")
    assert shop.holder() is None


# -- windows, emergencies, approvals

CLOSED = [{"days": ["mon"], "from": "02:00", "to": "02:01", "timezone": "UTC"}]


def closed_now() -> list[dict[str, Any]]:
    """A window that is never open while the test runs."""
    day = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[(time.gmtime().tm_wday + 3) % 7]
    return [{**CLOSED[0], "days": [day]}]


def test_a_step_that_its_window_does_not_hold_is_not_begun(shop: Workshop) -> None:
    shop.variables(runbook_windows=closed_now())
    ended = shop.run()
    assert (ended.code, ended.state.state) == (3, "refused")
    assert "Saw the plank: not begun" in ended.state.reason
    assert shop.played == []
    checked = shop.records("window_checked")[0]
    assert (checked.step, checked.data["open"], checked.data["needs_s"]) == ("saw", False, 10.0)


def test_an_emergency_lifts_windows_and_step_approvals_and_is_in_the_evidence(shop: Workshop) -> None:
    steps = [dict(step) for step in DEFINITION["steps"]]
    steps[1]["approval"] = True
    shop.define(steps=steps)
    shop.variables(runbook_windows=closed_now(), runbook_approvals={"mend": {"need": 1}}, **approver()[0])
    assert shop.run(order=Order(emergency="the goat is out"), run="r1").code == 0
    declared = shop.records("emergency_declared")[0].data
    assert declared["reason"] == "the goat is out"
    assert declared["who"] == getpass.getuser()
    assert 3500 < declared["expires"] - time.time() <= 3600
    assert [r.data["lifted"] for r in shop.records("window_checked")] == [True, True, True]
    assert shop.records("run_started")[0].data["approvals_lifted"] is True
    assert "EMERGENCY until" in shop.told()


def test_an_emergency_expires_and_is_renewed(shop: Workshop) -> None:
    shop.variables(runbook_windows=closed_now(), runbook_emergency_s=0.3)

    def slow(_variables: Any, _interrupted: Any) -> Result:
        time.sleep(0.4)
        return Result("ok")

    shop.scripts["saw"] = slow
    ended = shop.run(order=Order(emergency="the goat is out"))
    assert (ended.code, ended.state.state, shop.names()) == (3, "refused", ["wood", "saw"])
    assert "the emergency is over" in ended.state.reason
    again = shop.resume()
    assert (again.state.state, shop.names()[2:]) == ("refused", []), "without an emergency the window holds"
    assert shop.resume(Order(emergency="it is still out")).code == 0


def approver() -> tuple[dict[str, Any], Any]:
    key = keys.load("ann") if "ann" in keys.names() else keys.create("ann")
    return {"runbook_approvers": {"ann": keys.public(key)}}, key


def test_a_step_waits_for_its_approval_with_its_lock_kept(shop: Workshop) -> None:
    steps = [dict(step) for step in DEFINITION["steps"]]
    steps[1]["approval"] = True
    shop.define(steps=steps)
    trusted, key = approver()
    shop.variables(**trusted)
    ended = shop.run()
    assert (ended.code, ended.state.state, shop.names()) == (4, "waiting", ["wood", "saw"])
    assert shop.holder() == "r1", "what is half done is not for another run"
    with pytest.raises(Refused, match="is kept by run r1") as caught:
        shop.run(run="r2")
    assert caught.value.code == "lock-of-waiting-run"
    journal = shop.journal()
    problem = outlook.aftermath(journal, ended.state, "waiting")
    assert problem is not None
    assert problem.next_command == f"runbook approve r1 -i {shop.inventory} --as NAME"
    assert problem.touched == "Done and kept: saw (the plank)"
    assert shop.resume().state.state == "waiting", "nobody has approved it yet"
    subject, now = Subject("unit", "", "r1", "nail"), round(time.time(), 3)
    signature = keys.sign(key, statement(subject, "ann", now, now + 60))
    approval = Approval(subject, "ann", now, now + 60, keys.public(key), signature)
    journal.record("approval_given", "r1", "nail", approval.document())
    journal.close()
    ended = shop.resume()
    assert (ended.code, ended.state.state, shop.holder()) == (0, "succeeded", None)


def test_a_waiting_run_can_be_given_up(shop: Workshop) -> None:
    steps = [dict(step) for step in DEFINITION["steps"]]
    steps[0]["approval"] = True
    shop.define(steps=steps)
    shop.variables(**approver()[0])
    assert shop.run().code == 4
    assert main(["abort", "r1", "-i", str(shop.inventory), "--reason", "not today"]) == 0
    assert shop.holder() is None
    with pytest.raises(Refused, match=r"was given up \(not today\)"):
        shop.resume()


# -- secrets

SECRET = {**DEFINITION["parameters"], "token": {"title": "The key", "type": "string", "secret": True}}
CANARY = "canary-0815-x"


def test_secrets_reach_the_playbooks_and_nothing_that_is_kept(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.define(parameters=SECRET)

    def leaks(variables: Mapping[str, Any], _: Any) -> Result:
        token = variables["token"]
        return Result(
            "failed",
            {"got": [f"it is {token}"], "token": token},
            f"used {token}",
            [{"task": token, "hosts": ["here"]}],
            [{"host": "here", "task": "Use it", "message": f"{token} is wrong"}],
        )

    shop.scripts["saw"] = leaks
    monkeypatch.setenv("RUNBOOK_PARAM_TOKEN", CANARY)
    ended = shop.run()
    assert ended.code == 1
    assert {v.get("token") for _, v, _ in shop.played} == {CANARY}
    assert ended.state.reason == "Saw the plank: here: Use it: *** is wrong"
    assert ended.state.secrets["token"].startswith("scrypt:")
    kept = b"".join(p.read_bytes() for p in (shop.directory / "runs").rglob("*") if p.is_file())
    assert CANARY.encode() not in kept
    assert CANARY not in shop.told()
    assert CANARY not in json.dumps([e for _, _, e in shop.played])
    monkeypatch.setenv("RUNBOOK_PARAM_TOKEN", "another")
    with pytest.raises(Refused, match="secret parameter token is not the one that run r1 began with") as caught:
        shop.resume()
    assert "another" not in str(caught.value)
    assert "RUNBOOK_PARAM_TOKEN" not in os.environ, "the playbooks' processes would inherit it"
    (shop.directory / "token").write_text(CANARY + "\n")
    del shop.scripts["saw"]
    assert shop.resume(Order(secret_files={"token": shop.directory / "token"})).code == 0


def test_a_secret_is_typed_without_being_shown(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.define(parameters=SECRET)
    asked: list[str] = []

    def typed(prompt: str, _stream: Any) -> str:
        asked.append(prompt)
        return CANARY

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", typed)
    assert shop.run().code == 0
    assert asked == ["The key (token, not shown): "]


# -- locks that are lost, and other machines


def test_who_loses_its_lock_stops_without_another_record(shop: Workshop) -> None:
    def loses(_variables: Any, interrupted: Callable[[], bool]) -> Result:
        journal = shop.journal()
        journal.change_book(lambda document, _: ({**(document or {}), "held": {}}, None))
        journal.close()
        deadline = time.monotonic() + 10
        while not interrupted():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return Result("interrupted")

    shop.variables(runbook_lease_s=1)
    shop.scripts["nail"] = loses
    with pytest.raises(Refused, match="stopped itself: another process has taken its lock") as caught:
        shop.run()
    assert caught.value.code == "lock-lost"
    assert caught.value.touched == "Done and kept: saw (the plank); begun and perhaps in part done: nail (the post)"
    assert shop.records("step_finished")[-1].step == "saw"
    assert shop.records("run_finished") == []


def test_who_cannot_renew_its_lease_ends_its_playbook_and_stops(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(_variables: Any, interrupted: Callable[[], bool]) -> Result:
        def unreachable(*_: Any) -> None:
            raise Problem("The journal does not answer", code="journal-unreachable", next_command="ls")

        monkeypatch.setattr(JournalStore, "change", unreachable)
        deadline = time.monotonic() + 10
        while not interrupted():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return Result("interrupted")

    shop.variables(runbook_lease_s=1.5)
    shop.scripts["nail"] = cut_off
    with pytest.raises(Refused, match="its lease could not be renewed in the journal's database for 1 s") as caught:
        shop.run()
    assert (caught.value.code, caught.value.next_command) == ("lock-lost", "runbook resume r1")
    monkeypatch.undo()
    assert shop.records("step_finished")[-1].step == "saw", "nothing was written without the lease"


def dies(_variables: Any, _interrupted: Any) -> Result:
    raise Killed


def test_another_machine_resumes_once_the_lease_has_ended(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.variables(runbook_lease_s=1.5)
    shop.scripts["nail"] = dies
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "the-first-machine")
        with pytest.raises(Killed):
            shop.run()
    state = shop.journal().state("r1")
    assert (state.state, state.steps["nail"].attempts, state.steps["nail"].outcome) == ("running", 1, None)
    del shop.scripts["nail"]
    began = time.monotonic()
    ended = shop.resume()
    assert (ended.code, ended.state.resumed) == (0, 1)
    assert 0.5 < time.monotonic() - began < 10
    assert "for the lease of run r1 (mend)" in shop.told()
    assert "the-first-machine" in shop.told()
    assert shop.names() == ["wood", "saw", "nail", "nail", "holds", "paint"]
    assert [e["RUNBOOK_FENCE"] for n, _, e in shop.played if n == "nail"] == ["1", "2"]


def test_a_run_that_lives_on_another_machine_is_not_taken_over(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.variables(runbook_lease_s=1.5)

    def meanwhile(_variables: Any, _interrupted: Any) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "the-second-machine")
            with pytest.raises(Refused, match="is being worked on by run r1") as caught:
                shop.resume()
        assert caught.value.code == "lock-held"
        return Result("ok")

    shop.scripts["nail"] = meanwhile
    assert shop.run().code == 0


def test_runs_of_disjoint_resources_go_on_side_by_side(shop: Workshop) -> None:
    shop.define(locks=["fence"])
    (shop.directory / "definitions/mow.yml").write_text(
        yaml.safe_dump({**DEFINITION, "name": "mow", "title": "Mow", "locks": ["lawn"]})
    )

    def meanwhile(_variables: Any, _interrupted: Any) -> Result:
        session = shop.session("r2", Order())
        request = prepare(definitions.load("mow"), shop.inventory, {}, session)
        shop.scripts.pop("nail")
        assert engine.start(request, session).code == 0
        with pytest.raises(Refused, match="fence of environment unit is being worked on by run r1"):
            shop.run(run="r3")
        return Result("ok")

    shop.scripts["nail"] = meanwhile
    assert shop.run().code == 0


def test_a_run_that_another_of_the_same_resource_followed_is_superseded(shop: Workshop) -> None:
    shop.define(locks=["fence"])
    shop.scripts["paint"] = fails
    assert shop.run().code == 1
    assert shop.run(run="r2").code == 1
    with pytest.raises(Refused, match="superseded by r2"):
        shop.resume()
    with pytest.raises(Refused, match="superseded by r2"):
        shop.undo()


# -- what people and machines are told


def test_events_are_lines_of_json(shop: Workshop) -> None:
    shop.scripts["paint"] = fails
    session = shop.session("r1", Order())
    session.progress = JsonProgress(shop.stream)
    engine.start(prepare(definitions.load("mend"), shop.inventory, {}, session), session)
    lines = [json.loads(line) for line in shop.told().splitlines()]
    assert [line["event"] for line in lines] == ["run", *["step_started", "step_finished"] * 3]
    assert lines[-1]["failures"] == FAILURE
    assert (lines[1]["budget_s"], lines[2]["outcome"]) == (10.0, "ok")


def test_a_journal_that_is_lost_in_the_middle_says_what_was_touched(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_variables: Any, _interrupted: Any) -> Result:
        def unreachable(*_: Any) -> None:
            raise Problem("The journal does not answer", code="journal-unreachable", next_command="ls")

        monkeypatch.setattr(Journal, "append", unreachable)
        return Result("ok")

    shop.scripts["nail"] = lost
    with pytest.raises(Problem, match="does not answer") as caught:
        shop.run()
    assert "begun and perhaps in part done: nail (the post)" in str(caught.value)
    assert shop.holder() == "r1", "its lock is for its resumption"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_between_two_steps_ends_the_run(shop: Workshop, number: str) -> None:
    stop = Stop()

    def asked(_variables: Any, _interrupted: Any) -> Result:
        stop.asked = number
        return Result("ok")

    shop.scripts["saw"] = asked
    session = shop.session("r1", Order(), stop)
    ended = engine.start(prepare(definitions.load("mend"), shop.inventory, {}, session), session)
    assert (ended.code, ended.state.state, ended.state.reason) == (130, "interrupted", f"stopped by {number}")


def test_the_blast_radius_counts_the_effects_of_the_step_that_did_not_end(shop: Workshop) -> None:
    def works(_variables: Any, _interrupted: Any) -> Result:
        journal = shop.journal()
        journal.attach("r1", 1)
        for host, done in (("a", True), ("b", True), ("c", False)):
            effect = {"task": "Drive it in", "host": host, "action": "copy"}
            journal.append("effect_intended", "nail", effect)
            if done:
                journal.append("effect_done", "nail", {**effect, "changed": True})
        journal.close()
        return fails()

    shop.scripts["nail"] = works
    ended = shop.run()
    problem = outlook.aftermath(shop.journal(), ended.state, "failed")
    assert problem is not None
    assert problem.touched == (
        "Done and kept: saw (the plank); begun and perhaps in part done: nail (the post: 2 changes recorded, the "
        "outcome of 'Drive it in' on c is not known)"
    )


def test_a_plain_pipe_shows_signs_of_life_and_the_end_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress, step = Progress(stream), Step("saw", "Saw", Path("saw.yml"), 40.0, 400.0, (), gate=False)
    progress.begin(step)
    progress.activity(Activity("Cut", ["here"]))
    for now in (101, 130, 131, 140, 141, 169, 171):
        clock[0] = float(now)
        progress.tick()
    progress.end(step, Result("ok"), 71.0)
    lines = [text.partition(" ")[2] for text in stream.getvalue().splitlines()]
    assert lines == [
        "[1/0] saw: Saw (budget 40.0 s)",
        "[1/0] saw: 30.0 s of its budget of 40.0 s, at: Cut (here)",
        "[1/0] saw: is over its budget of 40.0 s, at: Cut (here)",
        "[1/0] saw: 71.0 s, at: Cut (here)",
        "[1/0] saw: ok after 71.0 s, over its budget of 40.0 s",
    ]
