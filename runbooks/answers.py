"""Asks the service through each of its addresses, for the steps that wait for it and prove it.

``ready`` waits until every address leads to an application that can write; ``write`` writes a row through each and
reads it back. All addresses are asked side by side in one process: between the promotion and the change of the
service's record every second is an outage.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit

REQUEST_S = 5.0
"""Seconds for connecting, and again for the answer."""
PAUSE_S = 0.2
"""Seconds between two questions to one address."""


class NoAnswerError(Exception):
    """An address did not do what it was asked to; says what came instead."""


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


def write(url: str, region: str) -> None:
    """Write a row that says which address it came through, and read it back; NoAnswerError when that fails."""
    client, n = f"runbook-{urlsplit(url).hostname}", time.time_ns() // 1000
    status, answer = request(url, "POST", "/rows", {"client": client, "n": n})
    if status != 201 or answer.get("region") != region:
        raise NoAnswerError(f"HTTP {status} {json.dumps(answer)} for a row")
    status, answer = request(url, "GET", f"/rows?client={quote(client)}")
    if status != 200 or n not in answer.get("n", []):
        raise NoAnswerError(f"HTTP {status}: the row that it acknowledged is not in what it gives back")


def until(work: Callable[[str, str], None], urls: Sequence[str], region: str, timeout_s: float) -> dict[str, str]:
    """Have each address do its work, again and again until it succeeds or ``timeout_s`` has passed.

    Returns the last failure of each address that did not succeed.
    """
    deadline = time.monotonic() + timeout_s

    def one(url: str) -> str | None:
        while True:
            try:
                work(url, region)
            except NoAnswerError as error:
                if time.monotonic() > deadline:
                    return str(error)
                time.sleep(PAUSE_S)
            else:
                return None

    with ThreadPoolExecutor(max_workers=len(urls)) as pool:
        return {url: failure for url, failure in zip(urls, pool.map(one, urls), strict=True) if failure is not None}


def main() -> int:
    """0 and one line when every address did it; 1 and a line for each that did not."""
    parser = argparse.ArgumentParser(prog="python -m runbooks.answers", description=__doc__)
    parser.add_argument("work", choices=("ready", "write"))
    parser.add_argument("--region", required=True, help="the region that must answer")
    parser.add_argument("--timeout", type=float, default=40, help="seconds")
    parser.add_argument("urls", nargs="+", metavar="URL", help="http://ADDRESS:PORT")
    arguments = parser.parse_args()
    work = {"ready": ready, "write": write}[arguments.work]
    failures = until(work, arguments.urls, arguments.region, arguments.timeout)
    for url, failure in failures.items():
        print(f"{url}: no success with {arguments.work} for {arguments.timeout:g} s: {failure}", file=sys.stderr)
    if not failures:
        did = {"ready": "lead to an application that can write", "write": "took a row and gave it back"}
        print(f"{len(arguments.urls)} application nodes of {arguments.region} {did[arguments.work]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
