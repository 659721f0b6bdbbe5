# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of an sshd change: test the candidate, arm the revert, write, reload, confirm or revert.

What is on disk and not yet proven is undone by whichever comes first: the controller, a timer, or the
next boot. All three run the same script, and one rename decides between them and the confirmation.
"""

from __future__ import annotations

import glob
import grp
import os
import pwd
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node import sshd_plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import Keeper
from ansible_collections.censuschat.infra.plugins.module_utils.node.sshd_plan import (
    DROP_IN,
    DROP_IN_DIRECTORY,
    MAIN,
    SOCKET_DROP_IN,
    Login,
    Match,
    SshdObserved,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_host import observe_units
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    PathState,
    observe_path,
    remove_path,
    write_atomically,
)

UNITS = ("ssh.service", "ssh.socket")
STATE = "/var/lib/censuschat-sshd"
PENDING = f"{STATE}/pending"
REVERT = f"{STATE}/revert"
LAST_REVERT = f"{STATE}/last-revert"
TIMER = "censuschat-sshd-revert"
BOOT_UNIT = "/etc/systemd/system/censuschat-sshd-boot-revert.service"
BOOT_WANT = "/etc/systemd/system/multi-user.target.wants/censuschat-sshd-boot-revert.service"
_BOOT_TEXT = f"""[Unit]
Description=Undo an sshd change that nobody proved before the node went down
Before=ssh.service
ConditionPathExists={REVERT}

[Service]
Type=oneshot
ExecStart=/bin/sh {REVERT}
"""
# sshd re-reads its configuration by executing itself anew; it took 20-60 ms on the lab's nodes.
RELOAD_WAIT_S = 10.0


def observe(commands: Commands, units: Mapping[str, UnitState] | None = None, drop_in: str = DROP_IN) -> SshdObserved:
    """Configuration files and the running state of sshd; `units` when systemd was already asked for UNITS."""
    if shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") is None:
        raise NodeError("sshd is not installed: there is nothing to configure; install openssh-server or leave it out")
    paths = [MAIN, DROP_IN_DIRECTORY, *glob.glob(f"{DROP_IN_DIRECTORY}/*.conf"), *glob.glob("/etc/ssh/ssh_host_*_key")]
    newest = max((observe_path(p) for p in paths), key=lambda state: state.ctime)
    units = observe_units(UNITS, commands) if units is None else units
    return SshdObserved(
        drop_in=observe_path(drop_in, read=True),
        main=observe_path(MAIN, read=True),
        service=units["ssh.service"],
        socket=units["ssh.socket"],
        newest=newest,
        socket_drop_in=observe_path(SOCKET_DROP_IN, read=True),
    )


def present_login() -> Login | None:
    """The ssh login this process came through, found in its ancestors' environment; None without one.

    The outermost process below sshd is the login's own: sudo further in may say another user.
    """
    pid = os.getpid()
    found: dict[str, str] = {}
    while pid > 1:
        try:
            with open(f"/proc/{pid}/environ", encoding="utf-8", errors="replace") as handle:
                environment = dict(entry.split("=", 1) for entry in handle.read().split("\0") if "=" in entry)
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
                before, after = handle.read().rsplit(")", 1)
        except OSError:
            break
        if before.split("(", 1)[1].startswith("sshd"):
            break
        if "SSH_CONNECTION" in environment and "USER" in environment:
            found = environment
        pid = int(after.split()[1])
    if not found:
        return None
    client, _client_port, server, port = found["SSH_CONNECTION"].split()
    return login_of(found["USER"], client, server, int(port))


def login_of(user: str, client: str, server: str, port: int) -> Login:
    """The facts of a login that the judgement needs, except its keys, which depend on the configuration."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise NodeError(f"login user {user} does not exist on the node") from None
    groups = []
    for gid in os.getgrouplist(user, entry.pw_gid):
        try:
            groups.append(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue
    return Login(user, tuple(groups), client, server, port)


def key_types(user: str, effective: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The types of the keys that `user` may come in with under `effective`."""
    home = pwd.getpwnam(user).pw_dir
    found: list[str] = []
    for pattern in " ".join(effective.get("authorizedkeysfile", [])).split():
        path = pattern.replace("%h", home).replace("%u", user).replace("%%", "%")
        try:
            with open(os.path.join(home, path), encoding="utf-8", errors="replace") as handle:
                for line in handle:
                    words = line.split()
                    if words and not words[0].startswith("#"):
                        found += [w for w in words if w.startswith(("ssh-", "ecdsa-", "sk-"))][:1]
        except OSError:
            continue
    return tuple(dict.fromkeys(found))


def effective_of(config: str, login: Login | None, commands: Commands) -> dict[str, list[str]]:
    """What sshd makes of the file `config`, for `login` when there is one."""
    argv = ["/usr/sbin/sshd", "-T", "-f", config]
    if login is not None:
        spec = [f"user={login.user}", f"host={login.client}", f"addr={login.client}"]
        spec += [f"laddr={login.server}", f"lport={login.port}"]
        argv += ["-C", ",".join(spec)]
    done = commands.run(argv)
    if done.code != 0:
        raise NodeError(f"sshd does not accept the new configuration, nothing was changed: {done.tail(4)}")
    return sshd_plan.parse_effective(done.out)


def prove_candidate(
    settings: Mapping[str, Any] | None,
    actions: Sequence[Action],
    provable: bool,
    commands: Commands,
    *,
    matches: Sequence[Match] = (),
    drop_in: str = DROP_IN,
) -> None:
    """Have sshd read the configuration as it would be, before anything is written.

    Without `settings` (a rollback) the files of `actions` are judged as they are. When nothing is to change only
    what overrules the settings is looked for.

    Raises NodeError when sshd refuses it, when another file overrules a setting, when the login of this run
    would not get in any more, or when its controller could not prove a change (`provable`).
    """
    login = present_login()
    if login is not None and actions and not provable:
        raise NodeError(
            f"this run came in by ssh as {login.user}, but its connection plugin cannot prove a new connection, "
            "nothing was changed: use ansible.builtin.ssh"
        )
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="censuschat-sshd-") as directory:
        drop_ins = os.path.join(directory, "sshd_config.d")
        os.mkdir(drop_ins)
        for path in glob.glob(f"{DROP_IN_DIRECTORY}/*.conf"):
            shutil.copy(path, drop_ins)
        main = observe_path(MAIN, read=True).content or ""
        mine = sshd_plan.render(settings, matches) if settings is not None else ""
        if settings is not None:
            _candidate(drop_ins, drop_in, mine)
        for action in actions:
            if action.kind == "sshd_file" and action.target == MAIN:
                main = action.payload or ""
            elif action.kind == "sshd_file" and os.path.dirname(action.target) == DROP_IN_DIRECTORY:
                _candidate(drop_ins, action.target, action.payload)
        whole_path = os.path.join(directory, "sshd_config")
        with open(whole_path, "w", encoding="utf-8") as handle:
            handle.write(main.replace(f"{DROP_IN_DIRECTORY}/", f"{drop_ins}/"))
        alone_path = os.path.join(directory, "alone")
        with open(alone_path, "w", encoding="utf-8") as handle:
            handle.write(mine)
        try:
            whole = effective_of(whole_path, None, commands)
            alone = effective_of(alone_path, None, commands) if settings is not None else {}
            for_login = effective_of(whole_path, login, commands) if login and actions else {}
        except NodeError as error:
            raise NodeError(
                str(error).replace(f"{drop_ins}/", f"{DROP_IN_DIRECTORY}/").replace(f"{directory}/", "/etc/ssh/")
            ) from error
    other = sshd_plan.overruled(settings or {}, alone, whole)
    if other:
        raise NodeError(
            f"another part of {MAIN} or of {DROP_IN_DIRECTORY} decides first, nothing was changed: {'; '.join(other)}"
        )
    if login is not None and actions:
        known = Login(
            login.user, login.groups, login.client, login.server, login.port, key_types(login.user, for_login)
        )
        problem = sshd_plan.login_problem(for_login, known)
        if problem:
            raise NodeError(f"the change would lock out {login.user}, nothing was changed: {problem}")


def _candidate(directory: str, path: str, content: str | None) -> None:
    """Put the file that `path` would be into the candidate's `directory`; None takes it out."""
    copy = os.path.join(directory, os.path.basename(path))
    if content is None:
        if os.path.exists(copy):
            os.unlink(copy)
        return
    with open(copy, "w", encoding="utf-8") as handle:
        handle.write(content)


def settle(commands: Commands, *, check: bool) -> bool:
    """Deal with an unproven change of an earlier run: refuse while its timer is armed, undo it when it is not.

    Returns whether it was undone: what was observed of sshd before is not so any more.

    What stands on disk then is not to be taken for the present state: the revert will replace it.
    """
    if not os.path.isdir(PENDING):
        return False
    if commands.run(["systemctl", "-q", "is-active", f"{TIMER}.timer"]).code == 0:
        raise NodeError(
            "an earlier sshd change on this node still waits for its proof and its timer will undo it: "
            "nothing was changed, run again in a few minutes"
        )
    if check:
        raise NodeError("an sshd change of an earlier run was left unproven; a run without check mode undoes it first")
    commands.must(["/bin/sh", REVERT], "undoing an sshd change that an earlier run left unproven")
    return True


def last_revert() -> str:
    """When a change was last undone for want of proof (UTC, ISO 8601); "" when it never was."""
    return (observe_path(LAST_REVERT, read=True).content or "").strip()


def apply(
    actions: Sequence[Action],
    observed: SshdObserved,
    revert_after_s: int,
    commands: Commands,
    keep: Keeper | None = None,
) -> str:
    """Arm the revert, write, reload, and wait until sshd runs with the new configuration.

    `keep` is the journal of the run that this change belongs to.

    Returns the token that confirms or reverts the change; "" when no sshd runs, so that nothing can be
    proven or lost. Any failure here reverts at once and raises NodeError.
    """
    writes = [a for a in actions if a.kind == "sshd_file"]
    running = observed.service.running or observed.by_socket
    token = secrets.token_hex(8)
    if keep is not None:
        keep.before(actions)
    if running:
        _arm(writes, token, revert_after_s, commands)
    try:
        os.makedirs(DROP_IN_DIRECTORY, mode=0o755, exist_ok=True)
        for action in writes:
            _write(action)
        if any(a.kind == "sshd_socket" for a in actions):
            _listen_anew(observed, commands)
        elif observed.service.running and observed.socket.running:
            # A reload executes sshd anew without the socket that systemd gave it, and it ends: the ports are taken.
            commands.must(["systemctl", "restart", "ssh.service"], "starting sshd anew on its socket")
        elif observed.service.running:
            _reload(commands)
    except (NodeError, OSError) as error:
        if running:
            revert(token, commands)
        raise NodeError(f"the sshd change failed and was undone: {error}") from error
    if keep is not None:
        keep.after()
    return token if running else ""


def _write(action: Action) -> None:
    if action.payload is None:
        remove_path(action.target)
        return
    now = observe_path(action.target)
    os.makedirs(os.path.dirname(action.target), mode=0o755, exist_ok=True)
    fresh = 0o644 if action.target == SOCKET_DROP_IN else 0o600
    write_atomically(action.target, action.payload, "root", "root", now.mode if now.kind == "file" else fresh)


def _listen_anew(observed: SshdObserved, commands: Commands) -> None:
    """Have systemd open the socket's new ports; the sessions of the old ones are processes of their own and stay."""
    commands.must(["systemctl", "daemon-reload"], "telling systemd about the ports of ssh.socket")
    if observed.service.running:
        # The socket hands its ports to one running sshd, which has to let go of the old ones first.
        commands.must(["systemctl", "stop", "ssh.service"], "stopping sshd to change its socket")
    commands.must(["systemctl", "restart", "ssh.socket"], "opening the ports of ssh.socket")
    if observed.service.running:
        commands.must(["systemctl", "start", "ssh.service"], "starting sshd on its changed socket")


def _arm(writes: Sequence[Action], token: str, revert_after_s: int, commands: Commands) -> None:
    try:
        _prepare_revert(writes, token)
    except (NodeError, OSError) as error:
        _forget(PENDING)
        raise NodeError(f"the revert cannot be prepared, so nothing was changed: {error}") from error
    done = commands.run(
        [
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={TIMER}",
            f"--on-active={revert_after_s}s",
            "--timer-property=AccuracySec=100ms",
            "/bin/sh",
            REVERT,
        ]
    )
    if done.code != 0:
        _forget(PENDING)
        raise NodeError(f"the revert timer cannot be armed, so nothing was changed: {done.tail(3)}")


def _prepare_revert(writes: Sequence[Action], token: str) -> None:
    os.makedirs(STATE, mode=0o700, exist_ok=True)
    building = f"{STATE}/building-{token}"
    os.mkdir(building, 0o700)
    lines = [
        "#!/bin/sh",
        "# Puts back the sshd configuration that stood before a change which nobody proved.",
        "set -u",
        f"mv {PENDING} {STATE}/reverting 2>/dev/null || [ -d {STATE}/reverting ] || exit 0",
    ]
    for index, action in enumerate(writes):
        path = shlex.quote(action.target)
        if observe_path(action.target).kind == "file":
            shutil.copy2(action.target, f"{building}/{index}")
            new = shlex.quote(action.target + ".revert")
            lines.append(f"cp -p {STATE}/reverting/{index} {new} && mv {new} {path}")
        else:
            lines.append(f"rm -f {path}")
    if any(action.target == SOCKET_DROP_IN for action in writes):
        lines += [
            "systemctl daemon-reload",
            "if systemctl -q is-active ssh.service; then systemctl stop ssh.service; again=1; else again=; fi",
            "systemctl restart ssh.socket",
            '[ -z "$again" ] || systemctl start ssh.service',
        ]
    lines += [
        "if systemctl -q is-active ssh.socket; then",
        "  systemctl try-restart ssh.service",
        "elif systemctl -q is-active ssh.service; then",
        "  systemctl reload ssh.service || systemctl restart ssh.service",
        "fi",
        f"date -u +%FT%TZ > {LAST_REVERT}",
        f"rm -rf {STATE}/reverting {BOOT_WANT} {BOOT_UNIT} {REVERT}",
    ]
    write_atomically(f"{building}/token", token, "root", "root", 0o600)
    write_atomically(REVERT, "\n".join(lines) + "\n", "root", "root", 0o700)
    os.replace(building, PENDING)
    write_atomically(BOOT_UNIT, _BOOT_TEXT, "root", "root", 0o644)
    os.makedirs(os.path.dirname(BOOT_WANT), mode=0o755, exist_ok=True)
    if not os.path.lexists(BOOT_WANT):
        os.symlink(BOOT_UNIT, BOOT_WANT)


def _reload(commands: Commands) -> None:
    before = _listeners(commands)
    commands.must(["systemctl", "reload", "ssh.service"], "reloading sshd")
    # A proof taken before sshd has executed itself anew would prove the old configuration.
    deadline = time.monotonic() + RELOAD_WAIT_S
    while time.monotonic() < deadline:
        now = _listeners(commands)
        if now and not now & before:
            return
        time.sleep(0.02)
    raise NodeError(f"sshd did not come back within {RELOAD_WAIT_S:.0f} s of its reload")


def _listeners(commands: Commands) -> frozenset[str]:
    """The inodes of the sockets that sshd's main process listens on; new ones after each re-execution."""
    pid = commands.run(["systemctl", "show", "--property=MainPID", "--value", "ssh.service"]).out.strip()
    inodes = set()
    listening = set()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        for table in ("tcp", "tcp6"):
            with open(f"/proc/{pid}/net/{table}", encoding="utf-8") as handle:
                # Columns: sl, local, remote, state (0A is LISTEN), ..., inode.
                rows = [line.split() for line in handle.readlines()[1:]]
                listening |= {row[9] for row in rows if row[3] == "0A"}
    except OSError:
        return frozenset()
    return frozenset(inodes & listening)


def confirm(token: str, commands: Commands) -> None:
    """Keep the change: disarm timer and boot unit. NodeError when it was reverted meanwhile."""
    _check(token)
    commands.run(["systemctl", "stop", f"{TIMER}.timer"])
    try:
        # The same rename as the revert's: one of the two wins.
        os.replace(PENDING, f"{STATE}/confirmed-{token}")
    except FileNotFoundError:
        raise NodeError("the sshd change was undone by its timer before its proof arrived: run again") from None
    _forget(f"{STATE}/confirmed-{token}")


def revert(token: str, commands: Commands) -> None:
    """Undo the change now; a no-op when the timer already did."""
    if os.path.isdir(PENDING):
        _check(token)
    commands.run(["systemctl", "stop", f"{TIMER}.timer"])
    if os.path.exists(REVERT):
        commands.must(["/bin/sh", REVERT], "undoing the sshd change")


def _check(token: str) -> None:
    now: PathState = observe_path(f"{PENDING}/token", read=True)
    if now.content is None:
        raise NodeError("the sshd change was undone by its timer before its proof arrived: run again")
    if now.content != token:
        raise NodeError("another run has an sshd change pending on this node: wait for it to end")


def _forget(backup: str) -> None:
    shutil.rmtree(backup, ignore_errors=True)
    for path in (REVERT, BOOT_WANT, BOOT_UNIT):
        if os.path.lexists(path):
            os.unlink(path)
