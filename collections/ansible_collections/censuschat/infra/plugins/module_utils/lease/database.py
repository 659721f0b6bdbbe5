# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The guard's hands on the database of its own node: Patroni's REST API and PostgreSQL's own programs."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import ssl
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import etcd
from .gate import CommandError, run
from .model import LeaseError
from .planner import PatroniView

_LARGEST_ANSWER = 1 << 20
CLOSE_BYTES = 64 << 20
"""What a stopping primary sends to its standbys in a moment, on any link between regions."""
_STATE = re.compile(r"^Database cluster state:\s*(.+)$", re.MULTILINE)
_CHECKPOINT = re.compile(r"^Latest checkpoint location:\s*([0-9A-F]+/[0-9A-F]+)$", re.MULTILINE)


class DatabaseError(LeaseError):
    """Patroni or PostgreSQL of this node gave no usable answer."""


def lsn_number(lsn: str) -> int:
    """The byte position that a log sequence number such as 0/3000148 stands for."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


class Patroni:
    """Patroni's REST API. Changes need the client certificate of the node. Methods raise DatabaseError.

    url: this node's; region: all nodes' of this region; peers: all nodes' of the other; addresses: the other nodes'.
    """

    def __init__(
        self,
        url: str,
        *,
        region: Sequence[str],
        peers: Sequence[str],
        addresses: Sequence[str],
        tls: etcd.Tls | None,
        timeout_s: float = 1.5,
    ) -> None:
        self.url = url
        self.region = list(region)
        self.peers = list(peers)
        self.addresses = frozenset(addresses)
        self.timeout_s = timeout_s
        self._context: ssl.SSLContext | None = tls.context() if tls else None

    def observe(self) -> PatroniView:
        status = self._ask(self.url, "GET", "/patroni", any_status=True)
        return PatroniView(role=str(status.get("role", "")), config=self._ask(self.url, "GET", "/config"))

    def patch(self, change: Mapping[str, Any]) -> None:
        self._ask(self.url, "PATCH", "/config", change)

    def furthest_peer(self) -> tuple[str, int]:
        """The node of the other region that has received the most WAL, and how far (bytes)."""
        best = ("", 0)
        for peer in self.peers:
            try:
                best = max(best, (peer, self._received(peer)), key=lambda found: found[1])
            except DatabaseError:
                continue
        return best

    def is_followed(self, budget_s: float) -> bool:
        """On the primary: whether the other region streams, maybe through a replica, with little left to send."""
        end = time.monotonic() + budget_s
        location = int((self._ask(self.url, "GET", "/patroni", any_status=True).get("xlog") or {}).get("location") or 0)
        if not location or not any(self._streams(node) for node in self._in_time(self.region, end)):
            return False
        for peer in self._in_time(self.peers, end):
            try:
                if location - self._received(peer) < CLOSE_BYTES:
                    return True
            except DatabaseError:
                continue
        return False

    @staticmethod
    def _in_time(urls: Sequence[str], end: float) -> Iterator[str]:
        for url in urls:
            if time.monotonic() >= end:
                return
            yield url

    def _received(self, base: str) -> int:
        xlog = self._ask(base, "GET", "/patroni", any_status=True).get("xlog") or {}
        return max(int(xlog.get("received_location") or 0), int(xlog.get("replayed_location") or 0))

    def _streams(self, base: str) -> bool:
        try:
            senders = self._ask(base, "GET", "/patroni", any_status=True).get("replication") or []
        except DatabaseError:
            return False
        return any(s.get("client_addr") in self.addresses and s.get("state") == "streaming" for s in senders)

    def _ask(
        self, base: str, method: str, path: str, body: Mapping[str, Any] | None = None, any_status: bool = False
    ) -> dict[str, Any]:
        url = urllib.parse.urlsplit(base)
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(
                url.hostname or "", url.port or 8008, timeout=self.timeout_s, context=self._context
            )
        else:
            connection = http.client.HTTPConnection(url.hostname or "", url.port or 8008, timeout=self.timeout_s)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read(_LARGEST_ANSWER)
            # GET /patroni says how PostgreSQL is by its status; its JSON is there either way.
            if response.status != 200 and not any_status:
                raise DatabaseError(f"Patroni at {base} answered {method} {path} with HTTP {response.status}")
            answer = json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DatabaseError(f"Patroni at {base} gave no answer to {method} {path}: {error}") from error
        finally:
            connection.close()
        if not isinstance(answer, dict):
            raise DatabaseError(f"Patroni at {base} answered {method} {path} with something that is no object")
        return answer


@dataclasses.dataclass(frozen=True)
class Postgres:
    """PostgreSQL of this node, reached as its own account over the unix socket. Methods raise DatabaseError."""

    binaries: str = "/usr/lib/postgresql/15/bin"
    data: str = "/var/lib/postgresql/15/censuschat"
    socket: str = "/var/run/postgresql"
    user: str = "postgres"

    def _run(self, *argv: str, text: str = "", timeout_s: float = 2.0) -> str:
        try:
            return run(argv, text, timeout_s, user=self.user)
        except CommandError as error:
            raise DatabaseError(str(error)) from error

    def _query(self, sql: str) -> str:
        argv = [f"{self.binaries}/psql", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", self.socket]
        return self._run(*argv, "-U", self.user, "-d", "postgres", "-f", "-", text=sql).strip()

    def end_sessions(self) -> int:
        """End all client sessions that came over the network; how many. Replication goes on."""
        return int(
            self._query(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                " where backend_type = 'client backend' and client_addr is not null;"
            )
            or 0
        )

    def stop(self) -> None:
        """Fast, clean stop: ends only after connected standbys have been sent everything."""
        self._run(f"{self.binaries}/pg_ctl", "-s", "-D", self.data, "stop", "-m", "fast", "-t", "6", timeout_s=7.0)

    def shut_down_at(self) -> str:
        """The position of the last record if PostgreSQL is stopped cleanly; empty when it is not."""
        text = self._run(f"{self.binaries}/pg_controldata", "-D", self.data)
        state, checkpoint = _STATE.search(text), _CHECKPOINT.search(text)
        if state is None or checkpoint is None:
            raise DatabaseError(f"pg_controldata of {self.data} could not be understood")
        return checkpoint[1] if state[1].strip() == "shut down" else ""
