#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: the journals of hardening runs in, what they replaced put back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_rollback
short_description: Bring a node back to before a hardening run
version_added: 0.1.0
description:
  - Puts back what a run of M(censuschat.infra.node_harden) and all runs after it replaced on this node. Files with
    their bytes, owner, group and mode, kernel values, mounts, the state of services, the loaded firewall tables and
    audit rules.
  - Packages that were removed are installed again. Packages that were installed, and accounts and groups that were made
    or changed, stay and are named in RV(left). Where only owner and mode were changed only they come back.
  - A file that something else has changed since is refused by name, and then nothing is changed.
  - sshd's files come back with the same proof and timed revert as M(censuschat.infra.sshd_config).
  - A second rollback to the same run changes nothing. A rollback is a run itself and can be rolled back.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.attributes.action
options:
  to:
    description:
      - The id of the run before which the node is to be again, as RV(censuschat.infra.node_harden#module:run) gave it.
      - Or a time in UTC such as V(20261121T214500), for all runs since then. Nodes give their runs ids of their own, so
        a time is what a rollback of several nodes needs.
      - Without it nothing is changed, and RV(runs) tells which there are.
    type: str
    default: ""
  force:
    description: Also put back files that something else has changed since.
    type: bool
    default: false
  provable:
    description: Set by the action plugin. Whether it can open a new ssh connection as proof of an sshd change.
    type: bool
    default: false
requirements:
  - Debian 12 or newer with systemd
notes:
  - Needs root on the node (C(become)).
  - What runs replaced is kept in C(/var/lib/censuschat-hardening/runs), for root alone. Old runs may be removed there.
  - A run that was interrupted before it could note what it had made is put back without the comparison.
seealso:
  - module: censuschat.infra.node_harden
"""

EXAMPLES = r"""
- name: See which runs there are
  censuschat.infra.node_rollback:
  become: true
  register: kept

- name: Bring the node back to before the last of them
  censuschat.infra.node_rollback:
    to: "{{ kept.runs[-1] }}"
  become: true
"""

RETURN = r"""
runs:
  description: The ids of the runs that are kept on this node, oldest first.
  returned: always
  type: list
  elements: str
actions:
  description: What was put back, or would be in check mode.
  returned: when O(to) is given
  type: list
  elements: dict
  contains:
    kind:
      description: What kind of thing it is.
      type: str
    target:
      description: The file, kernel value, unit or package.
      type: str
    detail:
      description: What is done to it.
      type: str
left:
  description: What stays as the runs made it, each a sentence.
  returned: when O(to) is given
  type: list
  elements: str
run:
  description: The id of this rollback, by which it can be rolled back itself; empty when nothing was changed.
  returned: when O(to) is given
  type: str
proof:
  description: How a change of sshd was proven.
  returned: when sshd was reloaded
  type: str
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    keep,
    rollback_host,
    rollback_plan,
    sshd_host,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import diff_of
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError

# As long as a change of sshd by other means waits for its proof.
REVERT_AFTER_S = 60


def roll_back(module: AnsibleModule, kept: list[str], commands: Commands) -> dict[str, Any]:
    """Plan, and unless in check mode put back; returns the module's result."""
    lines = rollback_host.read(module.params["to"], kept)
    now = rollback_host.observe(lines, commands)
    rollback = rollback_plan.plan(lines, now, force=module.params["force"])
    if rollback.refused:
        raise NodeError(f"nothing was changed: {'; '.join(rollback.refused)}")
    actions = list(rollback.actions)
    sshd = rollback_host.sshd_actions([a for a in actions if a.kind == "sshd_file"])
    if any(a.kind == "sshd_file" for a in actions):
        sshd_host.settle(commands, check=module.check_mode)
        sshd_host.prove_candidate(None, sshd, module.params["provable"], commands)
    result: dict[str, Any] = {
        "changed": bool(actions),
        "actions": [a.public() for a in actions],
        "left": list(rollback.left),
        "run": "",
        "diff": diff_of(actions),
    }
    if actions and not module.check_mode:
        keeper = keep.Keeper(keep.new_id())
        result["run"] = keeper.run
        if rollback_host.Undoing(keeper, commands).apply(rollback, now):
            observed = sshd_host.observe(commands)
            result["token"] = sshd_host.apply(sshd, observed, REVERT_AFTER_S, commands, keeper)
    return result


def main() -> None:
    # Whatever the login's umask is, directories and packages' files are for all to read as ever.
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec={
            "to": {"type": "str", "default": ""},
            "force": {"type": "bool", "default": False},
            "provable": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        kept = keep.runs()
        result: dict[str, Any] = {"changed": False, "runs": kept}
        if module.params["to"]:
            result.update(roll_back(module, kept, Commands()))
    except NodeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
