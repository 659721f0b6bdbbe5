"""Kills runs of a runbook and resumes them: where they live, who is killed how, and what the servers counted.

Nothing here is known to the engine. A run lives in a place of its own: an inventory that borrows another one's hosts
and variables, with its own journal, locks and operator.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lab.paths import REPO
from tests.faults.logs import Event
from tests.faults.plugins.sweep_killer import children, kill

LEASE_S = 8
"""Seconds of a run's lease in the sweeps: a successor elsewhere waits for its end."""
PLUGINS = REPO / "tests" / "faults" / "plugins"
VICTIMS = ("engine", "runner", "worker", "all", "network")
WEIGHTS = (35, 20, 20, 20, 5)
UNHARMED = "nobody"
STARTED = re.compile(r", run (\S+)")
CGROUP = Path("/sys/fs/cgroup")
CUT = "censuslab-cut"


class SweepError(AssertionError):
    """A run did not come to its end, or could not even be killed; says what was said."""


# -- a place


@dataclass
class Place:
    """An operator's machine as far as a run sees it: inventory, state, keys. ``elsewhere``: of another machine."""

    directory: Path
    inventory: Path
    settings: dict[str, Any]

    @property
    def journal(self) -> Path:
        return self.directory / "runs"

    def environment(self, machine: str = "here") -> dict[str, str]:
        return {
            **os.environ,
            "XDG_STATE_HOME": str(self.directory / machine),
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'collections'}",
        }


@contextlib.contextmanager
def operator(directory: Path) -> Iterator[None]:
    """Let this process and its runs write and judge journals with keys of the sweep's own."""
    before = dict(os.environ)
    os.environ["XDG_CONFIG_HOME"] = str(directory / "config")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def place(directory: Path, base: Path, settings: dict[str, Any]) -> Place:
    """Make an inventory beside links to the base's hosts and variables; settings come on top of them."""
    inventory = directory / "inventories" / "sweep"
    (inventory / "group_vars" / "all").mkdir(parents=True)
    # Variables of the lab name its programs relative to the inventory.
    (directory / "lab").symlink_to(REPO / "lab")
    (inventory / "hosts.yml").symlink_to(base / "hosts.yml")
    for file in (base / "group_vars" / "all").iterdir():
        (inventory / "group_vars" / "all" / file.name).symlink_to(file.resolve())
    own = {"runbook_state": str(directory / "runs"), "runbook_lease_s": LEASE_S, **settings}
    (inventory / "group_vars" / "all" / "zz_sweep.yml").write_text(yaml.safe_dump(own))
    return Place(directory, inventory, own)


# -- a run


class Run:
    """One command of the runbook's, whose output is read as it comes."""

    def __init__(
        self, where: Place, words: Sequence[str], *, machine: str = "here", more: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "runbooks", *words]
        if machine != "here":
            # A machine is told by its name: this one has another, in a UTS namespace of its own.
            command = ["unshare", "--uts", "--", "sh", "-c", f'hostname {machine} && exec "$@"', "sh", *command]
        self.began = time.time()
        self.process = subprocess.Popen(
            command,
            cwd=REPO,
            env={**where.environment(machine), **(more or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: list[str] = []
        self.name = ""
        self.began_work = self.began
        """When its first step was about to begin (unix seconds)."""
        self.started = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if not self.name and (found := STARTED.search(line)):
                self.name, self.began_work = found.group(1), time.time()
                self.started.set()
        self.started.set()

    @property
    def said(self) -> str:
        return "\n".join(self.lines[-12:])

    def wait(self, patience_s: float = 300.0) -> int:
        """Its exit code; SweepError when it hangs."""
        try:
            code = self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            kill(self.process.pid)
            raise SweepError(f"no end after {patience_s:.0f} s:\n{self.said}") from None
        # Whoever outlived it may have its output open; what it said itself is there at once.
        self._reader.join(0.5)
        return code

    def descendants(self) -> list[int]:
        found: list[int] = []
        waiting = [self.process.pid]
        while waiting:
            own = children(waiting.pop())
            found += own
            waiting += own
        return found

    def playbooks(self) -> list[int]:
        return [pid for pid in children(self.process.pid) if "runbooks.playbook_process" in _command(pid)]

    def workers(self) -> list[int]:
        return [pid for playbook in self.playbooks() for pid in children(playbook)]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def strike(run: Run, victim: str, dice: random.Random) -> str:
    """SIGKILL the victim, or who is there in its stead; who it was."""
    if victim == "worker" and (workers := run.workers()):
        kill(dice.choice(workers))
        return "worker"
    if victim in ("worker", "runner") and (playbooks := run.playbooks()):
        # The one at work rather than one that warms up, when there is one.
        busy = [pid for pid in playbooks if children(pid)]
        kill(dice.choice(busy or playbooks))
        return "runner"
    if victim == "all":
        others = run.descendants()
        kill(run.process.pid)
        for pid in others:
            kill(pid)
        return "all"
    kill(run.process.pid)
    return "engine"


# -- the machine's network


@contextlib.contextmanager
def network_of(number: int) -> Iterator[Network]:
    """A control group whose processes' packets can be dropped, loopback included; others go on."""
    hybrid = CGROUP / "unified"
    group = (hybrid if hybrid.is_dir() else CGROUP) / f"{CUT}-{number}"
    group.mkdir(exist_ok=True)
    network = Network(group, f"{CUT.replace('-', '_')}_{number}")
    try:
        yield network
    finally:
        network.heal()
        for pid in (group / "cgroup.procs").read_text().split():
            kill(int(pid))
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


@dataclass
class Network:
    group: Path
    table: str
    down: bool = False

    def join(self, pid: int) -> None:
        (self.group / "cgroup.procs").write_text(str(pid))

    def cut(self) -> None:
        path = self.group.relative_to(CGROUP)
        level = 1  # below the root of the version 2 hierarchy, wherever that is mounted
        rules = f"""table inet {self.table} {{
            chain output {{
                type filter hook output priority -250; policy accept;
                socket cgroupv2 level {level} "{path}" drop
            }}
        }}"""
        subprocess.run(("nft", "-f", "-"), input=rules, text=True, check=True)
        self.down = True

    def heal(self) -> None:
        if self.down:
            subprocess.run(("nft", "delete", "table", "inet", self.table), check=True)
            self.down = False


# -- what is counted


@dataclass
class Trial:
    """One killed run and what became of it."""

    number: int
    victim: str
    moment: str
    lane: str = ""
    run: str = ""
    finished: bool = False
    resumes: int = 0
    elsewhere: bool = False
    duplicated: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    unannounced: list[str] = field(default_factory=list)
    evidence: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.finished and not (self.duplicated or self.missing or self.unannounced or self.evidence)

    def line(self) -> str:
        parts = [
            f"kill {self.number}: {self.victim} {self.moment}",
            f"run {self.run or 'none'}",
            f"resumed {self.resumes}{' elsewhere' if self.elsewhere else ''}",
            "finished" if self.finished else f"NOT FINISHED: {self.error}",
            f"duplicated {sum(self.duplicated.values())}",
            f"{self.seconds:.0f} s",
        ]
        parts += [f"DUPLICATED {dict(self.duplicated)}"] if self.duplicated else []
        parts += [f"MISSING {dict(self.missing)}"] if self.missing else []
        parts += [f"WITHOUT INTENT {self.unannounced}"] if self.unannounced else []
        parts += [f"EVIDENCE {self.evidence}"] if self.evidence else []
        return ", ".join(parts)


def vars_of(trial: Trial) -> dict[str, Any]:
    """For JSON; ``asdict`` would make pairs the keys of a counter that holds something."""
    return {each.name: getattr(trial, each.name) for each in fields(trial)}


class Results:
    """The trials so far, in a file when one is given: a sweep of the same seed goes on where another ended.

    stop: set when the sweep is to end after the trials under way. Raises SweepError when the file is of another seed.
    """

    def __init__(self, seed: int, told: Callable[[str], None], file: Path | None = None) -> None:
        self.seed, self.told, self.file = seed, told, file
        self.stop = threading.Event()
        self.trials: dict[str, Trial] = {}
        self.two_writers_ms = 0
        self._mutex = threading.Lock()
        for line in read_lines(file) if file else ():
            if line["seed"] != seed:
                raise SweepError(f"{file} has the results of seed {line['seed']}, not of {seed}")
            self.two_writers_ms += line.get("two_writers_ms", 0)
            if trial := line.get("trial"):
                for name in ("duplicated", "missing"):
                    trial[name] = Counter(trial[name])
                self.trials[line["key"]] = Trial(**trial)

    def add(self, key: str, trial: Trial, of: str = "") -> None:
        with self._mutex:
            self.trials[key] = trial
            self._note({"key": key, "trial": vars_of(trial)})
            self.told(f"[{len(self.trials)}{of}] {trial.line()}")

    def add_two_writers(self, milliseconds: int) -> None:
        self.two_writers_ms += milliseconds
        self._note({"two_writers_ms": milliseconds})

    def judge(self, where: Callable[[Trial], str]) -> None:
        """Note what the trials' evidence is worth, once it has been examined; an empty sentence is good."""
        for key, trial in self.trials.items():
            if sentence := where(trial):
                trial.evidence = sentence
                self._note({"key": key, "trial": vars_of(trial)})

    def _note(self, line: dict[str, Any]) -> None:
        if self.file:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"seed": self.seed, **line}) + "\n")

    def bad(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if not trial.good]

    def line(self) -> str:
        """The sum of all: an unbroken run of a pair is no kill."""
        kills = [trial for trial in self.trials.values() if trial.victim != UNHARMED]
        return (
            f"kills={len(kills)} finished={sum(trial.finished for trial in kills)} "
            f"duplicated_effects={sum(sum(trial.duplicated.values()) for trial in self.trials.values())} "
            f"two_writers_ms={self.two_writers_ms}"
        )


def compare(unbroken: Counter[str], events: Iterable[Event], trial: Trial) -> None:
    """What happened more or less often than in an unbroken run."""
    seen = Counter(event.key for event in events)
    trial.duplicated = seen - unbroken
    trial.missing = unbroken - seen


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
