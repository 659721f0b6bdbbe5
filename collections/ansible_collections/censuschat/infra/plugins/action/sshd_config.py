# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Runs the sshd_config module and proves its change by a new connection from the controller."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.censuschat.infra.plugins.plugin_utils import sshd_guard

_OPTIONS = ("settings", "matches", "name", "in_main", "revert_after")


class ActionModule(ActionBase):
    """The phases of an sshd change as one task."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = {k: v for k, v in self._task.args.items() if k in _OPTIONS}
        unknown = [k for k in self._task.args if k not in arguments]
        if unknown:
            return {**result, "failed": True, "msg": f"sshd_config takes {', '.join(_OPTIONS)}, not {unknown[0]}"}
        return {**result, **sshd_guard.change(self, arguments, task_vars or {})}
