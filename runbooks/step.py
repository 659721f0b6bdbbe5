"""Runs one step's playbook through ansible-runner, and turns its events into progress and an outcome."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runbooks.environment import ANSIBLE_CONFIG, ROOT
from runbooks.journal import StepOutcome

MARK = "RUNBOOK_PROCESS_OF"
"""The environment variable that marks every process of a run with the run's id, from its first moment."""


@dataclass(slots=True)
class Result:
    """What came of one step. failures: {"host", "task", "message"}; changed: {"task", "hosts"}."""

    outcome: StepOutcome
    outputs: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    changed: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    def text(self) -> str:
        """The failures in plain words, one a host."""
        return "; ".join(": ".join(p for p in (f["host"], f["task"], f["message"]) if p) for f in self.failures)


@dataclass(slots=True)
class Activity:
    """What the step is doing at the moment."""

    task: str = ""
    hosts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(self.hosts[:2]) + (f" +{len(self.hosts) - 2}" if len(self.hosts) > 2 else "")
        return f"{self.task} ({shown})" if shown else self.task


class PlaybookProcess:
    """One playbook of a run, warming up from the moment it is made; ``run`` lets it go and waits for its end.

    ``close`` must be called; without ``run`` before it, nothing has happened. Its files (0700) are gone afterwards.
    """

    def __init__(self, playbook: Path, inventory: Path, run: str, directory: Path, timeout_s: float) -> None:
        self.playbook = playbook
        self._events = Events()
        self._cancelled = threading.Event()
        self._on_activity: Callable[[Activity], None] = lambda _: None
        self._on_event: Callable[[Mapping[str, Any]], None] = lambda _: None
        self._started: float | None = None
        self._timeout_s = timeout_s
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = Path(tempfile.mkdtemp(prefix="step-", dir=directory))
        self._pipe = self._directory / "go"
        os.mkfifo(self._pipe, 0o600)
        # Held open so that the process waits until it is told something, or this one is gone.
        self._go = os.open(self._pipe, os.O_RDWR | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._runner, args=(inventory, run), daemon=True)
        self._status: tuple[str, int | None] | BaseException | None = None
        self._thread.start()

    def _runner(self, inventory: Path, run: str) -> None:
        try:
            import ansible_runner

            result = ansible_runner.run(
                private_data_dir=str(self._directory),
                ident="step",
                binary=sys.executable,
                cmdline=f"-m runbooks.playbook_process {os.getpid()} {self._pipe}",
                inventory=str(inventory),
                envvars={
                    "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p),
                    "ANSIBLE_CONFIG": os.environ.get("ANSIBLE_CONFIG", str(ANSIBLE_CONFIG)),
                    MARK: run,
                },
                settings={"suppress_output_file": True, "pexpect_timeout": 0.2},
                quiet=True,
                event_handler=self._event,
                cancel_callback=self._cancel,
            )
            self._status = (str(result.status), result.rc)
        except BaseException as error:  # Handed to the thread that waits.
            self._status = error

    def _event(self, event: dict[str, Any]) -> bool:
        self._on_event(event)
        activity = self._events.take(event)
        if activity is not None:
            self._on_activity(activity)
        return False  # Nothing of it is kept on disk.

    def _cancel(self) -> bool:
        late = self._started is not None and time.monotonic() - self._started > self._timeout_s
        return late or self._cancelled.is_set()

    def run(
        self,
        variables: Mapping[str, Any],
        leave_out: Sequence[str],
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        options: Sequence[str] = (),
        on_activity: Callable[[Activity], None],
        on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
        interrupted: Callable[[], bool],
    ) -> Result:
        """Let the playbook go and wait for it.

        variables: its extra variables, passed through the pipe, so that secrets are on no disk and in no argv.
        leave_out: hosts that do not answer. environment: what its callback needs to know (RUNBOOK_*; no secrets).
        options: more words for ansible-playbook. on_event: is given each of ansible-runner's events. interrupted: asked
        all the time; when it says so, the playbook is ended.
        """
        self._on_activity, self._on_event = on_activity, on_event
        words = list(options)
        if leave_out:
            # A limit of "all" alone would leave out the plays on this machine, which is in no group.
            words += ["--limit", ":".join(["all", "localhost", *(f"!{host}" for host in leave_out)])]
        self._started = time.monotonic()
        word = {"argv": [*words, str(self.playbook)], "environment": dict(environment), "variables": dict(variables)}
        self._tell(json.dumps(word))
        while self._thread.is_alive():
            self._thread.join(0.05)
            if interrupted():
                self._cancelled.set()
        took = time.monotonic() - self._started
        if isinstance(self._status, BaseException):
            raise self._status
        status, code = self._status or ("failed", None)
        if self._cancelled.is_set():
            return self._events.result("interrupted")
        if status == "canceled":
            return self._events.result("timed out", f"stopped after {took:.0f} s, its time limit")
        return self._events.result("ok") if code == 0 else self._events.result("failed")

    def _tell(self, word: str) -> None:
        if word:
            os.write(self._go, word.encode())
        # The reader sees the end of its file when the last writer is gone.
        _wait_until_read(self._pipe, self._go, self._thread)
        os.close(self._go)
        self._go = -1

    def warm(self) -> bool:
        """Whether it waits for its turn (or has ended)."""
        return (self._directory / "warm").exists() or not self._thread.is_alive()

    def cancel(self) -> None:
        """End it soon, without waiting."""
        self._cancelled.set()

    def close(self) -> None:
        if self._go >= 0:
            os.close(self._go)
            self._go = -1
        if self._thread.is_alive():
            self._cancelled.set()
            self._thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)


class Events:
    """Collects what ansible-runner's events say about the step."""

    def __init__(self) -> None:
        self.activity = Activity()
        self.outputs: dict[str, Any] = {}
        self.changed: dict[str, list[str]] = {}
        self.failures: list[dict[str, str]] = []
        self.tail: list[str] = []

    def take(self, event: Mapping[str, Any]) -> Activity | None:
        """The new activity when it has changed."""
        kind, data = str(event.get("event")), event.get("event_data") or {}
        host, task = str(data.get("host", "")), str(data.get("task", ""))
        if kind == "playbook_on_task_start":
            self.activity = Activity(task)
            return self.activity
        if kind == "runner_on_start":
            self.activity.hosts.append(host)
            return self.activity
        if kind.startswith("runner_on_"):
            if host in self.activity.hosts:
                self.activity.hosts.remove(host)
            if kind == "runner_on_ok" and (data.get("res") or {}).get("changed"):
                self.changed.setdefault(task, []).append(host)
            elif kind == "runner_on_unreachable" or (kind == "runner_on_failed" and not data.get("ignore_errors")):
                self.failures.append({"host": host, "task": task, "message": message(data.get("res") or {})})
            return self.activity
        if kind == "playbook_on_stats":
            self.outputs = dict(data.get("artifact_data") or {})
            # A failure that a rescue took care of is no cause: its host has not failed in the end.
            bad = {*(data.get("failures") or {}), *(data.get("dark") or {})}
            self.failures = [f for f in self.failures if f["host"] in bad] or self.failures
        elif kind == "verbose" and str(event.get("stdout", "")).strip():
            self.tail = [*self.tail[-14:], str(event["stdout"]).strip()]
        return None

    def result(self, outcome: StepOutcome, reason: str = "") -> Result:
        failures = _together(self.failures) if outcome != "ok" else []
        if reason:
            failures.append({"host": "", "task": self.activity.task, "message": reason})
        if outcome == "failed" and not failures:
            # Ansible ended before a task ran (a playbook that cannot be read): its own words are all there is.
            said = "\n".join(self.tail) or "ansible-playbook said nothing"
            failures.append({"host": "", "task": "", "message": said})
        outputs = {k: v for k, v in self.outputs.items() if k != "says"}
        changed = [{"task": task, "hosts": sorted(hosts)} for task, hosts in self.changed.items()]
        return Result(outcome, outputs, str(self.outputs.get("says", "")), changed, failures)


def _together(failures: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One failure for all hosts that say the same about a task."""
    hosts: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        hosts.setdefault((failure["task"], failure["message"]), []).append(failure["host"])
    return [{"host": ", ".join(names), "task": task, "message": text} for (task, text), names in hosts.items()]


def message(res: Mapping[str, Any]) -> str:
    """A failed result in plain words, in full: its message, what the program printed, and the items that failed."""
    if res.get("censored"):
        return "the details are secret (no_log)"
    items = [r for r in res.get("results") or [] if isinstance(r, dict) and (r.get("failed") or r.get("unreachable"))]
    if items:
        return "\n".join(f"{r.get('_ansible_item_label', r.get('item', ''))}: {message(r)}" for r in items)
    parts = [str(res.get("msg", "")).strip()]
    for stream in ("stderr", "module_stderr", "stdout", "module_stdout"):
        text = str(res.get(stream, "")).strip()
        if text and text not in parts[0]:
            parts.append(text)
            break
    return "\n".join(p for p in parts if p) or json.dumps(dict(res), default=str)


def leftovers(run: str) -> list[int]:
    """Processes of a run that outlived their engine (ssh's shared connections are no part of it); also those of its
    slices, whose mark has more after a slash."""
    mark = f"{MARK}={run}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            if any(word == mark or word.startswith(mark + b"/") for word in words) and (
                (process / "comm").read_text(encoding="utf-8").strip() != "ssh"
            ):
                found.append(int(process.name))
        except OSError:
            continue  # It ended meanwhile, or belongs to somebody else.
    return found


def end_leftovers(run: str, patience_s: float = 10.0) -> int:
    """End what a dead engine left running, so that it cannot act beside its successor; how many there were.

    Asked to end first, killed after patience_s.
    """
    first = leftovers(run)
    for pid in first:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while leftovers(run):
        if time.monotonic() > deadline:
            for pid in leftovers(run):
                _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
    return len(first)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _wait_until_read(pipe: Path, fd: int, reader: threading.Thread) -> None:
    """Wait until the other side has opened the pipe and taken what was written.

    Closing earlier would lose it: a FIFO without any opener is empty.
    """
    import array
    import termios

    left = array.array("i", [1])
    while reader.is_alive():
        fcntl.ioctl(fd, termios.FIONREAD, left)
        if left[0] == 0:
            return
        time.sleep(0.005)
