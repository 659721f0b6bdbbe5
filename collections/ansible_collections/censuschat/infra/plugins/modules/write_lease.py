#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one settlement with the lease store, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: write_lease
short_description: Give the right to write to a region, or see who has it
version_added: 0.1.0
description:
  - The right to write is a lease with a time to live in the lease store, an etcd with a member in each region and one
    at a witness site. The guards of the holding region's database nodes renew it; a region that cannot renew closes its
    database.
  - O(state=held) takes the lease for a region. It waits until the present lease has ended and no gate of its region can
    be open any more, then takes the next epoch in one transaction, so that of several takers one wins. It refuses when
    the holder keeps renewing, because the holder is alive.
  - O(state=handed_over) moves the lease from a living holder. The holder's guards close the database, end sessions,
    ship everything and step down. Only then does the lease change, in one transaction.
  - O(state=released) ends a lease that opened no gate, such as that of a rehearsal, and refuses any other.
  - After a change the module waits until a guard of the region has renewed the lease. A lease that nobody renews ends
    by itself.
  - Run it on a node with a certificate for the lease store. It changes the lease only; promotion and demotion of the
    database follow from it by the guards.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.tls_files
attributes:
  check_mode:
    details:
      - The plan of one observation. A wait is reported as a change, because the lease would be taken after it.
      - With O(state=held) another region's lease is watched for up to 0.6 O(ttl_s), so that a holder that renews is
        refused as it would be without check mode.
      - On a node that has no certificate yet the plan is that of a new environment, with a warning.
options:
  state:
    description: What is wanted of the lease.
    type: str
    choices: [observed, held, handed_over, released]
    default: observed
  region:
    description: The region that is to hold the lease, or to release it. Required unless O(state=observed).
    type: str
  environment_name:
    description: Name of the environment, part of the lease's keys.
    type: str
    required: true
  endpoints:
    description: URLs of the lease store's members.
    type: list
    elements: str
    required: true
  ca_file:
    default: /etc/censuschat/pki/ca.crt
  cert_file:
    default: /etc/censuschat/pki/node.crt
  key_file:
    default: /etc/censuschat/pki/node.key
  ttl_s:
    description: Seconds the lease outlives its last renewal. Guards refuse a lease that is shorter than theirs.
    type: int
    default: 15
  wait_s:
    description: The longest wait for the present holder, in seconds.
    type: int
    default: 60
  confirm_s:
    description:
      - The longest wait for the first renewal by a guard of the new holder, in seconds. V(0) does not wait, for a lease
        that no guard watches.
    type: int
    default: 20
  initial:
    description:
      - Take the lease only if nobody ever held it, as for a new environment. Otherwise nothing changes, whoever has it.
    type: bool
    default: false
  require_shipped:
    description:
      - With O(state=handed_over), give the lease on only after the holder proved that the new holder has received all.
      - V(false) is for a holder whose guards live but whose database is lost. Writes that were not shipped are lost.
    type: bool
    default: true
  epoch_floor:
    description:
      - Take an epoch above this one. Needed only for a lease store that was lost and built anew, because guards refuse
        a store that has forgotten an epoch they have seen; C(censuschat-guard status) says which.
    type: int
    default: 0
  taken_by:
    description: Who or what takes the lease, kept with the epoch for people to read.
    type: str
    default: write_lease
notes:
  - Run it on a database node of the region that is to have the lease if there is one. The guard there has been watching
    the holder, which saves up to 14 seconds of O(state=held) against a node that begins to watch.
  - Each wait has an end, so the module always returns. Run again after a failure, it goes on where things stand.
seealso:
  - module: censuschat.infra.node_state
"""

EXAMPLES = r"""
- name: Give a new environment its first writer
  censuschat.infra.write_lease:
    state: held
    initial: true
    region: us-east-1
    environment_name: lab
    endpoints: "{{ write_guard_endpoints }}"
  become: true
  run_once: true

- name: Fence the lost region and take its place
  censuschat.infra.write_lease:
    state: held
    region: us-west-2
    environment_name: lab
    endpoints: "{{ write_guard_endpoints }}"
    wait_s: 45
  become: true

- name: Move the right to write back, losing nothing
  censuschat.infra.write_lease:
    state: handed_over
    region: us-east-1
    environment_name: lab
    endpoints: "{{ write_guard_endpoints }}"
  become: true

- name: End the lease that a rehearsal took
  censuschat.infra.write_lease:
    state: released
    region: us-west-2
    environment_name: lab-drill
    endpoints: "{{ write_guard_endpoints }}"
  become: true

- name: See who may write
  censuschat.infra.write_lease:
    environment_name: lab
    endpoints: "{{ write_guard_endpoints }}"
  become: true
  register: lease
"""

RETURN = r"""
holder:
  description: The region that holds the lease now; null when nobody does.
  returned: always
  type: str
  sample: us-west-2
epoch:
  description: The newest epoch, 0 when nobody ever held the lease.
  returned: always
  type: int
  sample: 4
last_region:
  description: The region of the newest epoch, also after its lease has ended; null when nobody ever held it.
  returned: always
  type: str
  sample: us-west-2
previous_region:
  description: The region of the newest epoch before this module ran; null when nobody ever held it.
  returned: always
  type: str
  sample: us-east-1
previous_epoch:
  description: The newest epoch before this module ran.
  returned: always
  type: int
  sample: 3
method:
  description:
    - How the right to write was proven to be free, one of V(already_held), V(expired), V(handed_over), V(never_held).
    - In check mode, how it would be.
  returned: success
  type: str
  sample: expired
waited_s:
  description: Seconds from the start until the lease was taken; the price of the proof.
  returned: always
  type: float
  sample: 13.4
gates:
  description: Nodes that are registered to open their database under the present lease.
  returned: always
  type: list
  elements: str
  sample: [usw2-db1, usw2-db2, usw2-db3]
handover_to:
  description: The region a hand-over in progress goes to; null when there is none.
  returned: always
  type: str
  sample: null
actions:
  description: What was done, or in check mode would be done next, in words.
  returned: success
  type: list
  elements: str
  sample: ["take the lease for us-west-2 (epoch 3 of us-east-1 has ended)"]
"""

import dataclasses
import json
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.lease.etcd import Etcd, EtcdError, Tls
from ansible_collections.censuschat.infra.plugins.module_utils.lease.holding import Outcome, Request, settle
from ansible_collections.censuschat.infra.plugins.module_utils.lease.model import LeaseError, StoreView
from ansible_collections.censuschat.infra.plugins.module_utils.lease.store import LeaseStore
from ansible_collections.censuschat.infra.plugins.module_utils.tls_files import tls_files


def facts_of(view: StoreView) -> dict[str, Any]:
    handover = view.active_handover()
    return {
        "holder": view.lease.region if view.lease else None,
        "epoch": view.epoch.epoch if view.epoch else 0,
        "last_region": view.epoch.region if view.epoch else None,
        "gates": sorted(gate.node for gate in view.open_gates()),
        "handover_to": handover.to if handover else None,
    }


def result_of(outcome: Outcome, holder: str | None, check_mode: bool) -> dict[str, Any]:
    before, after = facts_of(outcome.previous), facts_of(outcome.view)
    shown = after
    if check_mode and outcome.changed:
        taken = {"epoch": before["epoch"] + 1, "last_region": holder} if holder not in (None, before["holder"]) else {}
        shown = {**after, "holder": holder, **taken}
    # Whether a lost holder's lease has ended yet is a matter of seconds, and no part of what changes.
    names = ("epoch", "last_region") if holder else ("holder",)
    return {
        **after,
        "changed": outcome.changed,
        "previous_region": before["last_region"],
        "previous_epoch": before["epoch"],
        "method": outcome.method,
        "waited_s": outcome.waited_s,
        "actions": outcome.actions,
        "msg": outcome.detail,
        "diff": {"before": _lines(before, names), "after": _lines(shown, names)},
    }


def seen_by_guard(environment: str) -> dict[str, tuple[int, float]]:
    """What the guard of this node, if it has one, has noted about the holder's gates: it saves the same wait here."""
    try:
        with open("/run/censuschat/guard.json", encoding="utf-8") as file:
            status = json.load(file)
        if status["environment"] != environment:
            return {}
        return {node: (int(revision), float(since)) for node, (revision, since) in status["quiet"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def bare_plan(state: str, region: str | None) -> Outcome:
    """What would come about on a node that is still bare: with state=held the first taking."""
    if state != "held":
        return Outcome()
    return Outcome(changed=True, actions=[f"take the lease for {region} (nobody ever held it)"], method="never_held")


def _lines(facts: dict[str, Any], names: tuple[str, ...]) -> str:
    return "".join(f"{name}: {facts[name]}\n" for name in names)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["observed", "held", "handed_over", "released"], "default": "observed"},
            "region": {"type": "str"},
            "environment_name": {"type": "str", "required": True},
            "endpoints": {"type": "list", "elements": "str", "required": True},
            **tls_files(),
            "ttl_s": {"type": "int", "default": 15},
            "wait_s": {"type": "int", "default": 60},
            "confirm_s": {"type": "int", "default": 20},
            "initial": {"type": "bool", "default": False},
            "require_shipped": {"type": "bool", "default": True},
            "epoch_floor": {"type": "int", "default": 0},
            "taken_by": {"type": "str", "default": "write_lease"},
        },
        required_if=[("state", state, ("region",)) for state in ("held", "handed_over", "released")],
        supports_check_mode=True,
    )
    given = module.params
    holder = None if given["state"] == "released" else given["region"]
    tls = Tls(given["ca_file"], given["cert_file"], given["key_file"])
    missing = [name for name in dataclasses.astuple(tls) if not os.path.exists(name)]
    if module.check_mode and missing:
        module.warn(
            f"{', '.join(missing)} not there yet: this is the plan for an environment where nobody held the lease"
        )
        outcome = bare_plan(given["state"], given["region"])
        module.exit_json(**result_of(outcome, holder, module.check_mode))
    try:
        store = LeaseStore(Etcd(given["endpoints"], tls), given["environment_name"])
        if given["state"] == "observed":
            view = store.observe()
            outcome = Outcome(view=view, previous=view)
        else:
            request = Request(
                state=given["state"],
                region=given["region"],
                ttl_s=given["ttl_s"],
                wait_s=given["wait_s"],
                by=given["taken_by"],
                initial=given["initial"],
                require_shipped=given["require_shipped"],
                epoch_floor=given["epoch_floor"],
            )
            seen = seen_by_guard(given["environment_name"])
            outcome = settle(store, request, check=module.check_mode, seen=seen, confirm_s=given["confirm_s"])
    except (EtcdError, LeaseError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result_of(outcome, holder, module.check_mode))


if __name__ == "__main__":
    main()
