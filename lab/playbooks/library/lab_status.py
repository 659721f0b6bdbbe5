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
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import report
from lab.module import INVENTORY, answer, described


def look(module: AnsibleModule) -> dict[str, Any]:
    state = report.observe(Path(module.params["inventory"]), described(module))
    return {"lab": json.loads(report.as_json(state)), "missing": report.missing(state)}


def main() -> None:
    answer(AnsibleModule(argument_spec=INVENTORY, supports_check_mode=True), look)


if __name__ == "__main__":
    main()
