"""The node images: a Debian 12 base by debootstrap, and golden images with the packages of each role.

Everything comes from the mirror that the machine's own apt is set up with. An image's name ends in the hash of
its recipe, so a changed recipe is a new image and an unchanged one costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lab.paths import IMAGES
from lab.topology import PLAIN, SUITES, label

SUITE = SUITES[0]
#: What debootstrap adds to its smallest variant.
BASE_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "openssh-server",
    "python3",
    "python3-apt",
    "sudo",
    "iproute2",
    "ca-certificates",
    "nftables",
    "iputils-ping",
    "kmod",
    "procps",
    "libpam-pwquality",
    "unattended-upgrades",
)
#: What the controls of cis_level1 install beside what the base has.
HARDENING_PACKAGES = (
    "apparmor",
    "apparmor-utils",
    "cracklib-runtime",
    "cron",
    "logrotate",
    "rsyslog",
    "systemd-journal-remote",
    "systemd-timesyncd",
)
#: Baked into the golden image of each role, as a platform team does; the roles still declare what they need.
ROLE_PACKAGES = {
    "db": (
        *HARDENING_PACKAGES,
        "postgresql-15",
        "patroni",
        "etcd-server",
        "etcd-client",
        "python3-etcd",
        "python3-psycopg2",
        "redis-server",
        "libfaketime",
    ),
    "app": (
        *HARDENING_PACKAGES,
        "haproxy",
        "etcd-server",
        "etcd-client",
        "python3-psycopg",
        "python3-redis",
        "redis-tools",
        "postgresql-client-15",
        # What kubelet, kubeadm, kube-proxy and containerd call, and the balancer of an API with three servers.
        "runc",
        "containernetworking-plugins",
        "conntrack",
        "iptables",
        "ethtool",
        "socat",
        "keepalived",
        "python3-yaml",
    ),
    "witness": (*HARDENING_PACKAGES, "etcd-server", "etcd-client"),
}
#: A container has no use for these; each would cost start time or inotify instances, which all nodes share.
MASKED_UNITS = (
    "console-getty.service",
    "container-getty@.service",
    "getty-static.service",
    "getty.target",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-firstboot.service",
    "systemd-journald-audit.socket",
    "systemd-machine-id-commit.service",
    "systemd-modules-load.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-udevd.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udev-trigger.service",
)
#: Off until a role turns them on.
DISABLED_UNITS = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
)

#: Files of the base image: path -> (mode, text).
BASE_FILES: dict[str, tuple[int, str]] = {
    # The lab mounts a node's identity read-only; the node takes it over before its first ssh connection.
    "etc/systemd/system/censuschat-lab-identity.service": (
        0o644,
        """[Unit]
Description=Take over the identity that the lab gave this node
DefaultDependencies=no
After=local-fs.target
Before=ssh.service sysinit.target
ConditionPathExists=/run/censuschat-lab/ssh_host_ed25519_key
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
ExecStart=/bin/sh -ec 'cd /run/censuschat-lab; \\
  install -m 0644 hosts /etc/hosts; \\
  install -d -m 0700 -o ops -g ops /home/ops/.ssh; \\
  install -m 0600 -o ops -g ops authorized_keys /home/ops/.ssh/authorized_keys; \\
  install -m 0644 ssh_host_ed25519_key.pub /etc/ssh/ssh_host_ed25519_key.pub; \\
  install -m 0600 ssh_host_ed25519_key /etc/ssh/ssh_host_ed25519_key.new; \\
  mv /etc/ssh/ssh_host_ed25519_key.new /etc/ssh/ssh_host_ed25519_key'

[Install]
WantedBy=sysinit.target
""",
    ),
    # A node is privileged, but the kernel is the machine's: a node may change the settings of its own network only.
    "etc/systemd/system/censuschat-lab-kernel.service": (
        0o644,
        """[Unit]
Description=Keep the machine's kernel settings out of this node's reach
DefaultDependencies=no
Before=sysinit.target systemd-sysctl.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'mount --bind /proc/sys /proc/sys; mount --bind /proc/sys/net /proc/sys/net; \\
  mount -o remount,bind,ro /proc/sys; \\
  mount --bind /sys/kernel /sys/kernel; mount -o remount,bind,ro /sys/kernel'

[Install]
WantedBy=sysinit.target
""",
    ),
    # systemd leaves the propagation of a container's mounts alone; a kubelet's volumes need it shared.
    "etc/systemd/system/censuschat-lab-mounts.service": (
        0o644,
        """[Unit]
Description=Let the pods' mounts of this node propagate
DefaultDependencies=no
Before=sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/mount --make-rshared /

[Install]
WantedBy=sysinit.target
""",
    ),
    "etc/systemd/system.conf.d/censuschat-lab.conf": (
        0o644,
        """# Clock and kernel modules are the machine's.
[Manager]
CapabilityBoundingSet=~CAP_SYS_TIME CAP_SYS_MODULE
DefaultTimeoutStopSec=20s
""",
    ),
    "etc/systemd/journald.conf.d/censuschat-lab.conf": (
        0o644,
        "[Journal]\nStorage=persistent\nSystemMaxUse=64M\nAudit=no\nReadKMsg=no\n",
    ),
    "etc/sudoers.d/ops": (0o440, "ops ALL=(ALL:ALL) NOPASSWD: ALL\n"),
    "etc/resolv.conf": (0o644, "# The lab's nodes know each other by address; there is no name server.\n"),
    "etc/hostname": (0o644, "node\n"),
    "etc/machine-id": (0o444, ""),
    "etc/apt/apt.conf.d/80censuschat-lab": (
        0o644,
        'APT::Install-Recommends "false";\nAcquire::Languages "none";\nAcquire::Retries "2";\n',
    ),
    "etc/dpkg/dpkg.cfg.d/censuschat-lab": (
        0o644,
        "path-exclude=/usr/share/doc/*\npath-include=/usr/share/doc/*/copyright\npath-exclude=/usr/share/man/*\n"
        "path-exclude=/usr/share/locale/*\nforce-unsafe-io\n",
    ),
    "etc/postgresql-common/createcluster.conf": (0o644, "create_main_cluster = false\n"),
}


class ImageError(RuntimeError):
    """An image could not be made; the message says which step and what it said."""


@dataclass(frozen=True)
class Mirror:
    """Where the machine's apt gets Debian from. `security` is empty when it gets no security updates."""

    archive: str
    security: str = ""
    proxy: str = ""


def parse_mirror(targets: str, dump: str, mirror_file: str = "") -> Mirror:
    """Reads `apt-get indextargets` lines of SUITE|URI, `apt-config dump`, and the text of a mirror+file list."""
    archive = security = ""
    for line in targets.splitlines():
        suite, _, uri = line.partition("|")
        uri = uri.rstrip("/")
        if uri.startswith("mirror+file:") and mirror_file:
            uri = next((w.split()[0] for w in mirror_file.splitlines() if w.startswith("http")), "").rstrip("/")
        if not uri.startswith(("http://", "https://")):
            continue
        if re.fullmatch(r"[a-z]+-security", suite) or suite.endswith("/updates"):
            security = security or uri
        elif uri.endswith("/debian") and re.fullmatch(r"[a-z]+", suite):
            archive = archive or uri
    found = re.search(r'^Acquire::http::Proxy "([^"]*)";', dump, re.MULTILINE)
    proxy = found.group(1).rstrip("/") if found and found.group(1) != "DIRECT" else ""
    if not archive:
        raise ImageError(
            "apt on this machine has no Debian mirror over http(s) (looked at `apt-get indextargets`); "
            "add one to /etc/apt/sources.list.d and run `apt-get update`"
        )
    return Mirror(archive, security, proxy)


def find_mirror() -> Mirror:
    """The mirror of this machine's apt."""

    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    targets = said("apt-get", "indextargets", "--format", "$(RELEASE)|$(REPO_URI)", "Created-By: Packages")
    listed = ""
    found = re.search(r"mirror\+file:(/[^|\n]*?)/?$", targets, re.MULTILINE)
    if found and Path(found.group(1)).is_file():
        listed = Path(found.group(1)).read_text(encoding="utf-8")
    return parse_mirror(targets, said("apt-config", "dump"), listed)


def sources(cache: str, security: bool, suite: str = SUITE) -> str:
    """The nodes' apt sources: only the lab's package cache, never the mirror itself."""
    lines = [f"deb {cache}/debian {suite} main", f"deb {cache}/debian {suite}-updates main"]
    if security:
        lines.append(f"deb {cache}/debian-security {suite}-security main")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Recipe:
    """All that decides what is in the images."""

    cache: str
    security: bool
    architecture: str
    suite: str = SUITE

    def base_files(self) -> dict[str, tuple[int, str]]:
        address = self.cache.removeprefix("http://").partition(":")[0]
        # Whatever else a node's apt is told to fetch goes to the cache as well, which refuses what is not Debian's.
        proxy = "".join(f'Acquire::{scheme}::Proxy "{self.cache}";\n' for scheme in ("http", "https"))
        proxy += f'Acquire::http::Proxy::{address} "DIRECT";\n'
        return {
            **BASE_FILES,
            "etc/apt/sources.list": (0o644, sources(self.cache, self.security, self.suite)),
            "etc/apt/apt.conf.d/81censuschat-lab-cache": (0o644, proxy),
        }

    def key(self, role: str) -> str:
        """The hash that names an image; a role's includes the base's."""
        parts: list[object] = [self.suite, self.architecture, BASE_PACKAGES, MASKED_UNITS, DISABLED_UNITS, CONFIGURE]
        parts.append(sorted(self.base_files().items()))
        if role != "base":
            parts += [ROLE_PACKAGES[role], CONTAINERFILE]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def image(self, role: str) -> str:
        """The image of a role; plain nodes are the base as it is."""
        role = "base" if role == PLAIN else role
        return f"{IMAGES}/{role}:{self.key(role)}"

    def tar(self) -> str:
        """The name of the base image's tar."""
        return f"{label('base', self.suite)}-{self.key('base')}.tar"

    def containerfile(self, role: str) -> str:
        return CONTAINERFILE.format(
            base=self.image("base"), packages=" ".join(ROLE_PACKAGES[role]), role=role, units=UNITS
        )


# Runs in the new system.
CONFIGURE = """set -e
useradd --create-home --shell /bin/bash --password '*' ops
rm -f /etc/ssh/ssh_host_*
systemctl mask {masked} >/dev/null 2>&1
systemctl disable {disabled} >/dev/null 2>&1 || true
systemctl enable ssh.service censuschat-lab-identity.service censuschat-lab-kernel.service \\
  censuschat-lab-mounts.service >/dev/null 2>&1
mkdir -p /var/log/journal
rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /var/log/bootstrap.log /var/log/dpkg.log /var/log/apt/*
"""
UNITS = "'etcd*' 'patroni*' 'postgresql*' 'redis*' 'haproxy*' 'keepalived*' 'containerd*'"
# A golden image has the programs; what runs is the roles' business, so services are neither started nor enabled.
CONTAINERFILE = """FROM {base}
RUN set -e; \\
    printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod 0755 /usr/sbin/policy-rc.d; \\
    mkdir -p /etc/systemd/system-preset; \\
    printf 'disable *\\n' > /etc/systemd/system-preset/00-censuschat-lab-build.preset; \\
    export DEBIAN_FRONTEND=noninteractive; \\
    apt-get update; \\
    apt-get install -y --no-install-recommends {packages}; \\
    for unit in $(systemctl list-unit-files --state=enabled --no-legend {units} | cut -d' ' -f1); do \\
      systemctl disable $unit; done; \\
    rm -f /usr/sbin/policy-rc.d /etc/systemd/system-preset/00-censuschat-lab-build.preset; \\
    apt-get clean; rm -rf /var/lib/apt/lists/* /var/log/dpkg.log /var/log/apt/*
LABEL censuschat.lab.image={role}
"""


@contextlib.contextmanager
def building(place: Path) -> Iterator[int]:
    """Waits until nobody else makes an image at `place`, and keeps others waiting; gives the lock's file descriptor."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def build_base(recipe: Recipe, target: Path, log: Path) -> bool:
    """Makes the base image's tar at `target` unless it is there; true when it did. Raises ImageError.

    Takes about a minute from a warm package cache. A build whose parent was killed goes on by itself; the lock makes
    the next one wait for it instead of pulling the directory away under it.
    """
    with building(target.parent) as lock:
        if target.is_file():
            return False
        work = target.parent / f".{target.name}.building"
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        with log.open("a", encoding="utf-8") as output:

            def step(what: str, *command: str, stdin: str | None = None) -> None:
                print(f"== {what}", file=output, flush=True)
                # In a mount namespace of its own: what debootstrap mounts goes with it, however it ends.
                inside = ("unshare", "--mount", *command)
                done = subprocess.run(
                    inside, input=stdin, stdout=output, stderr=output, text=True, check=False, pass_fds=(lock,)
                )
                if done.returncode != 0:
                    tail = " | ".join(log.read_text(encoding="utf-8").splitlines()[-3:])
                    raise ImageError(f"{what} failed (exit {done.returncode}): {tail}; all of it is in {log}")

            include = f"--include={','.join(BASE_PACKAGES)}"
            archive = f"{recipe.cache}/debian"
            step("debootstrap", "debootstrap", "--variant=minbase", include, recipe.suite, str(work), archive)
            for path, (mode, text) in recipe.base_files().items():
                file = work / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.unlink(missing_ok=True)
                file.write_text(text, encoding="utf-8")
                file.chmod(mode)
            script = CONFIGURE.format(masked=" ".join(MASKED_UNITS), disabled=" ".join(DISABLED_UNITS))
            step("configure the base", "chroot", str(work), "/bin/sh", "-s", stdin=script)
            partial = target.with_name(target.name + ".partial")
            step("pack the base", "tar", "--numeric-owner", "--xattrs", "-C", str(work), "-cf", str(partial), ".")
            partial.rename(target)
        shutil.rmtree(work)
        for old in target.parent.glob("base-*.tar"):
            if old != target and re.fullmatch(rf"{label('base', recipe.suite)}-[0-9a-f]+\.tar", old.name):
                old.unlink()
        return True


def missing(recipe: Recipe, present: Iterable[str], roles: Sequence[str]) -> list[str]:
    """The images still to be made, the base first."""
    have = set(present)
    wanted = [role for role in roles if recipe.image(role) not in have]
    if wanted and recipe.image("base") not in have:
        wanted.insert(0, "base")
    return [role for role in wanted if role != PLAIN]


def superseded(recipe: Recipe, present: Iterable[str], used: Iterable[str]) -> list[str]:
    """Images of older recipes that no container uses any more; roles before their base."""
    recipes = [replace(recipe, suite=suite) for suite in SUITES]
    keep = {each.image(role) for each in recipes for role in ("base", *ROLE_PACKAGES)} | set(used)
    old = [image for image in present if image not in keep]
    return sorted(old, key=lambda image: (image.startswith(f"{IMAGES}/base:"), image))
