#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_member
short_description: Bring a node to be a member of its Kubernetes cluster, or to be none any more
version_added: 0.1.0
description:
  - Observes what kubeadm and the kubelet have on the node and, with the node's own certificate, whether the cluster
    knows it. Plans one step (found the cluster, join it as a control plane or a worker, start the kubelet, run with a
    changed configuration, leave) and carries it out.
  - Run it twice. Without O(turn) it starts the kubelet of a member if need be, and otherwise only says which step
    is next in RV(step). Run it again with O(turn) for the nodes that have a step to take. Control planes take
    theirs one after the other.
  - A cluster is founded only when all its control planes were asked and none has one, and never when the operator's
    kubeconfig shows that it existed.
  - An interrupted founding goes on where it was; an interrupted join is cleared away and begun again.
  - The last control plane is not removed, nor one without which etcd loses its majority.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  state:
    description: Whether the node is a member.
    type: str
    choices: [present, absent]
    default: present
  role:
    description: What it is in the cluster.
    type: str
    choices: [control_plane, worker]
    default: worker
  name:
    description: The node's name in the cluster.
    type: str
    required: true
  endpoint:
    description: Address and port of the cluster's API.
    type: str
    required: true
  address:
    description: The node's own address, where a control plane's API server listens.
    type: str
  version:
    description: Version of Kubernetes, without v. A control plane that runs another one is not touched.
    type: str
    default: ""
  configuration:
    description: Hash of what a control plane's components are configured with. A change means that they run anew.
    type: str
    default: ""
  kubeadm_config:
    description: kubeadm's configuration file on a control plane.
    type: path
    default: /etc/kubernetes/kubeadm.yaml
  registration:
    description: How the node registers, kubeadm's C(nodeRegistration).
    type: dict
    default: {}
  turn:
    description: Whether the node may take a step that others wait for.
    type: bool
    default: false
  peers:
    description: What is known of the cluster's control planes. Needed with O(turn) on a control plane.
    type: dict
    suboptions:
      first:
        description: The control plane that founds the cluster.
        type: str
        required: true
      members:
        description: Those that have a cluster.
        type: list
        elements: str
        default: []
      bare:
        description: Those that have none.
        type: list
        elements: str
        default: []
      unseen:
        description: Those that did not take part in this run.
        type: list
        elements: str
        default: []
      kubeconfig:
        description: Path of the operator's kubeconfig if there is one already.
        type: str
        default: ""
  join:
    description: What a join needs, as M(censuschat.infra.kubernetes_join_material) returns it.
    type: dict
    suboptions:
      token:
        description: Bootstrap token.
        type: str
        default: ""
      authority:
        description: Certificate of the cluster's authority.
        type: str
        default: ""
      certificate_key:
        description: Key of the shared certificates of control planes.
        type: str
        default: ""
      refusal:
        description: Why the node was not admitted. Given, and the node has to join, the call fails with it.
        type: str
        default: ""
  wait_s:
    description: How long kubeadm may take, in seconds.
    type: int
    default: 240
  api_wait_s:
    description: How long to wait for the API to answer a member, in seconds.
    type: int
    default: 30
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Look at the node
  censuschat.infra.kubernetes_member:
    name: use1-app2
    endpoint: 10.77.1.11:6443
  become: true
  register: member

- name: Join in turn
  censuschat.infra.kubernetes_member:
    name: use1-app2
    endpoint: 10.77.1.11:6443
    registration: {name: use1-app2}
    turn: true
    join: "{{ material.join }}"
  become: true
  when: member.step in ['join', 'rejoin']
"""

RETURN = r"""
step:
  description: The step that was taken or, when it waits for the node's turn, is to be taken; C(nothing) when none.
  returned: always
  type: str
  sample: join
why:
  description: The reason of the step.
  returned: always
  type: str
member:
  description: Whether the node was a member before this call.
  returned: always
  type: bool
registered:
  description: Whether its kubelet runs and the cluster knows the node.
  returned: always
  type: bool
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.member import (
    IN_TURN,
    Peers,
    Seen,
    Step,
    Wanted,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.member_host import Host
from ansible_collections.censuschat.infra.plugins.module_utils.node.quiet import QuietModule
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError


def run(module: AnsibleModule) -> dict[str, object]:
    """Observe, plan, apply; the module's result. Raises NodeError."""
    p = module.params
    wanted = Wanted(
        name=p["name"],
        present=p["state"] == "present",
        control_plane=p["role"] == "control_plane",
        configuration=p["configuration"],
        version=p["version"],
        endpoint=p["endpoint"],
    )
    peers = None
    if known := p["peers"]:
        members, bare, unseen = (tuple(known[key]) for key in ("members", "bare", "unseen"))
        peers = Peers(members, bare, unseen, known["first"], known["kubeconfig"])
    host = Host(p["name"])
    observed = host.observe(time.monotonic() + p["api_wait_s"], members=not wanted.present)
    step, why = plan(wanted, observed, peers if p["turn"] else None)
    waits = (step in IN_TURN or step is Step.RESET) and not p["turn"]
    if step is not Step.NOTHING and not waits and not module.check_mode:
        join = p["join"] or {}
        if step in (Step.JOIN, Step.REJOIN) and not join.get("token"):
            refusal = join.get("refusal") or "join needs a token of kubernetes_join_material"
            raise NodeError(f"{p['name']} has to join ({why}) and was not admitted: {refusal}")
        host.apply(step, wanted, p, p["wait_s"])
    changed = step is not Step.NOTHING and not waits
    return {
        "changed": changed,
        "step": step.value,
        "why": why,
        "member": observed.joined and not observed.pending,
        "registered": observed.seen is Seen.REGISTERED,
        "diff": {"before": "", "after": f"{step.value}: {why}\n" if changed else ""},
        # The parameters hold what nobody else may know.
        "invocation": {"module_args": {"name": p["name"], "state": p["state"], "role": p["role"], "turn": p["turn"]}},
    }


def main() -> None:
    module = QuietModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "role": {"type": "str", "choices": ["control_plane", "worker"], "default": "worker"},
            "name": {"type": "str", "required": True},
            "endpoint": {"type": "str", "required": True},
            "address": {"type": "str"},
            "version": {"type": "str", "default": ""},
            "configuration": {"type": "str", "default": ""},
            "kubeadm_config": {"type": "path", "default": "/etc/kubernetes/kubeadm.yaml"},
            "registration": {"type": "dict", "default": {}},
            "turn": {"type": "bool", "default": False},
            "peers": {
                "type": "dict",
                "options": {
                    "first": {"type": "str", "required": True},
                    "members": {"type": "list", "elements": "str", "default": []},
                    "bare": {"type": "list", "elements": "str", "default": []},
                    "unseen": {"type": "list", "elements": "str", "default": []},
                    "kubeconfig": {"type": "str", "default": ""},
                },
            },
            "join": {
                "type": "dict",
                "options": {
                    "token": {"type": "str", "default": "", "no_log": True},
                    "authority": {"type": "str", "default": ""},
                    "certificate_key": {"type": "str", "default": "", "no_log": True},
                    "refusal": {"type": "str", "default": ""},
                },
            },
            "wait_s": {"type": "int", "default": 240},
            "api_wait_s": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except NodeError as error:
        said = str(error)
        module.fail_json(msg=said if module.params["name"] in said else f"{module.params['name']}: {said}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
