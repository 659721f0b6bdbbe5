# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Network policies: nothing in either direction, then exactly the paths of the platform.

A path is opened at both ends: out of its source and into its target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.model import (
    Blocks,
    End,
    Namespace,
    Platform,
)

Manifest = dict[str, Any]

#: Label by which a service's pods are known to policies, its Service and its budget.
SERVICE_LABEL = "app.kubernetes.io/name"
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"
_DNS: tuple[dict[str, Any], ...] = ({"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53})


def policies(platform: Platform) -> Iterator[Manifest]:
    """The policies of all isolated namespaces."""
    isolated = {n.name for n in platform.namespaces if n.isolated}
    for namespace in platform.namespaces:
        if namespace.isolated:
            yield from _namespace(platform, namespace)
    for path in platform.paths:
        ports = _ports(path.ports)
        if path.source.namespace in isolated:
            rule = {"to": [_peer(path.target)], **ports}
            name = f"{_prefix(path.source)}to-{_suffix(path.target)}"
            yield _policy(path.source, name, egress=[rule])
        if path.target.namespace in isolated:
            rule = {"from": [_peer(path.source)], **ports}
            name = f"{_prefix(path.target)}from-{_suffix(path.source)}"
            yield _policy(path.target, name, ingress=[rule])
    for service in platform.services:
        end = End(service.namespace, service.name)
        if service.egress:
            yield _policy(end, f"{service.name}-to-blocks", egress=_to_blocks(service.egress))
        if service.node_port is not None:
            peers = [{"ipBlock": {"cidr": cidr}} for cidr in service.clients]
            yield _policy(end, f"{service.name}-from-clients", ingress=[{"from": peers, **_ports((service.port,))}])


def _namespace(platform: Platform, namespace: Namespace) -> Iterator[Manifest]:
    end = End(namespace.name)
    yield _policy(end, "default-deny", ingress=[], egress=[])
    if namespace.pods == 0:
        return
    cluster_dns = {
        "namespaceSelector": {"matchLabels": {_NAMESPACE_LABEL: "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    peers = [cluster_dns, *({"ipBlock": {"cidr": cidr}} for cidr in platform.dns_blocks)]
    yield _policy(end, "to-dns", egress=[{"to": peers, "ports": [dict(port) for port in _DNS]}])
    if namespace.internal:
        inside: list[dict[str, Any]] = [{"podSelector": {}}]
        yield _policy(end, "inside", ingress=[{"from": inside}], egress=[{"to": inside}])
    if namespace.ingress:
        rules = [
            {"from": [{"ipBlock": {"cidr": c}} for c in blocks.cidrs], **_ports(blocks.ports, blocks.protocol)}
            for blocks in namespace.ingress
        ]
        yield _policy(end, "from-blocks", ingress=rules)
    if namespace.egress:
        yield _policy(end, "to-blocks", egress=_to_blocks(namespace.egress))


def _to_blocks(wanted: Sequence[Blocks]) -> list[dict[str, Any]]:
    return [
        {"to": [{"ipBlock": {"cidr": c}} for c in blocks.cidrs], **_ports(blocks.ports, blocks.protocol)}
        for blocks in wanted
    ]


def _ports(ports: Sequence[int], protocol: str = "TCP") -> dict[str, Any]:
    """No ports means all of them: then the key must be absent."""
    return {"ports": [{"protocol": protocol, "port": port} for port in ports]} if ports else {}


def _peer(end: End) -> dict[str, Any]:
    peer: dict[str, Any] = {"namespaceSelector": {"matchLabels": {_NAMESPACE_LABEL: end.namespace}}}
    if end.service:
        peer["podSelector"] = {"matchLabels": {SERVICE_LABEL: end.service}}
    return peer


def _prefix(end: End) -> str:
    return f"{end.service}-" if end.service else ""


def _suffix(end: End) -> str:
    return f"{end.namespace}-{end.service}" if end.service else end.namespace


def _policy(
    end: End,
    name: str,
    ingress: list[dict[str, Any]] | None = None,
    egress: list[dict[str, Any]] | None = None,
) -> Manifest:
    spec: dict[str, Any] = {"podSelector": {"matchLabels": {SERVICE_LABEL: end.service}} if end.service else {}}
    spec["policyTypes"] = [kind for kind, rules in (("Ingress", ingress), ("Egress", egress)) if rules is not None]
    if ingress:
        spec["ingress"] = ingress
    if egress:
        spec["egress"] = egress
    metadata = {"name": name, "namespace": end.namespace}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}
