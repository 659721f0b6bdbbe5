# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Approves the kubelets' requests for serving certificates (`serverTLSBootstrap`).

Kubernetes approves none of these by itself: whoever may ask for a serving certificate could name another node, or the
API. So each is read, and approved only when it names nothing but the node that asks, as the API knows that node.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .common import UpkeepError, must, reported, run

SIGNER = "kubernetes.io/kubelet-serving"
_PREFIX = "system:node:"
_USAGES = {"digital signature", "key encipherment", "server auth"}
_KUBECTL = ("kubectl", "--kubeconfig", "/etc/kubernetes/admin.conf", "--request-timeout=20s")
_SAN = re.compile(r"X509v3 Subject Alternative Name:[^\n]*\n\s*([^\n]+)")


@dataclasses.dataclass(frozen=True)
class Request:
    """A pending request: who asks, and what the certificate would say."""

    name: str
    user: str
    groups: frozenset[str]
    usages: frozenset[str]
    common_name: str
    organisations: tuple[str, ...]
    sans: tuple[str, ...]


def judge(request: Request, addresses: Mapping[str, frozenset[str]]) -> str:
    """Why the request may not be approved; empty when it may.

    addresses: names and addresses of each node, as the API has them.
    """
    node = request.user.removeprefix(_PREFIX)
    if not request.user.startswith(_PREFIX) or "system:nodes" not in request.groups:
        return f"{request.user} is no kubelet"
    if node not in addresses:
        return f"there is no node {node}"
    if request.common_name != request.user or request.organisations != ("system:nodes",):
        return f"{request.user} asks for a certificate of {request.common_name or 'nobody'}"
    if not request.usages <= _USAGES or "server auth" not in request.usages:
        return f"{request.user} asks for the uses {', '.join(sorted(request.usages))}"
    if not request.sans:
        return f"{request.user} asks for a certificate without a name"
    strange = sorted(set(request.sans) - addresses[node])
    return f"{request.user} asks for the names of others: {', '.join(strange)}" if strange else ""


def request_of(data: Mapping[str, Any]) -> Request:
    """Read a CertificateSigningRequest object; what cannot be read has no names, and so is not approved."""
    spec = data["spec"]
    pem = base64.b64decode(spec["request"]).decode("ascii", "replace")
    shown = run(["openssl", "req", "-noout", "-text", "-subject", "-nameopt", "sep_multiline,sname"], stdin=pem).out
    common_names = re.findall(r"^\s*CN=(.*)$", shown, re.MULTILINE)
    match = _SAN.search(shown)
    sans = [part.strip().partition(":")[2].strip() for part in match[1].split(",")] if match else []
    return Request(
        name=data["metadata"]["name"],
        user=spec.get("username", ""),
        groups=frozenset(spec.get("groups") or ()),
        usages=frozenset(spec.get("usages") or ()),
        common_name=common_names[-1].strip() if common_names else "",
        organisations=tuple(sorted(set(re.findall(r"^\s*O=(.*)$", shown, re.MULTILINE)))),
        sans=tuple(sans),
    )


def pending(objects: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the kubelets' serving signer that nobody has decided on."""
    return [o for o in objects if o["spec"]["signerName"] == SIGNER and not (o.get("status") or {}).get("conditions")]


def job() -> str:
    """Approve what may be; UpkeepError names what waits for a person."""
    listed = must([*_KUBECTL, "get", "certificatesigningrequests", "-o", "json"], "the requests cannot be listed")
    waiting = pending(json.loads(listed.out)["items"])
    if not waiting:
        return "nothing waits"
    nodes = json.loads(must([*_KUBECTL, "get", "nodes", "-o", "json"], "the nodes cannot be listed").out)["items"]
    addresses = {
        n["metadata"]["name"]: frozenset(
            [n["metadata"]["name"], *(a["address"] for a in (n.get("status") or {}).get("addresses") or ())]
        )
        for n in nodes
    }
    approved, left = [], []
    for request in map(request_of, waiting):
        why = judge(request, addresses)
        if why:
            left.append(f"{request.name}: {why}")
            continue
        must([*_KUBECTL, "certificate", "approve", request.name], f"{request.name} was not approved")
        approved.append(request.user.removeprefix(_PREFIX))
    if left:
        raise UpkeepError(f"left to a person ({'; '.join(left)}); approved: {', '.join(approved) or 'none'}")
    return f"approved the serving certificates of {', '.join(approved)}"


def main(_arguments: Sequence[str]) -> int:
    """`censuschat-kubelet-serving`: exit code 0 unless a request waits that must not be approved, or the API fails."""
    return reported(job, name="kubelet-serving")
