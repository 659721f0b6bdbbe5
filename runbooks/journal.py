"""The journal: what a run intended and what came of it, in one chain of signed records an environment.

It lives in an SQLite file, or in a PostgreSQL database that several operators and AWX share (``runbooks.database``).
It is append-only; the state of a run is what its records add up to (``fold``). The world holds the truth: steps observe
it, so a record that is missing costs a repeated observation and never a repeated effect.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from runbooks import database, keys
from runbooks.anchors import Anchoring, Head
from runbooks.anchors import parse as parse_anchor
from runbooks.chain import COLUMNS, GENESIS, Link
from runbooks.database import PATIENCE_S, Database, Execute, SQLite
from runbooks.errors import Problem
from runbooks.locks import Process
from runbooks.records import KINDS, Record, RunOutcome, RunState, StepOutcome, StepState, dumps, fold

__all__ = [
    "Journal",
    "LockLost",
    "Record",
    "RunOutcome",
    "RunState",
    "StepOutcome",
    "StepState",
    "fold",
]

T = TypeVar("T")
Document = dict[str, Any]

# The shortest patience with a journal that only one of several commands looks into.
GLANCE_S = 3.0
BEFORE = "journal_before"
"""The table with the records that are older than the chain (SQLite only)."""
RECORDS = "SELECT seq, run, wall, mono, kind, step, data, fence, door, id, hash, key FROM journal WHERE environment = ?"
# Who holds a run's fence is what the newest of these says.
HOLDING = ("run_started", "run_resumed", "run_finished")
# What brings the end of the chain to the anchors.
ANCHORED = ("step_finished", "run_finished", "approval_given")
CHANGES_KEPT = 64


def new_id() -> str:
    return secrets.token_hex(12)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record to be. id is what it is known by before anyone knows whether it has been written."""

    kind: str
    run: str
    step: str | None
    data: Document
    fence: int | None
    door: str
    id: str = field(default_factory=new_id)


class LockLost(Exception):
    """Another process has taken this run over; whoever still runs must stop without a further record."""


class Journal:
    """One environment's journal. Safe to use from several threads and processes.

    location: an SQLite file, the directory it is in, or postgresql://...; directory: where the reports go; anchors: as
    the inventory has them (``runbooks.anchors``).
    Raises Problem when it cannot be opened, and from every method when it is lost and does not come back.
    """

    def __init__(
        self,
        location: Path | str,
        environment: str,
        directory: Path | None = None,
        *,
        anchors: Sequence[Document] = (),
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.environment = environment
        self.anchors = [dict(anchor) for anchor in anchors]
        self._anchoring = Anchoring([parse_anchor(anchor) for anchor in anchors], self._unanchored)
        if database.is_url(location):
            self.directory = directory or state_home() / environment
            self.location = str(location)
        else:
            file = Path(location)
            file = file if file.suffix == ".sqlite" else file / "journal.sqlite"
            self.directory = directory or file.parent
            self.location = str(file)
        self._db: Database = database.connect(self.location, patience_s=patience_s)
        self._before = bool(
            isinstance(self._db, SQLite) and self._db.read("SELECT 1 FROM sqlite_master WHERE name = ?", BEFORE)
        )
        self._key: Any = None
        self._public = ""
        self._run: str | None = None
        self._fence: int | None = None
        self._door = "runbook"
        self._closed = False

    def close(self) -> None:
        """Waits a few seconds for anchors that are still under way."""
        self._anchoring.close()
        self._closed = True
        self._db.close()

    def _unanchored(self, text: str) -> None:
        if not self._closed:
            with contextlib.suppress(Problem):  # The record is for later; the run does not depend on it.
                self.record("note", self._run or "", None, {"unanchored": text})

    # -- the book of locks

    def book(self) -> tuple[Document | None, int]:
        """The environment's lock book (None: nobody has written one) and its version."""
        rows = self._db.read("SELECT document, version FROM book WHERE environment = ?", self.environment)
        document, version = rows[0] if rows else ("", 0)
        return (json.loads(document) if document else None), version

    def change_book(
        self, plan: Callable[[Document | None, float], tuple[Document | None, T]], *, patience_s: float = PATIENCE_S
    ) -> T:
        """Change the lock book by a pure function, alone and in one transaction; what the function says besides.

        plan(document, now) gets unix seconds of the database's clock, and returns the new document (None: leave it)
        and an answer; what it raises leaves all as it was. After a lost connection it may be called again, but never
        on a book that already holds its own change.
        """
        change = secrets.token_hex(8)
        answers: list[T] = []

        def work(execute: Execute) -> T:
            rows = execute("SELECT document, version, changes FROM book WHERE environment = ?", self.environment)
            document, version, changes = rows[0] if rows else ("", 0, "[]")
            done: list[str] = json.loads(changes)
            if change in done:
                return answers[-1]
            new, answer = plan(json.loads(document) if document else None, self._db.now(execute))
            if new is not None:
                values = json.dumps(new), version + 1, json.dumps([*done, change][-CHANGES_KEPT:]), self.environment
                if rows:
                    execute("UPDATE book SET document = ?, version = ?, changes = ? WHERE environment = ?", *values)
                else:
                    execute("INSERT INTO book (document, version, changes, environment) VALUES (?, ?, ?, ?)", *values)
            answers.append(answer)
            return answer

        return self._db.write(self.environment, work, patience_s)

    # -- a run's records

    def begin(self, run: str, data: Document, *, fence: int, door: str = "runbook") -> None:
        """Record a run's start and write its records from now on, under the fence of the lock that the run holds.

        Raises LockLost when a newer fence than this one has been there.
        """
        self._hold(run, "run_started", data, fence, door)

    def take_over(self, run: str, data: Document, *, fence: int, door: str = "runbook") -> None:
        """Go on with a run that ended without success: whoever wrote its records until now no longer can.

        Raises LockLost when a newer fence than this one has been there.
        """
        self._hold(run, "run_resumed", data, fence, door)

    def _hold(self, run: str, kind: str, data: Document, fence: int, door: str) -> None:
        process = Process.current()
        who = {"who": process.who, "host": process.host, "boot": process.boot, "pid": process.pid}
        self._put(Entry(kind, run, None, {**data, **who}, fence, door), self._newest)
        self._run, self._fence, self._door = run, fence, door

    def attach(self, run: str, fence: int, door: str = "runbook") -> None:
        """Write records of a run that another process holds, as long as that process's fence is the newest.

        Raises LockLost when it is not.
        """
        self._run, self._fence, self._door = run, fence, door
        self._own(self._db.read)

    def append(self, kind: str, step: str | None, data: Document, *, once: str = "") -> None:
        """Add a record of the run that this process holds; it is durable on return. Raises LockLost.

        once: what the record is known by, for one of which the first of several processes has the word.
        """
        self._put(Entry(kind, str(self._run), step, data, self._fence, self._door, once or new_id()), self._own)

    def record(self, kind: str, run: str, step: str | None, data: Document, *, door: str = "runbook") -> None:
        """Add a record of a run, or of none yet, without its lock: approvals, notifications, acknowledgements."""
        if kind in HOLDING:
            raise ValueError(f"{kind} is for the holder of the run's lock")
        self._put(Entry(kind, run, step, data, None, door))

    def finish(self, state: RunOutcome, reason: str = "") -> None:
        """Record the end of the run, after which only ``record`` and ``take_over`` add to it. Raises LockLost."""
        data = {"state": state, "reason": reason}
        self._put(Entry("run_finished", str(self._run), None, data, self._fence, self._door), self._own)

    def abort(self, run: str, reason: str, *, fence: int, door: str = "runbook") -> None:
        """Record that an unfinished run was given up. Raises LockLost when a newer fence has been there."""
        self._put(Entry("run_finished", run, None, {"state": "aborted", "reason": reason}, fence, door), self._newest)

    def _put(self, entry: Entry, allowed: Callable[[Execute, Entry], None] = lambda _execute, _entry: None) -> None:
        """Write an entry once, however often its transaction is tried. allowed: raises LockLost when it may not be."""
        written: list[Link] = []

        def work(execute: Execute) -> None:
            if not self._has(execute, entry.id):
                allowed(execute, entry)
                written.append(self._insert(execute, entry))

        if self._key is None:
            # Before the transaction: others wait for its end, and the first use of a key takes its time.
            self._key = keys.journal_key()
            self._public = keys.public(self._key)
        self._db.write(self.environment, work)
        if entry.kind in ANCHORED:
            self._anchoring.offer(Head.of(written[-1]))

    # -- inside a transaction

    def _has(self, execute: Execute, record: str) -> bool:
        return bool(execute("SELECT 1 FROM journal WHERE environment = ? AND id = ?", self.environment, record))

    def _fence_of(self, execute: Execute, run: str) -> tuple[int, str]:
        """The newest fence of a run and which record brought it; 0 when there is none."""
        rows = execute(
            f"SELECT fence, kind FROM journal WHERE environment = ? AND run = ? AND {database.HOLDING} "  # noqa: S608
            "ORDER BY seq DESC LIMIT 1",
            self.environment,
            run,
        )
        return rows[0] if rows else (0, "")

    def _newest(self, execute: Execute, entry: Entry) -> None:
        """The entry's fence is newer than all that have written of its run."""
        if entry.fence is None or entry.fence <= self._fence_of(execute, entry.run)[0]:
            raise LockLost(entry.run)

    def _own(self, execute: Execute, _entry: Entry | None = None) -> None:
        """The run that this process holds is still its own."""
        if self._fence is None:
            raise LockLost(self._run)
        fence, kind = self._fence_of(execute, str(self._run))
        if fence != self._fence or kind == "run_finished":
            raise LockLost(self._run)

    def _insert(self, execute: Execute, entry: Entry) -> Link:
        if entry.kind not in KINDS:
            raise ValueError(f"{entry.kind} is no kind of record")
        rows = execute(
            "SELECT seq, hash FROM journal WHERE environment = ? ORDER BY seq DESC LIMIT 1", self.environment
        )
        seq, prev = rows[0] if rows else (0, GENESIS)
        if not rows and self._before:
            note = Entry("note", "", None, {"before": history(execute)}, None, entry.door)
            first = self._add(execute, note, seq, prev)
            seq, prev = first.seq, first.hash
        return self._add(execute, entry, seq, prev)

    def _add(self, execute: Execute, entry: Entry, seq: int, prev: str) -> Link:
        link = Link(
            environment=self.environment,
            seq=seq + 1,
            id=entry.id,
            run=entry.run,
            wall=time.time(),
            mono=time.monotonic(),
            kind=entry.kind,
            step=entry.step,
            fence=entry.fence,
            door=entry.door,
            data=dumps(entry.data),
            prev=prev,
        ).signed(self._key, self._public)
        marks = ", ".join("?" * len(COLUMNS))
        execute(
            f"INSERT INTO journal ({', '.join(COLUMNS)}) VALUES ({marks})",  # noqa: S608 - names of our own columns
            *(getattr(link, column) for column in COLUMNS),
        )
        return link

    # -- reading

    def records(self, run: str) -> list[Record]:
        """All records of a run, the oldest first; those older than the chain have positions up to 0."""
        return _records([*self._older(run), *self._rows("run", run)])

    def records_of(self, *kinds: str) -> list[Record]:
        """All records of some kinds, of whatever run, the oldest first (none from before the chain)."""
        return _records(self._rows("kind", *kinds))

    def _rows(self, column: str, *values: str) -> list[database.Row]:
        marks = ", ".join("?" * len(values))
        return self._db.read(f"{RECORDS} AND {column} IN ({marks}) ORDER BY seq", self.environment, *values)

    def _older(self, run: str) -> list[tuple[Any, ...]]:
        if not self._before:
            return []
        return self._db.read(
            "SELECT seq - (SELECT MAX(seq) FROM journal_before), run, wall, mono, kind, step, data "
            "FROM journal_before WHERE run = ? ORDER BY seq",
            run,
        )

    def runs(self) -> list[str]:
        """All runs of the environment, the oldest first."""
        older = (
            [
                run
                for run, data in self._db.read(
                    "SELECT run, data FROM journal_before WHERE kind = 'run_started' ORDER BY seq"
                )
                if json.loads(data).get("environment") == self.environment
            ]
            if self._before
            else []
        )
        rows = self._db.read(
            "SELECT run FROM journal WHERE environment = ? AND kind = 'run_started' ORDER BY seq", self.environment
        )
        return [*older, *(row[0] for row in rows)]

    def changed(self, after: int) -> tuple[int, set[str]]:
        """The position of the newest record, and the runs that have records after a position: for who looks often."""
        rows = self._db.read(
            "SELECT run, MAX(seq) FROM journal WHERE environment = ? AND seq > ? GROUP BY run", self.environment, after
        )
        return max([after, *(seq for _, seq in rows)]), {run for run, _ in rows}

    def state(self, run: str) -> RunState:
        """Raises Problem when the run is unknown."""
        records = self.records(run)
        if not any(record.kind == "run_started" for record in records):
            raise Problem(
                f"Environment {self.environment} has no run {run}", code="run-unknown", next_command="runbook runs"
            )
        return fold(records)

    def links(self) -> list[Link]:
        """The whole chain of the environment, as it is stored."""
        return read_links(self._db, self.environment)


def _records(rows: Iterable[database.Row]) -> list[Record]:
    return [
        Record(seq, run, wall, mono, kind, step, json.loads(data), *rest)
        for seq, run, wall, mono, kind, step, data, *rest in rows
    ]


def read_links(db: Database, environment: str) -> list[Link]:
    rows = db.read(
        f"SELECT {', '.join(COLUMNS)} FROM journal WHERE environment = ? ORDER BY seq",  # noqa: S608 - our columns
        environment,
    )
    return [Link(*row) for row in rows]


def history(execute: Execute) -> Document:
    """How many records are older than the chain, and the digest that its first record holds of them."""
    rows = execute("SELECT seq, run, wall, mono, kind, step, data FROM journal_before ORDER BY seq")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, separators=(",", ":"), default=repr).encode() + b"\n")
    return {"records": len(rows), "sha256": digest.hexdigest()}


# -- where the journals of this machine are, for commands that are given no inventory


def state_home() -> Path:
    """Where runbooks keep state that no environment places elsewhere."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "censuschat-infra"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an environment's journal is, and what this machine knows to judge it by without its inventory."""

    environment: str
    location: str
    directory: Path
    anchors: list[Document] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def open(self, patience_s: float = PATIENCE_S) -> Journal:
        """Raises Problem."""
        return Journal(self.location, self.environment, self.directory, anchors=self.anchors, patience_s=patience_s)


def remember(
    environment: str,
    directory: Path,
    location: str | None = None,
    anchors: Iterable[Document] = (),
    trusted: Mapping[str, str] | None = None,
) -> None:
    """Note an environment's journal in the operator's state directory. trusted: name -> public key."""
    home = state_home()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = {place.environment: place for place in _places()}
    where = location or str(directory / "journal.sqlite")
    known[environment] = Place(environment, where, directory, list(anchors), dict(trusted or {}))
    text = json.dumps(
        {
            name: {
                "journal": place.location,
                "directory": str(place.directory),
                "anchors": place.anchors,
                "keys": place.keys,
            }
            for name, place in known.items()
        },
        indent=1,
    )
    temporary = home / f".environments.{os.getpid()}"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(home / "environments.json")


def _places() -> list[Place]:
    try:
        known = json.loads((state_home() / "environments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    places = []
    for name, noted in known.items():
        if isinstance(noted, str):  # As it was noted before there were other journals than files.
            places.append(Place(name, str(Path(noted) / "journal.sqlite"), Path(noted)))
        else:
            places.append(
                Place(name, noted["journal"], Path(noted["directory"]), noted.get("anchors", []), noted.get("keys", {}))
            )
    return places


def known_journals() -> dict[str, Place]:
    """Environment -> its journal, of all that were worked on from here and (if they are files) still exist."""
    return {
        place.environment: place
        for place in _places()
        if database.is_url(place.location) or Path(place.location).exists()
    }


def open_known() -> list[Journal]:
    """All journals that are known here; one that cannot be reached is named on stderr and left out."""
    journals = []
    for place in known_journals().values():
        try:
            journals.append(place.open(GLANCE_S))
        except Problem as problem:
            print(f"left out: {problem.what}", file=sys.stderr)
    return journals


def find(run: str | None, journals: Sequence[Journal] | None = None) -> tuple[Journal, str]:
    """The journal that holds a run, by its id, a unique part of it, or the latest of all when none is given.

    journals: where to look; all that are known when not given.

    Raises Problem when there is none, or more than one.
    """
    found: list[tuple[Journal, str]] = []
    for journal in open_known() if journals is None else journals:
        names = journal.runs()
        found += [(journal, name) for name in (names[-1:] if run is None else names) if run is None or run in name]
    found = [entry for entry in found if entry[1] == run] or found
    if not found:
        what = "No runbook has been run from this machine" if run is None else f"There is no run {run} on this machine"
        raise Problem(what, code="run-unknown", next_command="runbook runs" if run else "runbook list")
    if run is not None and len(found) > 1:
        shown = ", ".join(sorted(name for _, name in found)[:5])
        raise Problem(f"{run} is part of more than one run: {shown}", code="run-ambiguous", next_command="runbook runs")
    newest = found[0] if len(found) == 1 else max(found, key=lambda entry: entry[0].records(entry[1])[0].wall)
    for journal in {entry[0] for entry in found} - {newest[0]}:
        journal.close()
    return newest


@contextmanager
def opened(journal: Journal) -> Iterator[Journal]:
    with closing(journal):
        yield journal
