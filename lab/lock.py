"""Only one command at a time changes the lab, also when the one before was killed half-way.

The lock is held by the `lab` command and, through the inherited file descriptor, by the playbook it runs. When `lab`
is killed, the playbook's processes go on without it; the next command lets their current step end, starts no other,
and ends what hangs (a worker of Ansible whose parent was killed waits for ever to hand over its result).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.background import start_time


class BusyError(Exception):
    """Another command kept the lock for longer than we wait."""


@dataclass(frozen=True)
class Holder:
    """A process that holds the lock, and its children."""

    pid: int
    children: frozenset[int]


def doomed(holders: Mapping[int, Holder], idle: Mapping[int, float], patience: float = 1.0) -> set[int]:
    """Which holders of a lock whose owner is gone are to be ended.

    One with a child among the holders would start further steps. One without any child for `patience` seconds has
    nothing left to do (`idle`: seconds by pid). One whose step is running is waited for.
    """
    return {
        holder.pid
        for holder in holders.values()
        if holder.children & holders.keys() or (not holder.children and idle.get(holder.pid, 0.0) >= patience)
    }


def find_holders(lock: Path) -> dict[int, Holder]:
    """Every other process that holds the lock, itself or by inheritance, from /proc. One that waits holds nothing."""
    target = lock.stat()
    children: dict[int, set[int]] = {}
    holding: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, set()).add(int(entry.name))
        with contextlib.suppress(OSError):
            for descriptor in (entry / "fd").iterdir():
                with contextlib.suppress(OSError):
                    seen = descriptor.stat()
                    if (seen.st_dev, seen.st_ino) != (target.st_dev, target.st_ino):
                        continue
                    if "\nlock:" in (entry / "fdinfo" / descriptor.name).read_text(encoding="ascii"):
                        holding.append(int(entry.name))
                        break
    return {pid: Holder(pid, frozenset(children.get(pid, ()))) for pid in holding if pid != os.getpid()}


def owner_lives(lock: Path) -> bool:
    """Whether the command that took the lock is alive (true while that cannot be told)."""
    try:
        owner = json.loads(lock.read_text(encoding="ascii"))
        return start_time(int(owner["pid"])) == int(owner["start_time"])
    except (OSError, ValueError, KeyError):
        return True


@contextlib.contextmanager
def alone(lock: Path, patience: float) -> Iterator[int]:
    """Holds the lock; gives its file descriptor. Raises BusyError when a living command keeps it for `patience` s."""
    with lock.open("a+", encoding="ascii") as file:
        deadline, said = time.monotonic() + patience, False
        idle_since: dict[int, float] = {}
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now > deadline:
                    raise BusyError from None
                if not said:
                    print("another lab command is changing the lab; waiting for it to end", file=sys.stderr)
                said = True
            if not owner_lives(lock):
                holders = find_holders(lock)
                idle_since = {pid: idle_since.get(pid, now) for pid, holder in holders.items() if not holder.children}
                for pid in doomed(holders, {pid: now - since for pid, since in idle_since.items()}):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "start_time": start_time(os.getpid())}, file)
        file.flush()
        yield file.fileno()
