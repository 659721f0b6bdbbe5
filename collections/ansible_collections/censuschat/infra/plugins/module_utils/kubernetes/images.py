# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which image archives a container runtime still has to import: reading archives, and the plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

LABEL_SOURCE = "censuschat.infra/source"
"""The label that tells from which content of an archive an image was imported."""
LABELS_KEPT = {"io.cri-containerd.pinned": "pinned"}
"""Keeps the kubelet from removing an image that nothing can pull again."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar of images. `source` is the hash of its table of contents, which names every layer by its own hash."""

    path: str
    names: tuple[str, ...]
    source: str


def read(path: str) -> Archive:
    """Read the table of contents of a docker or OCI archive; NodeError when it is none."""
    try:
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar if m.name in ("manifest.json", "index.json")}
            name = next((n for n in ("manifest.json", "index.json") if n in members), None)
            handle = tar.extractfile(members[name]) if name else None
            text = handle.read() if handle else b""
        content = json.loads(text) if text else None
    except (OSError, tarfile.TarError, ValueError) as error:
        raise NodeError(f"image archive {path} cannot be read: {error}; put a whole one in its place") from error
    names = _names(content)
    if not names:
        raise NodeError(f"image archive {path} names no image; make it with `podman save` or `docker save`")
    return Archive(path, names, hashlib.sha256(text).hexdigest()[:32])


def _names(content: object) -> tuple[str, ...]:
    if isinstance(content, list):
        return tuple(tag for entry in content for tag in entry.get("RepoTags") or ())
    if isinstance(content, dict):
        found = (m.get("annotations", {}) for m in content.get("manifests", ()))
        return tuple(name for a in found if (name := a.get("io.containerd.image.name")))
    return ()


def parse_list(text: str) -> dict[str, dict[str, str]]:
    """Image names with their labels, from the output of `ctr images list`."""
    lines = text.splitlines()
    if not lines or "REF" not in lines[0]:
        return {}
    column = lines[0].index("LABELS")
    images: dict[str, dict[str, str]] = {}
    for line in lines[1:]:
        labels = dict(item.split("=", 1) for item in line[column:].strip().split(",") if "=" in item)
        images[line.split()[0]] = labels
    return images


def plan(archives: Sequence[Archive], present: Mapping[str, Mapping[str, str]]) -> list[tuple[Archive, str]]:
    """The archives to import, each with the reason."""
    steps = []
    for archive in archives:
        missing = [name for name in archive.names if name not in present]
        if missing:
            steps.append((archive, f"{', '.join(missing)} not there"))
            continue
        other = [name for name in archive.names if present[name].get(LABEL_SOURCE) != archive.source]
        if other:
            steps.append((archive, f"{', '.join(other)} from another archive"))
    return steps
