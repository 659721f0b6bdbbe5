#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: wanted content in, one plan brought about, one report out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: awx_content
short_description: Bring the content of an AWX to its state in one call
version_added: 0.1.0
description:
  - Takes the whole wanted content of one organization (projects, inventories, credential types, execution environments,
    job and workflow templates with their surveys, nodes, approvals and schedules, notification templates, instance
    groups) and makes the AWX hold exactly that.
  - Everything is checked before anything is touched, and all problems are listed. These are unknown fields, wrong
    types, references to what is neither wanted nor there, surveys, rules and answers that AWX would refuse, and
    workflows whose nodes lead nowhere or in a circle.
  - Objects refer to each other by name. A field that is left out has AWX's default; organizations and instance groups
    are changed only in what is given.
  - Nodes of a workflow that are not wanted are removed. Other objects are only removed with O(prune).
  - Projects are synchronised when they are new, have moved, or lack a playbook that a template asks for.
  - After a change everything is read back and compared. What AWX did not keep is a failure.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  platform:
    platforms: posix
options:
  content:
    description:
      - The wanted content. A mapping with V(organization) (a name, or a mapping with V(name) and V(description)) and a
        list for each of V(credential_types), V(credentials), V(execution_environments), V(instance_groups),
        V(projects), V(inventories), V(notification_templates), V(job_templates) and V(workflow_job_templates).
      - The fields are those of AWX's API, with names in the place of ids, and C(extra_vars) and C(variables) as
        mappings.
      - An inventory has its V(hosts), V(groups) and V(sources) within, a template its V(survey) and V(schedules), a
        workflow template its V(nodes). A node has an V(identifier), one of V(job_template), V(workflow) and V(approval)
        (a mapping with V(name), V(description) and V(timeout) in seconds), and the identifiers that V(success),
        V(failure) and V(always) lead to.
    type: dict
    required: true
  secrets:
    description:
      - Secret entries of credentials' V(inputs) and of notification templates' V(notification_configuration), as kind
        (V(credentials), V(notification_templates)), name, entry, value. They never show in results and diffs.
      - One that is left out stays as it is in the AWX. A secret in O(content) is refused.
    type: dict
    default: {}
  controller_host:
    description: Address of the AWX. Without it that of the environment variable E(CONTROLLER_HOST).
    type: str
    aliases: [tower_host]
  controller_oauth_token:
    description: A token with write scope. Without it that of E(CONTROLLER_OAUTH_TOKEN).
    type: str
    aliases: [tower_oauthtoken]
  controller_username:
    description: User, where there is no token. Without it that of E(CONTROLLER_USERNAME).
    type: str
  controller_password:
    description: The user's password. Without it that of E(CONTROLLER_PASSWORD).
    type: str
  validate_certs:
    description: Whether the AWX's certificate has to be trusted. Without it E(CONTROLLER_VERIFY_SSL), else V(true).
    type: bool
    aliases: [tower_verify_ssl]
  ca_path:
    description: File with the authorities that are trusted, in the place of the system's.
    type: path
  prune:
    description:
      - A label. Job and workflow templates of the organization that have it and are not wanted are deleted, and so are
        schedules of wanted templates that are not wanted.
    type: str
    default: ""
  update_secrets:
    description:
      - Send every secret that is given. AWX never shows whether a secret is the one it has, so this always changes.
    type: bool
    default: false
  wait_s:
    description: Seconds that a project may take to be synchronised.
    type: int
    default: 300
notes:
  - Made for AWX 24.6.1. Runs where the AWX can be reached, usually on the controller.
  - AWX applies no transaction. A run that fails half-way is completed by the next one.
requirements:
  - urllib3
"""

EXAMPLES = r"""
- name: Have a project, its inventory and a job template
  censuschat.infra.awx_content:
    controller_host: https://awx.example.org
    controller_oauth_token: "{{ lookup('ansible.builtin.file', '~/.config/awx.token') }}"
    prune: "runbooks of production"
    content:
      organization: CensusChat
      projects:
        - name: infra
          scm_type: git
          scm_url: https://git.example.org/infra.git
      inventories:
        - name: production
          sources:
            - name: production
              source_project: infra
              source_path: inventories/production
              update_on_launch: true
      job_templates:
        - name: verify
          project: infra
          inventory: production
          playbook: playbooks/verify.yml
          labels: ["runbooks of production"]
      workflow_job_templates:
        - name: careful
          labels: ["runbooks of production"]
          nodes:
            - identifier: ask
              approval: {name: Verify production, timeout: 3600}
              success: [do]
            - identifier: do
              job_template: verify
  delegate_to: localhost
"""

RETURN = r"""
changes:
  description: What was, or in check mode would be, changed, in this order.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: V(create), V(change), V(delete) or V(synchronise).
      type: str
    kind:
      description: Kind of the object, such as V(job_template).
      type: str
    name:
      description: Name of the object, after those of what it belongs to.
      type: str
    fields:
      description: The fields that differ.
      type: list
      elements: str
    before:
      description: Their values in the AWX, without secrets.
      type: dict
    after:
      description: Their wanted values, without secrets.
      type: dict
    why:
      description: Why a project is synchronised.
      type: str
problems:
  description: What is wrong with the content; nothing was touched.
  returned: when the content was refused
  type: list
  elements: str
requests:
  description: Requests made of the API.
  returned: success
  type: int
"""

from ansible.module_utils.basic import env_fallback, missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.awx.client import MISSING, AwxError, Client
from ansible_collections.censuschat.infra.plugins.module_utils.awx.content import run
from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import ContentError, things
from ansible_collections.censuschat.infra.plugins.module_utils.awx.planner import Wish, difference
from ansible_collections.censuschat.infra.plugins.module_utils.node.quiet import QuietModule


def main() -> None:
    module = QuietModule(
        argument_spec={
            "content": {"type": "dict", "required": True},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "controller_host": {
                "type": "str",
                "aliases": ["tower_host"],
                "fallback": (env_fallback, ["CONTROLLER_HOST", "TOWER_HOST"]),
            },
            "controller_oauth_token": {
                "type": "str",
                "no_log": True,
                "aliases": ["tower_oauthtoken"],
                "fallback": (env_fallback, ["CONTROLLER_OAUTH_TOKEN", "TOWER_OAUTH_TOKEN"]),
            },
            "controller_username": {"type": "str", "fallback": (env_fallback, ["CONTROLLER_USERNAME"])},
            "controller_password": {
                "type": "str",
                "no_log": True,
                "fallback": (env_fallback, ["CONTROLLER_PASSWORD"]),
            },
            "validate_certs": {
                "type": "bool",
                "aliases": ["tower_verify_ssl"],
                "fallback": (env_fallback, ["CONTROLLER_VERIFY_SSL", "TOWER_VERIFY_SSL"]),
            },
            "ca_path": {"type": "path"},
            "prune": {"type": "str", "default": ""},
            "update_secrets": {"type": "bool", "default": False, "no_log": False},
            "wait_s": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=missing_required_lib("urllib3"), exception=MISSING)
    given = module.params
    try:
        if not given["controller_host"]:
            raise AwxError("The AWX's address is not given: set controller_host (CONTROLLER_HOST)")
        wanted = things(given["content"], given["secrets"])
        client = Client(
            given["controller_host"],
            token=given["controller_oauth_token"] or "",
            username=given["controller_username"] or "",
            password=given["controller_password"] or "",
            verify=given["validate_certs"] is not False,
            ca_path=given["ca_path"],
        )
        result = run(
            client,
            wanted,
            Wish(given["prune"], given["update_secrets"]),
            check=module.check_mode,
            wait_s=given["wait_s"],
        )
    except ContentError as error:
        module.fail_json(
            msg=f"The content cannot be brought into the AWX, nothing was touched: {error}", problems=error.problems
        )
    except AwxError as error:
        module.fail_json(msg=str(error))
    if module._diff:
        result["diff"] = [difference(change) for change in result["changes"]]
    module.exit_json(**result)


if __name__ == "__main__":
    main()
