#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: asks redis-cli, plans, writes one file, gives one command."""

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_replication
short_description: Make a Redis the primary or a replica, and keep it so over restarts
version_added: 0.1.0
description:
  - Asks the Redis on the node for its role, plans what differs from the wanted role, and applies it to the running
    server and to a file that the server's configuration includes.
  - It never decides which Redis should be the primary. A fail-over does, after the database's write lease has moved.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  state:
    description:
      - V(primary) ends replication; the node keeps its data and accepts writes.
      - V(replica) follows O(primary_host); data that the primary does not have are given up.
      - V(observed) changes nothing and returns what is there.
    type: str
    choices: [primary, replica, observed]
    default: observed
  primary_host:
    description: Whom a replica follows. Needed for O(state=replica).
    type: str
  primary_port:
    description: Port of O(primary_host).
    type: int
    default: 6379
  bootstrap:
    description:
      - Only decide a role that was never decided on this node, that is, when O(path) does not exist.
      - With it a run that describes the first state of an environment does not undo a fail-over.
    type: bool
    default: false
  wait_s:
    description: Seconds to wait until a replica has its first copy and its connection is up. 0 does not wait.
    type: int
    default: 0
  host:
    description: Address of the Redis on the node.
    type: str
    default: 127.0.0.1
  port:
    description: Port of the Redis on the node.
    type: int
    default: 6379
  password:
    description: Redis' password. It is handed to C(redis-cli) in its environment.
    type: str
  path:
    description: The file that keeps the role over restarts. The server's configuration must include it.
    type: path
    default: /etc/redis/replication.conf
attributes:
  platform:
    platforms: posix
requirements:
  - redis-cli 6 or newer on the node
notes:
  - Needs root on the node (C(become)), for the file.
"""

EXAMPLES = r"""
- name: Follow the primary of the other region, unless a fail-over has decided otherwise
  censuschat.infra.redis_replication:
    state: replica
    primary_host: 10.77.1.21
    password: "{{ redis_password }}"
    bootstrap: true
  become: true

- name: Take over
  censuschat.infra.redis_replication:
    state: primary
    password: "{{ redis_password }}"
  become: true

- name: Follow the new primary, and wait for the first copy
  censuschat.infra.redis_replication:
    state: replica
    primary_host: 10.77.2.21
    password: "{{ redis_password }}"
    wait_s: 60
  become: true
"""

RETURN = r"""
role:
  description: The role at the end (in check mode the one there is), V(primary) or V(replica). Null when not running.
  returned: always
  type: str
  sample: primary
previous_role:
  description: The role at the beginning.
  returned: always
  type: str
  sample: replica
primary:
  description: Whom the node follows, as HOST:PORT. Null when it follows nobody.
  returned: always
  type: str
  sample: 10.77.1.21:6379
link_up:
  description: Whether a replica's connection to its primary is up and its first copy complete.
  returned: always
  type: bool
  sample: true
offset:
  description: Position in the replication stream, in bytes.
  returned: always
  type: int
  sample: 123456
replicas:
  description: How many replicas are connected to the node.
  returned: always
  type: int
  sample: 1
actions:
  description: What was done, or would be done in check mode, in its order.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: V(file) or V(command).
      type: str
    target:
      description: The file, or the command given to Redis.
      type: str
    detail:
      description: The role it leads to.
      type: str
  sample:
    - kind: command
      target: REPLICAOF NO ONE
      detail: primary
"""

import dataclasses
import os
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.redis.replication import (
    Address,
    Desired,
    Observed,
    ReplicationError,
    State,
    file_for,
    parse_info,
    plan,
)

START_S = 5.0
"""Seconds a Redis that was just started may take until it answers (it loads its data first)."""


class Server:
    """The Redis on the node, through redis-cli."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.where = f"{module.params['host']}:{module.params['port']}"
        self.program = module.get_bin_path("redis-cli")

    def ask(self, *words: str) -> str:
        """What Redis answers; raises ReplicationError when it does not."""
        if self.program is None:
            raise ReplicationError("redis-cli is not installed on the node; install the package redis-tools")
        params = self.module.params
        argv = [self.program, "-e", "-h", params["host"], "-p", str(params["port"]), "--no-auth-warning", *words]
        password = params["password"]
        code, out, err = self.module.run_command(argv, environ_update={"REDISCLI_AUTH": password} if password else None)
        if code != 0 or out.startswith(("NOAUTH", "LOADING", "ERR", "WRONGPASS", "NOPERM")):
            said = " ".join((err or out).split())
            raise ReplicationError(
                f"Redis at {self.where} refused {' '.join(words)}: {said or f'redis-cli ended with {code}'}; "
                "see journalctl -u redis-server on the node"
            )
        return str(out)

    def observe(self, patience_s: float) -> Observed:
        """The server and its file. Asks again for ``patience_s``; then a server that does not answer is not running."""
        path = Path(self.module.params["path"])
        file = path.read_text(encoding="utf-8") if path.exists() else None
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return dataclasses.replace(parse_info(self.ask("INFO", "replication")), file=file)
            except ReplicationError:
                if time.monotonic() >= deadline:
                    if patience_s:
                        raise
                    return Observed(running=False, file=file)
            time.sleep(0.2)

    def write(self, content: str) -> None:
        """Replace the file in one step, readable by Redis like its main configuration."""
        path = Path(self.module.params["path"])
        part = path.with_name(path.name + ".new")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
            os.fchown(stream.fileno(), -1, path.parent.stat().st_gid)
            os.fchmod(stream.fileno(), 0o640)
        part.replace(path)

    def wait(self, seconds: float) -> Observed:
        """Until a replica has its copy; raises ReplicationError when it does not in time."""
        deadline = time.monotonic() + seconds
        while True:
            observed = self.observe(START_S)
            if observed.link_up or observed.primary is None:
                return observed
            if time.monotonic() >= deadline:
                raise ReplicationError(
                    f"Redis at {self.where} has no complete copy of {observed.primary} after {seconds:.0f} s; see "
                    "journalctl -u redis-server on both nodes, and whether they reach each other"
                )
            time.sleep(0.2)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["primary", "replica", "observed"], "default": "observed"},
            "primary_host": {"type": "str"},
            "primary_port": {"type": "int", "default": 6379},
            "bootstrap": {"type": "bool", "default": False},
            "wait_s": {"type": "int", "default": 0},
            "host": {"type": "str", "default": "127.0.0.1"},
            "port": {"type": "int", "default": 6379},
            "password": {"type": "str", "no_log": True},
            "path": {"type": "path", "default": "/etc/redis/replication.conf"},
        },
        required_if=[("state", "replica", ["primary_host"])],
        supports_check_mode=True,
    )
    params = module.params
    state = State(params["state"])
    primary = Address(params["primary_host"], params["primary_port"]) if state is State.REPLICA else None
    desired = Desired(state, primary, params["bootstrap"])
    server = Server(module)
    before = Observed(running=False)
    try:
        # Only a change needs an answer: check mode on a bare node and a plain question take "not running" for one.
        needs_answer = not module.check_mode and state is not State.OBSERVED
        before = now = server.observe(START_S if needs_answer else 0)
        actions = plan(before, desired, params["path"])
        if not module.check_mode:
            for action in actions:
                if action.kind == "file":
                    server.write(file_for(desired))
                else:
                    server.ask(*action.target.split())
            if actions:
                now = server.observe(START_S)
            if params["wait_s"] and state is State.REPLICA:
                now = server.wait(params["wait_s"])
    except (ReplicationError, OSError) as error:
        module.fail_json(msg=str(error), previous_role=before.role)
    module.exit_json(
        changed=bool(actions),
        role=now.role,
        previous_role=before.role,
        primary=str(now.primary) if now.primary else None,
        link_up=now.link_up,
        offset=now.offset,
        replicas=now.replicas,
        actions=[dataclasses.asdict(action) for action in actions],
        diff={
            "before": f"{before.role or 'not running'}\n{before.file or ''}",
            "after": f"{desired.state.value}\n{file_for(desired)}"
            if actions
            else f"{before.role}\n{before.file or ''}",
        },
    )


if __name__ == "__main__":
    main()
