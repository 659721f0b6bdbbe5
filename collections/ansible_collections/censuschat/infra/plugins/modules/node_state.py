#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_state
short_description: Bring one part of a node to its whole desired state in one call
version_added: 0.1.0
description:
  - Takes packages, accounts, directories, files, links and services together, observes all of them in a few
    batch calls, plans what differs and applies only that, in this order.
  - A service is restarted when a file it names in O(services[].restart_on) is newer than the moment the service became
    active. The restart therefore cannot be lost by a run that was interrupted between the file and the restart.
  - Packages never start their daemons while they are being installed. A service runs when the state says so.
  - A check mode run returns the plan that an apply would carry out, on a bare host too. The exception is what a package
    brings with itself (accounts, units), which is known only after its installation; validation commands run at
    apply.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  hostname:
    description: The host's name, in the kernel and for the next boot. Left as it is when not given.
    type: str
  packages:
    description: Debian packages.
    type: dict
    default: {}
    suboptions:
      present:
        description:
          - Names of packages to have. They are installed without recommended packages.
          - The package lists are fetched only when something must be installed.
        type: list
        elements: str
        default: []
      absent:
        description: Names of packages not to have. Their configuration files stay.
        type: list
        elements: str
        default: []
  groups:
    description: Groups to have.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The group's name.
        type: str
        required: true
      system:
        description: Whether it is created as a system group.
        type: bool
        default: false
  users:
    description: Accounts to have.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The account's name.
        type: str
        required: true
      system:
        description: Whether it is created as a system account.
        type: bool
        default: false
      groups:
        description: Supplementary groups. Others that the account has are left.
        type: list
        elements: str
        default: []
      shell:
        description: The login shell. Left as it is when not given.
        type: str
      home:
        description: The home directory. Left as it is when not given.
        type: str
      create_home:
        description: Whether the home directory is made with the account.
        type: bool
        default: false
  directories:
    description: Directories to have, with their ownership and mode.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path.
        type: str
        required: true
      owner:
        description: Owner's name.
        type: str
        default: root
      group:
        description: Group's name.
        type: str
        default: root
      mode:
        description: Octal mode in quotes.
        type: str
        default: "0755"
  files:
    description: Files to have, with their whole content.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path.
        type: str
        required: true
      content:
        description: The whole content, already templated.
        type: str
        required: true
      owner:
        description: Owner's name.
        type: str
        default: root
      group:
        description: Group's name.
        type: str
        default: root
      mode:
        description: Octal mode in quotes.
        type: str
        default: "0644"
      secret:
        description: Whether the content is kept out of diffs, results and logs.
        type: bool
        default: false
      validate:
        description: A command with one C(%s) that must accept the new file before it replaces the old one.
        type: str
  links:
    description: Symbolic links to have.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path of the link.
        type: str
        required: true
      target:
        description: What it points to.
        type: str
        required: true
  absent:
    description: Paths not to have. A directory goes with all that is in it; a top-level directory is refused.
    type: list
    elements: path
    default: []
  services:
    description: Units, in the order in which they are started, stopped, restarted or reloaded.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Full unit name, with its suffix.
        type: str
        required: true
      enabled:
        description: Whether it starts at boot. Left as it is when not given.
        type: bool
      state:
        description: Whether it runs. Left as it is when not given.
        type: str
        choices: [started, stopped]
      restart_on:
        description: Paths whose change, later than the service's start, means a restart.
        type: list
        elements: path
        default: []
      reload_on:
        description:
          - Paths whose change, later than the service's last change of state, means a reload unless it
            is restarted.
        type: list
        elements: path
        default: []
      masked:
        description:
          - Whether it is masked, and so stopped. A masked service that is to be enabled or started is unmasked.
        type: bool
        default: false
requirements:
  - Debian 12 or newer with systemd
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Bring the node's part to its state
  censuschat.infra.node_state:
    packages:
      present: [haproxy]
    directories:
      - path: /etc/haproxy/certs
        mode: "0750"
        group: haproxy
    files:
      - path: /etc/haproxy/haproxy.cfg
        content: "{{ lookup('ansible.builtin.template', 'haproxy.cfg.j2') }}"
        validate: haproxy -c -f %s
    services:
      - name: haproxy.service
        enabled: true
        state: started
        reload_on: [/etc/haproxy/haproxy.cfg]
  become: true
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in its order. Empty on a converged node.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: One of package, hostname, group, user, directory, file, link, absent, systemd, service.
      type: str
    target:
      description: The package, account, path or unit.
      type: str
    detail:
      description: What is done to it and why.
      type: str
  sample:
    - kind: service
      target: haproxy.service
      detail: "reload: /etc/haproxy/haproxy.cfg changes"
"""

import os
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.quiet import QuietModule
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_host import Executor, observe
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Desired, diff_of
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_plan import plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError


def attributed(**options: dict[str, Any]) -> dict[str, Any]:
    """The options of something with a path, an owner, a group and a mode."""
    return {
        "path": {"type": "str", "required": True},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        **options,
    }


def listed(kind: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """An option that is a list, empty by default."""
    return {"type": "list", "elements": kind, "default": [], **({"options": options} if options else {})}


def main() -> None:
    module = QuietModule(
        argument_spec={
            "hostname": {"type": "str"},
            "packages": {
                "type": "dict",
                "default": {},
                "options": {"present": listed("str"), "absent": listed("str")},
            },
            "groups": listed(
                "dict", {"name": {"type": "str", "required": True}, "system": {"type": "bool", "default": False}}
            ),
            "users": listed(
                "dict",
                {
                    "name": {"type": "str", "required": True},
                    "system": {"type": "bool", "default": False},
                    "groups": listed("str"),
                    "shell": {"type": "str"},
                    "home": {"type": "str"},
                    "create_home": {"type": "bool", "default": False},
                },
            ),
            "directories": listed("dict", attributed(mode={"type": "str", "default": "0755"})),
            "files": listed(
                "dict",
                attributed(
                    content={"type": "str", "required": True},
                    mode={"type": "str", "default": "0644"},
                    secret={"type": "bool", "default": False, "no_log": False},
                    validate={"type": "str"},
                ),
            ),
            "links": listed(
                "dict", {"path": {"type": "str", "required": True}, "target": {"type": "str", "required": True}}
            ),
            "absent": listed("path"),
            "services": listed(
                "dict",
                {
                    "name": {"type": "str", "required": True},
                    "enabled": {"type": "bool"},
                    "state": {"type": "str", "choices": ["started", "stopped"]},
                    "restart_on": listed("path"),
                    "reload_on": listed("path"),
                    "masked": {"type": "bool", "default": False},
                },
            ),
        },
        supports_check_mode=True,
    )
    for entry in module.params["files"]:
        if entry["secret"] and entry["content"]:
            module.no_log_values.add(entry["content"])
    # What programs create on the way gets its usual mode, whatever the login's umask is.
    os.umask(0o022)
    commands = Commands()
    executor = None
    try:
        desired = Desired.of(module.params)
        actions = plan(desired, observe(desired, commands))
        if actions and not module.check_mode:
            executor = Executor(desired, commands)
            actions = executor.converge(actions)
    except NodeError as error:
        done = executor.done if executor else []
        module.fail_json(msg=str(error), changed=bool(done), actions=[a.public() for a in done])
    module.exit_json(
        changed=bool(actions),
        actions=[a.public() for a in actions],
        diff=diff_of(actions),
        invocation={"module_args": {"files": [f["path"] for f in module.params["files"]]}},
    )


if __name__ == "__main__":
    main()
