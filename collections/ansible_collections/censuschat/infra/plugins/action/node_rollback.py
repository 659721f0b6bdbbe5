# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Runs the node_rollback module and proves what it changes of sshd by a new connection from the controller."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.censuschat.infra.plugins.plugin_utils import node_troubles, sshd_guard

_ARGUMENTS = ("to", "force")


class ActionModule(ActionBase):
    """One task a node; two further calls only while sshd changes."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        unknown = [name for name in self._task.args if name not in _ARGUMENTS]
        if unknown:
            return {**result, "failed": True, "msg": f"node_rollback takes {', '.join(_ARGUMENTS)}, not {unknown[0]}"}
        sent = {**self._task.args, "provable": sshd_guard.by_ssh(self)}
        result.update(self._execute_module("censuschat.infra.node_rollback", sent, task_vars=task_vars))
        if result.get("failed") or result.get("unreachable"):
            result["msg"] = node_troubles.sentence(str(task_vars.get("inventory_hostname", "this node")), result)
            return result
        token = result.pop("token", "")
        return sshd_guard.settled(self, result, token, task_vars) if token else result
