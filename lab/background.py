"""Processes of the lab that run in the background: started once, found again by pid and start time, ended gently.

A pid alone may belong to somebody else by now, so a pid file holds the kernel's start time of the process too; a
process is only ever signalled when both agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.paths import REPO, STATE


class BackgroundError(Exception):
    """A background process did not start or did not end; says which, and where its log is."""


def start_time(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot (field 22 of /proc/PID/stat); None when there is none.

    A zombie counts as ended: its parent has only not looked yet.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


@dataclass(frozen=True)
class Background:
    """One background process by name; ``state`` is the lab's state directory."""

    name: str
    state: Path = STATE

    @property
    def pid_file(self) -> Path:
        return self.state / "pids" / f"{self.name}.json"

    @property
    def log_file(self) -> Path:
        return self.state / "log" / f"{self.name}.log"

    def pid(self) -> int | None:
        """The pid while the very process that was started is running."""
        try:
            data = json.loads(self.pid_file.read_text(encoding="ascii"))
            pid, started = int(data["pid"]), int(data["start_time"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if start_time(pid) == started else None

    def start(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> bool:
        """Start it unless it runs; False when it ran already. ``env`` is added to the environment: secrets go there,
        never into ``command``, which every user of the machine can read."""
        if self.pid() is not None:
            return False
        self.pid_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=REPO,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # Already gone (a bad command): the file then names a process that never matches, and wait_until says so.
        data = {"pid": process.pid, "start_time": start_time(process.pid) or 0, "name": self.name}
        part = self.pid_file.with_suffix(".part")
        part.write_text(json.dumps(data) + "\n", encoding="ascii")
        part.replace(self.pid_file)
        return True

    def stop(self, timeout_s: float = 10.0) -> bool:
        """SIGTERM, wait, SIGKILL after ``timeout_s``; False when it did not run.

        Raises BackgroundError when it stays.
        """
        pid = self.pid()
        if pid is None:
            self.pid_file.unlink(missing_ok=True)
            return False
        for sign, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
            deadline = time.monotonic() + wait_s
            while time.monotonic() < deadline:
                if self.pid() is None:
                    self.pid_file.unlink(missing_ok=True)
                    return True
                time.sleep(0.02)
        raise BackgroundError(f"{self.name} (pid {pid}) does not end, even killed; see {self.log_file}")

    def tail(self, lines: int = 5) -> str:
        """The last lines of its log, to say why it ended."""
        try:
            text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])
