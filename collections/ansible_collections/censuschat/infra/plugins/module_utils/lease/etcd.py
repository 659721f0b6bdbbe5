# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""A small etcd v3 client over etcd's JSON gateway, on the standard library alone.

Every call has one total budget. Endpoints are tried in turn, each with a short timeout of its own, because a member
on the far side of a cut swallows packets without an answer.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from .model import boottime

_LARGEST_ANSWER = 1 << 20


class EtcdError(Exception):
    """A call to etcd did not give an answer that can be used."""


class EtcdUnreachable(EtcdError):
    """No endpoint gave an answer within the budget. Whether a change was made is unknown."""


class EtcdRefused(EtcdError):
    """etcd answered and said no (for example: no such lease, or no certificate)."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code
        """The gRPC status code; 5 is "not found"."""


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files of the mutual TLS connection."""

    ca_file: str
    cert_file: str
    key_file: str

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


@dataclasses.dataclass(frozen=True)
class KeyValue:
    key: str
    value: str
    mod_revision: int
    lease_id: int


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _after(prefix: str) -> str:
    """The first key after all keys that start with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


# ---- parts of a transaction, as etcd's gateway wants them ----


def absent(key: str) -> dict[str, Any]:
    """Compare: the key does not exist."""
    return {"key": _b64(key), "target": "VERSION", "result": "EQUAL", "version": "0"}


def present(key: str) -> dict[str, Any]:
    """Compare: the key exists."""
    return {"key": _b64(key), "target": "VERSION", "result": "GREATER", "version": "0"}


def unchanged(key: str, mod_revision: int) -> dict[str, Any]:
    """Compare: the key was last modified at this revision (0: it never existed or was deleted)."""
    return {"key": _b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(mod_revision)}


def no_newer(prefix: str, revision: int) -> dict[str, Any]:
    """Compare: no key below the prefix was modified after this revision (none at all is fine)."""
    compare = {"key": _b64(prefix), "range_end": _b64(_after(prefix))}
    return {**compare, "target": "MOD", "result": "LESS", "mod_revision": str(revision + 1)}


def has_value(key: str, value: str) -> dict[str, Any]:
    """Compare: the key holds exactly this value."""
    return {"key": _b64(key), "target": "VALUE", "result": "EQUAL", "value": _b64(value)}


def bound_to(key: str, lease_id: int) -> dict[str, Any]:
    """Compare: the key is bound to this lease."""
    return {"key": _b64(key), "target": "LEASE", "result": "EQUAL", "lease": str(lease_id)}


def put(key: str, value: str, lease_id: int = 0) -> dict[str, Any]:
    return {"request_put": {"key": _b64(key), "value": _b64(value), "lease": str(lease_id)}}


def delete(key: str) -> dict[str, Any]:
    return {"request_delete_range": {"key": _b64(key)}}


def delete_below(prefix: str) -> dict[str, Any]:
    return {"request_delete_range": {"key": _b64(prefix), "range_end": _b64(_after(prefix))}}


class Etcd:
    """A client of one etcd cluster. Not for use by several threads.

    endpoints: base URLs, tried from the one that answered last.
    request_timeout_s: the longest wait for one step of one endpoint.
    budget_s: the longest time of a whole call, all endpoints together, unless the call gives its own deadline.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        tls: Tls | None = None,
        request_timeout_s: float = 0.8,
        budget_s: float = 2.5,
        clock: Callable[[], float] = boottime,
    ) -> None:
        if not endpoints:
            raise EtcdError("no endpoint of the lease store is configured")
        self.endpoints = list(endpoints)
        self.request_timeout_s = request_timeout_s
        self.budget_s = budget_s
        self.clock = clock
        try:
            self._context = tls.context() if tls else None
        except (OSError, ssl.SSLError) as error:
            files = f"{tls.ca_file}, {tls.cert_file}, {tls.key_file}" if tls else ""
            raise EtcdError(f"the TLS files of the lease store cannot be used ({files}): {error}") from error
        self._preferred = 0
        self._open: dict[str, http.client.HTTPConnection] = {}

    # ---- calls ----

    def read(self, prefix: str, deadline: float | None = None) -> list[KeyValue]:
        """All keys below a prefix, in one linearizable read: it needs a quorum, so it cannot be stale."""
        answer = self.call("/v3/kv/range", {"key": _b64(prefix), "range_end": _b64(_after(prefix))}, deadline)
        return [
            KeyValue(
                key=base64.b64decode(kv["key"]).decode(),
                value=base64.b64decode(kv.get("value", "")).decode(),
                mod_revision=int(kv.get("mod_revision", 0)),
                lease_id=int(kv.get("lease", 0)),
            )
            for kv in answer.get("kvs", [])
        ]

    def transaction(
        self, compare: Sequence[dict[str, Any]], success: Sequence[dict[str, Any]], deadline: float | None = None
    ) -> bool:
        """Carry out `success` if and only if all of `compare` hold; says whether it did."""
        answer = self.call("/v3/kv/txn", {"compare": list(compare), "success": list(success)}, deadline)
        return bool(answer.get("succeeded", False))

    def grant(self, ttl_s: float, deadline: float | None = None) -> int:
        """A new lease; its id. Raises when etcd would make it shorter than asked."""
        answer = self.call("/v3/lease/grant", {"TTL": str(int(ttl_s))}, deadline)
        if int(answer.get("TTL", 0)) < int(ttl_s):
            raise EtcdRefused(f"etcd granted a lease of {answer.get('TTL')} s where {ttl_s:g} s were asked")
        return int(answer["ID"])

    def keep_alive(self, lease_id: int, deadline: float | None = None) -> int:
        """Renew a lease; its time to live in seconds, 0 when it is gone."""
        answer = self.call("/v3/lease/keepalive", {"ID": str(lease_id)}, deadline)
        result = answer.get("result", answer)
        if int(result.get("ID", 0)) != lease_id:
            return 0
        return int(result.get("TTL", 0))

    def revoke(self, lease_id: int, deadline: float | None = None) -> None:
        """End a lease and delete what is bound to it. A lease that is gone already is no error."""
        try:
            self.call("/v3/lease/revoke", {"ID": str(lease_id)}, deadline)
        except EtcdRefused as error:
            if error.code != 5:
                raise

    def close(self) -> None:
        for endpoint in list(self._open):
            self._drop(endpoint)

    # ---- transport ----

    def call(self, path: str, body: dict[str, Any], deadline: float | None = None) -> dict[str, Any]:
        """POST to the endpoints in turn until one answers or the budget is spent."""
        end = self.clock() + self.budget_s
        if deadline is not None:
            end = min(end, deadline)
        failures = []
        for step in range(len(self.endpoints)):
            number = (self._preferred + step) % len(self.endpoints)
            endpoint = self.endpoints[number]
            left = end - self.clock()
            if left <= 0:
                failures.append("the budget was spent")
                break
            try:
                answer = self._ask(endpoint, path, body, min(self.request_timeout_s, left))
            except EtcdUnreachable as error:
                failures.append(f"{endpoint}: {error}")
                continue
            self._preferred = number
            return answer
        raise EtcdUnreachable(f"no member of the lease store answered {path}: " + "; ".join(failures))

    def _ask(self, endpoint: str, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        reused = endpoint in self._open
        try:
            status, text = self._exchange(endpoint, path, body, timeout_s)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            # A kept connection may have been closed while it lay idle: that says nothing about the member.
            self._drop(endpoint)
            if not reused:
                raise EtcdUnreachable(str(error) or type(error).__name__) from error
            try:
                status, text = self._exchange(endpoint, path, body, timeout_s)
            except (OSError, http.client.HTTPException) as again:
                self._drop(endpoint)
                raise EtcdUnreachable(str(again) or type(again).__name__) from again
        except (OSError, http.client.HTTPException) as error:
            self._drop(endpoint)
            raise EtcdUnreachable(str(error) or type(error).__name__) from error
        return self._understand(endpoint, status, text)

    def _understand(self, endpoint: str, status: int, text: bytes) -> dict[str, Any]:
        try:
            # The answer to a keepalive is a stream: one JSON object a line; the first is the answer.
            answer = json.loads(text.decode().strip().split("\n", 1)[0])
        except ValueError as error:
            self._drop(endpoint)
            raise EtcdUnreachable(f"HTTP {status} without JSON") from error
        if not isinstance(answer, dict):
            raise EtcdUnreachable(f"HTTP {status} with JSON that is no object")
        trouble = answer.get("error") if status == 200 else answer
        if trouble:
            if not isinstance(trouble, dict):
                trouble = answer
            message = str(trouble.get("message") or trouble.get("error") or trouble)
            code = int(trouble.get("code") or trouble.get("grpc_code") or 0)
            # 4xx is the cluster's answer; anything else is this member's trouble (no leader, no quorum, starting).
            if 400 <= status < 500 or code == 5:
                raise EtcdRefused(f"{endpoint}: {message}", code)
            raise EtcdUnreachable(message)
        return answer

    def _exchange(self, endpoint: str, path: str, body: dict[str, Any], timeout_s: float) -> tuple[int, bytes]:
        connection = self._open.get(endpoint)
        if connection is None:
            connection = self._open[endpoint] = self._connect(endpoint, timeout_s)
        if connection.sock is None:
            connection.timeout = timeout_s
            connection.connect()
        connection.sock.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read(_LARGEST_ANSWER)

    def _connect(self, endpoint: str, timeout_s: float) -> http.client.HTTPConnection:
        url = urllib.parse.urlsplit(endpoint)
        host = url.hostname or ""
        if url.scheme == "https":
            if self._context is None:
                raise EtcdError(f"{endpoint} wants TLS and no certificate files are configured")
            return http.client.HTTPSConnection(host, url.port or 2379, timeout=timeout_s, context=self._context)
        return http.client.HTTPConnection(host, url.port or 2379, timeout=timeout_s)

    def _drop(self, endpoint: str) -> None:
        connection = self._open.pop(endpoint, None)
        if connection is not None:
            connection.close()
