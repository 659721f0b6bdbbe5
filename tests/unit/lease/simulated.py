"""A small world for the guards: virtual time, an etcd, kernels and Patronis. All of them can be slow, cut off, frozen.

Every guard and operator is a thread, but only one runs at a time: whoever waits hands over to the one that is due next.
So a run is decided by its seed alone.
"""

from __future__ import annotations

import base64
import dataclasses
import heapq
import itertools
import json
import pathlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.lease import etcd
from ansible_collections.censuschat.infra.plugins.module_utils.lease.database import DatabaseError, Postgres
from ansible_collections.censuschat.infra.plugins.module_utils.lease.gate import Gate
from ansible_collections.censuschat.infra.plugins.module_utils.lease.guard import Config, Guard
from ansible_collections.censuschat.infra.plugins.module_utils.lease.planner import PatroniView
from ansible_collections.censuschat.infra.plugins.module_utils.lease.store import LeaseStore

TTL_S, RENEW_S, CLOSE_AFTER_S, KERNEL_AFTER_S = 15.0, 2.0, 9.0, 11.0


class Killed(BaseException):
    """Raised inside a thread of the simulation when its process ends."""


class World:
    """Virtual time. `now` is what an all-knowing observer's clock says, in seconds."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self._turns: list[tuple[float, int, threading.Semaphore]] = []
        self._count = itertools.count()
        self._main = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._ending = False
        self.failure: BaseException | None = None
        self.cut: set[str] = set()
        """Regions that reach nothing outside."""
        self.history: list[str] = []

    def note(self, text: str) -> None:
        self.history.append(f"{self.now:8.2f} {text}")

    def spawn(self, body: Callable[[], None]) -> None:
        turn = threading.Semaphore(0)

        def run() -> None:
            turn.acquire()
            try:
                if not self._ending:
                    body()
            except Killed:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            self._main.release()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        heapq.heappush(self._turns, (self.now, next(self._count), turn))

    def sleep(self, seconds: float) -> None:
        """Wait in virtual time; others run meanwhile."""
        turn = threading.Semaphore(0)
        heapq.heappush(self._turns, (self.now + max(0.0, seconds), next(self._count), turn))
        self._main.release()
        turn.acquire()
        if self._ending:
            raise Killed

    def run_until(self, end: float) -> None:
        while self._turns and self._turns[0][0] <= end and self.failure is None:
            at, _, turn = heapq.heappop(self._turns)
            self.now = max(self.now, at)
            turn.release()
            self._main.acquire()
        self.now = max(self.now, end)

    def finish(self) -> None:
        self._ending = True
        while self._turns:
            _, _, turn = heapq.heappop(self._turns)
            turn.release()
            self._main.acquire()
        for thread in self._threads:
            thread.join(5)
        if self.failure is not None:
            raise self.failure


@dataclasses.dataclass
class _Key:
    value: str
    mod: int
    version: int
    lease: int


class Cluster:
    """etcd as the guards see it: keys, leases that end, transactions. rate: how fast its clock runs."""

    def __init__(self, world: World, rate: float = 1.0) -> None:
        self.world, self.rate = world, rate
        self.keys: dict[str, _Key] = {}
        self.leases: dict[int, tuple[float, float]] = {}
        self.revision = 1
        self.next_lease = 1000
        self.down = False

    def expire(self) -> None:
        for lease, (_, end) in list(self.leases.items()):
            if self.world.now >= end:
                del self.leases[lease]
                for name in [n for n, k in self.keys.items() if k.lease == lease]:
                    del self.keys[name]
                    self.world.note(f"store: {name} ended with its lease")

    def extend_all(self) -> None:
        """What a new leader does: every lease gets its full time again."""
        for lease, (ttl, _) in self.leases.items():
            self.leases[lease] = (ttl, self.world.now + ttl / self.rate)

    def end_all(self) -> None:
        """What a leader does that was frozen, lost its place and believes that time stood still for the others too:
        it ends leases that were renewed elsewhere (etcd issue 15247)."""
        self.leases = dict.fromkeys(self.leases, (0.0, self.world.now))
        self.expire()

    def apply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.expire()
        match path:
            case "/v3/kv/range":
                start, end = _text(body["key"]), _text(body["range_end"])
                return {"kvs": [self._shown(n) for n in sorted(self.keys) if start <= n < end]}
            case "/v3/kv/txn":
                holds = all(self._holds(c) for c in body["compare"])
                if holds:
                    self.revision += 1
                    for step in body["success"]:
                        self._do(step)
                return {"succeeded": True} if holds else {}
            case "/v3/lease/grant":
                self.next_lease += 1
                ttl = float(body["TTL"])
                self.leases[self.next_lease] = (ttl, self.world.now + ttl / self.rate)
                return {"ID": str(self.next_lease), "TTL": str(int(ttl))}
            case "/v3/lease/keepalive":
                lease = int(body["ID"])
                if lease not in self.leases:
                    return {"result": {"ID": str(lease)}}
                ttl = self.leases[lease][0]
                self.leases[lease] = (ttl, self.world.now + ttl / self.rate)
                return {"result": {"ID": str(lease), "TTL": str(int(ttl))}}
            case "/v3/lease/revoke":
                lease = int(body["ID"])
                if lease in self.leases:
                    self.leases[lease] = (0.0, self.world.now)
                    self.expire()
                return {}
        raise AssertionError(f"the simulation knows no {path}")

    def _shown(self, name: str) -> dict[str, str]:
        key = self.keys[name]
        return {"key": _b64(name), "value": _b64(key.value), "mod_revision": str(key.mod), "lease": str(key.lease)}

    def _holds(self, compare: Mapping[str, Any]) -> bool:
        name = _text(compare["key"])
        if "range_end" in compare:
            found = [k for n, k in self.keys.items() if name <= n < _text(compare["range_end"])]
        else:
            found = [self.keys[name]] if name in self.keys else []
        if not found:
            found = [_Key("", 0, 0, 0)]
            if compare["target"] == "VALUE":
                return False
        wanted: Any
        for key in found:
            match compare["target"]:
                case "VERSION":
                    actual, wanted = key.version, int(compare["version"])
                case "MOD":
                    actual, wanted = key.mod, int(compare["mod_revision"])
                case "LEASE":
                    actual, wanted = key.lease, int(compare["lease"])
                case _:
                    actual, wanted = key.value, _text(compare["value"])  # type: ignore[assignment]
            match compare["result"]:
                case "GREATER":
                    holds = actual > wanted
                case "LESS":
                    holds = actual < wanted
                case _:
                    holds = actual == wanted
            if not holds:
                return False
        return True

    def _do(self, step: Mapping[str, Any]) -> None:
        if "request_put" in step:
            put = step["request_put"]
            name, lease = _text(put["key"]), int(put["lease"])
            assert not lease or lease in self.leases, "etcd refuses a put with a lease that is gone"
            version = self.keys[name].version + 1 if name in self.keys else 1
            self.keys[name] = _Key(_text(put["value"]), self.revision, version, lease)
            return
        name = _text(step["request_delete_range"]["key"])
        end = step["request_delete_range"].get("range_end")
        for found in [n for n in self.keys if (n == name if end is None else name <= n < _text(end))]:
            del self.keys[found]


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(coded: str) -> str:
    return base64.b64decode(coded).decode()


@dataclasses.dataclass
class Hazards:
    """How bad the world is. Chances are per call; times in seconds."""

    latency_s: float = 0.02
    freeze_chance: float = 0.0
    freeze_s: float = 40.0
    lost_answer_chance: float = 0.0


class Machine:
    """A node: its clock runs at its own rate and from its own start, and it can freeze at any call."""

    def __init__(self, world: World, region: str, hazards: Hazards, rate: float = 1.0) -> None:
        self.world, self.region, self.hazards, self.rate = world, region, hazards, rate
        self.offset = world.random.uniform(0, 1e6)
        self.alive = True
        self.calls = 0
        self.freeze_and_cut: tuple[int, float] | None = None
        """At the call of this number: the region is cut off and the process frozen for so many seconds."""

    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    def sleep(self, seconds: float) -> None:
        self.world.sleep(seconds / self.rate)

    def hazard(self) -> None:
        """A moment at which the scheduler may take the processor away, for long."""
        if not self.alive:
            raise Killed
        self.calls += 1
        if self.freeze_and_cut is not None and self.calls == self.freeze_and_cut[0]:
            self.world.cut.add(self.region)
            self.world.sleep(self.freeze_and_cut[1])
        chance = self.hazards.freeze_chance
        if chance and self.world.random.random() < chance:
            self.world.sleep(self.world.random.uniform(0, self.hazards.freeze_s))
        if not self.alive:
            raise Killed


class SimulatedEtcd(etcd.Etcd):
    """The client of one machine; only its way to the cluster is simulated."""

    def __init__(self, cluster: Cluster, machine: Machine) -> None:
        super().__init__(["http://simulated"], clock=machine.clock)
        self.cluster, self.machine = cluster, machine

    def call(self, path: str, body: dict[str, Any], deadline: float | None = None) -> dict[str, Any]:
        machine, world = self.machine, self.machine.world
        machine.hazard()
        end = machine.clock() + self.budget_s
        if deadline is not None:
            end = min(end, deadline)
        delay = world.random.uniform(0, 2 * machine.hazards.latency_s)
        world.sleep(delay)
        answer = None
        if machine.region not in world.cut and not self.cluster.down and machine.clock() <= end:
            answer = self.cluster.apply(path, body)
        world.sleep(delay)
        lost = world.random.random() < machine.hazards.lost_answer_chance
        if answer is None or lost or machine.region in world.cut:
            machine.sleep(max(0.0, end - machine.clock()))
            raise etcd.EtcdUnreachable("no member of the lease store answered in the simulation")
        # The answer is here, and this may be the moment at which the process gets no processor for long.
        machine.hazard()
        return answer


class Kernel:
    """What the nft table does, by the true time: `runner` stands where nft and ss are called."""

    def __init__(self, machine: Machine, node: str, on_open: Callable[[Kernel], None]) -> None:
        self.machine, self.node, self.on_open = machine, node, on_open
        self.armed: dict[int, float] = {}
        self.confirmed: int | None = None

    def is_open(self) -> bool:
        return self.confirmed is not None and self.armed.get(self.confirmed, -1.0) > self.machine.world.now

    def runner(self, argv: Sequence[str], text: str) -> str:
        self.machine.hazard()
        self.machine.world.sleep(0.005)
        for line in text.splitlines():
            words = line.split()
            if line.startswith("add element") and "armed" in words:
                millis = int(words[words.index("timeout") + 1].removesuffix("ms"))
                life = millis / 1000 / self.machine.rate
                self.armed[int(words[words.index("{") + 1])] = self.machine.world.now + life
            elif line.startswith("add element") and "confirmed" in words:
                self.confirmed = int(words[-2])
            elif line.startswith("flush map"):
                self.confirmed = None
            elif line.startswith(("flush set", "delete table")):
                self.armed.clear()
                self.confirmed = None
        if self.is_open():
            self.on_open(self)
        self.machine.hazard()
        if "-j" in argv:
            return json.dumps({"nftables": [{"metainfo": {}}, self._listed(argv)]})
        return "table" if "list" in argv else ""

    def _listed(self, argv: Sequence[str]) -> dict[str, Any]:
        if "set" in argv:
            alive = [n for n, end in self.armed.items() if end > self.machine.world.now]
            return {"set": {"name": "armed", "elem": [{"elem": {"val": n, "timeout": 11}} for n in alive]}}
        pairs = [] if self.confirmed is None else [[5432, self.confirmed]]
        return {"map": {"name": "confirmed", "elem": pairs}}


class SimulatedPatroni:
    """One region's Patroni: its configuration is shared by the region's nodes, its first node leads."""

    def __init__(self, world: World, region: str) -> None:
        self.world, self.region = world, region
        self.config: dict[str, Any] = {}
        self.stopped = False
        self.peer: SimulatedPatroni | None = None

    def is_primary(self) -> bool:
        return not self.config.get("standby_cluster") and not self.stopped


class PatroniOf:
    """Patroni as one node's guard reaches it."""

    def __init__(self, shared: SimulatedPatroni, machine: Machine, leads: bool) -> None:
        self.shared, self.machine, self.leads = shared, machine, leads

    def observe(self) -> PatroniView:
        self.machine.hazard()
        self.machine.world.sleep(0.01)
        role = "replica"
        if self.leads:
            role = "master" if self.shared.is_primary() else "standby_leader"
        return PatroniView(role, dict(self.shared.config))

    def patch(self, change: Mapping[str, Any]) -> None:
        self.machine.hazard()
        self.machine.world.sleep(0.01)
        for name, value in change.items():
            if value is None:
                self.shared.config.pop(name, None)
            else:
                self.shared.config[name] = value
        if not self.shared.config.get("pause"):
            self.shared.stopped = False

    def is_followed(self, budget_s: float) -> bool:
        self.machine.hazard()
        peer = self.shared.peer
        return not self.machine.world.cut and peer is not None and not peer.is_primary()

    def furthest_peer(self) -> tuple[str, int]:
        self.machine.hazard()
        if self.shared.region in self.machine.world.cut or self.shared.peer is None:
            raise DatabaseError("the peers cannot be reached")
        return "peer", 0x2000000


class PostgresOf(Postgres):
    """PostgreSQL of one node."""

    shared: SimulatedPatroni
    machine: Machine

    def __init__(self, shared: SimulatedPatroni, machine: Machine) -> None:
        super().__init__()
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "machine", machine)

    def end_sessions(self) -> int:
        self.machine.hazard()
        return 0

    def stop(self) -> None:
        self.machine.hazard()
        self.machine.world.sleep(0.3)
        self.shared.stopped = True

    def shut_down_at(self) -> str:
        return "0/1000000" if self.shared.stopped else ""


class Scene:
    """Two regions of `nodes` nodes each, and a check that no two regions' gates are ever open at once."""

    def __init__(
        self,
        seed: int,
        directory: pathlib.Path,
        hazards: Hazards | None = None,
        guard: type[Guard] = Guard,
        nodes: int = 2,
    ) -> None:
        self.world = World(seed)
        self.directory, self.hazards, self.guard_type = directory, hazards or Hazards(), guard
        self.drift = 0.08
        self.cluster = Cluster(self.world, self._rate())
        self.patroni = {region: SimulatedPatroni(self.world, region) for region in ("east", "west")}
        self.patroni["east"].peer, self.patroni["west"].peer = self.patroni["west"], self.patroni["east"]
        self.patroni["west"].config["standby_cluster"] = _standby("east")
        self.kernels: dict[str, Kernel] = {}
        self.machines: dict[str, Machine] = {}
        self.guards: dict[str, Guard] = {}
        self.violations: list[str] = []
        self.openings = 0
        for region in ("east", "west"):
            for number in range(1, nodes + 1):
                self.boot(region, f"{region}{number}")

    def _rate(self) -> float:
        return self.world.random.uniform(1 - self.drift, 1 + self.drift)

    def _opened(self, kernel: Kernel) -> None:
        self.openings += 1
        region = kernel.machine.region
        also = [k.node for k in self.kernels.values() if k.machine.region != region and k.is_open()]
        if also:
            self.violations.append(f"{kernel.node} opened at {self.world.now:.2f} while open: {', '.join(also)}")

    def boot(self, region: str, node: str) -> None:
        """Start a node's guard, also after it was killed. The kernel's gate outlives its guard."""
        machine = Machine(self.world, region, self.hazards, self._rate())
        kernel = self.kernels.get(node)
        if kernel is None:
            kernel = Kernel(machine, node, self._opened)
        else:
            kernel.machine = machine
        self.kernels[node], self.machines[node] = kernel, machine

        def body() -> None:
            home = self.directory / node
            config = configuration(region, node)
            gate = Gate(config.rules, KERNEL_AFTER_S, home / "gate.json", runner=kernel.runner)
            guard = self.guard_type(
                config,
                LeaseStore(SimulatedEtcd(self.cluster, machine), "simulated"),
                gate,
                PatroniOf(self.patroni[region], machine, leads=node.endswith("1")),
                PostgresOf(self.patroni[region], machine),
                clock=machine.clock,
                memory=home / "memory.json",
                status=home / "status.json",
            )
            self.guards[node] = guard
            guard.start()
            while True:
                began = machine.clock()
                guard.cycle()
                machine.sleep(guard.next_wake(began))

        self.world.spawn(body)

    def kill(self, node: str) -> None:
        self.machines[node].alive = False

    def operator(self) -> LeaseStore:
        """The lease store as somebody at the witness site reaches it."""
        self.machines["witness"] = Machine(self.world, "witness", Hazards())
        return LeaseStore(SimulatedEtcd(self.cluster, self.machines["witness"]), "simulated")

    def open_regions(self) -> set[str]:
        return {kernel.machine.region for kernel in self.kernels.values() if kernel.is_open()}


def _standby(other: str) -> dict[str, Any]:
    return {"host": other, "port": 5432}


def configuration(region: str, node: str) -> Config:
    other = "west" if region == "east" else "east"
    return Config.of(
        {
            "environment": "simulated",
            "node": node,
            "region": region,
            "figures": {
                "ttl_s": TTL_S,
                "renew_s": RENEW_S,
                "close_after_s": CLOSE_AFTER_S,
                "kernel_after_s": KERNEL_AFTER_S,
            },
            "store": {"endpoints": ["http://simulated"], "request_timeout_s": 0.8, "budget_s": 2.5},
            "gate": {"port": 5432, "peers": ["192.0.2.9"]},
            "patroni": {
                "url": "http://simulated",
                "region": [],
                "peers": [],
                "peer_addresses": [],
                "standby_cluster": _standby(other),
            },
            "postgres": {},
        }
    )
