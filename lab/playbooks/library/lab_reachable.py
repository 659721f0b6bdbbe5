#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Waits until the lab's nodes let their operator in."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_reachable
short_description: Wait until the lab's nodes let their operator in
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Logs in to every node over ssh with the lab's key and the pinned host keys. Never changes anything.
  - Nodes of a region that is cut off are not waited for.
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
    description: The inventory directory that describes the lab.
    type: path
    required: true
  nodes:
    description: Only these nodes. Empty means all of them.
    type: list
    elements: str
    default: []
  patience:
    description: How many seconds to wait for the slowest node.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Wait for the nodes
  lab_reachable:
    inventory: "{{ inventory_dir }}"
"""

RETURN = r"""
seconds:
  description: How long each node took to answer.
  type: dict
  returned: always
unseen:
  description: Nodes of regions that are cut off; whether they answer cannot be seen from the machine.
  type: list
  elements: str
  returned: always
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import fabric, nodes
from lab.module import INVENTORY, answer, described


def wait(module: AnsibleModule) -> dict[str, Any]:
    lab = described(module)
    chosen = tuple(lab.node(name) for name in module.params["nodes"]) or lab.nodes
    cut = fabric.observe(links=False).cut
    seen = tuple(node for node in chosen if str(lab.site(node.site).network) not in cut)
    seconds = {} if module.check_mode else nodes.wait(seen, module.params["patience"])
    return {"seconds": seconds, "unseen": [node.name for node in chosen if node not in seen]}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **INVENTORY,
            "nodes": {"type": "list", "elements": "str", "default": []},
            "patience": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    answer(module, wait)


if __name__ == "__main__":
    main()
