# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""One client of a Kubernetes API: kept-alive connections shared by threads, retries that know when to end.

On urllib3 (0.1 s to import) rather than the `kubernetes` package (0.8 s, and its own threads and models).
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import threading
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.kubeconfig import Access, Credential
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError

try:
    import urllib3

    MISSING = ""
except ImportError:
    MISSING = traceback.format_exc()

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PAGE = 500
"""Objects a LIST asks for at once: memory stays flat whatever a cluster holds."""
_RETRIED = frozenset({429, 500, 502, 503, 504})


class ApiError(KubeError):
    """The API refused: `status` is the HTTP status, `reason` Kubernetes' word for it, `causes` its details."""

    def __init__(self, status: int, body: Mapping[str, Any], text: str = "") -> None:
        self.status = status
        self.reason = str(body.get("reason") or "")
        self.message = str(body.get("message") or text or f"HTTP {status}")
        details = body.get("details") or {}
        self.causes: list[dict[str, str]] = [c for c in details.get("causes") or [] if isinstance(c, dict)]
        super().__init__(self.message)


class Unreachable(KubeError):
    """No answer from the API for as long as was to be waited for."""


class Client:
    """Requests to one API. Safe to share between threads; `connections` of them speak at once.

    patience: seconds to go on trying while nothing of the API answers. Answers that ask to come back later (429, 5xx)
    are followed for as long, with Retry-After honoured.
    """

    def __init__(self, access: Access, *, connections: int = 8, patience: float = 30.0, timeout: float = 60.0) -> None:
        self.access = access
        self.patience, self.timeout = patience, timeout
        self._connections = connections
        parts = urllib.parse.urlsplit(access.server)
        self._prefix = parts.path.rstrip("/")
        self._https = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._https else 80)
        self._lock = threading.Lock()
        self._credential: Credential | None = None
        self._pool: Any = None
        self._closed_at = 0.0
        self.requests = 0

    # ---- requests ----

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        retry: bool = True,
    ) -> dict[str, Any]:
        """The answer's JSON; raises ApiError, Unreachable, KubeError.

        retry=False for requests that must not be sent twice, or whose 429 is an answer (an eviction).
        """
        data = None if body is None else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        url = self._prefix + path
        if query:
            url += "?" + urllib.parse.urlencode({k: _text(v) for k, v in query.items() if v is not None})
        headers = {"Accept": accept, "User-Agent": "censuschat-infra"}
        if data is not None:
            headers["Content-Type"] = content_type
        started, attempt, renewed = time.monotonic(), 0, False
        while True:
            credential, pool = self._connection()
            try:
                with self._lock:
                    self.requests += 1
                answer = pool.request(method, url, body=data, headers={**headers, **credential.headers()})
            except urllib3.exceptions.HTTPError as error:
                self._refuse_tls(error)
                delay = self._pause(attempt, started) if retry else None
                if delay is None:
                    raise self._unreachable(error, started) from error
            else:
                if answer.status < 300:
                    return _json(answer.data)
                refusal = ApiError(answer.status, _json_or_empty(answer.data), _plain(answer.data))
                if answer.status == 401:
                    if renewed or not self.access.renewable:
                        raise self._unauthorized(refusal, credential)
                    self._renew(credential)
                    renewed = True
                    continue
                delay = None
                if retry and answer.status in _RETRIED and not _final(refusal):
                    delay = self._pause(attempt, started, answer.headers.get("Retry-After"))
                if delay is None:
                    raise refusal
            time.sleep(delay)
            attempt += 1

    def get(self, path: str) -> dict[str, Any] | None:
        """An object, or None when there is none."""
        try:
            return self.request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def pages(
        self, path: str, *, query: Mapping[str, Any] | None = None, accept: str = "application/json"
    ) -> Iterator[list[dict[str, Any]]]:
        """The objects of a collection, a page at a time. A page that expired starts the collection again."""
        token, again = "", 0
        while True:
            try:
                answer = self.request(
                    "GET", path, query={**(query or {}), "limit": PAGE, "continue": token or None}, accept=accept
                )
            except ApiError as error:
                if error.status == 410 and token and again < 3:
                    token, again = "", again + 1
                    continue
                raise
            yield answer.get("items") or []
            token = str((answer.get("metadata") or {}).get("continue") or "")
            if not token:
                return

    # ---- connections ----

    def _connection(self) -> tuple[Credential, Any]:
        credential = self.access.credential()
        with self._lock:
            held = self._credential
            if self._pool is None or held is None or held.certificate != credential.certificate:
                self._pool = self._open(credential)
            self._credential = credential
            return credential, self._pool

    def _open(self, credential: Credential) -> Any:
        settings: dict[str, Any] = {
            "maxsize": self._connections,
            "block": True,
            "retries": False,
            "timeout": urllib3.Timeout(connect=5.0, read=self.timeout),
        }
        if self._https:
            settings["ssl_context"] = self.access.tls(credential)
            if self.access.insecure:
                settings["cert_reqs"] = "CERT_NONE"
                settings["assert_hostname"] = False
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
            if self.access.tls_server_name:
                settings["server_hostname"] = self.access.tls_server_name
                settings["assert_hostname"] = self.access.tls_server_name
        proxy = self.access.proxy or _proxy("https" if self._https else "http", self._host)
        if proxy:
            manager = urllib3.ProxyManager(proxy, **settings)
            return manager.connection_from_host(self._host, self._port, "https" if self._https else "http")
        kind = urllib3.HTTPSConnectionPool if self._https else urllib3.HTTPConnectionPool
        settings["socket_options"] = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
        return kind(self._host, self._port, **settings)

    def _renew(self, refused: Credential) -> None:
        self.access.credential(refused=refused)

    # ---- failures ----

    def _pause(self, attempt: int, started: float, retry_after: str | None = None) -> float | None:
        """Seconds until the next attempt, None when patience has ended."""
        left = self.patience - (time.monotonic() - started)
        delay = min(4.0, 0.1 * 2 ** min(attempt, 8)) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries
        if retry_after and retry_after.isdigit():
            delay = max(delay, float(retry_after))
            return delay if delay <= left else None
        return min(delay, left) if left > 0 else None

    def _refuse_tls(self, error: Exception) -> None:
        """Certificates do not become valid by waiting: KubeError at once."""
        reason = _tls_error(error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = reason.verify_message
            if "expired" in why:
                why += ": renew the API server's certificate (kubeadm certs renew apiserver), or mend the clock here"
            elif "unable to get local issuer" in why or "self" in why:
                why += ": the kubeconfig's certificate-authority is not the one that signed it; is this the right file?"
            raise KubeError(f"{self.access.where}: {self.access.server} has a certificate that is not valid: {why}")
        if isinstance(reason, ssl.SSLError) and "ALERT" in str(reason.reason or ""):
            raise KubeError(
                f"{self.access.where}: {self.access.server} refused the client certificate of user "
                f"{self.access.user!r}: {str(reason.reason).lower().replace('_', ' ')}{self._validity()}"
            )

    def _unauthorized(self, error: ApiError, credential: Credential) -> KubeError:
        why = self._validity(credential)
        if not why:
            why = (
                "; its token is not known or has expired"
                if credential.token
                else "; get a kubeconfig of this cluster, or renew the user's certificate"
                if credential.certificate
                else "; the user has no credentials there"
            )
        return KubeError(
            f"{self.access.where}: {self.access.server} does not accept the credentials of user "
            f"{self.access.user!r} ({error.message}){why}"
        )

    def _validity(self, credential: Credential | None = None) -> str:
        credential = credential or self._credential
        if credential is None or not credential.certificate:
            return ""
        try:
            from cryptography import x509
        except ImportError:
            return ""
        try:
            certificate = x509.load_pem_x509_certificate(credential.certificate)
        except ValueError:
            return ""
        end = certificate.not_valid_after_utc
        if end.timestamp() < time.time():
            return (
                f"; its client certificate expired on {end:%Y-%m-%d %H:%M} UTC: "
                "renew it (kubeadm certs renew, or issue a new kubeconfig)"
            )
        return ""

    def _unreachable(self, error: Exception, started: float) -> Unreachable:
        reason = getattr(error, "reason", None) or error
        text = str(reason)
        if "Name or service not known" in text or "Failed to resolve" in text or "name resolution" in text:
            what = f"the name {self._host} does not resolve"
        elif "refused" in text:
            what = f"nothing listens at {self._host}:{self._port}"
        elif isinstance(error, urllib3.exceptions.TimeoutError):
            what = "it did not answer in time"
        else:
            what = text.rpartition(": ")[2] or type(error).__name__
        waited = time.monotonic() - started
        return Unreachable(f"{self.access.where}: {self.access.server} cannot be reached after {waited:.0f} s: {what}")


def _final(error: ApiError) -> bool:
    """Whether asking again does not help: 500 is also what the API answers to objects that it cannot convert."""
    if error.status != 500 or error.reason in ("InternalError", "ServerTimeout", "Timeout"):
        return False
    return not any(word in error.message for word in ("etcdserver", "rpc error", "deadline", "timeout", "HTTP 500"))


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """Python's own TLS error in what urllib3 made of it."""
    for _depth in range(6):
        if error is None or isinstance(error, ssl.SSLError):
            return error
        inner = [getattr(error, "reason", None), *error.args, error.__cause__, error.__context__]
        error = next((e for e in inner if isinstance(e, BaseException)), None)
    return None


def _proxy(scheme: str, host: str) -> str:
    if urllib.request.proxy_bypass(host):
        return ""
    return urllib.request.getproxies().get(scheme, "")


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise KubeError(f"the server's answer is not JSON, so it is no Kubernetes API: {_plain(data)!r}") from error
    return value if isinstance(value, dict) else {}


def _json_or_empty(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _plain(data: bytes) -> str:
    return " ".join(data[:300].decode(errors="replace").split())
