# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What kinds an API serves: the two requests of aggregated discovery, and the kinds that CRDs of the set will add."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import Client
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError, Resource

_ACCEPT = ",".join(
    f"application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList" for version in ("v2", "v2beta1")
)


class Kinds:
    """The kinds an API serves, by apiVersion and kind. stale: groups whose server does not answer at present."""

    def __init__(self, resources: Iterable[Resource], stale: Iterable[str] = ()) -> None:
        self._by_kind: dict[tuple[str, str], Resource] = {}
        self.stale = frozenset(stale)
        for resource in resources:
            self._by_kind.setdefault((resource.api_version, resource.kind), resource)

    def find(self, api_version: str, kind: str) -> Resource | None:
        return self._by_kind.get((api_version, kind))

    def preferred(self, group: str, kind: str) -> Resource | None:
        """A kind of a group in the version that the API prefers (the first it lists)."""
        for resource in self._by_kind.values():
            if resource.group == group and resource.kind == kind:
                return resource
        return None

    def add(self, resources: Iterable[Resource]) -> None:
        for resource in resources:
            self._by_kind.setdefault((resource.api_version, resource.kind), resource)

    def problem(self, api_version: str, kind: str) -> str:
        """Why a kind is not served, and what to do."""
        group = api_version.partition("/")[0] if "/" in api_version else ""
        if api_version in self.stale or group in self.stale:
            return f"the server of API group {group} does not answer at present (see its APIService); try again later"
        others = sorted({v for v, k in self._by_kind if k == kind})
        if others:
            return f"the API does not serve {kind} as {api_version}; it serves it as {', '.join(others)}"
        served = [k for v, k in self._by_kind if v == api_version]
        if served:
            near = difflib.get_close_matches(kind, served, 1)
            return f"{api_version} has no kind {kind}" + (f"; is it {near[0]}?" if near else "")
        if "." in group:
            return (
                f"the API does not know {api_version}: its CustomResourceDefinition is missing; "
                "add it to the set, or install it first"
            )
        return f"the API does not know {api_version}"


class AnyKinds(Kinds):
    """For a cluster that is still to be founded: takes every kind for one that will be served."""

    def __init__(self) -> None:
        super().__init__([])

    def find(self, api_version: str, kind: str) -> Resource | None:
        group, version = api_version.rpartition("/")[::2]
        return super().find(api_version, kind) or Resource(group, version, kind, "", True, frozenset({"patch"}))


def discover(client: Client) -> Kinds:
    """What the API serves now. Raises KubeError for a server without aggregated discovery (Kubernetes < 1.27)."""
    resources: list[Resource] = []
    stale: list[str] = []
    for path in ("/api", "/apis"):
        answer = client.request("GET", path, accept=_ACCEPT)
        if answer.get("kind") != "APIGroupDiscoveryList":
            raise KubeError(
                f"{client.access.where}: {client.access.server} has no aggregated discovery; "
                "Kubernetes 1.27 or newer is needed"
            )
        for group in answer.get("items") or []:
            name = str((group.get("metadata") or {}).get("name") or "")
            for version in group.get("versions") or []:
                if version.get("freshness") == "Stale":
                    stale.append(f"{name}/{version['version']}")
                resources += [_resource(name, str(version["version"]), r) for r in version.get("resources") or []]
    return Kinds(resources, stale)


def defined_by(crd: Mapping[str, Any]) -> list[Resource]:
    """The kinds that a CustomResourceDefinition brings; none when it is not a whole one (the API will say so)."""
    spec = crd.get("spec") or {}
    names = spec.get("names") or {}
    if not isinstance(names, dict) or not all(isinstance(names.get(k), str) for k in ("kind", "plural")):
        return []
    return [
        Resource(
            group=str(spec.get("group", "")),
            version=str(version.get("name", "")),
            kind=names["kind"],
            plural=names["plural"],
            namespaced=spec.get("scope") == "Namespaced",
            verbs=frozenset({"get", "list", "patch", "create", "delete", "update"}),
        )
        for version in spec.get("versions") or []
        if isinstance(version, dict) and version.get("served")
    ]


def _resource(group: str, version: str, raw: Mapping[str, Any]) -> Resource:
    kind = raw.get("responseKind") or {}
    return Resource(
        group=str(kind.get("group") or group),
        version=str(kind.get("version") or version),
        kind=str(kind.get("kind") or ""),
        plural=str(raw["resource"]),
        namespaced=raw.get("scope") == "Namespaced",
        verbs=frozenset(raw.get("verbs") or ()),
    )
