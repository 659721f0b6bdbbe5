#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: one node in, its drain, one report out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: k8s_drain
short_description: Drain, cordon or uncordon a Kubernetes node
version_added: 0.1.0
description:
  - Drains a node through the eviction API, so that PodDisruptionBudgets are honoured. Every wait has an end.
  - A pod that is still there at the end is named with its owner and with the PodDisruptionBudget that holds it.
  - Pods of DaemonSets and static pods stay. Pods without a controller and pods with data in an emptyDir are refused,
    before anything is touched, unless that is allowed.
  - When a drain fails, a node that it cordoned is uncordoned again. Pods that were evicted run elsewhere by then.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.kubernetes
attributes:
  platform:
    platforms: posix
options:
  name:
    description: The node's name in the cluster.
    type: str
    required: true
  state:
    description:
      - V(drained) cordons the node and evicts its pods, V(cordoned) only keeps new pods away, V(uncordoned) lets pods
        come again.
    type: str
    choices: [drained, cordoned, uncordoned]
    default: drained
  timeout:
    description: Seconds for all evictions and ends of pods together.
    type: int
    default: 300
  grace_period:
    description: Seconds that pods have to end. Without it, what each pod says.
    type: int
  delete_empty_dir_data:
    description: Evict also pods that lose data of an emptyDir on disk. An emptyDir in memory does not count.
    type: bool
    default: false
  delete_unmanaged:
    description: Evict also pods that no controller makes again.
    type: bool
    default: false
  undo_on_failure:
    description: Uncordon the node when the drain fails and it was this task that cordoned it.
    type: bool
    default: true
notes:
  - Runs where a kubeconfig is, usually on the controller (C(delegate_to=localhost)).
  - In check mode the API is asked about every eviction (dry run). What a budget would hold back is told and is no
    failure, since a budget changes while pods start elsewhere.
"""

EXAMPLES = r"""
- name: Take the pods off a node before it is patched
  censuschat.infra.k8s_drain:
    kubeconfig: /var/lib/environment/us-east-1.kubeconfig
    name: use1-app2
    timeout: 240
  delegate_to: localhost

- name: Let pods come again
  censuschat.infra.k8s_drain:
    kubeconfig: /var/lib/environment/us-east-1.kubeconfig
    name: use1-app2
    state: uncordoned
  delegate_to: localhost
"""

RETURN = r"""
cordon:
  description: V(cordoned), V(uncordoned), or empty when the node was as it should be.
  returned: always
  type: str
pods:
  description: The node's pods and what became of them.
  returned: always
  type: list
  elements: dict
  contains:
    namespace:
      description: The pod's namespace.
      type: str
    name:
      description: The pod's name.
      type: str
    owner:
      description: Its controller.
      type: str
    result:
      description:
        - V(evicted), V(gone) (by itself), V(skipped) (stays), V(refused), V(left) (untouched because others were
          refused), V(blocked) or V(failed).
      type: str
    message:
      description: Why, where there is something to say.
      type: str
failures:
  description: What keeps the node from being drained, one sentence each.
  returned: on failure
  type: list
  elements: str
undone:
  description: Whether the node was uncordoned again because the drain failed.
  returned: always
  type: bool
"""

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.kube import kubeconfig
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import MISSING, Client
from ansible_collections.censuschat.infra.plugins.module_utils.kube.documents import MISSING as MISSING_YAML
from ansible_collections.censuschat.infra.plugins.module_utils.kube.drain import Drainer, Options
from ansible_collections.censuschat.infra.plugins.module_utils.kube.drain_plan import Allowed
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "kubeconfig": {"type": "path"},
            "context": {"type": "str"},
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["drained", "cordoned", "uncordoned"], "default": "drained"},
            "timeout": {"type": "int", "default": 300},
            "grace_period": {"type": "int"},
            "delete_empty_dir_data": {"type": "bool", "default": False},
            "delete_unmanaged": {"type": "bool", "default": False},
            "undo_on_failure": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    if MISSING or MISSING_YAML:
        missing = missing_required_lib("urllib3" if MISSING else "PyYAML")
        module.fail_json(msg=missing, exception=MISSING or MISSING_YAML)
    p = module.params
    options = Options(
        node=p["name"],
        timeout=p["timeout"],
        grace_period=p["grace_period"],
        allowed=Allowed(p["delete_empty_dir_data"], p["delete_unmanaged"]),
        undo=p["undo_on_failure"],
        check=module.check_mode,
    )
    try:
        drainer = Drainer(Client(kubeconfig.load(p["kubeconfig"] or "", p["context"] or "")), options)
        work = {"drained": drainer.drain, "cordoned": drainer.cordon, "uncordoned": drainer.uncordon}[p["state"]]
        report = work()
    except KubeError as error:
        module.fail_json(msg=f"node {p['name']}: {error}", failures=[str(error)])
    result = {"changed": report.changed, "cordon": report.cordon, "pods": report.pods, "undone": report.undone}
    if report.cordon and not report.undone:
        was, now = ("", "cordoned") if report.cordon == "cordoned" else ("cordoned", "")
        pods = "".join(f"pod {x['namespace']}/{x['name']}\n" for x in report.pods if x["result"] == "evicted")
        result["diff"] = {"before": f"{was}\n{pods}", "after": f"{now}\n"}
    if report.problems:
        end = " The node takes pods again." if report.undone else ""
        module.fail_json(
            msg=f"node {p['name']} is not drained: {' | '.join(report.problems)}.{end}",
            failures=report.problems,
            **result,
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
