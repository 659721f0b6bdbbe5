# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of AppArmor: read the kernel's profiles and their files, write a file and have the kernel take it."""

from __future__ import annotations

import os

from ansible_collections.censuschat.infra.plugins.module_utils.node import plan_apparmor
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_apparmor import DIRECTORY, ApparmorSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    observe_path,
    write_atomically,
)

_SWITCH = "/sys/module/apparmor/parameters/enabled"
_PROFILES = "/sys/kernel/security/apparmor/profiles"


def observe() -> ApparmorSeen:
    """The kernel's switch and profiles, and the texts of the files that define them."""
    files = {}
    if os.path.isdir(DIRECTORY):
        for entry in os.scandir(DIRECTORY):
            if entry.is_file(follow_symlinks=False):
                text = observe_path(entry.path, read=True).content or ""
                if plan_apparmor.enforcing(text) != text:
                    files[entry.path] = text
    return ApparmorSeen(
        enabled=_read(_SWITCH).strip() == "Y",
        profiles=plan_apparmor.parse_profiles(_read(_PROFILES)),
        files=files,
        command_line=_read("/proc/cmdline"),
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as handle:
            return handle.read()
    except OSError:
        return ""


def apply(action: Action, commands: Commands) -> None:
    """Write one profile's file and load it."""
    now = observe_path(action.target)
    write_atomically(action.target, action.payload, now.owner, now.group, now.mode)
    commands.must(["apparmor_parser", "-r", action.target], f"loading the profiles of {action.target}")
