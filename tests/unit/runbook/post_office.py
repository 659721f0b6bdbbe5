"""Receivers of notifications on this machine: they answer as they are told and keep what they got."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Office:
    """One HTTP receiver. answer: the number of the request -> status, headers, body; None never answers."""

    answer: Callable[[int], tuple[int, dict[str, str], bytes] | None]
    got: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, count: int, timeout_s: float = 10) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        while len(self.got) < count:
            assert time.monotonic() < deadline, f"{len(self.got)} of {count} requests came"
            time.sleep(0.02)
        return self.got


@contextmanager
def office(answer: Callable[[int], tuple[int, dict[str, str], bytes] | None]) -> Iterator[Office]:
    place = Office(answer)
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            document = json.loads(body) if "json" in self.headers["Content-Type"] else body.decode()
            place.got.append({"path": self.path, "headers": dict(self.headers), "body": document})
            told = place.answer(len(place.got))
            if told is None:
                released.wait(60)
                return
            status, headers, text = told
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    place.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield place
    finally:
        released.set()
        server.shutdown()
        server.server_close()


@contextmanager
def dripping() -> Iterator[int]:
    """The port of a server that answers one byte a tenth of a second, forever."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not ended.wait(0.1):
                    connection.sendall(b"a")
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        listener.close()


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ok(_: int) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, b"ok"


def accepted(_: int) -> tuple[int, dict[str, str], bytes]:
    return 202, {}, b'{"status":"success"}'
