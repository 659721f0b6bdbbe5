#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: a desired set in, one run of it, one report out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: k8s_apply
short_description: Bring a whole set of Kubernetes objects about in one call
version_added: 0.1.0
description:
  - Takes the whole desired set (inline, files, templates, a kustomization) and applies it server-side, in parallel over
    kept-alive connections, with a field manager.
  - Everything that can be checked without the API's storage is checked before anything is touched, and all problems are
    listed with file, document and object. These are YAML, UTF-8, identities given twice, unknown kinds, missing CRDs,
    namespaces that do not fit, and sizes.
  - Applies in waves. CustomResourceDefinitions come first and are waited for until they are established; then
    namespaces; then what others are admitted by or start with (quotas, roles, service accounts, ConfigMaps, Secrets,
    network policies); then the rest; admission webhooks and aggregated APIs last.
  - An object that fails does not keep the others from being applied. All failures are listed at the end.
  - Live objects are read with one LIST a kind. What is as desired, in values and in owned fields, costs no request.
  - Requests that meet 429, 5xx or a lost connection are tried again with back-off for 30 seconds. After a longer loss
    of the API the next run completes the set.
  - Never deletes a namespace or a CustomResourceDefinition that O(delete_named) does not name.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.attributes.action
  - censuschat.infra.kubernetes
attributes:
  platform:
    platforms: posix
options:
  definition:
    description:
      - Objects inline. A list of mappings, one mapping, or YAML text with any number of documents.
      - It is handed over in a file that only the user can read, and is not part of any log.
    type: raw
  src:
    description:
      - Files, directories (searched through for C(*.yml), C(*.yaml) and C(*.json)) and glob patterns, on the host that
        the task runs on.
    type: list
    elements: str
    default: []
  template:
    description:
      - Templates of manifests, searched for like those of M(ansible.builtin.template) and rendered on the controller.
    type: list
    elements: str
    default: []
  kustomize:
    description:
      - Directory of a kustomization, built with C(kustomize) or C(kubectl kustomize) on the host the task runs on.
    type: path
  namespace:
    description:
      - Namespace of namespaced objects that name none. Without it that of the kubeconfig's context, or V(default).
    type: str
  apply_set:
    description:
      - Makes the objects members of an ApplySet, which O(prune) needs. Its parent is a ConfigMap.
    type: dict
    suboptions:
      name:
        description: Name of the set's ConfigMap.
        type: str
        required: true
      namespace:
        description: Namespace of the set's ConfigMap. The set itself may bring it.
        type: str
        required: true
  prune:
    description:
      - Delete members of the set that are no longer wanted, after everything was applied and every wait ended well.
        Nothing without the set's label is looked at.
    type: bool
    default: false
  delete_named:
    description:
      - Namespaces and CustomResourceDefinitions that O(prune) or O(rollback_on_failure) may delete, as
        C(Namespace/NAME) or C(CustomResourceDefinition/NAME).
    type: list
    elements: str
    default: []
  field_manager:
    description: The field manager to apply as.
    type: str
    default: censuschat-infra
  force_conflicts:
    description:
      - Take fields over that belong to another manager. Otherwise they are a failure that names field and manager.
    type: bool
    default: false
  preflight:
    description:
      - Let the API look at every changed object first (dry run), and touch nothing when it refuses one. Objects whose
        namespace or kind the set only brings cannot be looked at before.
    type: bool
    default: false
  wait:
    description:
      - Wait until Deployments, StatefulSets and DaemonSets are rolled out, Jobs are complete, Pods are ready and
        APIServices are available. All are waited for at once.
    type: bool
    default: false
  wait_timeout:
    description: Seconds for all waits together.
    type: int
    default: 300
  wait_for:
    description: Objects to wait for until a condition or a field has a value. They need not belong to the set.
    type: list
    elements: dict
    default: []
    suboptions:
      api_version:
        description: The object's apiVersion.
        type: str
        default: v1
      kind:
        description: The object's kind.
        type: str
        required: true
      name:
        description: The object's name.
        type: str
        required: true
      namespace:
        description: The object's namespace.
        type: str
      condition:
        description: Type of a condition in its status.
        type: str
      status:
        description: The condition's value.
        type: str
        default: "True"
      field:
        description: A field, as a path with dots, for instance V(status.phase).
        type: str
      value:
        description: The field's value. Without it any value will do.
        type: str
  rollback_on_failure:
    description:
      - When an object or a wait fails, remove what this run created and put back what it changed. Namespaces and
        CustomResourceDefinitions that it created stay, unless O(delete_named) names them.
    type: bool
    default: false
  parallelism:
    description: How many requests are under way at once.
    type: int
    default: 8
  payload:
    description: Set by the action plugin. Path of the file with O(definition) and the rendered templates.
    type: path
notes:
  - Runs where a kubeconfig is, usually on the controller (C(delegate_to=localhost)).
  - Secrets show in a diff by the names of their entries only, and their values are taken out of messages.
  - In check mode, O(kubeconfig) that is not there yet means a cluster that is still to be founded. All objects are told
    as created then, with a warning.
  - C(stringData) of a Secret is sent as C(data), since the API never shows C(stringData) again.
"""

EXAMPLES = r"""
- name: Apply the platform's objects, remove what it no longer has, wait for the services
  censuschat.infra.k8s_apply:
    kubeconfig: /var/lib/environment/us-east-1.kubeconfig
    src: [manifests/]
    template: [namespaces.yml.j2]
    apply_set:
      name: platform
      namespace: kube-system
    prune: true
    wait: true
    wait_timeout: 180
    rollback_on_failure: true
  delegate_to: localhost

- name: Install an operator's definitions and wait for a resource of theirs
  censuschat.infra.k8s_apply:
    definition: "{{ lookup('ansible.builtin.file', 'operator.yml') }}"
    wait_for:
      - api_version: example.com/v1
        kind: Database
        namespace: data
        name: census
        condition: Ready
  delegate_to: localhost
"""

RETURN = r"""
objects:
  description: One entry for each object, in the order it was applied in.
  returned: when the set could be read
  type: list
  elements: dict
  contains:
    api_version:
      description: The object's apiVersion.
      type: str
    kind:
      description: The object's kind.
      type: str
    namespace:
      description: The object's namespace, empty for objects of the whole cluster.
      type: str
    name:
      description: The object's name.
      type: str
    result:
      description:
        - V(created), V(configured), V(unchanged), V(pruned), V(failed), V(kept) (no longer wanted, but not named for
          deletion), V(removed) or V(restored) (by a rollback).
      type: str
    message:
      description: Why, where there is something to say.
      type: str
    source:
      description: File and document it came from.
      type: str
counts:
  description: Number of objects by result.
  returned: when the set could be read
  type: dict
  sample: {"created": 2, "unchanged": 498}
failures:
  description: All that failed, one sentence each.
  returned: on failure
  type: list
  elements: str
rolled_back:
  description: Whether the set was put back as it was.
  returned: when the set could be read
  type: bool
seconds:
  description: Seconds by phase.
  returned: when the set could be read
  type: dict
  sample: {"read": 0.1, "plan": 0.02, "apply": 0.8}
requests:
  description: Requests made of the API.
  returned: when the set could be read
  type: int
  sample: 12
max_rss_kib:
  description: The most memory the module's process had resident, in KiB.
  returned: when the set could be read
  type: int
  sample: 41200
"""

from ansible.module_utils.basic import missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.kube.apply_task import run
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import MISSING
from ansible_collections.censuschat.infra.plugins.module_utils.kube.documents import MISSING as MISSING_YAML
from ansible_collections.censuschat.infra.plugins.module_utils.node.quiet import QuietModule


def main() -> None:
    module = QuietModule(
        argument_spec={
            "kubeconfig": {"type": "path"},
            "context": {"type": "str"},
            "definition": {"type": "raw"},
            "src": {"type": "list", "elements": "str", "default": []},
            "template": {"type": "list", "elements": "str", "default": []},
            "kustomize": {"type": "path"},
            "namespace": {"type": "str"},
            "apply_set": {
                "type": "dict",
                "options": {
                    "name": {"type": "str", "required": True},
                    "namespace": {"type": "str", "required": True},
                },
            },
            "prune": {"type": "bool", "default": False},
            "delete_named": {"type": "list", "elements": "str", "default": []},
            "field_manager": {"type": "str", "default": "censuschat-infra"},
            "force_conflicts": {"type": "bool", "default": False},
            "preflight": {"type": "bool", "default": False},
            "wait": {"type": "bool", "default": False},
            "wait_timeout": {"type": "int", "default": 300},
            "wait_for": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "api_version": {"type": "str", "default": "v1"},
                    "kind": {"type": "str", "required": True},
                    "name": {"type": "str", "required": True},
                    "namespace": {"type": "str"},
                    "condition": {"type": "str"},
                    "status": {"type": "str", "default": "True"},
                    "field": {"type": "str"},
                    "value": {"type": "str"},
                },
                "mutually_exclusive": [("condition", "field")],
                "required_one_of": [("condition", "field")],
            },
            "rollback_on_failure": {"type": "bool", "default": False},
            "parallelism": {"type": "int", "default": 8},
            "payload": {"type": "path"},
        },
        supports_check_mode=True,
    )
    if MISSING or MISSING_YAML:
        missing = missing_required_lib("urllib3" if MISSING else "PyYAML")
        module.fail_json(msg=missing, exception=MISSING or MISSING_YAML)
    result = run(module.params, check=module.check_mode, diff=module._diff)
    for warning in result.pop("warned", []):
        module.warn(warning)
    module.fail_json(**result) if result.get("msg") else module.exit_json(**result)


if __name__ == "__main__":
    main()
