#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: ledgers in, a look or a wait, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: service_clients
short_description: Wait until every client that was being served is served by a region
version_added: 0.1.0
description:
  - Reads the ledgers that the service's clients keep, and waits until each client that runs and was ever served has its
    newest acknowledgement from O(region). A client that has stopped, or was never served, is not waited for.
  - It changes nothing.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  check_mode:
    details:
      - Looks once. Clients that are not served by the region yet are returned as RV(missing) and are no failure,
        because the task would wait for them.
  diff_mode:
    support: none
  platform:
    platforms: posix
options:
  ledgers:
    description: Directory of the clients' ledgers, files of JSON lines named C(*.jsonl).
    type: path
    required: true
  region:
    description: The region that must serve them.
    type: str
    required: true
  wait_s:
    description: The longest wait, in seconds.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Wait until every client that was being served is served by the region
  censuschat.infra.service_clients:
    ledgers: /var/lib/environment/ledgers
    region: us-west-2
  delegate_to: localhost
"""

RETURN = r"""
missing:
  description: Clients that run and are not served by the region.
  returned: always
  type: list
  elements: str
  sample: ["fresh"]
served:
  description: Clients that are.
  returned: always
  type: list
  elements: str
  sample: ["kept"]
"""

import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.service.clients import LedgerError, read, waiting

POLL_S = 0.2


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "ledgers": {"type": "path", "required": True},
            "region": {"type": "str", "required": True},
            "wait_s": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    given = module.params
    deadline = time.monotonic() + given["wait_s"]
    while True:
        try:
            missing, served = waiting(read(Path(given["ledgers"])), given["region"], time.monotonic())
        except LedgerError as error:
            module.fail_json(msg=f"a client's ledger cannot be read: {error}")
        if not missing or module.check_mode:
            module.exit_json(changed=False, missing=missing, served=served)
        if time.monotonic() > deadline:
            module.fail_json(
                msg=f"not served by {given['region']} after {given['wait_s']} s: {', '.join(missing)}. Look at what "
                "the service's name resolves to for them",
                missing=missing,
                served=served,
            )
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
