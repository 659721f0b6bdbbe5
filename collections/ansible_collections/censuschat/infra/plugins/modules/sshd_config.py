#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: one phase of an sshd change. The action plugin of the same name runs the phases."""

from __future__ import annotations

DOCUMENTATION = r"""
module: sshd_config
short_description: Change sshd's settings without a way to be locked out
version_added: 0.1.0
description:
  - Writes the given global settings into one drop-in of its own and has the running sshd take them.
  - Before anything is written sshd itself must accept the whole new configuration (C(sshd -T)), no other file may
    overrule a setting, and the login of this run (user, groups, key, address and port) must survive it.
  - Then a revert is armed on the node, as a timer and for the next boot, the configuration is written, sshd is
    reloaded, and the controller opens a new connection that shares nothing with the present one. Only when that
    connection runs a command is the revert disarmed. When it fails the change is undone at once; when the controller
    dies the timer undoes it.
  - What runs is compared too. A configuration that is newer than what sshd last read is a reload, with the same proof.
  - A check mode run asks sshd about the new configuration in the same way and writes nothing.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.attributes.action
options:
  settings:
    description:
      - Keywords of sshd_config(5) with their values. Booleans become V(yes) and V(no). A list is repeated (Port,
        ListenAddress, HostKey), joined by commas (Ciphers, MACs, KexAlgorithms) or by spaces (AllowUsers), as the
        keyword needs it.
      - It is the whole content of the drop-in, O(matches) apart. C(Match) and C(Include) are refused here.
    type: dict
    default: {}
  matches:
    description:
      - Settings for some connections only, in their order. For a connection the first value of a keyword that a block
        gives counts, and it counts more than a global one.
    type: list
    elements: dict
    default: []
    suboptions:
      criteria:
        description: Which connections, as C(Match) takes it, as in C(Group jumpers). C(all) is refused.
        type: str
        required: true
      settings:
        description: Keywords as in O(settings).
        type: dict
        required: true
  name:
    description:
      - A drop-in of its own beside the nameless one, for a role that adds its part. Ports, addresses and O(in_main)
        belong to the nameless one.
    type: str
    default: ""
  revert_after:
    description: Seconds after which the node undoes a change that nobody proved, at least 20.
    type: int
    default: 60
  in_main:
    description:
      - Have the settings stand at the top of C(/etc/ssh/sshd_config) too, for programs that judge that file alone.
        Other global lines of the same keywords there are commented out. Keywords that add up when they are repeated
        (Port, HostKey ...) and those that say who may log in stay in the drop-in only.
      - A block that is there from an earlier run is always kept up.
    type: bool
    default: false
  provable:
    description:
      - Set by the action plugin. Whether it can open a new connection as proof. A run that came in by ssh and cannot is
        refused a change.
    type: bool
    default: false
  phase:
    description:
      - Set by the action plugin. V(apply) plans, and unless in check mode arms, writes and reloads. V(confirm) and
        V(revert) end a change.
    type: str
    choices: [apply, confirm, revert]
    default: apply
  run:
    description: Set by M(censuschat.infra.node_harden). The run whose journal keeps what this change replaces.
    type: str
    default: ""
  token:
    description: Set by the action plugin. Names the change that V(confirm) and V(revert) end.
    type: str
    default: ""
requirements:
  - Debian 12 or newer with systemd and openssh-server
notes:
  - Needs root on the node (C(become)).
  - Where C(ssh.socket) listens its ports are changed with those of the settings, under the same proof.
  - A changed port is taken when the old one stays beside it; without the present port the change is refused.
  - A run that did not come in by ssh (C(podman), C(local)) has no login to prove; its change is kept when sshd comes
    back from its reload.
"""

EXAMPLES = r"""
- name: Let sshd take keys only
  censuschat.infra.sshd_config:
    settings:
      PasswordAuthentication: false
      PermitRootLogin: false
      AllowGroups: [ops]
  become: true

- name: Let the jumpers through, and nothing else
  censuschat.infra.sshd_config:
    name: bastion
    matches:
      - criteria: Group jumpers
        settings:
          DisableForwarding: false
          AllowTcpForwarding: local
          MaxSessions: 0
  become: true
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: V(sshd_file), V(sshd_socket) or V(sshd_reload).
      type: str
    target:
      description: The file or unit.
      type: str
    detail:
      description: What is done to it and why.
      type: str
token:
  description: Names a change that waits for its proof.
  returned: when a change was applied while sshd runs
  type: str
proof:
  description: How the change was proven.
  returned: when sshd was reloaded
  type: str
  sample: a new connection ran a command
last_revert:
  description: When a change was last undone on this node for want of proof (UTC).
  returned: when there was one
  type: str
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.node import sshd_host, sshd_plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import Keeper
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import diff_of
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError


def apply(module: AnsibleModule, commands: Commands) -> dict[str, Any]:
    """The first phase; returns the module's result."""
    settings = module.params["settings"]
    matches = [sshd_plan.Match(m["criteria"], m["settings"]) for m in module.params["matches"]]
    drop_in = sshd_plan.drop_in_of(module.params["name"])
    if module.params["revert_after"] < 20:
        raise NodeError("revert_after under 20 s leaves no time for the proof")
    sshd_host.settle(commands, check=module.check_mode)
    observed = sshd_host.observe(commands, drop_in=drop_in)
    actions = sshd_plan.plan(settings, observed, in_main=module.params["in_main"], matches=matches)
    provable = module.params["provable"]
    sshd_host.prove_candidate(settings, actions, provable, commands, matches=matches, drop_in=drop_in)
    result = {"changed": bool(actions), "actions": [a.public() for a in actions], "diff": diff_of(actions)}
    if sshd_host.last_revert():
        result["last_revert"] = sshd_host.last_revert()
    if actions and not module.check_mode:
        keep = Keeper(module.params["run"]) if module.params["run"] else None
        result["token"] = sshd_host.apply(actions, observed, module.params["revert_after"], commands, keep)
    return result


def main() -> None:
    # Whatever the login's umask is, directories and packages' files are for all to read as ever.
    os.umask(0o022)
    module = AnsibleModule(
        argument_spec={
            "settings": {"type": "dict", "default": {}},
            "matches": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "criteria": {"type": "str", "required": True},
                    "settings": {"type": "dict", "required": True},
                },
            },
            "name": {"type": "str", "default": ""},
            "revert_after": {"type": "int", "default": 60},
            "in_main": {"type": "bool", "default": False},
            "provable": {"type": "bool", "default": False},
            "phase": {"type": "str", "choices": ["apply", "confirm", "revert"], "default": "apply"},
            "run": {"type": "str", "default": ""},
            "token": {"type": "str", "default": "", "no_log": False},
        },
        supports_check_mode=True,
    )
    commands = Commands()
    try:
        if module.params["phase"] == "confirm":
            sshd_host.confirm(module.params["token"], commands)
            result: dict[str, Any] = {"changed": True, "actions": []}
        elif module.params["phase"] == "revert":
            sshd_host.revert(module.params["token"], commands)
            result = {"changed": True, "actions": []}
        else:
            result = apply(module, commands)
    except NodeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
