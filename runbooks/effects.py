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


def killed_worker() -> int:
    """The signal that has killed a worker of this ansible-playbook which Ansible has not looked at since; 0: none.

    Ansible's free strategy never looks, and would wait for that worker's result until the step's time limit. Read from
    /proc, because whoever asks the kernel for a child's end takes the answer from Ansible.
    """
    for thread in Path("/proc/self/task").iterdir():
        for child in _words(thread / "children"):
            # The name in brackets may hold anything; after the last one come the state and, at the end, the exit code.
            fields = _words(Path("/proc") / child / "stat", after=")")
            if fields and fields[0] == "Z" and int(fields[-1]) & 0x7F:
                return int(fields[-1]) & 0x7F
    return 0


def _words(file: Path, after: str = "") -> list[str]:
    """The words of a file below /proc (behind the last ``after``); none when what it tells of has ended meanwhile."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return (text.rpartition(after)[2] if after else text).split()


def watch(tell: Callable[[str], None], closed: threading.Event) -> None:
    """End this ansible-playbook when a worker of it is killed, until ``closed``."""
    while not closed.wait(WATCH_S):
        number = killed_worker()
        if number:
            tell(f"A worker of ansible-playbook was killed ({signal.Signals(number).name})")
            os.kill(os.getpid(), signal.SIGINT)
            return


def lost(run: str) -> Problem:
    """What a door says that may not go on because another process has the run now."""
    return Refused(
        f"Run {run} has been taken over by another process",
        code="run-taken-over",
        touched="What its steps did until now stays done",
        next_command=f"runbook status {run}",
    )
