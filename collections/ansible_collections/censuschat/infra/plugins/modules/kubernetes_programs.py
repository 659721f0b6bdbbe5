#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, one plan, one apply, one result out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_programs
short_description: Have the programs and images of a Kubernetes version on a node, each proven by its checksum
version_added: 0.1.0
description:
  - The source is a directory of the site's own mirror with C(SHA256SUMS), as C(sha256sum) writes it, and the files that
    it names. The checksum of that table stands in the inventory, so that nothing else can come from the mirror.
  - Fetches only what is missing or has another checksum. A file appears by one rename, complete and proven.
  - What was proven once is not read again while its size and time of change stay.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  source:
    description: URL of the directory.
    type: str
    required: true
  checksum:
    description: SHA-256 of the source's C(SHA256SUMS).
    type: str
    required: true
  path:
    description: Directory on the node that becomes a copy of it.
    type: path
    required: true
  files:
    description: Files to have, relative to the directory. Each may be a pattern.
    type: list
    elements: str
    required: true
  parallel:
    description: How many files are fetched at the same time.
    type: int
    default: 4
  retries:
    description: How often a broken transfer is tried again.
    type: int
    default: 3
notes:
  - Needs root on the node (C(become)).
"""

EXAMPLES = r"""
- name: Have the programs of this version
  censuschat.infra.kubernetes_programs:
    source: https://mirror.example.com/kubernetes/v1.35.4
    checksum: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
    path: /opt/kubernetes/v1.35.4
    files: [bin/kubelet, bin/kubeadm, images/*.tar]
  become: true
"""

RETURN = r"""
fetched:
  description: Files that were fetched, or would be in check mode, with the reason.
  returned: always
  type: list
  elements: dict
  contains:
    file:
      description: Path relative to the directory.
      type: str
    why:
      description: Why it is fetched.
      type: str
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.programs import (
    Found,
    chosen,
    parse_sums,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, write_atomically

_CHUNK = 1 << 20
_PROVEN = ".proven.json"


class Directory:
    """The copy on the node."""

    def __init__(self, path: str, source: str, retries: int) -> None:
        self.path = path
        self.source = source.rstrip("/")
        self.retries = retries

    def sums(self, checksum: str) -> tuple[str, dict[str, str]]:
        """The table of checksums, the node's own copy if it is the right one."""
        own = os.path.join(self.path, "SHA256SUMS")
        text = ""
        if os.path.exists(own):
            with open(own, encoding="utf-8") as handle:
                text = handle.read()
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            try:
                text = open_url(f"{self.source}/SHA256SUMS", timeout=30).read().decode()
            except (OSError, ValueError) as error:
                raise NodeError(f"{self.source}/SHA256SUMS cannot be fetched: {error}") from error
            found = hashlib.sha256(text.encode()).hexdigest()
            if found != checksum:
                raise NodeError(
                    f"{self.source}/SHA256SUMS has the checksum {found} and not {checksum}: nothing was taken from it. "
                    "Find out who changed the mirror, or correct the checksum in the inventory"
                )
        return text, parse_sums(text)

    def observe(self, names: list[str]) -> dict[str, Found]:
        """The files that are there. Those that changed since they were proven are read."""
        try:
            with open(os.path.join(self.path, _PROVEN), encoding="utf-8") as handle:
                known = {name: Found(**value) for name, value in json.load(handle).items()}
        except (OSError, ValueError, TypeError):
            known = {}
        found = {}
        for name in names:
            try:
                info = os.stat(os.path.join(self.path, name))
            except FileNotFoundError:
                continue
            now = Found(info.st_size, info.st_mtime_ns)
            before = known.get(name)
            if before and dataclasses.replace(before, sha256="") == now:
                found[name] = before
            else:
                found[name] = dataclasses.replace(now, sha256=_digest(os.path.join(self.path, name)))
        return found

    def fetch(self, name: str, checksum: str) -> None:
        """Put one file in place; NodeError after the last retry."""
        target = os.path.join(self.path, name)
        partial = f"{target}.partial"
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        why = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2**attempt, 10))
            try:
                answer = open_url(f"{self.source}/{name}", timeout=60)
                digest = hashlib.sha256()
                with open(partial, "wb") as handle:
                    while chunk := answer.read(_CHUNK):
                        digest.update(chunk)
                        handle.write(chunk)
            except (OSError, ValueError) as error:
                why = str(error)
                continue
            if digest.hexdigest() == checksum:
                os.chmod(partial, 0o755 if name.startswith("bin/") else 0o644)
                os.replace(partial, target)
                return
            why = f"it has the checksum {digest.hexdigest()} and not {checksum}"
        if os.path.exists(partial):
            os.unlink(partial)
        raise NodeError(f"{self.source}/{name} cannot be fetched: {why}")

    def prove(self, text: str, names: list[str]) -> None:
        """Remember the table and what is proven by it."""
        write_atomically(os.path.join(self.path, "SHA256SUMS"), text, "root", "root", 0o644)
        proven = {name: dataclasses.asdict(value) for name, value in self.observe(names).items()}
        write_atomically(os.path.join(self.path, _PROVEN), json.dumps(proven), "root", "root", 0o644)


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "str", "required": True},
            "checksum": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "files": {"type": "list", "elements": "str", "required": True},
            "parallel": {"type": "int", "default": 4},
            "retries": {"type": "int", "default": 3},
        },
        supports_check_mode=True,
    )
    p = module.params
    directory = Directory(p["path"], p["source"], p["retries"])
    try:
        text, sums = directory.sums(p["checksum"])
        names = chosen(p["files"], sums)
        steps = plan(names, sums, directory.observe(names))
        if steps and not module.check_mode:
            os.makedirs(p["path"], mode=0o755, exist_ok=True)
            with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, p["parallel"])) as pool:
                list(pool.map(lambda step: directory.fetch(step[0], sums[step[0]]), steps))
            directory.prove(text, names)
    except NodeError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{p['path']} cannot be written: {error}; is there room on its file system?")
    module.exit_json(
        changed=bool(steps),
        fetched=[{"file": name, "why": why} for name, why in steps],
        diff={"before": "", "after": "".join(f"fetch {name}: {why}\n" for name, why in steps)},
    )


if __name__ == "__main__":
    main()
