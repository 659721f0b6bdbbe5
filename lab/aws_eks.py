"""What moto's EKS lacks and the lab needs: access entries, version updates, the state of an update, what it forgets.

A WSGI layer in front of moto, kept in memory. Its answers have the shapes of the EKS API as botocore knows them; it
proves the order and the parameters of calls, and neither their timing nor what EKS itself would refuse.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

ACCOUNT = "123456789012"
"""The account that moto works in."""
ENTRY = re.compile(r"/clusters/([^/]+)/access-entries(?:/(.+?))?(?:/access-policies(?:/(.+))?)?$")
PLAIN = re.compile(r"/clusters(?:/([^/]+))?(?:/node-groups(?:/([^/]+))?)?(?:/update-config)?$")
UPDATES = re.compile(r"/clusters/([^/]+)(?:/node-groups/([^/]+))?/(?:updates|update-version)(?:/([^/]+))?$")
StartResponse = Callable[[str, list[tuple[str, str]]], Any]
Answer = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """A request of a path that is the overlay's own. ``region``: the one it is signed for."""

    method: str
    path: str
    region: str
    body: dict[str, Any]


class EksOverlay:
    """Answers its own paths, and hands every other request to ``app``."""

    def __init__(self, app: Callable[[dict[str, Any], StartResponse], Iterable[bytes]]) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.entries: dict[str, dict[str, dict[str, Any]]] = {}
        self.modes: dict[str, str] = {}
        self.updating: dict[tuple[str, str], dict[str, Any]] = {}
        self.policies: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        # The raw path: an ARN has slashes, which a server decodes away.
        path = str(environ.get("RAW_URI") or environ.get("REQUEST_URI") or environ["PATH_INFO"]).partition("?")[0]
        match = ENTRY.match(path) or UPDATES.match(path)
        if match is None:
            plain = PLAIN.match(path) if "/eks/" in environ.get("HTTP_AUTHORIZATION", "") else None
            if plain is None:
                return self.app(environ, start_response)
            return self.plain(environ, start_response, *plain.groups())
        body = body_of(environ)
        signed = re.search(r"Credential=[^/]+/\d+/([a-z0-9-]+)/eks/", environ.get("HTTP_AUTHORIZATION", ""))
        request = Request(environ["REQUEST_METHOD"], path, signed.group(1) if signed else "us-east-1", body)
        handler = self.entry if match.re is ENTRY else self.update
        groups = [unquote(part) if part else "" for part in match.groups()]
        with self.lock:
            status, answer = handler(request, *groups)
        payload = json.dumps(answer).encode()
        head = [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
        if status >= 400:
            head.append(("x-amzn-ErrorType", answer["__type"]))
        start_response(f"{status} {'OK' if status < 400 else 'Refused'}", head)
        return [payload]

    def plain(
        self, environ: dict[str, Any], start_response: StartResponse, name: str | None, group: str | None
    ) -> Iterable[bytes]:
        """moto's own answer, with what it forgets: the authentication mode, and how a node group is updated."""
        body = body_of(environ)
        if "accessConfig" in body:
            self.modes[name or body["name"]] = body["accessConfig"]["authenticationMode"]
        if "updateConfig" in body:
            self.updating[name or "", group or body["nodegroupName"]] = body["updateConfig"]
        head: list[Any] = []
        said = b"".join(self.app(environ, lambda status, headers, *_: head.extend((status, headers))))
        answer = json.loads(said or b"{}")
        if answer.get("cluster"):
            found = answer["cluster"]
            found["accessConfig"] = {"authenticationMode": self.modes.get(found["name"], "CONFIG_MAP")}
        if answer.get("nodegroup"):
            found = answer["nodegroup"]
            found["updateConfig"] = self.updating.get((found["clusterName"], found["nodegroupName"]), {})
        start_response(head[0], [(key, value) for key, value in head[1] if key.lower() != "content-length"])
        return [json.dumps(answer).encode()]

    def entry(self, request: Request, cluster: str, principal: str, policy: str) -> Answer:
        """Access entries and the policies associated with them."""
        method, body = request.method, request.body
        if found_cluster(request.region, cluster) is None:
            return missing(f"No cluster found for name: {cluster}.")
        entries = self.entries.setdefault(cluster, {})
        if not principal:
            if method == "GET":
                return 200, {"accessEntries": sorted(entries)}
            principal = body["principalArn"]
            if principal in entries:
                return 409, {"__type": "ResourceInUseException", "message": "The access entry exists already."}
            entries[principal] = {
                "clusterName": cluster,
                "principalArn": principal,
                "kubernetesGroups": body.get("kubernetesGroups", []),
                "type": body.get("type", "STANDARD"),
            }
            return 200, {"accessEntry": entries[principal]}
        if principal not in entries:
            return missing(f"The principal {principal} has no access entry.")
        held = self.policies.setdefault((cluster, principal), {})
        if "/access-policies" in request.path:
            if method == "GET":
                return 200, {"associatedAccessPolicies": list(held.values())}
            if method == "DELETE":
                held.pop(policy, None)
                return 200, {}
            held[body["policyArn"]] = {"policyArn": body["policyArn"], "accessScope": body["accessScope"]}
            return 200, {"associatedAccessPolicy": held[body["policyArn"]]}
        if method == "DELETE":
            del entries[principal]
            held.clear()
            return 200, {}
        if method == "POST":
            entries[principal]["kubernetesGroups"] = body.get("kubernetesGroups", [])
        return 200, {"accessEntry": entries[principal]}

    def update(self, request: Request, cluster: str, group: str, update: str) -> Answer:
        """Version updates, which take effect at once, and the state of any update: done."""
        found, body = found_cluster(request.region, cluster), request.body
        if found is None:
            return missing(f"No cluster found for name: {cluster}.")
        if request.method == "POST":
            target = found.nodegroups.get(group) if group else found
            if target is None:
                return missing(f"No node group found for name: {group}.")
            target.version = body.get("version", target.version)
            if "launchTemplate" in body:
                target.launch_template = body["launchTemplate"]
        return 200, {"update": {"id": update or "version", "status": "Successful", "type": "VersionUpdate"}}


def body_of(environ: dict[str, Any]) -> dict[str, Any]:
    """The request's JSON, left to be read again."""
    text = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(text)
    found: dict[str, Any] = json.loads(text or b"{}")
    return found


def found_cluster(region: str, name: str) -> Any:
    """moto's cluster of that name; None when there is none."""
    from moto.eks.models import eks_backends

    return eks_backends[ACCOUNT][region].clusters.get(name)


def missing(message: str) -> Answer:
    """What EKS answers for a name it does not know."""
    return 404, {"__type": "ResourceNotFoundException", "message": message}
