#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The lab's network, brought to its state in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_fabric
short_description: Bring the lab's network to its state
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Makes or removes the lab's network namespaces, bridges, links, addresses, routes and packet filter, and cuts
    sites off from everything else.
  - The machine itself gets one link and one route; its packet filter and forwarding are not touched.
attributes:
  check_mode:
    support: full
    description: Reports what would be done and does nothing.
  diff_mode:
    support: none
    description: The planned actions are returned instead.
  platform:
    support: full
    platforms: debian
    description: The machine that runs the lab.
options:
  inventory:
    description: The inventory directory that describes the lab. Not needed for O(state=absent).
    type: path
  state:
    description: C(present) builds the network and keeps the cut set unless O(cut) is given; C(absent) removes it.
    type: str
    choices: [present, absent]
    default: present
  cut:
    description: The sites that shall be cut off, exactly these. Without it the cut set stays as it is.
    type: list
    elements: str
  cut_off:
    description: Cut this site off too, and leave the others as they are.
    type: str
  heal:
    description: Heal this site, and leave the others as they are.
    type: str
"""

EXAMPLES = r"""
- name: Build the network
  lab_fabric:
    inventory: "{{ inventory_dir }}"

- name: Cut a region off
  lab_fabric:
    inventory: "{{ inventory_dir }}"
    cut_off: us-east-1
"""

RETURN = r"""
actions:
  description: What was done, or would be.
  type: list
  elements: str
  returned: always
cut:
  description: The sites that are cut off afterwards.
  type: list
  elements: str
  returned: always
monotonic:
  description: The machine's monotonic clock, in seconds, right after the last action; ledgers use the same clock.
  type: float
  returned: always
"""

import json
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import fabric
from lab.module import INVENTORY_AND_STATE, PRESENT_NEEDS_INVENTORY, answer, described
from lab.paths import STATE


def bring(module: AnsibleModule) -> dict[str, Any]:
    given = module.params
    only_cut = given["cut_off"] or given["heal"]
    observed = fabric.observe(links=not only_cut)
    if given["state"] == "absent":
        actions = fabric.plan_absent(observed)
        if not module.check_mode:
            fabric.apply(actions)
        return {"actions": [action.what for action in actions], "cut": [], "monotonic": time.monotonic()}
    lab = described(module)
    cut = given["cut"]
    if only_cut:
        if fabric.ROUTER not in observed.spaces:
            raise fabric.FabricError("the lab's network is not there; start it with: lab up")
        names = {site.name for site in lab.sites if str(site.network) in observed.cut}
        cut = sorted((names | {given["cut_off"]}) if given["cut_off"] else (names - {lab.site(given["heal"]).name}))
        actions = fabric.plan_cut(lab, observed.cut, cut)
    else:
        actions = fabric.plan(lab, observed, cut)
    if not module.check_mode:
        fabric.apply(actions)
    now = time.monotonic()
    if only_cut and actions and not module.check_mode:
        # When a region was lost is what every figure of a fail-over is compared with: keep it beside the ledgers.
        event = {"t": now, "wall": time.time(), "event": "cut" if given["cut_off"] else "heal", "region": only_cut}
        with (STATE / "log" / "events.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps(event) + "\n")
    if cut is None:
        cut = [site.name for site in lab.sites if str(site.network) in observed.cut]
    return {"actions": [action.what for action in actions], "cut": list(cut), "monotonic": now}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **INVENTORY_AND_STATE,
            "cut": {"type": "list", "elements": "str"},
            "cut_off": {"type": "str"},
            "heal": {"type": "str"},
        },
        mutually_exclusive=[("cut", "cut_off", "heal")],
        required_if=PRESENT_NEEDS_INVENTORY,
        supports_check_mode=True,
    )
    answer(module, bring)


if __name__ == "__main__":
    main()
