# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of an sshd change: apply, prove by a new connection, confirm or revert."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import connection_loader

MODULE = "censuschat.infra.sshd_config"
# sshd has re-executed itself when the proof starts; retries cover a dropped packet, not a slow reload.
PROOF_ATTEMPTS = 2
_OWN_CONNECTION = "-o ControlMaster=no -o ControlPath=none -o BatchMode=yes -o ConnectTimeout=5"


def by_ssh(action: ActionBase) -> bool:
    """Whether the present connection is OpenSSH's, of which a second one can be opened as proof."""
    return str(action._connection.transport) == "ssh"


def change(action: ActionBase, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
    """Run the whole change with `arguments` of the module; returns its result, failed when it was undone."""
    arguments = {**arguments, "provable": by_ssh(action)}
    result: dict[str, Any] = action._execute_module(MODULE, arguments, task_vars=task_vars)
    token = result.pop("token", "")
    if result.get("failed") or not token:
        return result
    return settled(action, result, token, task_vars)


def settled(action: ActionBase, result: dict[str, Any], token: str, task_vars: dict[str, Any]) -> dict[str, Any]:
    """Prove the change that waits under `token`, and keep or undo it; returns `result`, failed when it was undone."""
    problem = prove(action, token)
    if not problem:
        ended = _end(action, "confirm", token, task_vars)
        if not ended:
            result["proof"] = "a new connection ran a command" if by_ssh(action) else "sshd came back from its reload"
            return result
        return {**result, "failed": True, "msg": f"The sshd change was proven but not kept: {ended}"}
    ended = _end(action, "revert", token, task_vars)
    if ended:
        undone = f"It could not be undone from here ({ended}); the node's own timer does it within a minute or so"
    elif any(a["kind"] == "sshd_file" for a in result["actions"]):
        undone = "It was undone and sshd reloaded"
        result["changed"] = any(not a["kind"].startswith("sshd_") for a in result["actions"])
    else:
        undone = "The configuration on the node was not written by this run, so there is nothing to undo; mend it there"
    return {
        **result,
        "failed": True,
        "msg": f"After the sshd change no new connection was possible: {problem}. {undone}.",
    }


def prove(action: ActionBase, token: str, *, as_root: bool = False) -> str:
    """Open a connection that shares nothing with the present one and run a command; "" or what went wrong.

    `as_root` has it become root too where that needs no password, as a change of PAM can break either.
    """
    if not by_ssh(action):
        return ""
    present = action._connection
    become = present.become
    by_sudo = become is not None and become.name.endswith("sudo") and not become.get_option("become_pass")
    lead = "sudo -n true && " if as_root and by_sudo else ""
    problem = ""
    for attempt in range(PROOF_ATTEMPTS):
        if attempt:
            time.sleep(0.5)
        fresh = connection_loader.get(present.ansible_name, action._play_context)
        options = {name: present.get_option(name) for name in present.option_definitions}
        # ssh takes the first value of an option: ours go before the configured ones.
        options["ssh_args"] = f"{_OWN_CONNECTION} {options.get('ssh_args') or ''}"
        options["reconnection_retries"] = 0
        fresh.set_options(direct=options)
        try:
            code, out, err = fresh.exec_command(f"{lead}echo proof-{token}", sudoable=False)
        except AnsibleError as error:
            problem = " ".join(str(error).split())
            continue
        finally:
            fresh.close()
        if code == 0 and f"proof-{token}".encode() in out.split():
            return ""
        problem = f"the command on it ended with {code}: {' '.join(err.decode('utf-8', 'replace').split())}"
    return problem


def _end(action: ActionBase, phase: str, token: str, task_vars: dict[str, Any]) -> str:
    """Confirm or revert over the present connection; "" or why that failed."""
    arguments = {"settings": {}, "phase": phase, "token": token}
    try:
        ended = action._execute_module(MODULE, arguments, task_vars=task_vars)
    except AnsibleError as error:
        return " ".join(str(error).split())
    if ended.get("failed") or ended.get("unreachable"):
        return str(ended.get("msg", "the node did not answer"))
    return ""
