"""What of a task's result may be shown and kept: its diff in short, without secrets.

Modules redact their own diffs and ``no_log`` hides whole results; this is the second line, for the modules of others
and for values that somebody put where they do not belong.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HIDDEN = "********"
LINES, WIDTH = 24, 160
"""How much of a text is kept; its digest stands for all of it."""
SHORTEST = 4
"""Characters of the shortest secret value that is looked for; shorter ones would be found in every text."""

_KEY = r"[\w.\-]*(?:passw|passphrase|secret|token|private[_-]?key|api[_-]?key|access[_-]?key|credential)[\w.\-]*"
_PAIR = re.compile(rf"(?i)(?P<key>[\"']?{_KEY}[\"']?\s*[:=]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,}}\]]+)")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_URL = re.compile(r"(?P<before>\b[a-z][a-z0-9+.\-]*://[^\s:/@]+:)[^\s@/]+(?P<after>@)")


@dataclass(frozen=True, slots=True)
class Shown:
    """One difference. what: the object or file, may be empty. before, after: the lines that differ, cut.

    digest: of all of it, redacted; it tells two differences apart that look the same when cut.
    """

    what: str
    before: str
    after: str
    digest: str


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """The text without the given values and without what stands behind the name of a secret."""
    for secret in sorted((s for s in secrets if len(s) >= SHORTEST), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _PEM.sub(HIDDEN, text)
    text = _URL.sub(rf"\g<before>{HIDDEN}\g<after>", text)
    return _PAIR.sub(lambda m: m["key"] + (m["value"] if _harmless(m["value"]) else HIDDEN), text)


def _harmless(value: str) -> bool:
    return value.strip("\"'").lower() in ("", "null", "none", "true", "false", "{", "[", "|", ">") or value.isdigit()


def differences(result: Mapping[str, Any], secrets: Collection[str] = ()) -> list[Shown]:
    """What a task's result says about its change; empty when it says nothing, one hidden entry under ``no_log``."""
    if result.get("censored") or result.get("_ansible_no_log"):
        return [Shown("", HIDDEN, HIDDEN, "")]
    found = []
    for label, one in _results(result):
        diff = one.get("diff")
        for entry in diff if isinstance(diff, list) else [diff]:
            if isinstance(entry, Mapping):
                shown = _difference(entry, label, secrets)
                if shown is not None:
                    found.append(shown)
    return found


def _results(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    items = result.get("results")
    if isinstance(items, Sequence) and not isinstance(items, str) and any(isinstance(i, Mapping) for i in items):
        for item in items:
            if isinstance(item, Mapping) and item.get("changed"):
                hidden = item.get("censored") or item.get("_ansible_no_log")
                yield str(item.get("_ansible_item_label", item.get("item", ""))), {} if hidden else item
    else:
        yield "", result


def _difference(entry: Mapping[str, Any], label: str, secrets: Collection[str]) -> Shown | None:
    if entry.get("prepared"):
        before, after = "", redact(str(entry["prepared"]), secrets)
    else:
        sides = entry.get("before"), entry.get("after")
        if _spelt_differently(*sides):
            sides = _snake(sides[0]), _snake(sides[1])
        before, after = (redact(_text(side), secrets) for side in sides)
    if before == after:
        return None
    what = str(entry.get("after_header") or entry.get("before_header") or label)
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines())) if _small(before, after) else []
    gone = [line[2:] for line in lines if line.startswith("- ")] if lines else before.splitlines()
    new = [line[2:] for line in lines if line.startswith("+ ")] if lines else after.splitlines()
    digest = hashlib.sha256(f"{before}\0{after}".encode()).hexdigest()[:16]
    return Shown(redact(what, secrets), cut(gone), cut(new), digest)


def _small(before: str, after: str) -> bool:
    # ndiff is quadratic at its worst.
    return before.count("\n") + after.count("\n") < 400


def _spelt_differently(before: Any, after: Any) -> bool:
    """Whether the same keys are written in two ways, as AWS's modules do: ``TTL`` before and ``ttl`` after."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return False
    return len(set(_snake(before)) & set(_snake(after))) > len(set(before) & set(after))


def _snake(value: Any) -> Any:
    """With all keys in one spelling."""
    if isinstance(value, Mapping):
        return {_CAMEL.sub("_", str(key)).lower(): _snake(inner) for key, inner in value.items()}
    return [_snake(inner) for inner in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, indent=1, sort_keys=True, default=str)


def cut(lines: Sequence[str]) -> str:
    """At most LINES lines of WIDTH characters, with a word about the rest."""
    kept = [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines[:LINES]]
    if len(lines) > LINES:
        kept.append(f"… {len(lines) - LINES} lines more")
    return "\n".join(kept)
