"""What the servers themselves say was done to them, while a sweep kills those who ask.

etcd's watch (every revision of a key), the AWS emulator's trail, the API servers' audit logs, systemd's and
PostgreSQL's journals on the nodes, and inotify on a node's directory. None of them knows of the engine or its journal.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import ctypes.util
import functools
import json
import os
import re
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.paths import PREFIX, STATE
from lab.topology import Node, Topology
from tests.nodes import on


@dataclass(frozen=True, slots=True)
class Event:
    """One effective change. kind and what name it; wall: unix seconds by the server's clock, or when it was told."""

    wall: float
    kind: str
    what: str
    node: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind} {self.what}"


PKI = "/etc/censuschat/pki"
ETCDCTL = (
    f"ETCDCTL_API=3 exec etcdctl --endpoints https://127.0.0.1:12379 --cacert {PKI}/ca.crt --cert {PKI}/node.crt "
    f"--key {PKI}/node.key -w json"
)
# Of Ansible's own accord PostgreSQL logs no statements: for the sweep its roles' changes are.
LOG_ROLES = "ALTER DATABASE postgres SET log_statement = 'ddl'"
LOG_NOTHING = "ALTER DATABASE postgres RESET log_statement"
STARTED, STOPPED = "39f53479d3a045ac8e11786248231fbf", "9d1aaa27d60140bd96365438aad20286"
WRITES = {"create", "update", "patch", "delete", "deletecollection"}
IN_MOVED_TO, IN_DELETE, IN_CLOSE_WRITE = 0x80, 0x200, 0x8


@functools.cache
def pid_of(node: str) -> str:
    """The node's process 1, as the machine numbers it."""
    command = ("podman", "inspect", "-f", "{{.State.Pid}}", f"{PREFIX}{node}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def root_of(node: str) -> Path:
    """The node's file system, as the machine sees it."""
    return Path(f"/proc/{pid_of(node)}/root")


class Logs:
    """Follows all of them from the moment it is entered; ``events`` grows in the background."""

    def __init__(self, lab: Topology) -> None:
        self.lab = lab
        self.events: list[Event] = []
        self.since = time.time()
        self._stack = contextlib.ExitStack()
        self._stop = threading.Event()
        self._aws = STATE / "log" / "aws.jsonl"
        self._files: list[tuple[Path, Callable[[str], list[Event]], int]] = []
        self._journals: dict[str, str] = {}
        """Node -> the last entry of its journal that was read."""
        self._mutex = threading.Lock()
        self._revision = 0
        """The last one of etcd's that was read."""

    def __enter__(self) -> Logs:
        try:
            self._follow_etcd("witness1")
            for node in self.lab.nodes:
                if node.role == "db":
                    self._journals[node.name] = ""
                    self._watch(node, "etc", "censuschat-runbook-")
                elif node.kubernetes == "control-plane":
                    audit = root_of(node.name) / "var/log/kubernetes/audit/audit.log"
                    self._files.append((audit, _audit(node.site), audit.stat().st_size))
            self._aws.touch()
            self._files.append((self._aws, _aws, self._aws.stat().st_size))
            time.sleep(0.5)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._stack.close()

    def read(self) -> list[Event]:
        """All events until now."""
        with self._mutex:
            for number, (file, parse, offset) in enumerate(self._files):
                with file.open("rb") as stream:
                    stream.seek(offset)
                    text = stream.read()
                whole = text[: text.rfind(b"\n") + 1]
                self._files[number] = (file, parse, offset + len(whole))
                for line in whole.decode(errors="replace").splitlines():
                    self.events += parse(line)
            for node in self._journals:
                self._read_journal(node)
            return list(self.events)

    def _read_journal(self, node: str) -> None:
        cursor = self._journals[node]
        since = ("--after-cursor", cursor) if cursor else ("--since", f"@{self.since:.6f}")
        units = ("_PID=1", "+", "_SYSTEMD_UNIT=patroni.service", "+", "_SYSTEMD_UNIT=redis-server.service")
        command = ("nsenter", "-t", pid_of(node), "-m", "--", "journalctl", "-o", "json", "--no-pager", *since, *units)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        for line in done.stdout.splitlines():
            self._journals[node] = json.loads(line)["__CURSOR"]
            self.events += _journal(node, line)

    def _follow_etcd(self, node: str) -> None:
        """Every change of its keys. A watch ends when its member has had no leader for a moment: it goes on then where
        it was."""
        self._revision = json.loads(on(node, f"{ETCDCTL} get /")).get("header", {})["revision"]
        processes: list[subprocess.Popen[str]] = []

        def begin() -> subprocess.Popen[str]:
            script = f"{ETCDCTL} watch --prefix /censuschat/ --rev {self._revision + 1}"
            # Not podman exec, which leaves the program behind when it is ended.
            entered = ("nsenter", "-t", pid_of(node), "-m", "-n", "--", "sh", "-c", script)
            process = subprocess.Popen(
                entered, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
            )
            processes[:] = [process]
            return process

        def work() -> None:
            while not self._stop.is_set():
                with begin() as process:
                    for line in process.stdout or ():
                        revision, found = _etcd(node, line)
                        with self._mutex:
                            self.events += found
                            self._revision = max(self._revision, revision)
                self._stop.wait(0.2)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()

        def end() -> None:
            self._stop.set()
            for process in processes:
                process.terminate()
            thread.join(5)

        self._stack.callback(end)

    def _watch(self, node: Node, directory: str, prefix: str) -> None:
        """inotify on a directory of a node, for files whose names begin with the prefix."""
        libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
        root = root_of(node.name)
        descriptor = libc.inotify_init1(os.O_CLOEXEC)
        names: dict[int, str] = {}
        for path in (directory, f"{directory}/systemd/system"):
            mask = IN_MOVED_TO | IN_DELETE | IN_CLOSE_WRITE
            watch = libc.inotify_add_watch(descriptor, os.fsencode(root / path), mask)
            if descriptor < 0 or watch < 0:
                raise OSError(ctypes.get_errno(), f"inotify on {root / path}")
            names[watch] = "/" + path

        def work() -> None:
            while True:
                try:
                    data = os.read(descriptor, 65536)
                except OSError:
                    return
                wall, at, found = time.time(), 0, []
                while at < len(data):
                    watch, mask, _cookie, length = struct.unpack_from("iIII", data, at)
                    name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                    at += 16 + length
                    if name.startswith(prefix):
                        verb = "delete" if mask & IN_DELETE else "write"
                        found.append(Event(wall, "file", f"{verb} {names[watch]}/{name}", node.name))
                with self._mutex:
                    self.events += found

        threading.Thread(target=work, daemon=True).start()
        self._stack.callback(os.close, descriptor)


def _etcd(node: str, line: str) -> tuple[int, list[Event]]:
    """The revision, and keys of leases, epochs and hand-overs; what the guards renew every two seconds is not a
    runbook's."""
    wall, revision = time.time(), 0
    events = []
    for each in json.loads(line).get("Events") or []:
        revision = max(revision, int(each["kv"]["mod_revision"]))
        key = base64.b64decode(each["kv"]["key"]).decode()
        environment, _, name = key.removeprefix("/censuschat/").partition("/")
        if name in ("epoch", "lease", "handover", "shipped"):
            verb = "delete" if each.get("type") in (1, "DELETE") else "put"
            events.append(Event(wall, "etcd", f"{verb} {environment}/{name}", node))
    return revision, events


CHANGE = re.compile(r"<Change>\s*<Action>(\w+)</Action>.*?<Name>([^<]+)</Name>", re.DOTALL)


def _aws(line: str) -> list[Event]:
    entry = json.loads(line)
    return [
        Event(entry["wall"], "record", f"{'delete' if action == 'DELETE' else 'set'} {name.rstrip('.')}")
        for action, name in CHANGE.findall(entry["body"])
    ]


def _audit(region: str) -> Callable[[str], list[Event]]:
    def parse(line: str) -> list[Event]:
        """What the operator's credentials wrote; dry runs write nothing."""
        entry = json.loads(line)
        what = entry.get("objectRef", {})
        if (
            entry.get("verb") not in WRITES
            or entry.get("user", {}).get("username") != "kubernetes-admin"
            or entry.get("userAgent") != "censuschat-infra"
            or "dryRun" in entry.get("requestURI", "")
            or not 200 <= entry.get("responseStatus", {}).get("code", 0) < 300
            or what.get("subresource")
        ):
            return []
        verb = "delete" if entry["verb"].startswith("delete") else "write"
        name = f"{what.get('resource')}/{what.get('namespace', '')}/{what.get('name', '')}"
        return [Event(_unix(entry["requestReceivedTimestamp"]), "kubernetes", f"{verb} {region} {name}", region)]

    return parse


def _unix(text: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


ROLE = re.compile(r"statement: *(CREATE|ALTER|DROP) (?:ROLE|USER) \"?(runbook_\w+)", re.IGNORECASE)
TIMELINE = re.compile(r"selected new timeline ID: (\d+)")
REDIS = re.compile(r"(MASTER MODE enabled|REPLICAOF \S+ enabled) \(user request")


def _journal(node: str, line: str) -> list[Event]:
    entry = json.loads(line)
    text = entry.get("MESSAGE", "")
    if not isinstance(text, str):
        text = bytes(text).decode(errors="replace")
    wall = int(entry["__REALTIME_TIMESTAMP"]) / 1e6
    unit = str(entry.get("UNIT", ""))
    if unit.startswith("censuschat-runbook-"):
        verb = {STARTED: "start", STOPPED: "stop"}.get(entry.get("MESSAGE_ID", ""))
        return [Event(wall, "service", f"{verb} {unit}", node)] if verb else []
    events = [Event(wall, "role", f"{verb.lower()} {name}", node) for verb, name in ROLE.findall(text)]
    # A standby follows to the primary's timeline with other words.
    events += [Event(wall, "timeline", "new", node) for _ in TIMELINE.findall(text)]
    events += [Event(wall, "redis", f"{words.split()[0].lower()} {node}", node) for words in REDIS.findall(text)]
    return events


def of(events: Sequence[Event], needle: str, since: float, until: float) -> Iterator[Event]:
    """The events between two moments that name something of the needle's."""
    return (event for event in events if needle in event.what and since <= event.wall <= until)


@contextlib.contextmanager
def role_changes_logged(primary: str) -> Iterator[None]:
    """Have PostgreSQL log the changes of its roles, for as long as a sweep takes."""
    psql: Any = lambda sql: on(primary, f'psql -qc "{sql}"', user="postgres")  # noqa: E731
    psql(LOG_ROLES)
    try:
        yield
    finally:
        psql(LOG_NOTHING)
