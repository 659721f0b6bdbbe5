#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The processes that serve the lab from the machine."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_services
short_description: Run the processes that serve the lab from the machine
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Starts the package cache, the AWS emulator and the name server, each known by its pid file, and waits until they
    accept. With O(state=absent) ends every background process of the lab, clients included.
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
    description: Whether they are to run.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Start the lab's services
  lab_services:
    inventory: "{{ inventory_dir }}"
"""

RETURN = r"""
actions:
  description: The processes that were started or ended, or would be.
  type: list
  elements: str
  returned: always
"""

import sys
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import aws, dns, images, packages, processes
from lab.module import INVENTORY_AND_STATE, PRESENT_NEEDS_INVENTORY, answer, described
from lab.paths import STATE


def bring(module: AnsibleModule) -> dict[str, Any]:
    alive = processes.observe()
    if module.params["state"] == "absent":
        if not module.check_mode:
            processes.stop_all()
        return {"actions": [f"end {name}" for name in alive]}
    wanted = [
        packages.service(described(module).operator, images.find_mirror()),
        processes.Service(
            "aws",
            (sys.executable, "-m", "lab.aws", "--trail", str(STATE / "log" / "aws.jsonl")),
            (aws.ADDRESS, aws.PORT),
        ),
        processes.Service("dns", (sys.executable, "-m", "lab.dns"), (dns.ADDRESS, dns.PORT)),
    ]
    missing = processes.plan(wanted, alive)
    if not module.check_mode:
        processes.start_all(missing)
    return {"actions": [f"start {service.name}" for service in missing]}


def main() -> None:
    module = AnsibleModule(
        argument_spec=INVENTORY_AND_STATE, required_if=PRESENT_NEEDS_INVENTORY, supports_check_mode=True
    )
    answer(module, bring)


if __name__ == "__main__":
    main()
