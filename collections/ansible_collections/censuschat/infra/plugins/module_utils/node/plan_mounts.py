# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of mounts: options of the live filesystem and of its line in fstab."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action

FSTAB = "/etc/fstab"
# Options that stand in fstab only: the kernel does not show them.
_FSTAB_ONLY = ("auto", "noauto", "nofail", "defaults", "user", "users", "nouser", "_netdev")
# What a filesystem of its own would be made as; only tmpfs needs no device and no person.
_TMPFS_SIZE = "50%"


@dataclasses.dataclass(frozen=True)
class Mount:
    """A mount point with the options that it has to have.

    kind "tmpfs" may be mounted by the engine itself. `separate` false: nothing to hold when it is no mount of its own.
    """

    path: str
    options: tuple[str, ...] = ()
    kind: str = ""
    size: str = ""
    separate: bool = True

    @staticmethod
    def of(data: Mapping[str, Any]) -> Mount:
        return Mount(
            path=data["path"],
            options=tuple(data.get("options") or ()),
            kind=data.get("kind") or "",
            size=str(data.get("size") or ""),
            separate=data.get("separate", True),
        )


@dataclasses.dataclass(frozen=True)
class Live:
    """A mounted filesystem as /proc/self/mountinfo shows it."""

    path: str
    source: str
    kind: str
    options: frozenset[str]


@dataclasses.dataclass(frozen=True)
class MountsSeen:
    """All mounts by path (the topmost of each), fstab's text, and whether this is a container."""

    live: Mapping[str, Live] = dataclasses.field(default_factory=dict)
    fstab: str = ""
    container: bool = False


def parse_mountinfo(text: str) -> dict[str, Live]:
    """proc(5) mountinfo: the last mount on a path is the one that is seen."""
    found: dict[str, Live] = {}
    for line in text.splitlines():
        fields, separator, rest = line.partition(" - ")
        words, after = fields.split(), rest.split()
        if separator and len(words) >= 6 and len(after) >= 2:
            path = unescaped(words[4])
            options = {*words[5].split(","), *(after[2].split(",") if len(after) > 2 else ())}
            found[path] = Live(path, unescaped(after[1]), after[0], frozenset(options))
    return found


def unescaped(text: str) -> str:
    """A path as the kernel and fstab write it: white space and backslash as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def escaped(path: str) -> str:
    """`path` as a field of fstab."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in path)


def sockets_below(path: str, text: str) -> list[str]:
    """The sockets that programs have bound below `path`, of /proc/net/unix (unix(7))."""
    names = [words[7] for words in (line.split(None, 7) for line in text.splitlines()) if len(words) == 8]
    return sorted({name for name in names if name.startswith(f"{path.rstrip('/')}/")})


def problem(want: Mount, seen: MountsSeen) -> tuple[str, str]:
    """(violation, not applicable): what only a person can mend, and why there is nothing to hold here."""
    if want.path in seen.live or (want.kind and not seen.container):
        return "", ""
    if seen.container:
        return (
            "",
            f"{want.path} is no mount of its own here, and a container's filesystems are laid out by what runs it",
        )
    if not want.separate:
        return "", f"{want.path} is no mount of its own"
    return f"{want.path} is no mount of its own: make it a partition or a logical volume and list it in {FSTAB}", ""


def plan(wanted: Sequence[Mount], seen: MountsSeen) -> list[Action]:
    """What differs in fstab and in the live mounts of `wanted`; paths that `problem` speaks of are left alone."""
    actions = []
    for want in wanted:
        live = seen.live.get(want.path)
        if any(problem(want, seen)):
            continue
        line = fstab_line(seen.fstab, want.path)
        wanted_line = _wanted_line(want, live, line)
        if wanted_line != line:
            before = f"{line}\n" if line else ""
            actions.append(
                Action("fstab", want.path, wanted_line, (want.path, wanted_line), before, f"{wanted_line}\n")
            )
        if live is None:
            actions.append(Action("mount", want.path, f"mount {want.kind}", want, "not mounted\n", f"{wanted_line}\n"))
            continue
        missing = [option for option in want.options if not _holds(option, live.options)]
        if missing:
            now = ",".join(sorted(live.options))
            actions.append(
                Action(
                    "remount",
                    want.path,
                    f"remount with {','.join(missing)}",
                    want,
                    f"{now}\n",
                    ",".join(missing) + "\n",
                )
            )
    return actions


def with_line(text: str, path: str, line: str) -> str:
    """fstab's `text` with the line of `path` replaced, or added at its end."""
    lines = text.splitlines()
    hits = [index for index, one in enumerate(lines) if _path_of(one) == path]
    if hits:
        lines[hits[0]] = line
    else:
        lines.append(line)
    return "\n".join(lines) + "\n"


def fstab_line(text: str, path: str) -> str:
    """The line of `path` in fstab; "" when it has none."""
    return next((line for line in text.splitlines() if _path_of(line) == path), "")


def _path_of(line: str) -> str:
    words = line.split()
    if len(words) < 4 or words[0].startswith("#"):
        return ""
    return unescaped(words[1]).rstrip("/") or "/"


def _wanted_line(want: Mount, live: Live | None, line: str) -> str:
    if line:
        words = line.split()
        options = [o for o in words[3].split(",") if not _contradicted(o, want.options)]
        options += [o for o in want.options if o not in options]
        if options == words[3].split(","):
            return line
        return "\t".join([*words[:3], ",".join(options), *words[4:]])
    kind = live.kind if live else want.kind
    source = escaped(live.source) if live else "tmpfs"
    options = ["rw", *want.options]
    if kind == "tmpfs":
        options += [] if any(o.startswith("size=") for o in options) else [f"size={want.size or _TMPFS_SIZE}"]
        options += ["mode=1777"] if not any(o.startswith("mode=") for o in options) else []
    return "\t".join([source, escaped(want.path), kind, ",".join(options), "0", "0"])


def _contradicted(option: str, wanted: Sequence[str]) -> bool:
    """`exec` beside a wanted `noexec`, or another value of the same key."""
    if f"no{option}" in wanted or (option.startswith("no") and option[2:] in wanted):
        return True
    key, equals, _value = option.partition("=")
    return bool(equals) and option not in wanted and any(w.startswith(f"{key}=") for w in wanted)


def _holds(option: str, live: frozenset[str]) -> bool:
    if option in _FSTAB_ONLY or option.startswith(("size=", "x-")):
        return True
    if option in ("exec", "dev", "suid"):
        return f"no{option}" not in live
    return option in live
