"""The lab's command line: what it refuses, in one sentence and with exit code 2, before anything is touched."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import background, cli, lock, machine, programs, topology, verbs
from lab.paths import REPO
from lab.programs import command


@pytest.fixture
def no_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a lab, seen by root; running a playbook is an error."""
    monkeypatch.setattr(verbs, "STATE", tmp_path / "state")
    monkeypatch.setattr(verbs, "RECORD", tmp_path / "state" / "lab.json")
    monkeypatch.setattr(verbs, "LOCK", tmp_path / "lock")
    monkeypatch.setattr("os.geteuid", lambda: 0)

    def never(*_: object, **__: object) -> int:
        raise AssertionError("a playbook was run")

    monkeypatch.setattr(verbs, "play", never)
    return tmp_path


def record(inventory: Path) -> None:
    verbs.RECORD.parent.mkdir(parents=True, exist_ok=True)
    verbs.RECORD.write_text(f'{{"inventory": "{inventory}"}}')


@pytest.mark.parametrize(
    "arguments", [["cut", "us-east-1"], ["heal", "us-east-1"], ["restart", "use1-db1"]], ids=lambda a: a[0]
)
def test_without_a_lab_there_is_nothing_to_act_on(
    no_lab: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: no lab is up; start it with: scripts/run lab up\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["cut", "eu-west-1"], "'eu-west-1' is not a region of the lab; there are: us-east-1, us-west-2, witness"),
        (["restart", "use1-db9"], "'use1-db9' is not a node of the lab; there are: use1-app1"),
    ],
    ids=["region", "node"],
)
def test_unknown_names(no_lab: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    record(REPO / "inventories" / "lab")
    assert cli.main(arguments) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith(f"error: {reason}")


def test_two_labs_at_once_are_refused(no_lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(REPO / "inventories" / "lab")
    assert cli.main(["up", "--small"]) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "remove it first with: scripts/run lab down" in said
    assert said.count("\n") == 1


def test_a_machine_that_does_not_fit_is_left_alone(
    no_lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poor = machine.Facts(True, "12", (), 100, 50, (), False)
    monkeypatch.setattr(machine, "observe", lambda _: poor)
    monkeypatch.setattr(verbs, "prepare_programs", lambda: pytest.fail("programs were made for nothing"))
    assert cli.main(["up"]) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "MiB of free memory, there are 100" in said
    assert said.count("\n") == 1
    assert not (no_lab / "state").exists()


@pytest.mark.parametrize(
    ("failure", "code"),
    [(programs.Unprepared, cli.EXIT_BAD_INPUT), (programs.ProgramsError, cli.EXIT_FAILED)],
    ids=["cannot be made here", "failed"],
)
def test_without_the_programs_of_kubernetes_no_lab_is_begun(
    no_lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: type[Exception],
    code: int,
) -> None:
    fit = machine.Facts(True, "12", (), 16000, 50, (), False)
    monkeypatch.setattr(machine, "observe", lambda _: fit)

    def missing(*_: object) -> None:
        raise failure("kubelet of Kubernetes 1.35.4 cannot be built: no Go; install it")

    monkeypatch.setattr(command, "prepare", missing)
    assert cli.main(["up"]) == code
    assert capsys.readouterr().err == "error: kubelet of Kubernetes 1.35.4 cannot be built: no Go; install it\n"
    assert not (no_lab / "state").exists()


def test_a_lab_that_was_begun_while_the_programs_were_made_is_not_taken_over(
    no_lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "observe", lambda _: machine.Facts(True, "12", (), 16000, 50, (), False))
    monkeypatch.setattr(verbs, "prepare_programs", lambda: record(REPO / "inventories" / "lab-small"))
    assert cli.main(["up", "--ha"]) == cli.EXIT_BAD_INPUT
    assert "lab-small is there already; remove it first" in capsys.readouterr().err
    assert verbs.recorded() == REPO / "inventories" / "lab-small"


@pytest.mark.parametrize(
    ("arguments", "inventory"), [([], "lab"), (["--small"], "lab-small"), (["--ha"], "lab-ha")], ids=str
)
def test_each_profile_has_its_inventory(arguments: list[str], inventory: str) -> None:
    profile = cli.parser().parse_args(["up", *arguments]).profile
    assert verbs.INVENTORIES[profile] == REPO / "inventories" / inventory


def test_a_lab_is_small_or_ha(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["up", "--small", "--ha"])
    assert ended.value.code == cli.EXIT_BAD_INPUT
    assert "not allowed with argument --small" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["down"], ["status"], ["cut", "witness"]], ids=lambda a: a[0])
def test_without_root_that_is_said(
    no_lab: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert cli.main(arguments) == cli.EXIT_BAD_INPUT
    assert "needs root" in capsys.readouterr().err


def test_status_of_no_lab(no_lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == cli.EXIT_FAILED
    assert capsys.readouterr().out == "no lab is up\n"


def test_a_second_command_waits_for_the_first_and_then_gives_up(
    no_lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with verbs.LOCK.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(cli.Refusal) as refused, verbs.alone(patience=0.5):
            pytest.fail("the lock was given twice")
        assert time.monotonic() - began >= 0.5
    assert refused.value.code == cli.EXIT_BUSY
    assert "waiting for it to end" in capsys.readouterr().err
    with verbs.alone(patience=0.5) as descriptor:
        assert descriptor > 2


HOLDER = lock.Holder


@pytest.mark.parametrize(
    ("holders", "idle", "expected"),
    [
        pytest.param([HOLDER(1, frozenset({2})), HOLDER(2, frozenset({9}))], {}, {1}, id="no further step is started"),
        pytest.param([HOLDER(2, frozenset({9}))], {}, set(), id="a running step is waited for"),
        pytest.param([HOLDER(2, frozenset())], {2: 0.4}, set(), id="one that has just ended its step is not rushed"),
        pytest.param([HOLDER(2, frozenset())], {2: 1.2}, {2}, id="one that hangs is ended"),
    ],
)
def test_what_is_left_of_a_killed_command(
    holders: list[lock.Holder], idle: dict[int, float], expected: set[int]
) -> None:
    assert lock.doomed({holder.pid: holder for holder in holders}, idle) == expected


KILLED = """
import pathlib, subprocess, sys, time
from lab import lock
with lock.alone(pathlib.Path(sys.argv[1]), 5) as held:
    # As a playbook does: a process that goes on, with a step that takes a second.
    step = "import subprocess, time; subprocess.run(['sleep', '1']); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", step], pass_fds=[held])
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_command_is_taken_once_its_step_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        child = int(owner.stdout.readline())
        # While its owner lives nobody is harmed.
        with pytest.raises(lock.BusyError), lock.alone(tmp_path / "lock", 1.5):
            pytest.fail("the lock was given twice")
        assert background.start_time(child) is not None
        # One that only waits, as this process did, holds nothing.
        with (tmp_path / "lock").open():
            assert set(lock.find_holders(tmp_path / "lock")) == {owner.pid, child}
        owner.kill()
    wait = "import pathlib, sys; from lab import lock\nwith lock.alone(pathlib.Path(sys.argv[1]), 20): print('mine')"
    waiters = [
        subprocess.Popen(
            [sys.executable, "-c", wait, str(tmp_path / "lock")], cwd=REPO, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    # Each gets it in turn, and neither takes the other for a remainder.
    assert [waiter.communicate()[0] for waiter in waiters] == ["mine\n", "mine\n"]
    assert background.start_time(child) is None


def test_a_reader_that_has_seen_enough_is_no_fault_of_the_lab() -> None:
    program = (
        "import sys, lab.cli, lab.verbs; lab.verbs.status = lambda _: print('a table') or 0; "
        "sys.exit(lab.cli.main(['status']))"
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        command = (sys.executable, "-c", program)
        done = subprocess.run(command, cwd=REPO, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (cli.EXIT_FAILED, "")


def test_help_is_fast_and_imports_no_ansible() -> None:
    program = (
        "import sys, lab.cli; lab.cli.parser().format_help(); print('ansible' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_inventory_that_is_recorded_is_the_one_used(no_lab: Path) -> None:
    record(REPO / "inventories" / "lab-small")
    inventory, lab = verbs.current()
    assert inventory.name == "lab-small"
    assert lab == topology.load(REPO / "inventories" / "lab-small")
