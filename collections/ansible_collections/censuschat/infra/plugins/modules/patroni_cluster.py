#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, a loop of look, plan, act, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: patroni_cluster
short_description: Observe a region's PostgreSQL cluster, wait until it is as wanted, and keep its configuration
version_added: 0.1.0
description:
  - Runs on a database node and looks at the region's cluster through Patroni's REST API, and at the nodes of the other
    region when O(peers) is given.
  - Waits until the region is O(state), with so many members streaming and so little lag as asked, and says in plain
    sentences what is still missing when the time is over.
  - Keeps the part of Patroni's dynamic configuration given in O(config). It never touches the parts that decide which
    region is primary (C(standby_cluster), C(pause)); these belong to the guard of the write lease.
  - With O(repair), brings back a replica that Patroni 3.0 leaves alone, namely one of a standby region with WAL of an
    abandoned timeline. It is stopped, so that Patroni rewinds it, and cloned anew if that did not help.
  - For a switchover without loss, compare RV(leader.replayed) of the demoted region with that of the other, or wait
    with O(replayed).
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.tls_files
options:
  state:
    description:
      - V(observed) looks once. V(running) waits for a leader, primary or standby. V(primary) and V(standby) wait for
        the region to be that.
      - A standby region must stream from the other region when O(peers) is given.
    type: str
    choices: [observed, running, primary, standby]
    default: observed
  members:
    description:
      - How many members there must be, the leader included; the others must stream from it. V(0) does not look.
      - A primary with members and synchronous mode must have a synchronous standby.
    type: int
    default: 0
  lag_bytes:
    description:
      - How many bytes a standby region may be behind the primary of O(peers). Without it lag is not looked at.
    type: int
  timeline:
    description: The timeline that the leader must have reached. V(0) does not look.
    type: int
    default: 0
  replayed:
    description: A position, as in V(0/3000148), that the leader must have replayed or written.
    type: str
  config:
    description: What Patroni's dynamic configuration must contain. Other settings stay. The leader's node writes it.
    type: dict
    default: {}
  repair:
    description: Whether to bring back the replica on this node when it does not stream.
    type: bool
    default: false
  grace_s:
    description: For how long a replica may not stream before it is repaired, in seconds.
    type: int
    default: 10
  wait_s:
    description: How long to wait for the condition, in seconds.
    type: int
    default: 60
  name:
    description: This node's name in the cluster. Needed for O(config) and O(repair).
    type: str
  url:
    description: Patroni's REST API on this node.
    type: str
    default: https://127.0.0.1:8008
  peers:
    description: REST APIs of the other region's nodes.
    type: list
    elements: str
    default: []
  data_directory:
    description: Data directory of this node's PostgreSQL.
    type: path
    default: /var/lib/postgresql/15/censuschat
  binaries:
    description: Directory of PostgreSQL's programs.
    type: path
    default: /usr/lib/postgresql/15/bin
  ca_file:
    default: /etc/censuschat/pki/ca.crt
  cert_file:
    default: /etc/censuschat/pki/node.crt
  key_file:
    default: /etc/censuschat/pki/node.key
attributes:
  check_mode:
    details: Looks once and does not wait; a condition that does not hold is reported in RV(missing), not as a failure.
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Wait until the promoted region is a primary with a synchronous standby
  censuschat.infra.patroni_cluster:
    state: primary
    members: 3
  become: true

- name: Bring the returned region's replicas back and wait until all follow
  censuschat.infra.patroni_cluster:
    state: standby
    members: 3
    lag_bytes: 0
    repair: true
    name: "{{ inventory_hostname }}"
    peers: [https://10.77.2.21:8008, https://10.77.2.22:8008, https://10.77.2.23:8008]
    wait_s: 300
  become: true
"""

RETURN = r"""
role:
  description: What the region is, C(primary), C(standby), or C(none) while it has no leader that plays its part.
  returned: always
  type: str
  sample: primary
leader:
  description: The region's leader. Empty when there is none.
  returned: always
  type: dict
  contains:
    name:
      description: Name of the member.
      type: str
    host:
      description: Its address.
      type: str
    timeline:
      description: Its timeline.
      type: int
    received:
      description: Position of the last WAL on its disk.
      type: str
    replayed:
      description: Position of the last WAL it has applied; for a primary, has written.
      type: str
  sample:
    name: use1-db1
    host: 10.77.1.21
    timeline: 3
    received: 0/5000148
    replayed: 0/5000148
members:
  description: The region's members.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the member.
      type: str
    host:
      description: Its address.
      type: str
    role:
      description: One of leader, standby_leader, sync_standby, replica.
      type: str
    state:
      description: Patroni's word for the state of its PostgreSQL.
      type: str
    timeline:
      description: Its timeline.
      type: int
    streaming:
      description: Whether it streams from the leader.
      type: bool
    pending_restart:
      description: Whether a changed parameter waits for its restart.
      type: bool
behind_bytes:
  description: How far the leader is behind the primary of O(peers). None when there is no such primary.
  returned: always
  type: int
upstream:
  description: The primary among O(peers). Empty when there is none.
  returned: always
  type: dict
  contains:
    url:
      description: Its REST API.
      type: str
    timeline:
      description: Its timeline.
      type: int
    lsn:
      description: Position up to which it has written WAL.
      type: str
local:
  description: PostgreSQL of this node.
  returned: always
  type: dict
  contains:
    receiving:
      description: Whether its WAL receiver streams.
      type: bool
    database_state:
      description: State of the database cluster in its control file.
      type: str
    checkpoint:
      description: Position of its latest checkpoint; after a clean stop, of the shutdown checkpoint.
      type: str
missing:
  description: What is missing until the region is as wanted, in sentences.
  returned: always
  type: list
  elements: str
actions:
  description:
    - What was done, or would be in check mode.
    - A turn of the region from standby to primary, or back, is told too. The guards of the write lease make it while
      this module waits for it.
  returned: always
  type: list
  elements: str
  sample: ["configure: ttl=20", "rewind", "turn from standby to primary"]
waited_s:
  description: How long it waited, in seconds.
  returned: always
  type: float
  sample: 2.5
"""

import json
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.cluster import (
    View,
    Want,
    config_patch,
    guarded,
    lsn,
    missing,
    position,
    repair,
)
from ansible_collections.censuschat.infra.plugins.module_utils.postgres.host import Cluster, ClusterError, Rest
from ansible_collections.censuschat.infra.plugins.module_utils.tls_files import tls_files

_POLL_S = 0.5

Outcome = tuple[View, list[str], list[str], float]


def converge(cluster: Cluster, want: Want, grace_s: float, wait_s: float, check: bool) -> Outcome:
    """Look, act, wait: the last view, what is missing in it, the actions, the seconds waited."""
    started = time.monotonic()
    well_at = started
    actions: list[str] = []
    first: View | None = None
    while True:
        view = cluster.observe(local=True)
        first = first or view
        now = time.monotonic()
        if view.follows:
            well_at = now
        patch = {}
        if not view.error and view.leading is not None and view.leading.name == cluster.name:
            patch = config_patch(want.config, view.config)
        # Check mode does not wait and see: it tells what is done to a replica that goes on as it is.
        step = repair(want, view, grace_s if check else now - well_at, "rewind" in actions, grace_s)
        if patch:
            actions.append("configure: " + json.dumps(patch, sort_keys=True))
        if step:
            actions.append(step)
        lacks = missing(want, view)
        if check:
            return view, lacks, actions + turn(view.role, want.state), 0.0
        if patch:
            cluster.configure(patch)
        if step == "rewind":
            cluster.rewind()
        elif step == "reinitialize":
            cluster.reinitialize()
            well_at = time.monotonic()
        if not lacks and not step and (not want.repair or own_replica_follows(view)):
            return view, lacks, actions + turn(first.role, view.role), now - started
        if now - started >= wait_s:
            return view, lacks or ["this node's replica does not stream"], actions, now - started
        time.sleep(_POLL_S)


def turn(before: str, after: str) -> list[str]:
    """The change of a region's part that the wait is for; others make it, but it is one all the same."""
    parts = {"primary", "standby"}
    return [f"turn from {before} to {after}"] if before != after and {before, after} == parts else []


def own_replica_follows(view: View) -> bool:
    """Whether this node's PostgreSQL follows, unless it leads or is no member of the cluster."""
    known = any(m.name == view.local.name for m in view.members)
    leads = view.leading is not None and view.leading.name == view.local.name
    return view.follows or leads or not known


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["observed", "running", "primary", "standby"], "default": "observed"},
            "members": {"type": "int", "default": 0},
            "lag_bytes": {"type": "int"},
            "timeline": {"type": "int", "default": 0},
            "replayed": {"type": "str"},
            "config": {"type": "dict", "default": {}},
            "repair": {"type": "bool", "default": False},
            "grace_s": {"type": "int", "default": 10},
            "wait_s": {"type": "int", "default": 60},
            "name": {"type": "str"},
            "url": {"type": "str", "default": "https://127.0.0.1:8008"},
            "peers": {"type": "list", "elements": "str", "default": []},
            "data_directory": {"type": "path", "default": "/var/lib/postgresql/15/censuschat"},
            "binaries": {"type": "path", "default": "/usr/lib/postgresql/15/bin"},
            **tls_files(),
        },
        supports_check_mode=True,
    )
    p = module.params
    if guarded(p["config"]):
        module.fail_json(
            msg=f"config: {', '.join(guarded(p['config']))} decides which region is primary and is left to the guard "
            "of the write lease; take it out"
        )
    if (p["config"] or p["repair"]) and not p["name"]:
        module.fail_json(msg="name: config and repair need this node's name in the cluster")
    try:
        want = Want(
            state=p["state"],
            members=p["members"],
            lag_bytes=p["lag_bytes"],
            timeline=p["timeline"],
            replayed=position(p["replayed"]) if p["replayed"] else 0,
            config=p["config"],
            repair=p["repair"],
        )
    except ValueError:
        module.fail_json(
            msg=f"replayed: {p['replayed']!r} is no position; write it as PostgreSQL does, as in 0/3000148"
        )
    try:
        rest = Rest(p["ca_file"], p["cert_file"], p["key_file"])
        cluster = Cluster(
            rest,
            p["url"],
            name=p["name"] or "",
            peers=p["peers"],
            data=p["data_directory"],
            binaries=p["binaries"],
        )
        view, lacks, actions, waited = converge(cluster, want, p["grace_s"], p["wait_s"], module.check_mode)
    except (ClusterError, NodeError) as error:
        if not module.check_mode:
            module.fail_json(msg=str(error))
        # A bare node has neither certificates nor Patroni yet.
        view, lacks, actions, waited = View(error=str(error)), [str(error)], [], 0.0
    result = public(view)
    result.update(missing=lacks, actions=actions, waited_s=round(waited, 2), changed=bool(actions))
    if actions:
        result["diff"] = {"before": "", "after": "".join(f"{a}\n" for a in actions)}
    if lacks and not module.check_mode:
        module.fail_json(
            msg=f"after {waited:.0f} s the region's database is not {p['state']} as wanted: {'; '.join(lacks)}. "
            "Look at `journalctl -u patroni` on its leader and on the nodes named",
            **result,
        )
    module.exit_json(**result)


def public(view: View) -> dict[str, Any]:
    """The view as the module's result."""
    leading, leader, upstream = view.leading, view.leader, view.upstream
    return {
        "role": view.role,
        "leader": {
            "name": leading.name,
            "host": leading.host,
            "timeline": leader.timeline,
            "received": lsn(leader.received),
            "replayed": lsn(leader.replayed),
        }
        if leading and leader
        else {},
        "members": [
            {
                "name": m.name,
                "host": m.host,
                "role": m.role,
                "state": m.state,
                "timeline": m.timeline,
                "streaming": m.name in view.streaming,
                "pending_restart": m.pending_restart,
            }
            for m in view.members
        ],
        "behind_bytes": view.behind,
        "upstream": {"url": upstream.url, "timeline": upstream.timeline, "lsn": lsn(upstream.received)}
        if upstream
        else {},
        "local": {
            "receiving": view.local.receiving,
            "database_state": view.local.database_state,
            "checkpoint": lsn(view.local.checkpoint),
        },
    }


if __name__ == "__main__":
    main()
