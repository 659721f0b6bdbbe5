# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hands of patroni_cluster: Patroni's REST API and this node's PostgreSQL. Standard library only."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import re
import ssl
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.cluster import (
    Local,
    Member,
    Node,
    View,
    position,
)

_STATE = re.compile(r"^Database cluster state:\s*(.+)$", re.MULTILINE)
_CHECKPOINT = re.compile(r"^Latest checkpoint location:\s*([0-9A-F]+/[0-9A-F]+)$", re.MULTILINE)


class ClusterError(Exception):
    """A failure the user can act on."""


class Rest:
    """Patroni's REST API, of this node and of others. `timeout_s` is for one request."""

    def __init__(self, ca_file: str, cert_file: str, key_file: str, timeout_s: float = 2.0) -> None:
        self.timeout_s = timeout_s
        try:
            self.context = ssl.create_default_context(cafile=ca_file)
            self.context.load_cert_chain(cert_file, key_file)
        except OSError as error:
            raise ClusterError(f"{ca_file}, {cert_file} or {key_file} cannot be used: {error}") from error

    def ask(self, base: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """One request: status and text. ClusterError when there is no answer."""
        url = urllib.parse.urlsplit(base)
        connection = http.client.HTTPSConnection(
            url.hostname or "", url.port or 8008, timeout=self.timeout_s, context=self.context
        )
        with contextlib.closing(connection):
            try:
                connection.request(method, path, None if body is None else json.dumps(body))
                answer = connection.getresponse()
                return answer.status, answer.read().decode("utf-8", "replace")
            except (OSError, http.client.HTTPException) as error:
                raise ClusterError(f"Patroni at {base} does not answer: {error}") from error

    def get(self, base: str, path: str) -> dict[str, Any]:
        """A GET whose answer is an object, whatever its status: Patroni tells health by the status."""
        text = self.ask(base, "GET", path)[1]
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise ClusterError(f"Patroni at {base} answered GET {path} without JSON") from error
        return answer if isinstance(answer, dict) else {}

    def change(self, base: str, method: str, path: str, body: Mapping[str, Any]) -> None:
        """A request that changes something; ClusterError unless it is accepted."""
        status, text = self.ask(base, method, path, body)
        if status not in (200, 202):
            raise ClusterError(f"Patroni at {base} refused {method} {path} with {status}: {text.strip()[:300]}")


def node_of(url: str, answer: Mapping[str, Any]) -> Node:
    """Patroni's own words about its PostgreSQL, as a Node."""
    xlog = answer.get("xlog") or {}
    written = int(xlog.get("location") or 0)
    replayed = int(xlog.get("replayed_location") or 0)
    received = max(int(xlog.get("received_location") or 0), replayed)
    return Node(
        url=url,
        role=str(answer.get("role") or ""),
        state=str(answer.get("state") or ""),
        timeline=int(answer.get("timeline") or 0),
        received=written or received,
        replayed=written or replayed,
        followers=frozenset(
            str(r["client_addr"])
            for r in answer.get("replication") or []
            if r.get("state") == "streaming" and r.get("client_addr")
        ),
    )


def member_of(entry: Mapping[str, Any]) -> Member:
    """One entry of GET /cluster."""
    api = urllib.parse.urlsplit(str(entry.get("api_url") or ""))
    return Member(
        name=str(entry.get("name") or ""),
        role=str(entry.get("role") or ""),
        state=str(entry.get("state") or ""),
        host=str(entry.get("host") or api.hostname or ""),
        url=f"{api.scheme}://{api.netloc}",
        timeline=int(entry.get("timeline") or 0),
        pending_restart=bool(entry.get("pending_restart")),
    )


class Cluster:
    """A region's cluster seen from one of its nodes."""

    def __init__(self, rest: Rest, url: str, *, name: str, peers: Sequence[str], data: str, binaries: str) -> None:
        self.rest = rest
        self.url = url
        self.name = name
        self.peers = list(peers)
        self.data = data
        self.binaries = binaries
        self.commands = Commands()

    def observe(self, *, local: bool) -> View:
        """One look; never raises. `local`: look at this node's PostgreSQL too."""
        own = self._local() if local else Local()
        with concurrent.futures.ThreadPoolExecutor(max_workers=len(self.peers) + 1) as pool:
            # Side by side: nodes of a region that is cut off each take a whole timeout.
            asked = [pool.submit(self._peer, url) for url in self.peers]
            try:
                cluster = self.rest.get(self.url, "/cluster")
                members = tuple(member_of(m) for m in cluster.get("members") or [])
                config = self.rest.get(self.url, "/config")
                leading = View(members=members).leading
                leader = node_of(leading.url, self.rest.get(leading.url, "/patroni")) if leading else None
            except ClusterError as error:
                return View(error=str(error), local=own, peers=tuple(a.result() for a in asked))
            peers = tuple(a.result() for a in asked)
        return View(members=members, config=config, leader=leader, local=own, peers=peers)

    def _peer(self, url: str) -> Node:
        try:
            return node_of(url, self.rest.get(url, "/patroni"))
        except ClusterError:
            return Node(url)

    def _local(self) -> Local:
        streaming = self._as_postgres(
            f"{self.binaries}/psql", "-XAtqc", "select count(*) from pg_stat_wal_receiver where status = 'streaming'"
        )
        control = self._as_postgres(f"{self.binaries}/pg_controldata", "-D", self.data)
        state, checkpoint = _STATE.search(control), _CHECKPOINT.search(control)
        return Local(
            name=self.name,
            receiving=streaming.strip() == "1",
            database_state=state[1].strip() if state else "",
            checkpoint=position(checkpoint[1]) if checkpoint else 0,
        )

    def _as_postgres(self, *argv: str) -> str:
        done = self.commands.run(["runuser", "-u", "postgres", "--", *argv], timeout=15)
        return done.out if done.code == 0 else ""

    def configure(self, patch: Mapping[str, Any]) -> None:
        """Merge `patch` into the cluster's dynamic configuration."""
        self.rest.change(self.url, "PATCH", "/config", patch)

    def rewind(self) -> None:
        """Stop this node's PostgreSQL; Patroni finds it stopped, compares timelines and rewinds it."""
        self.commands.must(
            ["runuser", "-u", "postgres", "--", f"{self.binaries}/pg_ctl", "-D", self.data, "stop", "-m", "fast"],
            "stopping this replica for pg_rewind",
        )

    def reinitialize(self) -> None:
        """Have Patroni clone this node anew from its leader."""
        self.rest.change(self.url, "POST", "/reinitialize", {"force": True})
