#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The tar of the base image of the lab's nodes."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_base_image
short_description: Make the base image of the lab's nodes
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Says which images the lab needs and which are missing, and removes those of older recipes that no node uses.
  - Makes the tar of the base by debootstrap from the mirror of the machine's own apt, through the lab's package cache,
    and imports it. The tar is kept in the project's cache.
attributes:
  check_mode:
    support: full
    description: Reports what would be done and does nothing.
  diff_mode:
    support: none
    description: The planned actions are returned instead.
  platform:
    support: full
    platforms: debian
    description: The machine that runs the lab.
options:
  inventory:
    description: The inventory directory that describes the lab.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Make the base image
  lab_base_image:
    inventory: "{{ inventory_dir }}"
"""

RETURN = r"""
actions:
  description: What was done, or would be.
  type: list
  elements: str
  returned: always
images:
  description: The image of each role, and of the base; those of later releases of Debian bear the release's name.
  type: dict
  returned: always
missing:
  description: The images that podman does not have, the base first.
  type: list
  elements: str
  returned: always
containerfiles:
  description: How each role's image is made from the base.
  type: dict
  returned: always
tars:
  description: The base images' tars, one for each of Debian's releases in the lab.
  type: list
  elements: str
  returned: always
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from lab import images, machine
from lab.module import INVENTORY, answer, described
from lab.paths import IMAGES, STATE, cache
from lab.topology import PLAIN, label


def provide(module: AnsibleModule) -> dict[str, Any]:
    actions = []
    lab = described(module)
    mirror = images.find_mirror()
    url = f"http://{lab.operator.address}:{lab.operator.packages_port}"
    recipe = images.Recipe(url, bool(mirror.security), machine.architecture())
    listing = ["podman", "images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", f"reference={IMAGES}/*"]
    _, listed, _ = module.run_command(listing, check_rc=True)
    _, used, _ = module.run_command(["podman", "ps", "--all", "--format", "{{.Image}}"], check_rc=True)
    for image in images.superseded(recipe, listed.split(), used.split()):
        actions.append(f"remove {image}")
        if not module.check_mode:
            # Not forced: a base stays while a role's image of the same age still stands on it.
            module.run_command(["podman", "rmi", image])
    found: dict[str, Any] = {"images": {}, "missing": [], "containerfiles": {}, "tars": []}
    for suite in sorted({node.suite for node in lab.nodes}):
        of_suite = replace(recipe, suite=suite)
        roles = sorted({node.role for node in lab.nodes if node.suite == suite})
        missing = images.missing(of_suite, listed.split(), roles)
        tar = cache() / "images" / of_suite.tar()
        if "base" in missing:
            actions += bring_base(module, of_suite, tar)
        found["images"].update({label(role, suite): of_suite.image(role) for role in ["base", *roles]})
        found["missing"] += [label(role, suite) for role in missing]
        found["containerfiles"].update(
            {label(role, suite): of_suite.containerfile(role) for role in roles if role != PLAIN}
        )
        found["tars"].append(str(tar))
    return {"actions": actions, **found}


def bring_base(module: AnsibleModule, recipe: images.Recipe, tar: Path) -> list[str]:
    """Makes a suite's base, unless its tar is there, and imports it; returns what was done, or would be."""
    actions = []
    if not tar.is_file():
        actions.append(f"make {tar.name}")
        if not module.check_mode:
            os.umask(0o022)
            images.build_base(recipe, tar, STATE / "log" / "images.log")
    actions.append(f"import {recipe.image('base')}")
    if not module.check_mode:
        change = ["--change", 'CMD ["/sbin/init"]']
        module.run_command(["podman", "import", *change, str(tar), recipe.image("base")], check_rc=True)
    return actions


def main() -> None:
    answer(AnsibleModule(argument_spec=INVENTORY, supports_check_mode=True), provide)


if __name__ == "__main__":
    main()
