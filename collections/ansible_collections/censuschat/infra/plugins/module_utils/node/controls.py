# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Controls as data: the typed control, the validation of a catalogue, and a user's selection from it.

Pure: runs on the controller before anything is touched, and in unit tests. Every refusal is one
sentence that names the control and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.control_state import (
    check_ranges,
    check_state,
    check_values,
    claims,
    merged,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

PROFILES = ("baseline", "cis_level1", "cis_level2")
SEVERITIES = ("low", "medium", "high")
PLATFORMS = ("vm", "container")
DOMAINS = (
    "accounts",
    "apparmor",
    "audit",
    "banners",
    "bootloader",
    "core_dumps",
    "cron",
    "firewall",
    "integrity",
    "kernel_modules",
    "kubernetes",
    "logging",
    "mounts",
    "packages",
    "pam",
    "passwords",
    "permissions",
    "services",
    "sshd",
    "sudo",
    "suid",
    "sysctl",
    "time",
    "updates",
)
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "applies_to": PLATFORMS,
    "domain": DOMAINS,
    "profiles": PROFILES,
    "severity": SEVERITIES,
}
_REQUIRED = ("id", "title", "rationale", "references", "domain", "severity", "profiles", "state")
_OPTIONAL = ("applies_to", "holds", "side_effects", "requires_path", "unless_path", "otherwise", "ranges")
_ID = re.compile(r"^[a-z][a-z0-9_]+$")


@dataclasses.dataclass(frozen=True)
class Control:
    """One hardening rule.

    `requires_path` names what must exist for it to mean anything on a node, `unless_path` what must not;
    `otherwise` says what a node is on which it means nothing.
    `holds` gives for each platform that cannot hold it the reason; `ranges` bounds what an override may say.
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
    holds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    side_effects: str = ""
    requires_path: str = ""
    unless_path: str = ""
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
        holds = data.get("holds") or {}
        applies_to = data.get("applies_to") or [p for p in PLATFORMS if p not in holds]
        for key, allowed in _ALLOWED.items():
            if key not in data:
                continue
            given = data[key] if isinstance(data[key], list) else [data[key]]
            wrong = [str(value) for value in given if value not in allowed]
            if wrong:
                raise NodeError(f"{name}: {key} knows {', '.join(allowed)}, not {', '.join(wrong)}")
        _check_holds(holds, applies_to, name)
        check_state(data["state"], name)
        check_ranges(data.get("ranges") or {}, name)
        check_values(data["state"], data.get("ranges") or {}, name)
        return Control(
            id=data["id"],
            title=data["title"],
            rationale=data["rationale"],
            references=tuple(data["references"]),
            domain=data["domain"],
            severity=data["severity"],
            profiles=tuple(data["profiles"]),
            applies_to=tuple(applies_to),
            state=data["state"],
            holds=holds,
            ranges=data.get("ranges") or {},
            side_effects=data.get("side_effects", ""),
            requires_path=data.get("requires_path", ""),
            unless_path=data.get("unless_path", ""),
            otherwise=data.get("otherwise", ""),
        )

    def wire(self) -> dict[str, Any]:
        """What the node needs of the control; texts for people stay on the controller."""
        sent = {
            "id": self.id,
            "applies_to": list(self.applies_to),
            "holds": dict(self.holds),
            "requires_path": self.requires_path,
            "unless_path": self.unless_path,
            "otherwise": self.otherwise,
            "state": dict(self.state),
        }
        return {key: value for key, value in sent.items() if value}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a user's choices come to: controls to hold, and excluded ones with their reasons."""

    controls: tuple[Control, ...]
    excluded: tuple[tuple[Control, str], ...]
    included: frozenset[str] = frozenset()


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
    refuse_conflicts(chosen)
    return Selection(tuple(chosen), tuple(excluded), frozenset(include))


def refuse_conflicts(controls: Sequence[Control]) -> None:
    """NodeError when two controls want different things of one kernel value, file, package, unit and so on."""
    owners: dict[str, tuple[str, str]] = {}
    for control in controls:
        for what, value in claims(control.state):
            other, theirs = owners.setdefault(what, (control.id, value))
            if theirs != value:
                raise NodeError(f"controls {other} and {control.id} want different things of {what}: exclude one")


def _check_holds(holds: Any, applies_to: Sequence[str], name: str) -> None:
    if not isinstance(holds, Mapping) or any(p not in PLATFORMS or not isinstance(r, str) for p, r in holds.items()):
        raise NodeError(f"{name}: holds gives the reason for a platform ({', '.join(PLATFORMS)}) that cannot hold it")
    both = [platform for platform in holds if platform in applies_to]
    if both:
        raise NodeError(f"{name}: applies_to and holds contradict each other about {both[0]}: keep one of them")
    short = [platform for platform, reason in holds.items() if len(reason.strip()) < 8]
    if short or not applies_to:
        raise NodeError(f"{name}: holds needs its reason in words, and some platform that can hold the control")


def unknown_control(identifier: str, controls: Mapping[str, Control]) -> str:
    """One sentence on an id that the catalogue does not have, with the nearest that it has."""
    near = difflib.get_close_matches(str(identifier), list(controls), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"control {identifier!r} is not in the catalogue{hint}"


def _overridden(control: Control, override: Mapping[str, Any] | None) -> Control:
    if override is None:
        return control
    name = f"hardening override: control {control.id}"
    if not isinstance(override, Mapping) or not override:
        raise NodeError(f"{name}: an override is a mapping of what is different in its state, not {override!r}")
    state = merged(control.state, override)
    check_state(state, name)
    check_values(state, control.ranges, name)
    return dataclasses.replace(control, state=state)
