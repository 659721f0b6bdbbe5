# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""One line for each step of the lab's playbooks: what, how long, and on failure the cause alone."""

from __future__ import annotations

DOCUMENTATION = r"""
name: lab_progress
type: stdout
short_description: One line for each step of the lab's playbooks
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Prints each step as it starts and how long it took; a long one says every ten seconds that it is still at work.
  - A failure is printed as its message, without the module's whole result.
"""

import sys
import threading
import time
from typing import Any

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible has no types
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "lab_progress"

    def __init__(self) -> None:
        super().__init__()
        self._title = ""
        self._began = 0.0
        self._done: list[str] = []
        self._skipped = self._failed = False
        self._ended = threading.Event()

    def _finish(self) -> None:
        """Closes the line of the step before."""
        self._ended.set()
        if self._skipped and not self._done and not self._failed:
            self._say("    nothing to do")
        if self._title and self._done:
            hosts = f" on {len(self._done)} nodes" if len(self._done) > 1 else ""
            self._say(f"    done{hosts} in {time.monotonic() - self._began:.1f} s")
        self._title, self._done, self._skipped, self._failed = "", [], False, False

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(10):
            self._say(f"    still at it, {time.monotonic() - self._began:.0f} s")

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        self._finish()
        self._title, self._began = task.get_name().strip(), time.monotonic()
        self._ended = threading.Event()
        self._say(f"==> {self._title}")
        threading.Thread(target=self._tick, args=(self._ended,), daemon=True).start()

    def v2_runner_on_ok(self, result: Any) -> None:
        self._done.append(result.host.get_name())
        for action in result.result.get("actions", []) if result.host.get_name() == "localhost" else []:
            # What is done to the machine itself is always said.
            if action.startswith(("install ", "load ", "set ", "put ")):
                self._say(f"    {action}")

    def v2_runner_item_on_ok(self, result: Any) -> None:
        item = result.result.get("item")
        self._say(f"    {item}: {time.monotonic() - self._began:.0f} s")

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._skipped = True

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._ended.set()
        self._failed = True
        message = result.result.get("msg") or result.result.get("stderr") or "failed"
        print(f"error: {self._title}, {result.host.get_name()}: {message}", file=sys.stderr, flush=True)

    def v2_runner_item_on_failed(self, result: Any) -> None:
        message = str(result.result.get("msg") or "failed")
        print(f"error: {self._title}, {result.result.get('item')}: {message[-2000:]}", file=sys.stderr, flush=True)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self.v2_runner_on_failed(result)

    def v2_playbook_on_no_hosts_matched(self) -> None:
        print("error: the inventory has no hosts for this play", file=sys.stderr, flush=True)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._finish()
