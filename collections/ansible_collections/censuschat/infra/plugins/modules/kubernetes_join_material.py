#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_join_material
short_description: Admit nodes to a Kubernetes cluster for a few minutes
version_added: 0.1.0
description:
  - Makes a bootstrap token through the API that is gone by itself soon after.
  - Makes room for the nodes. Node objects of their names, left by machines that are empty now, are deleted.
  - With O(control_plane) it must run on a control plane. It then also puts the shared certificates into the cluster,
    encrypted with a key that only the result holds, and takes the nodes' old members out of etcd.
  - A refusal is part of the result, since C(no_log) would hide a failure's words. M(censuschat.infra.kubernetes_member)
    fails with it.
  - Use it for nodes that M(censuschat.infra.kubernetes_member) found not to be members.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  kubeconfig:
    description: An administrator's kubeconfig.
    type: path
    required: true
  names:
    description: Names of the nodes that join.
    type: list
    elements: str
    required: true
  version:
    description: Version of Kubernetes on those nodes, without v. One that Kubernetes does not let join is refused.
    type: str
    required: true
  control_plane:
    description: Whether they join as control planes.
    type: bool
    default: false
  kubeadm_config:
    description: kubeadm's configuration file on the control plane.
    type: path
    default: /etc/kubernetes/kubeadm.yaml
  ttl_s:
    description: How long the token is good for, in seconds.
    type: int
    default: 600
notes:
  - The result holds secrets. Give the task C(no_log).
"""

EXAMPLES = r"""
- name: Admit the node
  censuschat.infra.kubernetes_join_material:
    kubeconfig: /home/operator/.kube/us-east-1
    names: [use1-app2]
    version: 1.35.4
  delegate_to: localhost
  register: material
  no_log: true
"""

RETURN = r"""
join:
  description: The token, the authority's certificate and, for a control plane, the certificate key.
  returned: always
  type: dict
  contains:
    token:
      description: Bootstrap token; empty in check mode.
      type: str
    authority:
      description: Certificate of the cluster's authority.
      type: str
    certificate_key:
      description: Key of the certificates shared among control planes.
      type: str
    refusal:
      description: Why the nodes were not admitted; empty when they were.
      type: str
"""

import contextlib
import datetime
import os
import secrets
import string

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.api import Access, Api
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.member_host import Host
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.versions import refused_join
from ansible_collections.censuschat.infra.plugins.module_utils.node.quiet import QuietModule
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError, write_atomically

_LETTERS = string.ascii_lowercase + string.digits
_CERTIFICATES = "/run/censuschat-certificates.yaml"


def letters(number: int) -> str:
    return "".join(secrets.choice(_LETTERS) for position in range(number))


def make_token(api: Api, names: list[str], ttl_s: int) -> str:
    """Make a bootstrap token for the join of these nodes; returns it."""
    identifier, secret = letters(6), letters(16)
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ttl_s)
    token = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "bootstrap.kubernetes.io/token",
        "metadata": {"name": f"bootstrap-token-{identifier}", "namespace": "kube-system"},
        "stringData": {
            "description": f"the join of {', '.join(names)}",
            "token-id": identifier,
            "token-secret": secret,
            "expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "usage-bootstrap-authentication": "true",
            "auth-extra-groups": "system:bootstrappers:kubeadm:default-node-token",
        },
    }
    api.call("POST", "/api/v1/namespaces/kube-system/secrets", token)
    return f"{identifier}.{secret}"


def share_certificates(kubeadm_config: str) -> str:
    """Put the control planes' certificates into the cluster, encrypted; returns the key."""
    key = secrets.token_hex(32)
    with open(kubeadm_config, encoding="utf-8") as handle:
        configuration = handle.read()
    # By file: the command line of a process can be read by everybody.
    configuration = configuration.replace(
        "kind: InitConfiguration\n", f"kind: InitConfiguration\ncertificateKey: {key}\n"
    )
    try:
        write_atomically(_CERTIFICATES, configuration, "root", "root", 0o600)
        Commands().must(
            ["/usr/local/bin/kubeadm", "init", "phase", "upload-certs", "--upload-certs", "--config", _CERTIFICATES],
            "sharing the control planes' certificates",
        )
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_CERTIFICATES)
    return key


def run(module: AnsibleModule) -> dict[str, str]:
    """Admit the node; what its join needs. Raises NodeError."""
    p = module.params
    if module.check_mode and not os.path.exists(p["kubeconfig"]):
        # The cluster is only planned so far.
        return {"token": "", "authority": "", "certificate_key": ""}
    access = Access.of(p["kubeconfig"])
    with contextlib.closing(Api(access)) as api:
        serving = str(api.get("/version")["gitVersion"]).removeprefix("v")
        if refusal := refused_join(p["version"], serving):
            raise NodeError(f"{', '.join(p['names'])} cannot join: {refusal}")
        if module.check_mode:
            return {"token": "", "authority": access.authority, "certificate_key": ""}
        for name in p["names"]:
            if api.find(f"/api/v1/nodes/{name}"):
                api.call("DELETE", f"/api/v1/nodes/{name}")
            if p["control_plane"]:
                Host(name).forget_etcd_member(name)
        key = share_certificates(p["kubeadm_config"]) if p["control_plane"] else ""
        return {"token": make_token(api, p["names"], p["ttl_s"]), "authority": access.authority, "certificate_key": key}


def main() -> None:
    module = QuietModule(
        argument_spec={
            "kubeconfig": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
            "version": {"type": "str", "required": True},
            "control_plane": {"type": "bool", "default": False},
            "kubeadm_config": {"type": "path", "default": "/etc/kubernetes/kubeadm.yaml"},
            "ttl_s": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    try:
        join = run(module)
    except NodeError as error:
        module.exit_json(changed=False, join={"refusal": str(error)})
    module.exit_json(changed=True, join={**join, "refusal": ""})


if __name__ == "__main__":
    main()
