# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of audit rules: read and load them."""

from __future__ import annotations

import shutil

from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_audit import RULES_FILE, AuditSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError, observe_path

_MARK = "-- rules --"


def observe(commands: Commands) -> AuditSeen:
    """The file, and what the kernel has loaded: one process asks for state and rules."""
    file = observe_path(RULES_FILE, read=True).content or ""
    if shutil.which("auditctl", path="/usr/sbin:/sbin") is None:
        return AuditSeen(file, None, "auditctl is not installed: install the package auditd")
    done = commands.run(["sh", "-c", f"/usr/sbin/auditctl -s && echo '{_MARK}' && /usr/sbin/auditctl -l"])
    state, mark, rules = done.out.partition(_MARK)
    if done.code != 0 or not mark:
        return AuditSeen(file, None, done.tail(2) or "auditctl says nothing")
    return AuditSeen(file, tuple(rules.strip().splitlines()), locked="enabled 2" in state.splitlines())


def load(commands: Commands) -> None:
    """Have the kernel take the rules of all files, ours last."""
    done = commands.run(["/usr/sbin/augenrules", "--load"])
    said = done.tail(4)
    if done.code != 0 or "error" in done.err.lower():
        raise NodeError(
            f"the audit rules were not all loaded: {said}; the file {RULES_FILE} has them for the next boot"
        )
