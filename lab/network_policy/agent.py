"""The agent's process: watches the API and the node's CNI, and brings routes and table to their state.

    censuschat-network load CONFIG   loads the last table of this boot, or the closed one; before the kubelet starts
    censuschat-network run CONFIG    the service

The table in the kernel outlives the agent: a restart changes nothing until the objects are known again. After a reboot
it is closed until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from . import cni, model, routes, table
from .api import Access, Copy
from .rules import closed, compile_node

#: Seconds in which changes are gathered before they are worked in.
GATHER_S = 0.05
#: Seconds between two looks whether table and routes are still there.
LOOK_S = 20.0
_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_DELETE = 0x8, 0x80, 0x200


class Config(NamedTuple):
    """The agent's configuration file, in JSON."""

    node: str
    pod_cidr: str
    server: str
    user: str
    ca_file: str
    certificate_file: str
    conflist_file: str
    results_directory: str
    run_directory: str

    @staticmethod
    def read(path: str) -> Config:
        return Config(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))

    @property
    def saved(self) -> pathlib.Path:
        """The last table of this boot. The directory goes with the boot."""
        return pathlib.Path(self.run_directory) / "table.nft"

    @property
    def began(self) -> pathlib.Path:
        """As old as this boot's first table: what is older was before."""
        return pathlib.Path(self.run_directory) / "began"

    @property
    def closed(self) -> str:
        return table.render(closed(self.pod_cidr))


def standing(config: Config) -> str:
    """The table to begin with: the last one of this boot, or the closed one."""
    with contextlib.suppress(OSError):
        return config.saved.read_text(encoding="utf-8")
    return config.closed


def load(config: Config) -> None:
    """Has a table in the kernel before the first pod."""
    table.load(standing(config))
    begin(config)


def begin(config: Config) -> None:
    """Notes the moment from which this boot's pods have their addresses, once."""
    with contextlib.suppress(FileExistsError):
        config.began.touch(exist_ok=False)


class Agent:
    def __init__(self, config: Config, wake: Callable[[], None]) -> None:
        self.config = config
        access = Access(config.server, config.ca_file, config.certificate_file, config.user)
        self.nodes = Copy(access, "/api/v1/nodes", model.node_of, wake)
        self.namespaces = Copy(access, "/api/v1/namespaces", model.namespace_of, wake)
        self.pods = Copy(access, "/api/v1/pods", model.pod_of, wake)
        self.policies = Copy(access, "/apis/networking.k8s.io/v1/networkpolicies", _policy, wake)
        self._mark = table.loaded()
        self._routes: dict[str, str] | None = None
        self._looked = time.monotonic()

    def start(self) -> None:
        for copy in (self.nodes, self.namespaces, self.pods, self.policies):
            copy.start()

    def work(self) -> str:
        """Brings the node to what is known now; what it says of itself. Raises CommandError and OSError."""
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self._mark, self._routes = table.loaded(), None
            if not self._mark:
                say("the table was gone from the kernel")
                load(self.config)
        nodes = {node.name: node for node in self.nodes.snapshot() or ()}
        own = nodes.get(self.config.node)
        if own and own.pod_cidr:
            _write(pathlib.Path(self.config.conflist_file), cni.configuration(own.pod_cidr))
        if nodes:
            want = routes.wanted(nodes, self.config.node)
            if want != self._routes:
                for line in routes.converge(want):
                    say(line)
                self._routes = want
        namespaces, pods, policies = self.namespaces.snapshot(), self.pods.snapshot(), self.policies.snapshot()
        if namespaces is None or pods is None or policies is None:
            shut = self._mark == table.mark_of(self.config.closed)
            return "waiting for the API; " + ("closed" if shut else "the last table holds")
        began = self.config.began.stat().st_mtime
        leases = cni.leases(pathlib.Path(self.config.results_directory), began)
        known = model.Cluster(
            self.config.pod_cidr,
            nodes,
            dict(namespaces),
            cni.with_leases(pods, leases, self.config.node),
            policies,
        )
        rules = compile_node(known, self.config.node)
        text = table.render(rules)
        if table.mark_of(text) != self._mark:
            table.load(text)
            self._mark = table.mark_of(text)
            _write(self.config.saved, text)
        isolated = sum(1 for pod in rules.pods if pod.ingress is not None or pod.egress is not None)
        return f"{len(policies)} policies; {len(rules.pods)} pods here, {isolated} isolated; {len(nodes)} nodes"


def run(config: Config) -> None:
    """The service; it ends only by a signal."""
    threading.excepthook = _end
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    agent = Agent(config, lambda: os.eventfd_write(bell, 1))
    given = Watch(config.results_directory)
    begin(config)
    agent.start()
    tell("READY=1")
    told, failed = "", ""
    pause = LOOK_S
    while True:
        ready, _, _ = select.select([bell, given.descriptor], [], [], pause)
        if ready:
            time.sleep(GATHER_S)
        for descriptor in (bell, given.descriptor):
            with contextlib.suppress(BlockingIOError):
                os.read(descriptor, 65536)
        pause = LOOK_S
        try:
            given.renew()
            state, failed = agent.work(), ""
        except (table.CommandError, OSError) as error:
            pause = 1.0
            state = f"failing: {error}"
            if state != failed:
                say(state)
            failed = state
        tell("WATCHDOG=1")
        if state != told:
            told = state
            tell(f"STATUS={state}")


def _end(failure: threading.ExceptHookArgs) -> None:
    """A watch that has ended by an error of ours would leave the node with old rules: systemd starts us anew."""
    sys.__excepthook__(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    os._exit(1)


def _policy(said: model.Json) -> model.Policy:
    """Reads a policy; one that cannot be read isolates its whole namespace, and is named."""
    try:
        return model.policy_of(said)
    except (model.Unreadable, KeyError, TypeError, ValueError) as error:
        closing = model.closed_policy_of(said)
        say(f"policy {closing.name} of namespace {closing.namespace} isolates the whole namespace: {error}")
        return closing


class Watch:
    """Tells when a file of a directory was written or removed; `descriptor` can then be read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.descriptor < 0:
            self._fail("fs.inotify.max_user_instances may be too low")
        self.renew()

    def renew(self) -> None:
        """Watches the directory that has the path now: one that a leaving node removed is made again."""
        pathlib.Path(self._path).mkdir(parents=True, exist_ok=True, mode=0o700)
        mask = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_DELETE
        if self._libc.inotify_add_watch(self.descriptor, os.fsencode(self._path), mask) < 0:
            self._fail("fs.inotify.max_user_watches may be too low")

    def _fail(self, hint: str) -> NoReturn:
        number = ctypes.get_errno()
        raise OSError(number, f"watching {self._path}: {os.strerror(number)} ({hint})")


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file when its text differs, whole or not at all, for root alone."""
    with contextlib.suppress(OSError):
        if path.read_text(encoding="utf-8") == text:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    # The CNI reads every *.conflist of its directory, and no other name.
    fresh = path.with_name(f".{path.name}.new")
    fresh.touch(0o600)
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(state: str) -> None:
    """A word to systemd, when it started us."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if where:
        address = f"\0{where[1:]}" if where.startswith("@") else where
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), address)


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong usage."""
    verbs = {"load": load, "run": run}
    if len(arguments) != 2 or arguments[0] not in verbs:
        say("usage: censuschat-network load|run CONFIG")
        return 2
    try:
        verbs[arguments[0]](Config.read(arguments[1]))
    except (table.CommandError, OSError, ValueError, TypeError) as error:
        say(f"censuschat-network {arguments[0]}: {error}")
        return 1
    return 0
