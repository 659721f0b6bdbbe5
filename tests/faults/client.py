"""A client that polls the API every 100 ms: is it ready, and does it take and give back a real object?

Each write is a ConfigMap of its own. What was acknowledged is kept, so that a test can ask for all of it afterwards.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import ssl
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

PERIOD_S = 0.1
TIMEOUT_S = 1.0
NAMESPACE = "faults"


class Api:
    """The API as a kubeconfig names it, a fresh connection for each request: what a new client sees."""

    def __init__(self, kubeconfig: Path) -> None:
        data = yaml.safe_load(kubeconfig.read_text())
        cluster, user = data["clusters"][0]["cluster"], data["users"][0]["user"]
        url = urllib.parse.urlsplit(cluster["server"])
        self.host, self.port = url.hostname or "", url.port or 443
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.context = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
            for key in ("client-certificate-data", "client-key-data"):
                pem.write(base64.b64decode(user[key]).decode())
            pem.flush()
            self.context.load_cert_chain(pem.name)

    def call(self, method: str, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> tuple[int, Any]:
        """Status and answer; OSError and HTTPException when there is none in time."""
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s, context=self.context)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text[:1] == b"{" else text.decode()

    def names(self) -> set[str]:
        """The names of all ConfigMaps that the client made."""
        status, found = self.call("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps", timeout_s=30.0)
        assert status == 200, found
        return {item["metadata"]["name"] for item in found["items"]}


@dataclasses.dataclass(frozen=True)
class Poll:
    """One poll: when it began and ended (monotonic seconds), and why it failed, if it did."""

    began: float
    ended: float
    failure: str = ""


def outage_s(polls: Sequence[Poll]) -> float:
    """The longest time without an answer: from the last good poll before to the first good one after."""
    longest, good = 0.0, polls[0].began if polls else 0.0
    failing = False
    for poll in polls:
        if poll.failure:
            failing = True
            continue
        if failing:
            longest = max(longest, poll.ended - good)
        good, failing = poll.ended, False
    return max(longest, polls[-1].ended - good) if failing else longest


class Client:
    """Polls in two threads while the `with` block runs.

    ready, writes: the polls. acknowledged: when each object was acknowledged (unix seconds).
    """

    def __init__(self, api: Api, prefix: str) -> None:
        self.api, self.prefix = api, prefix
        self.ready: list[Poll] = []
        self.writes: list[Poll] = []
        self.acknowledged: dict[str, float] = {}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(self._is_ready, self.ready), daemon=True),
            threading.Thread(target=self._run, args=(self._write_and_read, self.writes), daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_good(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def wait_good(self, polls: int, patience_s: float = 60.0) -> None:
        """Wait until the last `polls` polls of both kinds went well."""
        deadline = time.monotonic() + patience_s
        while True:
            last = [*self.ready[-polls:], *self.writes[-polls:]]
            if len(last) == 2 * polls and not any(poll.failure for poll in last):
                return
            assert time.monotonic() < deadline, f"the API is not back after {patience_s:.0f} s: {last[-1:]}"
            time.sleep(PERIOD_S)

    @property
    def failed(self) -> int:
        return sum(bool(poll.failure) for poll in [*self.ready, *self.writes])

    @property
    def outage_s(self) -> float:
        """The worse of the two kinds of poll."""
        return max(outage_s(self.ready), outage_s(self.writes))

    def _run(self, poll: Callable[[int], str], polls: list[Poll]) -> None:
        number = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                failure = poll(number)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
            polls.append(Poll(began, time.monotonic(), failure))
            number += 1
            self._stop.wait(max(0.0, began + PERIOD_S - time.monotonic()))

    def _is_ready(self, _number: int) -> str:
        status, _text = self.api.call("GET", "/readyz")
        return "" if status == 200 else f"/readyz answers {status}"

    def _write_and_read(self, number: int) -> str:
        name = f"{self.prefix}-{number}"
        path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
        body = {"metadata": {"name": name}, "data": {"number": str(number)}}
        status, answer = self.api.call("POST", path, body)
        if status != 201:
            return f"the write answers {status}: {answer}"
        self.acknowledged[name] = time.time()
        status, answer = self.api.call("GET", f"{path}/{name}")
        return "" if status == 200 and answer["data"]["number"] == str(number) else f"the read answers {status}"
