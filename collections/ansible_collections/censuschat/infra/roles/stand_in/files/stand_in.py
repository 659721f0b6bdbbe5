"""CensusChat's stand-in: the smallest real service that shows whether a region serves.

It acknowledges a row only when PostgreSQL has committed it and PostgreSQL and Redis have given it back. Every failure
is quick (``timeout_s``) and plain: 503 with the reason, and the connection closed, so that a client with a kept
connection looks the name up again.

GET  /healthz           200: the process answers (nothing behind it is asked)
GET  /readyz            200: a row could be written and Redis answered; 503 with the reason otherwise
POST /rows              {"client": TEXT, "n": NUMBER} -> 201 {"client", "n", "region", "timeline"}
GET  /rows?client=TEXT  200 {"n": [NUMBER, ...]}: all rows of that client
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

CLIENT = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_BODY = 4096
MAX_N = 2**63 - 1
IDLE_S = 60.0
"""Seconds after which a kept connection without a request is closed."""


class Unavailable(Exception):
    """What is behind the service did not do its part in time; the outcome of a write is then unknown."""


class Conflict(Exception):
    """The row exists: its number was used before."""


class Store(Protocol):
    """Where rows go; ``timeline`` is PostgreSQL's, read in the transaction that wrote the row."""

    def write(self, client: str, n: int) -> int: ...

    def numbers(self, client: str) -> list[int]: ...

    def probe(self) -> int: ...


class Pool:
    """Connections that are reused, last in first out. After a failure all idle ones are dropped: what broke one of them
    (a fail-over) has broken all."""

    def __init__(self, connect: Callable[[], Any], size: int, timeout_s: float) -> None:
        self._connect, self._timeout_s = connect, timeout_s
        self._slots = threading.BoundedSemaphore(size)
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection for one unit of work; raises Unavailable when none becomes free in time."""
        if not self._slots.acquire(timeout=self._timeout_s):
            raise Unavailable("all database connections are busy")
        connection = None
        try:
            connection = self._reusable()
            if connection is None:
                connection = self._connect()
            yield connection
        except BaseException:
            with self._lock:
                broken, self._idle = self._idle, []
            for each in [connection, *broken]:
                if each is not None:
                    each.close()
            raise
        else:
            with self._lock:
                self._idle.append(connection)
        finally:
            self._slots.release()

    def _reusable(self) -> Any:
        """An idle connection that nobody has closed meanwhile, None when there is none."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            # Nothing is under way on an idle connection: what can be read there is its end.
            if connection is None or not select.select([connection], [], [], 0)[0]:
                return connection
            connection.close()


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
    """PostgreSQL and Redis as the service uses them, each at its one address on this node."""

    def __init__(self, config: dict[str, Any]) -> None:
        import psycopg
        import redis

        self._psycopg, self._redis_errors = psycopg, redis.RedisError
        self._region: str = config["region"]
        self._timeout_s = float(config["timeout_s"])
        self._probe_client = f"readyz.{socket.gethostname()}"
        self._database: dict[str, Any] = config["database"]
        self._pool = Pool(self._connect, int(config["pool_size"]), self._timeout_s)
        self._redis = redis.Redis(
            socket_timeout=self._timeout_s, socket_connect_timeout=self._timeout_s, **config["redis"]
        )

    def _connect(self) -> Any:
        milliseconds = int(self._timeout_s * 1000)
        connection = self._psycopg.connect(
            autocommit=True,
            connect_timeout=max(2, round(self._timeout_s)),
            tcp_user_timeout=milliseconds,
            options=f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            application_name="censuschat-stand-in",
            **self._database,
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


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with kept connections; one thread each."""

    protocol_version = "HTTP/1.1"
    server_version = "censuschat-stand-in"
    sys_version = ""
    timeout = IDLE_S
    # Head and body leave in one segment (flushed after each request): two would wait for an acknowledgement.
    wbufsize = 65536
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/healthz":
            self._reply(200, {"status": "ok", "region": self.server.region})
        elif url.path == "/readyz":
            self._serve(200, lambda: {"status": "ready", "region": self.server.region, "timeline": self._store.probe()})
        elif url.path == "/rows":
            client = parse_qs(url.query).get("client", [""])[0]
            if not CLIENT.fullmatch(client):
                self._reply(400, {"error": "give client=NAME (letters, digits, . _ -, at most 64)"})
                return
            self._serve(200, lambda: {"n": self._store.numbers(client)})
        else:
            self._reply(404, {"error": "unknown path; there are /healthz, /readyz and /rows"})

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        if urlsplit(self.path).path != "/rows":
            self._reply(404, {"error": "unknown path; POST goes to /rows"})
            return
        try:
            data = json.loads(body)
            client, n = data["client"], data["n"]
        except (ValueError, KeyError, TypeError):
            client, n = None, None
        if not isinstance(client, str) or not CLIENT.fullmatch(client):
            self._reply(
                400, {"error": 'the body must be {"client": NAME, "n": NUMBER}; client is missing or not a name'}
            )
            return
        if not isinstance(n, int) or isinstance(n, bool) or not 0 < n <= MAX_N:
            self._reply(400, {"error": f"n must be a whole number from 1 to {MAX_N}"})
            return
        self._serve(
            201,
            lambda: {"client": client, "n": n, "region": self.server.region, "timeline": self._store.write(client, n)},
        )

    @property
    def _store(self) -> Store:
        return self.server.store

    def _body(self) -> bytes | None:
        text = self.headers.get("Content-Length", "")
        if not text.isdigit():
            self._reply(411, {"error": "a Content-Length is needed"}, close=True)
            return None
        if int(text) > MAX_BODY:
            self._reply(413, {"error": f"at most {MAX_BODY} bytes"}, close=True)
            return None
        return self.rfile.read(int(text))

    def _serve(self, status: int, work: Callable[[], dict[str, Any]]) -> None:
        try:
            result = work()
        except Conflict as error:
            self._reply(409, {"error": str(error)})
        except Unavailable as error:
            self.server.trouble(str(error))
            self._reply(503, {"error": str(error), "region": self.server.region}, close=True)
        else:
            self.server.fine()
            self._reply(status, result)

    def _reply(self, status: int, body: dict[str, Any], *, close: bool = False) -> None:
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if close or self.server.ending:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged one by one; changes between fine and trouble are (Server.trouble)."""


class Server(ThreadingHTTPServer):
    """Listens, and keeps what the journal should know."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], region: str, store: Store) -> None:
        super().__init__(address, Handler)
        self.region, self.store, self.ending = region, store, False
        self._trouble: str | None = None
        self._since = 0.0
        self._said = 0.0
        self._lock = threading.Lock()

    def trouble(self, reason: str) -> None:
        """Log a new reason at once and a lasting one every 30 s."""
        with self._lock:
            now = time.monotonic()
            if self._trouble is None:
                self._since = now
            if (reason != self._trouble and now - self._said > 1) or now - self._said > 30:
                self._said = now
                print(f"<4>not serving for {now - self._since:.1f} s: {reason}", flush=True)
            self._trouble = reason

    def fine(self) -> None:
        """Log the end of trouble."""
        if self._trouble is None:
            return
        with self._lock:
            if self._trouble is not None:
                print(f"<5>serving again after {time.monotonic() - self._since:.1f} s", flush=True)
                self._trouble = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle of its request is its own affair; a defect of ours is not."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def notify(state: str) -> None:
    """Tell systemd; nothing when it did not start us."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def main() -> int:
    """Serve with the configuration file given, until SIGTERM."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} CONFIGURATION.json", file=sys.stderr)
        return 2
    try:
        config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        server = Server((config["address"], int(config["port"])), config["region"], DataServices(config))
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"<3>cannot start with {sys.argv[1]}: {error!r}", file=sys.stderr)
        return 1

    def end(_signal: int, _frame: Any) -> None:
        server.ending = True
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print(f"<5>serving region {server.region} on {config['address']}:{config['port']}", flush=True)
    notify("READY=1")
    server.serve_forever(poll_interval=0.2)
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
