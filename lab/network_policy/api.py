"""Keeps a copy of one kind of object: list, then watch, and again for ever."""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from .model import Json

Value = TypeVar("Value")
#: Objects of one answer to a list: what is in memory at once.
PAGE = 50
#: Seconds after which the server ends a watch that we then begin anew from where it was.
WATCH_S = 240
#: Longest pause between two tries, in seconds.
LONGEST_PAUSE_S = 5.0


class Gone(Exception):
    """The server no longer has the changes since our version: list again."""


class Refused(Exception):
    """The server answered, but not with what was asked for."""


class Access(NamedTuple):
    """How the API is reached. The files are read for each connection, so that a renewed certificate is taken up.

    `user` is whom the requests are made as: the node's certificate may do nothing here but act as that account,
    which can only read.
    """

    server: str
    ca_file: str
    certificate_file: str
    user: str

    def connect(self, timeout_s: float) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.certificate_file)
        where = urllib.parse.urlsplit(self.server)
        connection = http.client.HTTPSConnection(
            where.hostname or "", where.port or 443, timeout=timeout_s, context=context
        )
        connection.connect()
        # A server that died without a word is noticed within 10 s.
        for option, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection

    def get(self, connection: http.client.HTTPSConnection, path: str, **query: object) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json", "User-Agent": "censuschat-network", "Impersonate-User": self.user}
        connection.request("GET", f"{path}?{urllib.parse.urlencode(query)}", headers=headers)
        answer = connection.getresponse()
        if answer.status == http.client.GONE:
            raise Gone(path)
        if answer.status != http.client.OK:
            raise Refused(f"GET {path}: {answer.status} {_message(answer.read(2000))}")
        return answer


class Copy(Generic[Value]):
    """A copy of all objects at `path`, read by `read`; `changed` is called after every change.

    It knows nothing (`objects` is None) until the first list is complete, and keeps what it knows while the server
    cannot be reached.
    """

    def __init__(self, access: Access, path: str, read: Callable[[Json], Value], changed: Callable[[], None]) -> None:
        self.path = path
        self.objects: dict[tuple[str, str], Value] | None = None
        self._access, self._read, self._changed = access, read, changed
        self._version = ""
        self._lock = threading.Lock()

    def snapshot(self) -> list[Value] | None:
        with self._lock:
            return None if self.objects is None else list(self.objects.values())

    def start(self) -> None:
        threading.Thread(target=self.run, name=self.path, daemon=True).start()

    def run(self) -> None:
        """Lists and watches for ever, with growing pauses while it fails."""
        pause = 0.2
        told = ""
        while True:
            began = time.monotonic()
            try:
                if not self._version:
                    self.list()
                self.watch()
                told = ""
            except Gone:
                self._version = ""
            except (OSError, http.client.HTTPException, ValueError, Refused) as error:
                if str(error) != told:
                    told = str(error)
                    print(f"{self.path}: {told}", file=sys.stderr, flush=True)
            if time.monotonic() - began > LONGEST_PAUSE_S:
                pause = 0.2
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 (spreads the load, is no secret)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def list(self) -> None:
        """Replaces the copy by what the server has."""
        fresh: dict[tuple[str, str], Value] = {}
        connection = self._access.connect(30)
        try:
            more = ""
            while True:
                page = {"limit": PAGE, **({"continue": more} if more else {})}
                said = json.load(self._access.get(connection, self.path, **page))
                for item in said.get("items") or ():
                    fresh[_key(item)] = self._read(item)
                more = said["metadata"].get("continue", "")
                if not more:
                    break
        finally:
            connection.close()
        with self._lock:
            self.objects = fresh
        self._version = said["metadata"]["resourceVersion"]
        self._changed()

    def watch(self) -> None:
        """Follows the changes until the server ends the watch."""
        connection = self._access.connect(WATCH_S + 30)
        try:
            query: dict[str, Any] = {"watch": 1, "allowWatchBookmarks": "true", "resourceVersion": self._version}
            span = int(WATCH_S * random.uniform(0.8, 1.0))  # noqa: S311
            for event in _lines(self._access.get(connection, self.path, timeoutSeconds=span, **query)):
                self.take(json.loads(event))
        finally:
            connection.close()

    def take(self, event: Json) -> None:
        """Works one event of a watch into the copy. Raises Gone or Refused for an error the server reports."""
        kind, said = event["type"], event["object"]
        if kind == "ERROR":
            if said.get("code") == http.client.GONE:
                raise Gone(self.path)
            raise Refused(f"watch of {self.path}: {said.get('message', said)}")
        if kind != "BOOKMARK":
            with self._lock:
                objects = self.objects if self.objects is not None else {}
                before = objects.get(_key(said))
                if kind == "DELETED":
                    after = None
                    objects.pop(_key(said), None)
                else:
                    after = objects[_key(said)] = self._read(said)
            if before != after:
                self._changed()
        self._version = said["metadata"]["resourceVersion"]


def _message(said: bytes) -> str:
    """What a Status object says, or the beginning of anything else."""
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return said[:200].decode(errors="replace")


def _lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while line := answer.readline():
        yield line


def _key(said: Json) -> tuple[str, str]:
    return said["metadata"].get("namespace", ""), said["metadata"]["name"]
