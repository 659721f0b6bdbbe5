#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: patroni_founding
short_description: Let one region found the replicated database, once
version_added: 0.1.0
description:
  - Every node's own Patroni configuration makes a new region a standby of the others. The one region that is to found a
    database is told so by this module, before Patroni starts there. It writes the cluster's dynamic configuration,
    without a standby section, into the region's empty store.
  - It does so only when neither this region nor any other has a database, and fails when that cannot be known. A region
    that lost everything therefore returns as a clone of the others, never as a second database.
  - The write is one transaction that demands that nothing is there yet, so all nodes of the region may run it at once.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.tls_files
options:
  region:
    description: Name of the region that founds, for messages.
    type: str
    required: true
  store:
    description: Client URLs of the region's etcd.
    type: list
    elements: str
    required: true
  peers:
    description: Client URLs of the other regions' etcd, by region.
    type: dict
    default: {}
  path:
    description: Where Patroni keeps the cluster in the store, its namespace and scope.
    type: str
    default: /patroni/censuschat
  config:
    description: The dynamic configuration to found the cluster with.
    type: dict
    required: true
  ca_file:
    required: true
  cert_file:
    required: true
  key_file:
    required: true
attributes:
  diff_mode:
    support: none
  platform:
    platforms: posix
notes:
  - In check mode a store that does not answer counts as empty, since on bare nodes there is none yet.
"""

EXAMPLES = r"""
- name: Let the primary region found the database
  censuschat.infra.patroni_founding:
    region: us-east-1
    store: [https://10.77.1.21:2379, https://10.77.1.22:2379, https://10.77.1.23:2379]
    peers:
      us-west-2: [https://10.77.2.21:2379, https://10.77.2.22:2379, https://10.77.2.23:2379]
    config:
      ttl: 20
      loop_wait: 5
    ca_file: /etc/censuschat/pki/ca.crt
    cert_file: /etc/censuschat/pki/node.crt
    key_file: /etc/censuschat/pki/node.key
  become: true
"""

RETURN = r"""
reason:
  description: Why the region founds the database, or does not.
  returned: always
  type: str
  sample: us-east-1 has database 7442512315246514213
"""

import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.lease.etcd import Etcd, EtcdError, Tls, absent, put
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.founding import FoundingError, Store, plan
from ansible_collections.censuschat.infra.plugins.module_utils.tls_files import tls_files


def observe(region: str, endpoints: list[str], path: str, tls: Tls, bare: bool) -> Store:
    """What the region's store holds below `path`. `bare`: one that does not answer counts as empty."""
    try:
        client = Etcd(endpoints, tls, request_timeout_s=2.0, budget_s=6.0)
        try:
            held = {kv.key[len(path) :]: kv.value for kv in client.read(path + "/")}
        finally:
            client.close()
    except EtcdError as error:
        return Store(region, reachable=bare, reason=str(error))
    return Store(region, reachable=True, system=held.get("/initialize", ""), configured="/config" in held)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "region": {"type": "str", "required": True},
            "store": {"type": "list", "elements": "str", "required": True},
            "peers": {"type": "dict", "default": {}},
            "path": {"type": "str", "default": "/patroni/censuschat"},
            "config": {"type": "dict", "required": True},
            **tls_files(required=True),
        },
        supports_check_mode=True,
    )
    p = module.params
    if "standby_cluster" in p["config"]:
        module.fail_json(msg="config: a region that founds a database cannot have a standby_cluster section")
    tls = Tls(p["ca_file"], p["cert_file"], p["key_file"])
    path = p["path"].rstrip("/")
    try:
        own = observe(p["region"], p["store"], path, tls, module.check_mode)
        # Only a region without a database needs to look at the others.
        peers = (
            [observe(name, urls, path, tls, module.check_mode) for name, urls in p["peers"].items()]
            if own.virgin
            else []
        )
        found, reason = plan(own, peers)
        if found and not module.check_mode:
            client = Etcd(p["store"], tls, request_timeout_s=2.0, budget_s=6.0)
            try:
                nothing = [absent(f"{path}/config"), absent(f"{path}/initialize")]
                if not client.transaction(nothing, [put(f"{path}/config", json.dumps(p["config"]))]):
                    found, reason = False, f"{p['region']} was founded by another node just now"
            finally:
                client.close()
    except (FoundingError, EtcdError) as error:
        module.fail_json(msg=f"founding the database: {error}")
    module.exit_json(changed=found, reason=reason)


if __name__ == "__main__":
    main()
