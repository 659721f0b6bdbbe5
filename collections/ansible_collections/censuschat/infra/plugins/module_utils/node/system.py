# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What every node module needs from the host: commands, file observation, atomic writes.

Runs on the node with Debian 12's Python 3.11 and its standard library only.
"""

from __future__ import annotations

import dataclasses
import errno
import grp
import os
import pwd
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

# Larger texts are compared but not shown: a diff of that size helps nobody.
DIFF_LIMIT_BYTES = 256 * 1024
REDACTED = "(secret, not shown)\n"


class NodeError(Exception):
    """A failure the user can act on: one message with what, where, why and the remedy."""


@dataclasses.dataclass(frozen=True)
class Completed:
    """A finished command: exit code, standard output and standard error as text."""

    code: int
    out: str
    err: str

    def tail(self, lines: int = 15) -> str:
        """The last lines of what the command said, standard error first."""
        text = (self.err.strip() + "\n" + self.out.strip()).strip()
        return "\n".join(text.splitlines()[-lines:])


class Commands:
    """Runs programs without a shell, in the C.UTF-8 locale so that output can be parsed."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 900.0,
    ) -> Completed:
        """Run `argv`, never raising on its exit code; `timeout` is in seconds."""
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "C", **(env or {})}
        try:
            # No AnsibleModule here: the same code runs in unit tests, and a time limit is needed.
            done = subprocess.run(  # pylint: disable=ansible-bad-function
                list(argv),
                input=stdin,
                env=environment,
                timeout=timeout,
                check=False,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
            )
        except FileNotFoundError:
            return Completed(127, "", f"{argv[0]}: command not found")
        except subprocess.TimeoutExpired:
            return Completed(124, "", f"{argv[0]}: did not finish within {timeout:.0f} s")
        return Completed(done.returncode, done.stdout, done.stderr)

    def must(
        self,
        argv: Sequence[str],
        what: str,
        *,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run `argv`; when it fails raise NodeError saying `what` could not be done and why."""
        done = self.run(argv, stdin=stdin, env=env)
        if done.code != 0:
            raise NodeError(f"{what} failed: `{shlex.join(argv)}` ended with {done.code}: {done.tail()}")
        return done


@dataclasses.dataclass(frozen=True)
class PathState:
    """What stands at a path: `kind` is absent, file, directory, link or other; `ctime` in unix seconds."""

    path: str
    kind: str = "absent"
    owner: str = ""
    group: str = ""
    mode: int = 0
    ctime: float = 0.0
    content: str | None = None
    target: str = ""


def owner_name(uid: int) -> str:
    """The user name of `uid`, or the number as text when the account has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The group name of `gid`, or the number as text when it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def user_id(name: str) -> int:
    """The uid of a user name or of a number given as text."""
    if name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise NodeError(f"user {name} does not exist: list it under users or the package that brings it") from None


def group_id(name: str) -> int:
    """The gid of a group name or of a number given as text."""
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise NodeError(f"group {name} does not exist: list it under groups or the package that brings it") from None


def observe_path(path: str, *, read: bool = False) -> PathState:
    """Look at `path` without following a final link; `read` also takes a regular file's text."""
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return PathState(path)
    kind = "other"
    content: str | None = None
    target = ""
    if stat.S_ISREG(info.st_mode):
        kind = "file"
        if read:
            with open(path, "rb") as handle:
                # surrogateescape keeps bytes that are not UTF-8, so that equality stays exact.
                content = handle.read().decode("utf-8", "surrogateescape")
    elif stat.S_ISDIR(info.st_mode):
        kind = "directory"
    elif stat.S_ISLNK(info.st_mode):
        kind = "link"
        target = os.readlink(path)
    return PathState(
        path=path,
        kind=kind,
        owner=owner_name(info.st_uid),
        group=group_name(info.st_gid),
        mode=stat.S_IMODE(info.st_mode),
        ctime=info.st_ctime,
        content=content,
        target=target,
    )


def set_attributes(path: str, owner: str, group: str, mode: int) -> None:
    """Give `path` its owner, group and mode; only what differs is touched, so that ctime stays true."""
    info = os.lstat(path)
    uid, gid = user_id(owner), group_id(group)
    if (info.st_uid, info.st_gid) != (uid, gid):
        os.chown(path, uid, gid)
    # chown clears set-id bits, so the mode is compared afterwards.
    if stat.S_IMODE(os.lstat(path).st_mode) != mode:
        os.chmod(path, mode)


_REMEDIES = {
    errno.ENOSPC: "free some space there (`df -h {place}`), then run again",
    errno.EDQUOT: "raise the quota or free some space there, then run again",
    errno.EROFS: "mount it writable (`mount -o remount,rw`) or see in the kernel's log why it no longer is",
    errno.EACCES: "run with become: true",
    errno.EPERM: "see whether the file is immutable (`lsattr`), and run with become: true",
}


def reason(error: OSError, place: str) -> str:
    """What went wrong at `place` and, where it is known, what to do about it."""
    what = f"{error.strerror or error} in {place}"
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{what}: {remedy.format(place=place)}" if remedy else what


def write_atomically(
    path: str,
    content: str,
    owner: str,
    group: str,
    mode: int,
    *,
    validate: str = "",
    commands: Commands | None = None,
) -> None:
    """Write `content` to a temporary file beside `path`, validate it, and rename it into place.

    `validate` is a command with one `%s` for the temporary file; when it fails nothing is replaced
    and NodeError carries its output. A path that is itself a mount point (a container's /etc/hosts)
    cannot be renamed over and is rewritten in place.
    """
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise NodeError(f"{path} cannot be written: {directory} does not exist; list it under directories")
    data = content.encode("utf-8", "surrogateescape")
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=".new", dir=directory)
    except OSError as error:
        raise NodeError(f"{path} cannot be written: {reason(error, directory)}") from error
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.chown(temporary, user_id(owner), group_id(group))
        os.chmod(temporary, mode)
        if validate:
            argv = [part.replace("%s", temporary) for part in shlex.split(validate)]
            done = (commands or Commands()).run(argv)
            if done.code != 0:
                said = done.tail().replace(temporary, path)
                raise NodeError(f"{path} was not replaced: its new content does not pass `{validate}`: {said}")
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno == errno.EBUSY and os.path.ismount(path):
                with open(path, "wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                set_attributes(path, owner, group, mode)
            else:
                raise
    except OSError as error:
        raise NodeError(f"{path} cannot be written: {reason(error, directory)}") from error
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def link_atomically(path: str, target: str) -> None:
    """Make `path` a symbolic link to `target`, replacing a file or link that stands there."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        os.symlink(target, temporary)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise NodeError(f"{path} cannot be linked to {target}: {error.strerror}") from error


def remove_path(path: str) -> None:
    """Remove a file, a link or a whole directory."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise NodeError(f"{path} cannot be removed: {error.strerror}") from error


def shown(content: str | None, secret: bool = False) -> str:
    """A file's text as a diff may show it: redacted when secret, summed up when huge."""
    if content is None:
        return ""
    if secret:
        return REDACTED
    if len(content) > DIFF_LIMIT_BYTES:
        return f"({len(content)} characters, not shown)\n"
    return content.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def container() -> str:
    """The kind of container this host is ("podman", "docker", ...), or "" on a machine of its own.

    Reads what systemd records at boot, as `systemd-detect-virt --container` does, without a process.
    """
    try:
        with open("/run/systemd/container", encoding="utf-8") as handle:
            return handle.read().strip()
    except FileNotFoundError:
        return ""
