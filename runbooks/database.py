"""The journal's database: the same SQL on SQLite and on PostgreSQL, and what is different about them.

No SQLAlchemy: its pools and sessions would hide the two things that matter here, which connection a transaction is on
and whether its commit is known, and its import costs more than everything else of ``runbook status``.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from runbooks.errors import Problem, one_line

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")
Row = tuple[Any, ...]
Execute = Callable[..., list[Row]]
"""execute(sql, *parameters): the rows, with ? for a parameter."""

PATIENCE_S = 20.0
"""How long a statement may wait for a database that is busy or away before its caller is told."""
RETRY_S = 0.5
SCHEMES = ("postgresql://", "postgres://")

TABLES = (
    """CREATE TABLE IF NOT EXISTS journal (
    environment TEXT NOT NULL,
    seq BIGINT NOT NULL,
    id TEXT NOT NULL,
    run TEXT NOT NULL,
    wall DOUBLE PRECISION NOT NULL,
    mono DOUBLE PRECISION NOT NULL,
    kind TEXT NOT NULL,
    step TEXT,
    fence BIGINT,
    door TEXT,
    data TEXT NOT NULL,
    prev TEXT NOT NULL,
    hash TEXT NOT NULL,
    key TEXT NOT NULL,
    signature TEXT NOT NULL,
    PRIMARY KEY (environment, seq),
    UNIQUE (environment, id)
)""",
    "CREATE INDEX IF NOT EXISTS journal_of_run ON journal (environment, run, seq)",
    """CREATE TABLE IF NOT EXISTS book (
    environment TEXT PRIMARY KEY,
    version BIGINT NOT NULL,
    document TEXT NOT NULL,
    changes TEXT NOT NULL
)""",
)
# Who writes a run is asked before each record: without this all records of a long run would be read for the answer.
HOLDING = "kind IN ('run_started', 'run_resumed', 'run_finished')"
LAST = f"CREATE INDEX IF NOT EXISTS journal_holding ON journal (environment, run, seq) WHERE {HOLDING}"
"""What is made last of all: where it is, everything is."""
TRIGGERS_SQLITE = (
    "CREATE TRIGGER IF NOT EXISTS journal_no_update BEFORE UPDATE ON journal "
    "BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS journal_no_delete BEFORE DELETE ON journal "
    "BEGIN SELECT RAISE(ABORT, 'append-only'); END",
)
TRIGGERS_POSTGRESQL = (
    "CREATE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'append-only'; END $$",
    "CREATE TRIGGER journal_no_change BEFORE UPDATE OR DELETE ON journal FOR EACH ROW EXECUTE FUNCTION append_only()",
    "CREATE TRIGGER journal_no_truncate BEFORE TRUNCATE ON journal FOR EACH STATEMENT EXECUTE FUNCTION append_only()",
)


class Database(ABC):
    """One connection, shared by the threads of a process. ``shown`` names it without any secret."""

    shown: str

    @abstractmethod
    def read(self, sql: str, *parameters: Any) -> list[Row]:
        """The rows. Raises Problem."""

    @abstractmethod
    def write(self, environment: str, work: Callable[[Execute], T], patience_s: float = PATIENCE_S) -> T:
        """Do the work in one transaction, alone in its environment, durable on return. Raises Problem.

        A connection that is lost is made again and the work done again, also when it is not known whether the commit
        came through: the work must recognise what it has done already.
        """

    @abstractmethod
    def now(self, execute: Execute) -> float:
        """Unix seconds of the one clock that all writers share."""

    @abstractmethod
    def close(self) -> None: ...


def is_url(location: object) -> bool:
    return isinstance(location, str) and location.startswith(SCHEMES)


def connect(location: Path | str, *, read_only: bool = False, patience_s: float = PATIENCE_S) -> Database:
    """Open a journal's database; without read_only its tables are made when there are none. Raises Problem."""
    if is_url(location):
        return PostgreSQL(str(location), read_only=read_only, patience_s=patience_s)
    return SQLite(Path(location), read_only=read_only)


# -- SQLite


class SQLite(Database):
    """A file of its owner's. FULL and WAL: a record is on the disk when its append returns."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self.shown = path, str(path)
        self._mutex = threading.RLock()
        try:
            if read_only:
                self._db = self._read_only()
            else:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.parent.chmod(0o700)
                self._db = self._connect(f"{path.absolute().as_uri()}?mode=rwc")
                path.chmod(0o600)
                self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise Problem(
                f"The journal {path} cannot be opened ({one_line(str(error))})",
                code="journal-unopenable",
                next_command=f"ls -ld {path.parent} {path}",
            ) from error

    def _read_only(self) -> sqlite3.Connection:
        """Without the file this fails and makes none."""
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        try:
            db = self._connect(uri)
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            # A copy where nothing can be written, as auditors keep it; where a writer is at work its WAL is there.
            if not self.path.exists() or self.path.with_name(self.path.name + "-wal").exists():
                raise
            db = self._connect(f"{uri}&immutable=1")
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db

    @staticmethod
    def _connect(uri: str) -> sqlite3.Connection:
        # Statements outside an explicit transaction commit at once; the mutex is what guards the threads.
        return sqlite3.connect(uri, uri=True, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False)

    def _prepare(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self._db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError:
                # The change to WAL does not wait for others that make the same change.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._db.execute("PRAGMA synchronous = FULL")
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'journal_holding'").fetchone():
            return  # Whoever only reads waits for no writer.
        with self._transaction():
            columns = [row[1] for row in self._db.execute("PRAGMA table_info(journal)")]
            if columns and "hash" not in columns:
                # The layout before the chain. Its rows stay as they are, under another name (with their triggers).
                self._db.execute("ALTER TABLE journal RENAME TO journal_before")
                self._db.execute("DROP INDEX IF EXISTS journal_run")
            for statement in (*TABLES, *TRIGGERS_SQLITE, LAST):
                self._db.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _execute(self, sql: str, *parameters: Any) -> list[Row]:
        return self._db.execute(sql, parameters).fetchall()

    def read(self, sql: str, *parameters: Any) -> list[Row]:
        with self._mutex, self._told():
            return self._execute(sql, *parameters)

    def write(self, environment: str, work: Callable[[Execute], T], patience_s: float = PATIENCE_S) -> T:
        with self._mutex, self._told():
            self._db.execute(f"PRAGMA busy_timeout = {int(patience_s * 1000)}")
            with self._transaction():
                return work(self._execute)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise Problem(
                f"The journal {self.path} cannot be used ({one_line(str(error))})",
                code="journal-unusable",
                touched="What was done so far stays done",
                next_command=f"df -h {self.path.parent}",
            ) from error

    def now(self, execute: Execute) -> float:
        return time.time()

    def close(self) -> None:
        with self._mutex:
            self._db.close()


# -- PostgreSQL


def without_password(url: str) -> str:
    """The URL itself. Raises Problem when a password stands in it: it would end up in logs and process lists."""
    parts = urlsplit(url)
    given = parts.netloc.rpartition("@")[0]
    if ":" in given or any(name in ("password", "sslpassword") for name, _ in parse_qsl(parts.query)):
        host = parts.netloc.rpartition("@")[2]
        raise Problem(
            f"The journal's URL for {host} holds a password, which everybody could read in process lists and logs: it "
            "belongs into ~/.pgpass (mode 0600) as HOST:PORT:DATABASE:USER:PASSWORD",
            code="journal-password-in-url",
            next_command="editor ~/.pgpass",
        )
    return url


def _said(error: Exception) -> str:
    """What libpq said, which names hosts and users and never a password."""
    return one_line(str(error).partition("\n")[0])


class PostgreSQL(Database):
    """A database that several machines share. Passwords come by libpq's ways: PGPASSFILE, a service file."""

    # A frozen client loses its transaction soon, so that it does not keep the others waiting; a commit is on the disk
    # whatever the server's default is.
    OPTIONS = (
        "-c search_path=runbooks -c synchronous_commit=on -c idle_in_transaction_session_timeout=10s "
        "-c statement_timeout=15s -c lock_timeout=10s -c default_transaction_isolation=read\\ committed"
    )

    def __init__(self, url: str, *, read_only: bool = False, patience_s: float = PATIENCE_S) -> None:
        self._url = self.shown = without_password(url)
        self._read_only = read_only
        self._mutex = threading.RLock()
        self._db: psycopg.Connection[Row] | None = None
        self._again(lambda _: None, patience_s)
        if not read_only:
            self._again(self._prepare, patience_s)

    def _connection(self) -> psycopg.Connection[Row]:
        import psycopg

        if self._db is None or self._db.closed:
            self._db = psycopg.connect(
                self._url,
                autocommit=True,
                application_name="runbook",
                connect_timeout=5,
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                tcp_user_timeout=10_000,
                target_session_attrs="any" if self._read_only else "read-write",
                options=self.OPTIONS,
            )
        return self._db

    def _again(self, work: Callable[[Execute], T], patience_s: float) -> T:
        """Do it, again on a new connection when one is lost, for patience_s at most."""
        import psycopg

        deadline = time.monotonic() + patience_s
        while True:
            try:
                connection = self._connection()

                def execute(sql: str, *parameters: Any) -> list[Row]:
                    cursor = connection.execute(sql.replace("?", "%s"), parameters)  # noqa: B023 - used in this turn only
                    return cursor.fetchall() if cursor.description else []

                with connection.transaction():
                    return work(execute)
            except psycopg.Error as error:
                lost = isinstance(error, (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction))
                if not lost and self._db is not None and not self._db.closed:
                    raise Problem(
                        f"The journal {self.shown} cannot be used ({_said(error)})",
                        code="journal-unusable",
                        touched="What was done so far stays done",
                        next_command=f"psql '{self.shown}' -c '\\dp runbooks.*'",
                    ) from None
                self._drop()
                if time.monotonic() + RETRY_S > deadline:
                    raise Problem(
                        f"The journal {self.shown} cannot be reached ({_said(error)})",
                        code="journal-unreachable",
                        touched="What was done so far stays done",
                        next_command=f"psql '{self.shown}' -c 'SELECT 1'",
                    ) from None
                time.sleep(RETRY_S)

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _prepare(self, execute: Execute) -> None:
        if execute("SELECT to_regclass('runbooks.journal_holding')")[0][0]:
            return  # Whoever only writes records may not make tables.
        execute("SELECT pg_advisory_xact_lock(hashtext('runbooks'))")
        if execute("SELECT to_regclass('runbooks.journal_holding')")[0][0]:
            return
        execute("CREATE SCHEMA IF NOT EXISTS runbooks")
        for statement in (*TABLES, *TRIGGERS_POSTGRESQL, LAST):
            execute(statement)

    def read(self, sql: str, *parameters: Any) -> list[Row]:
        with self._mutex:
            return self._again(lambda execute: execute(sql, *parameters), PATIENCE_S)

    def write(self, environment: str, work: Callable[[Execute], T], patience_s: float = PATIENCE_S) -> T:
        def alone(execute: Execute) -> T:
            # The row of the environment's locks is what its writers queue at.
            if not execute("SELECT 1 FROM book WHERE environment = ? FOR UPDATE", environment):
                execute("INSERT INTO book VALUES (?, 0, '', '[]') ON CONFLICT DO NOTHING", environment)
                execute("SELECT 1 FROM book WHERE environment = ? FOR UPDATE", environment)
            return work(execute)

        with self._mutex:
            return self._again(alone, patience_s)

    def now(self, execute: Execute) -> float:
        return float(execute("SELECT extract(epoch FROM clock_timestamp())")[0][0])

    def close(self) -> None:
        with self._mutex:
            self._drop()
