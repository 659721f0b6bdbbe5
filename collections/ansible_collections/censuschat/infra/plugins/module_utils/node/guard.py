# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""A change that could cut the controller off is undone by the node itself unless a new connection proves it.

For what is loaded at once (the firewall's tables, PAM's stacks); sshd's, which outlives a reboot, is in sshd_host.
One rename decides between the confirmation and the revert, which the controller, a timer or the next run starts.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    observe_path,
    reason,
    write_atomically,
)

STATE = "/var/lib/censuschat-hardening/guard"
TIMER = "censuschat-hardening-revert"
# Long enough for the rest of the run and a new connection from a busy controller.
REVERT_AFTER_S = 90


def script(state: str, files: Sequence[str], tables: Mapping[str, str], extra: Sequence[str] = ()) -> str:
    """The shell script that puts back `files` (copies stand under their index) and nftables `tables` (name to text)."""
    lines = [
        "#!/bin/sh",
        "# Undoes a hardening change that nobody proved by a new connection.",
        "set -u",
        f"mv {state}/pending {state}/reverting 2>/dev/null || [ -d {state}/reverting ] || exit 0",
    ]
    for index, path in enumerate(files):
        new = shlex.quote(f"{path}.revert")
        saved = f"{state}/reverting/{index}"
        lines.append(f"[ ! -e {saved} ] || {{ cp -p {saved} {new} && mv {new} {shlex.quote(path)}; }}")
    for index, name in enumerate(tables):
        lines.append(f"nft delete table inet {name} 2>/dev/null")
        lines.append(f"[ ! -s {state}/reverting/table-{index} ] || nft -f {state}/reverting/table-{index}")
    return "\n".join([*lines, *extra, f"rm -rf {state}/reverting", ""])


class Guard:
    """The one change of this kind that may be pending on a node."""

    def __init__(self, commands: Commands, state: str = STATE) -> None:
        self.commands = commands
        self.state = state
        self.pending = f"{state}/pending"

    def settle(self, *, check: bool) -> None:
        """Deal with an unproven change of an earlier run: refuse while its timer is armed, undo it when it is not."""
        if not os.path.isdir(self.pending):
            return
        if self.commands.run(["systemctl", "-q", "is-active", f"{TIMER}.timer"]).code == 0:
            raise NodeError(
                "an earlier change of firewall or PAM still waits for its proof and its timer will undo it: "
                "run again in two minutes"
            )
        if check:
            raise NodeError("a change of firewall or PAM was left unproven; a run without check mode undoes it first")
        self.commands.must(["/bin/sh", f"{self.state}/revert"], "undoing a change that an earlier run left unproven")

    def arm(self, files: Sequence[str], tables: Mapping[str, str], plan: Mapping[str, Any]) -> str:
        """Copy `files` and the texts of `tables`, arm the timer, and return the token; `plan` is kept for the end."""
        token = secrets.token_hex(8)
        building = f"{self.state}/building-{token}"
        try:
            os.makedirs(building, mode=0o700)
            for index, path in enumerate(files):
                if os.path.exists(path):
                    shutil.copy2(path, f"{building}/{index}")
            for index, text in enumerate(tables.values()):
                write_atomically(f"{building}/table-{index}", text, "root", "root", 0o600)
            write_atomically(f"{building}/plan", json.dumps({"token": token, **plan}), "root", "root", 0o600)
            write_atomically(f"{self.state}/revert", script(self.state, files, tables), "root", "root", 0o700)
            os.replace(building, self.pending)
        except (NodeError, OSError) as error:
            shutil.rmtree(building, ignore_errors=True)
            why = reason(error, self.state) if isinstance(error, OSError) else str(error)
            raise NodeError(f"the revert cannot be prepared, so nothing was changed: {why}") from error
        done = self.commands.run(
            [
                "systemd-run",
                "--quiet",
                "--collect",
                f"--unit={TIMER}",
                f"--on-active={REVERT_AFTER_S}s",
                "--timer-property=AccuracySec=100ms",
                "/bin/sh",
                f"{self.state}/revert",
            ]
        )
        if done.code != 0:
            shutil.rmtree(self.pending, ignore_errors=True)
            raise NodeError(f"the revert timer cannot be armed, so nothing was changed: {done.tail(3)}")
        return token

    def confirm(self, token: str) -> dict[str, Any]:
        """Disarm; returns the plan that was kept. NodeError when the change was undone meanwhile."""
        plan = self._plan(token)
        self.commands.run(["systemctl", "stop", f"{TIMER}.timer"])
        try:
            # The same rename as the revert's: one of the two wins.
            os.replace(self.pending, f"{self.state}/confirmed-{token}")
        except FileNotFoundError:
            raise NodeError("the change was undone by its timer before its proof arrived: run again") from None
        shutil.rmtree(f"{self.state}/confirmed-{token}", ignore_errors=True)
        return plan

    def revert(self, token: str) -> None:
        """Undo the change now; a no-op when the timer already did."""
        if os.path.isdir(self.pending):
            self._plan(token)
            self.commands.run(["systemctl", "stop", f"{TIMER}.timer"])
            self.commands.must(["/bin/sh", f"{self.state}/revert"], "undoing the change")

    def _plan(self, token: str) -> dict[str, Any]:
        text = observe_path(f"{self.pending}/plan", read=True).content
        if text is None:
            raise NodeError("the change was undone by its timer before its proof arrived: run again")
        plan: dict[str, Any] = json.loads(text)
        if plan.pop("token") != token:
            raise NodeError("another run has a change of firewall or PAM pending on this node: wait for it to end")
        return plan
