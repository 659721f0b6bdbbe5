# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue over plugin_utils/awx_runbooks.py."""

from __future__ import annotations

DOCUMENTATION = r"""
name: awx_runbooks
short_description: What runbooks are in one environment's AWX
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Completes what C(runbook generate) makes of definitions with what is the environment's own, as content of
    M(censuschat.infra.awx_content).
  - Names begin with the environment's. A plan is approved by as many people as the environment wants.
options:
  _input:
    description: The generated contents, one for each runbook.
    type: list
    elements: dict
    required: true
  environment:
    description: Name of the environment.
    type: str
    required: true
  project:
    description: Name of the project that holds the playbooks.
    type: str
    required: true
  inventory:
    description: Name of the inventory.
    type: str
    required: true
  label:
    description: Label of all templates.
    type: str
    required: true
  execution_environment:
    description: Name of the execution environment.
    type: str
  credentials:
    description:
      - Names of credentials by the part of a runbook that has them (V(begin), V(approved), V(step), V(undo)); V(*) for
        all.
    type: dict
    default: {}
  instance_groups:
    description: Names of instance groups, in the order in which they are tried.
    type: list
    elements: str
    default: []
  forks:
    description: How many hosts a job works on at once. V(0) is AWX's default.
    type: int
    default: 0
  approvals:
    description: As the inventory's C(runbook_approvals), runbook or V(*) to a mapping with C(need).
    type: dict
    default: {}
  notify:
    description: Names of notification templates by event (V(started), V(success), V(error), V(approvals)).
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Show the templates
  ansible.builtin.debug:
    msg: >-
      {{ [lookup('ansible.builtin.file', 'fail-over.yml') | from_yaml]
         | censuschat.infra.awx_runbooks(environment='staging', project='infra', inventory='staging', label='ours') }}
"""

RETURN = r"""
_value:
  description: C(job_templates) and C(workflow_job_templates).
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.censuschat.infra.plugins.plugin_utils.awx_runbooks import Own, complete


def awx_runbooks(runbooks: Any, **own: Any) -> dict[str, list[dict[str, Any]]]:
    """The templates of all runbooks. Raises AnsibleFilterError when something is missing or not as it is made."""
    try:
        given = {name: value for name, value in own.items() if value is not None}
        return complete(runbooks, Own(**{**given, "instance_groups": tuple(given.get("instance_groups", ()))}))
    except (TypeError, ValueError) as error:
        raise AnsibleFilterError(f"awx_runbooks: {error}") from error


class FilterModule:
    """The filter, by its name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"awx_runbooks": awx_runbooks}
