#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_certificates
short_description: Renew a control plane's certificates that are due, and say how long all of a node's last
version_added: 0.1.0
description:
  - Does at once what the timer of role P(censuschat.infra.kubernetes_certificates#role) does daily, also when
    certificates have expired and the API is gone. kubeadm renews what it issued from the authorities on the disk, and
    the components that hold an old one are restarted, etcd first.
  - A component is not restarted while those of the other control planes do not serve, unless its own certificate has
    expired, since then nothing is lost by it.
  - An expired client certificate of a control plane's kubelet is issued anew.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  diff_mode:
    support: none
options:
  name:
    description: The node's name in the cluster.
    type: str
    required: true
  renew_days:
    description: Days left at which a certificate is renewed.
    type: int
    default: 30
  authority_days:
    description: Days left at which an authority is reported.
    type: int
    default: 365
  kubelet_days:
    description: Days left at which a kubelet's own certificate is reported.
    type: int
    default: 14
  renew:
    description: Names, as C(kubeadm certs renew) has them, to renew however long they last.
    type: list
    elements: str
    default: []
  kubeadm_config:
    description: kubeadm's configuration on the node.
    type: path
    default: /etc/kubernetes/kubeadm.yaml
  others:
    description: Addresses of the cluster's other control planes.
    type: list
    elements: str
    default: []
  api_port:
    description: Port of the API servers.
    type: int
    default: 6443
  wait_s:
    description: How long a restarted component may take to serve, in seconds.
    type: int
    default: 120
notes:
  - Needs root on the node (C(become)). Run it on all control planes at once. They take turns by a lock in etcd, except
    when etcd's or the API server's certificates have expired, since then they need each other to serve again.
"""

EXAMPLES = r"""
- name: Renew what has expired or soon will
  censuschat.infra.kubernetes_certificates:
    name: use1-cp1
    others: [10.77.1.32, 10.77.1.33]
  become: true
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode.
  returned: always
  type: list
  elements: str
  sample: [renewed apiserver, restarted kube-apiserver]
alarms:
  description: What needs a person.
  returned: always
  type: list
  elements: str
certificates:
  description: Every certificate of the node at the end.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: As C(kubeadm certs) has it; ca, etcd-ca, front-proxy-ca, kubelet-client, kubelet-serving.
      type: str
    kind:
      description: V(leaf), V(authority) or V(kubelet).
      type: str
    not_after:
      description: When it expires.
      type: str
    days_left:
      description: Days until then; negative when it has expired.
      type: float
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep import certificates
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.certificates import Config, Plan
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import UpkeepError


def words(wanted: Plan) -> list[str]:
    """The plan as a report of what it will have done."""
    issued = ["gave the kubelet a new client certificate"] if wanted.reissue_kubelet else []
    return [*(f"renewed {name}" for name in wanted.renew), *issued, *(f"restarted {name}" for name in wanted.restart)]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "renew_days": {"type": "int", "default": 30},
            "authority_days": {"type": "int", "default": 365},
            "kubelet_days": {"type": "int", "default": 14},
            "renew": {"type": "list", "elements": "str", "default": []},
            "kubeadm_config": {"type": "path", "default": "/etc/kubernetes/kubeadm.yaml"},
            "others": {"type": "list", "elements": "str", "default": []},
            "api_port": {"type": "int", "default": 6443},
            "wait_s": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    config = Config.of({**module.params, "node": module.params["name"], "metrics": ""})
    try:
        found, started = certificates.observe()
        wanted = certificates.plan(
            found,
            started,
            config.policy,
            time.time(),
            also=module.params["renew"],
            can_sign=certificates.can_sign(),
        )
        if not module.check_mode and not wanted.empty:
            certificates.apply(wanted, config)
            found, started = certificates.observe()
    except UpkeepError as error:
        module.fail_json(msg=f"certificates: {error}")
    module.exit_json(
        changed=not wanted.empty,
        actions=words(wanted),
        alarms=list(wanted.alarms),
        certificates=certificates.describe(found, time.time()),
    )


if __name__ == "__main__":
    main()
