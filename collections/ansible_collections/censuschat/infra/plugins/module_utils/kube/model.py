# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The words of the Kubernetes modules: documents, objects, resources, outcomes."""

from __future__ import annotations

import dataclasses
from typing import Any

Document = dict[str, Any]
"""An object as the API knows it."""


class KubeError(Exception):
    """A failure the user can act on: what, where, why and the remedy in one message."""


class InputError(KubeError):
    """Everything that is wrong with what was given, found before anything was touched; one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(" | ".join(problems))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a document came from; number counts from 1."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}, document {self.number}"


@dataclasses.dataclass(frozen=True)
class Resource:
    """A kind the API serves, and under which path."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool
    verbs: frozenset[str] = frozenset()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "") -> str:
        """The path of the collection, or of one object."""
        base = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        scope = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{base}{scope}/{self.plural}" + (f"/{name}" if name else "")


@dataclasses.dataclass(frozen=True)
class Key:
    """What makes an object the same object, whatever version of the API it is written in."""

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One object of the desired set."""

    key: Key
    resource: Resource
    body: Document
    source: Source

    @property
    def path(self) -> str:
        return self.resource.path(self.key.namespace, self.key.name)

    def __str__(self) -> str:
        return f"{self.key} ({self.source})"


CREATED, CONFIGURED, UNCHANGED, PRUNED, FAILED = "created", "configured", "unchanged", "pruned", "failed"
RESTORED, REMOVED, KEPT = "restored", "removed", "kept"


@dataclasses.dataclass
class Outcome:
    """What became of one object. before, after: only where a diff, a check or a rollback needs them."""

    key: Key
    resource: Resource
    result: str
    source: str = ""
    message: str = ""
    before: Document | None = None
    after: Document | None = None
    uid: str = ""

    def public(self) -> dict[str, str]:
        shown = {
            "api_version": self.resource.api_version,
            "kind": self.key.kind,
            "namespace": self.key.namespace,
            "name": self.key.name,
            "result": self.result,
        }
        if self.message:
            shown["message"] = self.message
        if self.source:
            shown["source"] = self.source
        return shown
