#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: addresses in, one round of questions or as many as it takes, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: service_answers
short_description: Wait until the service answers through every address, and prove that it takes and gives back a row
version_added: 0.1.0
description:
  - Asks the application through each of its addresses, all side by side, until each does what is wanted.
  - O(state=ready) waits until each leads to an application that can write, in O(region). It changes nothing.
  - O(state=written) has one row of O(mark) written through each address and read back. A row that is there already is
    read back only, so that a second run with the same mark changes nothing.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  check_mode:
    details:
      - Asks each address once and writes nothing. What is not as wanted yet is returned as RV(missing) and is no
        failure, because the task would wait for it.
  platform:
    platforms: posix
options:
  urls:
    description: The service's addresses, as V(http://ADDRESS:PORT).
    type: list
    elements: str
    required: true
  region:
    description: The region that must answer.
    type: str
    required: true
  state:
    description: What each address must do.
    type: str
    choices: [ready, written]
    default: ready
  mark:
    description: Names the rows, for instance a run's id. Needed for O(state=written).
    type: str
  wait_s:
    description: The longest wait, in seconds.
    type: int
    default: 60
notes:
  - Runs where the addresses can be reached, usually on the controller.
"""

EXAMPLES = r"""
- name: Wait until the application can write
  censuschat.infra.service_answers:
    urls: [http://10.77.2.11:30080, http://10.77.2.12:30080]
    region: us-west-2
  delegate_to: localhost

- name: Write a row through every application node and read it back
  censuschat.infra.service_answers:
    state: written
    mark: "{{ runbook_run }}"
    urls: [http://10.77.2.11:30080, http://10.77.2.12:30080]
    region: us-west-2
  delegate_to: localhost
"""

RETURN = r"""
missing:
  description: What is not as wanted, one sentence an address.
  returned: always
  type: list
  elements: str
  sample: ["http://10.77.2.11:30080: HTTP 503 {}"]
actions:
  description: Rows that were written, or would be in check mode.
  returned: always
  type: list
  elements: str
  sample: ["write row runbook-20261121-10.77.2.11 through http://10.77.2.11:30080"]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.service.answers import (
    Plan,
    observe,
    plan,
    row,
    until,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "urls": {"type": "list", "elements": "str", "required": True},
            "region": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["ready", "written"], "default": "ready"},
            "mark": {"type": "str"},
            "wait_s": {"type": "int", "default": 60},
        },
        required_if=[("state", "written", ("mark",))],
        supports_check_mode=True,
    )
    given = module.params
    urls, region, state, mark = given["urls"], given["region"], given["state"], given["mark"] or ""
    if module.check_mode:
        seen = observe(urls, region, state, mark)
        work = plan(seen, state)
        missing = [f"{s.url}: {s.fault}" for s in seen if s.fault]
    else:
        done = until(urls, region, state, mark, given["wait_s"])
        work = Plan(tuple(d.url for d in done if d.written))
        missing = [f"{d.url}: {d.fault}" for d in done if d.fault]
    actions = work.actions(lambda url: row(mark, url))
    result = {
        "changed": bool(actions),
        "missing": missing,
        "actions": actions,
        # Without the mark: a plan and the run that carries it out are to show the same.
        "diff": {"before": "", "after": "".join(f"one row through {url}\n" for url in work.write)},
    }
    if missing and not module.check_mode:
        module.fail_json(
            msg=f"the service in {region} is not {state} through {len(missing)} of {len(urls)} addresses after "
            f"{given['wait_s']} s: {'; '.join(missing)}. Look at its pods in the region's cluster",
            **result,
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
