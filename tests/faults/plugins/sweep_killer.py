"""Test only: notes which tasks changed something, and kills a run at one exact point of one of them.

Before an effect: Ansible forks the task's worker for the host, so the journal has the intent. After it: the task has
changed the host and nobody has been told, since this plugin comes before the collection's own in Ansible's order.

``SWEEP_KILL`` is a JSON file: {"step", "task", "host", "nth", "moment": "before" | "after", "victim", "mark", "notes"}.
``mark`` is written before the kill and keeps it from happening twice; ``notes``, if given, gets a line a changed task.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: sweep_killer
type: aggregate
short_description: Kill a run at one exact point
description: Test only.
"""


def children(pid: int) -> list[int]:
    """The processes that a process started and that still exist; what is left of ended ones is none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Begins to count when the playbook does."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "sweep_killer"

    def __init__(self) -> None:
        super().__init__()
        file = os.environ.get("SWEEP_KILL")
        self.disabled = not file
        self.plan: dict[str, Any] = json.loads(Path(file).read_text()) if file else {}
        self.started: Counter[tuple[str, str]] = Counter()
        self.armed = False
        self.step = ""
        os.register_at_fork(before=self._before_fork, after_in_child=self._in_worker, after_in_parent=self._in_parent)

    def v2_playbook_on_start(self, playbook: Any) -> None:
        self.step = Path(playbook._file_name).stem

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        """In Ansible's main process, right before the worker's start; other plugins are told of it after this one."""
        self.started[(task.get_name(), host.name)] += 1
        self.armed = self._here("before", task.get_name(), host.name)

    def v2_runner_on_ok(self, result: Any) -> None:
        task, host = result.task.get_name(), result.host.name
        if not result.result.get("changed"):
            return
        if notes := self.plan.get("notes"):
            nth = self.started[(task, host)]
            line = {"step": self.step, "task": task, "host": host, "nth": nth, "wall": time.time()}
            with Path(notes).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        if self._here("after", task, host):
            self._kill()

    def _here(self, moment: str, task: str, host: str) -> bool:
        plan = self.plan
        return (
            plan.get("moment") == moment
            and (plan["step"], plan["task"], plan["host"]) == (self.step, task, host)
            and plan["nth"] == self.started[(task, host)]
            and not Path(plan["mark"]).exists()
        )

    def _mark(self) -> None:
        descriptor = os.open(self.plan["mark"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, json.dumps({"wall": time.time(), "victim": self.plan["victim"]}).encode())
        os.fsync(descriptor)
        os.close(descriptor)

    def _kill(self) -> None:
        self._mark()
        if self.plan["victim"] in ("engine", "all"):
            engine, me = os.getppid(), os.getpid()
            others = [pid for parent in (engine, me) for pid in children(parent) if pid != me]
            kill(engine)
            if self.plan["victim"] == "all":
                for pid in others:
                    kill(pid)
                kill(me)
            # The kernel ends this process for its engine's sake; until then nothing goes on.
            time.sleep(30)
        kill(os.getpid())

    def _before_fork(self) -> None:
        if self.armed and self.plan["victim"] != "worker":
            self._kill()

    def _in_worker(self) -> None:
        if self.armed:
            self._mark()
            kill(os.getpid())

    def _in_parent(self) -> None:
        self.armed = False
