"""Probe pods in a real cluster: who reaches whom, asked from inside pods.

    with Pods(kubeconfig) as pods:
        pods.create(ProbePod("shop", "web", labels={"app": "web"}), ProbePod("shop", "db", listen=(5432,)))
        pods.probe("shop/web", "shop/db", 5432)              # "open", "refused" or "dropped"
        pods.probes([Ask("shop/web", "shop/db", 53, "UDP"), Ask("shop/db", "10.77.1.21", 5432)])   # side by side

One `kubectl exec` a pod stays open and answers any number of questions, so that one costs milliseconds. Pods that are
there already and have Python can be asked through `adopt`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab import programs
from lab.programs.catalogue import catalogue, image_names

#: How long a question waits for any answer, in seconds; the nodes answer what a policy stops at once.
PATIENCE_S = 1.5
#: How long pods may take to run, in seconds.
START_S = 60

# Listens as long as the pod lives: TCP and UDP ports that echo.
_LISTENER = """
import json, socket, sys, threading
def tcp(listener):
    while True:
        session, _ = listener.accept()
        threading.Thread(target=echo, args=(session,), daemon=True).start()
def echo(session):
    try:
        while said := session.recv(1000):
            session.sendall(said)
    except OSError:
        pass
    session.close()
def udp(ear):
    while True:
        said, caller = ear.recvfrom(1000)
        ear.sendto(said, caller)
for port, protocol in json.loads(sys.argv[1]):
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("0.0.0.0", port))
    if protocol == "TCP":
        made.listen(64)
    threading.Thread(target=tcp if protocol == "TCP" else udp, args=(made,), daemon=True).start()
threading.Event().wait()
"""

# Answers questions, one JSON object a line, each in a thread of its own.
_ASKER = """
import errno, json, socket, sys, threading
held, lock = {}, threading.Lock()
def attempt(ask, made):
    made.settimeout(ask["patience"])
    made.connect((ask["address"], ask["port"]))
    if ask["protocol"] == "UDP":
        made.send(b"?")
        made.recv(10)
def probe(ask):
    kind = socket.SOCK_STREAM if ask["protocol"] == "TCP" else socket.SOCK_DGRAM
    made = socket.socket(socket.AF_INET, kind)
    try:
        attempt(ask, made)
        if ask["do"] == "hold":
            held[ask["name"]] = made
            made = None
        return "open"
    except TimeoutError:
        return "dropped"
    except OSError as error:
        if error.errno in (errno.ECONNREFUSED, errno.ENETUNREACH):
            return "refused" if error.errno == errno.ECONNREFUSED else "unreachable"
        return "dropped" if error.errno in (errno.EHOSTUNREACH, errno.EACCES) else "error: " + str(error)
    finally:
        if made is not None:
            made.close()
def say(ask):
    made = held[ask["name"]]
    made.settimeout(ask["patience"])
    try:
        made.sendall(b"hello")
        return "open" if made.recv(10) else "ended"
    except TimeoutError:
        return "dropped"
    except OSError:
        return "ended"
def answer(ask):
    try:
        result = say(ask) if ask["do"] == "say" else probe(ask)
    except Exception as error:
        result = "error: " + repr(error)
    with lock:
        print(json.dumps([ask["id"], result]), flush=True)
print("ready", flush=True)
for line in sys.stdin:
    threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
"""


class PodsError(RuntimeError):
    """A pod did not start or did not answer; the message says which and what was said."""


@dataclasses.dataclass(frozen=True)
class ProbePod:
    """A pod to make. `listen` are ports that echo, as 80 or (53, "UDP"); `named` gives some of them names."""

    namespace: str
    name: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    listen: Sequence[int | tuple[int, str]] = (8080,)
    named: Mapping[str, int] = dataclasses.field(default_factory=dict)
    node: str = ""
    cpu: str = "10m"
    memory: str = "32Mi"

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def ports(self) -> list[tuple[int, str]]:
        return [(port, "TCP") if isinstance(port, int) else port for port in self.listen]

    def manifest(self, image: str) -> dict[str, Any]:
        """The pod, within the restricted Pod Security standard."""
        amount = {"cpu": self.cpu, "memory": self.memory}
        protocols = dict(self.ports())
        container = {
            "name": "probe",
            "image": image,
            "imagePullPolicy": "Never",
            "command": ["/usr/bin/python3", "-c", _LISTENER, json.dumps(self.ports())],
            "ports": [
                {"name": name, "containerPort": port, "protocol": protocols.get(port, "TCP")}
                for name, port in self.named.items()
            ],
            **({"readinessProbe": _ready(tcp[0])} if (tcp := [n for n, p in self.ports() if p == "TCP"]) else {}),
            "resources": {"requests": amount, "limits": {"cpu": "250m", "memory": "96Mi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            },
        }
        spec = {
            "containers": [container],
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **({"nodeSelector": {"kubernetes.io/hostname": self.node}} if self.node else {}),
        }
        meta = {"namespace": self.namespace, "name": self.name, "labels": dict(self.labels)}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def _ready(port: int) -> dict[str, Any]:
    """The kubelet asks a port: the way from a node to its own pods."""
    return {"tcpSocket": {"port": port}, "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 3}


@dataclasses.dataclass(frozen=True)
class Ask:
    """Whether `target` (a pod as namespace/name, or an address) is reached from the pod `source`."""

    source: str
    target: str
    port: int
    protocol: str = "TCP"


class _Session:
    """The open `kubectl exec` of one pod."""

    def __init__(self, argv: Sequence[str], pod: str) -> None:
        self.pod = pod
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[str]] = {}
        self._lock = threading.Lock()
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            assert self._process.stderr
            raise PodsError(f"pod {pod} cannot be asked: {self._process.stderr.read().strip()}")
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            number, result = json.loads(line)
            self._waiting.pop(number).put(result)

    def ask(self, **ask: object) -> queue.SimpleQueue[str]:
        """Puts a question; its answer arrives in the queue."""
        answer: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = answer
            assert self._process.stdin
            try:
                self._process.stdin.write(json.dumps({"id": number, **ask}) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError as error:
                raise PodsError(f"pod {self.pod} no longer answers") from error
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()


class Pods:
    """Makes probe pods and asks through them; at the end it deletes what it made."""

    def __init__(self, kubeconfig: Path | str, minor: str = "") -> None:
        minor = minor or catalogue().default
        self._kubectl = (str(programs.ready(minor) / "bin/kubectl"), "--kubeconfig", str(kubeconfig))
        self.image = image_names(minor)["python"]
        self._made: list[ProbePod] = []
        self._addresses: dict[str, str] = {}
        self._sessions: dict[str, _Session] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def kubectl(self, *arguments: str, text: str = "", patience: float = 120) -> str:
        """Runs kubectl on the cluster; its standard output. Raises PodsError with what it said."""
        done = subprocess.run(
            (*self._kubectl, *arguments), input=text, capture_output=True, text=True, timeout=patience, check=False
        )
        if done.returncode:
            raise PodsError(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Applies objects, as they are."""
        listing = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=json.dumps(listing))

    def create(self, *pods: ProbePod) -> None:
        """Makes pods and waits until all of them run and can be asked. Raises PodsError."""
        self._made += pods
        for namespace in dict.fromkeys(pod.namespace for pod in pods):
            # A new namespace takes pods only once a controller has made its account.
            self.kubectl("wait", "-n", namespace, "--for=create", "serviceaccount/default", f"--timeout={START_S}s")
        self.apply(*(pod.manifest(self.image) for pod in pods))
        for namespace in dict.fromkeys(pod.namespace for pod in pods):
            names = [f"pod/{pod.name}" for pod in pods if pod.namespace == namespace]
            try:
                self.kubectl("wait", "-n", namespace, "--for=condition=Ready", f"--timeout={START_S}s", *names)
            except PodsError as error:
                events = self.kubectl("get", "events", "-n", namespace, "--sort-by=.lastTimestamp")
                raise PodsError(f"{error}\n{events}") from error
        self._learn([pod.key for pod in pods])

    def adopt(self, namespace: str, *names: str) -> None:
        """Asks through running pods too; they need Python at /usr/bin/python3 and stay as they are."""
        self._learn([f"{namespace}/{name}" for name in names])

    def address(self, pod: str) -> str:
        return self._addresses[pod]

    def _learn(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        for key in keys:
            namespace, name = key.split("/")
            self._addresses[key] = self.kubectl("get", "pod", "-n", namespace, name, "-o", "jsonpath={.status.podIP}")
            argv = (*self._kubectl, "exec", "-i", "-n", namespace, name, "--", "/usr/bin/python3", "-u", "-c", _ASKER)
            self._sessions[key] = _Session(argv, key)

    def _put(self, ask: Ask, do: str, patience: float, name: str = "") -> queue.SimpleQueue[str]:
        address = self._addresses.get(ask.target, ask.target)
        said = {"address": address, "port": ask.port, "protocol": ask.protocol}
        return self._sessions[ask.source].ask(do=do, patience=patience, name=name, **said)

    def _answer(self, waiting: queue.SimpleQueue[str], source: str, patience: float) -> str:
        try:
            result = waiting.get(timeout=patience + 10)
        except queue.Empty as error:
            raise PodsError(f"pod {source} gave no answer") from error
        if result.startswith("error"):
            raise PodsError(f"pod {source}: {result}")
        return result

    def probes(self, asks: Sequence[Ask], patience: float = PATIENCE_S) -> list[str]:
        """The answers to all questions, which are asked side by side: "open", "refused" or "dropped".

        Refused is the other end's word: the packet arrived and nobody listens. Dropped is what a policy does, told by a
        node or by silence. Where no way leads at all it is "unreachable".
        """
        waiting = [self._put(ask, "probe", patience) for ask in asks]
        return [self._answer(answer, ask.source, patience) for answer, ask in zip(waiting, asks, strict=True)]

    def probe(self, source: str, target: str, port: int, protocol: str = "TCP", patience: float = PATIENCE_S) -> str:
        """The answer to one question."""
        return self.probes([Ask(source, target, port, protocol)], patience)[0]

    def until(self, ask: Ask, wanted: str, limit: float) -> float:
        """Asks until the answer is the one wanted; the seconds it took. Raises PodsError after `limit` seconds."""
        began = time.monotonic()
        while True:
            became = self.probes([ask], patience=min(PATIENCE_S, 0.5))[0]
            spent = time.monotonic() - began
            if became == wanted:
                return spent
            if spent > limit:
                raise PodsError(f"{ask} is still {became} and not {wanted} after {spent:.1f} s")
            time.sleep(0.02)

    def settled(self, wanted: Mapping[Ask, str], limit: float) -> dict[Ask, str]:
        """Asks all questions, as often as it takes until one pass has all the answers wanted; the last pass' answers.

        Many policies reach the nodes one after another: for a moment a path is closed already and not opened yet.
        """
        began = time.monotonic()
        while True:
            answers = dict(zip(wanted, self.probes(list(wanted)), strict=True))
            if answers == wanted or time.monotonic() - began > limit:
                return answers

    def hold(self, source: str, target: str, port: int, name: str) -> str:
        """Opens a connection that stays open under a name."""
        answer = self._put(Ask(source, target, port), "hold", PATIENCE_S, name)
        return self._answer(answer, source, PATIENCE_S)

    def say(self, source: str, name: str, patience: float = PATIENCE_S) -> str:
        """Says a word on a connection held and waits for its echo: "open", "ended" or "dropped"."""
        waiting = self._sessions[source].ask(do="say", patience=patience, name=name)
        return self._answer(waiting, source, patience)

    def close(self) -> None:
        """Ends the sessions and deletes the pods made."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        for namespace in dict.fromkeys(pod.namespace for pod in self._made):
            names = [pod.name for pod in self._made if pod.namespace == namespace]
            self.kubectl("delete", "pod", "-n", namespace, "--ignore-not-found", "--now", "--wait=false", *names)
        self._made.clear()
