"""The stand-in of CensusChat's query service: writes rows to PostgreSQL and Redis and reads them back.

It acknowledges a row only when PostgreSQL has committed it and PostgreSQL and Redis have given it back. Every failure
is quick (``TIMEOUT_S``) and plain: 503 with the reason, and the connection closed.

GET  /healthz           200: the process answers (nothing behind it is asked)
GET  /readyz            200: a row could be written and Redis answered; 503 with the reason otherwise
POST /rows              {"client": TEXT, "n": NUMBER} -> 201 {"client", "n", "region", "timeline"}
GET  /rows?client=TEXT  200 {"n": [NUMBER, ...]}: all rows of that client

Environment: PORT, REGION, TIMEOUT_S, POOL_SIZE; libpq's own PGHOST, PGPORT, PGDATABASE, PGUSER, PGSSLMODE,
PGSSLROOTCERT; REDIS_HOST, REDIS_PORT; SECRETS, a directory with the files database-password and redis-password.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from lab.services import web
from lab.services.web import Unavailable

CLIENT = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_N = 2**63 - 1


class Conflict(Exception):
    """The row exists: its number was used before."""


class Store(Protocol):
    """Where rows go; ``timeline`` is PostgreSQL's, read in the transaction that wrote the row."""

    def write(self, client: str, n: int) -> int: ...

    def numbers(self, client: str) -> list[int]: ...

    def probe(self) -> int: ...


class Deadline:
    """Ends work on a connection that takes longer than ``timeout_s`` by shutting its socket down.

    Not by a cancel request: a commit that waits for the synchronous standby answers that with success and a warning.
    """

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True

    def _end(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        self._socket.close()


# The timeline comes from the write-ahead log's position, not from pg_control_checkpoint(): that one still names the old
# timeline between a promotion and the first checkpoint after it.
INSERT = """
WITH written AS (INSERT INTO rows (client, n, region) VALUES (%s, %s, %s) RETURNING n)
SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int FROM written
"""
PROBE = """
WITH written AS (
  INSERT INTO rows (client, n, region) VALUES (%s, 0, %s)
  ON CONFLICT (client, n) DO UPDATE SET at = now(), region = excluded.region RETURNING n)
SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int FROM written
"""


class DataServices:
    """PostgreSQL and Redis as the service uses them, each at its one address on the pod's node."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._psycopg: Any = importlib.import_module("psycopg")
        redis: Any = importlib.import_module("redis")
        secrets = Path(environment["SECRETS"])
        self._redis_errors = redis.RedisError
        self._region = environment["REGION"]
        self._timeout_s = float(environment["TIMEOUT_S"])
        # One row a node and not a pod: pods come and go.
        self._probe_client = f"readyz.{environment['NODE_NAME']}"
        self._password = (secrets / "database-password").read_text(encoding="utf-8").strip()
        self._pool: web.Pool[Any] = web.Pool(self._connect, int(environment["POOL_SIZE"]), self._timeout_s)
        self._redis = redis.Redis(
            host=environment["REDIS_HOST"],
            port=int(environment["REDIS_PORT"]),
            password=(secrets / "redis-password").read_text(encoding="utf-8").strip(),
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
        )

    def _connect(self) -> Any:
        milliseconds = int(self._timeout_s * 1000)
        # Host, port, database, user and TLS: libpq reads them from the environment by itself.
        connection = self._psycopg.connect(
            autocommit=True,
            connect_timeout=max(2, round(self._timeout_s)),
            tcp_user_timeout=milliseconds,
            options=f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            application_name="censuschat-query",
            password=self._password,
        )
        connection.prepare_threshold = 1
        return connection

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """A connection with a deadline. A warning fails the work: PostgreSQL commits with one when the synchronous
        standby has not confirmed, and such a row must not be acknowledged."""
        warnings: list[str] = []

        def note(diagnostic: Any) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(str(diagnostic.message_primary))

        try:
            with self._pool.connection() as connection:
                connection.add_notice_handler(note)
                with Deadline(connection, self._timeout_s):
                    yield connection
                connection.remove_notice_handler(note)
                if warnings:
                    raise Unavailable(f"database: {warnings[0]}")
        except self._psycopg.errors.UniqueViolation as error:
            raise Conflict("the row exists") from error
        except self._psycopg.Error as error:
            raise Unavailable(f"database: {' '.join(str(error).split())}") from error

    def _cached(self, key: str, value: str) -> None:
        try:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.set(key, value, ex=300)
            pipeline.get(key)
            found = pipeline.execute()[1]
        except self._redis_errors as error:
            raise Unavailable(f"redis: {error}") from error
        if found != value.encode():
            raise Unavailable("redis: gave back something else than was written")

    def write(self, client: str, n: int) -> int:
        with self._session() as connection:
            timeline = int(connection.execute(INSERT, (client, n, self._region)).fetchone()[0])
            found = connection.execute("SELECT region FROM rows WHERE client = %s AND n = %s", (client, n)).fetchone()
        if found is None or found[0] != self._region:
            raise Unavailable("database: did not give back the row that it had committed")
        self._cached(f"row:{client}:{n}", f"{self._region}/{timeline}")
        return timeline

    def numbers(self, client: str) -> list[int]:
        with self._session() as connection:
            rows = connection.execute("SELECT n FROM rows WHERE client = %s ORDER BY n", (client,)).fetchall()
        return [row[0] for row in rows]

    def probe(self) -> int:
        with self._session() as connection:
            timeline = int(connection.execute(PROBE, (self._probe_client, self._region)).fetchone()[0])
        self._cached(f"probe:{self._probe_client}", str(timeline))
        return timeline


class Server(web.Server):
    """The query service on an address, with its store."""

    def __init__(self, address: tuple[str, int], region: str, store: Store) -> None:
        super().__init__(address, Handler, region)
        self.store = store


class Handler(web.Handler):
    """The paths above."""

    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        region, store = self.server.region, self.server.store
        if url.path == "/healthz":
            self.reply(200, {"status": "ok", "region": region})
        elif url.path == "/readyz":
            self._serve(200, lambda: {"status": "ready", "region": region, "timeline": store.probe()})
        elif url.path == "/rows":
            client = parse_qs(url.query).get("client", [""])[0]
            if not CLIENT.fullmatch(client):
                self.reply(400, {"error": "give client=NAME (letters, digits, . _ -, at most 64)"})
                return
            self._serve(200, lambda: {"n": store.numbers(client)})
        else:
            self.reply(404, {"error": "unknown path; there are /healthz, /readyz and /rows"})

    def do_POST(self) -> None:
        body = self.body()
        if body is None:
            return
        if urlsplit(self.path).path != "/rows":
            self.reply(404, {"error": "unknown path; POST goes to /rows"})
            return
        try:
            data = json.loads(body)
            client, n = data["client"], data["n"]
        except (ValueError, KeyError, TypeError):
            client, n = None, None
        if not isinstance(client, str) or not CLIENT.fullmatch(client):
            self.reply(
                400, {"error": 'the body must be {"client": NAME, "n": NUMBER}; client is missing or not a name'}
            )
            return
        if not isinstance(n, int) or isinstance(n, bool) or not 0 < n <= MAX_N:
            self.reply(400, {"error": f"n must be a whole number from 1 to {MAX_N}"})
            return
        region, store = self.server.region, self.server.store
        self._serve(201, lambda: {"client": client, "n": n, "region": region, "timeline": store.write(client, n)})

    def _serve(self, status: int, work: Callable[[], dict[str, Any]]) -> None:
        try:
            result = work()
        except Conflict as error:
            self.reply(409, {"error": str(error)})
        except Unavailable as error:
            self.unavailable(error)
        else:
            self.server.fine()
            self.reply(status, result)


def main() -> int:
    """Serve as the environment says, until SIGTERM."""
    try:
        server = Server(("", int(os.environ["PORT"])), os.environ["REGION"], DataServices(os.environ))
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"the query service cannot start: {error!r}", file=sys.stderr)
        return 1
    web.serve(server, patience_s=float(os.environ["TIMEOUT_S"]) + 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
