# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The guard's hands on the database of its own node: Patroni's REST API and PostgreSQL's own programs."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import ssl
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from . import etcd
from .gate import CommandError, run
from .model import LeaseError
from .planner import PatroniView

_LARGEST_ANSWER = 1 << 20
_STATE = re.compile(r"^Database cluster state:\s*(.+)$", re.MULTILINE)
_CHECKPOINT = re.compile(r"^Latest checkpoint location:\s*([0-9A-F]+/[0-9A-F]+)$", re.MULTILINE)


class DatabaseError(LeaseError):
    """Patroni or PostgreSQL of this node gave no usable answer."""


def lsn_number(lsn: str) -> int:
    """The byte position that a log sequence number such as 0/3000148 stands for."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


class Patroni:
    """Patroni's REST API. Changes need the client certificate of the node. Methods raise DatabaseError."""

    def __init__(self, url: str, peers: Sequence[str], tls: etcd.Tls | None, timeout_s: float = 1.5) -> None:
        self.url = url
        self.peers = list(peers)
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
                xlog = self._ask(peer, "GET", "/patroni", any_status=True).get("xlog") or {}
            except DatabaseError:
                continue
            received = max(int(xlog.get("received_location") or 0), int(xlog.get("replayed_location") or 0))
            best = max(best, (peer, received), key=lambda found: found[1])
        return best

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

    def _query(self, sql: str, **variables: str) -> str:
        argv = [f"{self.binaries}/psql", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", self.socket]
        argv += ["-U", self.user, "-d", "postgres", "-f", "-"]
        for name, value in variables.items():
            argv += ["-v", f"{name}={value}"]
        return self._run(*argv, text=sql).strip()

    def end_sessions(self) -> int:
        """End all client sessions that came over the network; how many. Replication goes on."""
        return int(
            self._query(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                " where backend_type = 'client backend' and client_addr is not null;"
            )
            or 0
        )

    def streams_to(self, addresses: Sequence[str]) -> bool:
        """Whether a node with one of these addresses replicates from here with little left to send."""
        return (
            self._query(
                # 64 MiB: a fast shutdown sends the rest in a moment on any link between regions.
                "select coalesce(bool_or(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn) < 67108864), false)"
                " from pg_stat_replication where state = 'streaming' and client_addr = any (:'addresses'::inet[]);",
                addresses="{" + ",".join(addresses) + "}",
            )
            == "t"
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
