# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of node_state: observe in a few batch calls, apply action by action."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import glob
import grp
import os
import pwd
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import (
    Action,
    Desired,
    Directory,
    File,
    Group,
    Link,
    Observed,
    Package,
    UnitState,
    User,
    UserState,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_plan import APT, plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    PathState,
    link_atomically,
    observe_path,
    remove_path,
    set_attributes,
    write_atomically,
)

_PROPERTIES = "Id,LoadState,ActiveState,UnitFileState,NeedDaemonReload,ActiveEnterTimestamp,StateChangeTimestamp"
_PROPERTIES += ",ReloadResult"
LOCK_WAIT_S = 120
# Gives the path of a package's archive in a directory.
Fetch = Callable[[Package, str], str]
# Each of these makes systemd read all unit files again, about 0.2 s, so they are done for all units together.
SWITCHES = ("unmask", "enable", "disable", "mask")
# Package lists younger than this are used as they are.
LISTS_FRESH_S = 3600
_POLICY = "/usr/sbin/policy-rc.d"
# A package's first installation must not start its daemon with the default configuration: the state
# starts it when its files are there. Restarts at an upgrade are let through.
_POLICY_TEXT = """#!/bin/sh
# censuschat.infra.node_state, for the time of an installation
case " $* " in *" start "*) exit 101;; esac
exit 0
"""


def observe(desired: Desired, commands: Commands) -> Observed:
    """Observe all that `desired` speaks of: one dpkg-query, one systemctl, and direct looks at paths."""
    files = {f.path for f in desired.files}
    looked: dict[str, PathState] = {path: observe_path(path, read=True) for path in files}
    others = [
        *(d.path for d in desired.directories),
        *(x.path for x in desired.links),
        *desired.absent,
        *(p for s in desired.services for p in (*s.restart_on, *s.reload_on)),
    ]
    for path in others:
        if path not in looked:
            looked[path] = observe_path(path)
    packages = observed_packages(
        [
            *(p.name for p in desired.packages),
            *desired.packages_absent,
            *desired.packages_held,
            *desired.packages_unheld,
        ],
        commands,
    )
    return Observed(
        leftovers=(_POLICY,) if _policy_is_left() else (),
        hostnames=(os.uname().nodename, (observe_path("/etc/hostname", read=True).content or "").strip()),
        installed=frozenset(name for name, state in packages.items() if state.version),
        versions={name: state.version for name, state in packages.items()},
        held=frozenset(name for name, state in packages.items() if state.held),
        groups=frozenset(g.gr_name for g in grp.getgrall()),
        users=observe_users(desired),
        paths=looked,
        units=observe_units([s.name for s in desired.services], commands),
        entries={d.path: entries_of(d.path) for d in desired.directories if d.exclusive},
    )


def entries_of(directory: str) -> tuple[str, ...]:
    """The names in `directory`, sorted; none where there is no such directory."""
    try:
        return tuple(sorted(os.listdir(directory)))
    except (FileNotFoundError, NotADirectoryError):
        return ()


def observe_users(desired: Desired) -> dict[str, UserState]:
    """The named users that exist, with all groups they are members of."""
    users: dict[str, UserState] = {}
    for name in {u.name for u in desired.users}:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        groups = {grp.getgrgid(gid).gr_name for gid in os.getgrouplist(name, entry.pw_gid)}
        users[name] = UserState(name, frozenset(groups), entry.pw_shell, entry.pw_dir, entry.pw_uid)
    return users


@dataclasses.dataclass(frozen=True)
class PackageState:
    """What dpkg knows of a package: `version` is "" unless it is installed."""

    version: str
    held: bool


def observed_packages(names: Sequence[str], commands: Commands) -> dict[str, PackageState]:
    """Those of `names` that dpkg knows, in one dpkg-query."""
    if not names:
        return {}
    wanted = list(dict.fromkeys(names))
    fields = "${binary:Package}\t${Package}\t${db:Status-Status}\t${db:Status-Want}\t${Version}\n"
    done = commands.run(["dpkg-query", "-W", "-f", fields, *wanted])
    if done.code not in (0, 1):
        raise NodeError(f"dpkg-query cannot tell what is installed: {done.tail()}")
    return parse_packages(wanted, done.out)


def parse_packages(names: Sequence[str], text: str) -> dict[str, PackageState]:
    """The lines of `observed_packages`; a package is known by its name with and without the architecture."""
    found: dict[str, PackageState] = {}
    for line in text.splitlines():
        binary, package, status, want, version = line.split("\t")
        state = PackageState(version if status == "installed" else "", want == "hold")
        for name in (binary, package):
            # Of two architectures the installed one counts.
            if state.version or name not in found:
                found[name] = state
    return {name: found[name] for name in names if name in found}


def timestamp(text: str) -> float:
    """Unix seconds of systemd's `--timestamp=us+utc` form; 0 for "n/a" or nothing."""
    if not text or text == "n/a":
        return 0.0
    moment = datetime.datetime.strptime(text.split(" ", 1)[1], "%Y-%m-%d %H:%M:%S.%f UTC")
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def parse_units(names: Sequence[str], text: str) -> dict[str, UnitState]:
    """`systemctl show` prints one block per asked unit, in the order asked."""
    blocks = [b for b in text.strip().split("\n\n") if b.strip()]
    if len(blocks) != len(names):
        raise NodeError(f"systemctl show answered {len(blocks)} units where {len(names)} were asked")
    units: dict[str, UnitState] = {}
    for name, block in zip(names, blocks, strict=True):
        said = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        units[name] = UnitState(
            name=name,
            load=said.get("LoadState", "not-found"),
            active=said.get("ActiveState", "inactive"),
            file_state=said.get("UnitFileState", ""),
            need_reload=said.get("NeedDaemonReload") == "yes",
            active_since=timestamp(said.get("ActiveEnterTimestamp", "")),
            changed_at=timestamp(said.get("StateChangeTimestamp", "")),
            reload_result=said.get("ReloadResult", ""),
        )
    return units


def observe_units(names: Sequence[str], commands: Commands) -> dict[str, UnitState]:
    """All units in one `systemctl show`; every unit not found on a host that systemd does not run."""
    if not names:
        return {}
    if not os.path.isdir("/run/systemd/system"):
        return {name: UnitState(name) for name in names}
    unique = list(dict.fromkeys(names))
    done = commands.must(
        ["systemctl", "show", "--timestamp=us+utc", f"--property={_PROPERTIES}", "--", *unique],
        "asking systemd for units",
    )
    return parse_units(unique, done.out)


def switches(action: Action) -> bool:
    """Whether `action` changes how a unit is installed, not whether it runs."""
    return action.kind == "service" and action.payload in SWITCHES


def precedes_packages(action: Action) -> bool:
    """Whether packages are installed differently after `action`: what apt reads, and a hold that is lifted."""
    return action.target.startswith(APT) or (action.kind == "hold" and action.detail == "unhold")


class Executor:
    """Carries out actions; remembers what was done, so that a failure can say how far it came."""

    def __init__(self, desired: Desired, commands: Commands, fetch: Fetch | None = None) -> None:
        self.desired = desired
        self.commands = commands
        self.fetch = fetch
        self.done: list[Action] = []

    def converge(self, actions: Sequence[Action]) -> list[Action]:
        """Apply `actions`. Packages come first and bring users and units of their own, so the rest is
        observed and planned anew after an installation. Returns what was done."""
        packages = [a for a in actions if a.kind == "package"]
        rest = [a for a in actions if a.kind != "package"]
        if packages:
            for action in rest:
                if precedes_packages(action):
                    self.apply(action)
                    self.done.append(action)
            self.install(packages)
            rest = plan(self.desired, observe(self.desired, self.commands))
            still = [f"{a.target} ({a.detail})" for a in rest if a.kind == "package"]
            if still:
                raise NodeError(
                    f"apt reported success, but dpkg does not agree for {', '.join(still)}: "
                    "name real packages, not virtual ones, and the version that an archive states"
                )
        batched = False
        for action in rest:
            if action.kind == "service" and not batched:
                # All files are in place now, and systemd reads them again once for each batch.
                self.switch(rest)
                batched = True
            if not switches(action):
                self.apply(action)
            self.done.append(action)
        self._verify(rest)
        return self.done

    def apply(self, action: Action) -> None:
        item = action.payload
        if isinstance(item, Group):
            self.commands.must(
                ["groupadd", *(["--system"] if item.system else []), item.name], f"creating group {item.name}"
            )
        elif isinstance(item, User):
            self._user(item)
        elif isinstance(item, Directory):
            try:
                os.makedirs(item.path, mode=0o755, exist_ok=True)
            except OSError as error:
                raise NodeError(f"directory {item.path} cannot be made: {error.strerror}") from error
            set_attributes(item.path, item.owner, item.group, item.mode)
        elif isinstance(item, File):
            now = observe_path(item.path, read=True)
            if now.kind == "file" and now.content == item.content:
                set_attributes(item.path, item.owner, item.group, item.mode)
            else:
                write_atomically(
                    item.path,
                    item.content,
                    item.owner,
                    item.group,
                    item.mode,
                    validate=item.validate,
                    commands=self.commands,
                )
        elif isinstance(item, Link):
            link_atomically(item.path, item.target)
        elif action.kind == "hostname":
            if observe_path("/etc/hostname", read=True).content != f"{item}\n":
                write_atomically("/etc/hostname", f"{item}\n", "root", "root", 0o644)
            self.commands.must(["hostname", str(item)], f"naming the host {item}")
        elif action.kind == "hold":
            self.commands.must(["apt-mark", action.detail, action.target], f"apt-mark {action.detail} {action.target}")
        elif action.kind == "absent":
            remove_path(action.target)
        elif action.kind == "systemd":
            self.commands.must(["systemctl", "daemon-reload"], "telling systemd about changed unit files")
        elif action.kind == "service":
            self._service(action.target, str(item))

    def switch(self, actions: Sequence[Action]) -> None:
        """Mask, unmask, enable and disable the units of `actions`, one systemctl for each verb."""
        for verb in SWITCHES:
            units = [a.target for a in actions if switches(a) and a.payload == verb]
            if units:
                self.commands.must(["systemctl", "--quiet", verb, "--", *units], f"systemctl {verb}")

    def _user(self, user: User) -> None:
        if user.absent:
            self.commands.must(["userdel", user.name], f"removing user {user.name}")
            return
        try:
            entry = pwd.getpwnam(user.name)
        except KeyError:
            argv = ["useradd", "--create-home" if user.create_home else "--no-create-home"]
            argv += ["--system"] if user.system else []
            argv += ["--uid", str(user.uid)] if user.uid is not None else []
            argv += ["--shell", user.shell] if user.shell is not None else []
            argv += ["--home-dir", user.home] if user.home is not None else []
            argv += ["--groups", ",".join(user.groups)] if user.groups else []
            if any(g.gr_name == user.name for g in grp.getgrall()):
                argv += ["--gid", user.name]
            self.commands.must([*argv, user.name], f"creating user {user.name}")
            return
        argv = ["usermod"]
        argv += ["--append", "--groups", ",".join(user.groups)] if user.groups else []
        if user.shell is not None and user.shell != entry.pw_shell:
            argv += ["--shell", user.shell]
        if user.home is not None and user.home != entry.pw_dir:
            argv += ["--home", user.home]
        self.commands.must([*argv, user.name], f"changing user {user.name}")

    def _service(self, unit: str, verb: str) -> None:
        if verb in ("start", "restart"):
            # A unit that hit its start limit would refuse although its configuration is mended now.
            self.commands.run(["systemctl", "reset-failed", "--", unit])
        done = self.commands.run(["systemctl", "--quiet", verb, "--", unit])
        if done.code != 0:
            raise NodeError(f"systemctl {verb} {unit} failed: {done.tail(3)}\n{self._journal(unit)}")

    def _journal(self, unit: str) -> str:
        journal = self.commands.run(["journalctl", "--no-pager", "-q", "-o", "cat", "-n", "12", "-u", unit])
        return f"its last lines in the journal:\n{journal.out.strip()}"

    def _verify(self, actions: Sequence[Action]) -> None:
        """A simple service can die right after its start succeeded: look again at what was started."""
        started = [a.target for a in actions if a.kind == "service" and a.payload in ("start", "restart", "reload")]
        for name, unit in observe_units(started, self.commands).items():
            if unit.active == "failed":
                raise NodeError(f"unit {name} failed right after its start; {self._journal(name)}")

    def install(self, actions: Sequence[Action]) -> None:
        install = [
            a.payload if isinstance(a.payload, Package) else Package(a.target) for a in actions if a.detail != "remove"
        ]
        remove = [a.target for a in actions if a.detail == "remove"]
        if install:
            with tempfile.TemporaryDirectory(prefix="censuschat-") as directory:
                # apt's fetcher is a user of its own, who has to read what is to be installed from there.
                os.chmod(directory, 0o755)  # noqa: S103
                wanted = [self._archive(p, directory) if p.url else p.wanted for p in install]
                self._install(wanted, self._choices(install))
        if remove:
            done = self._apt(["remove", *remove])
            if done:
                raise NodeError(f"removing {', '.join(remove)} failed: {done}")
        self.done += actions

    def _archive(self, package: Package, directory: str) -> str:
        if self.fetch is None:
            raise NodeError(f"package {package.name} is to come from {package.url}, which is not provided for here")
        return self.fetch(package, directory)

    def _choices(self, install: Sequence[Package]) -> list[str]:
        """What apt-get may do for a version that is asked for: go back to it, and change what is held at another."""
        if not any(p.version for p in install):
            return []
        held = ["--allow-change-held-packages"] if {p.name for p in install} & set(self.desired.packages_held) else []
        return ["--allow-downgrades", *held]

    def _install(self, wanted: Sequence[str], choices: Sequence[str]) -> None:
        fresh = lists_age_s() < LISTS_FRESH_S
        if not fresh:
            self._update()
        with _no_starts():
            done = self._apt(["install", "--no-install-recommends", *choices, *wanted])
            # Older lists can be the cause of a failure, but not of a lock that somebody else holds.
            if done and fresh and "Could not get lock" not in done:
                self._update()
                done = self._apt(["install", "--no-install-recommends", *choices, *wanted])
        if done:
            raise NodeError(f"installing {', '.join(wanted)} failed: {done}")

    def _update(self) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            done = self._apt(["update"])
            if not done:
                return
            # apt's own lock wait covers dpkg's lock only, not the one of the package lists.
            if "Could not get lock" not in done or time.monotonic() > deadline:
                raise NodeError(f"apt-get update failed: {done}")
            time.sleep(1)

    def _apt(self, arguments: Sequence[str]) -> str:
        """Run apt-get; "" when it succeeded, else what it said."""
        done = self.commands.run(
            [
                "apt-get",
                "-q",
                "-y",
                "-o",
                f"DPkg::Lock::Timeout={LOCK_WAIT_S}",
                "-o",
                "Dpkg::Options::=--force-confdef",
                "-o",
                "Dpkg::Options::=--force-confold",
                *arguments,
            ],
            env={"DEBIAN_FRONTEND": "noninteractive"},
            timeout=1800,
        )
        return "" if done.code == 0 else done.tail(20) or f"apt-get ended with {done.code}"


def lists_age_s() -> float:
    """Seconds since the package lists were last fetched; infinite when there are none, or older than the sources."""
    lists = "/var/lib/apt/lists"
    try:
        if not any(re.search(r"_(Packages|InRelease|Release)(\.|$)", name) for name in os.listdir(lists)):
            return float("inf")
        fetched_at = max(os.stat(lists).st_mtime, os.stat(os.path.join(lists, "partial")).st_mtime)
    except FileNotFoundError:
        return float("inf")
    sources = ["/etc/apt/sources.list", "/etc/apt/sources.list.d", *glob.glob("/etc/apt/sources.list.d/*")]
    changed_at = max((os.stat(path).st_mtime for path in sources if os.path.exists(path)), default=0.0)
    return float("inf") if changed_at > fetched_at else time.time() - fetched_at


@contextlib.contextmanager
def _no_starts() -> Iterator[None]:
    now = observe_path(_POLICY, read=True)
    # Someone else's policy is respected; one of ours left by an interrupted run is taken over.
    ours = now.kind == "absent" or now.content == _POLICY_TEXT
    if not ours:
        yield
        return
    write_atomically(_POLICY, _POLICY_TEXT, "root", "root", 0o755)
    try:
        with open(_POLICY, encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
    finally:
        remove_path(_POLICY)


def _policy_is_left() -> bool:
    """Whether a policy of ours stands there that no run holds any more."""
    try:
        with open(_POLICY, encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle.read() == _POLICY_TEXT
    except OSError:
        return False
