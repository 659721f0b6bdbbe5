#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: etcd_member
short_description: Bring one member of an etcd cluster to run what is on its disk, and prove that it serves
version_added: 0.1.0
description:
  - Starts the member when it does not run, restarts it when a file it names in O(restart_on) is newer than the running
    process, and waits until it serves.
  - Run on all members at once. A restart of a working cluster goes member by member. The turn is a key in the cluster
    itself, held under a lease, so it holds over several runs and controllers too, and an interrupted run gives it back.
  - A member is not restarted while another one does not serve, since that would take the quorum away.
  - A member without data that the others still know, as on a node that was built anew, takes a new place in the cluster
    if the others have a quorum without it.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.tls_files
options:
  unit:
    description: Full name of the systemd unit.
    type: str
    required: true
  config_file:
    description:
      - The member's configuration, with C(new) as its C(initial-cluster-state).
      - The unit must start etcd with C(--config-file=${CONFIG}), C(Environment=CONFIG=) this file and
        C(EnvironmentFile=-/run/UNIT.env).
    type: path
    required: true
  data_directory:
    description: The member's data.
    type: path
    required: true
  peer_url:
    description: The member's address for the other members.
    type: str
    required: true
  name:
    description: The member's name, one of O(members).
    type: str
    required: true
  members:
    description: Client URLs of all members by their names.
    type: dict
    required: true
  ca_file:
    required: true
  cert_file:
    required: true
  key_file:
    required: true
  restart_on:
    description: Files whose change, later than the member's start, means a restart.
    type: list
    elements: path
    default: []
  wait_s:
    description: How long to wait for the member to serve, and for its turn, in seconds.
    type: int
    default: 60
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Run what is on the disk, one member after the other
  censuschat.infra.etcd_member:
    unit: etcd-dcs.service
    config_file: /etc/etcd/dcs.yml
    data_directory: /var/lib/etcd/dcs
    peer_url: https://10.77.1.21:2380
    name: use1-db1
    members:
      use1-db1: https://10.77.1.21:2379
      use1-db2: https://10.77.1.22:2379
      use1-db3: https://10.77.1.23:2379
    ca_file: /etc/censuschat/pki/ca.crt
    cert_file: /etc/censuschat/pki/node.crt
    key_file: /etc/censuschat/pki/node.key
    restart_on: [/etc/etcd/dcs.yml]
  become: true
"""

RETURN = r"""
action:
  description: What was done, or would be in check mode, with its reason. Empty when nothing.
  returned: always
  type: str
  sample: "restart in turn: /etc/etcd/dcs.yml newer than the running member"
serving:
  description: Names of the members that serve, seen from this node at the end.
  returned: always
  type: list
  elements: str
  sample: [use1-db1, use1-db2, use1-db3]
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.etcd.host import Files, Host, MemberError
from ansible_collections.censuschat.infra.plugins.module_utils.etcd.member import Step, plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError
from ansible_collections.censuschat.infra.plugins.module_utils.tls_files import tls_files


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "config_file": {"type": "path", "required": True},
            "data_directory": {"type": "path", "required": True},
            "peer_url": {"type": "str", "required": True},
            "name": {"type": "str", "required": True},
            "members": {"type": "dict", "required": True},
            **tls_files(required=True),
            "restart_on": {"type": "list", "elements": "path", "default": []},
            "wait_s": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    p = module.params
    if p["name"] not in p["members"]:
        module.fail_json(msg=f"name: {p['name']} is not one of members: {', '.join(p['members'])}")
    files = Files(p["unit"], p["config_file"], p["data_directory"], p["peer_url"])
    host = Host(files, p["name"], p["members"], (p["ca_file"], p["cert_file"], p["key_file"]))
    deadline = time.monotonic() + p["wait_s"]
    try:
        observed = host.observe(p["restart_on"])
        step, why = plan(observed)
        serving = observed.serving
        if not module.check_mode:
            more = host.apply(step, observed, deadline)
            why = f"{why}; {more}" if more else why
            serving = host.wait_serving(deadline)
    except (MemberError, NodeError) as error:
        module.fail_json(msg=f"etcd member {p['name']} ({p['unit']}): {error}")
    action = "" if step is Step.NOTHING else f"{step.value}: {why}"
    module.exit_json(
        changed=bool(action),
        action=action,
        serving=sorted(serving),
        diff={"before": "", "after": f"{action}\n" if action else ""},
    )


if __name__ == "__main__":
    main()
