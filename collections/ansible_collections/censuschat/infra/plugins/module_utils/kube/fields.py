# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Pure comparison of a desired object with the live one, and what of an object may be shown.

An object needs no request when the API would answer an apply with the very same object: every desired value is the
live one, and the fields our manager owns are exactly the desired ones. Whatever cannot be decided here for certain
(defaulted keys, unknown atomic maps, other spellings of a quantity) counts as different and goes through the API.

Form of fieldsV1: https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import Document

ATOMIC_MAPS = frozenset(
    {
        "claimRef",
        "configMapKeyRef",
        "fieldRef",
        "fileKeyRef",
        "labelSelector",
        "namespaceSelector",
        "nodeSelector",
        "objectSelector",
        "podSelector",
        "preference",
        "requiredDuringSchedulingIgnoredDuringExecution",
        "resourceFieldRef",
        "roleRef",
        "scaleTargetRef",
        "secretKeyRef",
        "selector",
        "targetRef",
    }
)
"""Maps that the API's own types own as one (x-kubernetes-map-type: atomic); their entry in fieldsV1 is a leaf."""

REDACTED = "<redacted>"
_BOOKKEEPING = ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation", "selfLink")
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def unchanged(desired: Document, live: Document, manager: str) -> bool:
    """Whether applying `desired` as `manager` would leave `live` as it is, decided without the API."""
    metadata = live.get("metadata") or {}
    if metadata.get("deletionTimestamp"):
        return False
    entries = [
        e
        for e in metadata.get("managedFields") or []
        if e.get("manager") == manager and e.get("operation") == "Apply" and not e.get("subresource")
    ]
    if len(entries) != 1 or entries[0].get("apiVersion") != desired.get("apiVersion"):
        return False
    owned = dict(entries[0].get("fieldsV1") or {})
    for name, value in desired.items():
        if name in ("apiVersion", "kind"):
            continue
        node = owned.pop(f"f:{name}", None)
        if name == "metadata":
            own = {k: v for k, v in value.items() if k not in ("name", "namespace")}
            if not _map(own, metadata, node or {}):
                return False
        elif node is None or name not in live or not _value(name, value, live[name], node):
            return False
    return not owned


def _value(name: str, want: Any, live: Any, owned: Mapping[str, Any]) -> bool:
    if want is None:
        return False
    if isinstance(want, dict):
        if not isinstance(live, dict):
            return False
        if not owned:
            return (not want and not live) or (name in ATOMIC_MAPS and same(want, live))
        return _map(want, live, owned)
    if isinstance(want, list):
        if not isinstance(live, list):
            return False
        return _list(want, live, owned) if owned else same(want, live)
    return not owned and same(want, live)


def _map(want: Mapping[str, Any], live: Mapping[str, Any], owned: Mapping[str, Any]) -> bool:
    fields = {k: v for k, v in owned.items() if k != "."}
    if len(fields) != len(want):
        return False
    for key, value in want.items():
        node = fields.get(f"f:{key}")
        if node is None or key not in live or not _value(key, value, live[key], node):
            return False
    return True


def _list(want: Sequence[Any], live: Sequence[Any], owned: Mapping[str, Any]) -> bool:
    fields = {k: v for k, v in owned.items() if k != "."}
    if len(fields) != len(want):
        return False
    positions: list[tuple[int, int]] = []
    for key, node in fields.items():
        sort, text = key.partition(":")[::2]
        if sort == "v":
            value = json.loads(text)
            mine = [i for i, w in enumerate(want) if same(w, value)]
            there = [i for i, item in enumerate(live) if same(item, value)]
        elif sort == "k":
            keys = json.loads(text)
            mine = [
                i
                for i, w in enumerate(want)
                if isinstance(w, dict) and all(k not in w or same(w[k], v) for k, v in keys.items())
            ]
            there = [
                i
                for i, item in enumerate(live)
                if isinstance(item, dict) and all(k in item and same(item[k], v) for k, v in keys.items())
            ]
        else:
            return False
        if len(mine) != 1 or len(there) != 1:
            return False
        if sort == "k" and not _map(want[mine[0]], live[there[0]], node):
            return False
        positions.append((mine[0], there[0]))
    positions.sort()
    order = [there for _mine, there in positions]
    return [mine for mine, _there in positions] == list(range(len(want))) and order == sorted(order)


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and len(one) == len(other)
            and all(k in other and same(v, other[k]) for k, v in one.items())
        )
    if isinstance(one, list):
        return (
            isinstance(other, list)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other, strict=True))
        )
    return bool(one == other)


# ---- what may be shown ----


def shown(document: Document | None) -> Document:
    """What of an object a diff is about: without the API's own bookkeeping and without status."""
    if not document:
        return {}
    kept = {k: v for k, v in document.items() if k != "status"}
    kept["metadata"] = {k: v for k, v in (document.get("metadata") or {}).items() if k not in _BOOKKEEPING}
    return kept


def diff_pair(before: Document | None, after: Document | None) -> tuple[Document, Document]:
    """Both sides of a diff. Of a Secret only the names of its entries show, and which of them differ."""
    old, new = shown(before), shown(after)
    if "Secret" not in (old.get("kind"), new.get("kind")):
        return old, new
    old, new = copy.deepcopy(old), copy.deepcopy(new)
    for part in ("data", "stringData"):
        left, right = old.get(part) or {}, new.get(part) or {}
        for name in {*left, *right}:
            equal = name in left and name in right and left[name] == right[name]
            for side, word in ((left, "before"), (right, "after")):
                if name in side:
                    side[name] = REDACTED if equal else f"{REDACTED} ({word})"
    for side in (old, new):
        annotations = (side.get("metadata") or {}).get("annotations") or {}
        if _LAST_APPLIED in annotations:
            annotations[_LAST_APPLIED] = REDACTED
    return old, new


class Censor:
    """Takes the values of Secrets out of messages."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._words: set[str] = set()
        for document in documents:
            if document.get("kind") != "Secret":
                continue
            for part in ("data", "stringData"):
                values = document.get(part)
                if isinstance(values, dict):
                    for value in values.values():
                        self._add(value)

    def _add(self, value: Any) -> None:
        import base64

        text = str(value)
        words = {text, *text.splitlines()}
        try:
            plain = base64.b64decode(text, validate=True).decode()
            words |= {plain, *plain.splitlines()}
        except ValueError:
            pass
        # Shorter ones would cut words out of every message and protect nothing.
        self._words |= {w for w in words if len(w) >= 4}

    def __call__(self, text: str) -> str:
        for word in sorted(self._words, key=len, reverse=True):
            text = text.replace(word, REDACTED)
        return text
