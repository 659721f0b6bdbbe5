"""A step that AWX splits into jobs: real ansible-playbooks at the same time, as slices of one job, on one journal.

AWX itself is not here: each job gets the inventory and the variables that AWX would give it (runbooks/docs/awx.md).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbooks import locks, slices
from runbooks.errors import Problem
from runbooks.journal import Journal, Record
from runbooks.lock_stores import JournalStore
from runbooks.locks import Book, Holder, Lost, Process, Wish
from tests.unit.runbook.place import ROOT, Place, make_place

SLICES = ROOT / "tests/unit/runbook/slices"
HOSTS = [f"stone{number}" for number in range(1, 7)]
OF = 3
FAR = Process("ann", "far", "boot/1", 7, "99")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = make_place(tmp_path)
    place.environment |= {
        "RUNBOOK_DEFINITIONS": str(SLICES / "definitions"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    shutil.copy(SLICES / "chisel.py", tmp_path)
    inventory(tmp_path / "all.yml", tmp_path, HOSTS)
    for number in range(OF):  # As AWX does it: every Nth host, by name.
        inventory(tmp_path / f"slice{number}.yml", tmp_path, HOSTS[number::OF])
    assert place.command("generate", "--into", str(tmp_path)).returncode == 0
    begun = job(place, 70, "look", "all.yml", workflow=workflow_of(place))
    output, _ = begun.communicate(timeout=240)
    assert begun.returncode == 0, output
    yield place
    for host in HOSTS:
        (tmp_path / f"go-{host}").touch()


def workflow_of(place: Place) -> int:
    """An id of its own: what is left of a run on this machine is found by the run's id."""
    return zlib.crc32(str(place.directory).encode())


def run_of(place: Place) -> str:
    return f"awx-{workflow_of(place)}"


def inventory(file: Path, directory: Path, hosts: list[str]) -> None:
    # As AWX writes it: all groups, with those of their hosts that the slice has.
    group: dict[str, Any] = {"yard": {"hosts": {host: {} for host in hosts if host == HOSTS[0]}}}
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "environment_name": "slices",
        "place": str(directory),
        "runbook_state": str(directory / "runs"),
    }
    file.write_text(
        yaml.safe_dump({"all": {"hosts": {host: {} for host in hosts}, "vars": variables, "children": group}})
    )


def job(place: Place, number: int, step: str, hosts: str, *, workflow: int, of: int = OF) -> subprocess.Popen[str]:
    """A job as AWX starts it: in a workflow, told its run by the workflow's first job."""
    extra = {"awx_job_id": number, "awx_workflow_job_id": workflow, "runbook_run": run_of(place)}
    if step == "hew":
        extra["runbook_awx"] = {"runbook": "hew", "part": "step", "step": step, "slices": of}
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    words = ["-i", str(place.directory / hosts), "-e", json.dumps(extra), "--tags", step]
    return place.begin(program, *words, str(place.directory / "playbooks/runbooks/hew.yml"))


def sliced(place: Place, *numbers: int, workflow: int = 71) -> list[subprocess.Popen[str]]:
    return [job(place, 72 + n, "hew", f"slice{n}.yml", workflow=workflow) for n in numbers]


def ends(*jobs: subprocess.Popen[str]) -> list[tuple[int, str]]:
    outputs = [each.communicate(timeout=240)[0] for each in jobs]
    return [(each.returncode, output) for each, output in zip(jobs, outputs, strict=True)]


def held(place: Place, *hosts: str) -> None:
    for host in hosts:
        (place.directory / f"hold-{host}").touch()


def let_go(place: Place, *hosts: str) -> None:
    for host in hosts:
        (place.directory / f"go-{host}").touch()


def journal(place: Place) -> Journal:
    return Journal(place.directory / "runs/journal.sqlite", "slices")


def records(place: Place) -> list[Record]:
    found = journal(place)
    try:
        assert found.runs() == [run_of(place)]
        return found.records(run_of(place))
    finally:
        found.close()


def book(place: Place) -> Book:
    found = journal(place)
    try:
        return JournalStore(found).read()[0]
    finally:
        found.close()


def of_step(place: Place, kind: str) -> list[Record]:
    return [record for record in records(place) if record.kind == kind and record.step == "hew"]


def test_slices_at_the_same_time_are_one_step_of_one_run(place: Place) -> None:
    first = HOSTS[:OF]
    held(place, *first)
    jobs = sliced(place, 0, 1, 2)
    for host in first:
        place.wait_for(f"working-{host}")
    holder = book(place).held["environment"]
    assert (holder.share, {p.pid for p in holder.processes}) == ("slices of AWX job 71", {each.pid for each in jobs})
    refused = place.command("resume", run_of(place), "-i", str(place.directory / "all.yml"))
    assert refused.returncode == 3
    assert f"is being worked on by run {run_of(place)}" in refused.stderr
    let_go(place, *first)
    done = ends(*jobs)
    assert [code for code, _ in done] == [0, 0, 0], done
    assert sorted(place.effects()) == HOSTS
    (started,), (finished,) = of_step(place, "step_started"), of_step(place, "step_finished")
    assert started.data["slices"] == {"sliced": "71", "of": OF}
    assert (finished.data["outcome"], finished.data["says"]) == ("ok", "The stones are hewn")
    assert {task["task"]: task["hosts"] for task in finished.data["changed"]} == {"Cut": HOSTS, "Smooth": HOSTS}
    told = slices.parts(records(place), "hew", "71")
    assert {name: (part["outcome"], part["hosts"]) for name, part in told.items()} == {
        str(72 + number): ("ok", HOSTS[number::OF]) for number in range(OF)
    }
    written = [r for r in records(place) if r.step == "hew" and r.kind != "window_checked"]
    assert {r.fence for r in written} == {holder.fence}, "one hold, whoever writes"
    intents = [(r.data["host"], r.data["task"]) for r in of_step(place, "effect_intended")]
    assert sorted(intents) == sorted((host, task) for host in HOSTS for task in ("Cut", "Smooth"))
    parked = book(place).held["environment"]
    assert (parked.run, parked.ends) == (run_of(place), None)
    assert [code for code, _ in ends(job(place, 80, "lay", "all.yml", workflow=workflow_of(place)))] == [0]
    assert records(place)[-1].data["state"] == "succeeded"
    assert book(place).held == {}


def test_slices_one_after_the_other_are_one_step_too(place: Place) -> None:
    """AWX starts them when there is room; nobody has to be at work for the next one to come."""
    for number in range(OF):
        assert of_step(place, "step_finished") == []
        ((code, output),) = ends(*sliced(place, number))
        assert code == 0, output
        assert records(place)[-1].data["state"] == "waiting"
    assert len(of_step(place, "step_started")) == 1
    assert [r.data["outcome"] for r in of_step(place, "step_finished")] == ["ok"]
    assert sorted(place.effects()) == HOSTS


def test_failed_slice_stops_no_other_and_is_in_the_record(place: Place) -> None:
    held(place, "stone1")
    (place.directory / "hard-stone2").touch()
    (place.directory / "cracked-stone6").touch()
    slow, failing, refused = sliced(place, 0, 1, 2)
    place.wait_for("working-stone1")
    ((code, output),) = ends(failing)
    assert code == 1
    assert re.search(
        "error: This slice of hew failed: stone2: Cut: .*non-zero return code. The other slices go on", output
    )
    ((code, output),) = ends(refused)
    assert code == 1
    assert "stone6 is cracked" in output
    assert slow.poll() is None
    assert of_step(place, "step_finished") == []
    let_go(place, "stone1")
    ((code, _),) = ends(slow)
    assert code == 1, "the last one tells how the step ended"
    (finished,) = of_step(place, "step_finished")
    assert finished.data["outcome"] == "failed"
    causes = " ".join(failure["message"] for failure in finished.data["failures"])
    assert "non-zero return code" in causes
    assert "stone6 is cracked" in causes
    done = {r.data["host"] for r in of_step(place, "effect_done") if r.data["task"] == "Smooth"}
    assert done == {"stone1", "stone4", "stone5"}, "what the others did has gone on to its end"
    assert records(place)[-1].data["state"] == "failed"
    assert book(place).held == {}
    # The whole sliced job is launched once more: an attempt of its own.
    for name in ("hard-stone2", "cracked-stone6"):
        (place.directory / name).unlink()
    assert [code for code, _ in ends(*sliced(place, 0, 1, 2, workflow=90))] == [0, 0, 0]
    assert [r.data["outcome"] for r in of_step(place, "step_finished")] == ["failed", "ok"]


def test_killed_slice_leaves_a_step_that_can_be_resumed(place: Place) -> None:
    """The first one is killed, which took the lock: the others hold it on."""
    held(place, "stone1", "stone2")
    (killed,) = sliced(place, 0)
    place.wait_for("working-stone1")
    (other,) = sliced(place, 1)
    place.wait_for("working-stone2")
    killed.kill()
    killed.wait()
    refused = place.command("resume", run_of(place), "-i", str(place.directory / "all.yml"))
    assert refused.returncode == 3, "another slice is at work"
    let_go(place, "stone1", "stone2")
    assert [code for code, _ in ends(other)] == [0]
    ((code, output),) = ends(*sliced(place, 2))
    assert code == 0, output
    assert of_step(place, "step_finished") == []
    last = records(place)[-1].data
    assert (last["state"], last["reason"]) == (
        "interrupted",
        "Hew them: 2 of 3 slices have ended, AWX job 72 without a word",
    )
    assert ("stone1", "Cut") not in [(r.data["host"], r.data["task"]) for r in of_step(place, "effect_done")]
    resumed = place.command("resume", run_of(place), "-i", str(place.directory / "all.yml"))
    assert resumed.returncode == 0, resumed.stderr
    assert records(place)[-1].data["state"] == "succeeded"
    assert {r.data["host"] for r in of_step(place, "effect_done") if r.data["task"] == "Smooth"} == set(HOSTS)


def test_lease_that_is_somebody_elses_stops_every_slice_at_its_next_intent(place: Place) -> None:
    held(place, "stone1", "stone2")
    jobs = sliced(place, 0, 1)
    for host in ("stone1", "stone2"):
        place.wait_for(f"working-{host}")
    found = journal(place)
    try:

        def over(book: Book, _: float) -> tuple[Book, int]:
            fence = book.fence + 1
            taken = Holder(run_of(place), "hew", FAR, 1e9, 1e11, fence)
            return Book(fence, {"environment": taken}), fence

        fence = JournalStore(found).change(over)
        found.take_over(run_of(place), {"left_out": []}, fence=fence)
    finally:
        found.close()
    let_go(place, "stone1", "stone2")
    for code, output in ends(*jobs):
        assert code != 0
        assert "another process has taken" in output or "taken over by another process" in output, output
    assert not list(place.directory.glob("smooth-*")), "no further effect"
    late = [r for r in records(place) if r.fence is not None and r.fence < fence]
    assert max(r.seq for r in late) < next(r.seq for r in records(place) if r.fence == fence)
    assert book(place).held["environment"].process == FAR, "what is somebody else's stays so"


# -- without an Ansible


AWX = {"runbook_awx": {"slices": 4}}


@pytest.mark.parametrize(
    ("extra", "told", "workflow", "expected"),
    [
        (AWX, "awx-5", "6", slices.Slice("6", "7", 4)),
        ({}, "awx-5", "6", None),
        ({"runbook_awx": {"slices": 1}}, "awx-5", "6", None),
        # With one host AWX makes a plain job of the runbook's own workflow.
        (AWX, "awx-6", "6", None),
    ],
)
def test_which_job_is_a_slice(extra: dict[str, Any], told: str, workflow: str, expected: Any) -> None:
    assert slices.of_job(extra, told, workflow, "7") == expected


@pytest.mark.parametrize(("told", "workflow"), [("awx-5", ""), ("", "6")])
def test_slice_by_itself_is_refused(told: str, workflow: str) -> None:
    """Relaunched alone, AWX does not tell which sliced job it was of; launched by itself, it has no run."""
    with pytest.raises(Problem, match="one slice of 4 by itself") as caught:
        slices.of_job(AWX, told, workflow, "7")
    assert caught.value.next_command == f"runbook resume {told or 'RUN'}"


def test_the_worst_outcome_is_the_steps() -> None:
    def part(outcome: str, **more: Any) -> dict[str, Any]:
        return {"outcome": outcome, "outputs": {}, "says": "", "changed": [], "failures": [], **more}

    whole = slices.together(
        [
            part("ok", outputs={"a": 1}, says="one", changed=[{"task": "t", "hosts": ["b"]}]),
            part("timed out", failures=[{"host": "h", "task": "t", "message": "late"}]),
            part("failed", outputs={"b": 2}, changed=[{"task": "t", "hosts": ["a"]}]),
        ]
    )
    assert (whole.outcome, whole.outputs, whole.says) == ("timed out", {"a": 1, "b": 2}, "one")
    assert whole.changed == [{"task": "t", "hosts": ["a", "b"]}]
    assert whole.text() == "h: t: late"


def process(number: int) -> Process:
    return Process("ann", f"pod{number}", "boot/1", number, "9")


def wish(number: int, share: str = "s", run: str = "r") -> Wish:
    return Wish("unit", ("environment",), run, "hew", process(number), 60.0, resuming=True, share=share)


def test_only_the_same_runs_same_slices_join() -> None:
    held, fence = locks.take(Book(4), wish(1), 100.0, ())
    joined = locks.join(held, wish(2), 130.0, ())
    assert joined is not None
    after, same = joined
    assert (same, after.fence, after.held["environment"].ends) == (fence, fence, 190.0)
    assert after.held["environment"].processes == (process(1), process(2))
    assert Book.of(json.loads(json.dumps(after.document()))) == after
    assert locks.join(after, wish(2), 131.0, ()) == (
        locks.renew(after, fence, 131.0, 60.0),
        fence,
    ), "an answer that was lost on the way"
    for other in (wish(3, share="t"), wish(3, share=""), wish(3, run="q")):
        assert locks.join(held, other, 130.0, ()) is None
    assert locks.join(held, wish(2), 160.0, ()) is None, "its lease has ended: it is taken over"
    assert locks.join(held, wish(2), 130.0, {fence}) is None
    assert locks.join(locks.park(held, fence), wish(2), 130.0, ()) is None


def test_the_last_one_to_leave_parks_and_nobody_unparks() -> None:
    held, fence = locks.take(Book(), wish(1), 100.0, ())
    joined = locks.join(held, wish(2), 100.0, ())
    assert joined is not None
    both = joined[0]
    one, last = locks.leave(both, fence, process(1), ())
    assert (last, one.held["environment"].processes) == (False, (process(2),))
    none, last = locks.leave(one, fence, process(2), ())
    assert (last, none.held["environment"].ends) == (True, None)
    assert locks.renew(none, fence, 120.0, 60.0) == none
    dead, last = locks.leave(both, fence, process(1), {process(2)})
    assert (last, dead.held["environment"].ends) == (True, None)
    assert locks.leave(both, fence + 1, process(1), ()) == (both, False)
    with pytest.raises(Lost):
        locks.renew(locks.release(both, fence), fence, 120.0, 60.0)


def test_many_at_once_share_one_fence_and_one_of_them_is_the_last(tmp_path: Path) -> None:
    """Threads with connections of their own, as processes elsewhere have them."""
    count, fences, lasts = 16, [], []
    barrier = threading.Barrier(count)

    def slice_(number: int) -> None:
        own = Journal(tmp_path, "unit")
        store = JournalStore(own)
        barrier.wait()
        fence = locks.acquire(store, wish(number), lambda _: True)
        fences.append(fence)
        barrier.wait()
        lasts.append(store.change(lambda book, _: locks.leave(book, fence, process(number), ())))
        own.close()

    threads = [threading.Thread(target=slice_, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert fences == [1] * count
    assert sorted(lasts) == [False] * (count - 1) + [True]


def test_of_several_processes_the_first_writes_a_record(tmp_path: Path) -> None:
    both = [Journal(tmp_path, "unit") for _ in range(2)]
    both[0].begin("r", {"runbook": "hew"}, fence=1)
    both[1].attach("r", 1)
    for each in both:
        each.append("step_started", "hew", {"budget_s": 1}, once="r/hew/71")
    assert [r.kind for r in both[0].records("r")] == ["run_started", "step_started"]
    for each in both:
        each.close()


def test_a_holder_lives_as_long_as_one_of_its_processes() -> None:
    me = Process.current()
    ended = replace(me, pid=2**22 + 1)
    assert Holder("r", "hew", ended, 0.0, 1.0, 1).gone()
    assert not Holder("r", "hew", ended, 0.0, 1.0, 1, "s", (me,)).gone()
