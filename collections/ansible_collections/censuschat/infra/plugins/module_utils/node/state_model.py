# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The typed words of node_state: what is desired, what was observed, what is to be done."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, PathState

_NAME = re.compile(r"^[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?$")
_VERSION = re.compile(r"^[0-9][A-Za-z0-9.+:~-]*$")
_ARCHIVE_URL = re.compile(r"^(https?://[^\s/@]+/|file:///)\S+$")
_CHECKSUM = re.compile(r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$")
_HOSTNAME = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$")
_UNIT = re.compile(r"^[A-Za-z0-9:_.\\@-]+\.(service|socket|timer|target|path|mount|slice)$")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package to have; `version` "" is any. With a `url` it is that .deb, proven by `checksum` (ALGORITHM:HEX)."""

    name: str
    version: str = ""
    url: str = ""
    checksum: str = ""

    @staticmethod
    def of(text: str) -> Package:
        """A package as `packages.present` names it: NAME or NAME=VERSION."""
        name, _equals, version = text.partition("=")
        return Package(name, version)

    @property
    def wanted(self) -> str:
        """As apt-get is asked for it."""
        return f"{self.name}={self.version}" if self.version else self.name


@dataclasses.dataclass(frozen=True)
class Group:
    name: str
    system: bool = False


@dataclasses.dataclass(frozen=True)
class User:
    name: str
    system: bool = False
    groups: tuple[str, ...] = ()
    shell: str | None = None
    home: str | None = None
    create_home: bool = False
    uid: int | None = None
    absent: bool = False


@dataclasses.dataclass(frozen=True)
class Directory:
    path: str
    owner: str
    group: str
    mode: int
    exclusive: bool = False


@dataclasses.dataclass(frozen=True)
class File:
    path: str
    content: str
    owner: str
    group: str
    mode: int
    secret: bool = False
    validate: str = ""


@dataclasses.dataclass(frozen=True)
class Link:
    path: str
    target: str


@dataclasses.dataclass(frozen=True)
class Service:
    name: str
    enabled: bool | None = None
    state: str | None = None
    restart_on: tuple[str, ...] = ()
    reload_on: tuple[str, ...] = ()
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class Desired:
    hostname: str = ""
    packages_present: tuple[str, ...] = ()
    packages_absent: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    users: tuple[User, ...] = ()
    directories: tuple[Directory, ...] = ()
    files: tuple[File, ...] = ()
    links: tuple[Link, ...] = ()
    absent: tuple[str, ...] = ()
    services: tuple[Service, ...] = ()
    packages_held: tuple[str, ...] = ()
    packages_unheld: tuple[str, ...] = ()
    archives: tuple[Package, ...] = ()

    @property
    def packages(self) -> tuple[Package, ...]:
        """All packages to have, from the package lists and from archives."""
        return (*(Package.of(p) for p in self.packages_present), *self.archives)

    @staticmethod
    def of(params: Mapping[str, Any]) -> Desired:
        """Read the module's parameters; NodeError names the first entry that makes no sense."""
        packages = params.get("packages") or {}
        desired = Desired(
            hostname=params.get("hostname") or "",
            packages_present=tuple(packages.get("present") or ()),
            packages_absent=tuple(packages.get("absent") or ()),
            groups=tuple(Group(g["name"], bool(g.get("system"))) for g in params.get("groups") or ()),
            users=tuple(
                User(
                    name=u["name"],
                    system=bool(u.get("system")),
                    groups=tuple(u.get("groups") or ()),
                    shell=u.get("shell"),
                    home=u.get("home"),
                    create_home=bool(u.get("create_home")),
                    uid=u.get("uid"),
                    absent=u.get("state") == "absent",
                )
                for u in params.get("users") or ()
            ),
            directories=tuple(
                Directory(
                    path=_path(d["path"]),
                    owner=d.get("owner") or "root",
                    group=d.get("group") or "root",
                    mode=_mode(d.get("mode") or "0755", d["path"]),
                    exclusive=bool(d.get("exclusive")),
                )
                for d in params.get("directories") or ()
            ),
            files=tuple(
                File(
                    path=_path(f["path"]),
                    content=f["content"],
                    owner=f.get("owner") or "root",
                    group=f.get("group") or "root",
                    mode=_mode(f.get("mode") or "0644", f["path"]),
                    secret=bool(f.get("secret")),
                    validate=f.get("validate") or "",
                )
                for f in params.get("files") or ()
            ),
            links=tuple(Link(_path(x["path"]), x["target"]) for x in params.get("links") or ()),
            absent=tuple(_removable(path) for path in params.get("absent") or ()),
            services=tuple(
                Service(
                    name=s["name"],
                    enabled=s.get("enabled"),
                    state=s.get("state"),
                    restart_on=tuple(_path(p) for p in s.get("restart_on") or ()),
                    reload_on=tuple(_path(p) for p in s.get("reload_on") or ()),
                    masked=bool(s.get("masked")),
                )
                for s in params.get("services") or ()
            ),
            packages_held=tuple(packages.get("held") or ()),
            packages_unheld=tuple(packages.get("unheld") or ()),
            archives=tuple(
                Package(a["name"], a["version"], a["url"], a["checksum"]) for a in packages.get("archives") or ()
            ),
        )
        desired._check()
        return desired

    def _check(self) -> None:
        if self.hostname and not _HOSTNAME.match(self.hostname):
            raise NodeError(f"hostname {self.hostname!r} is not a host name of letters, digits, hyphens and dots")
        self._check_packages()
        paths = [
            *(d.path for d in self.directories),
            *(f.path for f in self.files),
            *(x.path for x in self.links),
            *self.absent,
        ]
        for path in sorted({p for p in paths if paths.count(p) > 1}):
            raise NodeError(f"{path} is given more than once: a path has one desired state")
        for directory in self.directories:
            if directory.exclusive and directory.path.count("/") < 2:
                raise NodeError(
                    f"directories: {directory.path} is refused as exclusive: other programs' files are there"
                )
        for user in self.users:
            if user.absent and user.name == "root":
                raise NodeError("users: root cannot be absent")
        for file in self.files:
            if file.validate and "%s" not in file.validate:
                raise NodeError(f"files: {file.path}: validate needs one %s for the file to check")
        for service in self.services:
            if not _UNIT.match(service.name):
                raise NodeError(
                    f"services: {service.name!r} is not a full unit name; write it with its suffix, as in ssh.service"
                )
            if service.masked and (service.enabled or service.state == "started"):
                raise NodeError(f"services: {service.name} cannot be masked and enabled or started")

    def _check_packages(self) -> None:
        for text in self.packages_present:
            if not _NAME.match(Package.of(text).name):
                raise NodeError(f"packages: {text!r} is not a Debian package name")
            if "=" in text and not _VERSION.match(Package.of(text).version):
                raise NodeError(f"packages: {text!r} has no Debian version after its =")
        present = [p.name for p in self.packages]
        for name in (*present, *self.packages_absent, *self.packages_held, *self.packages_unheld):
            if not _NAME.match(name):
                raise NodeError(f"packages: {name!r} is not a Debian package name")
        # A name may come twice from two lists that were joined; two versions of it may not.
        for name in dict.fromkeys(present):
            wanted = {p for p in self.packages if p.name == name}
            if len(wanted) > 1:
                raise NodeError(f"packages: {name} is wanted as {' and as '.join(sorted(p.wanted for p in wanted))}")
        for one, other, words in (
            (present, self.packages_absent, "present and absent"),
            (self.packages_held, self.packages_unheld, "held and unheld"),
            (self.packages_held, self.packages_absent, "held and absent"),
        ):
            both = set(one) & set(other)
            if both:
                raise NodeError(f"packages: {', '.join(sorted(both))} cannot be both {words}")
        for archive in self.archives:
            if not _VERSION.match(archive.version):
                raise NodeError(f"packages: archive {archive.name}: {archive.version!r} is not a Debian version")
            if not _ARCHIVE_URL.match(archive.url):
                raise NodeError(
                    f"packages: archive {archive.name}: its url is to be an HTTP, HTTPS or file URL without a user or "
                    "password in it, which would be shown"
                )
            if not _CHECKSUM.match(archive.checksum):
                raise NodeError(
                    f"packages: archive {archive.name}: its checksum is to be sha256: or sha512: with the digest in "
                    "lower-case hexadecimal digits, as its publisher states it"
                )


@dataclasses.dataclass(frozen=True)
class UserState:
    name: str
    groups: frozenset[str]
    shell: str
    home: str
    uid: int = -1


@dataclasses.dataclass(frozen=True)
class UnitState:
    """What systemd says of a unit; times are unix seconds, 0 when it never happened."""

    name: str
    load: str = "not-found"
    active: str = "inactive"
    file_state: str = ""
    need_reload: bool = False
    active_since: float = 0.0
    changed_at: float = 0.0
    reload_result: str = ""

    @property
    def running(self) -> bool:
        return self.active in ("active", "activating", "reloading")


@dataclasses.dataclass(frozen=True)
class Observed:
    """The node as it is, for the names and paths that the desired state speaks of.

    `hostnames` are the kernel's and the one that the next boot takes from its file; `leftovers` are files that
    an interrupted run of this module made for its own time. `versions` are those of `installed`; `entries` are the
    names in a directory that is to have no others.
    """

    hostnames: tuple[str, str] = ("", "")
    leftovers: tuple[str, ...] = ()
    installed: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    users: Mapping[str, UserState] = dataclasses.field(default_factory=dict)
    paths: Mapping[str, PathState] = dataclasses.field(default_factory=dict)
    units: Mapping[str, UnitState] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    held: frozenset[str] = frozenset()
    entries: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def path(self, path: str) -> PathState:
        return self.paths.get(path, PathState(path))


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing to do. `payload` carries the desired entry; `before` and `after` are for the diff."""

    kind: str
    target: str
    detail: str
    payload: Any = None
    before: str = ""
    after: str = ""

    def public(self) -> dict[str, str]:
        return {"kind": self.kind, "target": self.target, "detail": self.detail}


def diff_of(actions: Sequence[Action]) -> list[dict[str, str]]:
    """The actions as Ansible's diff: one entry each, with its own header."""
    return [
        {
            "before_header": f"{a.target} ({a.kind})",
            "after_header": f"{a.target} ({a.kind})",
            "before": a.before,
            "after": a.after or f"{a.detail}\n",
        }
        for a in actions
    ]


def _path(path: str) -> str:
    if not path.startswith("/"):
        raise NodeError(f"{path!r} is not an absolute path")
    return os.path.normpath(path)


def _removable(path: str) -> str:
    clean = _path(path)
    # A top-level directory can only be there by a templating accident.
    if clean.count("/") < 2:
        raise NodeError(f"absent: {path!r} is refused: a top-level directory is never removed")
    return clean


def _mode(mode: str, path: str) -> int:
    if not re.fullmatch(r"[0-7]{3,4}", mode):
        raise NodeError(f'{path}: mode {mode!r} is not an octal mode in quotes, as in "0644"')
    return int(mode, 8)
