"""A node with a kernel of its own: the base image as a virtual machine, for what no container can hold or prove.

Kernel values and modules, audit rules, AppArmor, the clock, mounts over a directory in use, and what is left of all of
them after a boot. QEMU translates the processor's instructions, so it runs where nothing gives it hardware help, at a
tenth of a container's speed: it shows what happens, and times nothing.

The machine reaches the lab's package cache through QEMU, and is reached on a port of this machine's loopback address.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.images import MASKED_UNITS, ImageError, building
from lab.nodes import write
from lab.paths import PREFIX, cache

NAME = "machine1"
USER = "ops"
DISK_GIB = 4
BOOT_S = 300
"""Seconds after which a machine that lets nobody in counts as broken; it takes some 20 on two processors."""

#: Controls of the hardening catalogue that it cannot hold, with the reason.
CANNOT_HOLD = {
    "time_synchronised": "the machine reaches no time server",
    "mounts_own_partitions": "the machine has one partition",
}

# Takes away what makes the image a container, and gives it a kernel, a network and a way in. Runs in the new system.
CONFIGURE = """set -e
for unit in {masked}; do rm -f "/etc/systemd/system/$unit"; done
systemctl disable censuschat-lab-identity.service censuschat-lab-kernel.service censuschat-lab-mounts.service
rm -f /etc/systemd/system/censuschat-lab-* /etc/systemd/system.conf.d/censuschat-lab.conf
rm -f /etc/systemd/journald.conf.d/censuschat-lab.conf
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends linux-image-cloud-amd64 initramfs-tools
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /etc/hosts
echo {name} > /etc/hostname
echo '/dev/vda / ext4 defaults 0 1' > /etc/fstab
printf '[Match]\\nName=en* eth*\\n[Network]\\nAddress=10.0.2.15/24\\nGateway=10.0.2.2\\n' \\
  > /etc/systemd/network/10-lab.network
systemctl enable systemd-networkd.service ssh.service
install -d -m 0700 -o {user} -g {user} /home/{user}/.ssh
install -m 0600 -o {user} -g {user} /lab/login.pub /home/{user}/.ssh/authorized_keys
install -m 0600 /lab/host /etc/ssh/ssh_host_ed25519_key
install -m 0644 /lab/host.pub /etc/ssh/ssh_host_ed25519_key.pub
"""


class VirtualError(RuntimeError):
    """The machine could not be made or does not answer; the message says what to look at."""


@dataclass(frozen=True)
class Machine:
    """A running machine. `place` has its keys and its console's log."""

    place: Path
    port: int

    @property
    def ssh(self) -> tuple[str, ...]:
        """The options of an ssh connection to it that shares nothing with another and takes no other host."""
        pairs = (
            f"UserKnownHostsFile={self.place}/known_hosts",
            f"HostKeyAlias={NAME}",
            "GlobalKnownHostsFile=/dev/null",
            "IdentitiesOnly=yes",
            "ConnectTimeout=5",
            "LogLevel=ERROR",
        )
        return tuple(word for pair in pairs for word in ("-o", pair))

    def host(self) -> Mapping[str, str | int]:
        """Its variables in an inventory."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": USER,
            "ansible_ssh_private_key_file": str(self.place / "login"),
            "ansible_ssh_common_args": " ".join(self.ssh),
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def sh(self, script: str, *, check: bool = True, timeout: float = 120.0) -> str:
        """Run a shell script as root over a new connection. Raises VirtualError when it fails."""
        command = ("ssh", *self.ssh, "-o", "ControlPath=none", "-o", "BatchMode=yes", "-i", str(self.place / "login"))
        command = (*command, "-p", str(self.port), f"{USER}@127.0.0.1", "sudo", "sh")
        try:
            done = subprocess.run(command, input=script, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise VirtualError(f"{NAME} did not answer within {timeout:.0f} s: {script[:200]}") from error
        if check and done.returncode:
            raise VirtualError(f"on {NAME}: {script[:200]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def wait(self) -> None:
        """Wait until it has booted. Raises VirtualError when it does not."""
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(VirtualError):
                if self.sh("systemctl is-system-running --wait", check=False, timeout=60).strip():
                    return
            time.sleep(1)
        raise VirtualError(f"{NAME} lets nobody in {BOOT_S} s after its start; its console: {self.place}/console.log")

    def reboot(self) -> None:
        """Boot it again, and wait for that."""
        before = self.sh("cat /proc/sys/kernel/random/boot_id")
        self.sh("systemctl reboot", check=False)
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(VirtualError):
                if self.sh("cat /proc/sys/kernel/random/boot_id", timeout=20) != before:
                    return self.wait()
            time.sleep(1)
        raise VirtualError(f"{NAME} did not come back from a reboot; its console: {self.place}/console.log")


def build(image: str, log: Path) -> Path:
    """The directory with a disk, its kernel and the keys, from a base image; made when it is not cached, in a minute.

    The lab's package cache has to run. Raises ImageError.
    """
    if platform.machine() != "x86_64":
        raise ImageError(f"a virtual machine on {platform.machine()} is not described here: use an x86_64 machine")
    key = hashlib.sha256(repr((image, CONFIGURE, DISK_GIB)).encode()).hexdigest()[:12]
    target = cache() / "machine" / key
    with building(target.parent):
        if target.is_dir():
            return target
        for old in target.parent.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
        work = target.with_name(f".{key}.building")
        root = work / "root"
        (root / "lab").mkdir(parents=True)
        with log.open("a", encoding="utf-8") as output:

            def step(what: str, *command: str, stdin: str | None = None) -> None:
                print(f"== {what}", file=output, flush=True)
                done = subprocess.run(command, input=stdin, stdout=output, stderr=output, text=True, check=False)
                if done.returncode:
                    tail = " | ".join(log.read_text(encoding="utf-8").splitlines()[-3:])
                    raise ImageError(f"{what} failed (exit {done.returncode}): {tail}; all of it is in {log}")

            # A container that never runs: podman hands out an image's files only so.
            unpack = 'id=$(podman create "$1" true) && podman export "$id" | tar -xf - -C "$2"; c=$?; podman rm "$id"'
            step("unpack the base", "bash", "-c", f"set -o pipefail; {unpack}; exit $c", "-", image, str(root))
            for name in ("login", "host"):
                step("make a key", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", NAME, "-f", str(work / name))
                for half in (work / name, work / f"{name}.pub"):
                    shutil.copy(half, root / "lab" / half.name)
            write(work / "known_hosts", f"{NAME} {(work / 'host.pub').read_text(encoding='ascii')}")
            script = CONFIGURE.format(masked=" ".join(MASKED_UNITS), name=NAME, user=USER)
            # Devices of its own: packages' scripts give them groups, and these are not to be the machine's.
            inside = (
                'mount -t proc proc "$1/proc"; mount -t tmpfs dev "$1/dev"; '
                "for i in null:3 zero:5 full:7 random:8 urandom:9; do "
                'mknod -m 666 "$1/dev/${i%:*}" c 1 "${i#*:}"; done; '
                'exec chroot "$1" /bin/sh -s'
            )
            step("configure it", "unshare", "--mount", "sh", "-ec", inside, "-", str(root), stdin=script)
            shutil.rmtree(root / "lab")
            for part in ("vmlinuz", "initrd.img"):
                found = sorted((root / "boot").glob(f"{part}-*"))
                shutil.copy(found[-1], work / part)
            step("make the disk", "mke2fs", "-q", "-t", "ext4", "-d", str(root), str(work / "disk"), f"{DISK_GIB}G")
        shutil.rmtree(root)
        work.rename(target)
        return target


def image_of(node: str) -> str:
    """The image that a node of the lab was made from."""
    shown = ("podman", "inspect", "--format", "{{.ImageName}}", f"{PREFIX}{node}")
    return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def running(image: str, log: Path) -> Iterator[Machine]:
    """A machine that has just booted for the first time; what it writes is gone with it.

    Raises ImageError, VirtualError.
    """
    place = build(image, log)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = (
        # However this process ends, the machine ends with it.
        *("setpriv", "--pdeathsig", "KILL"),
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "q35"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"),
        *("-kernel", str(place / "vmlinuz"), "-initrd", str(place / "initrd.img")),
        *("-append", "root=/dev/vda rw console=ttyS0 quiet"),
        *("-drive", f"file={place}/disk,if=virtio,format=raw,cache=unsafe,snapshot=on"),
        *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22", "-device", "virtio-net-pci,netdev=net"),
        *("-device", "virtio-rng-pci", "-serial", f"file:{place}/console.log", "-display", "none"),
    )
    with (
        log.open("a", encoding="utf-8") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        try:
            machine = Machine(place, port)
            machine.wait()
            machine.sh("apt-get -qq update")
            yield machine
        finally:
            process.kill()
