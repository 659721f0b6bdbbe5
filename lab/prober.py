"""A client of the service that writes numbered rows and keeps a ledger of what it was told.

Two kinds, each a process of its own:

``python -m lab.prober outside`` is a client on the internet: it resolves the service's name through the lab's DNS and
posts rows to the record's addresses in turn, on a new connection each time (``fresh``) or on one connection that it
keeps until it breaks (``kept``).

``python -m lab.prober session`` is a program inside a region that holds one open PostgreSQL session and writes rows
through it, as long as the database lets it; it is run in the region's client namespace.

A number is used for one attempt only: a write without an acknowledgement may exist, and would blur the count if its
number came again.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from lab.resolve import Names, UnresolvedError
from runbooks.ledger import LedgerWriter

RATE = 10.0
"""Writes per second of one client."""
ATTEMPT_S = 1.0
"""Seconds an outside client gives one attempt, connecting and answering each."""
SESSION_S = 60.0
"""Seconds a session waits for one answer. Long on purpose: an acknowledgement that comes late must be seen."""


class Ended(Exception):
    """The client was told to end."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The service acknowledged: the writer's region and timeline, and where the client was connected."""

    region: str
    timeline: int
    address: str


class AttemptError(Exception):
    """No acknowledgement: why, and where the client was connected, if anywhere."""

    def __init__(self, why: str, address: str | None = None) -> None:
        super().__init__(" ".join(why.split())[:300])
        self.address = address


class Client(Protocol):
    """What makes one attempt."""

    def attempt(self, n: int) -> Ack: ...

    def close(self) -> None: ...


class HttpClient:
    """Posts rows to the service. ``kept``: one connection until it breaks; otherwise a new one for each row."""

    def __init__(self, ledger: LedgerWriter, names: Names, service: str, port: int, *, kept: bool) -> None:
        self._ledger, self._names, self._service, self._port, self._kept = ledger, names, service, port, kept
        self._connection: http.client.HTTPConnection | None = None
        self._turn = 0

    def attempt(self, n: int) -> Ack:
        """One POST; after a failure the next address has its turn.

        Raises AttemptError unless the row was acknowledged.
        """
        connection, address = self._connect()
        try:
            body = json.dumps({"client": self._ledger.client, "n": n})
            connection.request("POST", "/rows", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.will_close or not self._kept:
                self._drop(None if response.status == 201 else f"HTTP {response.status}")
            if response.status != 201:
                raise AttemptError(f"HTTP {response.status} {answer.decode(errors='replace')}", address)
            row = json.loads(answer)
            if (row["client"], row["n"]) != (self._ledger.client, n):
                raise AttemptError(f"another row was acknowledged: {answer.decode(errors='replace')}", address)
            return Ack(str(row["region"]), int(row["timeline"]), address)
        except AttemptError:
            self._turn += 1
            raise
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            self._turn += 1
            self._drop(repr(error))
            raise AttemptError(repr(error), address) from error

    def _connect(self) -> tuple[http.client.HTTPConnection, str]:
        if self._connection is not None:
            return self._connection, self._connection.host
        try:
            addresses = self._names.addresses(self._service)
        except UnresolvedError as error:
            raise AttemptError(str(error)) from error
        address = addresses[self._turn % len(addresses)]
        connection = http.client.HTTPConnection(address, self._port, timeout=ATTEMPT_S)
        # Otherwise http.client would quietly open a closed connection again, without asking for the name.
        connection.auto_open = 0
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            self._turn += 1
            raise AttemptError(f"connect: {error!r}", address) from error
        self._connection = connection
        if self._kept:
            self._ledger.write("connect", address=address)
        return connection, address

    def _drop(self, why: str | None) -> None:
        if self._connection is not None:
            if self._kept:
                self._ledger.write("break", address=self._connection.host, detail=why or "closed by the service")
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


# The timeline as in the query service: from the log's position, in the statement that writes.
INSERT = """
WITH written AS (INSERT INTO rows (client, n, region) VALUES (%s, %s, %s) RETURNING n)
SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int, host(inet_server_addr())
FROM written
"""


class SessionClient:
    """Writes rows through one PostgreSQL session that stays open until the other side ends it."""

    def __init__(self, ledger: LedgerWriter, conninfo: Mapping[str, Any], regions: Mapping[str, str]) -> None:
        import psycopg  # not needed, and not quick to load, for the other clients

        self._psycopg, self._ledger, self._conninfo = psycopg, ledger, dict(conninfo)
        self._networks = {name: ipaddress.ip_network(cidr) for name, cidr in regions.items()}
        self._connection: Any = None
        self._warnings: list[str] = []

    def attempt(self, n: int) -> Ack:
        """One INSERT, committed; raises AttemptError unless it was acknowledged without a warning."""
        address = None
        try:
            if self._connection is None:
                self._connect()
            address = str(self._connection.info.hostaddr)
            self._warnings.clear()
            with deadline(self._connection.fileno(), SESSION_S):
                values = (self._ledger.client, n, self._ledger.side)
                timeline, server = self._connection.execute(INSERT, values).fetchone()
        except self._psycopg.Error as error:
            self._drop(str(error))
            raise AttemptError(str(error) or repr(error), address) from error
        if self._warnings:
            # "Committed locally, but might not have been replicated" is no acknowledgement.
            raise AttemptError(self._warnings[0], address)
        return Ack(self._region(server), int(timeline), str(server))

    def _connect(self) -> None:
        connection = self._psycopg.connect(autocommit=True, **self._conninfo)
        connection.add_notice_handler(self._note)
        self._connection = connection
        self._ledger.write("connect", address=str(connection.info.hostaddr))

    def _note(self, diagnostic: Any) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            self._warnings.append(str(diagnostic.message_primary))

    def _region(self, server: str) -> str:
        """The region of the database node that answered: by its address, whatever way led to it."""
        address = ipaddress.ip_address(server)
        return next((name for name, network in self._networks.items() if address in network), "unknown")

    def _drop(self, why: str) -> None:
        if self._connection is not None and self._connection.broken:
            self._ledger.write("break", address=str(self._conninfo.get("host")), detail=" ".join(why.split())[:300])
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextlib.contextmanager
def deadline(fileno: int, seconds: float) -> Iterator[None]:
    """Shut the socket down after ``seconds``, so that whoever waits on it fails."""
    handle = socket.socket(fileno=os.dup(fileno))

    def end() -> None:
        with contextlib.suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        handle.close()


def write_rows(
    client: Client,
    ledger: LedgerWriter,
    first: int,
    rate: float = RATE,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Attempt after attempt, ``rate`` per second at most, until Ended is raised; returns the next unused number."""
    n, due = first, time.monotonic()
    try:
        while True:
            pause = due - time.monotonic()
            if pause > 0:
                sleep(pause)
            due = max(due, time.monotonic()) + 1 / rate
            try:
                ack = client.attempt(n)
            except AttemptError as error:
                ledger.write("fail", n=n, address=error.address, detail=str(error))
            else:
                ledger.write("ack", n=n, region=ack.region, timeline=ack.timeline, address=ack.address)
            n += 1
    except Ended:
        return n + 1
    finally:
        client.close()


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lab.prober", description="A client that keeps a ledger.")
    kinds = top.add_subparsers(dest="kind", required=True)
    for kind in ("outside", "session"):
        sub = kinds.add_parser(kind)
        sub.add_argument("--client", required=True, help="its name in the ledger and in the rows")
        sub.add_argument("--ledger", type=Path, required=True)
        sub.add_argument("--first", type=int, default=1, help="its first number")
        sub.add_argument("--rate", type=float, default=RATE, help="writes per second")
        if kind == "outside":
            sub.add_argument("--mode", choices=["fresh", "kept"], required=True)
            sub.add_argument("--service", required=True, help="the service's name")
            sub.add_argument("--port", type=int, required=True)
            sub.add_argument("--dns-address", default="127.0.0.1")
            sub.add_argument("--dns-port", type=int, default=15353)
        else:
            sub.add_argument("--side", required=True, help="the region it runs in")
            sub.add_argument("--conninfo", required=True, help="libpq's, without the password (PGPASSWORD has it)")
            sub.add_argument("--regions", type=json.loads, required=True, help='{"REGION": "CIDR", ...}')
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Write until SIGTERM or SIGINT; 0 then."""
    arguments = _parser().parse_args(argv)

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise Ended

    side = "outside" if arguments.kind == "outside" else arguments.side
    with LedgerWriter(arguments.ledger, arguments.client, side) as ledger:
        ledger.start({"kind": arguments.kind, "first": arguments.first})
        client: Client
        if arguments.kind == "outside":
            names = Names(arguments.dns_address, arguments.dns_port)
            kept = arguments.mode == "kept"
            client = HttpClient(ledger, names, arguments.service, arguments.port, kept=kept)
        else:
            from psycopg.conninfo import conninfo_to_dict

            client = SessionClient(ledger, conninfo_to_dict(arguments.conninfo), arguments.regions)
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        with contextlib.suppress(Ended):
            write_rows(client, ledger, arguments.first, arguments.rate)
        ledger.write("stop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
