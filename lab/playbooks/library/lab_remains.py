#!/usr/bin/python
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Removes the lab's containers and volumes."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_remains
short_description: Remove the lab's containers and volumes, and its images too when told
version_added: 0.1.0
author:
  - CensusChat platform team (@censuschat)
description:
  - Removes, in one podman call each, every container with the lab's label or of its images, and every volume with its
    prefix, whatever inventory they were made from. Nothing else is touched.
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
  images:
    description: Remove the node images as well.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Remove containers and volumes
  lab_remains:
"""

RETURN = r"""
actions:
  description: What was removed, or would be.
  type: list
  elements: str
  returned: always
"""

import shutil

from ansible.module_utils.basic import AnsibleModule

from lab.paths import IMAGES, LABEL, PREFIX


def main() -> None:
    module = AnsibleModule(argument_spec={"images": {"type": "bool", "default": False}}, supports_check_mode=True)
    if not shutil.which("podman"):
        # Without podman there can be no containers: a lab that never got as far.
        module.exit_json(changed=False, actions=[])

    def listed(*command: str) -> list[str]:
        _, out, _ = module.run_command(["podman", *command], check_rc=True)
        return [line for line in out.split() if line]

    containers = listed("ps", "--all", "--filter", f"label={LABEL}", "--format", "{{.Names}}")
    # What the build of an image leaves behind when it is killed has no label, but stands on an image of ours.
    for line in listed("ps", "--all", "--external", "--format", "{{.ID}}={{.Image}}={{.Names}}"):
        identifier, image, name = line.split("=", 2)
        if image.startswith(f"{IMAGES}/") and name not in containers:
            containers.append(identifier)
    volumes = [name for name in listed("volume", "ls", "--format", "{{.Name}}") if name.startswith(PREFIX)]
    images: list[str] = []
    if module.params["images"]:
        images = listed("images", "--filter", f"reference={IMAGES}/*", "--format", "{{.Repository}}:{{.Tag}}")
    actions = [f"container {name}" for name in containers] + [f"volume {name}" for name in volumes]
    actions += [f"image {name}" for name in images]
    if not module.check_mode:
        for command, names in (
            (["rm", "--force", "--time", "0"], containers),
            (["volume", "rm", "--force"], volumes),
            (["rmi", "--force"], images),
        ):
            if names:
                module.run_command(["podman", *command, *names], check_rc=True)
    module.exit_json(changed=bool(actions), actions=actions)


if __name__ == "__main__":
    main()
