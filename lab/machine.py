"""What the lab needs of the machine: checks before anything is touched, programs, limits raised for the lab's life."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from lab import fabric
from lab.paths import STATE, cache
from lab.topology import PLAIN, Topology

#: Program -> Debian package that has it.
PROGRAMS = {
    "podman": "podman",
    "nft": "nftables",
    "ip": "iproute2",
    "debootstrap": "debootstrap",
    "apt-cacher-ng": "apt-cacher-ng",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
    "sysctl": "procps",
    "modprobe": "kmod",
}
#: What these packages enable, though the lab needs the program only: an installation must not leave a daemon behind.
UNITS = {
    "apt-cacher-ng": ("apt-cacher-ng.service",),
    "podman": (
        "podman.socket",
        "podman.service",
        "podman-auto-update.service",
        "podman-auto-update.timer",
        "podman-restart.service",
    ),
}


@dataclass(frozen=True)
class Setting:
    """A kernel setting of the machine that the nodes need and cannot set themselves. `least`: more is as good."""

    name: str
    value: int
    least: bool = False

    def met(self, current: int) -> bool:
        return current >= self.value if self.least else current == self.value


SETTINGS = (
    # All nodes share the machine's inotify instances, 128 as a rule: a node uses 5, a worker 14, a control plane 29.
    Setting("fs.inotify.max_user_instances", 1024, least=True),
    # A kubelet sets these itself, and does not start where it finds others and cannot.
    Setting("vm.overcommit_memory", 1),
    Setting("vm.panic_on_oom", 0),
    Setting("kernel.panic", 10),
    Setting("kernel.panic_on_oops", 1),
    Setting("kernel.keys.root_maxkeys", 1000000),
    Setting("kernel.keys.root_maxbytes", 25000000),
)
#: What nodes need of the kernel and cannot load themselves: module -> a path that is there, or a line of
#: /proc/filesystems, when the kernel has it, loaded or built in.
MODULES = {
    "br_netfilter": "/proc/sys/net/bridge",
    "nf_conntrack": "/proc/sys/net/netfilter/nf_conntrack_max",
    "overlay": "overlay",
}
#: Free memory in MiB a node. Measured with the site deployed, anonymous memory of its processes: app 24-47, db 89-129,
#: witness 41; the rest is for PostgreSQL's shared buffers and page cache.
MEMORY_NODE = {"app": 80, "db": 240, "witness": 80, PLAIN: 80}
#: And in addition for a node of a cluster. Measured likewise, all processes of the node and its pods: with the
#: application 407-579 a control plane, 152-220 a worker; without it 430-480 and 92-99.
MEMORY_CLUSTER = {"": 0, "control-plane": 500, "worker": 150}
#: For Ansible, the AWS emulator, the clients.
MEMORY_BASE = 600
#: podman's engine settings for the lab, named to podman by CONTAINERS_CONF.
PODMAN_SETTINGS = STATE / "containers.conf"
#: Free disk in GiB for images, node data (1 GiB of container images on a control plane), the package cache and the
#: programs of Kubernetes.
DISK = 12


@dataclass(frozen=True)
class Facts:
    """What was observed of the machine. Sizes in MiB and GiB; routes without the lab's own."""

    root: bool
    debian: str
    missing: tuple[str, ...]
    memory_mib: int
    disk_gib: int
    routes: tuple[str, ...]
    hybrid_cgroups: bool


def memory(topology: Topology) -> int:
    """The free memory in MiB that a lab takes."""
    return MEMORY_BASE + sum(MEMORY_NODE[node.role] + MEMORY_CLUSTER[node.kubernetes] for node in topology.nodes)


def problems(facts: Facts, topology: Topology, resuming: bool = False) -> list[str]:
    """What stands in the way, one sentence each with what to do. Missing programs do not: they get installed.

    `resuming`: part of the lab is there, so memory and disk that it takes already are not asked for again.
    """
    found = []
    if not facts.root:
        found.append("The lab needs root (network namespaces, containers with systemd); run it with sudo.")
    if not facts.debian:
        found.append("The lab needs Debian 12 or later (apt, debootstrap); this is another system.")
    need = memory(topology)
    if facts.memory_mib < need and not resuming:
        found.append(
            f"The lab of {len(topology.nodes)} nodes needs {need} MiB of free memory, there are {facts.memory_mib}; "
            "free some, or take `lab up --small`."
        )
    if facts.disk_gib < DISK and not resuming:
        found.append(f"The lab needs {DISK} GiB of free disk, there are {facts.disk_gib}; free some.")
    for route in facts.routes:
        # Shorter ones are default routes in disguise: a VPN adds two halves.
        if IPv4Network(route).prefixlen >= 8 and IPv4Network(route).overlaps(topology.supernet):
            found.append(
                f"The machine has a route to {route}, which the lab's network {topology.supernet} would hide; "
                "remove the route, or change lab_networks in the inventory."
            )
    return found


def observe(topology: Topology) -> Facts:
    """Looks at the machine; changes nothing."""
    release = dict(line.partition("=")[::2] for line in _read("/etc/os-release").splitlines() if "=" in line)
    identifier = release.get("ID", "").strip('"')
    version = release.get("VERSION_ID", "").strip('"')
    debian = version if identifier == "debian" and version.isdigit() and int(version) >= 12 else ""
    available = [line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemAvailable")]
    storage = next(path for path in [Path("/var/lib/containers"), Path("/var/lib")] if path.exists())
    place = cache()
    while not place.exists():
        place = place.parent
    disk = min(shutil.disk_usage(storage).free, shutil.disk_usage(place).free) >> 30
    routes: list[str] = []
    if shutil.which("ip"):
        for item in json.loads(fabric.run(("ip", "-j", "-4", "route", "show", "table", "all")) or "[]"):
            if item.get("dev") == fabric.UPLINK or item.get("type") in ("broadcast", "multicast"):
                continue
            with suppress(ValueError):
                routes.append(str(IPv4Network(item["dst"])))
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    hybrid = not Path("/sys/fs/cgroup/cgroup.controllers").exists()
    needed = dict(PROGRAMS)
    if hybrid:
        # crun refuses the hybrid cgroup layout.
        needed["runc"] = "runc"
    missing = sorted({package for program, package in needed.items() if not shutil.which(program, path=path)})
    return Facts(
        root=os.geteuid() == 0,
        debian=debian,
        missing=tuple(missing),
        memory_mib=int(available[0]) // 1024 if available else 0,
        disk_gib=disk,
        routes=tuple(routes),
        hybrid_cgroups=hybrid,
    )


def architecture() -> str:
    """The machine's architecture in Debian's words."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def files_limit() -> int:
    """How many open files a node may have: the machine's hard limit, at most a million."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1048576 if hard == resource.RLIM_INFINITY else min(hard, 1048576)


def podman_settings(facts: Facts) -> str:
    """podman's engine settings for this machine; empty where its defaults work (cgroup v2 under systemd)."""
    lines = []
    if facts.hybrid_cgroups:
        lines.append('runtime = "runc"')
    if facts.hybrid_cgroups or not Path("/run/systemd/system").is_dir():
        lines.append('cgroup_manager = "cgroupfs"')
        lines.append('events_logger = "file"')
    return "[engine]\n" + "\n".join(lines) + "\n" if lines else ""


def install(packages: tuple[str, ...], log: Path) -> None:
    """Installs Debian packages without starting their services; raises RuntimeError with apt's own words."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
        policy.chmod(0o755)
    try:
        with log.open("a", encoding="utf-8") as output:
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for command in (
                ("apt-get", "update"),
                ("apt-get", "install", "-y", "--no-install-recommends", *packages),
            ):
                done = subprocess.run(
                    command, stdout=output, stderr=output, env=env, check=False, stdin=subprocess.DEVNULL
                )
                if done.returncode != 0 and command[1] == "install":
                    tail = " | ".join(log.read_text(encoding="utf-8").splitlines()[-3:])
                    raise RuntimeError(f"`{' '.join(command)}` failed: {tail}; all of it is in {log}")
            units = [unit for package in packages for unit in UNITS.get(package, ())]
            if units and shutil.which("systemctl"):
                # A fault here leaves a unit enabled for the next start of the machine; the lab itself does not mind.
                subprocess.run(("systemctl", "disable", *units), stdout=output, stderr=output, check=False)
    finally:
        if ours:
            policy.unlink(missing_ok=True)


@dataclass(frozen=True)
class Limit:
    """What to do about a kernel setting of the machine: set it, remember what was found, forget that."""

    set_to: int | None = None
    remember: int | None = None
    forget: bool = False


def plan_raise(setting: Setting, current: int, remembered: int | None) -> Limit:
    """Changes only what does not do, and remembers the first value found."""
    if setting.met(current):
        return Limit()
    return Limit(set_to=setting.value, remember=current if remembered is None else None)


def plan_restore(setting: Setting, current: int, remembered: int | None) -> Limit:
    """Puts back what the lab changed, unless somebody else has changed it since."""
    if remembered is None:
        return Limit()
    return Limit(set_to=remembered if current == setting.value else None, forget=True)


def limit_file(state: Path = STATE) -> Path:
    return state / "limits.json"


def remembered(state: Path = STATE) -> Mapping[str, int]:
    """The values found before the lab changed them."""
    try:
        return dict(json.loads(limit_file(state).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def current(setting: Setting) -> int:
    """The setting's value now."""
    return int(_setting_file(setting).read_text(encoding="ascii"))


def _setting_file(setting: Setting) -> Path:
    return Path("/proc/sys/" + setting.name.replace(".", "/"))


def apply_limits(limits: Mapping[Setting, Limit], state: Path = STATE) -> None:
    """Remembers first, then sets, then forgets: an interruption in between loses nothing.

    Raises RuntimeError naming a setting that this machine does not let anybody set.
    """
    found = dict(remembered(state))
    found.update({setting.name: limit.remember for setting, limit in limits.items() if limit.remember is not None})
    if any(limit.remember is not None for limit in limits.values()):
        _write_limits(found, state)
    for setting, limit in limits.items():
        if limit.set_to is None:
            continue
        try:
            _setting_file(setting).write_text(str(limit.set_to), encoding="ascii")
        except OSError as error:
            raise RuntimeError(
                f"{setting.name} of the machine cannot be set to {limit.set_to}: {error.strerror}; "
                "the lab's kubelets need it: run the lab where root may set it"
            ) from error
    forgotten = {setting.name for setting, limit in limits.items() if limit.forget}
    if forgotten:
        _write_limits({name: value for name, value in found.items() if name not in forgotten}, state)


def _write_limits(values: Mapping[str, int], state: Path) -> None:
    file = limit_file(state)
    if not values:
        file.unlink(missing_ok=True)
        return
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(values), encoding="utf-8")
    fresh.replace(file)


def missing_modules() -> tuple[str, ...]:
    """The kernel modules of MODULES that are neither loaded nor built in."""
    filesystems = _read("/proc/filesystems").split()
    return tuple(
        module
        for module, sign in MODULES.items()
        if not (Path(sign).exists() if sign.startswith("/") else sign in filesystems)
    )


def load(modules: Sequence[str]) -> None:
    """Loads kernel modules; raises RuntimeError naming those that this kernel does not have."""
    for module in modules:
        done = subprocess.run(("modprobe", module), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"the machine's kernel has no {module}, which the lab's Kubernetes nodes need "
                f"({done.stderr.strip()}); install the kernel's modules, or start a kernel that has it"
            )
