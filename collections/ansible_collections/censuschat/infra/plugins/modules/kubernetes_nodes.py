#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_nodes
short_description: Bring a cluster's Node objects to their state
version_added: 0.1.0
description:
  - Sets the labels of all given nodes, and whether control planes take pods.
  - Approves the request for a serving certificate of a kubelet that the API server cannot reach yet, if it asks for the
    given name and address only.
  - Waits, if wanted, until all given nodes are Ready.
  - Or deletes the Node objects of machines that have left, or only says what the cluster runs.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  kubeconfig:
    description: An administrator's kubeconfig.
    type: path
    required: true
  nodes:
    description: The nodes. Others of the cluster are not looked at.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The node's name in the cluster.
        type: str
        required: true
      address:
        description: The node's address. Needed for O(state=present).
        type: str
        default: ""
      labels:
        description: Labels to have. Others are left.
        type: dict
        default: {}
      schedulable:
        description: Whether a control plane takes pods.
        type: bool
        default: true
  state:
    description:
      - Whether the Node objects are there.
      - V(observed) changes nothing and returns RV(version) and RV(control_planes), which are empty when there is no
        cluster or it does not answer.
    type: str
    choices: [present, absent, observed]
    default: present
  wait_s:
    description: How long to wait for a node's registration and its kubelet's certificate, in seconds.
    type: int
    default: 60
  ready_s:
    description: How long to wait until all nodes are Ready, in seconds. 0 does not wait.
    type: int
    default: 0
requirements:
  - cryptography
"""

EXAMPLES = r"""
- name: Label the region's nodes and wait for them
  censuschat.infra.kubernetes_nodes:
    kubeconfig: /home/operator/.kube/us-east-1
    nodes:
      - name: use1-app1
        address: 10.77.1.11
        labels: {topology.kubernetes.io/zone: us-east-1a}
    ready_s: 60
  delegate_to: localhost
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode, a sentence each.
  returned: always
  type: list
  elements: str
  sample: ["use1-app1: label topology.kubernetes.io/zone=us-east-1a"]
version:
  description: Version that the API server runs, without v.
  returned: when O(state=observed)
  type: str
  sample: 1.35.4
control_planes:
  description: Names of the control planes that are Ready.
  returned: when O(state=observed)
  type: list
  elements: str
  sample: [use1-cp1, use1-cp2]
"""

import base64
import contextlib
import os
import time
import traceback
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.api import Access, Api, ApiError
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.nodes import (
    SERVING,
    Node,
    Request,
    described,
    merge_patch,
    ready,
    refused,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

try:
    from cryptography import x509

    MISSING = None
except ImportError:
    MISSING = traceback.format_exc()

_MERGE = "application/merge-patch+json"
_REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


def request_of(found: dict[str, Any]) -> Request:
    """What a CertificateSigningRequest object asks for."""
    request = x509.load_pem_x509_csr(base64.b64decode(found["spec"]["request"]))
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Request(found["spec"]["username"], (), ())
    return Request(
        found["spec"]["username"],
        tuple(names.get_values_for_type(x509.DNSName)),
        tuple(str(a) for a in names.get_values_for_type(x509.IPAddress)),
    )


class Cluster:
    """The Node objects of one cluster."""

    def __init__(self, api: Api, check_mode: bool) -> None:
        self.api = api
        self.check_mode = check_mode
        self.actions: list[str] = []

    def registered(self, node: Node, deadline: float) -> dict[str, Any]:
        """The Node object; waits for its registration, except in check mode."""
        while True:
            found = self.api.find(f"/api/v1/nodes/{node.name}")
            if found or self.check_mode:
                return found or {}
            if time.monotonic() > deadline:
                raise NodeError(
                    f"{node.name} has not registered with the cluster: look at `journalctl -u kubelet` on it"
                )
            time.sleep(0.3)

    def settle(self, node: Node, deadline: float) -> None:
        """Labels, taints and the kubelet's serving certificate of one node."""
        observed = self.registered(node, deadline)
        if patch := merge_patch(node, observed):
            self.actions.append(f"{node.name}: {described(patch)}")
            if not self.check_mode:
                self.api.call("PATCH", f"/api/v1/nodes/{node.name}", patch, _MERGE)
        why = ""
        while not self.reached(node):
            why = self.approve(node) or why
            if self.check_mode:
                return
            if time.monotonic() > deadline:
                raise NodeError(
                    f"the API server does not reach the kubelet of {node.name}: "
                    f"{why or 'its certificate is not there yet'}. Look at `journalctl -u kubelet` on it"
                )
            time.sleep(0.3)

    def reached(self, node: Node) -> bool:
        """Whether the API server reaches the kubelet and trusts its certificate."""
        try:
            self.api.call("GET", f"/api/v1/nodes/{node.name}/proxy/healthz")
        except ApiError as error:
            # 4xx is the kubelet's own answer; without a trusted certificate there is none.
            return 400 <= error.status < 500 and error.status not in (404, 429)
        return True

    def approve(self, node: Node) -> str:
        """Approve what the kubelet asks for; why not, when it asks for something else."""
        why = ""
        selector = f"?fieldSelector=spec.signerName%3D{SERVING.replace('/', '%2F')}"
        for found in self.api.get(_REQUESTS + selector).get("items") or ():
            if found["spec"].get("username") != f"system:node:{node.name}" or found.get("status", {}).get("conditions"):
                continue
            name = found["metadata"]["name"]
            if why := refused(request_of(found), node):
                why = f"its request {name} for a certificate is refused, as {why}"
                continue
            self.actions.append(f"{node.name}: approve the kubelet's certificate request {name}")
            if not self.check_mode:
                reason = {"type": "Approved", "status": "True", "reason": "CensusChatInventory"}
                reason["message"] = "Name and address are those of the inventory."
                found["status"] = {"conditions": [reason]}
                self.api.call("PUT", f"{_REQUESTS}/{name}/approval", found)
        return why

    def wait_ready(self, nodes: list[Node], deadline: float) -> None:
        waiting = list(nodes)
        while waiting:
            said = {node.name: ready(self.registered(node, deadline)) for node in waiting}
            waiting = [node for node in waiting if said[node.name]]
            if waiting and time.monotonic() > deadline:
                raise NodeError("not Ready in time: " + "; ".join(f"{n.name}: {said[n.name]}" for n in waiting))
            if waiting:
                time.sleep(0.5)

    def forget(self, node: Node) -> None:
        if self.api.find(f"/api/v1/nodes/{node.name}"):
            self.actions.append(f"{node.name}: delete the Node object")
            if not self.check_mode:
                self.api.call("DELETE", f"/api/v1/nodes/{node.name}")


def run(module: AnsibleModule) -> list[str]:
    """What was done, a sentence each. Raises NodeError."""
    p = module.params
    nodes = [Node(n["name"], n["address"], n["labels"], n["schedulable"]) for n in p["nodes"]]
    if module.check_mode and not os.path.exists(p["kubeconfig"]):
        # The cluster is only planned so far.
        return [f"{node.name}: label {', '.join(node.labels)}" for node in nodes if node.labels]
    with contextlib.closing(Api(Access.of(p["kubeconfig"]))) as api:
        cluster = Cluster(api, module.check_mode)
        deadline = time.monotonic() + p["wait_s"]
        for node in nodes:
            if p["state"] == "present":
                cluster.settle(node, deadline)
            else:
                cluster.forget(node)
        if p["ready_s"] and p["state"] == "present" and not module.check_mode:
            cluster.wait_ready(nodes, time.monotonic() + p["ready_s"])
        return cluster.actions


def observe(kubeconfig: str) -> dict[str, Any]:
    """What the cluster runs; nothing when there is none that answers."""
    try:
        with contextlib.closing(Api(Access.of(kubeconfig))) as api:
            version = str(api.get("/version")["gitVersion"]).removeprefix("v")
            planes = api.get("/api/v1/nodes?labelSelector=node-role.kubernetes.io%2Fcontrol-plane").get("items") or []
    except ApiError:
        # Whether that is a fault is not this call's question: a cluster that is to be repaired does not answer either.
        return {"version": "", "control_planes": []}
    return {"version": version, "control_planes": sorted(p["metadata"]["name"] for p in planes if not ready(p))}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "kubeconfig": {"type": "path", "required": True},
            "nodes": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "address": {"type": "str", "default": ""},
                    "labels": {"type": "dict", "default": {}},
                    "schedulable": {"type": "bool", "default": True},
                },
            },
            "state": {"type": "str", "choices": ["present", "absent", "observed"], "default": "present"},
            "wait_s": {"type": "int", "default": 60},
            "ready_s": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=missing_required_lib("cryptography"), exception=MISSING)
    if module.params["state"] == "observed":
        module.exit_json(changed=False, actions=[], **observe(module.params["kubeconfig"]))
    try:
        actions = run(module)
    except NodeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(actions), actions=actions, diff={"before": "", "after": "".join(f"{a}\n" for a in actions)}
    )


if __name__ == "__main__":
    main()
