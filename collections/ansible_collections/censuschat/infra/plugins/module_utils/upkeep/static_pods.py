# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The static pods of a control plane: their processes, whether they serve, and how they are restarted or held back.

A restart is a SIGTERM to the process: the kubelet starts the container again at once, and whenever the job dies in
between there is nothing to put back. Holding back moves the manifest out of the kubelet's sight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import select
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .common import UpkeepError, environment, run, write_whole

MANIFESTS = Path("/etc/kubernetes/manifests")
PKI = Path("/etc/kubernetes/pki")
PODS = Path("/var/lib/kubelet/pods")
APISERVER, ETCD = "kube-apiserver", "etcd"
# etcd first: the API server needs it; the others need the API server.
COMPONENTS = (ETCD, APISERVER, "kube-controller-manager", "kube-scheduler")
_POLL_S = 0.2
# An API server that was told to end closes its port at once and then waits a minute for open watches.
_DRAIN_S = 10.0
# How long to wait for the kubelet to have cleared a pod away, at most. It does so every 2 s, and makes a pod that comes
# back sooner under another id wait for 10 to 15 s.
_CLEARED_S = 6.0
# The kubelet waits up to five minutes before it starts a container again that ended a few times of late.
_BACK_OFF_S = 12.0
ANNOTATION = "censuschat.infra/restarted"
_RESTARTED = re.compile(rf"^ +{re.escape(ANNOTATION)}:.*\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Process:
    """A running component. started: unix seconds, from the kernel's monotonic stamp."""

    pid: int
    started: float
    argv: tuple[str, ...]

    def flag(self, name: str, default: str = "") -> str:
        """The value of `--name=value` on its command line."""
        for word in self.argv:
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
        return default


def find(component: str, proc: Path = Path("/proc")) -> Process | None:
    """The component's process on this node, None when there is none.

    Static pods share the host's network, so a program of the same name inside some other pod is not taken for it.
    """
    try:
        network = os.readlink(proc / "1/ns/net")
    except OSError:
        network = ""
    for entry in proc.glob("[0-9]*"):
        try:
            argv = tuple((entry / "cmdline").read_text(encoding="utf-8", errors="replace").rstrip("\0").split("\0"))
            if argv[0].rpartition("/")[2] != component or os.readlink(entry / "ns/net") != network:
                continue
            ticks = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
            if not _of_a_pod(entry):
                continue
        except (OSError, ValueError, IndexError):
            continue
        uptime = float((proc / "uptime").read_text(encoding="utf-8").split()[0])
        age = uptime - ticks / os.sysconf("SC_CLK_TCK")
        return Process(int(entry.name), time.time() - age, argv)
    return None


def _of_a_pod(entry: Path) -> bool:
    """Whether the kubelet runs it; an etcd of another service runs under its own unit."""
    return "kubepods" in (entry / "cgroup").read_text(encoding="utf-8")


def wait_for(what: Callable[[], bool], budget_s: float) -> bool:
    """Ask `what` until it is true or the time is over; whether it became true."""
    deadline = time.monotonic() + budget_s
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def end(process: Process, component: str) -> None:
    """Tell a process to end, and see to it: all but etcd, which is always waited for, are killed after their drain."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
        if component != ETCD and not wait_for(lambda: _gone(process), _DRAIN_S):
            os.kill(process.pid, signal.SIGKILL)


def _gone(process: Process) -> bool:
    now = find(process.argv[0].rpartition("/")[2])
    return now is None or now.pid != process.pid


def restart(component: str, budget_s: float) -> None:
    """Have the kubelet start the component's container again; returns when another process runs."""
    old = find(component)
    if old is not None:
        end(old, component)

    def replaced() -> bool:
        new = find(component)
        return new is not None and (old is None or new.pid != old.pid)

    if not wait_for(replaced, min(_BACK_OFF_S, budget_s)):
        renew_pod(component)
    if not wait_for(replaced, budget_s):
        raise UpkeepError(
            f"the kubelet did not start {component} again within {budget_s:.0f} s: look at `journalctl -u kubelet` and "
            f"/var/log/pods/kube-system_{component}-*"
        )


def renew_pod(component: str) -> None:
    """Have the kubelet make a new pod of the manifest, for which no back-off counts. An interruption leaves it valid.

    Restarting the kubelet would forget the back-off too, but one that starts while the API hangs mounts nothing for
    minutes (seen with 1.35.4: "unmounted volumes ... context deadline exceeded").
    """
    path = MANIFESTS / f"{component}.yaml"
    text = _RESTARTED.sub("", path.read_text(encoding="utf-8"))
    stamp = f'{ANNOTATION}: "{time.time():.3f}"'
    if "\n  annotations:\n" in text:
        text = text.replace("\n  annotations:\n", f"\n  annotations:\n    {stamp}\n", 1)
    elif "\nmetadata:\n" in text:
        text = text.replace("\nmetadata:\n", f"\nmetadata:\n  annotations:\n    {stamp}\n", 1)
    else:
        raise UpkeepError(f"{path} is not a manifest that kubeadm wrote; restart the pod by hand")
    write_whole(path, text)


def hold_back(components: Sequence[str], aside: Path, budget_s: float, pods: Path = PODS) -> None:
    """Move the manifests to `aside` and wait until the processes are gone. Done twice it does nothing."""
    aside.mkdir(mode=0o700, parents=True, exist_ok=True)
    for component in components:
        manifest = MANIFESTS / f"{component}.yaml"
        if manifest.is_file():
            manifest.replace(aside / manifest.name)
    for component in components:
        process = find(component)
        if process is not None:
            end(process, component)
    left = list(components)

    def gone() -> bool:
        left[:] = [c for c in components if find(c) is not None]
        return not left

    if not wait_for(gone, budget_s):
        raise UpkeepError(
            f"{', '.join(left)} still run {budget_s:.0f} s after their manifests went: is the kubelet running?"
        )
    wait_for(lambda: not _remains(components, pods), _CLEARED_S)


def _remains(components: Sequence[str], pods: Path) -> list[Path]:
    """The kubelet's directories of these static pods, whose ids have no dashes."""
    found = [path for component in components for path in pods.glob(f"*/containers/{component}")]
    return [path.parent.parent for path in found if "-" not in path.parent.parent.name]


def let_run(components: Sequence[str], aside: Path) -> None:
    """Put manifests back that were held back."""
    for component in components:
        kept = aside / f"{component}.yaml"
        if kept.is_file():
            kept.replace(MANIFESTS / kept.name)


def api_ready(address: str, port: int = 6443, ca: Path = PKI / "ca.crt", timeout_s: float = 3.0) -> str:
    """Why the API server there is not ready; empty when it is."""
    try:
        context = ssl.create_default_context(cafile=str(ca))
        connection = http.client.HTTPSConnection(address, port, timeout=timeout_s, context=context)
        with contextlib.closing(connection):
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            answer.read()
            return "" if answer.status == 200 else f"/readyz answers {answer.status}"
    except (OSError, http.client.HTTPException) as error:
        return str(error)


def wait_api(name: str, budget_s: float, port: int = 6443) -> None:
    """Wait until this node's API server is ready, past a back-off that it earned while it had no etcd."""
    last = [""]

    def ready() -> bool:
        last[0] = api_ready("127.0.0.1", port)
        return not last[0]

    if not wait_for(ready, min(_BACK_OFF_S, budget_s)) and find(APISERVER) is None:
        renew_pod(APISERVER)
    if not wait_for(ready, budget_s):
        raise UpkeepError(
            f"the API server of {name} is not ready after {budget_s:.0f} s: {last[0]}. Look at "
            "/var/log/pods/kube-system_kube-apiserver-*; a second run goes on from here"
        )


def etcdctl(*words: str, endpoints: str = "https://127.0.0.1:2379") -> list[str]:
    """An etcdctl command line with the certificates that kubeadm gives a member for health checks."""
    pki = PKI / "etcd"
    files = ["--cacert", f"{pki}/ca.crt", "--cert", f"{pki}/healthcheck-client.crt"]
    return ["etcdctl", "--endpoints", endpoints, *files, "--key", f"{pki}/healthcheck-client.key", *words]


@dataclasses.dataclass(frozen=True)
class Member:
    """A member as the cluster knows it; ids are etcd's. A member that was added and never started has no name."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    learner: bool = False


def members(endpoints: str = "https://127.0.0.1:2379") -> list[Member]:
    """The cluster's members; UpkeepError when no quorum answers."""
    done = run(etcdctl("member", "list", "-w", "json", endpoints=endpoints), timeout_s=15.0)
    if done.code != 0:
        raise UpkeepError(f"the members of etcd cannot be listed at {endpoints}: {done.said}")
    return [
        Member(
            id=int(m["ID"]),
            name=m.get("name", ""),
            peer_urls=tuple(m.get("peerURLs") or ()),
            client_urls=tuple(m.get("clientURLs") or ()),
            learner=bool(m.get("isLearner")),
        )
        for m in json.loads(done.out)["members"]
    ]


@contextlib.contextmanager
def turn(wait_s: float, endpoints: str = "https://127.0.0.1:2379") -> Iterator[None]:
    """One control plane at a time: a lock in etcd itself, given back when this process ends in whatever way."""
    urls = ",".join(url for member in members(endpoints) for url in member.client_urls[:1])
    argv = etcdctl("lock", "--ttl=60", "censuschat/upkeep", endpoints=urls)
    # pylint: disable-next=ansible-bad-function  # It has to run beside what it guards.
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()) as holder:
        try:
            answer = holder.stdout
            if not answer or not select.select([answer], [], [], wait_s)[0] or not answer.readline():
                raise UpkeepError(
                    f"its turn did not come within {wait_s:.0f} s: another control plane holds the lock "
                    "censuschat/upkeep in etcd. Look at `systemctl status censuschat-kubernetes-certificates` there"
                )
            yield
        finally:
            holder.terminate()


def healthy(endpoints: Sequence[str]) -> dict[str, bool]:
    """Which of the members' client URLs answer a read that needs the quorum."""
    if not endpoints:
        return {}
    words = etcdctl("endpoint", "health", "--command-timeout=4s", "-w", "json", endpoints=",".join(endpoints))
    done = run(words, timeout_s=20.0)
    found = dict.fromkeys(endpoints, False)
    with contextlib.suppress(ValueError, TypeError):
        found.update({entry["endpoint"]: bool(entry["health"]) for entry in json.loads(done.out)})
    return found
