"""The journal: what a run intended and what came of it, in one SQLite file an environment, and the environment's lock.

The table ``journal`` is append-only; the state of a run is what its records add up to (``fold``). The world holds the
truth: steps observe it, so a record that is missing costs a repeated observation and never a repeated effect.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from runbooks.errors import Problem, Refused

HEARTBEAT_S = 5.0
# The holder on another machine cannot be looked at: this long without a heartbeat means that it is gone.
SILENT_S = 60.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL,
    wall REAL NOT NULL,
    mono REAL NOT NULL,
    kind TEXT NOT NULL,
    step TEXT,
    data TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS journal_run ON journal (run, seq);
CREATE TRIGGER IF NOT EXISTS journal_keeps BEFORE UPDATE ON journal BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS journal_holds BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TABLE IF NOT EXISTS lock (
    environment TEXT PRIMARY KEY,
    run TEXT NOT NULL,
    token TEXT NOT NULL,
    who TEXT NOT NULL,
    host TEXT NOT NULL,
    boot TEXT NOT NULL,
    pid INTEGER NOT NULL,
    pid_start TEXT NOT NULL,
    since REAL NOT NULL,
    heartbeat REAL NOT NULL
);
"""

StepOutcome = Literal["ok", "failed", "timed out", "interrupted"]
# "running" is what the records say; whether its process still lives is a question for the lock.
RunOutcome = Literal["running", "succeeded", "failed", "refused", "interrupted", "aborted"]


@dataclass(frozen=True, slots=True)
class Process:
    """The process that holds a lock. pid_start (clock ticks since boot) tells it from a later one with the same pid."""

    who: str
    host: str
    boot: str
    pid: int
    pid_start: str

    @classmethod
    def current(cls) -> Self:
        return cls(getpass.getuser(), socket.gethostname(), _boot(), os.getpid(), pid_start(os.getpid()) or "")


@dataclass(frozen=True, slots=True)
class Lock:
    """Who works on an environment. since and heartbeat are unix seconds."""

    environment: str
    run: str
    token: str
    process: Process
    since: float
    heartbeat: float

    def alive(self) -> bool:
        """Whether the holder still exists; on another machine, whether it was heard of within SILENT_S."""
        if self.process.host == socket.gethostname():
            return self.process.boot == _boot() and pid_start(self.process.pid) == self.process.pid_start
        return time.time() - self.heartbeat < SILENT_S

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.since))
        return f"run {self.run} of {self.process.who} (process {self.process.pid} on {self.process.host}) since {since}"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the journal. wall: unix seconds; mono: CLOCK_MONOTONIC seconds of the machine that wrote it."""

    seq: int
    run: str
    wall: float
    mono: float
    kind: str
    step: str | None
    data: dict[str, Any]


@dataclass(slots=True)
class StepState:
    """What the journal says about one step; times in unix seconds, None while there is none."""

    step: str
    attempts: int = 0
    outcome: StepOutcome | None = None
    started: float | None = None
    started_mono: float | None = None
    ended: float | None = None
    elapsed_s: float | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    changed: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class RunState:
    """What the journal says about one run."""

    run: str
    runbook: str
    environment: str
    inventory: str
    who: str
    host: str
    parameters: dict[str, Any]
    started: float
    started_mono: float
    boot: str
    steps: dict[str, StepState]
    left_out: list[str] = field(default_factory=list)
    state: RunOutcome = "running"
    reason: str = ""
    ended: float | None = None
    ended_mono: float | None = None
    resumed: int = 0
    asked: float = 0.0

    @property
    def outputs(self) -> dict[str, Any]:
        """The outputs of all successful steps; a later step's wins."""
        return {k: v for step in self.steps.values() if step.outcome == "ok" for k, v in step.outputs.items()}

    @property
    def pending(self) -> list[str]:
        """The steps from the first one that has no successful outcome."""
        ids = list(self.steps)
        first = next((i for i, step in enumerate(ids) if self.steps[step].outcome != "ok"), len(ids))
        return ids[first:]


def fold(records: Iterable[Record]) -> RunState:
    """The state that one run's records add up to. Raises ValueError when they do not begin with its start."""
    state: RunState | None = None
    for record in records:
        data = record.data
        if state is None:
            if record.kind != "run_started":
                raise ValueError(f"the journal of run {record.run} begins with {record.kind}")
            state = RunState(
                run=record.run,
                runbook=data["runbook"],
                environment=data["environment"],
                inventory=data["inventory"],
                who=data["who"],
                host=data["host"],
                parameters=data["parameters"],
                started=record.wall,
                started_mono=record.mono,
                boot=data["boot"],
                steps={step: StepState(step) for step in data["steps"]},
                left_out=data.get("left_out", []),
                asked=data.get("asked", record.wall),
            )
        elif record.kind == "run_resumed":
            state.state, state.reason, state.ended, state.ended_mono = "running", "", None, None
            state.resumed += 1
            state.left_out = data.get("left_out", state.left_out)
        elif record.kind == "run_finished":
            state.state, state.reason = data["state"], data.get("reason", "")
            state.ended, state.ended_mono = record.wall, record.mono
        elif record.kind == "step_started" and record.step is not None:
            step = state.steps[record.step]
            step.attempts += 1
            step.started, step.started_mono, step.ended, step.outcome = record.wall, record.mono, None, None
            step.elapsed_s, step.failures = None, []
        elif record.kind == "step_finished" and record.step is not None:
            step = state.steps[record.step]
            step.outcome, step.ended, step.elapsed_s = data["outcome"], record.wall, data["elapsed_s"]
            step.outputs, step.says = data.get("outputs", {}), data.get("says", "")
            step.changed, step.failures = data.get("changed", []), data.get("failures", [])
    if state is None:
        raise ValueError("no records")
    return state


class LockLost(Exception):
    """Another process has taken this run over; whoever still runs must stop without a further record."""


class Journal:
    """One environment's journal and lock. Safe to use from several threads and processes.

    Raises Problem when the file cannot be opened.
    """

    def __init__(self, directory: Path, environment: str) -> None:
        self.directory, self.environment = directory, environment
        self.path = directory / "journal.sqlite"
        self._token: str | None = None
        self._run: str | None = None
        self._mutex = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            directory.chmod(0o700)
            # Statements outside an explicit transaction commit at once; the mutex is what guards the threads.
            self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            self.path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise Problem(
                f"The journal {self.path} cannot be opened ({error})",
                code="journal-unopenable",
                next_command=f"ls -ld {directory}",
            ) from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # -- the lock

    def lock(self) -> Lock | None:
        """Who holds the environment, if anyone."""
        with self._mutex:
            return self._lock()

    def _lock(self) -> Lock | None:
        row = self._db.execute(
            "SELECT environment, run, token, who, host, boot, pid, pid_start, since, heartbeat FROM lock "
            "WHERE environment = ?",
            (self.environment,),
        ).fetchone()
        return None if row is None else Lock(row[0], row[1], row[2], Process(*row[3:8]), row[8], row[9])

    def refuse_when_busy(self, resuming: str | None = None) -> None:
        """Raises Refused when another run holds the environment, or a dead one does and this is not its resumption."""
        with self._mutex:
            self._refuse_when_busy(resuming)

    def _refuse_when_busy(self, resuming: str | None) -> None:
        held = self._lock()
        if held is None:
            return
        if held.alive():
            raise Refused(
                f"Environment {self.environment} is being worked on by {held.describe()}",
                code="lock-held",
                next_command=f"runbook status {held.run}",
            )
        if held.run != resuming:
            raise Refused(
                f"Environment {self.environment} is still locked by {held.describe()}, whose process is gone with its "
                "work unfinished",
                code="lock-of-dead-run",
                next_command=f"runbook resume {held.run}",
            )

    def begin(self, run: str, data: dict[str, Any]) -> None:
        """Take the lock and record the run's start, in one transaction. Raises Refused."""
        self._take(run, "run_started", data, resuming=None)

    def take_over(self, run: str, data: dict[str, Any]) -> None:
        """Take the lock for a run that ended without success, and record it. Raises Refused."""
        self._take(run, "run_resumed", data, resuming=run)

    def _take(self, run: str, kind: str, data: dict[str, Any], resuming: str | None) -> None:
        process, token, now = Process.current(), secrets.token_hex(8), time.time()
        with self._transaction() as db:
            self._refuse_when_busy(resuming)
            db.execute(
                "INSERT OR REPLACE INTO lock VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self.environment,
                    run,
                    token,
                    process.who,
                    process.host,
                    process.boot,
                    process.pid,
                    process.pid_start,
                    now,
                    now,
                ),
            )
            self._insert(
                run,
                kind,
                None,
                {**data, "who": process.who, "host": process.host, "boot": process.boot, "pid": process.pid},
            )
        self._run, self._token = run, token

    def beat(self) -> None:
        """Show that this process lives. Raises LockLost."""
        with self._transaction() as db:
            self._own()
            db.execute("UPDATE lock SET heartbeat = ? WHERE token = ?", (time.time(), self._token))

    def _own(self) -> None:
        held = self._lock()
        if held is None or held.token != self._token:
            raise LockLost(self._run)

    def finish(self, state: RunOutcome, reason: str = "") -> None:
        """Record the end of the run and give the lock back. Raises LockLost."""
        with self._transaction() as db:
            self._own()
            self._insert(str(self._run), "run_finished", None, {"state": state, "reason": reason})
            db.execute("DELETE FROM lock WHERE token = ?", (self._token,))

    def abort(self, run: str, reason: str) -> None:
        """Give up an unfinished run whose process is gone, and its lock. Raises Refused when it is alive."""
        with self._transaction() as db:
            self._refuse_when_busy(resuming=run)
            self._insert(run, "run_finished", None, {"state": "aborted", "reason": reason})
            db.execute("DELETE FROM lock WHERE environment = ? AND run = ?", (self.environment, run))

    # -- the records

    def append(self, kind: str, step: str, data: dict[str, Any]) -> None:
        """Add a record of the run whose lock this process holds; it is on disk on return. Raises LockLost."""
        with self._transaction():
            self._own()
            self._insert(str(self._run), kind, step, data)

    def _insert(self, run: str, kind: str, step: str | None, data: dict[str, Any]) -> None:
        self._db.execute(
            "INSERT INTO journal (run, wall, mono, kind, step, data) VALUES (?, ?, ?, ?, ?, ?)",
            (run, time.time(), time.monotonic(), kind, step, json.dumps(data, separators=(",", ":"), default=str)),
        )

    def records(self, run: str) -> list[Record]:
        with self._mutex:
            rows = self._db.execute(
                "SELECT seq, run, wall, mono, kind, step, data FROM journal WHERE run = ? ORDER BY seq", (run,)
            ).fetchall()
        return [
            Record(seq, name, wall, mono, kind, step, json.loads(data))
            for seq, name, wall, mono, kind, step, data in rows
        ]

    def runs(self) -> list[str]:
        """All runs of the environment, the oldest first."""
        with self._mutex:
            rows = self._db.execute("SELECT run FROM journal WHERE kind = 'run_started' ORDER BY seq").fetchall()
        return [row[0] for row in rows]

    def state(self, run: str) -> RunState:
        """Raises Problem when the run is unknown."""
        records = self.records(run)
        if not records:
            raise Problem(
                f"Environment {self.environment} has no run {run}", code="run-unknown", next_command="runbook runs"
            )
        return fold(records)


class Heartbeat:
    """Beats for the holder of the lock in the background; ``lost`` says that somebody else has taken over."""

    def __init__(self, journal: Journal) -> None:
        self.lost = threading.Event()
        self._journal = journal
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._journal.beat()
            except LockLost:
                self.lost.set()
                return
            except sqlite3.OperationalError:
                # A disk that is full or busy for a moment: the next record says so, where it can be reported.
                continue

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def pid_start(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process; None when there is none, or only its remains (a zombie)."""
    try:
        # The name in brackets may hold anything, also spaces and brackets; after the last one come state, ppid, ...
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


# -- where the journals of this machine are, for commands that are given no inventory


def state_home() -> Path:
    """Where runbooks keep state that no environment places elsewhere."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "censuschat-infra"


def remember(environment: str, directory: Path) -> None:
    """Note an environment's journal in the operator's state directory."""
    known = {**known_journals(), environment: directory}
    home = state_home()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = home / f".environments.{os.getpid()}"
    temporary.write_text(json.dumps({k: str(v) for k, v in known.items()}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(home / "environments.json")


def known_journals() -> dict[str, Path]:
    """Environment -> directory of its journal, of all environments that were worked on from here and still exist."""
    try:
        known = json.loads((state_home() / "environments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: Path(path) for name, path in known.items() if (Path(path) / "journal.sqlite").exists()}


def open_known() -> list[Journal]:
    return [Journal(path, name) for name, path in known_journals().items()]


def find(run: str | None, journals: Sequence[Journal] | None = None) -> tuple[Journal, str]:
    """The journal that holds a run, by its id, a unique part of it, or the latest of all when none is given.

    journals: where to look; all that are known when not given.

    Raises Problem when there is none, or more than one.
    """
    found: list[tuple[float, Journal, str]] = []
    for journal in open_known() if journals is None else journals:
        for name in journal.runs():
            if run is None or name == run or run in name:
                found.append((journal.records(name)[0].wall, journal, name))
    exact = [entry for entry in found if entry[2] == run]
    if exact:
        found = exact
    if not found:
        what = "No runbook has been run from this machine" if run is None else f"There is no run {run} on this machine"
        raise Problem(what, code="run-unknown", next_command="runbook runs" if run else "runbook list")
    if run is not None and len(found) > 1:
        names = ", ".join(sorted(entry[2] for entry in found)[:5])
        raise Problem(f"{run} is part of more than one run: {names}", code="run-ambiguous", next_command="runbook runs")
    newest = max(found, key=lambda entry: entry[0])
    for journal in {entry[1] for entry in found} - {newest[1]}:
        journal.close()
    return newest[1], newest[2]


def shown_state(journal: Journal, state: RunState) -> str:
    """A run that says "running" and whose process is gone is dead."""
    if state.state != "running":
        return state.state
    lock = journal.lock()
    return "running" if lock is not None and lock.run == state.run and lock.alive() else "dead"


@contextmanager
def opened(journal: Journal) -> Iterator[Journal]:
    with closing(journal):
        yield journal
