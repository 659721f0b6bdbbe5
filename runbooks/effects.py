"""What the tasks of a runbook intend and what came of it, written by the callback censuschat.infra.runbook_journal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runbooks import vault
from runbooks.errors import Problem, Refused
from runbooks.journal import Journal, LockLost
from runbooks.redact import HIDDEN, redact

WATCH_S = 0.5
"""Seconds between two looks at the workers."""

__all__ = ["Effects", "LockLost", "attach", "looks_only", "lost"]

LOOKING = frozenset(
    (
        "add_host",
        "assert",
        "async_status",
        "debug",
        "fail",
        "gather_facts",
        "getent",
        "group_by",
        "import_playbook",
        "import_role",
        "import_tasks",
        "include_role",
        "include_tasks",
        "include_vars",
        "meta",
        "pause",
        "ping",
        "set_fact",
        "set_stats",
        "setup",
        "slurp",
        "stat",
        "validate_argument_spec",
        "wait_for",
        "wait_for_connection",
    )
)
"""Actions of ansible.builtin that change nothing outside of ansible-playbook itself."""

ACTIONS = ("ansible.builtin.", "ansible.legacy.")


class Task(Protocol):
    """What is used of Ansible's task."""

    action: str
    resolved_action: str | None
    changed_when: Any
    check_mode: Any

    def get_name(self) -> str: ...


def looks_only(action: str, changed_when: Any = None) -> bool:
    """Whether a task cannot change anything, by its action's kind or by its author's word (changed_when: false)."""
    short = action
    for prefix in ACTIONS:
        short = short.removeprefix(prefix)
    return short in LOOKING or short.endswith(("_info", "_facts")) or changed_when in ([False], False)


@dataclass(slots=True)
class Effects:
    """Writes the intent of each task on each host before its worker is forked, and what came of it.

    The journal may say LockLost at any of them: then nothing more may be done.
    """

    journal: Journal
    secrets: Collection[str] = ()
    step: str | None = None

    def intended(self, task: Task, host: str) -> None:
        """Called in ansible-playbook's main process, after the task has its worker and before that is forked.

        ``v2_runner_on_start`` is the one call of which that is true in every strategy: ``v2_playbook_on_task_start``
        comes once for all hosts in the linear one and once a host, without saying which, in the free one.
        """
        if not _harmless(task):
            self.journal.append("effect_intended", self.step, self._of(task, host))

    def done(self, task: Task, host: str, result: Mapping[str, Any], how: str) -> None:
        """how: ok, failed, skipped or unreachable."""
        if _harmless(task):
            return
        data: dict[str, Any] = {**self._of(task, host), "changed": bool(result.get("changed"))}
        if how != "ok":
            data[how] = True
        shown = differences(result, self.secrets)
        if shown:
            data["diff"] = shown
        self.journal.append("effect_done", self.step, data)

    def _of(self, task: Task, host: str) -> dict[str, Any]:
        # Never the arguments: that is where the secrets are.
        return {"task": redact(task.get_name(), self.secrets), "host": host, "action": _action(task)}


def _action(task: Task) -> str:
    return task.resolved_action or task.action


def _harmless(task: Task) -> bool:
    return bool(task.check_mode) or looks_only(_action(task), task.changed_when)


def differences(result: Mapping[str, Any], secrets: Collection[str]) -> list[dict[str, Any]]:
    """What changed, and by how many lines: never the lines themselves."""
    if result.get("censored"):
        return [{"what": HIDDEN}] if result.get("changed") else []
    found: list[dict[str, Any]] = []
    for one in [result, *(r for r in result.get("results") or [] if isinstance(r, Mapping))]:
        if one is not result and one.get("censored"):
            found.append({"what": HIDDEN})
            continue
        diffs = one.get("diff") or []
        for diff in diffs if isinstance(diffs, list) else [diffs]:
            if isinstance(diff, Mapping) and diff:
                before, after = (_lines(diff.get(side)) for side in ("before", "after"))
                what = str(diff.get("after_header") or diff.get("before_header") or "")
                if before != after or diff.get("prepared"):
                    added, removed = len(after - before), len(before - after)
                    found.append({"what": redact(what, secrets), "added": added, "removed": removed})
    return found


def _lines(text: Any) -> frozenset[str]:
    if isinstance(text, Mapping):
        return frozenset(f"{key}={value}" for key, value in text.items())
    return frozenset(str(text or "").splitlines())


def attach(variables: Mapping[str, Any], inventories: Sequence[str], loader: Any) -> Effects:
    """To the run whose engine started this ansible-playbook, with its extra variables. Raises Problem, LockLost.

    inventories, loader: Ansible's own, to know what its vaults hold.
    """
    environment = os.environ
    journal = Journal(environment["RUNBOOK_JOURNAL"], environment["RUNBOOK_ENVIRONMENT"])
    journal.attach(environment["RUNBOOK_RUN"], int(environment["RUNBOOK_FENCE"]), environment.get("RUNBOOK_DOOR", ""))
    names = environment.get("RUNBOOK_SECRETS", "").split(",")
    hidden = {str(variables[name]) for name in names if name in variables}
    for inventory in inventories:
        hidden |= vault.values(Path(inventory), loader)
    return Effects(journal, frozenset(hidden), environment.get("RUNBOOK_STEP"))


class Workers:
    """The workers that this ansible-playbook has started, to see one that has ended without its last word.

    Ansible's free strategy waits for that worker's result until the step's time limit, and so does the linear one when
    it has given the worker's place to another host before it looked.
    """

    def __init__(self, kind: type[Any]) -> None:
        """kind: Ansible's class of a worker's process, whose ``start`` and ``terminate`` are followed from now on."""
        # Not the workers themselves: Ansible closes them, and with that forgets how they ended.
        self._started: set[Any] = set()
        begin, end = kind.start, kind.terminate

        def start(worker: Any) -> None:
            begin(worker)
            self._started.add(worker._popen)

        def terminate(worker: Any) -> None:
            # At the end of each play, those whose results are there and who have not quite ended.
            self._started.discard(worker._popen)
            end(worker)

        kind.start, kind.terminate = start, terminate

    def watch(self, tell: Callable[[str], None], closed: threading.Event) -> None:
        """End this ansible-playbook when a worker of it has died, until ``closed``."""
        while not closed.wait(WATCH_S):
            how = self.died()
            if how and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
                # Ansible is being interrupted, has passed that on to its workers, and would not survive another one.
                return
            if how:
                tell(f"A worker of ansible-playbook {how}")
                os.kill(os.getpid(), signal.SIGINT)
                return

    def died(self) -> str:
        """How one of them died, once; empty while all live or have done their work."""
        for process in list(self._started):
            code = _exit_code(process)
            if code is not None and process in self._started:
                self._started.discard(process)
                if code:
                    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        return ""


def _exit_code(process: Any) -> int | None:
    """As Ansible has taken it from the kernel, or else without taking it from Ansible. None: it lives."""
    if process.returncode is None:
        try:
            end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            # Ansible is just taking it.
            return None
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    return int(process.returncode)


def lost(run: str) -> Problem:
    """What a door says that may not go on because another process has the run now."""
    return Refused(
        f"Run {run} has been taken over by another process",
        code="run-taken-over",
        touched="What its steps did until now stays done",
        next_command=f"runbook status {run}",
    )
