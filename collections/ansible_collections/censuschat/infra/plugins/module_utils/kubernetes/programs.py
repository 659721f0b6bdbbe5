# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Programs and images of one version in one directory: its table of checksums, and which files have to be fetched."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

_LINE = re.compile(r"^([0-9a-f]{64})[ *]+(?:\./)?(\S.*)$")


@dataclasses.dataclass(frozen=True)
class Found:
    """A file that is there: its size in bytes, when it was last changed (ns) and, if ever computed, its SHA-256."""

    size: int
    changed: int
    sha256: str = ""


def parse_sums(text: str) -> dict[str, str]:
    """Relative path to SHA-256, from what `sha256sum` writes; NodeError for a line that is none or leaves the tree."""
    sums: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        match = _LINE.match(line)
        if not match or match.group(2).startswith("/") or ".." in match.group(2).split("/"):
            raise NodeError(f"SHA256SUMS has a line that is no checksum of a file below it: {line[:120]!r}")
        sums[match.group(2)] = match.group(1)
    return sums


def chosen(patterns: Sequence[str], sums: Mapping[str, str]) -> list[str]:
    """The files that the patterns name, sorted; NodeError for a pattern that names none."""
    names: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(sums, pattern)
        if not matches:
            raise NodeError(f"SHA256SUMS has no file {pattern}: the source does not hold all of this version")
        names.update(matches)
    return sorted(names)


def plan(names: Sequence[str], sums: Mapping[str, str], found: Mapping[str, Found]) -> list[tuple[str, str]]:
    """The files to fetch, each with the reason."""
    steps = []
    for name in names:
        if name not in found:
            steps.append((name, "not there"))
        elif found[name].sha256 != sums[name]:
            steps.append((name, "not what its checksum says"))
    return steps
