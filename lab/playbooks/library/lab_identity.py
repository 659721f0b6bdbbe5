#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keys, known hosts and names of the lab's nodes."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_identity
short_description: Make the keys and identities of the lab's nodes
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Makes the operator's ssh key, a host key for every node, and known_hosts that pins them. What exists is kept.
  - Returns how each node's container is to be made, for those that have none, and which are there but stopped. A node
    that is there is never made anew, so that nothing of it is lost to a changed recipe.
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
  images:
    description: The image of each role.
    type: dict
    required: true
  hybrid_cgroups:
    description: Whether the machine has cgroup v1, alone or beside v2.
    type: bool
    required: true
  files:
    description: The limit of open files for a node.
    type: int
    required: true
"""

EXAMPLES = r"""
- name: Make the identities
  lab_identity:
    inventory: "{{ inventory_dir }}"
    images: {db: "localhost/x/db:1", app: "localhost/x/app:1", witness: "localhost/x/witness:1"}
    hybrid_cgroups: false
    files: 20000
"""

RETURN = r"""
actions:
  description: The files that were made or changed.
  type: list
  elements: str
  returned: always
containers:
  description: Arguments of containers.podman.podman_container by node, for nodes without a container.
  type: dict
  returned: always
stopped:
  description: The containers that are there and do not run.
  type: list
  elements: str
  returned: always
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import nodes, report
from lab.module import INVENTORY, answer, described
from lab.paths import PREFIX, STATE


def provide(module: AnsibleModule) -> dict[str, Any]:
    given = module.params
    lab = described(module)
    known = {path.name for path in (STATE / "nodes").glob("*") if (path / "ssh_host_ed25519_key").is_file()}
    if module.check_mode:
        actions = [f"make the host key of {node.name}" for node in lab.nodes if node.name not in known]
    else:
        actions = nodes.provide(lab)
    there = report.containers()
    containers = {
        node.name: nodes.container(node, given["images"][node.image], given["hybrid_cgroups"], given["files"])
        for node in lab.nodes
        if PREFIX + node.name not in there
    }
    own = {PREFIX + node.name for node in lab.nodes}
    stopped = sorted(name for name, state in there.items() if name in own and state != "running")
    return {"actions": actions, "containers": containers, "stopped": stopped}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **INVENTORY,
            "images": {"type": "dict", "required": True},
            "hybrid_cgroups": {"type": "bool", "required": True},
            "files": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    answer(module, provide)


if __name__ == "__main__":
    main()
