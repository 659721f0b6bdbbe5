# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""One client of an AWX's API: kept-alive connections shared by threads; each fault is one sentence with what to do."""

from __future__ import annotations

import json
import threading
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

try:
    import urllib3

    MISSING = ""
except ImportError:
    MISSING = traceback.format_exc()

API = "/api/v2"
PAGE = 200
"""Objects that a list asks for at once: the most that AWX gives (MAX_PAGE_SIZE)."""
_LATER = frozenset({429, 502, 503, 504})


class AwxError(Exception):
    """The AWX cannot be worked with, or refuses something: one sentence."""


class Refusal(AwxError):
    """The API's answer to a request that it will not do. status: the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


class Client:
    """Requests to one AWX, with a token or a user's password. Safe to share between threads.

    patience: seconds to go on trying while nothing answers, or the answer is to come back later (429, 502, 503, 504).
    What changes something is sent again only when it cannot have arrived.
    """

    def __init__(
        self,
        host: str,
        *,
        token: str = "",
        username: str = "",
        password: str = "",
        verify: bool = True,
        ca_path: str | None = None,
        patience: float = 20.0,
        timeout: float = 60.0,
        connections: int = 8,
    ) -> None:
        parts = urllib.parse.urlsplit(host if "://" in host else f"https://{host}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AwxError(f"The address of the AWX, {host!r}, is no URL such as https://awx.example.org")
        self.host = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._prefix = parts.path.rstrip("/")
        self._patience, self._timeout = patience, timeout
        self._headers = {"Accept": "application/json", "User-Agent": "censuschat-infra"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        elif username:
            self._headers.update(urllib3.make_headers(basic_auth=f"{username}:{password}"))
        else:
            raise AwxError(
                "There is neither a token nor a user for the AWX: set controller_oauth_token (CONTROLLER_OAUTH_TOKEN)"
            )
        self._who = "token" if token else f"password of {username}"
        options: dict[str, Any] = {"maxsize": connections, "retries": False}
        if parts.scheme == "https":
            options["cert_reqs"] = "CERT_REQUIRED" if verify else "CERT_NONE"
            if ca_path:
                options["ca_certs"] = ca_path
            if not verify:
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        proxies = {} if urllib.request.proxy_bypass(parts.hostname) else urllib.request.getproxies()
        proxy = proxies.get(parts.scheme)
        self._pool: Any = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
        self._lock = threading.Lock()
        self.requests = 0

    # -- requests

    def get(self, path: str, **query: Any) -> Any:
        return self.request("GET", path, query=query)

    def list(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Everything of a list, page by page; by id, unless order_by is None (the list's own order)."""
        query = {"page_size": PAGE, "order_by": "id", **query}
        answer = self.request("GET", path, query={name: value for name, value in query.items() if value is not None})
        while True:
            yield from answer["results"]
            if not answer.get("next"):
                return
            answer = self.request("GET", answer["next"])

    def request(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON (None when it has none).

        Raises Refusal when the API refuses, AwxError when there is none or it does not let us in.
        """
        # Paths that the API itself gives (related, next) have its prefix already.
        full = path if path.startswith("/api/") else f"{API}/{path.strip('/')}/"
        url = self.host + full.removeprefix(self._prefix) if self._prefix else self.host + full
        if query:
            url += "?" + urllib.parse.urlencode(query)
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        started, pause = time.monotonic(), 0.2
        while True:
            with self._lock:
                self.requests += 1
            fault = ""
            try:
                answer = self._pool.request(
                    method, url, body=data, headers=headers, redirect=False, timeout=urllib3.Timeout(self._timeout)
                )
            except urllib3.exceptions.HTTPError as error:
                if _certificate(error):
                    raise AwxError(
                        f"The certificate of the AWX at {self.host} is not trusted ({_last(error)}): give its "
                        "authority (ca_path), or the right address"
                    ) from error
                fault = _last(error)
                again = method == "GET" or isinstance(error, urllib3.exceptions.NewConnectionError)
            else:
                if answer.status < 300:
                    return json.loads(answer.data) if answer.data else None
                if answer.status not in _LATER:
                    raise self._refusal(method, full, answer)
                fault, again = f"HTTP {answer.status}", method == "GET" or answer.status in (429, 503)
            if not again or time.monotonic() + pause - started > self._patience:
                raise AwxError(
                    f"The AWX at {self.host} does not answer ({method} {full}: {fault}): see whether it is up, and "
                    "whether controller_host (CONTROLLER_HOST) is its address"
                )
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def _refusal(self, method: str, path: str, answer: Any) -> AwxError:
        text = answer.data.decode("utf-8", "replace")
        if answer.status in (301, 302, 307, 308):
            return AwxError(
                f"The AWX at {self.host} sends elsewhere ({answer.headers.get('Location')}): use that address as "
                "controller_host"
            )
        if answer.status == 401:
            return Refusal(
                401,
                f"The AWX at {self.host} does not take the {self._who}: make a token with write scope (Users / Tokens) "
                "and set controller_oauth_token (CONTROLLER_OAUTH_TOKEN)",
            )
        if answer.status == 404 and (path == f"{API}/me/" or not _json(text)):
            return AwxError(
                f"There is no AWX at {self.host} (no {API}): set controller_host (CONTROLLER_HOST) to its address"
            )
        if answer.status >= 500:
            return Refusal(
                answer.status,
                f"The AWX at {self.host} failed at {method} {path} (HTTP {answer.status}): look into the log of its "
                "web container, then run this again",
            )
        if answer.status == 403:
            return Refusal(
                403, f"The AWX at {self.host} does not allow {method} {path} with this {self._who}: {plain(text)}"
            )
        return Refusal(answer.status, f"{plain(text)} ({method} {path}: HTTP {answer.status})")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def plain(text: str) -> str:
    """What an error's JSON says, in words."""
    data = _json(text)
    if data is None:
        return " ".join(text.split())[:300] or "no reason given"

    def words(value: Any) -> str:
        if isinstance(value, dict):
            return "; ".join(f"{k}: {words(v)}" for k, v in value.items())
        if isinstance(value, list):
            return ", ".join(words(v) for v in value)
        return str(value)

    return words(data)


def _last(error: BaseException) -> str:
    """The innermost reason of urllib3's nested errors."""
    while isinstance(getattr(error, "reason", None), BaseException):
        error = error.reason  # type: ignore[attr-defined]
    return " ".join(str(error).split()).rpartition(": ")[2] or type(error).__name__


def _certificate(error: BaseException) -> bool:
    return "CERTIFICATE" in str(error).upper()
