# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planners of node_harden: pure, one per kind of state, from desired and observed to steps.

A step belongs to one control; the engine applies the steps of all controls together and reports
each control by its own.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import PathState

# Read after every other file, so that its lines are the ones that count at boot.
SYSCTL_FILE = "/etc/sysctl.d/99-zz-censuschat.conf"
MODPROBE_FILE = "/etc/modprobe.d/censuschat-hardening.conf"
HEADER = "# Managed by censuschat.infra.node_harden; local changes are overwritten.\n"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Keys to be set in a text file of `key SEPARATOR value` lines."""

    path: str
    separator: str
    values: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Permission:
    """Ownership, and the most that the mode may allow, of paths (globs allowed).

    Of `owners` and `groups` the first is set, all are accepted. kind: file, directory, or "" for both. With `recursive`
    all below a directory is meant too, files with `mode` and directories with `directory_mode`.
    """

    paths: tuple[str, ...]
    owners: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    mode: int = 0o7777
    directory_mode: int | None = None
    kind: str = ""
    recursive: bool = False
    skipped: tuple[str, ...] = ()

    @staticmethod
    def of(data: Mapping[str, Any]) -> Permission:
        """Read an entry of a control's state."""
        mode = int(data.get("mode", "7777"), 8)
        recursive = bool(data.get("recursive"))
        apart = int(data.get("directory_mode", "7777"), 8) if recursive else None
        return Permission(
            paths=tuple(data["paths"]),
            owners=(data["owner"],) if data.get("owner") else tuple(data.get("owners") or ()),
            groups=tuple(data.get("groups") or ()),
            mode=mode,
            directory_mode=apart,
            kind=data.get("kind") or "",
            recursive=recursive,
            skipped=tuple(data.get("except") or ()),
        )

    def speaks_of(self, path: str) -> bool:
        """Whether `path` is one of those meant."""
        if any(globbed(path, pattern) for pattern in self.skipped):
            return False
        return any(globbed(path, pattern, below=self.recursive) for pattern in self.paths)


@dataclasses.dataclass(frozen=True)
class Document:
    """What a program's own configuration has to say. Another role writes it; `remedy` says which.

    Of several paths (globs allowed, later ones win key by key) the merged content counts. kind: yaml, or flags for the
    arguments of a static pod's container.
    """

    paths: tuple[str, ...]
    kind: str
    expect: Mapping[str, Any]
    remedy: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """The node as observed for all selected controls at once."""

    container: str = ""
    kernel: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    files: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    permissions: Mapping[str, PathState] = dataclasses.field(default_factory=dict)
    documents: Mapping[tuple[str, ...], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """The merged content at each document's paths; flags under their names."""


def globbed(path: str, pattern: str, *, below: bool = False) -> bool:
    """Whether the glob `pattern` finds `path`; a star does not reach over a slash. `below`: or a directory above it."""
    parts, wanted = path.split("/"), pattern.split("/")
    if len(parts) != len(wanted) and not (below and len(parts) > len(wanted)):
        return False
    return all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=False))


def normal(value: str) -> str:
    """A kernel value with its white space evened out, as /proc and sysctl.d write it differently."""
    return " ".join(value.split())


def parse_sysctl(text: str) -> dict[str, str]:
    """The keys of a sysctl.d file."""
    found: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        if line and line[0] not in "#;" and "=" in line:
            key, value = line.split("=", 1)
            found[key.strip().lstrip("-")] = normal(value)
    return found


def key_matches(live: str, key: str) -> bool:
    """Whether the running key `live` is meant by `key`, whose star stands for each interface."""
    return fnmatch.fnmatchcase(live, key)


def plan_sysctl(desired: Mapping[str, str], facts: Facts) -> list[Action]:
    """What differs in the file that holds from the next boot, and in the running kernel."""
    stored = parse_sysctl(facts.files.get(SYSCTL_FILE) or "")
    actions: list[Action] = []
    for key, value in desired.items():
        if stored.get(key) != normal(value):
            before = f"{key} = {stored[key]}\n" if key in stored else ""
            actions.append(
                Action("sysctl_file", key, f"= {normal(value)} at boot", value, before, f"{key} = {normal(value)}\n")
            )
        for live in sorted(k for k in facts.kernel if key_matches(k, key)):
            now = facts.kernel[live]
            if now != normal(value):
                actions.append(
                    Action(
                        "sysctl", live, f"{now} -> {value}", normal(value), f"{live} = {now}\n", f"{live} = {value}\n"
                    )
                )
    return actions


def render_sysctl(desired: Mapping[str, str]) -> str:
    """The whole sysctl.d file for the union of all controls."""
    return HEADER + "".join(f"{key} = {normal(value)}\n" for key, value in sorted(desired.items()))


def blocked_lines(module: str) -> str:
    """`install` stops loading by name, `blacklist` loading by alias."""
    return f"install {module} /bin/false\nblacklist {module}\n"


def plan_modules(desired: Sequence[str], facts: Facts) -> list[Action]:
    """Modules that modprobe would still load, or that are loaded now."""
    text = facts.files.get(MODPROBE_FILE) or ""
    actions = [
        Action("module_file", m, f"{m} is not blocked", m, after=blocked_lines(m))
        for m in desired
        if blocked_lines(m) not in text
    ]
    # What is loaded in a container is the machine's.
    return actions + [
        Action("module", m, f"{m} is loaded", m, "loaded\n", "not loaded\n")
        for m in desired
        if m.replace("-", "_") in facts.modules and not facts.container
    ]


def render_modules(desired: Sequence[str]) -> str:
    """The whole modprobe.d file for the union of all controls."""
    return HEADER + "".join(blocked_lines(module) for module in sorted(set(desired)))


def set_keys(text: str, setting: Setting) -> str:
    """`text` with each key set once: the first line that sets it is changed, later ones go, a missing one is added."""
    lines = text.splitlines()
    for key, value in setting.values.items():
        wanted = f"{key}{setting.separator}{value}"
        hits = [i for i, line in enumerate(lines) if _sets(line, key)]
        if hits and _value(lines[hits[0]], key) == normal(value):
            wanted = lines[hits[0]]
        if hits:
            lines[hits[0]] = wanted
            for index in reversed(hits[1:]):
                del lines[index]
        else:
            lines.append(wanted)
    return "\n".join(lines) + "\n"


def plan_setting(setting: Setting, facts: Facts) -> list[Action]:
    """The keys of `setting` that the file does not hold as wanted."""
    now = facts.files.get(setting.path) or ""
    actions = []
    for key, value in setting.values.items():
        one = Setting(setting.path, setting.separator, {key: value})
        after = set_keys(now, one)
        if after != now:
            held = [line for line in now.splitlines() if _sets(line, key)]
            before = "".join(f"{line}\n" for line in held)
            actions.append(
                Action(
                    "setting",
                    f"{setting.path} {key}",
                    f"{_value(held[0], key) if held else 'unset'} -> {value}",
                    one,
                    before,
                    f"{key}{setting.separator}{value}\n",
                )
            )
    return actions


def _sets(line: str, key: str) -> bool:
    return re.match(rf"\s*{re.escape(key)}(\s|=|$)", line) is not None


def _value(line: str, key: str) -> str:
    rest = line.strip()[len(key) :].strip()
    return normal(rest[1:] if rest.startswith("=") else rest)


def plan_permission(want: Permission, facts: Facts) -> list[Action]:
    """Paths whose owner, group or mode allows more than wanted; a stricter mode is left alone."""
    actions = []
    for path, now in sorted(facts.permissions.items()):
        if now.kind in ("absent", "link") or want.kind not in ("", now.kind) or not want.speaks_of(path):
            continue
        owner = now.owner if not want.owners or now.owner in want.owners else want.owners[0]
        group = now.group if not want.groups or now.group in want.groups else want.groups[0]
        apart = want.directory_mode is not None and now.kind == "directory"
        mode = now.mode & (want.directory_mode if apart and want.directory_mode is not None else want.mode)
        before = f"{now.owner}:{now.group} {now.mode:04o}"
        after = f"{owner}:{group} {mode:04o}"
        if before != after:
            payload = (owner, group, mode)
            actions.append(Action("permission", path, f"{before} -> {after}", payload, before + "\n", after + "\n"))
    return actions


def agree(actions: Sequence[Action]) -> list[Action]:
    """The same actions, where those on one path's attributes all lead to what none of their controls objects to.

    Each was planned from what stands there now; the last one carried out would undo the others.
    """
    wanted: dict[str, list[Action]] = {}
    for action in actions:
        if action.kind == "permission":
            wanted.setdefault(action.target, []).append(action)
    return [_together(a, wanted[a.target]) if len(wanted.get(a.target, ())) > 1 else a for a in actions]


def _together(action: Action, all_of_path: Sequence[Action]) -> Action:
    before = action.before.rstrip()
    now_owner, now_group = before.split(" ")[0].split(":")
    payloads = [a.payload for a in all_of_path]
    owner = next((o for o, _g, _m in payloads if o != now_owner), now_owner)
    group = next((g for _o, g, _m in payloads if g != now_group), now_group)
    # What one takes away stays away; the sticky bit is the only one that a control sets.
    mode = functools.reduce(operator.and_, (m for _o, _g, m in payloads)) & 0o6777
    mode |= functools.reduce(operator.or_, (m for _o, _g, m in payloads)) & 0o1000
    after = f"{owner}:{group} {mode:04o}"
    return dataclasses.replace(action, detail=f"{before} -> {after}", payload=(owner, group, mode), after=f"{after}\n")


def judge_document(want: Document, facts: Facts) -> list[str]:
    """What the configuration says otherwise than it should, each a sentence with the remedy."""
    content = facts.documents.get(want.paths, {})
    found = []
    for key, expected in want.expect.items():
        rule = expected if isinstance(expected, Mapping) else {"equals": expected}
        why = _differs(_at(content, key, want.kind), rule)
        if why:
            found.append(f"{want.paths[-1] if len(want.paths) == 1 else want.paths[0]}: {key} {why}: {want.remedy}")
    return found


def flags_of(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The `--name=value` arguments of a pod's first container; a flag without a value is true."""
    containers = (pod.get("spec") or {}).get("containers") or [{}]
    words = [*(containers[0].get("command") or []), *(containers[0].get("args") or [])]
    split = [word[2:].partition("=") for word in words if isinstance(word, str) and word.startswith("--")]
    return {name: value if equals else "true" for name, equals, value in split}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put over it, mappings key by key, as the kubelet merges its drop-ins."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _at(content: Mapping[str, Any], key: str, kind: str) -> Any:
    """The value at a key; in YAML dots go down into mappings. None when it is not there."""
    if kind == "flags":
        return content.get(key)
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _differs(value: Any, rule: Mapping[str, Any]) -> str:
    """Why the value is not as the rule wants; empty when it is."""
    value = rule.get("default") if value is None else value
    if rule.get("absent"):
        return f"is set to {_plain(value)}" if value is not None else ""
    if value is None or value == "":
        return "is not set"
    items = [_plain(v) for v in value] if isinstance(value, list) else _plain(value).split(",")
    if "equals" in rule and _plain(value) != _plain(rule["equals"]):
        return f"is {_plain(value)}, not {_plain(rule['equals'])}"
    if "one_of" in rule and _plain(value) not in map(_plain, rule["one_of"]):
        return f"is {_plain(value)}, none of {', '.join(map(_plain, rule['one_of']))}"
    lacking = [_plain(v) for v in rule.get("contains", ()) if _plain(v) not in items]
    unwanted = [_plain(v) for v in rule.get("excludes", ()) if _plain(v) in items]
    strange = [item for item in items if "within" in rule and item not in map(_plain, rule["within"])]
    if lacking or unwanted or strange:
        parts = [f"lacks {', '.join(lacking)}" if lacking else ""]
        parts.append(f"has {', '.join([*unwanted, *strange])}" if unwanted or strange else "")
        return " and ".join(part for part in parts if part)
    if "at_least" in rule and not (_plain(value).isdigit() and int(_plain(value)) >= rule["at_least"]):
        return f"is {_plain(value)}, less than {rule['at_least']}"
    return ""


def _plain(value: Any) -> str:
    """A value as text; YAML's true and a flag's "true" are the same."""
    return str(value).lower() if isinstance(value, bool) else str(value)
