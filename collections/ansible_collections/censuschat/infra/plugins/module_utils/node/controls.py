# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controls as data: the typed control, the validation of a catalogue, and a user's selection from it.

Pure: runs on the controller before anything is touched, and in unit tests. Every refusal is one
sentence that names the control and the remedy.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

PROFILES = ("baseline", "cis_level1", "cis_level2")
SEVERITIES = ("low", "medium", "high")
PLATFORMS = ("vm", "container")
DOMAINS = (
    "accounts",
    "banners",
    "core_dumps",
    "cron",
    "kernel_modules",
    "kubernetes",
    "logging",
    "packages",
    "passwords",
    "permissions",
    "services",
    "sshd",
    "sudo",
    "sysctl",
    "updates",
)
# Documents are programs' own configurations: read, never written here.
DOCUMENT_KINDS = ("yaml", "flags")
EXPECTATIONS = ("absent", "at_least", "contains", "default", "equals", "excludes", "one_of", "present", "within")
# What a control's state may be made of; each has its planner in harden_plan or, for sshd, in sshd_plan.
STATE_KEYS = ("accounts", "blocked_modules", "documents", "node", "permissions", "settings", "sshd", "sysctl")
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "applies_to": PLATFORMS,
    "domain": DOMAINS,
    "profiles": PROFILES,
    "severity": SEVERITIES,
}
_REQUIRED = ("id", "title", "rationale", "references", "domain", "severity", "profiles", "applies_to", "state")
_OPTIONAL = ("side_effects", "requires_path", "otherwise")
_ID = re.compile(r"^[a-z][a-z0-9_]+$")
_SYSCTL = re.compile(r"^[a-z0-9_]+(\.[A-Za-z0-9_*-]+)+$")


@dataclasses.dataclass(frozen=True)
class Control:
    """One hardening rule.

    `requires_path` names what must exist for it to mean anything on a node, `otherwise` what a node without it is.
    """

    id: str
    title: str
    rationale: str
    references: tuple[str, ...]
    domain: str
    severity: str
    profiles: tuple[str, ...]
    applies_to: tuple[str, ...]
    state: Mapping[str, Any]
    side_effects: str = ""
    requires_path: str = ""
    otherwise: str = ""

    @staticmethod
    def of(data: Any, source: str) -> Control:
        """Read one catalogue entry; `source` is the file or variable it came from, for the message."""
        if not isinstance(data, Mapping):
            raise NodeError(f"{source}: a control is a mapping with id, title, state ..., not {data!r}")
        name = f"{source}: control {data.get('id', '(without id)')}"
        missing = [key for key in _REQUIRED if not data.get(key)]
        if missing:
            raise NodeError(f"{name} lacks {', '.join(missing)}")
        unknown = [key for key in data if key not in (*_REQUIRED, *_OPTIONAL)]
        if unknown:
            raise NodeError(f"{name} has unknown keys: {', '.join(unknown)}")
        if not _ID.match(str(data["id"])):
            raise NodeError(f"{name}: an id is lower-case letters, digits and underscores")
        for key, allowed in _ALLOWED.items():
            given = data[key] if isinstance(data[key], list) else [data[key]]
            wrong = [str(value) for value in given if value not in allowed]
            if wrong:
                raise NodeError(f"{name}: {key} knows {', '.join(allowed)}, not {', '.join(wrong)}")
        check_state(data["state"], name)
        return Control(
            id=data["id"],
            title=data["title"],
            rationale=data["rationale"],
            references=tuple(data["references"]),
            domain=data["domain"],
            severity=data["severity"],
            profiles=tuple(data["profiles"]),
            applies_to=tuple(data["applies_to"]),
            state=data["state"],
            side_effects=data.get("side_effects", ""),
            requires_path=data.get("requires_path", ""),
            otherwise=data.get("otherwise", ""),
        )

    def wire(self) -> dict[str, Any]:
        """What the node needs of the control; texts for people stay on the controller."""
        return {
            "id": self.id,
            "domain": self.domain,
            "applies_to": list(self.applies_to),
            "requires_path": self.requires_path,
            "otherwise": self.otherwise,
            "state": dict(self.state),
        }


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a user's choices come to: controls to hold, and excluded ones with their reasons."""

    controls: tuple[Control, ...]
    excluded: tuple[tuple[Control, str], ...]


def check_state(state: Any, name: str) -> None:
    """Refuse a desired state that the engine would not understand."""
    if not isinstance(state, Mapping) or not state:
        raise NodeError(f"{name}: state is a mapping of {', '.join(STATE_KEYS)}")
    unknown = [key for key in state if key not in STATE_KEYS]
    if unknown:
        raise NodeError(f"{name}: state knows {', '.join(STATE_KEYS)}, not {', '.join(unknown)}")
    for key, value in (state.get("sysctl") or {}).items():
        if not _SYSCTL.match(key):
            raise NodeError(f"{name}: {key!r} is not a sysctl key in dots")
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            raise NodeError(f"{name}: sysctl {key} needs a number or a text, not {value!r}")
    for entry in state.get("permissions") or []:
        mode = entry.get("mode", "0000")
        if not entry.get("paths") or not re.fullmatch(r"0?[0-7]{3,4}", str(mode)) or not isinstance(mode, str):
            raise NodeError(f"{name}: permissions need paths and an octal mode in quotes")
    for entry in state.get("documents") or []:
        if not entry.get("paths") or entry.get("kind") not in DOCUMENT_KINDS or not entry.get("remedy"):
            raise NodeError(f"{name}: documents need paths, a kind ({', '.join(DOCUMENT_KINDS)}) and a remedy")
        for key, wanted in (entry.get("expect") or {"(nothing)": {}}).items():
            unknown = [t for t in wanted if t not in EXPECTATIONS] if isinstance(wanted, Mapping) else []
            if unknown or wanted == {} or isinstance(wanted, list):
                raise NodeError(f"{name}: expect {key}: a value, or a mapping of {', '.join(EXPECTATIONS)}")
    for entry in state.get("settings") or []:
        if not entry.get("path") or not isinstance(entry.get("values"), Mapping):
            raise NodeError(f"{name}: settings need a path and values")
        if entry.get("separator", " ") not in (" ", " = ", "="):
            raise NodeError(f"{name}: settings: separator is ' ', '=' or ' = '")


def catalogue(documents: Iterable[tuple[str, Any]]) -> dict[str, Control]:
    """All controls of the documents (source name, parsed content), by id; ids are unique."""
    controls: dict[str, Control] = {}
    for source, document in documents:
        if not isinstance(document, Sequence) or isinstance(document, str):
            raise NodeError(f"{source}: a catalogue file is a list of controls")
        for data in document:
            control = Control.of(data, source)
            if control.id in controls:
                raise NodeError(f"{source}: control {control.id} is defined twice")
            controls[control.id] = control
    return controls


def select(
    controls: Mapping[str, Control],
    profile: str,
    *,
    include: Sequence[str] = (),
    exclude: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Selection:
    """The controls of `profile` with a user's choices applied; NodeError says which choice cannot be."""
    exclude = exclude or {}
    overrides = overrides or {}
    if profile not in PROFILES:
        raise NodeError(f"hardening profile {profile!r} does not exist: choose {', '.join(PROFILES)}")
    for what, ids in (("include", include), ("exclude", exclude), ("override", overrides)):
        for identifier in ids:
            if identifier not in controls:
                raise NodeError(f"hardening {what}: {unknown_control(identifier, controls)}")
    for identifier, reason in exclude.items():
        if not isinstance(reason, str) or len(reason.strip()) < 8:
            raise NodeError(f"hardening exclude: {identifier} needs its reason in words")
        if identifier in overrides or identifier in include:
            raise NodeError(f"hardening: {identifier} is excluded and also overridden or included: keep one of them")
    chosen: list[Control] = []
    excluded: list[tuple[Control, str]] = []
    for control in controls.values():
        if control.id in exclude:
            excluded.append((control, exclude[control.id].strip()))
        elif profile in control.profiles or control.id in include:
            chosen.append(_overridden(control, overrides.get(control.id)))
        elif control.id in overrides:
            raise NodeError(
                f"hardening override: {control.id} is not in profile {profile}: include it or drop the override"
            )
    return Selection(tuple(chosen), tuple(excluded))


def unknown_control(identifier: str, controls: Mapping[str, Control]) -> str:
    """One sentence on an id that the catalogue does not have, with the nearest that it has."""
    near = difflib.get_close_matches(str(identifier), list(controls), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"control {identifier!r} is not in the catalogue{hint}"


def _overridden(control: Control, override: Mapping[str, Any] | None) -> Control:
    if override is None:
        return control
    state = _merged(control.state, override)
    check_state(state, f"hardening override: control {control.id}")
    return dataclasses.replace(control, state=state)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(copy.deepcopy(dict(base)))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
