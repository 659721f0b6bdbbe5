# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which versions of Kubernetes may stand beside each other (https://kubernetes.io/releases/version-skew-policy/)."""

from __future__ import annotations

import re

OLDEST_KUBELET = 3
"""How many minor versions a kubelet may be behind its API server."""


def minor(version: str) -> int:
    """The minor number of a version like 1.35.4; ValueError for anything else."""
    match = re.fullmatch(r"v?1\.(\d+)\.\d+\S*", version)
    if not match:
        raise ValueError(f"{version!r} is not a version of Kubernetes like 1.35.4")
    return int(match.group(1))


def refused_kubelet(kubelet: str, api: str) -> str:
    """Why a kubelet may not run beside an API server of that version; empty when it may."""
    ours, theirs = minor(kubelet), minor(api)
    if ours > theirs:
        return (
            f"its kubelet {kubelet} would be newer than the API server {api}, which Kubernetes forbids: "
            f"upgrade the control planes first, or give the node {api}"
        )
    if theirs - ours > OLDEST_KUBELET:
        return (
            f"its kubelet {kubelet} would be more than {OLDEST_KUBELET} minor versions behind the API server {api}, "
            f"which Kubernetes forbids: give the node {api}"
        )
    return ""


def refused_join(version: str, api: str) -> str:
    """Why kubeadm of `version` may not join a node to an API server; empty when it may."""
    if refusal := refused_kubelet(version, api):
        return refusal
    if minor(api) != minor(version):
        return (
            f"kubeadm {version} joins nodes to clusters of its own minor version only, and the API server runs {api}: "
            f"give the node {api}"
        )
    return ""
