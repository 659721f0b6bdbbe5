# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Packages that no package list has: their archives, each proven by its checksum before dpkg sees it."""

from __future__ import annotations

import hashlib
import os
import urllib.parse

from ansible.module_utils.urls import open_url
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Package
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError


def fetched(package: Package, directory: str) -> str:
    """The path of the .deb of `package`, in `directory`, after its checksum was found right.

    NodeError says what was fetched instead, or why nothing was; dpkg sees only what is proven.
    """
    algorithm, _colon, digest = package.checksum.partition(":")
    found = hashlib.new(algorithm)
    path = os.path.join(directory, f"{package.name}.deb")
    try:
        with open_url(package.url, timeout=60) as response, open(path, "wb") as handle:
            while chunk := response.read(1 << 20):
                found.update(chunk)
                handle.write(chunk)
    except (OSError, ValueError) as error:
        source = urllib.parse.urlsplit(package.url)
        raise NodeError(
            f"package {package.name} {package.version} cannot be fetched from {source.hostname or source.path}: {error}"
        ) from error
    if found.hexdigest() != digest:
        raise NodeError(
            f"package {package.name} {package.version} was not installed: what {package.url} gave has the checksum "
            f"{algorithm}:{found.hexdigest()} and not {package.checksum}. "
            "Find out who changed it, or correct the checksum"
        )
    os.chmod(path, 0o644)
    return path
