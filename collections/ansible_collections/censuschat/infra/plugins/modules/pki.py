#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pki
short_description: Keep a certificate authority and the certificates of all nodes in one directory
version_added: 0.1.0
description:
  - Ensures an authority and one certificate with key for every node given, all in one call.
  - A certificate is issued again when it is missing, is about to expire, carries other names than asked, was not
    signed by this authority, or does not belong to its key.
  - A renewed authority keeps its key, so certificates signed before stay good.
  - Keys are ECDSA P-256. Node certificates serve as server and as client certificates.
  - Certificates of nodes that are no longer given are left where they are.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  path:
    description:
      - The directory. It is created with mode 0700; keys have mode 0600 and belong to the user who runs the module.
    type: path
    required: true
  common_name:
    description: The authority's common name. An authority of another name in the directory is refused.
    type: str
    required: true
  nodes:
    description: The nodes to have certificates for.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The node's name. It is the common name, and V(NAME.crt) and V(NAME.key) are the files.
        type: str
        required: true
      sans:
        description: DNS names and IP addresses that the node answers to.
        type: list
        elements: str
        required: true
  validity_days:
    description: How long a node's certificate is valid, in days.
    type: int
    default: 365
  ca_validity_days:
    description: How long the authority is valid, in days.
    type: int
    default: 3650
  renew_before_days:
    description: A certificate that expires within so many days is issued again.
    type: int
    default: 30
attributes:
  platform:
    platforms: posix
requirements:
  - cryptography >= 42
notes:
  - Meant for the controller (C(delegate_to=localhost), C(run_once=true)). Private keys never appear in its result.
"""

EXAMPLES = r"""
- name: Issue the certificates of all nodes
  censuschat.infra.pki:
    path: /var/lib/environment/pki
    common_name: CensusChat lab
    nodes:
      - name: use1-db1
        sans: [use1-db1, 10.77.1.21, localhost, 127.0.0.1]
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
actions:
  description: What was issued, or would be in check mode. Empty when all is in order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: The node's name, or C(ca) for the authority.
      type: str
    detail:
      description: Why it was issued.
      type: str
  sample:
    - name: use1-db1
      detail: "issue: expires 2027-01-02"
ca_certificate:
  description: Path of the authority's certificate.
  returned: always
  type: str
  sample: /var/lib/environment/pki/ca.crt
"""

import datetime

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.pki.plan import (
    AUTHORITY,
    NodeWant,
    PkiError,
    Want,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.pki.store import MISSING, Store


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "common_name": {"type": "str", "required": True},
            "nodes": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "sans": {"type": "list", "elements": "str", "required": True},
                },
            },
            "validity_days": {"type": "int", "default": 365},
            "ca_validity_days": {"type": "int", "default": 3650},
            "renew_before_days": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=missing_required_lib("cryptography"), exception=MISSING)
    p = module.params
    want = Want(
        common_name=p["common_name"],
        nodes=tuple(NodeWant(n["name"], tuple(n["sans"])) for n in p["nodes"]),
        validity_days=p["validity_days"],
        ca_validity_days=p["ca_validity_days"],
        renew_before_days=p["renew_before_days"],
    )
    store = Store(p["path"])
    now = datetime.datetime.now(datetime.UTC)
    try:
        want.check()
        actions = plan(want, store.observe([n.name for n in want.nodes]), now)
        if not module.check_mode:
            store.apply(want, actions, now)
    except PkiError as error:
        module.fail_json(msg=f"{p['path']}: {error}")
    module.exit_json(
        changed=bool(actions),
        actions=[a.public() for a in actions],
        ca_certificate=str(store.certificate(AUTHORITY)),
        diff=[
            {"before_header": a.name, "after_header": a.name, "before": "", "after": f"issue: {a.reason}\n"}
            for a in actions
        ],
    )


if __name__ == "__main__":
    main()
