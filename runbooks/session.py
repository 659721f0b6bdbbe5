"""This process at work on one run: what stops it, what the operator ordered, and the playbook processes that wait."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from runbooks.journal import state_home
from runbooks.locks import Lease, pid_start
from runbooks.progress import Progress
from runbooks.step import PlaybookProcess


class Interrupted(Exception):
    """The operator asked to stop (SIGINT, SIGTERM, SIGHUP) before anything was touched."""


@dataclass(slots=True)
class Stop:
    """Whether the run is to end at the next moment that it can."""

    asked: str = ""
    lease: Lease | None = None

    def __call__(self) -> bool:
        return bool(self.asked or self.lost())

    def lost(self) -> str:
        """Why the run may not even write another record; empty while it may."""
        return self.lease.lost() if self.lease is not None else ""


@contextmanager
def signals() -> Iterator[Stop]:
    """Turn the signals that end a program into a request to stop."""
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.asked = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def at_the_prompt() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt while a person is asked for something: there is nothing to bring to an end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, slots=True)
class Order:
    """What the operator said beside the parameters. plan: the hash, or its beginning, of an approved plan; emergency:
    the reason for lifting approvals and windows; secret_files: parameter -> file that its value is read from."""

    plan: str | None = None
    emergency: str = ""
    secret_files: Mapping[str, Path] = field(default_factory=dict)


class Warm:
    """Playbook processes that warm up for their turn, one after the other so that they leave the machine to the step
    that runs, and the directory they all live in."""

    def __init__(self, run: str, inventory: Path) -> None:
        self._run, self._inventory = run, inventory.resolve()
        self._directory = state_home() / "steps" / f"{os.getpid()}.{pid_start(os.getpid())}"
        _remove_remains(self._directory.parent)
        self._mutex = threading.Lock()
        self._waiting: list[tuple[Path, float]] = []
        self._ready: list[PlaybookProcess] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def plan(self, playbooks: Iterable[tuple[Path, float]]) -> None:
        """Warm these up in the background, in their order: each with the seconds after which it is stopped."""
        with self._mutex:
            self._waiting += playbooks
            if self._thread is None:
                self._thread = threading.Thread(target=self._warm_up, name="warm", daemon=True)
                self._thread.start()

    def _warm_up(self) -> None:
        while not self._closed.is_set():
            with self._mutex:
                process = self._make(*self._waiting.pop(0)) if self._waiting else None
                if process is not None:
                    self._ready.append(process)
            while not self._closed.wait(0.05) and process is not None and not process.warm():
                pass

    def _make(self, playbook: Path, timeout_s: float) -> PlaybookProcess:
        return PlaybookProcess(playbook, self._inventory, self._run, self._directory, timeout_s)

    def take(self, playbook: Path, timeout_s: float) -> PlaybookProcess:
        """The process of this playbook: the one that is warming up, or a new one."""
        with self._mutex:
            planned = next((entry for entry in self._waiting if entry[0] == playbook), None)
            if planned is not None:
                self._waiting.remove(planned)
            found = next((process for process in self._ready if process.playbook == playbook), None)
            if found is None:
                return self._make(playbook, timeout_s)
            self._ready.remove(found)
            return found

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for process in self._ready:
            process.cancel()
        for process in self._ready:
            process.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _remove_remains(directory: Path) -> None:
    """Files of engines that were killed: they hold the environment that a playbook ran in."""
    for remains in directory.glob("*.*"):
        pid, _, start = remains.name.partition(".")
        if pid.isdigit() and pid_start(int(pid)) != start:
            shutil.rmtree(remains, ignore_errors=True)


@dataclass(slots=True)
class Session:
    """This process at work on one run."""

    run: str
    warm: Warm
    progress: Progress
    stop: Stop
    order: Order = field(default_factory=Order)
    asked: float = field(default_factory=time.time)
    """Unix seconds when the operator gave the command."""
