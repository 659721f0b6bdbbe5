"""The stand-in of CensusChat's API gateway: what clients reach; it hands their requests to the query service.

GET  /healthz           200: the process answers (the query service is not asked)
GET  /readyz            what the query service says of itself; 503 with the reason when it cannot be asked
POST /rows, GET /rows   the query service's answer; 503 with the reason when it gave none

A request goes to the query service once: a write whose answer was lost may have happened. Only a connection that could
not be opened is tried a second time, which reaches another pod. A failure ends the client's connection: it then looks
the name up again instead of staying with a region that lost the right to write.

Environment: PORT, REGION, QUERY_HOST, QUERY_PORT, TIMEOUT_S, POOL_SIZE.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

from lab.services import web
from lab.services.web import Unavailable

CONNECT_S = 1.0
"""Seconds for a connection to a pod of the query service."""
MAX_AGE_S = 10.0
"""Seconds after which a kept connection is given up, so that new pods get their share."""


class Upstream(http.client.HTTPConnection):
    """A kept connection to the query service that never opens itself again."""

    auto_open = 0

    @property
    def closed(self) -> bool:
        """Whether it was closed, by either side."""
        return self.sock is None

    def fileno(self) -> int:
        """The socket's, for waiting on it."""
        return int(self.sock.fileno())


class Query:
    """The query service behind its one address."""

    def __init__(self, host: str, port: int, *, timeout_s: float, pool_size: int) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self._pool = web.Pool(self._connect, pool_size, timeout_s, MAX_AGE_S)

    def _connect(self) -> Upstream:
        connection = Upstream(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError:
            connection.connect()
        connection.sock.settimeout(self._timeout_s)
        return connection

    def ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body of its answer; raises Unavailable when there is none."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with self._pool.connection() as connection:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the query service does not answer: {error!r}") from error


class Server(web.Server):
    """The gateway on an address, in front of the query service."""

    def __init__(self, address: tuple[str, int], region: str, query: Query) -> None:
        super().__init__(address, Handler, region)
        self.query = query


class Handler(web.Handler):
    """The paths above."""

    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/healthz":
            self.reply(200, {"status": "ok", "region": self.server.region})
        elif path in ("/readyz", "/rows"):
            self._forward(None)
        else:
            self.reply(404, {"error": "unknown path; there are /healthz, /readyz and /rows"})

    def do_POST(self) -> None:
        body = self.body()
        if body is None:
            return
        if urlsplit(self.path).path == "/rows":
            self._forward(body)
        else:
            self.reply(404, {"error": "unknown path; POST goes to /rows"})

    def _forward(self, body: bytes | None) -> None:
        try:
            status, answer = self.server.query.ask(self.command, self.path, body)
        except Unavailable as error:
            self.unavailable(error)
            return
        if status >= 500:
            self.server.trouble(f"the query service: HTTP {status}")
        else:
            self.server.fine()
        self.reply(status, answer, close=status >= 500)


def build(environment: Mapping[str, str]) -> Server:
    """The gateway that the environment describes; raises KeyError or ValueError when it does not."""
    address = ("", int(environment["PORT"]))
    query = Query(
        environment["QUERY_HOST"],
        int(environment["QUERY_PORT"]),
        timeout_s=float(environment["TIMEOUT_S"]),
        pool_size=int(environment["POOL_SIZE"]),
    )
    return Server(address, environment["REGION"], query)


def main() -> int:
    """Serve as the environment says, until SIGTERM."""
    try:
        server = build(os.environ)
    except (OSError, ValueError, KeyError) as error:
        print(f"the gateway cannot start: {error!r}", file=sys.stderr)
        return 1
    web.serve(server, patience_s=float(os.environ["TIMEOUT_S"]) + 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
