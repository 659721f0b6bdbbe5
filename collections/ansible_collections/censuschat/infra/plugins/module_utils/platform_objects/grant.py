# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""An emergency access: the grant, the token that is bound to it, and the kubeconfig to use it with. Pure."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.access import (
    GRANT_TYPE,
    REASON,
    REQUESTED_BY,
)
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.reader import PlatformError

MINIMUM_S = 600
"""The API server gives no token a shorter life."""
STRETCHED_S = 3607
"""The one length that an API server may stretch to a year (its flag service-account-extend-token-expiration)."""
_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Who is to have the access, until when, and why. `seconds` is its length."""

    name: str
    namespace: str
    account: str
    reason: str
    requested_by: str
    seconds: int

    def check(self) -> None:
        """Raises PlatformError when the API server would refuse it."""
        if not _NAME.match(self.name):
            raise PlatformError(f"name: {self.name!r} is not a name Kubernetes accepts, such as inc-4711")
        if len(self.reason.strip()) < 10:
            raise PlatformError(
                "reason: say in 10 characters or more why the access is needed; it is kept with the grant"
            )
        if self.seconds < MINIMUM_S:
            raise PlatformError(
                f"duration_s: is {self.seconds}; an API server gives no token for less than {MINIMUM_S} s"
            )
        if self.seconds == STRETCHED_S:
            raise PlatformError(
                f"duration_s: {STRETCHED_S} is the one length that an API server may extend; take another"
            )

    def grant(self) -> dict[str, Any]:
        """The Secret that the access lives and dies with. It holds nothing but who and why."""
        annotations = {REASON: self.reason, REQUESTED_BY: self.requested_by}
        metadata = {"name": self.name, "namespace": self.namespace, "annotations": annotations}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": GRANT_TYPE}

    def request(self, uid: str) -> dict[str, Any]:
        """What to POST to the account's token subresource; `uid` is that of the grant."""
        bound = {"apiVersion": "v1", "kind": "Secret", "name": self.name, "uid": uid}
        spec = {"expirationSeconds": self.seconds, "boundObjectRef": bound}
        return {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}


def kubeconfig(server: str, authority: bytes, tls_server_name: str, token: str, name: str) -> dict[str, Any]:
    """A kubeconfig with the token; `authority` is PEM, empty where the machine's own authorities are trusted."""
    cluster: dict[str, Any] = {"server": server}
    if authority:
        cluster["certificate-authority-data"] = base64.b64encode(authority).decode()
    if tls_server_name:
        cluster["tls-server-name"] = tls_server_name
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": "cluster", "user": name}}],
        "current-context": name,
    }


def described(secret: Mapping[str, Any]) -> str:
    """One line about a grant that exists."""
    notes = secret["metadata"].get("annotations") or {}
    return (
        f"{secret['metadata']['name']}: {notes.get(REQUESTED_BY, 'unknown')} since "
        f"{secret['metadata'].get('creationTimestamp', 'unknown')}, {notes.get(REASON, 'no reason given')}"
    )
