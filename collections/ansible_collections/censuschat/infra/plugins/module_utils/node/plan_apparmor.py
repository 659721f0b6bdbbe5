# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of AppArmor: profiles that only complain are to enforce, in their file and in the kernel."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action

DIRECTORY = "/etc/apparmor.d"
_FLAGS = re.compile(r"(?P<lead>[ \t]*)flags[ \t]*=[ \t]*\((?P<flags>[^)]*)\)")


@dataclasses.dataclass(frozen=True)
class ApparmorSeen:
    """The kernel's switch, its profiles with their modes, and the texts of the files that define profiles."""

    enabled: bool = True
    profiles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    command_line: str = ""


def parse_profiles(text: str) -> dict[str, str]:
    """/sys/kernel/security/apparmor/profiles: the profile's name to enforce, complain, kill or unconfined."""
    found = {}
    for line in text.splitlines():
        name, space, mode = line.rpartition(" (")
        if space:
            found[name] = mode.rstrip(")")
    return found


def enforcing(text: str) -> str:
    """A profile file's text with `complain` taken out of all its flags."""

    def without(match: re.Match[str]) -> str:
        flags = [flag for flag in re.split(r"[\s,]+", match.group("flags")) if flag and flag != "complain"]
        return f"{match.group('lead')}flags=({','.join(flags)})" if flags else ""

    return "".join(
        line
        if line.lstrip().startswith("#")
        else _FLAGS.sub(lambda m: without(m) if _complains(m) else m.group(0), line)
        for line in text.splitlines(keepends=True)
    )


def _complains(match: re.Match[str]) -> bool:
    return "complain" in re.split(r"[\s,]+", match.group("flags"))


def plan(seen: ApparmorSeen) -> list[Action]:
    """The profile files to change and to load anew."""
    return [
        Action("apparmor", path, "complain -> enforce", enforcing(text), "complain\n", "enforce\n")
        for path, text in sorted(seen.files.items())
        if enforcing(text) != text
    ]


def judge(seen: ApparmorSeen) -> list[str]:
    """What only a boot or a person can put right."""
    if not seen.enabled:
        off = [
            word for word in seen.command_line.split() if word in ("apparmor=0", "security=selinux", "security=none")
        ]
        cause = f"{off[0]} stands" if off else "apparmor=1 security=apparmor is missing"
        return [
            f"AppArmor is off in the running kernel: {cause} on its command line; mend /etc/default/grub and reboot"
        ]
    if not seen.profiles:
        return ["AppArmor has no profile loaded: start apparmor.service"]
    if plan(seen):
        return []
    left = sorted(name for name, mode in seen.profiles.items() if mode == "complain")
    if left:
        return [f"profiles only complain although no file of {DIRECTORY} says so: {', '.join(left)}: reload them"]
    return []
