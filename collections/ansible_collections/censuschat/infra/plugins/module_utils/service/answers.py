# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Asks the service through each of its addresses: whether it can write, and whether a row comes back.

All addresses are asked side by side in one process: between the promotion of a database and the change of the service's
record every second is an outage.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit

REQUEST_S = 5.0
"""Seconds for connecting, and again for the answer."""
PAUSE_S = 0.2
"""Seconds between two questions to one address."""
NUMBER = 1
"""The number of a proof's row; its client's name is what makes it one of its own."""

READY, WRITTEN = "ready", "written"


class NoAnswerError(Exception):
    """An address did not do what it was asked to; says what came instead."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one address showed. fault: why it is not as wanted, empty when it is. row: whether its row is there."""

    url: str
    fault: str = ""
    row: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """write: addresses to write a row through. wait: addresses that are not as wanted yet."""

    write: tuple[str, ...] = ()
    wait: tuple[str, ...] = ()

    def actions(self, name: Callable[[str], str]) -> list[str]:
        """In words."""
        return [f"write row {name(url)} through {url}" for url in self.write]


def plan(seen: Sequence[Seen], state: str) -> Plan:
    """What is left to do for the wanted state."""
    waits = tuple(s.url for s in seen if s.fault)
    if state == READY:
        return Plan((), waits)
    return Plan(tuple(s.url for s in seen if not s.row), waits)


def row(mark: str, url: str) -> str:
    """The client's name of the row that proves an address; a mark's second run finds the first one's row."""
    return f"runbook-{mark}-{urlsplit(url).hostname}"


def request(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """One request on a connection of its own: status and JSON. Raises NoAnswerError when that is not what came."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=REQUEST_S)
    try:
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswerError(repr(error)) from error
    finally:
        connection.close()
    return response.status, answer if isinstance(answer, dict) else {}


def ready(url: str, region: str) -> None:
    """Raises NoAnswerError unless the application behind the address can write, in the region."""
    status, answer = request(url, "GET", "/readyz")
    if status != 200 or answer.get("region") != region:
        raise NoAnswerError(f"HTTP {status} {json.dumps(answer)}")


def has(url: str, client: str) -> bool:
    """Whether the row is there, asked through the address. Raises NoAnswerError."""
    status, answer = request(url, "GET", f"/rows?client={quote(client)}")
    if status != 200:
        raise NoAnswerError(f"HTTP {status} {json.dumps(answer)} for its rows")
    return NUMBER in answer.get("n", [])


def write(url: str, region: str, client: str) -> None:
    """Write the row through the address. Raises NoAnswerError; then it may be there all the same."""
    status, answer = request(url, "POST", "/rows", {"client": client, "n": NUMBER})
    if status != 201 or answer.get("region") != region:
        raise NoAnswerError(f"HTTP {status} {json.dumps(answer)} for a row")


def observe(urls: Sequence[str], region: str, state: str, mark: str) -> list[Seen]:
    """What each address shows now, without writing anything."""

    def one(url: str) -> Seen:
        there, fault = False, ""
        try:
            ready(url, region)
        except NoAnswerError as error:
            fault = str(error)
        if state == WRITTEN:
            try:
                there = has(url, row(mark, url))
            except NoAnswerError as error:
                fault = fault or str(error)
        return Seen(url, fault, there)

    with ThreadPoolExecutor(max_workers=max(1, len(urls))) as pool:
        return list(pool.map(one, urls))


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of one address: written says that its row was sent; fault, why it did not succeed."""

    url: str
    written: bool = False
    fault: str = ""


def until(urls: Sequence[str], region: str, state: str, mark: str, timeout_s: float) -> list[Done]:
    """Have each address do its work, again and again until it succeeds or ``timeout_s`` has passed."""
    deadline = time.monotonic() + timeout_s

    def one(url: str) -> Done:
        sent = False
        while True:
            try:
                if state == READY:
                    ready(url, region)
                elif not has(url, row(mark, url)):
                    sent = True
                    write(url, region, row(mark, url))
                    if not has(url, row(mark, url)):
                        raise NoAnswerError("the row that it acknowledged is not in what it gives back")
            except NoAnswerError as error:
                if time.monotonic() > deadline:
                    return Done(url, sent, str(error))
                time.sleep(PAUSE_S)
            else:
                return Done(url, sent)

    with ThreadPoolExecutor(max_workers=max(1, len(urls))) as pool:
        return list(pool.map(one, urls))
