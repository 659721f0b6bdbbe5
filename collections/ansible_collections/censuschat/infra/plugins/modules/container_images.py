#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_images
short_description: Have a node's container runtime hold all images of a set of archives
version_added: 0.1.0
description:
  - Compares what containerd has with what the archives hold and imports only what is missing or came from an archive
    with other content.
  - Imported images are pinned, so that the kubelet does not remove what no registry could give back.
  - An archive that matches nothing or cannot be read is an error that names it.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  archives:
    description: Paths of archives on the node, as C(docker save) makes them. Each may be a pattern.
    type: list
    elements: str
    required: true
  namespace:
    description: Namespace of containerd. The kubelet's is the default.
    type: str
    default: k8s.io
  ctr:
    description: The program ctr.
    type: path
    default: /usr/local/bin/ctr
  parallel:
    description: How many archives are imported at the same time.
    type: int
    default: 2
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Have the images of this version
  censuschat.infra.container_images:
    archives: [/opt/kubernetes/v1.35.4/images/*.tar]
  become: true
"""

RETURN = r"""
imported:
  description: Archives that were imported, or would be in check mode, with the reason.
  returned: always
  type: list
  elements: dict
  contains:
    archive:
      description: Path of the archive.
      type: str
    images:
      description: The images in it.
      type: list
      elements: str
    why:
      description: Why it is imported.
      type: str
"""

import concurrent.futures
import glob

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.images import (
    LABEL_SOURCE,
    LABELS_KEPT,
    Archive,
    parse_list,
    plan,
    read,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError


def found(patterns: list[str]) -> list[str]:
    """All paths of the patterns, sorted; NodeError for one that matches nothing."""
    paths: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(pattern)
        if not matches:
            raise NodeError(f"no image archive matches {pattern}: prepare the images of this version on the node first")
        paths.update(matches)
    return sorted(paths)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "archives": {"type": "list", "elements": "str", "required": True},
            "namespace": {"type": "str", "default": "k8s.io"},
            "ctr": {"type": "path", "default": "/usr/local/bin/ctr"},
            "parallel": {"type": "int", "default": 2},
        },
        supports_check_mode=True,
    )
    p = module.params
    commands = Commands()
    ctr = [p["ctr"], "--namespace", p["namespace"], "images"]

    def take(step: tuple[Archive, str]) -> None:
        archive = step[0]
        commands.must([*ctr, "import", "--local", archive.path], f"importing {archive.path}")
        for name in archive.names:
            labels = [f"{key}={value}" for key, value in {**LABELS_KEPT, LABEL_SOURCE: archive.source}.items()]
            commands.must([*ctr, "label", name, *labels], f"labelling {name}")

    try:
        archives = [read(path) for path in found(p["archives"])]
        listed = commands.run([*ctr, "list"], timeout=30.0)
        if listed.code != 0 and not module.check_mode:
            raise NodeError(f"containerd does not list its images: {listed.tail(3)}; is containerd.service running?")
        # On a bare node a check mode run finds no runtime yet, and plans every import.
        steps = plan(archives, parse_list(listed.out) if listed.code == 0 else {})
        if not module.check_mode:
            with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, p["parallel"])) as pool:
                list(pool.map(take, steps))
    except NodeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(steps),
        imported=[{"archive": a.path, "images": list(a.names), "why": why} for a, why in steps],
        diff={"before": "", "after": "".join(f"import {a.path}: {why}\n" for a, why in steps)},
    )


if __name__ == "__main__":
    main()
