# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The few calls to an API server that a cluster's nodes are built with. Standard library only: it also runs on nodes.

Reads kubeconfigs as kubeadm and a kubelet write them: one cluster, one user, certificates as data or as files.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import os
import re
import ssl
import tempfile
import urllib.parse
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

_TIMEOUT_S = 5.0


class ApiError(NodeError):
    """The API server could not be asked, or refused. `status` is HTTP's, 0 when there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Access:
    """Where an API server is and who asks. `certificate` and `key` are PEM texts."""

    server: str
    authority: str
    certificate: str = dataclasses.field(repr=False)
    key: str = dataclasses.field(repr=False)

    @staticmethod
    def of(path: str) -> Access:
        """Read the kubeconfig at `path`; ApiError when it is missing or of another kind."""
        try:
            with open(path, encoding="utf-8") as handle:
                text = handle.read()
        except OSError as error:
            raise ApiError(f"kubeconfig {path} cannot be read: {error.strerror}") from error

        def value(name: str) -> str:
            found = re.search(rf"^\s*(?:- )?{name}:\s*[\"']?([^\s\"']+)", text, re.MULTILINE)
            return found.group(1) if found else ""

        def pem(name: str) -> str:
            try:
                if data := value(f"{name}-data"):
                    return base64.b64decode(data).decode()
                with open(value(name), encoding="utf-8") as handle:
                    return handle.read()
            except (OSError, ValueError) as error:
                raise ApiError(f"kubeconfig {path} has no usable {name}: {error}") from error

        server = value("server")
        if not server.startswith("https://"):
            raise ApiError(f"kubeconfig {path} names no API server by https")
        return Access(server, pem("certificate-authority"), pem("client-certificate"), pem("client-key"))


class Api:
    """A kept-alive connection to one API server."""

    def __init__(self, access: Access, timeout_s: float = _TIMEOUT_S) -> None:
        self.access = access
        url = urllib.parse.urlsplit(access.server)
        self._connection = http.client.HTTPSConnection(
            url.hostname or "", url.port or 443, timeout=timeout_s, context=_context(access)
        )

    def close(self) -> None:
        self._connection.close()

    def get(self, path: str) -> dict[str, Any]:
        return self.call("GET", path)

    def find(self, path: str) -> dict[str, Any] | None:
        """The object, or None when the API server knows none."""
        try:
            return self.call("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def call(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json", *, retry: bool = True
    ) -> dict[str, Any]:
        """One request and its answer as JSON. A kept connection that the other side has closed is opened anew once."""
        payload = None if body is None else json.dumps(body)
        headers = {"Accept": "application/json", "User-Agent": "censuschat-infra"}
        if payload is not None:
            headers["Content-Type"] = content_type
        try:
            self._connection.request(method, path, payload, headers)
            answer = self._connection.getresponse()
            text = answer.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            self._connection.close()
            if retry:
                return self.call(method, path, body, content_type, retry=False)
            raise ApiError(f"{self.access.server} broke the connection off: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ApiError(f"{self.access.server} does not answer: {error}") from error
        try:
            said = json.loads(text) if text else {}
        except ValueError:
            said = {"message": text.decode(errors="replace")[:200]}
        if answer.status >= 400:
            raise ApiError(
                f"{self.access.server} refused {method} {path.partition('?')[0]} with {answer.status}: "
                f"{said.get('message') or answer.reason}",
                answer.status,
            )
        return dict(said)


def _context(access: Access) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=access.authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A certificate chain can only be loaded from a file; this one is the user's alone and gone at once.
    descriptor, path = tempfile.mkstemp(prefix="censuschat-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(access.certificate + "\n" + access.key)
        context.load_cert_chain(path)
    except ssl.SSLError as error:
        raise ApiError(f"the client certificate for {access.server} cannot be used: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return context
