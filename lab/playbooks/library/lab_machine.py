#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the lab needs of the machine, and its putting back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_machine
short_description: Prepare the machine for the lab, or put it back
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Installs the Debian packages that are missing, without starting their services, loads the kernel modules and changes
    the kernel settings that Kubernetes nodes need and cannot set themselves, for the lab's life, and writes podman's
    engine settings for this machine.
  - With O(state=absent) the settings are put back and the lab's state directory removed; packages and modules stay.
attributes:
  check_mode:
    support: full
    description: Reports what would be done and does nothing.
  diff_mode:
    support: none
    description: The planned actions are returned instead.
  platform:
    support: full
    platforms: debian
    description: The machine that runs the lab.
options:
  inventory:
    description: The inventory directory that describes the lab. Needed for O(state=present).
    type: path
  state:
    description: Whether the lab is to live here.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Prepare the machine
  lab_machine:
    inventory: "{{ inventory_dir }}"
"""

RETURN = r"""
actions:
  description: What was done, or would be.
  type: list
  elements: str
  returned: always
hybrid_cgroups:
  description: Whether the machine has cgroup v1, alone or beside v2.
  type: bool
  returned: when O(state=present)
files:
  description: The limit of open files for a node.
  type: int
  returned: when O(state=present)
"""

import shutil
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import machine, nodes
from lab.module import INVENTORY_AND_STATE, PRESENT_NEEDS_INVENTORY, answer, described
from lab.paths import STATE


def put_back(module: AnsibleModule) -> dict[str, Any]:
    actions = []
    found = machine.remembered()
    limits = {
        setting: machine.plan_restore(setting, machine.current(setting), found.get(setting.name))
        for setting in machine.SETTINGS
    }
    for setting, limit in limits.items():
        if limit.set_to is not None:
            actions.append(f"put {setting.name} back to {limit.set_to}")
    if STATE.exists():
        actions.append(f"remove {STATE}")
    if not module.check_mode:
        machine.apply_limits(limits)
        if STATE.exists():
            shutil.rmtree(STATE)
    return {"actions": actions}


def prepare(module: AnsibleModule) -> dict[str, Any]:
    actions = []
    lab = described(module)
    facts = machine.observe(lab)
    if facts.missing:
        actions.append(f"install {', '.join(facts.missing)}")
    modules = machine.missing_modules()
    actions += [f"load the kernel module {module}" for module in modules]
    found = machine.remembered()
    limits = {
        setting: machine.plan_raise(setting, machine.current(setting), found.get(setting.name))
        for setting in machine.SETTINGS
    }
    for setting, limit in limits.items():
        if limit.set_to is not None:
            actions.append(f"set {setting.name} from {machine.current(setting)} to {limit.set_to} for the lab's life")
    if not module.check_mode:
        STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
        STATE.chmod(0o700)
        for directory in ("log", "pids", "nodes", "ssh", "secrets", "pki", "ledgers", "runs"):
            (STATE / directory).mkdir(mode=0o700, exist_ok=True)
        if facts.missing:
            machine.install(facts.missing, STATE / "log" / "install.log")
            facts = machine.observe(lab)
        machine.load(modules)
        machine.apply_limits(limits)
        if nodes.write(machine.PODMAN_SETTINGS, machine.podman_settings(facts)):
            actions.append("write podman's settings for this machine")
    return {"actions": actions, "hybrid_cgroups": facts.hybrid_cgroups, "files": machine.files_limit()}


def main() -> None:
    module = AnsibleModule(
        argument_spec=INVENTORY_AND_STATE, required_if=PRESENT_NEEDS_INVENTORY, supports_check_mode=True
    )
    answer(module, put_back if module.params["state"] == "absent" else prepare)


if __name__ == "__main__":
    main()
