# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the figures of a platform mean together."""

from __future__ import annotations

DOCUMENTATION = r"""
name: platform_findings
short_description: Say which figures of a platform cannot be reached together, and which one binds
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Computes from the same data as P(censuschat.infra.platform_objects#filter) where figures contradict each other, for
    example an autoscaler's maximum and the quota of its namespace.
options:
  _input:
    description: The catalogue, as the role P(censuschat.infra.kubernetes_platform#role) carries it.
    type: dict
    required: true
  site:
    description: The site's own data in the same shape.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what binds
  ansible.builtin.debug:
    msg: "{{ catalogue | censuschat.infra.platform_findings(site) }}"
"""

RETURN = r"""
_value:
  description: The findings, one sentence each.
  type: list
  elements: str
"""

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects import model, report


def platform_findings(catalogue: Mapping[str, Any], site: Mapping[str, Any]) -> list[str]:
    """One sentence a finding; AnsibleFilterError names what is wrong with the data."""
    try:
        found = report.findings(model.read(catalogue, site))
    except model.PlatformError as error:
        raise AnsibleFilterError(str(error)) from None
    return [f"{finding.about}: {finding.binds} binds. {finding.text}" for finding in found]


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"platform_findings": platform_findings}
