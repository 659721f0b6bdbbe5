# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Pure plans of k8s_apply: from documents to a checked set in waves, from an ApplySet's members to what goes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.discovery import Kinds, defined_by
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import (
    Document,
    InputError,
    Key,
    Resource,
    Source,
    Wanted,
)

LIMIT_B = 3 * 1024 * 1024
"""Bytes of one request that kube-apiserver takes (its MaxRequestBodyBytes); etcd's own limit is half of it."""

CRD_GROUP = "apiextensions.k8s.io"
DEFINITIONS, NAMESPACES, FOUNDATIONS, REST, ADMISSION = range(5)
WAVES = ("definitions", "namespaces", "foundations", "rest", "admission")
# What objects of the rest are admitted by, or start with.
_FOUNDATIONS = frozenset(
    {
        "ClusterRole",
        "ConfigMap",
        "LimitRange",
        "NetworkPolicy",
        "PersistentVolume",
        "PriorityClass",
        "ResourceQuota",
        "Role",
        "RuntimeClass",
        "Secret",
        "ServiceAccount",
        "StorageClass",
    }
)
# What answers for other requests: last, when what it needs is there and nothing of the set can be refused by it.
_ADMISSION = frozenset({"admissionregistration.k8s.io", "apiregistration.k8s.io"})


def wave(key: Key) -> int:
    """The wave an object is applied in."""
    if key.group == CRD_GROUP:
        return DEFINITIONS
    if key.kind == "Namespace" and not key.group:
        return NAMESPACES
    if key.group in _ADMISSION:
        return ADMISSION
    return FOUNDATIONS if key.kind in _FOUNDATIONS else REST


def keeps(key: Key) -> bool:
    """Whether deleting it would delete what others own: only when it is named."""
    return wave(key) in (DEFINITIONS, NAMESPACES)


# ---- the set ----


def build(
    documents: Iterable[tuple[Source, Any] | str], kinds: Kinds, default_namespace: str
) -> tuple[list[Wanted], frozenset[tuple[str, str]]]:
    """The checked set, in the order given, and the (group, kind) that only its own CRDs will bring.

    InputError lists everything that is wrong: what could not be read, what is no object, unknown kinds, namespaces
    that do not fit, one identity twice, objects larger than a request may be.
    """
    problems: list[str] = []
    objects = list(_objects(documents, problems))
    coming: set[tuple[str, str]] = set()
    for _source, body in objects:
        if body["kind"] == "CustomResourceDefinition" and str(body["apiVersion"]).startswith(f"{CRD_GROUP}/"):
            for brought in defined_by(body):
                if kinds.find(brought.api_version, brought.kind) is None:
                    coming.add((brought.group, brought.kind))
                    kinds.add([brought])
    wanted: list[Wanted] = []
    first: dict[Key, Source] = {}
    for source, body in objects:
        name = body["metadata"]["name"]
        resource = kinds.find(str(body["apiVersion"]), str(body["kind"]))
        if resource is None:
            problems.append(
                f"{source}: {body['kind']} {name}: {kinds.problem(str(body['apiVersion']), str(body['kind']))}"
            )
            continue
        if "patch" not in resource.verbs:
            problems.append(f"{source}: {resource.kind} {name}: the API offers no patch for {resource.plural}")
            continue
        namespace = body["metadata"].get("namespace") or ""
        if not resource.namespaced and namespace:
            problems.append(
                f"{source}: {resource.kind} {name}: metadata.namespace is {namespace!r}, "
                f"but a {resource.kind} belongs to the whole cluster; take the namespace out"
            )
            continue
        if resource.namespaced and resource.plural and not namespace:
            namespace = default_namespace
        one = Wanted(Key(resource.group, resource.kind, namespace, name), resource, _normal(body, namespace), source)
        if one.key in first:
            problems.append(
                f"{source}: {one.key} is given twice; the other is {first[one.key]}; take one of the two out"
            )
            continue
        first[one.key] = source
        size = _size(one.body)
        if size > LIMIT_B:
            problems.append(
                f"{source}: {one.key} has {size / 1048576:.1f} MiB; the API takes at most "
                f"{LIMIT_B // 1048576} MiB in one object; split its data"
            )
            continue
        wanted.append(one)
    if problems:
        raise InputError(problems)
    return wanted, frozenset(coming)


def _objects(documents: Iterable[tuple[Source, Any] | str], problems: list[str]) -> Iterable[tuple[Source, Document]]:
    for item in documents:
        if isinstance(item, str):
            problems.append(item)
            continue
        source, body = item
        if isinstance(body, dict) and isinstance(body.get("items"), list) and str(body.get("kind")).endswith("List"):
            for entry in body["items"]:
                problem = _shape(entry)
                if problem:
                    problems.append(f"{source}, in its list: {problem}")
                else:
                    yield source, entry
            continue
        problem = _shape(body)
        if problem:
            problems.append(f"{source}: {problem}")
        else:
            yield source, body


_PATH_NAME = re.compile(r"^(?!\.{1,2}$)[^/%\s]+$")


def _shape(body: Any) -> str:
    """What keeps a document from being an object; empty when nothing does."""
    if not isinstance(body, dict):
        return f"is not an object but {_kind_of(body)}; an object begins with apiVersion and kind"
    for field in ("apiVersion", "kind"):
        if not isinstance(body.get(field), str) or not body[field]:
            return f"{field} is missing" if field not in body else f"{field} must be text, not {_kind_of(body[field])}"
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        return f"{body['kind']}: metadata is missing"
    name = metadata.get("name")
    if not name and metadata.get("generateName"):
        return (
            f"{body['kind']}: metadata.generateName cannot be applied, since each run would make another one; name it"
        )
    if not isinstance(name, str) or not name:
        return (
            f"{body['kind']}: metadata.name is missing"
            if name is None or name == ""
            else (f"{body['kind']}: metadata.name must be text, not {_kind_of(name)}; put it in quotes")
        )
    if not _PATH_NAME.match(name):
        return f"{body['kind']}: metadata.name {name!r} cannot be a name (no slash, percent sign or blank)"
    namespace = metadata.get("namespace")
    if namespace is not None and (not isinstance(namespace, str) or not _PATH_NAME.match(namespace or "-")):
        return f"{body['kind']} {name}: metadata.namespace {namespace!r} cannot be a namespace's name"
    problem = _not_json(body, "")
    return f"{body['kind']} {name}: {problem}" if problem else ""


def _not_json(value: Any, path: str) -> str:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path or 'the object'} has the key {key!r}, which is not text; put it in quotes"
            problem = _not_json(item, f"{path}.{key}" if path else key)
            if problem:
                return problem
        return ""
    if isinstance(value, list):
        for index, item in enumerate(value):
            problem = _not_json(item, f"{path}[{index}]")
            if problem:
                return problem
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}, which JSON has no number for"
    if value is None or isinstance(value, (str, int, float, bool)):
        return ""
    return f"{path} is {_kind_of(value)}, which the API has no value for"


def _kind_of(value: Any) -> str:
    words = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "empty" if value is None else words.get(type(value), type(value).__name__)


def _normal(body: Document, namespace: str) -> Document:
    """The object as it is sent: with its namespace, a Secret's stringData as data (the API never shows stringData)."""
    metadata = {k: v for k, v in body["metadata"].items() if k not in ("managedFields", "namespace")}
    if namespace:
        metadata["namespace"] = namespace
    if metadata.get("creationTimestamp", 0) is None:
        del metadata["creationTimestamp"]
    if body["kind"] == "Namespace" and body["apiVersion"] == "v1":
        # The API adds it in any case; unless it is ours, the second apply changes the owners of fields.
        metadata["labels"] = {**(metadata.get("labels") or {}), "kubernetes.io/metadata.name": metadata["name"]}
    sent = {**body, "metadata": metadata}
    texts = body.get("stringData")
    secret = body["kind"] == "Secret" and body["apiVersion"] == "v1"
    if secret and isinstance(texts, dict) and all(isinstance(v, str) for v in texts.values()):
        del sent["stringData"]
        encoded = {k: base64.b64encode(v.encode()).decode() for k, v in texts.items()}
        sent["data"] = {**(body.get("data") or {}), **encoded}
    return sent


def _size(body: Document) -> int:
    return len(json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode())


def in_waves(wanted: Iterable[Wanted]) -> list[list[Wanted]]:
    """The set by wave; waves without objects are left out."""
    found: dict[int, list[Wanted]] = {}
    for one in wanted:
        found.setdefault(wave(one.key), []).append(one)
    return [found[number] for number in sorted(found)]


# ---- reading ----

LIST_FROM = 8
"""From how many objects of one kind on a LIST is cheaper than single reads."""


@dataclasses.dataclass(frozen=True)
class Read:
    """Reads of one kind: a LIST of one namespace (empty: of all), or of the single objects."""

    resource: Resource
    namespace: str
    keys: tuple[Key, ...]
    listed: bool


def reads(wanted: Iterable[Wanted]) -> list[Read]:
    """How the live objects are read: every object once, many of a kind with one LIST.

    Up to three namespaces are listed singly; beyond, one LIST of the kind over all namespaces is cheaper.
    """
    groups: dict[Resource, dict[str, list[Key]]] = {}
    for one in wanted:
        groups.setdefault(one.resource, {}).setdefault(one.key.namespace, []).append(one.key)
    plan: list[Read] = []
    for resource, namespaces in groups.items():
        listable = "list" in resource.verbs
        many = {n: k for n, k in namespaces.items() if listable and len(k) >= LIST_FROM}
        if len(many) > 3:
            plan.append(Read(resource, "", tuple(k for keys in namespaces.values() for k in keys), listed=True))
            continue
        for namespace, keys in namespaces.items():
            plan.append(Read(resource, namespace, tuple(keys), listed=namespace in many))
    return plan


# ---- ApplySets (KEP-3659) ----

PART_OF = "applyset.kubernetes.io/part-of"
ID_LABEL = "applyset.kubernetes.io/id"
TOOLING = "applyset.kubernetes.io/tooling"
GROUP_KINDS = "applyset.kubernetes.io/contains-group-kinds"
NAMESPACES_OF = "applyset.kubernetes.io/additional-namespaces"
TOOL = "censuschat-infra/v1"


@dataclasses.dataclass(frozen=True)
class ApplySet:
    """A set of objects that belong together; its parent is a ConfigMap that records what kinds it has."""

    name: str
    namespace: str

    @property
    def id(self) -> str:
        text = f"{self.name}.{self.namespace}.ConfigMap."
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        return f"applyset-{digest}-v1"

    def member(self, body: Document) -> Document:
        """The object with the label that makes it a member."""
        metadata = {**body["metadata"], "labels": {**(body["metadata"].get("labels") or {}), PART_OF: self.id}}
        return {**body, "metadata": metadata}

    def parent(self, group_kinds: Iterable[str], namespaces: Iterable[str]) -> Document:
        """The parent object of a set with these kinds (`Kind.group`) in these namespaces."""
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": {ID_LABEL: self.id},
                "annotations": {
                    TOOLING: TOOL,
                    GROUP_KINDS: ",".join(sorted(set(group_kinds))),
                    NAMESPACES_OF: ",".join(sorted(set(namespaces) - {self.namespace, ""})),
                },
            },
        }

    def problem(self, parent: Mapping[str, Any]) -> str:
        """Why a live ConfigMap of this name cannot be the parent; empty when it can."""
        metadata = parent.get("metadata") or {}
        tooling = (metadata.get("annotations") or {}).get(TOOLING, "")
        there = (metadata.get("labels") or {}).get(ID_LABEL, "")
        where = f"apply_set {self.namespace}/{self.name}"
        if tooling and tooling.partition("/")[0] != TOOL.partition("/")[0]:
            return f"{where} belongs to another tool ({tooling}); give the set another name"
        if not there and parent.get("data"):
            return f"{where}: a ConfigMap of that name is there and is no ApplySet; give the set another name"
        return ""


def group_kinds(keys: Iterable[Key]) -> set[str]:
    """The kinds of a set as the parent's annotation writes them."""
    return {f"{key.kind}.{key.group}".rstrip(".") for key in keys}


def recorded(parent: Mapping[str, Any] | None, annotation: str) -> set[str]:
    """A list in the parent's annotation."""
    annotations = ((parent or {}).get("metadata") or {}).get("annotations") or {}
    return {part for part in str(annotations.get(annotation, "")).split(",") if part}


@dataclasses.dataclass(frozen=True)
class Member:
    """A live object that carries the set's label."""

    key: Key
    resource: Resource
    uid: str
    owned: bool
    terminating: bool


def prune(members: Sequence[Member], wanted: Iterable[Key], named: Iterable[str]) -> tuple[list[Member], list[Member]]:
    """Members to delete and members to keep though they are no longer wanted, both in an order that is safe to follow.

    named: `Kind/name` or `Kind/namespace/name` of namespaces and CRDs that may go. What a controller made (and copied
    the label to) is its owner's affair.
    """
    keys, names = set(wanted), set(named)
    gone: list[Member] = []
    kept: list[Member] = []
    for member in members:
        if member.key in keys or member.owned or member.terminating:
            continue
        if keeps(member.key) and f"{member.key.kind}/{member.key.name}" not in names:
            kept.append(member)
        else:
            gone.append(member)
    gone.sort(key=lambda m: (-wave(m.key), str(m.key)))
    return gone, sorted(kept, key=lambda m: str(m.key))
