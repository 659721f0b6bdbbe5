# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the jobs share: programs, files that are whole or not there, metrics, and sentences for people."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = "/usr/local/bin"


class UpkeepError(Exception):
    """A failure the user can act on: one sentence with what, where, why and the remedy."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished program: exit code, standard output and standard error as text."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last words on one line, standard error first."""
        lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines() if line.strip()]
        return "; ".join(lines[-3:])[-600:] or f"exit code {self.code}"


def environment() -> dict[str, str]:
    """What programs get to see: nothing of the caller's own."""
    path = f"{PROGRAMS}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "LC_ALL": "C.UTF-8", "HOME": "/root"}


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 120.0,
    stdin: str | None = None,
    stdin_path: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run a program without a shell; never raises on its exit code. 124: not in time; 127: not there."""
    with contextlib.ExitStack() as stack:
        source: Any = subprocess.DEVNULL
        if stdin_path is not None:
            source = stack.enter_context(stdin_path.open("rb"))
        try:
            # No AnsibleModule here: the same code runs from a systemd unit.
            done = subprocess.run(  # pylint: disable=ansible-bad-function
                list(argv),
                env={**environment(), **(env or {})},
                timeout=timeout_s,
                check=False,
                text=True,
                errors="replace",
                capture_output=True,
                **({"stdin": source} if stdin is None else {"input": stdin}),
            )
        except FileNotFoundError:
            return Done(127, "", f"{argv[0]}: not found")
        except subprocess.TimeoutExpired:
            return Done(124, "", f"{argv[0]}: did not finish within {timeout_s:.0f} s")
    return Done(done.returncode, done.stdout, done.stderr)


def must(argv: Sequence[str], what: str, *, timeout_s: float = 120.0) -> Done:
    """Run a program that has to succeed; UpkeepError says `what` could not be done and why."""
    done = run(argv, timeout_s=timeout_s)
    if done.code != 0:
        raise UpkeepError(f"{what}: `{shlex.join(list(argv)[:3])} ...` said: {done.said}")
    return done


def config_of(path: str) -> dict[str, Any]:
    """A job's configuration; UpkeepError when it cannot be read."""
    try:
        loaded: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UpkeepError(f"{path} cannot be read: {error}. Converge the node's role again") from error
    return loaded


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file so that it is there whole or not at all, also after a crash."""
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.fchmod(descriptor, mode)
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory outlive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that root may still write below `path`."""
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; UpkeepError when another process holds it. The lock dies with its process."""
    with path.open("a+", encoding="utf-8") as handle:
        path.chmod(0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpkeepError(f"{what} is already running here (it holds {path}); wait for it") from None
        yield


def utc_now() -> datetime.datetime:
    """Now, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One sample of Prometheus' text format. Names and labels of one metric stand together in a file."""

    name: str
    help: str
    value: float
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def line(self) -> str:
        inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in self.labels.items())
        return f"{self.name}{'{' + inner + '}' if inner else ''} {self.value:.15g}\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render_metrics(metrics: Sequence[Metric]) -> str:
    """The text file that a node exporter's textfile collector reads."""
    text: dict[str, str] = {}
    for metric in metrics:
        head = f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} gauge\n"
        text[metric.name] = text.get(metric.name, head) + metric.line
    return "".join(text.values())


def publish(path: str, metrics: Sequence[Metric]) -> None:
    """Replace the metrics file; an empty path means that nobody collects them."""
    if path:
        write_whole(Path(path), render_metrics(metrics), 0o644)


def say(line: str) -> None:
    """One line for the journal, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def reported(job: Callable[[], str], *, name: str) -> int:
    """Run a job for systemd: its result or its failure as one line, and the exit code."""
    try:
        say(f"{name}: {job()}")
    except UpkeepError as error:
        say(f"{name}: failed: {error}")
        return 1
    return 0
