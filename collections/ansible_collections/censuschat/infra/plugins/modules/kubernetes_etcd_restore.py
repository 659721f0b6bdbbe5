#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_etcd_restore
short_description: Restore all members of a control plane's etcd from one snapshot
version_added: 0.1.0
description:
  - Runs on all control planes of the cluster at once, step by step. V(check) proves the snapshot on each node and
    touches nothing. V(stop) holds all API servers and members back, so that nothing is acknowledged any more. V(start)
    gives each member the snapshot's data under one new cluster token, lets everything run and proves that the API
    reads it.
  - All control planes must have finished a step before the next one begins, as a play's tasks do with
    C(any_errors_fatal).
  - Revisions are raised by a thousand million and marked as compacted, so that clients which still watch list anew.
  - What was on the disk is kept as C(/var/lib/etcd/before-TOKEN). Whatever was written after the snapshot is lost.
  - A step that was interrupted is completed by a second run with the same snapshot and O(run_id).
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  diff_mode:
    support: none
options:
  step:
    description: The step to take.
    type: str
    choices: [check, stop, start]
    required: true
  name:
    description: This node's member, one of O(members).
    type: str
    required: true
  members:
    description: Peer URLs of all members by name. An odd number.
    type: dict
    required: true
  snapshot:
    description: The snapshot on this node.
    type: path
    required: true
  sha256:
    description: Its SHA-256; the same on every node.
    type: str
    required: true
  run_id:
    description: Lower-case letters and digits that name this restore, the same on every node and in a repeated run.
    type: str
    required: true
  api_port:
    description: Port of the API servers.
    type: int
    default: 6443
  wait_s:
    description: How long each part may take to stop or to serve, in seconds.
    type: int
    default: 180
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Restore etcd, all control planes step by step
  censuschat.infra.kubernetes_etcd_restore:
    step: "{{ item }}"
    name: "{{ inventory_hostname }}"
    members:
      use1-cp1: https://10.77.1.31:2380
      use1-cp2: https://10.77.1.32:2380
      use1-cp3: https://10.77.1.33:2380
    snapshot: /var/lib/censuschat-restore.db
    sha256: 0f343b0931126a20f133d67c2b018a3b5e5e9f4fbcf7d4b9d3e5a2c6a1b2c3d4
    run_id: 20261121t1530
  loop: [check, stop, start]
  become: true
"""

RETURN = r"""
actions:
  description: What the step did on this node, or would do in check mode.
  returned: always
  type: list
  elements: str
  sample: [restore use1-cp1 from censuschat-us-east-1_use1-cp1_20261121T150000Z.db, keep what was there]
found:
  description:
    - For V(check) the snapshot's revision and keys, for V(start) how many namespaces and secrets the API reads.
  returned: always
  type: dict
  sample: {"namespaces": 9, "secrets": 14}
"""

import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep import restore
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import UpkeepError
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.restore import Wanted


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "choices": ["check", "stop", "start"], "required": True},
            "name": {"type": "str", "required": True},
            "members": {"type": "dict", "required": True},
            "snapshot": {"type": "path", "required": True},
            "sha256": {"type": "str", "required": True},
            "run_id": {"type": "str", "required": True},
            "api_port": {"type": "int", "default": 6443},
            "wait_s": {"type": "int", "default": 180},
        },
        supports_check_mode=True,
    )
    p = module.params
    if not re.fullmatch(r"[a-z0-9]{4,32}", p["run_id"]):
        module.fail_json(msg="run_id: 4 to 32 lower-case letters and digits, the same on every node")
    wanted = Wanted(p["name"], p["members"], Path(p["snapshot"]), p["sha256"], p["run_id"])
    found: dict[str, Any] = {}
    try:
        observed = restore.observe()
        actions = restore.plan(p["step"], wanted, observed, foreseen=module.check_mode)
        if p["step"] == "check" and not observed.state.finished:
            found = restore.check(wanted)
        elif actions and not module.check_mode:
            if p["step"] == "stop":
                restore.stop(wanted, p["wait_s"])
            else:
                found = restore.start(wanted, observed, p["wait_s"], p["api_port"])
    except UpkeepError as error:
        module.fail_json(msg=f"restore of etcd, step {p['step']}: {error}")
    module.exit_json(changed=bool(actions), actions=actions, found=found)


if __name__ == "__main__":
    main()
