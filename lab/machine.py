"""What the lab needs of the machine: checks before anything is touched, programs, limits raised for the lab's life."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from lab import fabric
from lab.paths import STATE, cache
from lab.topology import Topology

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
#: All nodes share the machine's inotify instances, 128 as a rule: a node uses 5, one with a kubelet up to 25.
INOTIFY = ("fs.inotify.max_user_instances", 1024)
#: Free memory in MiB a node. Measured with the site deployed, anonymous memory of its processes: app 24-47, db 89-129,
#: witness 41; the rest is for PostgreSQL's shared buffers and page cache.
MEMORY_NODE = {"app": 80, "db": 240, "witness": 80}
#: For Ansible, the AWS emulator, the clients.
MEMORY_BASE = 600
#: podman's engine settings for the lab, named to podman by CONTAINERS_CONF.
PODMAN_SETTINGS = STATE / "containers.conf"
#: Free disk in GiB for images, node data and the package cache.
DISK = 6


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


def problems(facts: Facts, topology: Topology, resuming: bool = False) -> list[str]:
    """What stands in the way, one sentence each with what to do. Missing programs do not: they get installed.

    `resuming`: part of the lab is there, so memory and disk that it takes already are not asked for again.
    """
    found = []
    if not facts.root:
        found.append("The lab needs root (network namespaces, containers with systemd); run it with sudo.")
    if not facts.debian:
        found.append("The lab needs Debian 12 or later (apt, debootstrap); this is another system.")
    need = MEMORY_BASE + sum(MEMORY_NODE[node.role] for node in topology.nodes)
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


def plan_raise(current: int, remembered: int | None, wanted: int) -> Limit:
    """Raises only what is lower, and remembers the first value found."""
    if current >= wanted:
        return Limit()
    return Limit(set_to=wanted, remember=current if remembered is None else None)


def plan_restore(current: int, remembered: int | None, wanted: int) -> Limit:
    """Puts back what the lab raised, unless somebody else has changed it since."""
    if remembered is None:
        return Limit()
    return Limit(set_to=remembered if current == wanted else None, forget=True)


def limit_file(state: Path = STATE) -> Path:
    return state / "limits.json"


def remembered(state: Path = STATE) -> Mapping[str, int]:
    """The values found before the lab raised them."""
    try:
        return dict(json.loads(limit_file(state).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def current_limit() -> int:
    return int(Path("/proc/sys/" + INOTIFY[0].replace(".", "/")).read_text(encoding="ascii"))


def apply_limit(limit: Limit, state: Path = STATE) -> None:
    """Remembers first, then sets: an interruption in between loses nothing."""
    if limit.remember is not None:
        limit_file(state).write_text(json.dumps({INOTIFY[0]: limit.remember}), encoding="utf-8")
    if limit.set_to is not None:
        Path("/proc/sys/" + INOTIFY[0].replace(".", "/")).write_text(str(limit.set_to), encoding="ascii")
    if limit.forget:
        limit_file(state).unlink(missing_ok=True)
