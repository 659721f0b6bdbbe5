# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue over the Python package's runbooks.effects and runbooks.door: Ansible's calls in, its end out."""

from __future__ import annotations

DOCUMENTATION = r"""
name: runbook_journal
type: notification
short_description: Keep a runbook's journal, and be its door under plain ansible-playbook and AWX
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Writes into the environment's journal what each task of a runbook intends, before its worker starts, and what came
    of it. Never a module's arguments; results under C(no_log) are left out.
  - When C(ansible-playbook) or AWX runs a runbook's generated playbook, or one of its steps, without the command
    C(runbook), it makes that a run - with the same lock, windows, approvals, parameters and records as the command's.
    It refuses before the first task, with the command's sentence and exit code (2 bad input, 3 refused).
  - Does nothing for every other playbook. In check mode it fills a runbook's parameters in and writes nothing.
requirements:
  - enabled in C(callbacks_enabled)
  - the Python package C(censuschat-infra), or its sources in the directory that holds C(collections/)
notes:
  - C(ansible-playbook --start-at-task) and C(--step) are refused for runbooks. C(runbook resume) goes on where a run
    ended.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ansible import context
from ansible.plugins.callback import CallbackBase

# A checkout holds the package beside collections/, six levels above collections' .../infra/plugins/callback.
CHECKOUT = Path(__file__).absolute().parents[6]
PR_SET_PDEATHSIG = 1


def package() -> Path | None:
    """The directory of the package runbooks: a checkout's, or the installed one's; None when there is none."""
    if (CHECKOUT / "runbooks" / "door.py").is_file():
        if str(CHECKOUT) not in sys.path:
            sys.path.append(str(CHECKOUT))
        return CHECKOUT / "runbooks"
    found = importlib.util.find_spec("runbooks")
    return Path(found.origin).parent if found and found.origin else None


def is_runbook(playbook: Path, plays: Sequence[Any]) -> bool:
    """Whether it may be one, told without importing anything: most playbooks are none and shall not wait for that.

    Generated playbooks say it themselves; steps are near their definitions.
    """
    if any("runbook_name" in play.vars for play in plays):
        return True
    places = [Path(p).absolute().parent for p in os.environ.get("RUNBOOK_DEFINITIONS", "").split(":") if p]
    home = package()
    return any(place in playbook.parents for place in (*places, *([home] if home else [])))


def end_with_parent() -> None:
    """Workers outlive an ansible-playbook that is killed, and would act beside a resumed run: the kernel ends them."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    os.register_at_fork(after_in_child=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "censuschat.infra.runbook_journal"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._effects: Any = None
        self._door: Any = None
        self._ended = threading.Event()

    def v2_playbook_on_start(self, playbook: Any) -> None:
        plays = playbook.get_plays()
        path = Path(playbook._file_name).absolute()
        check = bool(context.CLIARGS.get("check"))
        if "RUNBOOK_FENCE" in os.environ and not check:
            self._do(lambda: self._attach(playbook, plays))
        elif plays and "RUNBOOK_PROCESS_OF" not in os.environ and is_runbook(path, plays):
            self._do(lambda: self._enter(path, plays, check))
        # A callback that is disabled is not called again: other playbooks are not slowed down.
        self.disabled = not (self._effects or self._door)
        if not self.disabled:
            end_with_parent()
            self._watch()

    def _watch(self) -> None:
        from ansible.executor.process.worker import WorkerProcess

        from runbooks import effects

        watch = effects.Workers(WorkerProcess).watch
        threading.Thread(target=watch, args=(self._display.error, self._ended), daemon=True).start()

    def _attach(self, playbook: Any, plays: Sequence[Any]) -> None:
        from runbooks import effects

        variables = plays[0].get_variable_manager().extra_vars if plays else {}
        self._effects = effects.attach(variables, context.CLIARGS.get("inventory") or [], playbook.get_loader())

    def _enter(self, path: Path, plays: Sequence[Any], check: bool) -> None:
        from runbooks import door

        arguments = context.CLIARGS
        call = door.Call(
            path,
            list(arguments.get("inventory") or []),
            plays,
            plays[0].get_variable_manager().extra_vars,
            list(arguments.get("tags") or []),
            list(arguments.get("skip_tags") or []),
            check,
            "--start-at-task" if arguments.get("start_at_task") else "--step" if arguments.get("step") else "",
        )
        entry = door.entry(call)
        if entry is not None:
            self._door = door.Door(call, entry, self._display.display)
            self._door.open()

    def v2_playbook_on_play_start(self, play: Any) -> None:
        if self._door:
            self._do(lambda: self._door.play(play))

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        watcher = self._effects.intended if self._effects else self._door.started
        self._do(lambda: watcher(task, host.get_name()))

    def v2_runner_on_ok(self, result: Any) -> None:
        self._done(result, "ok")

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._done(result, "skipped")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._failed(result, "failed", bool(ignore_errors))

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._failed(result, "unreachable", bool(result.task.ignore_unreachable))

    def _done(self, result: Any, how: str) -> None:
        watcher = self._effects or self._door
        self._do(lambda: watcher.done(result.task, result.host.get_name(), result.result, how))

    def _failed(self, result: Any, how: str, ignored: bool) -> None:
        if self._effects:
            self._done(result, how)
        else:
            unreachable = how == "unreachable"
            task, host = result.task, result.host.get_name()
            self._do(lambda: self._door.failed(task, host, result.result, unreachable=unreachable, ignored=ignored))

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._ended.set()
        if self._door:
            self._do(lambda: self._door.close(failed=bool(stats.failures or stats.dark)))

    def _do(self, work: Callable[[], object]) -> None:
        """Do it, or end the playbook. Ansible only warns of an Exception in a callback; SystemExit gets through."""
        if package() is None:
            self._stop(
                "The callback censuschat.infra.runbook_journal needs the Python package censuschat-infra, which is "
                f"neither beside the collection nor installed for {sys.executable}. Nothing was touched. "
                f"next: {sys.executable} -m pip install censuschat-infra",
                2,
            )
        from runbooks import effects, errors

        try:
            work()
        except effects.LockLost:
            problem = effects.lost(os.environ.get("RUNBOOK_RUN", ""))
            self._stop(str(problem), problem.exit_code)
        except errors.Problem as problem:
            self._stop(str(problem), problem.exit_code)

    def _stop(self, sentence: str, code: int) -> NoReturn:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise SystemExit(code)
