"""What makes a node this node: its ssh host key, who may log in, the others' names; and how its container starts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab.paths import LABEL, PREFIX, STATE, cache
from lab.topology import PLAIN, SUITES, Node, Topology


class NodeError(RuntimeError):
    """A node could not be given its identity or did not answer; the message says which and what to look at."""


#: Data directories that a kubelet, containerd or etcd cannot have on an overlay file system.
VOLUMES = {
    "app": ("/var/lib/containerd", "/var/lib/kubelet", "/var/lib/etcd"),
    "db": ("/var/lib/etcd",),
    "witness": ("/var/lib/etcd",),
    PLAIN: (),
}
#: Where a Kubernetes node finds the programs of every version that the machine has prepared, read-only.
PROGRAMS = "/opt/kubernetes"
#: Where a node finds its identity, read-only.
IDENTITY = "/run/censuschat-lab"


def programs() -> Path:
    """Where the machine keeps the Kubernetes programs, a directory a version."""
    return cache() / "kubernetes"


def volume(node: str, path: str) -> str:
    """The name of a node's volume for a path."""
    return f"{PREFIX}{node}-{Path(path).name}"


def volumes(node: Node) -> tuple[str, ...]:
    """The paths of a node that are volumes of their own."""
    return VOLUMES["app" if node.role == PLAIN and node.kubernetes else node.role]


def start(node: Node, hybrid: bool) -> list[str]:
    """The command that starts a node. Later systemds refuse cgroup v1 unless told otherwise."""
    return ["/sbin/init", *(["SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"] if hybrid and node.suite != SUITES[0] else [])]


def container(node: Node, image: str, hybrid: bool, files: int, state: Path = STATE) -> dict[str, Any]:
    """The arguments of containers.podman.podman_container for a node.

    `hybrid`: the machine has cgroup v1 (or v1 beside v2). There podman's own systemd mode would bind the machine's
    whole systemd hierarchy into every node, and restarting one would break the others. `files`: the machine's hard
    limit of open files, which a container cannot exceed.
    """
    return {
        "name": PREFIX + node.name,
        "image": image,
        "command": start(node, hybrid),
        "hostname": node.name,
        "network": [f"ns:/run/netns/{PREFIX}{node.name}"],
        "dns": ["none"],
        "no_hosts": True,
        "privileged": True,
        "cgroupns": "private",
        "systemd": "false" if hybrid else "always",
        "env": {"container": "podman"},
        "stop_signal": 37,  # SIGRTMIN+3: systemd shuts down in order
        "stop_timeout": 5,
        "ulimit": [f"nofile={files}:{files}", "nproc=20000:20000"],
        "tmpfs": {"/run": "rw", "/run/lock": "rw", "/tmp": "rw"},  # noqa: S108 (the node's own)
        "label": dict([LABEL.split("=", 1)]),
        "volume": [f"{state}/nodes/{node.name}:{IDENTITY}:ro"]
        + [f"{volume(node.name, path)}:{path}" for path in volumes(node)]
        + ([f"{programs()}:{PROGRAMS}:ro"] if node.kubernetes else []),
        "state": "started",
    }


def identity(topology: Topology, node: Node, operator_key: str) -> dict[str, str]:
    """The files of a node's identity that follow from the topology (its host key is made once, and kept)."""
    names = "".join(f"{n.address} {n.name}\n" for n in topology.nodes)
    own = f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{names}"
    return {"hosts": own, "authorized_keys": operator_key}


def known_hosts(topology: Topology, keys: Mapping[str, str]) -> str:
    """The text that pins every node's host key (by node name) to its address and name."""
    lines = []
    for node in topology.nodes:
        kind, key = keys[node.name].split()[:2]
        lines.append(f"{node.address},{node.name} {kind} {key}\n")
    return "".join(lines)


def make_key(path: Path, comment: str) -> None:
    """Makes an ed25519 key without a passphrase; raises NodeError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    done = subprocess.run(
        ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise NodeError(f"ssh-keygen could not make {path}: {done.stderr.strip()}")


def provide(topology: Topology, state: Path = STATE) -> list[str]:
    """Brings the operator's key, every node's identity and known_hosts to their state; returns the paths it changed."""
    changed: list[str] = []
    for directory in (state, state / "ssh", state / "nodes", state / "log", state / "pids"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Podman wants the directory of a mount to be there, even with nothing in it yet.
    programs().mkdir(parents=True, exist_ok=True)
    operator = state / "ssh" / "id_ed25519"
    if not (operator.is_file() and operator.with_suffix(".pub").is_file()):
        operator.unlink(missing_ok=True)
        make_key(operator, "operator of the lab")
        changed.append(str(operator))
    public = operator.with_suffix(".pub").read_text(encoding="utf-8")
    keys = {}
    for node in topology.nodes:
        directory = state / "nodes" / node.name
        key = directory / "ssh_host_ed25519_key"
        if not (key.is_file() and key.with_suffix(".pub").is_file()):
            key.unlink(missing_ok=True)
            make_key(key, node.name)
            changed.append(str(key))
        keys[node.name] = key.with_suffix(".pub").read_text(encoding="utf-8")
        for name, text in identity(topology, node, public).items():
            changed += write(directory / name, text)
    changed += write(state / "ssh" / "known_hosts", known_hosts(topology, keys))
    return changed


def write(path: Path, text: str) -> list[str]:
    """Writes a file when its text differs, whole or not at all; returns the path in a list when it did."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return []
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
    return [str(path)]


def ssh(node: Node, *command: str, state: Path = STATE, user: str = "ops", timeout: int = 5) -> tuple[str, ...]:
    """The ssh command line that runs a command on a node as its operator, with the host key pinned."""
    options = (
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "GlobalKnownHostsFile=/dev/null",
        f"UserKnownHostsFile={state}/ssh/known_hosts",
        f"ConnectTimeout={timeout}",
    )
    flags = [flag for option in options for flag in ("-o", option)]
    return ("ssh", "-F", "/dev/null", *flags, "-i", f"{state}/ssh/id_ed25519", f"{user}@{node.address}", *command)


def wait(nodes: tuple[Node, ...], patience: float = 60.0) -> dict[str, float]:
    """Waits until each node lets its operator in; returns the seconds each took, raises NodeError naming the silent."""
    began = time.monotonic()

    def one(node: Node) -> tuple[str, float, str]:
        while True:
            command = ssh(node, "true")
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            spent = time.monotonic() - began
            if done.returncode == 0:
                return node.name, spent, ""
            if spent > patience:
                return node.name, spent, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer"
            time.sleep(0.3)

    with ThreadPoolExecutor(max_workers=8) as pool:
        results = list(pool.map(one, nodes))
    silent = [f"{name} ({why})" for name, _, why in results if why]
    if silent:
        raise NodeError(
            f"no ssh login after {patience:.0f} s on {', '.join(silent)}; "
            f"`podman logs {PREFIX}{silent[0].split()[0]}` shows its start"
        )
    return {name: round(spent, 1) for name, spent, _ in results}
