# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a module that never got to run on a node said, as one sentence with the remedy. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BECOME = "or set ansible_become_method to what this node has (su, doas, run0)"
# What was said (as a regular expression) and what it means; the first that matches counts.
_KNOWN: tuple[tuple[str, str], ...] = (
    (
        r"sudo: (command )?not found|sudo: No such file|exec: sudo|\bsudo.*No such file or directory",
        f"has no sudo: install it (`su -c 'apt-get install -y sudo'`), {_BECOME}",
    ),
    (
        r"[Mm]issing sudo password|a (terminal|password) is required|no tty present",
        "asks for a sudo password: give ansible_become_password (from a vault), or let this user use sudo without one",
    ),
    (r"is not in the sudoers file|not allowed to execute", "does not let this user use sudo: add it to group sudo"),
    (
        r"interpreter .*not found|python3?: (command )?not found|python3?: No such file|exec: python",
        "has no python3: install it first (`ansible -m ansible.builtin.raw -a 'apt-get install -y python3'`)",
    ),
    (
        r"No space left on device",
        "has a full disk, not even Ansible's own files fit: free some space (`df -h / /tmp /var`), nothing was changed",
    ),
    (
        r"Read-only file system",
        "has a read-only filesystem where Ansible puts its own files: mount it writable or set ansible_remote_tmp",
    ),
    (
        r"SyntaxError|No module named '?(dataclasses|typing)",
        "has too old a python3: Debian 12's 3.11 or newer is needed",
    ),
)


def sentence(node: str, result: Mapping[str, Any]) -> str:
    """One sentence on why the module failed on `node`; its own message when it came that far."""
    said = str(result.get("msg") or "")
    everything = " ".join(str(result.get(key) or "") for key in ("msg", "module_stderr", "module_stdout", "exception"))
    ran = not re.search(r"MODULE FAILURE|interpreter|module_stdout", everything) and "module_stderr" not in result
    if not ran or re.search(r"sudo", said):
        for pattern, meaning in _KNOWN:
            if re.search(pattern, everything):
                return f"{node} {meaning}."
    return said if said.startswith(f"{node}:") else f"{node}: {said}"
