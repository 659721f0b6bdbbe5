"""The node's CNI: its configuration, and which pod has which address before the API says so."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .model import Pod

NETWORK = "censuschat"


class Lease(NamedTuple):
    """An address that a CNI call gave to a pod of this node."""

    address: str
    namespace: str
    name: str
    uid: str
    given: float


def configuration(pod_cidr: str) -> str:
    """The conflist for a node's pod block.

    ptp gives each pod a link of its own to the node. The addresses given are kept under /run: a reboot ends all pods.
    The pod's address stays visible (no ipMasq), or policies would see the node instead.
    """
    ipam = {
        "type": "host-local",
        "dataDir": "/run/cni/addresses",
        "ranges": [[{"subnet": pod_cidr}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugins = [{"type": "ptp", "ipMasq": False, "ipam": ipam}]
    return json.dumps({"cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins}, indent=2) + "\n"


def leases(directory: pathlib.Path, since: float = 0.0) -> list[Lease]:
    """What libcni has kept of its successful calls since a moment, oldest first.

    A file is gone when its pod's network is; those of pods that a reboot ended stay for a while and count for nothing.
    """
    found = []
    for path in directory.glob(f"{NETWORK}-*"):
        try:
            given = path.stat().st_mtime
            if given < since:
                continue
            kept = json.loads(path.read_text(encoding="utf-8"))
            said = {entry[0]: entry[1] for entry in kept.get("cniArgs") or ()}
            addresses = [entry["address"].partition("/")[0] for entry in kept["result"].get("ips") or ()]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            # Half-written or just removed: the next look has the whole.
            continue
        name, namespace = said.get("K8S_POD_NAME", ""), said.get("K8S_POD_NAMESPACE", "")
        uid = said.get("K8S_POD_UID", "")
        found += [Lease(address, namespace, name, uid, given) for address in addresses]
    return sorted(found, key=lambda lease: (lease.given, lease.address))


def with_leases(pods: Iterable[Pod], given: Sequence[Lease], node: str) -> list[Pod]:
    """The pods with the addresses that this node's CNI has given, which the API may learn seconds later.

    The node knows best who has an address of its block: the newest lease wins over what the API says of its pods.
    """
    pods = list(pods)
    by_uid = {pod.uid: pod for pod in pods if pod.node == node}
    by_name = {(pod.namespace, pod.name): pod for pod in pods if pod.node == node}
    holder = {lease.address: by_uid.get(lease.uid) or by_name.get((lease.namespace, lease.name)) for lease in given}
    leased: dict[str, list[str]] = {}
    for address, pod in holder.items():
        if pod is not None:
            leased.setdefault(pod.uid, []).append(address)
    merged = []
    for pod in pods:
        if pod.node == node and not pod.host_network:
            told = [a for a in pod.addresses if a not in holder]
            merged.append(pod._replace(addresses=(*told, *leased.get(pod.uid, ()))))
        else:
            merged.append(pod)
    return merged
