# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of a rollback: read the journals, look at what stands, put back what was kept."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    harden_observe,
    host_audit,
    host_mounts,
    plan_firewall,
    rollback_plan,
    sshd_host,
    state_host,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import DIRECTORY, Keeper, Stands, journal, look
from ansible_collections.censuschat.infra.plugins.module_utils.node.rollback_plan import Chain, Now, Rollback
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, Desired
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    link_atomically,
    reason,
    set_attributes,
    write_atomically,
)

# What one of these cannot put back in the running system is no reason to leave the others as they are.
_LIVE = ("sysctl", "umount", "remount_back", "modprobe", "audit_load", "apparmor_load")


def read(to: str, kept: Sequence[str], root: str = "") -> list[dict[str, Any]]:
    """The journals of the runs to undo, oldest first."""
    return [line for run in rollback_plan.chosen(to, kept) for line in journal(run, root)]


def observe(lines: Sequence[Mapping[str, Any]], commands: Commands) -> Now:
    """What stands now of all that the journals speak of; a domain that no line names is not looked at."""

    def names(kind: str, key: str = "name") -> list[str]:
        return list(dict.fromkeys(line[key] for line in lines if line["kind"] == kind))

    packages = names("package")
    held = commands.run(["apt-mark", "showhold"]).out.split() if names("hold") else []
    return Now(
        paths=look_at([line["path"] for line in lines if line["kind"] == "path"]),
        kernel=harden_observe.kernel(names("kernel", "key")),
        units=state_host.observe_units(names("unit"), commands),
        mounts={p: m.options for p, m in host_mounts.observe().live.items() if p in names("mount", "path")},
        installed=frozenset(p for p, s in state_host.observed_packages(packages, commands).items() if s.version),
        held=frozenset(held),
        modules=harden_observe.modules() if names("module") else frozenset(),
        audit_locked=any(line["kind"] == "audit" for line in lines) and host_audit.observe(commands).locked,
    )


def look_at(paths: Sequence[str], root: str = "") -> dict[str, Stands]:
    """What stands at each path, with the bytes of small files so that a diff can show them."""
    return {path: _looked(path, root) for path in dict.fromkeys(paths)}


def _looked(path: str, root: str) -> Stands:
    now = look(path, root=root)
    if now.kind != "file" or os.path.getsize(root + path) > 65536:
        return now
    with open(root + path, "rb") as handle:
        return Stands(**{**now.wire(), "data": base64.b64encode(handle.read()).decode()})


def restore(chain: Chain, root: str = "") -> None:
    """Put back what stood at one path: bytes, owner, group and mode."""
    path, before = root + chain.path, chain.before
    try:
        if chain.attributes:
            set_attributes(path, before.owner, before.group, int(before.mode, 8))
            return
        if before.kind == "absent":
            _remove(path)
        elif before.kind == "directory":
            os.makedirs(path, exist_ok=True)
            set_attributes(path, before.owner, before.group, int(before.mode, 8))
            if before.beside:
                _unpack(f"{root}{DIRECTORY}/{chain.run}/{before.beside}", path)
        elif before.kind == "link":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            link_atomically(path, os.fsdecode(content_of(chain, root)))
        elif before.kind == "file":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            content = content_of(chain, root).decode("utf-8", "surrogateescape")
            write_atomically(path, content, before.owner, before.group, int(before.mode, 8))
    except OSError as error:
        raise NodeError(f"{chain.path} cannot be put back: {reason(error, os.path.dirname(chain.path))}") from error


def content_of(chain: Chain, root: str = "") -> bytes:
    """The kept bytes of a file, or the target of a link."""
    if not chain.before.beside:
        return base64.b64decode(chain.before.data)
    with open(f"{root}{DIRECTORY}/{chain.run}/{chain.before.beside}", "rb") as handle:
        return handle.read()


def _remove(path: str) -> None:
    if not os.path.lexists(path):
        return
    if os.path.isdir(path) and not os.path.islink(path):
        # A directory that others use by now stays.
        if not os.listdir(path):
            os.rmdir(path)
        return
    os.unlink(path)


def _unpack(archive: str, path: str) -> None:
    import tarfile  # Loads the compression libraries, which few rollbacks need.

    with tarfile.open(archive) as handle:
        handle.extractall(path, filter="fully_trusted")  # noqa: S202 (our own archive, root's alone)


class Undoing:
    """One rollback on this node. It is a run of its own, which can be rolled back too."""

    def __init__(self, keep: Keeper, commands: Commands) -> None:
        self.keep = keep
        self.commands = commands

    def apply(self, rollback: Rollback, now: Now) -> list[Action]:
        """Carry out all but sshd's files, which the caller brings in with proof; returns those."""
        sshd = [a for a in rollback.actions if a.kind == "sshd_file"]
        rest = [a for a in rollback.actions if a.kind != "sshd_file"]
        self._refuse_cut(rest)
        self.keep.before([_kept(a) for a in rest], now.units)
        try:
            packages = [a for a in rest if a.kind == "package"]
            if packages:
                state_host.Executor(Desired(), self.commands).install(packages)
            problems = []
            for action in rest:
                try:
                    if action.kind != "package":
                        self._apply_one(action)
                except NodeError as error:
                    if action.kind not in _LIVE:
                        raise
                    problems.append(str(error))
        finally:
            self.keep.after()
        if problems:
            raise NodeError(f"{'; '.join(problems)}; everything else but sshd's files was put back: run it again")
        return sshd

    def _refuse_cut(self, actions: Sequence[Action]) -> None:
        login = sshd_host.present_login()
        for action in actions:
            problem = plan_firewall.refused(str(action.payload), login.port) if login and action.kind == "table" else ""
            if problem:
                raise NodeError(f"the rollback of table inet {action.target} is refused: {problem}")

    def _apply_one(self, action: Action) -> None:
        must, target = self.commands.must, action.target
        if action.kind == "restore":
            restore(action.payload)
        elif action.kind == "sysctl":
            try:
                with open(harden_observe.kernel_path(target), "w", encoding="utf-8") as handle:
                    handle.write(action.payload)
            except OSError as error:
                raise NodeError(f"the kernel refuses {target} = {action.payload}: {error.strerror}") from error
        elif action.kind == "umount":
            host_mounts.unmount(target, self.commands)
        elif action.kind == "remount_back":
            must(["mount", "-o", f"remount,{','.join(action.payload)}", target], f"remounting {target}")
        elif action.kind == "modprobe":
            must(["modprobe", target], f"loading kernel module {target}")
        elif action.kind == "audit_load":
            host_audit.load(self.commands)
        elif action.kind == "apparmor_load":
            must(["apparmor_parser", "-r", target], f"loading the profiles of {target}")
        elif action.kind == "table":
            text = f"table inet {target}\ndelete table inet {target}\n{action.payload}"
            done = self.commands.run(["/usr/sbin/nft", "-f", "-"], stdin=text)
            if done.code != 0:
                raise NodeError(f"nft does not take table {target} back: {done.tail(3)}")
        else:
            executor = state_host.Executor(Desired(), self.commands)
            if state_host.switches(action):
                executor.switch([action])
            else:
                executor.apply(action)


def _kept(action: Action) -> Action:
    """The action in the form whose mutations the journal knows."""
    if action.kind == "restore":
        chain: Chain = action.payload
        if chain.attributes:
            return Action("permission", action.target, action.detail)
        # Taking away what a run had made may take a directory away.
        return Action("absent" if chain.before.kind == "absent" else "file", action.target, action.detail)
    if action.kind in ("umount", "remount_back"):
        return Action("remount", action.target, action.detail, before="")
    return action


def sshd_actions(actions: Sequence[Action]) -> list[Action]:
    """The files of sshd as sshd_host writes them, and the reload that has them take effect."""
    files = []
    for action in actions:
        chain: Chain = action.payload
        gone = chain.before.kind == "absent"
        content = None if gone else content_of(chain).decode("utf-8", "surrogateescape")
        files.append(Action("sshd_file", action.target, action.detail, content, action.before, action.after))
    if any(a.target.startswith("/etc/systemd/") for a in files):
        files.append(Action("sshd_socket", "ssh.socket", "listens as before"))
    return [*files, Action("sshd_reload", "ssh.service", "its configuration changes")]
