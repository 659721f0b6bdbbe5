# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keeps what a run replaces, so that it can be put back: one journal for each run, on disk before the node is changed.

A journal is a file of JSON lines in the order of the mutations. A line is written and synced before what it speaks of
is changed; when a batch is done a second kind of line tells what its paths have become, by which a rollback knows
whether something else has changed them since. The directory is root's alone: the bytes kept may be secret.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    NodeError,
    group_name,
    owner_name,
    reason,
)

DIRECTORY = "/var/lib/censuschat-hardening/runs"
JOURNAL = "manifest.jsonl"
# Larger files stand beside the journal instead of in it.
INLINE_BYTES = 256 * 1024
PAM_STACKS = ("auth", "account", "password", "session", "session-noninteractive")
PAM_FILES = tuple(f"/etc/pam.d/common-{name}" for name in PAM_STACKS) + tuple(
    f"/var/lib/pam/{name}" for name in ("seen", *PAM_STACKS)
)
# Kinds of actions whose target is the path that they change.
_PATHS = ("directory", "file", "link", "absent", "firewall_file", "apparmor", "sshd_file", "pam_line", "pam_profile")


def new_id(now: datetime.datetime | None = None) -> str:
    """A run's id: its time in UTC, so that ids sort by age, and four random letters."""
    moment = now or datetime.datetime.now(datetime.UTC)
    return f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond:06d}Z-{secrets.token_hex(2)}"


@dataclasses.dataclass(frozen=True)
class Stands:
    """What stands at a path. `digest` is the SHA-256 of a file's bytes or a link's target; `data` where the bytes are.

    kind: absent, file, directory, link or other; `mode` is octal text.
    """

    kind: str = "absent"
    owner: str = ""
    group: str = ""
    mode: str = ""
    digest: str = ""
    data: str = ""
    beside: str = ""

    def same(self, other: Stands, *, attributes: bool = False) -> bool:
        """Equal in all that a rollback restores; `attributes`: whatever its bytes are."""
        mine = (self.kind, self.owner, self.group, self.mode)
        alike = mine == (other.kind, other.owner, other.group, other.mode)
        return alike and (attributes or self.digest == other.digest)

    @staticmethod
    def of(data: Mapping[str, Any]) -> Stands:
        return Stands(**{field.name: data.get(field.name, "") for field in dataclasses.fields(Stands)})

    def wire(self) -> dict[str, str]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def look(path: str, *, root: str = "", keep_in: str = "", attributes: bool = False) -> Stands:
    """What stands at `path` below `root`; with `keep_in` also its bytes, large ones in a file of that directory.

    `attributes`: its bytes are not looked at.
    """
    real = root + path
    try:
        info = os.lstat(real)
    except (FileNotFoundError, NotADirectoryError):
        return Stands()
    about = {
        "owner": owner_name(info.st_uid),
        "group": group_name(info.st_gid),
        "mode": f"{stat.S_IMODE(info.st_mode):04o}",
    }
    if stat.S_ISLNK(info.st_mode):
        target = os.readlink(real)
        # A link's own mode means nothing.
        return Stands("link", about["owner"], about["group"], "", _digest(target.encode()), _text(target.encode()))
    if stat.S_ISDIR(info.st_mode):
        return Stands("directory", **about)
    if not stat.S_ISREG(info.st_mode):
        return Stands("other", **about)
    if attributes:
        return Stands("file", **about)
    with open(real, "rb") as handle:
        content = handle.read()
    if not keep_in:
        return Stands("file", **about, digest=_digest(content))
    if len(content) <= INLINE_BYTES:
        return Stands("file", **about, digest=_digest(content), data=_text(content))
    beside = _digest(path.encode())[:16] + ".bytes"
    _write_synced(os.path.join(keep_in, beside), content)
    return Stands("file", **about, digest=_digest(content), beside=beside)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def paths_of(action: Action) -> list[str]:
    """The paths that `action` changes, as far as it is known before."""
    item = action.payload
    if action.kind in _PATHS:
        return [action.target]
    if action.kind == "permission":
        return [action.target]
    if action.kind in ("sysctl_file", "module_file", "audit_file"):
        return [FILES_OF[action.kind]]
    if action.kind == "setting":
        return [item.path]
    if action.kind in ("pam_enable", "pam_disable"):
        return list(PAM_FILES)
    if action.kind == "hostname":
        return ["/etc/hostname"]
    return ["/etc/fstab"] if action.kind == "fstab" else []


# Files that hold the union of all controls.
FILES_OF = {
    "sysctl_file": "/etc/sysctl.d/99-zz-censuschat.conf",
    "module_file": "/etc/modprobe.d/censuschat-hardening.conf",
    "audit_file": "/etc/audit/rules.d/99-zz-censuschat.rules",
}


def live_of(action: Action, units: Mapping[str, UnitState]) -> dict[str, Any]:
    """What `action` changes beyond files, as a line of the journal; {} when it is files only."""
    if action.kind in ("service", "firewall_boot"):
        now = units.get(action.target, UnitState(action.target))
        about = {"file_state": now.file_state, "running": now.running}
        return {"kind": "unit", "name": action.target, "verb": str(action.payload), "before": about}
    if action.kind == "sysctl":
        return {"kind": "kernel", "key": action.target, "before": action.before.partition(" = ")[2].strip()}
    if action.kind == "package":
        return {"kind": "package", "name": action.target, "verb": action.detail.split()[0]}
    if action.kind in ("user", "group"):
        # Packages write the same files: putting those back would take their accounts away.
        return {"kind": "account", "name": f"{action.kind} {action.target}", "detail": action.detail}
    if action.kind == "hold":
        return {"kind": "hold", "name": action.target, "verb": action.detail}
    if action.kind == "module":
        return {"kind": "module", "name": str(action.payload)}
    if action.kind in ("mount", "remount"):
        before = "" if action.kind == "mount" else action.before.strip()
        return {"kind": "mount", "path": action.target, "before": before}
    if action.kind == "audit_rule":
        return {"kind": "audit"}
    if action.kind == "apparmor":
        return {"kind": "profile", "path": action.target}
    return {}


class Keeper:
    """The journal of one run. Nothing is made before the first note."""

    def __init__(self, run: str, *, root: str = "") -> None:
        self.run = run
        self.root = root
        self.directory = f"{root}{DIRECTORY}/{run}"
        # Each noted path, and whether only its owner, group and mode are changed.
        self.paths: dict[str, bool] = {}
        self._live: set[str] = set()
        self._open = False

    @property
    def used(self) -> bool:
        return self._open

    def before(self, actions: Sequence[Action], units: Mapping[str, UnitState] | None = None) -> None:
        """Keep what `actions` are about to replace. NodeError when it cannot be kept: then nothing may be changed."""
        lines: list[dict[str, Any]] = []
        try:
            for action in actions:
                for path in paths_of(action):
                    lines += self._path(path, tree=action.kind == "absent", attributes=action.kind == "permission")
                live = live_of(action, units or {})
                name = json.dumps(live, sort_keys=True)
                if live and name not in self._live:
                    self._live.add(name)
                    lines.append(live)
            self._append(lines)
        except OSError as error:
            self.paths = {}
            raise NodeError(
                f"what this run would replace cannot be kept in {DIRECTORY}, so nothing was changed: "
                f"{reason(error, DIRECTORY)}"
            ) from error

    def table(self, name: str, text: str) -> None:
        """Keep the loaded nftables table `name` as `nft list table` prints it; "" when there was none."""
        self._append([{"kind": "table", "name": name, "before": text}])

    def after(self) -> None:
        """Tell what the noted paths have become."""
        lines = [
            {"kind": "after", "path": path, "after": look(path, root=self.root, attributes=attributes).wire()}
            for path, attributes in self.paths.items()
        ]
        self.paths = {}
        try:
            self._append(lines)
        except OSError as error:
            raise NodeError(f"what this run has changed cannot be noted: {reason(error, DIRECTORY)}") from error

    def _path(self, path: str, *, tree: bool, attributes: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        parent = os.path.dirname(path)
        if path in self.paths and (attributes or not self.paths[path]):
            return found
        if parent != "/" and parent not in self.paths and not os.path.isdir(self.root + parent):
            found += self._path(parent, tree=False, attributes=False)
        self._make()
        self.paths[path] = attributes
        if attributes:
            before = look(path, root=self.root, attributes=True)
            return [{"kind": "path", "path": path, "before": before.wire(), "attributes": True}]
        before = look(path, root=self.root, keep_in=self.directory)
        if tree and before.kind == "directory":
            before = dataclasses.replace(before, beside=self._archive(path))
        return [*found, {"kind": "path", "path": path, "before": before.wire()}]

    def _archive(self, path: str) -> str:
        import tarfile  # Loads the compression libraries, which no other run needs.

        name = _digest(path.encode())[:16] + ".tar"
        with open(os.path.join(self.directory, name), "wb") as handle:
            with tarfile.open(fileobj=handle, mode="w") as archive:
                archive.add(self.root + path, arcname=".")
            handle.flush()
            os.fsync(handle.fileno())
        return name

    def _make(self) -> None:
        os.makedirs(self.directory, mode=0o700, exist_ok=True)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in lines)
        if not text:
            return
        self._make()
        path = os.path.join(self.directory, JOURNAL)
        new = not os.path.exists(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as handle:
            handle.write(text.encode())
            handle.flush()
            os.fsync(handle.fileno())
        if new:
            # The name of a new file is safe when its directory is on disk too.
            for directory in (self.directory, os.path.dirname(self.directory)):
                descriptor = os.open(directory, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        self._open = True


def _write_synced(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def runs(root: str = "") -> list[str]:
    """The ids of the runs that are kept on this node, oldest first."""
    try:
        names = os.listdir(root + DIRECTORY)
    except FileNotFoundError:
        return []
    return sorted(n for n in names if os.path.exists(f"{root}{DIRECTORY}/{n}/{JOURNAL}"))


def journal(run: str, root: str = "") -> list[dict[str, Any]]:
    """A run's lines, in order. A last line that a crash cut short was never acted on and is left out."""
    with open(f"{root}{DIRECTORY}/{run}/{JOURNAL}", encoding="utf-8") as handle:
        text = handle.read()
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()
    try:
        return [{**json.loads(line), "run": run} for line in lines]
    except ValueError as error:
        raise NodeError(f"the journal of run {run} in {DIRECTORY} is damaged: it is no JSON lines any more") from error
