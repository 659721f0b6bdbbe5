#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: parameters in, facts, one list of problems out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kubernetes_preflight
short_description: Say why a node cannot be a member of its cluster, before anything is touched
version_added: 0.1.0
description:
  - Looks at the inventory's groups, the versions, the node's clock, swap, memory, addresses, cgroups, programs, images
    and ports, and fails with all problems at once, a sentence each with its remedy.
  - Changes nothing.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
options:
  name:
    description: The node's name.
    type: str
    required: true
  address:
    description: The address by which the cluster reaches it.
    type: str
    required: true
  region:
    description: Where its cluster is, for messages.
    type: str
    default: ""
  roles:
    description: What the inventory's groups make of it.
    type: list
    elements: str
    choices: [control_plane, worker, load_balancer]
    required: true
  control_planes:
    description: All control planes of its cluster.
    type: list
    elements: str
    required: true
  load_balancers:
    description: The load balancers of its cluster.
    type: list
    elements: str
    default: []
  version:
    description: Version of Kubernetes to run, without v.
    type: str
    required: true
  api_version:
    description: Version that the cluster's API servers run, if there are any.
    type: str
    default: ""
  api_port:
    description: Port of the load balancer.
    type: int
    default: 8443
  programs:
    description: Paths of programs that must be there.
    type: list
    elements: str
    default: []
  archives:
    description: Image archives that must be there; each may be a pattern.
    type: list
    elements: str
    default: []
  runtime_driver:
    description: The container runtime's cgroup driver.
    type: str
    default: systemd
  kubelet_driver:
    description: The kubelet's cgroup driver.
    type: str
    default: systemd
  memory_mib:
    description: Memory that the node must have, in MiB.
    type: int
    default: 0
  swap_allowed:
    description: Whether the kubelet is told to run with swap.
    type: bool
    default: false
  cgroup_v1_allowed:
    description: Whether the kubelet is told to run with cgroup v1.
    type: bool
    default: false
  controller_time:
    description: The controller's clock when it called, in unix seconds.
    type: float
    required: true
  clock_s:
    description: How far the node's clock may be from the controller's, in seconds. The call's own time counts in.
    type: float
    default: 30
notes:
  - Needs root on the node (C(become)), to see whose the ports are.
"""

EXAMPLES = r"""
- name: Check the node
  censuschat.infra.kubernetes_preflight:
    name: use1-app2
    address: 10.77.1.12
    roles: [worker]
    control_planes: [use1-app1]
    version: 1.35.4
    controller_time: "{{ now(utc=true).timestamp() }}"
  become: true
"""

RETURN = r"""
problems:
  description: All that stands in the way, a sentence each.
  returned: always
  type: list
  elements: str
"""

import glob
import ipaddress
import os
import re
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.preflight import Facts, Wanted, problems
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands

_LISTEN = "0A"


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def listening() -> dict[int, str]:
    """TCP ports that something listens on, with the name of the program."""
    inodes: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in read(table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                inodes[fields[9]] = int(fields[1].rsplit(":", 1)[1], 16)
    ports = dict.fromkeys(inodes.values(), "another program")
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        except OSError:
            continue
        if match and match.group(1) in inodes:
            process = link.split("/")[2]
            # The program's own name: the kernel cuts what it calls a process to 15 characters.
            program = os.path.basename(read(f"/proc/{process}/cmdline").split("\0", 1)[0])
            ports[inodes[match.group(1)]] = program or read(f"/proc/{process}/comm").strip()
    return ports


def addresses() -> tuple[str, ...]:
    """The node's own IPv4 addresses, without the loopback."""
    shown = Commands().run(["ip", "-brief", "-4", "address", "show"])
    found = (
        ipaddress.ip_interface(word).ip for line in shown.out.splitlines() for word in line.split()[2:] if "/" in word
    )
    return tuple(str(address) for address in found if not address.is_loopback)


def observe(controller_time: float, programs: list[str], archives: list[str]) -> Facts:
    """The node as it is. `controller_time` is the controller's clock at the call."""
    clock = time.time() - controller_time
    memory = re.search(r"^MemTotal:\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)
    image = re.search(r"image: \S+/kube-apiserver:v(\S+)", read("/etc/kubernetes/manifests/kube-apiserver.yaml"))
    missing = [path for path in programs if not os.access(path, os.X_OK)]
    missing += [pattern for pattern in archives if not glob.glob(pattern)]
    return Facts(
        member=os.path.exists("/etc/kubernetes/kubelet.conf") or os.path.exists("/etc/kubernetes/censuschat-pending"),
        clock_s=clock,
        swaps=tuple(line.split()[0] for line in read("/proc/swaps").splitlines()[1:]),
        listening=listening(),
        memory_mib=int(memory.group(1)) // 1024 if memory else 0,
        cpus=os.cpu_count() or 1,
        addresses=addresses(),
        systemd=os.path.isdir("/run/systemd/system"),
        cgroup_v1=not os.path.exists("/sys/fs/cgroup/cgroup.controllers"),
        missing=tuple(missing),
        installed=image.group(1) if image else "",
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "address": {"type": "str", "required": True},
            "region": {"type": "str", "default": ""},
            "roles": {
                "type": "list",
                "elements": "str",
                "choices": ["control_plane", "worker", "load_balancer"],
                "required": True,
            },
            "control_planes": {"type": "list", "elements": "str", "required": True},
            "load_balancers": {"type": "list", "elements": "str", "default": []},
            "version": {"type": "str", "required": True},
            "api_version": {"type": "str", "default": ""},
            "api_port": {"type": "int", "default": 8443},
            "programs": {"type": "list", "elements": "str", "default": []},
            "archives": {"type": "list", "elements": "str", "default": []},
            "runtime_driver": {"type": "str", "default": "systemd"},
            "kubelet_driver": {"type": "str", "default": "systemd"},
            "memory_mib": {"type": "int", "default": 0},
            "swap_allowed": {"type": "bool", "default": False},
            "cgroup_v1_allowed": {"type": "bool", "default": False},
            "controller_time": {"type": "float", "required": True},
            "clock_s": {"type": "float", "default": 30},
        },
        supports_check_mode=True,
    )
    p = module.params
    wanted = Wanted(
        name=p["name"],
        address=p["address"],
        region=p["region"],
        roles=tuple(p["roles"]),
        control_planes=tuple(p["control_planes"]),
        load_balancers=tuple(p["load_balancers"]),
        version=p["version"],
        api_version=p["api_version"],
        api_port=p["api_port"],
        runtime_driver=p["runtime_driver"],
        kubelet_driver=p["kubelet_driver"],
        memory_mib=p["memory_mib"],
        swap_allowed=p["swap_allowed"],
        cgroup_v1_allowed=p["cgroup_v1_allowed"],
        clock_s=p["clock_s"],
    )
    found = problems(wanted, observe(p["controller_time"], p["programs"], p["archives"]))
    if found:
        module.fail_json(msg="Nothing was touched. " + ". ".join(found) + ".", problems=found)
    module.exit_json(changed=False, problems=[])


if __name__ == "__main__":
    main()
