#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_etcd_member
short_description: Hold a control plane's place in its etcd cluster, or remove a dead one's
version_added: 0.1.0
description:
  - With O(state=present), on the node itself. A member that serves is guarded against founding an empty cluster when
    its disk is lost, by C(--initial-cluster-state=existing) in its manifest; kubeadm writes C(new) for the first
    control plane. A member whose disk was lost gives up its place and takes a new one, while the others have a quorum.
  - With O(state=absent), on a node that serves. The dead member O(name) is removed by its id. A later converge of the
    roles joins its replacement.
  - Refuses whatever could cost the quorum or data. A second run of an interrupted one goes on where that stopped.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  diff_mode:
    support: none
options:
  name:
    description: The member's name, which kubeadm makes the node's.
    type: str
    required: true
  state:
    description: Whether it has a place in the cluster.
    type: str
    choices: [present, absent]
    default: present
  peer_url:
    description: The member's address for the other members. Required with O(state=present).
    type: str
  others:
    description: Client URLs of the other control planes' members, by name.
    type: dict
    default: {}
  discard_data:
    description: Whether data on the disk of a member that does not serve may be given up.
    type: bool
    default: false
  wait_s:
    description: How long each step may take, in seconds.
    type: int
    default: 120
notes:
  - Needs root on the node (C(become)). Run it on one node after the other (C(throttle=1)).
"""

EXAMPLES = r"""
- name: Keep this control plane's place in etcd
  censuschat.infra.kubernetes_etcd_member:
    name: use1-cp1
    peer_url: https://10.77.1.31:2380
    others:
      use1-cp2: https://10.77.1.32:2379
      use1-cp3: https://10.77.1.33:2379
  throttle: 1
  become: true

- name: Remove the member of a node that will not come back
  censuschat.infra.kubernetes_etcd_member:
    name: use1-cp2
    state: absent
  become: true
"""

RETURN = r"""
action:
  description: What was done, or would be in check mode, with its reason. Empty when nothing.
  returned: always
  type: str
  sample: "rejoin: its disk holds no keys"
serving:
  description: Names of the members that served before.
  returned: always
  type: list
  elements: str
  sample: [use1-cp1, use1-cp3]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep import membership, static_pods
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import UpkeepError
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.membership import Step


def present(module: AnsibleModule) -> None:
    """The node's own place."""
    p = module.params
    observed = membership.observe(p["name"], p["others"])
    if module.check_mode and not observed.manifest:
        module.exit_json(changed=True, action="guard: once it is a control plane", serving=[])
    step, why = membership.plan(p["name"], p["peer_url"], observed, discard=p["discard_data"])
    if not module.check_mode:
        membership.apply(step, p["name"], p["peer_url"], observed, wait_s=p["wait_s"], others=p["others"])
    module.exit_json(
        changed=step is not Step.NOTHING,
        action=f"{step.value}: {why}" if why else "",
        serving=sorted(observed.serving),
    )


def absent(module: AnsibleModule) -> None:
    """A dead member's place, asked at this node's."""
    known = tuple(static_pods.members())
    urls = {m.client_urls[0]: m.name for m in known if m.client_urls}
    serving = frozenset(urls[url] for url, well in static_pods.healthy(list(urls)).items() if well)
    member = membership.plan_removal(module.params["name"], known, serving)
    if member and not module.check_mode:
        membership.remove(member)
    module.exit_json(
        changed=member is not None,
        action=f"remove: {member.name}, id {member.id:x}, does not serve" if member else "",
        serving=sorted(serving),
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "peer_url": {"type": "str"},
            "others": {"type": "dict", "default": {}},
            "discard_data": {"type": "bool", "default": False},
            "wait_s": {"type": "int", "default": 120},
        },
        required_if=[("state", "present", ["peer_url"])],
        supports_check_mode=True,
    )
    try:
        (present if module.params["state"] == "present" else absent)(module)
    except UpkeepError as error:
        module.fail_json(msg=f"etcd: {error}")


if __name__ == "__main__":
    main()
