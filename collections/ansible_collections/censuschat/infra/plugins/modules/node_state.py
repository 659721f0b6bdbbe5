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
          - A name may say the one version to have, as in C(kubelet=1.36.3-1.1); a newer one is then taken back to it.
          - The package lists are fetched only when something must be installed.
        type: list
        elements: str
        default: []
      absent:
        description: Names of packages not to have. Their configuration files stay.
        type: list
        elements: str
        default: []
      held:
        description:
          - Names of packages that only this module may change (C(apt-mark hold)); upgrades leave them as they are.
        type: list
        elements: str
        default: []
      unheld:
        description: Names of packages whose hold is to be lifted.
        type: list
        elements: str
        default: []
      archives:
        description: Packages to have from an archive of their own, each in one version and proven by its checksum.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: The package's name, as the archive states it.
            type: str
            required: true
          version:
            description: The package's version, as the archive states it.
            type: str
            required: true
          url:
            description: Where the archive is, an HTTP, HTTPS or C(file) URL that the node can reach.
            type: str
            required: true
          checksum:
            description: C(sha256) or C(sha512), a colon, and the archive's digest in hexadecimal digits.
            type: str
            required: true
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
      uid:
        description: The account's number. The node chooses when not given; that of an existing account is not changed.
        type: int
      state:
        description: Whether there is such an account. The home of a removed one stays.
        type: str
        choices: [present, absent]
        default: present
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
      exclusive:
        description:
          - Whether the directory is to hold nothing but what this call gives for it. All else in it is removed.
        type: bool
        default: false
  files:
    description:
      - Files to have, with their whole content.
      - Those below C(/etc/apt) are put in place before packages are installed, for they say where packages come from.
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
          - A service whose last reload failed is reloaded again.
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

- name: Have a package that no list has, in one version, and nothing else among the keys
  censuschat.infra.node_state:
    packages:
      archives:
        - name: filebeat
          version: 9.2.1
          url: https://mirror.example.com/filebeat-9.2.1-amd64.deb
          checksum: sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
      held: [filebeat]
    directories:
      - path: /etc/ssh/keys
        exclusive: true
    files:
      - path: /etc/ssh/keys/ada
        content: "{{ ada_key }}"
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
      description: One of package, hold, hostname, group, user, directory, file, link, absent, systemd, service.
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
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_fetch import fetched
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
                "options": {
                    "present": listed("str"),
                    "absent": listed("str"),
                    "held": listed("str"),
                    "unheld": listed("str"),
                    "archives": listed(
                        "dict",
                        {key: {"type": "str", "required": True} for key in ("name", "version", "url", "checksum")},
                    ),
                },
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
                    "uid": {"type": "int"},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                },
            ),
            "directories": listed(
                "dict",
                attributed(mode={"type": "str", "default": "0755"}, exclusive={"type": "bool", "default": False}),
            ),
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
            executor = Executor(desired, commands, fetched)
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
