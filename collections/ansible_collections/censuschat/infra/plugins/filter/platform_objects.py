# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The door from Ansible's data to the platform's objects and to what its figures mean."""

from __future__ import annotations

DOCUMENTATION = r"""
name: platform_objects
short_description: Turn the description of a platform into Kubernetes objects
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Lays a site's own data on the catalogue, checks all of it, and gives the objects as a list for
    M(censuschat.infra.k8s_apply).
  - Pure, nothing is asked of a cluster. Bad data fails with every problem and its place.
options:
  _input:
    description: The catalogue, as the role P(censuschat.infra.kubernetes_platform#role) carries it.
    type: dict
    required: true
  site:
    description: The site's own data in the same shape. Mappings are merged, other values replaced, null takes away.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Apply the platform's objects
  censuschat.infra.k8s_apply:
    kubeconfig: /root/.kube/config
    definition: "{{ catalogue | censuschat.infra.platform_objects(site) }}"
"""

RETURN = r"""
_value:
  description: The objects.
  type: list
  elements: dict
"""

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects import manifests, model


def platform_objects(catalogue: Mapping[str, Any], site: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of the platform that both describe; AnsibleFilterError names what is wrong with them."""
    try:
        return manifests.manifests(model.read(catalogue, site))
    except model.PlatformError as error:
        raise AnsibleFilterError(str(error)) from None


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"platform_objects": platform_objects}
