#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one grant and one token out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: k8s_break_glass
short_description: Take an emergency access to a cluster that ends by itself, or end it now
version_added: 0.1.0
description:
  - O(state=granted) makes a grant, a Secret that says who asked and why, and a token of the emergency account that the
    role P(censuschat.infra.kubernetes_platform#role) set up. The API server gives the token its end and refuses it
    afterwards; deleting the grant ends it at once. The token is written into a kubeconfig and appears nowhere else.
  - O(state=revoked) deletes the grant of that name, or all grants.
  - Works on every cluster, EKS too, as whoever may make tokens of the emergency account.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  check_mode:
    details:
      - The API server is asked for the grant with a dry run, so that it refuses what it would refuse.
options:
  kubeconfig:
    description: The kubeconfig of the person on call. Empty for the usual places.
    type: path
  context:
    description: Context of the kubeconfig; empty for its current one.
    type: str
    default: ""
  state:
    description: Whether there is an emergency access.
    type: str
    choices: [granted, revoked]
    default: granted
  name:
    description:
      - Name of the grant, for example the incident's. Required for O(state=granted). A grant that exists cannot be
        extended; revoke it, or take another name.
      - Empty with O(state=revoked) for all grants.
    type: str
    default: ""
  reason:
    description: Why the access is needed, in 10 characters or more. Kept with the grant and in the audit log.
    type: str
    default: ""
  duration_s:
    description: How long the access lasts, in seconds, at least 600. The cluster's own limit is an hour by default.
    type: int
    default: 1800
  dest:
    description: Where to write the kubeconfig of the emergency account, readable by its owner only.
    type: path
  namespace:
    description: Namespace of the emergency account.
    type: str
    default: break-glass
  account:
    description: Name of the emergency account.
    type: str
    default: break-glass
requirements:
  - urllib3
seealso:
  - module: censuschat.infra.k8s_apply
"""

EXAMPLES = r"""
- name: Take an emergency access for half an hour
  censuschat.infra.k8s_break_glass:
    name: inc-4711
    reason: api-gateway crash-loops after the rollout, rolling back by hand
    dest: ~/inc-4711.kubeconfig
  delegate_to: localhost

- name: End it before its time
  censuschat.infra.k8s_break_glass:
    state: revoked
    name: inc-4711
  delegate_to: localhost
"""

RETURN = r"""
expires:
  description: When the API server stops accepting the token.
  returned: when an access was granted
  type: str
  sample: "2026-11-21T15:30:00Z"
requested_by:
  description: Who the API server says asked.
  returned: O(state=granted)
  type: str
  sample: alice@censuschat.test
revoked:
  description: The grants that were deleted, or would be in check mode, a line each.
  returned: O(state=revoked)
  type: list
  elements: str
  sample: ["inc-4711: alice@censuschat.test since 2026-11-21T15:00:00Z, rolling back by hand"]
"""

import json
import os
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import MISSING, ApiError, Client
from ansible_collections.censuschat.infra.plugins.module_utils.kube.kubeconfig import load
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.access import GRANT_TYPE
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.grant import (
    Wanted,
    described,
    kubeconfig,
)
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.reader import PlatformError

_REVIEW = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}


def write(path: str, text: str) -> None:
    """Replaces the file in one step; nobody but its owner can read it at any moment."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".break-glass-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def granted(module: AnsibleModule, client: Client) -> dict[str, Any]:
    """The result of a new access. Raises KubeError, PlatformError, OSError."""
    p = module.params
    review = client.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=_REVIEW)
    asked = str(review["status"]["userInfo"]["username"])
    wanted = Wanted(p["name"], p["namespace"], p["account"], p["reason"], asked, p["duration_s"])
    wanted.check()
    if not os.path.isdir(os.path.dirname(os.path.abspath(p["dest"]))):
        raise PlatformError(f"dest: the directory of {p['dest']} does not exist")
    path = f"/api/v1/namespaces/{wanted.namespace}"
    query = {"dryRun": "All"} if module.check_mode else {}
    try:
        made = client.request("POST", f"{path}/secrets", body=wanted.grant(), query=query)
    except ApiError as error:
        if error.status == 409:
            raise PlatformError(
                f"a grant named {wanted.name} exists and cannot be extended: revoke it, or take another name"
            ) from error
        raise
    if module.check_mode:
        return {"requested_by": asked}
    try:
        answer = client.request(
            "POST",
            f"{path}/serviceaccounts/{wanted.account}/token",
            body=wanted.request(made["metadata"]["uid"]),
        )
        access = client.access
        token = answer["status"]["token"]
        document = kubeconfig(access.server, access.ca, access.tls_server_name, token, wanted.account)
        write(p["dest"], json.dumps(document, indent=1) + "\n")
    except (KubeError, OSError):
        # A grant without a token would stand there for an access that nobody has.
        client.request("DELETE", f"{path}/secrets/{wanted.name}")
        raise
    return {"requested_by": asked, "expires": answer["status"]["expirationTimestamp"]}


def revoked(module: AnsibleModule, client: Client) -> dict[str, Any]:
    """The result of ending one access or all. Raises KubeError."""
    p = module.params
    path = f"/api/v1/namespaces/{p['namespace']}/secrets"
    found = [
        secret
        for secret in client.request("GET", path).get("items") or ()
        if secret.get("type") == GRANT_TYPE and p["name"] in ("", secret["metadata"]["name"])
    ]
    for secret in found:
        if not module.check_mode:
            client.request("DELETE", f"{path}/{secret['metadata']['name']}")
    return {"revoked": [described(secret) for secret in found]}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "kubeconfig": {"type": "path"},
            "context": {"type": "str", "default": ""},
            "state": {"type": "str", "choices": ["granted", "revoked"], "default": "granted"},
            "name": {"type": "str", "default": ""},
            "reason": {"type": "str", "default": ""},
            "duration_s": {"type": "int", "default": 1800},
            "dest": {"type": "path"},
            "namespace": {"type": "str", "default": "break-glass"},
            "account": {"type": "str", "default": "break-glass"},
        },
        required_if=[("state", "granted", ("name", "reason", "dest"))],
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=missing_required_lib("urllib3"), exception=MISSING)
    try:
        client = Client(load(module.params["kubeconfig"] or "", module.params["context"]))
        if module.params["state"] == "granted":
            module.exit_json(changed=True, **granted(module, client))
        result = revoked(module, client)
    except (KubeError, PlatformError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(result["revoked"]), **result)


if __name__ == "__main__":
    main()
