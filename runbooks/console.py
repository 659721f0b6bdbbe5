"""The console: history and live progress of the runs, as pages for a browser on this machine. It reads and never acts.

``http.server`` of the standard library carries it: a handful of people look at small pages, and every page ends its
connection. Live parts are asked for again each second (and answered with "unchanged" in between) instead of being
streamed: a browser keeps at most six connections to one server, so that open streams in six tabs would block a seventh.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from runbooks import outlook, page, report
from runbooks.environment import Environment
from runbooks.errors import Problem
from runbooks.journal import Journal, RunState

FRESH_S = 0.5
"""Seconds for which what was read from the journals is good enough for everybody who asks."""
RESCAN_S = 5.0
"""Seconds between two looks for environments that were not worked on before."""
PATIENCE_S = 10.0
"""Seconds that a client may take to send its request, and again to take the next part of the answer."""
CLIENTS = 128
"""Connections at one time; who comes later is asked to try again."""
SESSION_S = 12 * 3600.0
"""Seconds that a browser is remembered for."""
KEPT_S = 300.0
"""Seconds after which the report of a run that has ended is made again: its ledgers or the chain may say more."""
SESSIONS = 64
REPORTS = 32
PAGE_ROWS = 50


# -- who may come in


class Doorkeeper:
    """Lets in who has the link of the moment (once), a session's cookie, or the token of a file."""

    def __init__(self, port: int, names: frozenset[str], token: str | None) -> None:
        self.cookie = f"runbook_console_{port}"  # Browsers share cookies between the ports of a machine.
        self._names, self._token = names, token
        self._mutex = threading.Lock()
        self._code = secrets.token_urlsafe(24)
        self._sessions: OrderedDict[str, float] = OrderedDict()

    def knows(self, host: str | None) -> bool:
        """Whether the request is meant for this server: a foreign name that leads here (DNS rebinding) is not it."""
        return host is not None and host.lower() in self._names

    @property
    def code(self) -> str:
        with self._mutex:
            return self._code

    def enter(self, code: str) -> str | None:
        """A new session's secret for the code of the moment, which is used up by it."""
        with self._mutex:
            if self._token is not None or not _same(code, self._code):
                return None
            self._code = secrets.token_urlsafe(24)
            session = secrets.token_urlsafe(32)
            self._sessions[_digest(session)] = time.monotonic() + SESSION_S
            while len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)
            return session

    def admits(self, cookies: str | None, authorization: str | None) -> bool:
        if self._token is not None and authorization and _same(_password(authorization), self._token):
            return True
        try:
            morsel = SimpleCookie(cookies or "").get(self.cookie)
        except CookieError:
            return False
        if morsel is None:
            return False
        with self._mutex:
            return self._sessions.get(_digest(morsel.value), 0.0) > time.monotonic()

    @property
    def asks_for_password(self) -> bool:
        return self._token is not None


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(), right.encode())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _password(authorization: str) -> str:
    """What ``Authorization: Bearer TOKEN`` or ``Basic base64(anybody:TOKEN)`` says."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


# -- what there is to see


@dataclass(slots=True)
class Row:
    """One run of the history. Times in unix seconds, durations in seconds."""

    run: str
    runbook: str
    environment: str
    who: str
    host: str
    asked: float
    started: float
    ended: float | None
    elapsed_s: float | None
    state: str
    reason: str
    resumed: int
    done: int
    total: int
    step: str
    step_started: float | None
    next: str | None


@dataclass(slots=True)
class Shelf:
    """One environment's journal, and what was read of it. head: the position of its newest record. since: of a run,
    the head at which it was read last."""

    journal: Journal
    head: int = 0
    since: dict[str, int] = field(default_factory=dict)
    states: dict[str, RunState] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    judged: dict[str, float] = field(default_factory=dict)
    fault: str = ""

    def doubtful(self, run: str) -> bool:
        """Whether to ask again if a run goes on: no record says when its process dies. A store of locks that is not
        the journal's own database is a service on the network, and asked less often."""
        state = self.states[run]
        patience = RESCAN_S if state.lock_store else 0.0
        return state.state == "running" and time.monotonic() - self.judged.get(run, 0.0) >= patience


class Desk:
    """What the console shows, read from the journals at most every FRESH_S whoever asks; safe from several threads.

    open_journals: environment -> how its journal is opened; asked again now and then. inventories: environment ->
    inventory, where it is known; otherwise the one that a run was started with.
    """

    def __init__(
        self,
        open_journals: Callable[[], Mapping[str, Callable[[], Journal]]],
        inventories: Mapping[str, str],
    ) -> None:
        self._open, self._inventories = open_journals, inventories
        self._shelves: dict[str, Shelf] = {}
        self._faults: dict[str, str] = {}
        self._reading = threading.Lock()
        self._read = self._scanned = float("-inf")
        self._building = threading.Lock()
        self._environments: dict[str, Environment | None] = {}
        self._reports: OrderedDict[str, tuple[str, dict[str, Any]]] = OrderedDict()

    def close(self) -> None:
        for shelf in self._shelves.values():
            shelf.journal.close()

    def refresh(self) -> None:
        """Read what is new. While one thread reads, the others go on with what is known, except at first."""
        first = self._read == float("-inf")
        if not self._reading.acquire(blocking=first):
            return
        try:
            if time.monotonic() - self._read < FRESH_S:
                return
            self._scan()
            for shelf in self._shelves.values():
                self._look(shelf)
            self._read = time.monotonic()
        finally:
            self._reading.release()

    def _scan(self) -> None:
        if time.monotonic() - self._scanned < RESCAN_S:
            return
        self._scanned = time.monotonic()
        for name, opener in self._open().items():
            if name in self._shelves:
                continue
            try:
                self._shelves = {**self._shelves, name: Shelf(opener())}
                self._faults.pop(name, None)
            except Problem as problem:
                self._faults[name] = problem.what

    def _look(self, shelf: Shelf) -> None:
        try:
            head, runs = shelf.journal.changed(shelf.head)
            if not shelf.states:
                runs = {*runs, *shelf.journal.runs()}
            for run in runs:
                try:
                    shelf.states[run] = shelf.journal.state(run)
                    shelf.since[run] = head
                except (ValueError, KeyError):
                    continue
                except Problem as problem:
                    # Plans and alerts have records under names of their own, without a run.
                    if problem.code != "run-unknown":
                        raise
            order = [run for run in shelf.journal.runs() if run in shelf.states] if runs else list(shelf.rows)
            rows = {}
            for number, run in enumerate(order, 1):
                known, newest = shelf.rows.get(run), number == len(order)
                overtaken = known is not None and known.next is not None and not newest
                if known is None or run in runs or overtaken or shelf.doubtful(run):
                    known = self._row(shelf.journal, shelf.states[run], newest=newest)
                    shelf.judged[run] = time.monotonic()
                rows[run] = known
            shelf.rows, shelf.head, shelf.fault = rows, head, ""
        except Problem as problem:
            shelf.fault = problem.what

    @staticmethod
    def _row(journal: Journal, state: RunState, *, newest: bool) -> Row:
        shown = outlook.shown_state(journal, state) if state.state == "running" else state.state
        current = next((s for s in state.steps.values() if s.attempts and s.outcome is None), None)
        return Row(
            run=state.run,
            runbook=state.runbook,
            environment=state.environment,
            who=state.who,
            host=state.host,
            asked=state.asked,
            started=state.started,
            ended=state.ended,
            elapsed_s=None if state.ended is None else round(state.ended - state.asked, 3),
            state=shown,
            reason=state.reason,
            resumed=state.resumed,
            done=sum(step.outcome == "ok" for step in state.steps.values()),
            total=len(state.steps),
            step=current.step if current else "",
            step_started=current.started if current else None,
            next=outlook.next_command(journal, state, shown) if newest else None,
        )

    def rows(self) -> list[Row]:
        """All runs, the newest first."""
        self.refresh()
        found = [row for shelf in self._shelves.values() for row in shelf.rows.values()]
        return sorted(found, key=lambda row: row.started, reverse=True)

    def faults(self) -> dict[str, str]:
        """Environment -> why its journal cannot be read at the moment."""
        return self._faults | {name: shelf.fault for name, shelf in self._shelves.items() if shelf.fault}

    def version(self) -> str:
        """Changes whenever a page would; without the time that passes."""
        self.refresh()
        seen = [
            (name, shelf.head, shelf.fault, [row.state for row in shelf.rows.values()])
            for name, shelf in self._shelves.items()
        ]
        return _digest(repr((seen, self._faults)))[:20]

    def report(self, run: str) -> dict[str, Any] | None:
        """The report of a run, built again only when something was recorded since. None when there is no such run.

        Raises Problem when its journal cannot be read.
        """
        self.refresh()
        shelf = next((shelf for shelf in self._shelves.values() if run in shelf.rows), None)
        if shelf is None:
            return None
        row = shelf.rows[run]
        running = row.state == "running"
        # A page that shows passing time is made again each second, for whoever has no script to count it.
        version = f"{shelf.since[run]} {row.state} {int(time.time() / (1 if running else KEPT_S))}"
        # Ansible's templates are not made for several threads, and nobody gains from the same work twice.
        with self._building:
            known = self._reports.get(run)
            if known is None or known[0] != version:
                runbook, _ = report.definition_of(row.runbook)
                environment = None if running else self._environment(row.environment, shelf.states[run].inventory)
                ended = not running
                built = report.build(shelf.journal, run, runbook, environment, measure=ended, verify=ended)
                known = version, built
                self._reports[run] = known
                while len(self._reports) > REPORTS:
                    self._reports.popitem(last=False)
            return known[1]

    def _environment(self, name: str, inventory: str) -> Environment | None:
        path = self._inventories.get(name, inventory)
        if path not in self._environments:
            self._environments[path], _ = report.environment_of(path)
        return self._environments[path]


# -- the pages


FILTERS = ("q", "environment", "runbook", "state", "who", "since")


def matching(rows: list[Row], wanted: Mapping[str, str]) -> list[Row]:
    """The runs that a person asked for. since: a day, YYYY-MM-DD; one that is none filters nothing."""
    since = 0.0
    with contextlib.suppress(ValueError, OverflowError):
        since = time.mktime(time.strptime(wanted.get("since", ""), "%Y-%m-%d"))
    return [
        row
        for row in rows
        if row.started >= since
        and wanted.get("q", "").lower() in f"{row.run} {row.reason}".lower()
        and all(wanted.get(key, "") in ("", getattr(row, key)) for key in ("environment", "runbook", "state", "who"))
    ]


def home(desk: Desk, query: Mapping[str, str]) -> str:
    """The page of all runs."""
    rows = desk.rows()
    found = matching(rows, query)
    pages = max(1, -(-len(found) // PAGE_ROWS))
    number = min(pages, int(query["page"]) if query.get("page", "").isdecimal() else 1)
    newest: dict[str, Row] = {}
    for row in rows:
        newest.setdefault(row.environment, row)
    wanted = {key: query.get(key, "") for key in FILTERS}

    def link(to: int) -> str:
        return "/?" + "&".join(f"{k}={quote(v)}" for k, v in {**wanted, "page": str(to)}.items() if v)

    return page.home(
        {
            "rows": found[(number - 1) * PAGE_ROWS : number * PAGE_ROWS],
            "count": len(found),
            "all": len(rows),
            "running": [row for row in rows if row.state == "running"],
            "needs": [row for row in newest.values() if row.next],
            "faults": desk.faults(),
            "wanted": wanted,
            "filtered": any(wanted.values()),
            "choices": {
                key: sorted({getattr(row, key) for row in rows}) for key in ("environment", "runbook", "state", "who")
            },
            "newer": link(number - 1) if number > 1 else None,
            "older": link(number + 1) if number < pages else None,
            "page": number,
            "pages": pages,
            "made": time.time(),
        }
    )


# -- the server


class Server(ThreadingHTTPServer):
    """One thread a connection, so that a slow client delays nobody but itself."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], desk: Desk, names: frozenset[str], token: str | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        port = self.server_address[1]
        self.desk = desk
        self.door = Doorkeeper(port, frozenset(f"{name}:{port}" for name in names), token)
        self.entered: Callable[[], None] = lambda: None
        self.ended = False
        self._places = threading.BoundedSemaphore(CLIENTS)

    def server_bind(self) -> None:
        # Not HTTPServer's own, which asks the DNS for the name of the address.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def server_close(self) -> None:
        self.ended = True
        super().server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0.1)
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is told without what was asked for, which may be secret."""
        error = sys.exception()
        if not isinstance(error, OSError) and not self.ended:
            print(f"console: a request failed ({type(error).__name__}: {error})", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    server_version, sys_version = "runbook", ""
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """No log of requests: the link to enter by is a secret."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _refuse_method(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", "This console only shows.\n", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse_method

    def _answer(self) -> None:
        door = self.server.door
        if not door.knows(self.headers.get("Host")):
            self._text(HTTPStatus.MISDIRECTED_REQUEST, "This server is not known by that name.")
            return
        if self.headers.get("Sec-Fetch-Site") == "cross-site" and self.headers.get("Sec-Fetch-Mode") != "navigate":
            self._text(HTTPStatus.FORBIDDEN, "Other sites cannot ask here.")
            return
        parts = urlsplit(self.path)
        if parts.path.startswith("/enter/"):
            self._enter(parts.path.removeprefix("/enter/"))
            return
        if not door.admits(self.headers.get("Cookie"), self.headers.get("Authorization")):
            more = {"WWW-Authenticate": 'Basic realm="runbook console"'} if door.asks_for_password else {}
            self._page(HTTPStatus.UNAUTHORIZED, page.message("Not let in", LOCKED[door.asks_for_password]), more)
            return
        query = {key: values[-1] for key, values in parse_qs(parts.query, max_num_fields=20).items()}
        try:
            self._show(unquote(parts.path), query)
        except Problem as problem:
            text = page.message("Not now", problem.what, problem.next_command)
            self._page(HTTPStatus.SERVICE_UNAVAILABLE, text)

    def _enter(self, code: str) -> None:
        # A browser that only looks ahead must not use the link up.
        looks = self.command != "GET" or self.headers.get("Sec-Purpose") is not None
        session = None if looks else self.server.door.enter(code)
        if session is None:
            self._page(HTTPStatus.UNAUTHORIZED, page.message("Not let in", LOCKED[False]))
            return
        cookie = f"{self.server.door.cookie}={session}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SESSION_S:.0f}"
        # A page that goes on by itself instead of a redirect: after a redirect from another site the browser would
        # keep the cookie back.
        self._page(HTTPStatus.OK, page.message("Welcome", "Going on to the runs.", forward="/"), {"Set-Cookie": cookie})
        self.server.entered()

    def _show(self, path: str, query: Mapping[str, str]) -> None:
        desk = self.server.desk
        if path == "/":
            if not self._unchanged(desk.version()):
                self._page(HTTPStatus.OK, home(desk, query))
        elif path == "/console.js":
            self._send(HTTPStatus.OK, "text/javascript", page.asset("console.js"))
        elif path == "/runs.json":
            rows = [asdict(row) for row in matching(desk.rows(), query)]
            self._send(HTTPStatus.OK, "application/json", json.dumps(rows, indent=1))
        elif path.startswith("/runs/"):
            self._run(path.removeprefix("/runs/"))
        else:
            self._missing()

    def _run(self, name: str) -> None:
        desk = self.server.desk
        as_json = name.endswith(".json")
        if not as_json and self._unchanged(desk.version()):
            return
        data = desk.report(name.removesuffix(".json") if as_json else name)
        if data is None:
            self._missing()
        elif as_json:
            self._send(HTTPStatus.OK, "application/json", json.dumps(data, indent=1, default=str))
        else:
            self._page(HTTPStatus.OK, page.report(data, console={}))

    def _unchanged(self, version: str) -> bool:
        """Answer that nothing is new, when that is so."""
        self._version = f'"{version}"'
        if self.headers.get("If-None-Match") != self._version:
            return False
        self._send(HTTPStatus.NOT_MODIFIED, "text/html", "")
        return True

    _version = ""

    def _missing(self) -> None:
        self._version = ""
        self._page(HTTPStatus.NOT_FOUND, page.message("Not here", "There is no such page.", link="/"))

    def _text(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain", text + "\n")

    def _page(self, status: HTTPStatus, text: str, more: Mapping[str, str] | None = None) -> None:
        rules = {"Content-Security-Policy": page.policy(console=True) + "; frame-ancestors 'none'"}
        self._send(status, "text/html", text, {**rules, **(more or {})})

    def _send(self, status: HTTPStatus, kind: str, text: str, more: Mapping[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            **({"ETag": self._version} if self._version else {}),
            **(more or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(body)


LOCKED = {
    True: "The password is the token in the file that the console was started with; the name does not matter.",
    False: "Open the link that the console shows in its terminal. Each link lets one browser in, once.",
}
