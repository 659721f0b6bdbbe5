#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the lab is like now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_status
short_description: Look at the lab
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Looks at every node, every service and every cut. Never changes anything.
attributes:
  check_mode:
    support: full
    description: It only looks.
  diff_mode:
    support: none
    description: It only looks.
  platform:
    support: full
    platforms: debian
    description: The machine that runs the lab.
options:
  inventory:
    description: The inventory directory that describes the lab.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Look at the lab
  lab_status:
    inventory: "{{ inventory_dir }}"
"""

RETURN = r"""
lab:
  description: The same as C(lab status --json).
  type: dict
  returned: always
missing:
  description: Nodes and services that are not as they should be.
  type: list
  elements: str
  returned: always
"""

import json
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from lab import report, topology


def main() -> None:
    module = AnsibleModule(argument_spec={"inventory": {"type": "path", "required": True}}, supports_check_mode=True)
    try:
        inventory = Path(module.params["inventory"])
        state = report.observe(inventory, topology.load(inventory))
    except topology.TopologyError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, lab=json.loads(report.as_json(state)), missing=report.missing(state))


if __name__ == "__main__":
    main()
