# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of kubernetes_preflight: pure. Why a node cannot be what the inventory wants of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.versions import refused_join, refused_kubelet

#: Ports by what listens there, from https://kubernetes.io/docs/reference/networking/ports-and-protocols/.
PORTS_NODE = {10250: "kubelet", 10248: "kubelet", 10256: "kube-proxy", 10249: "kube-proxy"}
PORTS_CONTROL_PLANE = {
    6443: "kube-apiserver",
    2379: "etcd",
    2380: "etcd",
    2381: "etcd",
    10257: "kube-controller-manager",
    10259: "kube-scheduler",
}
#: What kubeadm asks of a control plane.
CPUS_CONTROL_PLANE = 2


@dataclasses.dataclass(frozen=True)
class Facts:
    """The node as it is.

    clock_s: how far its clock is ahead of the controller's. swaps: devices and files with swap. listening: TCP ports
    with the program that has them. memory_mib: the machine's. missing: programs and image archives that are not there.
    installed: version of the API server that runs here, without v. systemd: it is the node's init. cgroup_v1: the node
    has the old hierarchy.
    """

    member: bool = False
    clock_s: float = 0.0
    swaps: tuple[str, ...] = ()
    listening: Mapping[int, str] = dataclasses.field(default_factory=dict)
    memory_mib: int = 1 << 20
    cpus: int = 64
    addresses: tuple[str, ...] = ()
    systemd: bool = True
    cgroup_v1: bool = False
    missing: tuple[str, ...] = ()
    installed: str = ""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the node shall be. `roles`: of control_plane, worker, load_balancer. `api_version`: the cluster's."""

    name: str
    address: str
    region: str
    roles: tuple[str, ...]
    control_planes: tuple[str, ...]
    load_balancers: tuple[str, ...]
    version: str
    api_version: str = ""
    api_port: int = 6443
    runtime_driver: str = "systemd"
    kubelet_driver: str = "systemd"
    memory_mib: int = 0
    swap_allowed: bool = False
    cgroup_v1_allowed: bool = False
    clock_s: float = 30.0


def problems(wanted: Wanted, facts: Facts) -> list[str]:
    """All that stands in the way, a sentence each that names the node and the remedy; empty when nothing does."""
    return [*_inventory(wanted), *_versions(wanted, facts), *_machine(wanted, facts), *_ports(wanted, facts)]


def _inventory(wanted: Wanted) -> list[str]:
    found = []
    name, planes = wanted.name, len(wanted.control_planes)
    both = "control_plane" in wanted.roles and "worker" in wanted.roles
    if both:
        found.append(
            f"{name} is in the groups kube_control_plane and kube_node: take it out of kube_node; a control plane that "
            "shall take pods as well is made schedulable instead"
        )
    if not {"control_plane", "worker"} & set(wanted.roles):
        found.append(f"{name} is in none of the groups kube_control_plane and kube_node: put it into one of them")
    if not planes:
        found.append(
            f"{name} has no control plane in its region {wanted.region}: put a host of that region into "
            "kube_control_plane"
        )
    elif planes % 2 == 0:
        found.append(
            f"{name}'s cluster in {wanted.region} would have {planes} members of etcd "
            f"({', '.join(wanted.control_planes)}), and an even number survives no more losses than one fewer: "
            f"make it {planes - 1} or {planes + 1} control planes"
        )
    if planes > 1 and not wanted.load_balancers:
        found.append(
            f"{name}'s cluster in {wanted.region} has {planes} control planes but no address for all of them: put at "
            "least one host into kube_load_balancer"
        )
    return found


def _versions(wanted: Wanted, facts: Facts) -> list[str]:
    name = wanted.name
    running = facts.installed or wanted.api_version
    try:
        refusal = (refused_kubelet if facts.member else refused_join)(wanted.version, running or wanted.version)
    except ValueError as error:
        return [f"{name}: {error}; correct kubernetes_version"]
    if refusal:
        return [f"{name} cannot run Kubernetes {wanted.version}: {refusal}"]
    if facts.installed and facts.installed != wanted.version:
        return [
            f"{name} is a control plane that runs Kubernetes {facts.installed} and the inventory says "
            f"{wanted.version}: that is an upgrade, which is not done in passing; upgrade the cluster first, or set "
            "kubernetes_version back"
        ]
    return []


def _machine(wanted: Wanted, facts: Facts) -> list[str]:
    found = []
    name = wanted.name
    if abs(facts.clock_s) > wanted.clock_s:
        found.append(
            f"{name}'s clock is {abs(facts.clock_s):.0f} s {'ahead of' if facts.clock_s > 0 else 'behind'} the "
            f"controller's, and certificates and leases need the same time within {wanted.clock_s:.0f} s: set it, for "
            "example with `systemctl restart systemd-timesyncd`"
        )
    if facts.swaps and not wanted.swap_allowed:
        found.append(
            f"{name} has swap on ({', '.join(facts.swaps)}), with which memory limits mean nothing: run `swapoff -a` "
            "and take it out of /etc/fstab"
        )
    if facts.memory_mib < wanted.memory_mib:
        found.append(
            f"{name} has {facts.memory_mib} MiB of memory and needs {wanted.memory_mib} as a "
            f"{'control plane' if 'control_plane' in wanted.roles else 'worker'}: give it more, or take another machine"
        )
    if "control_plane" in wanted.roles and facts.cpus < CPUS_CONTROL_PLANE:
        found.append(f"{name} has {facts.cpus} CPU and a control plane needs {CPUS_CONTROL_PLANE}: give it more")
    if wanted.address not in facts.addresses:
        found.append(
            f"{name} does not have the address {wanted.address} that the cluster would reach it by "
            f"(it has {', '.join(facts.addresses) or 'none'}): correct ansible_host or kubernetes_node_address"
        )
    if wanted.runtime_driver != wanted.kubelet_driver:
        found.append(
            f"{name}'s container runtime would manage cgroups by {wanted.runtime_driver} and its kubelet by "
            f"{wanted.kubelet_driver}, and pods would be killed at random: give container_runtime_cgroup_driver and "
            "kubernetes_node_cgroup_driver the same value"
        )
    elif wanted.kubelet_driver == "systemd" and not facts.systemd:
        found.append(
            f"{name} does not run systemd as its init, so the cgroup driver systemd cannot work: set "
            "container_runtime_cgroup_driver and kubernetes_node_cgroup_driver to cgroupfs"
        )
    if facts.cgroup_v1 and not wanted.cgroup_v1_allowed:
        found.append(
            f"{name} has cgroup v1, which this kubelet refuses: boot it with systemd.unified_cgroup_hierarchy=1, or "
            "set failCgroupV1: false in kubernetes_node_kubelet"
        )
    if facts.missing:
        found.append(
            f"{name} lacks {', '.join(facts.missing)}: prepare the programs and images of Kubernetes {wanted.version} "
            "there first"
        )
    return found


def _ports(wanted: Wanted, facts: Facts) -> list[str]:
    """Ports of the future that others have. A member's own programs have them rightly."""
    wants = dict(PORTS_NODE)
    if "control_plane" in wanted.roles:
        wants |= PORTS_CONTROL_PLANE
    if "load_balancer" in wanted.roles:
        wants[wanted.api_port] = "haproxy"
    found = []
    for port, program in sorted(wants.items()):
        holder = facts.listening.get(port)
        # What Kubernetes left is cleared away by a join; an etcd may as well be another service's.
        if not holder or (holder == program and (facts.member or program != "etcd")):
            continue
        remedy = (
            "give that one other ports or, if an earlier cluster left it, remove the node (playbook cluster_remove.yml)"
            if holder == program
            else "stop it or give it another port"
        )
        found.append(f"{wanted.name}'s port {port} is taken by {holder}, and {program} needs it: {remedy}")
    return found
