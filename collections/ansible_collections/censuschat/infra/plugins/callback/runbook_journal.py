# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue over the Python package's runbooks.door: Ansible's calls in, an end of the playbook out."""

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
  - Does nothing for every other playbook, and nothing in check mode.
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
import sys

from ansible import context
from ansible.plugins.callback import CallbackBase

# A checkout holds the package beside collections/, six levels above collections' .../infra/plugins/callback.
CHECKOUT = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 6))


def package():
    """The directory of the package runbooks: a checkout's, or the installed one's; empty when there is none."""
    if os.path.isfile(os.path.join(CHECKOUT, "runbooks", "door.py")):
        if CHECKOUT not in sys.path:
            sys.path.append(CHECKOUT)
        return os.path.join(CHECKOUT, "runbooks")
    found = importlib.util.find_spec("runbooks")
    return os.path.dirname(found.origin) if found and found.origin else ""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "censuschat.infra.runbook_journal"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self):
        super().__init__()
        self._effects = None

    def v2_playbook_on_start(self, playbook):
        if context.CLIARGS.get("check") or "RUNBOOK_FENCE" not in os.environ:
            # A callback that is disabled is not called again: other playbooks are not slowed down.
            self.disabled = True
            return
        plays = playbook.get_plays()
        variables = plays[0].get_variable_manager().extra_vars if plays else {}
        self._effects = self._do(lambda door: door.attach(variables))

    def v2_runner_on_start(self, host, task):
        self._do(lambda door: self._effects.intended(task, host.get_name()))

    def v2_runner_on_ok(self, result):
        self._done(result, "ok")

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._done(result, "failed")

    def v2_runner_on_skipped(self, result):
        self._done(result, "skipped")

    def v2_runner_on_unreachable(self, result):
        self._done(result, "unreachable")

    def _done(self, result, how):
        self._do(lambda door: self._effects.done(result.task, result.host.get_name(), result.result, how))

    def _do(self, work):
        """Do it, or end the playbook. Ansible only warns of an Exception in a callback; SystemExit gets through."""
        if not package():
            self._stop(
                "The callback censuschat.infra.runbook_journal needs the Python package censuschat-infra, which is "
                f"neither beside the collection nor installed for {sys.executable}. Nothing was touched. "
                f"next: {sys.executable} -m pip install censuschat-infra",
                2,
            )
        from runbooks import door

        try:
            return work(door)
        except door.LockLost:
            problem = door.lost(os.environ.get("RUNBOOK_RUN", ""))
        except door.Problem as error:
            problem = error
        self._stop(str(problem), problem.exit_code)
        return None

    def _stop(self, sentence, code):
        self._display.error(sentence, wrap_text=False)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise SystemExit(code)
