"""What both stand-in services are made of: an HTTP/1.1 server that ends gently, and a pool of kept connections.

Runs with the Python 3.11 of the services' image and its standard library.
"""

from __future__ import annotations

import json
import math
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, Protocol, TypeVar

MAX_BODY = 4096
"""Bytes of a request's body."""
IDLE_S = 60.0
"""Seconds after which a kept connection without a request is closed."""
DRAIN_S = 3.0
"""Seconds that a service goes on answering after SIGTERM: until then no proxy leads new connections here."""


class Unavailable(Exception):
    """What is behind the service did not do its part in time; the outcome of a write is then unknown."""


class Poolable(Protocol):
    """A connection as a pool sees it; ``closed`` is true once it cannot be used again."""

    @property
    def closed(self) -> bool: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Poolable)


class Pool(Generic[C]):
    """Connections that are reused, last in first out, for ``max_age_s`` at most. After a failure all idle ones are
    dropped: what broke one of them (a fail-over) has broken all."""

    def __init__(self, connect: Callable[[], C], size: int, timeout_s: float, max_age_s: float = math.inf) -> None:
        self._connect, self._timeout_s, self._max_age_s = connect, timeout_s, max_age_s
        self._slots = threading.BoundedSemaphore(size)
        self._idle: list[tuple[C, float]] = []
        self._lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[C]:
        """A connection for one unit of work; raises Unavailable when none becomes free in time."""
        if not self._slots.acquire(timeout=self._timeout_s):
            raise Unavailable("all connections are busy")
        connection, born = None, 0.0
        try:
            connection, born = self._reusable() or (self._connect(), time.monotonic())
            yield connection
        except BaseException:
            with self._lock:
                broken, self._idle = self._idle, []
            for each in [connection, *(c for c, _ in broken)]:
                if each is not None:
                    each.close()
            raise
        else:
            if time.monotonic() - born > self._max_age_s:
                connection.close()
            if not connection.closed:
                with self._lock:
                    self._idle.append((connection, born))
        finally:
            self._slots.release()

    def _reusable(self) -> tuple[C, float] | None:
        """An idle connection that nobody has closed meanwhile, None when there is none."""
        while True:
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            # Nothing is under way on an idle connection: what can be read there is its end.
            if idle is None or not select.select([idle[0]], [], [], 0)[0]:
                return idle
            idle[0].close()


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

    def handle_one_request(self) -> None:
        """One request; whoever ends the service waits for those that have begun."""
        try:
            super().handle_one_request()
        finally:
            self.server.done(self)

    def parse_request(self) -> bool:
        """Count the request as begun."""
        self.server.begun(self)
        return super().parse_request()

    def body(self) -> bytes | None:
        """The request's body; None when it was refused, which is answered here."""
        text = self.headers.get("Content-Length", "")
        if not text.isdigit():
            self.reply(411, {"error": "a Content-Length is needed"}, close=True)
            return None
        if int(text) > MAX_BODY:
            self.reply(413, {"error": f"at most {MAX_BODY} bytes"}, close=True)
            return None
        return self.rfile.read(int(text))

    def unavailable(self, error: Unavailable) -> None:
        """503 with the reason, and the end of the connection."""
        self.server.trouble(str(error))
        self.reply(503, {"error": str(error), "region": self.server.region}, close=True)

    def reply(self, status: int, body: dict[str, Any] | bytes, *, close: bool = False) -> None:
        """Answer with JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() + b"\n"
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
    """Listens, and keeps what the log should know."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[Handler], region: str) -> None:
        super().__init__(address, handler)
        self.region, self.ending = region, False
        self._active: set[Handler] = set()
        self._idle = threading.Condition()
        self._trouble: str | None = None
        self._since = 0.0
        self._said = 0.0
        self._lock = threading.Lock()

    def begun(self, handler: Handler) -> None:
        """A request has arrived."""
        with self._idle:
            self._active.add(handler)

    def done(self, handler: Handler) -> None:
        """It was answered, or its connection has ended."""
        with self._idle:
            self._active.discard(handler)
            self._idle.notify_all()

    def end(self, drain_s: float, patience_s: float) -> None:
        """Answer for ``drain_s`` with the advice to go elsewhere, then stop listening and let what has begun end."""
        self.ending = True
        time.sleep(drain_s)
        self.shutdown()
        with self._idle:
            self._idle.wait_for(lambda: not self._active, patience_s)

    def trouble(self, reason: str) -> None:
        """Log a new reason at once and a lasting one every 30 s."""
        with self._lock:
            now = time.monotonic()
            if self._trouble is None:
                self._since = now
            if (reason != self._trouble and now - self._said > 1) or now - self._said > 30:
                self._said = now
                print(f"not serving for {now - self._since:.1f} s: {reason}", flush=True)
            self._trouble = reason

    def fine(self) -> None:
        """Log the end of trouble."""
        if self._trouble is None:
            return
        with self._lock:
            if self._trouble is not None:
                print(f"serving again after {time.monotonic() - self._since:.1f} s", flush=True)
                self._trouble = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle of its request is its own affair; a defect of ours is not."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(server: Server, *, drain_s: float = DRAIN_S, patience_s: float = 5.0) -> None:
    """Serve until SIGTERM or SIGINT, then end gently; at most ``drain_s + patience_s`` later."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
    print(f"serving region {server.region} on port {server.server_address[1]}", flush=True)
    asked.wait()
    server.end(drain_s, patience_s)
    server.server_close()
