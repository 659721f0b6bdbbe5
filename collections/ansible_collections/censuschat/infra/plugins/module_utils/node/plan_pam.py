# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of PAM: profiles of pam-auth-update with the stacks that they come to, and single lines of services."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import shown

PROFILES = "/usr/share/pam-configs"
SERVICES = "/etc/pam.d"
# What pam-auth-update writes, by the section of a profile that it is made from.
STACKS: Mapping[str, tuple[str, ...]] = {
    "Auth": ("common-auth",),
    "Account": ("common-account",),
    "Password": ("common-password",),
    "Session": ("common-session", "common-session-noninteractive"),
}
_LINE = re.compile(
    r"^\s*-?(?P<type>auth|account|password|session)\s+(?P<control>\[[^]]*\]|\S+)\s+(?P<module>\S+)(?P<rest>.*)$"
)


@dataclasses.dataclass(frozen=True)
class Profile:
    """A profile of pam-auth-update: its text, or that it is to be disabled."""

    name: str
    content: str = ""

    @property
    def path(self) -> str:
        return f"{PROFILES}/{self.name}"

    @staticmethod
    def of(data: Mapping[str, Any]) -> Profile:
        return Profile(data["profile"], data.get("content") or "")


@dataclasses.dataclass(frozen=True)
class ServiceLine:
    """A line of /etc/pam.d/FILE, or arguments of each line there that calls a module."""

    file: str
    line: str = ""
    after: str = ""
    module: str = ""
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{SERVICES}/{self.file}"

    @staticmethod
    def of(data: Mapping[str, Any]) -> ServiceLine:
        return ServiceLine(
            file=data["file"],
            line=data.get("line") or "",
            after=data.get("after") or "",
            module=data.get("module") or "",
            add=tuple(data.get("add") or ()),
            remove=tuple(data.get("remove") or ()),
        )


def calls(content: str, section: str) -> list[tuple[str, tuple[str, ...]]]:
    """The modules with their arguments that a profile's `section` (Auth, Account ...) puts into its stack."""
    found = []
    inside = False
    for line in content.splitlines():
        if line[:1] not in (" ", "\t"):
            # Where a profile comes first in its stack its -Initial form is used; the plain one stands for both here.
            inside = line.split(":", 1)[0] == section
        elif inside and line.strip():
            match = re.match(r"\s*(\[[^]]*\]|\S+)\s+(\S+)(.*)", line)
            if match:
                found.append((match.group(2), tuple(match.group(3).split())))
    return found


def enabled(profile: Profile, files: Mapping[str, str | None]) -> bool:
    """Whether each module of the profile is called in its stack, with its arguments.

    Arguments that only the first module of a stack leaves out (try_first_pass and the like) do not count.
    """
    relative = {"try_first_pass", "use_authtok", "use_first_pass"}
    for section, names in STACKS.items():
        wanted = [(module, set(args) - relative) for module, args in calls(profile.content, section)]
        stack_names = names[:1] if _interactive_only(profile.content) else names
        for name in stack_names:
            text = files.get(f"{SERVICES}/{name}") or ""
            present = [(m["module"], set(m["rest"].split())) for m in map(_LINE.match, text.splitlines()) if m]
            for module, arguments in wanted:
                if not any(module == other and arguments <= theirs for other, theirs in present):
                    return False
    return True


def _interactive_only(content: str) -> bool:
    return re.search(r"^Session-Interactive-Only:\s*yes", content, re.M) is not None


def own_modules(profile: Profile) -> set[str]:
    """The modules that the profile's text calls, in any section."""
    return {module for section in STACKS for module, _arguments in calls(profile.content, section)}


def plan_profiles(wanted: Sequence[Profile], files: Mapping[str, str | None]) -> list[Action]:
    """Profiles to write, and those to enable or disable; all of them go to one pam-auth-update."""
    actions = []
    for profile in wanted:
        now = files.get(profile.path)
        if not profile.content:
            installed = Profile(profile.name, now or "")
            if now and own_modules(installed) and enabled(installed, files):
                actions.append(Action("pam_disable", profile.name, "is enabled", profile, "enabled\n", "disabled\n"))
            continue
        if now != profile.content:
            actions.append(Action("pam_profile", profile.path, "content", profile, shown(now), shown(profile.content)))
        if now != profile.content or not enabled(profile, files):
            actions.append(
                Action("pam_enable", profile.name, "its modules are not in the stacks", profile, after="enabled\n")
            )
    return actions


def plan_lines(wanted: Sequence[ServiceLine], files: Mapping[str, str | None]) -> list[Action]:
    """The services' files to change."""
    actions = []
    for want in wanted:
        now = files.get(want.path)
        if now is None:
            continue
        after = with_arguments(now, want) if want.module else with_line(now, want)
        if after != now:
            changed = [line for line in after.splitlines() if line not in now.splitlines()]
            gone = [line for line in now.splitlines() if line not in after.splitlines()]
            detail = "; ".join(" ".join(line.split()) for line in changed) or "lines go"
            actions.append(
                Action("pam_line", want.path, detail, want, "\n".join(gone) + "\n", "\n".join(changed) + "\n")
            )
    return actions


def missing(wanted: Sequence[ServiceLine], files: Mapping[str, str | None]) -> list[str]:
    """Files that are not there, and modules that no line of theirs calls: sentences for a person."""
    found = [
        f"{w.path} does not exist: the package that brings {w.file} is not installed"
        for w in wanted
        if files.get(w.path) is None
    ]
    for want in wanted:
        text = files.get(want.path)
        if want.module and want.add and text is not None and not _hits(text, want.module):
            found.append(f"no line of {want.path} calls {want.module}: enable its profile with pam-auth-update")
    return found


def _hits(text: str, module: str) -> list[re.Match[str]]:
    return [m for m in map(_LINE.match, text.splitlines()) if m and m["module"] == module]


def with_line(text: str, want: ServiceLine) -> str:
    """`text` with the wanted line: in place of one of the same type and module, or put where it takes effect."""
    wanted = _LINE.match(want.line)
    if wanted is None:
        return text
    lines = text.splitlines()
    active = [i for i, line in enumerate(lines) if _same(line, wanted)]
    if any(lines[i].split() == want.line.split() for i in active):
        return text
    asleep = [i for i, line in enumerate(lines) if line.startswith("#") and _same(line.lstrip("# "), wanted)]
    if active or asleep:
        lines[(active or asleep)[0]] = want.line
        return "\n".join(lines) + "\n"
    matches = [(i, _LINE.match(line)) for i, line in enumerate(lines)]
    after = [
        i + 1 for i, m in matches if want.after and m and m["type"] == wanted["type"] and m["module"] == want.after
    ]
    first = [i for i, m in matches if m and m["type"] == wanted["type"]]
    # An include of a stack (@include common-auth) counts for its type: what stands behind it may never be reached.
    first += [i for i, line in enumerate(lines) if line.split() == ["@include", f"common-{wanted['type']}"]]
    lines.insert((after or [min(first)] if (after or first) else [len(lines)])[0], want.line)
    return "\n".join(lines) + "\n"


def _same(line: str, wanted: re.Match[str]) -> bool:
    match = _LINE.match(line)
    return match is not None and (match["type"], match["module"]) == (wanted["type"], wanted["module"])


def with_arguments(text: str, want: ServiceLine) -> str:
    """`text` with the arguments of each line that calls the module added and removed."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None or match["module"] != want.module:
            continue
        arguments = match["rest"].split()
        kept = [a for a in arguments if a not in want.remove and a.split("=")[0] + "=" not in want.remove]
        for add in want.add:
            key, equals, _value = add.partition("=")
            if add not in kept:
                kept = [a for a in kept if not (equals and a.startswith(f"{key}="))] + [add]
        if kept != arguments:
            lines[index] = line[: match.start("rest")] + "".join(f" {argument}" for argument in kept)
    return "\n".join(lines) + "\n"
