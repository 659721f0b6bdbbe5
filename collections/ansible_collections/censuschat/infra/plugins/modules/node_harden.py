#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: the selected controls in, one report out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_harden
short_description: Hold a node to a catalogue of hardening controls in one call
version_added: 0.1.0
description:
  - Takes controls as data, selects those of a profile with the user's own choices, observes all of them on the node at
    once, applies what differs and reports each control.
  - Files and what is running are both compared. A kernel value that differs from its file, a service or an sshd that is
    older than its configuration are findings like any other.
  - After an apply the node is observed again. A control that still differs is reported as failed.
  - Controls of the sshd domain go through the same proof and timed revert as M(censuschat.infra.sshd_config). A change
    of PAM's stacks or of a loaded firewall table is proven by a new connection in the same way, or undone by the node.
  - What a run replaces is kept on the node, and M(censuschat.infra.node_rollback) puts it back.
  - The choices are checked on the controller, before any node is touched. So are values against the ranges that
    controls give, and controls that want different things of one file, package, unit or kernel value.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.attributes.action
options:
  catalogue:
    description: Directory on the controller whose C(*.yml) files are lists of controls.
    type: path
  profile:
    description: The profile to hold.
    type: str
    choices: [baseline, cis_level1, cis_level2]
    default: cis_level1
  include:
    description: Ids of controls to hold beyond the profile.
    type: list
    elements: str
    default: []
  exclude:
    description: Ids of controls not to hold, each with its reason in words.
    type: dict
    default: {}
  overrides:
    description: Ids of controls with what is to be different in their state.
    type: dict
    default: {}
  own:
    description: Controls of one's own, in the catalogue's form.
    type: list
    elements: dict
    default: []
  audit_only:
    description: Report only. Differences are reported as failed and nothing is changed.
    type: bool
    default: false
  controls:
    description: Set by the action plugin. The selected controls.
    type: list
    elements: dict
    default: []
  phase:
    description:
      - Set by the action plugin. V(apply) plans and applies. V(confirm) and V(revert) end a change of firewall or PAM
        that waits for its proof.
    type: str
    choices: [apply, confirm, revert]
    default: apply
  token:
    description: Set by the action plugin. Names the change that V(confirm) and V(revert) end.
    type: str
    default: ""
  provable:
    description: Set by the action plugin. Whether it can open a new ssh connection as proof of an sshd change.
    type: bool
    default: false
requirements:
  - Debian 12 or newer with systemd
notes:
  - Needs root on the node (C(become)).
  - In a container, controls that belong to the machine it shares its kernel with are reported as not applicable, with
    the reason. One that was asked for by O(include) fails there.
seealso:
  - module: censuschat.infra.node_rollback
"""

EXAMPLES = r"""
- name: Hold the node to CIS level 1
  censuschat.infra.node_harden:
    catalogue: "{{ role_path }}/files/catalogue"
    profile: cis_level1
    exclude:
      sshd_banner: the bastion shows its own banner
    overrides:
      sysctl_rp_filter:
        sysctl:
          net.ipv4.conf.all.rp_filter: 2
  become: true
"""

RETURN = r"""
controls:
  description: One entry for each control of the profile, in the catalogue's order.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      description: The control's id.
      type: str
    title:
      description: The control's title.
      type: str
    domain:
      description: Its domain.
      type: str
    severity:
      description: Its severity.
      type: str
    result:
      description: V(pass), V(changed), V(failed), V(excluded) or V(not_applicable).
      type: str
    references:
      description: Where the control comes from.
      type: list
      elements: str
    detail:
      description: What differed, what failed, or the reason.
      type: str
    diff:
      description: What was or would be changed. Secrets are not shown.
      type: list
      elements: dict
      contains:
        what:
          description: The file, kernel value, unit or package, and what kind of change it is.
          type: str
        before:
          description: What stood there.
          type: str
        after:
          description: What stands there now, or would.
          type: str
counts:
  description: Number of controls by result.
  returned: always
  type: dict
  sample: {"pass": 41, "changed": 0, "failed": 0, "excluded": 1, "not_applicable": 12}
run:
  description: The id of this run on the node, by which its changes can be rolled back; empty when nothing was changed.
  returned: always
  type: str
  sample: 20261121T214512.004711Z-3f9a
mode:
  description: V(apply), V(check) or V(audit).
  returned: always
  type: str
profile:
  description: The profile that was held.
  returned: always
  type: str
"""

import os

from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_host import Hardening, finish
from ansible_collections.censuschat.infra.plugins.module_utils.node.quiet import QuietModule
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import diff_of
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError


def main() -> None:
    # Whatever the login's umask is, directories and packages' files are for all to read as ever.
    os.umask(0o022)
    module = QuietModule(
        argument_spec={
            "catalogue": {"type": "path"},
            "profile": {
                "type": "str",
                "choices": ["baseline", "cis_level1", "cis_level2"],
                "default": "cis_level1",
            },
            "include": {"type": "list", "elements": "str", "default": []},
            "exclude": {"type": "dict", "default": {}},
            "overrides": {"type": "dict", "default": {}},
            "own": {"type": "list", "elements": "dict", "default": []},
            "audit_only": {"type": "bool", "default": False},
            "controls": {"type": "list", "elements": "dict", "default": []},
            "phase": {"type": "str", "choices": ["apply", "confirm", "revert"], "default": "apply"},
            "token": {"type": "str", "default": "", "no_log": False},
            "provable": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        if module.params["phase"] != "apply":
            finish(module.params["token"], keep=module.params["phase"] == "confirm", commands=Commands())
            module.exit_json(changed=True)
        hardening = Hardening(module.params["controls"], module.params["provable"], Commands())
        outcome = hardening.run(check=module.check_mode, audit=module.params["audit_only"])
    except NodeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=outcome.changed,
        controls=outcome.results,
        sshd=outcome.sshd,
        run=outcome.run,
        token=outcome.token,
        guarded=outcome.guarded,
        # Each control has its own diff; Ansible's is made only where it is asked for.
        **({"diff": diff_of(outcome.actions)} if module._diff else {}),
        # The controls are the caller's own data; echoing them would double the answer.
        invocation={"module_args": {"controls": len(module.params["controls"])}},
    )


if __name__ == "__main__":
    main()
