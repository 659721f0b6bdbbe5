"""The platform role's catalogue as tests read it, and the page that says what its figures mean together.

`scripts/run python -m tests.platform_catalogue` prints docs/platform_figures.md.
"""

from __future__ import annotations

from typing import Any

import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects import model, report

from lab.paths import REPO

ROLE = REPO / "collections/ansible_collections/censuschat/infra/roles/kubernetes_platform"
PAGE = REPO / "collections/ansible_collections/censuschat/infra/docs/platform_figures.md"
_PREFIX = "kubernetes_platform_catalogue_"


def catalogue() -> dict[str, Any]:
    """The role's data without Ansible: none of its values is a template."""
    found: dict[str, Any] = {}
    for path in sorted((ROLE / "vars/main").glob("*.yml")):
        for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if name.startswith(_PREFIX):
                found[name.removeprefix(_PREFIX)] = value
    return found


def site(*stages: str, **more: Any) -> dict[str, Any]:
    """The least a site says: stages, addresses, where images come from."""
    blocks = {"api_servers": ["10.0.0.10/32"], "nodes": ["10.0.0.0/24"], "databases": ["10.0.1.0/24"]}
    blocks |= {"entrance": ["10.0.2.0/24"]}
    return {
        "stages_here": list(stages or ("production", "staging", "development")),
        "image": "registry.test/{service}:1",
        "blocks": blocks,
        "prometheus_url": "http://prometheus.test",
        **more,
    }


def page() -> str:
    """The findings for a cluster of all stages, everything switched on that adds a figure."""
    platform = model.read(catalogue(), site(switches={"keda": True}))
    return report.page(platform)


if __name__ == "__main__":
    print(page(), end="")
