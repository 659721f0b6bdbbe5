"""The three doors of one runbook: the same journal, the same refusals, nothing secret, and a way on after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runbooks import door, effects
from runbooks.errors import Problem
from runbooks.journal import Journal, Record
from runbooks.locks import pid_start
from tests.unit.runbook.place import ROOT, Place, make_place

DOORS = ROOT / "tests/unit/runbook/doors"
INVENTORY = DOORS / "inventory.yml"
CANARIES = {"parameter": b"pin-canary-4711", "vault": b"vaulted-canary", "no_log": b"hidden-canary"}
PLAYBOOK = "playbooks/runbooks/etch.yml"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    password = tmp_path / "vault-password"
    password.write_text("vault-word\n")
    place.environment |= {
        "RUNBOOK_DEFINITIONS": str(DOORS / "definitions"),
        "RUNBOOK_TEST_WITNESS": str(DOORS / "witness.py"),
        "RUNBOOK_PARAM_PIN": CANARIES["parameter"].decode(),
        "ANSIBLE_VAULT_PASSWORD_FILE": str(password),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    assert place.command("generate", "--into", str(tmp_path)).returncode == 0
    return place


def ansible(place: Place, *words: str, **variables: str) -> list[str]:
    extra = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    return [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(INVENTORY), *extra, *words]


def plain(place: Place, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As a person without the command line does it."""
    return subprocess.run(
        ansible(place, *words, str(place.directory / PLAYBOOK), **variables),
        cwd=ROOT,
        env=place.environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )


def command(place: Place, *words: str, **_: str) -> subprocess.CompletedProcess[str]:
    return place.process("run", "etch", "-i", str(INVENTORY), "--yes", *words)


def awx(place: Place, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As AWX does it: a job a step, until one fails; its variables are AWX's."""
    for number, step in enumerate(("look", "etch", "polish")):
        job = {"awx_job_id": str(70 + number), "awx_workflow_job_id": "69"}
        done = plain(place, "--tags", step, *words, **job, **variables)
        if done.returncode != 0:
            break
    return done


Opened = Callable[..., subprocess.CompletedProcess[str]]


def journal(place: Place) -> Journal:
    return Journal(place.directory / "runs/journal.sqlite", "doors")


def records(place: Place) -> list[Record]:
    with_all = journal(place)
    try:
        (run,) = with_all.runs()
        return with_all.records(run)
    finally:
        with_all.close()


def shape(found: list[Record]) -> list[tuple[Any, ...]]:
    """What the doors must have in common: kinds, steps, outcomes, outputs; hosts that worked side by side in any order.

    Where an AWX job ends and the next goes on is that door's own.
    """
    rows: list[tuple[Any, ...]] = []
    pieces: list[tuple[Any, ...]] = []
    for record in found:
        data = record.data
        if record.kind == "run_resumed" or (record.kind == "run_finished" and data["state"] == "waiting"):
            continue
        kept = {k: v for k, v in data.items() if k in ("outcome", "outputs", "says", "state", "parameters", "steps")}
        if "gate" in data:
            kept["gate"] = {k: data["gate"][k] for k in ("when", "title", "outcome")}
        if record.kind.startswith("effect_"):
            kept = {k: v for k, v in data.items() if k in ("task", "host", "action", "changed", "failed", "skipped")}
            pieces.append((record.kind, record.step, json.dumps(kept, sort_keys=True)))
            continue
        rows += sorted(pieces)
        pieces = []
        failures = sorted((f["host"], f["task"], f["message"]) for f in data.get("failures", []))
        rows.append((record.kind, record.step, json.dumps(kept, sort_keys=True), failures))
    return rows + sorted(pieces)


def leaks(place: Place) -> list[str]:
    """Canaries in what is kept for good (the test's own effect is where they belong)."""
    kept = b"".join(p.read_bytes() for d in ("runs", "state") for p in (place.directory / d).rglob("*") if p.is_file())
    return [name for name, word in CANARIES.items() if word in kept]


def opened(place: Place, directory: Path, way: Opened, code: int, **environment: str) -> list[Record]:
    """The records of one run by this door in a place of its own, which has kept no secret."""
    own = Place(directory, {**place.environment, **environment})
    own.environment |= {"RUNBOOK_TEST_PLACE": str(directory), "XDG_STATE_HOME": str(directory / "state")}
    (directory / "playbooks").symlink_to(place.directory / "playbooks")
    done = way(own)
    assert done.returncode == code, done.stdout + done.stderr
    assert leaks(own) == []
    assert not any(word.decode() in done.stderr for word in CANARIES.values())
    effects = (directory / "effects").read_text().splitlines()
    assert sorted(effects) == ["here1 intended", "here2 intended"], "the intent is there before the effect"
    return records(own)


def test_the_same_journal_comes_out_of_the_three_doors(tmp_path_factory: pytest.TempPathFactory, place: Place) -> None:
    found = {
        name: opened(place, tmp_path_factory.mktemp(name), way, 0)
        for name, way in (("runbook", command), ("ansible-playbook", plain), ("awx", awx))
    }
    for name, of_door in found.items():
        assert {record.door for record in of_door} == {name}
    assert {record.run for record in found["awx"]} == {"awx-69"}
    assert shape(found["ansible-playbook"]) == shape(found["runbook"])
    assert shape(found["awx"]) == shape(found["runbook"])


def test_the_same_journal_of_a_failure_comes_out_of_two_doors(
    tmp_path_factory: pytest.TempPathFactory, place: Place
) -> None:
    found = [
        opened(place, tmp_path_factory.mktemp("failing"), way, 1, RUNBOOK_TEST_BREAK="yes") for way in (command, plain)
    ]
    assert shape(found[0]) == shape(found[1])
    assert found[0][-1].data["reason"] == "Polish it: here1: Break it: here1 broke at *** beside ***"


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one error, without what differs by the hour."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return re.sub(r"\d{8}-\d{6}-etch-[0-9a-f]{4}", "RUN", line)


def test_a_gate_says_no_by_every_door_alike(place: Place) -> None:
    place.environment["RUNBOOK_TEST_NIGHT"] = "yes"
    said = []
    for way in (command, plain):
        done = way(place)
        assert done.returncode == 3, done.stdout + done.stderr
        said.append(sentence(done))
    assert said[0] == said[1]
    assert "It is night (the pin is ***, the vault holds ***)" in said[0]
    assert leaks(place) == []


def test_bad_input_ends_before_the_first_task(place: Place) -> None:
    done = plain(place, deep="12")
    assert done.returncode == 2
    assert sentence(done) == (
        "error: Parameter deep of runbook etch must be a whole number from 1 to 9, not '12'. Nothing was touched. "
        "next: runbook show etch"
    )
    assert "PLAY [" not in done.stdout
    assert not (place.directory / "effects").exists()


# -- what is told without an Ansible


def play(**variables: str) -> Any:
    return SimpleNamespace(vars=variables, hosts="all")


PLAYS = [play(runbook_name="etch"), *(play(runbook_step=s) for s in ("look", "etch", "polish"))]
PLAYS.insert(2, play(runbook_step="etch", runbook_gate="before.0"))


def call(**more: Any) -> door.Call:
    told: dict[str, Any] = {"inventories": [str(INVENTORY)], "plays": PLAYS, "extra": {}}
    return door.Call(**{"playbook": Path("etch.yml"), **told, **more})


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNBOOK_DEFINITIONS", str(DOORS / "definitions"))


AWX = {"awx_job_id": 7, "awx_workflow_job_id": 6}
ENTRIES: dict[str, tuple[dict[str, Any], list[str], list[str], str, bool]] = {
    "all of it": (
        {},
        ["look", "etch", "polish"],
        ["look", "etch.before.0", "etch", "polish"],
        r"\d{8}-.*-etch-",
        False,
    ),
    "by tags": ({"tags": ["etch"]}, ["etch"], ["etch.before.0", "etch"], r"\d{8}-", False),
    "without": ({"skip_tags": ["etch"]}, ["look", "polish"], ["look", "polish"], r"\d{8}-", False),
    "an AWX job": ({"extra": {"awx_job_id": 7}, "tags": ["look"]}, ["look"], ["look"], "awx-7$", False),
    "a job of an AWX workflow": (
        {"extra": AWX, "tags": ["etch"]},
        ["look", "etch", "polish"],
        ["etch.before.0", "etch"],
        "awx-6$",
        True,
    ),
    "a job that was told its run": (
        {"extra": {**AWX, "runbook_run": "awx-5"}, "tags": ["polish"]},
        ["look", "etch", "polish"],
        ["polish"],
        "awx-5$",
        True,
    ),
    "a step's own file": (
        {"playbook": DOORS / "steps/polish.yml", "plays": [play(), play()]},
        ["polish"],
        ["polish"],
        r"\d{8}-",
        False,
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
@pytest.mark.usefixtures("definitions")
def test_what_is_called_is_which_part_of_which_runbook(case: str) -> None:
    more, steps, units, run, alone = ENTRIES[case]
    entry = door.entry(call(**more))
    assert entry is not None
    assert [step.id for step in entry.definition.steps] == steps
    assert (entry.units, entry.alone) == (units, alone)
    assert re.match(run, entry.run), entry.run


@pytest.mark.usefixtures("definitions")
def test_a_playbook_that_is_no_runbook_is_none() -> None:
    assert door.entry(call(playbook=ROOT / "playbooks/site.yml", plays=[play()])) is None
    in_check_mode = call(playbook=DOORS / "steps/polish.yml", plays=[play()], check=True)
    assert door.entry(in_check_mode) is None, "plans run steps in check mode"


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a step that is none": (
        {"tags": ["paint"]},
        "The tags paint name no step of runbook etch, it has: look, etch, polish",
    ),
    "tasks left out": ({"odd": "--start-at-task"}, "--start-at-task would leave tasks of runbook etch out"),
    "another runbook's step": (
        {"playbook": DOORS / "steps/look.yml", "plays": [play()], "extra": {"runbook": "paint"}},
        "The playbook look.yml is a step of the runbooks etch, and not of paint",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.usefixtures("definitions")
def test_what_cannot_be_a_run_is_refused(case: str) -> None:
    more, expected = FAULTS[case]
    with pytest.raises(Problem) as caught:
        door.entry(call(**more))
    assert expected in caught.value.what


def test_a_step_of_several_runbooks_asks_for_which() -> None:
    step = {"playbook": ROOT / "runbooks/steps/promote.yml", "plays": [play()]}
    with pytest.raises(Problem, match="of the runbooks fail-back, fail-over, and it is not said for which"):
        door.entry(call(**step))
    entry = door.entry(call(**step, extra={"runbook": "fail-over"}))
    assert entry is not None
    assert entry.definition.name == "fail-over"


@pytest.mark.usefixtures("definitions")
def test_two_inventories_are_no_environment(capsys: pytest.CaptureFixture[str]) -> None:
    asked = call(inventories=["a", "b"])
    entry = door.entry(asked)
    assert entry is not None
    with pytest.raises(SystemExit) as ended:
        door.Door(asked, entry, print).open()
    assert ended.value.code == 2
    assert "takes one inventory for it, not a and b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "changed_when", "looks"),
    [
        ("ansible.builtin.assert", [], True),
        ("ansible.builtin.stat", [], True),
        ("amazon.aws.route53_info", [], True),
        ("ansible.builtin.command", [False], True),
        ("ansible.builtin.command", [], False),
        ("ansible.builtin.copy", [], False),
        ("censuschat.infra.write_lease", [], False),
        ("debug", [], True),
    ],
)
def test_tasks_that_only_look_intend_nothing(action: str, changed_when: list[Any], looks: bool) -> None:
    assert effects.looks_only(action, changed_when) is looks


def test_a_diff_is_counted_and_never_kept() -> None:
    diff = {"before": "a\nb\n", "after": "a\nsecret\nmore\n", "after_header": "/etc/pin-4711"}
    result = {"changed": True, "diff": [diff], "invocation": {"module_args": {"password": "secret"}}}
    assert effects.differences(result, ["4711"]) == [{"what": "/etc/pin-********", "added": 2, "removed": 1}]
    assert effects.differences({"changed": True, "censored": "no_log"}, []) == [{"what": "********"}]
    items = {"changed": True, "results": [{"diff": diff}, {"censored": "no_log"}]}
    assert [d["what"] for d in effects.differences(items, [])] == ["/etc/pin-4711", "********"]


# -- a run at work


class Worker(multiprocessing.get_context("fork").Process):  # type: ignore[misc]
    """As Ansible's: a fork that works for some seconds and ends with an exit code."""

    def __init__(self, seconds: float, code: int = 0) -> None:
        super().__init__()
        self._work = seconds, code

    def run(self) -> None:
        seconds, code = self._work
        time.sleep(seconds)
        os._exit(code)


def waited_for(worker: Worker) -> None:
    """Its end is left for Ansible to ask for."""
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


join, terminate, kill, close = map(methodcaller, ("join", "terminate", "kill", "close"))


@pytest.mark.parametrize(
    ("seconds", "code", "ends", "said"),
    [
        (0.2, 0, [join], ""),
        (0.2, 0, [waited_for], ""),
        (0.2, 3, [join], "ended with exit code 3"),
        (0.2, 3, [waited_for], "ended with exit code 3"),
        (60, 0, [terminate, join], ""),
        (60, 0, [kill, waited_for], "was killed (SIGKILL)"),
        (60, 0, [kill, join, close], "was killed (SIGKILL)"),
        (60, 0, [lambda worker: os.kill(worker.pid, signal.SIGTERM), waited_for], "was killed (SIGTERM)"),
    ],
)
def test_which_end_of_a_worker_ends_the_playbook(
    seconds: float, code: int, ends: list[Callable[[Worker], object]], said: str
) -> None:
    """Ansible terminates workers itself at the end of each play, and closes the dead ones whose place it needs."""

    class Followed(Worker):
        pass

    workers = effects.Workers(Followed)
    worker = Followed(seconds, code)
    worker.start()
    assert workers.died() == "", "it lives"
    for end in ends:
        end(worker)
    assert [workers.died(), workers.died()] == [said, ""]
    if waited_for in ends:
        worker.join()
        assert worker.exitcode in (code, -signal.SIGKILL, -signal.SIGTERM), "Ansible could still ask"


@pytest.fixture
def slow(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A plain run whose worker is at work in its second step, until the test lets it go."""
    process = place.begin(*ansible(place, str(place.directory / PLAYBOOK)), RUNBOOK_TEST_SLOW="60")
    place.wait_for("working")
    (place.directory / "go").touch()
    yield process
    process.kill()
    process.wait()


def at_work(place: Place) -> tuple[int, int]:
    """The effect that is at work, and the module's process that started it."""
    pid, parent = map(int, (place.directory / "working").read_text().split())
    return pid, parent


def gone(*pids: int, timeout_s: float = 15) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(pid_start(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_run_at_work_refuses_another_with_the_same_sentence(place: Place, slow: subprocess.Popen[str]) -> None:
    refused = [way(place) for way in (command, plain)]
    assert [done.returncode for done in refused] == [3, 3]
    assert sentence(refused[0]) == sentence(refused[1])
    assert f"process {slow.pid}" in sentence(refused[0])
    assert "PLAY [" not in refused[1].stdout


def test_killed_ansible_playbook_takes_its_workers_along_and_is_resumed(
    place: Place, slow: subprocess.Popen[str]
) -> None:
    pids = at_work(place)
    slow.kill()
    slow.wait()
    assert gone(*pids), "no worker acts beside its successor"
    status = place.command("status", "--json")
    assert json.loads(status.stdout)["shown_state"] == "dead"
    refused = plain(place)
    assert refused.returncode == 3
    assert "next: runbook resume" in sentence(refused)
    resumed = place.process("resume")
    assert resumed.returncode == 0, resumed.stderr
    found = records(place)
    assert found[-1].data["state"] == "succeeded"
    assert [r.door for r in found if r.kind in ("run_started", "run_resumed")] == ["ansible-playbook", "runbook"]
    assert [r.step for r in found if r.kind == "step_started"] == ["look", "etch", "etch", "polish"]


def test_interrupted_run_says_so_and_gives_its_lock_back(place: Place, slow: subprocess.Popen[str]) -> None:
    slow.send_signal(signal.SIGINT)
    output, _ = slow.communicate(timeout=120)
    assert records(place)[-1].data["state"] == "interrupted", output
    assert "next: runbook resume" in output
    environment = journal(place)
    try:
        document, _ = environment.book()
        assert document is not None
        assert document["held"] == {}
    finally:
        environment.close()


def test_killed_worker_leaves_a_run_that_can_be_resumed(place: Place, slow: subprocess.Popen[str]) -> None:
    """Ansible's own worker, which waits for the module: its grandparent is ansible-playbook."""
    chain = [at_work(place)[1]]
    while chain[-1] != slow.pid:
        chain.append(int(Path(f"/proc/{chain[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    os.kill(chain[-2], signal.SIGKILL)
    output, _ = slow.communicate(timeout=120)
    assert slow.returncode != 0
    assert records(place)[-1].data["state"] in ("failed", "interrupted")
    assert "next: runbook resume" in output
    assert gone(at_work(place)[0]), "what the worker had started is ended too"
