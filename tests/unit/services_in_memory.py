"""The services with a store in memory: what several tests put behind a port."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from lab.services import gateway, query, web


class Memory:
    """A store in memory that can be made to fail."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.broken: str | None = None
        self.pause = threading.Event()
        self.pause.set()

    def _check(self) -> None:
        self.pause.wait(5)
        if self.broken:
            raise web.Unavailable(self.broken)

    def write(self, client: str, n: int) -> int:
        self._check()
        if n in self.rows.setdefault(client, []):
            raise query.Conflict("the row exists")
        self.rows[client].append(n)
        return 3

    def numbers(self, client: str) -> list[int]:
        self._check()
        return self.rows.get(client, [])

    def probe(self) -> int:
        self._check()
        return 3


class Running:
    """A server in a thread."""

    def __init__(self, server: web.Server) -> None:
        self.server = server
        self.port: int = server.server_address[1]
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Region:
    """A region's query service and, before it, its gateway at an address."""

    def __init__(self, name: str, address: str, port: int, store: Memory) -> None:
        self.store = store
        self.query = Running(query.Server(("127.0.0.1", 0), name, store))
        self.front = gateway.Query("127.0.0.1", self.query.port, timeout_s=3, pool_size=8)
        self.gateway = Running(gateway.Server((address, port), name, self.front))
        self.port = self.gateway.port

    def close(self) -> None:
        self.gateway.close()
        self.query.close()
