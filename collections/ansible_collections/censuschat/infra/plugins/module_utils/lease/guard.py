# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The guard: a small loop around the planner that keeps the gate of one database node.

One thread, and every wait has an end: whatever does not answer in time counts as "no".
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

from . import etcd, planner
from .database import DatabaseError, Patroni, Postgres, lsn_number
from .gate import CommandError, Gate, GateRules
from .model import Figures, Follower, GateRecord, LeaseError, LeaseRecord, Shipped, StoreView, boottime
from .planner import MARKER, Observed, PatroniView, Renewal, Standing
from .quiet import QuietWatch
from .store import LeaseStore

CONFIG = pathlib.Path("/etc/censuschat/guard.json")
STATUS = pathlib.Path("/run/censuschat/guard.json")
GATE_MEMORY = pathlib.Path("/run/censuschat/gate.json")
MEMORY = pathlib.Path("/var/lib/censuschat/guard.json")
LOCK = pathlib.Path("/run/censuschat/guard.lock")

_LEASE_ACTIONS = (planner.Shut, planner.Renew, planner.Take, planner.Remember)
_TROUBLE = (etcd.EtcdError, LeaseError)


@dataclasses.dataclass(frozen=True)
class Config:
    """/etc/censuschat/guard.json, checked."""

    environment: str
    node: str
    region: str
    figures: Figures
    endpoints: tuple[str, ...]
    tls: etcd.Tls | None
    request_timeout_s: float
    budget_s: float
    rules: GateRules
    patroni_url: str
    patroni_region: tuple[str, ...]
    patroni_peers: tuple[str, ...]
    peer_addresses: tuple[str, ...]
    standby_cluster: Mapping[str, Any]
    postgres: Postgres

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str = str(CONFIG)) -> Config:
        """Raises LeaseError naming what is wrong, before anything is done."""
        try:
            times, store, gate, patroni = raw["figures"], raw["store"], raw["gate"], raw["patroni"]
            config = cls(
                environment=str(raw["environment"]),
                node=str(raw["node"]),
                region=str(raw["region"]),
                figures=Figures(
                    ttl_s=float(times["ttl_s"]),
                    renew_s=float(times["renew_s"]),
                    close_after_s=float(times["close_after_s"]),
                    kernel_after_s=float(times["kernel_after_s"]),
                ),
                endpoints=tuple(store["endpoints"]),
                tls=etcd.Tls(**store["tls"]) if store.get("tls") else None,
                request_timeout_s=float(store["request_timeout_s"]),
                budget_s=float(store["budget_s"]),
                rules=GateRules(int(gate["port"]), tuple(gate["peers"])),
                patroni_url=str(patroni["url"]),
                patroni_region=tuple(patroni["region"]),
                patroni_peers=tuple(patroni["peers"]),
                peer_addresses=tuple(patroni["peer_addresses"]),
                standby_cluster=dict(patroni["standby_cluster"]),
                postgres=Postgres(**raw["postgres"]),
            )
            config.rules.table()
        except (KeyError, TypeError, ValueError) as error:
            raise LeaseError(f"{where} is not a guard's configuration ({error}); run the role write_guard") from error
        problems = config.figures.problems()
        if config.budget_s > config.figures.close_after_s - config.figures.renew_s:
            problems.append(f"the store's budget of {config.budget_s:g} s does not fit between renew and close_after")
        if problems:
            raise LeaseError(f"{where}: " + "; ".join(problems))
        return config

    @classmethod
    def load(cls, path: pathlib.Path = CONFIG) -> Config:
        try:
            return cls.of(json.loads(path.read_text()), str(path))
        except (OSError, ValueError) as error:
            raise LeaseError(f"{path} cannot be read: {error}; run the role write_guard") from error

    def store(self) -> LeaseStore:
        client = etcd.Etcd(self.endpoints, self.tls, self.request_timeout_s, self.budget_s)
        return LeaseStore(client, self.environment)

    def gate(self) -> Gate:
        return Gate(self.rules, self.figures.kernel_after_s, GATE_MEMORY)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def log(event: str, **fields: Any) -> None:
    """One JSON line for the journal. The guard knows no secrets: only ssl reads the key file."""
    say(json.dumps({"event": event, **fields}, sort_keys=True))


def notify(message: str) -> None:
    """Tell systemd (READY=1, WATCHDOG=1, STATUS=...); nothing when not run by it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(0.2)
        sock.sendto(message.encode(), address)


def write_whole(path: pathlib.Path, text: str, *, durable: bool = False) -> None:
    """Replace a file at once: a reader sees the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    beside.replace(path)
    if durable:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class PatroniLike(Protocol):
    def observe(self) -> PatroniView: ...

    def patch(self, change: Mapping[str, Any]) -> None: ...

    def furthest_peer(self) -> tuple[str, int]: ...

    def is_followed(self, budget_s: float) -> bool: ...


class Guard:
    """One node's guard. Its parts are given, so that tests can stand in for any of them."""

    def __init__(
        self,
        config: Config,
        store: LeaseStore,
        gate: Gate,
        patroni: PatroniLike,
        postgres: Postgres,
        *,
        clock: Callable[[], float] = boottime,
        memory: pathlib.Path = MEMORY,
        status: pathlib.Path = STATUS,
    ) -> None:
        self.config, self.store, self.gate, self.patroni, self.postgres = config, store, gate, patroni, postgres
        self.clock, self.memory, self.status = clock, memory, status
        self.problems: dict[str, str] = {}
        self.patroni_at: float | None = None
        self.last_reason = "starting"
        self.last_standing = ""
        self.quiet = QuietWatch()
        self.known = Observed(
            node=config.node,
            region=config.region,
            figures=config.figures,
            standby_cluster=config.standby_cluster,
            started_at=clock(),
            remembered_epoch=self._remembered(),
        )

    # ---- life ----

    def start(self) -> None:
        adopted = self.gate.adopt()
        log("guard_started", node=self.config.node, region=self.config.region, gate_adopted=adopted)

    def cycle(self) -> None:
        """One turn: learn, decide, act. Never raises for what the world does."""
        self._learn(renewal_tried=False)
        self._check_table()
        lease = self._own_lease()
        if lease is None:
            self._look()
        else:
            self._renew(lease, opens=planner.standing(self.known, self.clock()) is Standing.HOLDER)
        # The lease first; Patroni, which may be slow, only when the gate is as it must be. A renewal or a taking
        # changes what is known, so what follows from it is decided again, a few times at most.
        for _round in range(3):
            urgent = [a for a in planner.plan(self.known, self.clock()) if isinstance(a, _LEASE_ACTIONS)]
            for step in urgent:
                self._perform(step)
            if not any(isinstance(step, planner.Renew | planner.Take) for step in urgent):
                break
        self._ask_patroni()
        for action in planner.plan(self.known, self.clock()):
            if not isinstance(action, _LEASE_ACTIONS):
                self._perform(action)
        self._write_status()

    def next_wake(self, cycle_began: float) -> float:
        """Seconds to wait: until the next renewal is due, or the gate must be closed, whichever is first."""
        # A guard that does not hold the lease looks more often, and one that hands over more often still: clients wait.
        pace = {Standing.HOLDER: 1.0, Standing.HANDING_OVER: 0.25}.get(planner.standing(self.known, self.clock()), 0.5)
        due = cycle_began + pace * self.config.figures.renew_s
        if not self.known.shut and self.known.renewed_at is not None:
            due = min(due, self.known.renewed_at + self.config.figures.close_after_s)
        return max(0.2, due - self.clock())

    # ---- learning ----

    def _learn(self, **fields: Any) -> None:
        self.known = dataclasses.replace(self.known, **fields)

    def _problem(self, part: str, text: str) -> None:
        if text and self.problems.get(part) != text:
            log("problem", part=part, detail=text)
        if not text and part in self.problems:
            log("problem_over", part=part)
        if text:
            self.problems[part] = text
        else:
            self.problems.pop(part, None)

    def _deadline(self) -> float:
        """When the store must have answered: before the gate has to be closed, and within the budget."""
        now = self.clock()
        end = now + self.config.budget_s
        if planner.renewal_is_young(self.known, now) and self.known.renewed_at is not None:
            end = min(end, self.known.renewed_at + self.config.figures.close_after_s)
        return end

    def _own_lease(self) -> LeaseRecord | None:
        where = planner.standing(self.known, self.clock())
        if where in (Standing.HOLDER, Standing.HANDING_OVER) and self.known.view:
            return self.known.view.lease
        return None

    def _look(self, deadline: float | None = None) -> StoreView | None:
        asked = self.clock()
        try:
            view = self.store.observe(deadline or self._deadline())
        except _TROUBLE as error:
            self._problem("store", str(error))
            return None
        self._problem("store", "")
        self._learn(view=view, view_at=asked)
        self.quiet.note(view, self.clock())
        return view

    def _ask_patroni(self) -> None:
        now = self.clock()
        where = planner.standing(self.known, now)
        steady = self.known.differs_since is None and where is not Standing.HANDING_OVER
        fresh = self.patroni_at is not None and now - self.patroni_at < 2.5 * self.config.figures.renew_s
        if steady and fresh and planner.wanted_patch(self.known, where, now) is None:
            # In calm times Patroni need not be asked in every turn.
            return
        self.patroni_at = now
        try:
            self._learn(patroni=self.patroni.observe())
            self._problem("patroni", "")
        except DatabaseError as error:
            self._learn(patroni=None)
            self._problem("patroni", str(error))
        differs = planner.wanted_patch(self.known, where, now) is not None
        self._learn(differs_since=(self.known.differs_since or now) if differs else None)
        # Only just after a renewal, so that slow answers cannot keep the gate open beyond its time.
        if where is Standing.HOLDER and now - (self.known.renewed_at or 0.0) < self.config.figures.renew_s:
            self._tell_follower()

    def _tell_follower(self) -> None:
        """On the primary: leave in the store whether the other region follows, for whoever wants to hand over."""
        view, patroni = self.known.view, self.known.patroni
        if view is None or view.lease is None or patroni is None or not patroni.is_primary:
            return
        try:
            streaming = self.patroni.is_followed(self.config.figures.renew_s)
            found = Follower(self.config.node, view.lease.epoch, streaming)
            if found != view.follower:
                self.store.record_follower(found, view.lease.lease_id)
                log("follower", streaming=streaming)
            self._problem("follower", "")
        except _TROUBLE as error:
            self._problem("follower", str(error))

    def _check_table(self) -> None:
        """Put the gate back, closed, if somebody removed or changed it."""
        try:
            if not self.gate.intact():
                log("gate_was_changed", detail="the nftables table was not as loaded; it is put back, closed")
                self.gate.load()
                self._learn(shut=True)
            self._problem("gate", "")
        except CommandError as error:
            self._problem("gate", str(error))

    # ---- acting ----

    def _perform(self, action: planner.Action) -> None:
        match action:
            case planner.Shut(reason):
                self._shut(reason)
            case planner.Renew(lease, opens):
                self._renew(lease, opens)
            case planner.Take(view):
                self._take(view)
            case planner.Remember(epoch):
                self._remember(epoch)
            case planner.SetPatroni(patch, reason):
                self._set_patroni(patch, reason)
            case planner.StopCleanly(_):
                self._stop_cleanly()
            case planner.Unregister(gate):
                self._unregister(gate)

    def _shut(self, reason: str) -> None:
        try:
            self.gate.shut()
        except CommandError as error:
            # Not marked as shut: it is tried again in every turn, and the kernel closes by itself meanwhile.
            self._problem("gate", str(error))
            return
        self._learn(shut=True)
        self.last_reason = reason
        log("gate_closed", reason=reason)
        try:
            self.gate.end_sessions()
        except CommandError as error:
            log("sessions_not_reset", detail=str(error))
        try:
            log("sessions_ended", count=self.postgres.end_sessions())
        except (DatabaseError, ValueError) as error:
            log("sessions_not_ended", detail=str(error))

    def _renew(self, lease: LeaseRecord, opens: bool) -> None:
        """Arm, read, register, renew, confirm: in this order, which the safety of the lease rests on."""
        self._learn(renewal_tried=True)
        try:
            deadline = self._deadline()
            if not opens:
                if self.store.keep_alive(lease.lease_id, deadline) <= 0:
                    log("lease_gone", epoch=lease.epoch)
                self._look(deadline)
                return
            armed_at = self.clock()
            generation = self.gate.arm()
            asked_at = self.clock()
            view = self._look(deadline)
            if view is None:
                return
            registered = self._register(lease, deadline)
            ttl_s = self.store.keep_alive(lease.lease_id, deadline)
            renewal = Renewal(armed_at, asked_at, self.clock(), view, lease, registered, ttl_s)
            why_not = planner.why_not_confirm(renewal, self.known)
            if ttl_s <= 0:
                # The store counts time otherwise than this node does: what was confirmed before proves nothing now.
                self._learn(renewed_at=None)
            if why_not:
                # That the lease went elsewhere is no trouble of this renewal; the planner acts upon it.
                mine = planner.standing(self.known, self.clock()) is Standing.HOLDER
                self._problem("renewal", why_not if mine else "")
                return
            self.gate.confirm(generation)
        except _TROUBLE as error:
            self._problem("renewal", str(error))
            return
        was_open = not self.known.shut and self.known.renewed_at is not None
        self._learn(renewed_at=armed_at, shut=False)
        self._problem("renewal", "")
        if not was_open:
            self.last_reason = f"this region holds epoch {lease.epoch}"
            log("gate_open", epoch=lease.epoch)

    def _register(self, lease: LeaseRecord, deadline: float) -> bool:
        """Write this node's gate record anew, by which others see that the gate may be open for a while from now on."""
        if planner.standing(self.known, self.clock()) is not Standing.HOLDER:
            return False
        own = GateRecord(self.config.node, self.config.region, lease.epoch, self.config.figures.kernel_after_s)
        return self.store.register(own, lease.lease_id, deadline)

    def _take(self, view: StoreView) -> None:
        self._learn(renewal_tried=False)
        try:
            lease = self.store.take(
                view,
                self.config.region,
                ttl_s=self.config.figures.ttl_s,
                wall=time.time(),
                by=f"guard of {self.config.node}",
            )
        except _TROUBLE as error:
            self._learn(renewal_tried=True)
            self._problem("taking", str(error))
        else:
            self._problem("taking", "")
            log("lease_taken", epoch=lease.epoch)
        self._look()

    def _set_patroni(self, patch: Mapping[str, Any], reason: str) -> bool:
        try:
            self.patroni.patch(patch)
        except DatabaseError as error:
            self._problem("patroni", str(error))
            return False
        self.patroni_at = None
        log("patroni_set", reason=reason)
        return True

    def _stop_cleanly(self) -> None:
        """Step down with nothing left behind: pause Patroni, stop PostgreSQL, see the other region hold it all."""
        view, patroni = self.known.view, self.known.patroni
        handover = view.active_handover() if view else None
        if view is None or handover is None or patroni is None:
            return
        try:
            if not patroni.marker:
                if not self.patroni.is_followed(self.config.figures.renew_s):
                    raise DatabaseError(f"no node of {handover.to} streams from this region with little left to send")
                marker = {"node": self.config.node, "epoch": handover.epoch}
                # One change: unpaused, Patroni would stop PostgreSQL at once and leave WAL behind.
                self.patroni.patch(
                    {"pause": True, "standby_cluster": dict(self.config.standby_cluster), MARKER: marker}
                )
                log("hand_over_begun", to=handover.to, epoch=handover.epoch)
            lsn = self.postgres.shut_down_at()
            if not lsn:
                notify("WATCHDOG=1")
                self.postgres.stop()
                lsn = self.postgres.shut_down_at()
            if not lsn:
                raise DatabaseError("PostgreSQL has not stopped cleanly yet")
            notify("WATCHDOG=1")
            peer, received = self.patroni.furthest_peer()
            if received <= lsn_number(lsn):
                raise DatabaseError(f"{handover.to} has received WAL up to byte {received}, not yet past {lsn}")
            self.store.record_shipped(Shipped(handover.epoch, self.config.node, lsn), handover)
            log("all_shipped", lsn=lsn, to=peer)
        except _TROUBLE as error:
            self._problem("hand-over", str(error))
            return
        self._problem("hand-over", "")
        # At once, and without asking Patroni anything: it is slow to answer while PostgreSQL is down.
        follow = {"standby_cluster": dict(self.config.standby_cluster), "pause": None, MARKER: None}
        if self._set_patroni(follow, "follow the other region: all is shipped"):
            # Stopped cleanly and set to come back as a standby: this node has stepped down.
            for gate in view.gates:
                if gate.node == self.config.node:
                    self._unregister(gate)

    def _unregister(self, gate: GateRecord) -> None:
        try:
            self.store.unregister(gate)
        except _TROUBLE as error:
            self._problem("hand-over", str(error))
            return
        log("gate_record_deleted", epoch=gate.epoch)

    # ---- memory and status ----

    def _remembered(self) -> int:
        try:
            return int(json.loads(self.memory.read_text())["epoch"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LeaseError(
                f'{self.memory} cannot be read ({error}); write {{"epoch": N}} with the environment\'s epoch into it'
            ) from error

    def _remember(self, epoch: int) -> None:
        try:
            write_whole(self.memory, json.dumps({"epoch": epoch}), durable=True)
        except OSError as error:
            self._problem("memory", str(error))
            return
        self._problem("memory", "")
        self._learn(remembered_epoch=epoch)

    def _write_status(self) -> None:
        now = self.clock()
        view = self.known.view
        is_open = planner.renewal_is_young(self.known, now)
        where = planner.standing(self.known, now)
        if not is_open and where is not Standing.HOLDER:
            self.last_reason = planner.why_shut(self.known, where, now)
        if where.value != self.last_standing:
            log("standing", now=where.value)
            self.last_standing = where.value
        document = {
            "environment": self.config.environment,
            "node": self.config.node,
            "region": self.config.region,
            "gate": "open" if is_open else "closed",
            "reason": self.last_reason,
            "standing": where.value,
            "holder": view.lease.region if view and view.lease else None,
            "epoch": view.epoch.epoch if view and view.epoch else None,
            "last_region": view.epoch.region if view and view.epoch else None,
            "renewed_age_s": round(now - self.known.renewed_at, 2) if is_open and self.known.renewed_at else None,
            "store_age_s": round(now - self.known.view_at, 2) if self.known.view_at is not None else None,
            "patroni_role": self.known.patroni.role if self.known.patroni else None,
            "follows": bool(self.known.patroni.config.get("standby_cluster")) if self.known.patroni else None,
            "followed": view.is_followed() if view and where is Standing.HOLDER else None,
            "quiet": {node: [revision, round(since, 3)] for node, (revision, since) in self.quiet.seen.items()},
            "problems": dict(sorted(self.problems.items())),
            "written_at_boottime": round(now, 3),
        }
        try:
            write_whole(self.status, json.dumps(document, sort_keys=True) + "\n")
        except OSError as error:
            log("status_not_written", detail=str(error))


def run_guard(config: Config) -> int:
    """Run until SIGTERM. The gate is left to the kernel then: it closes within kernel_after seconds."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = LOCK.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LeaseError(f"another guard runs on this node ({LOCK} is locked)") from None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def stop(_number: int, _frame: FrameType | None) -> None:
        os.write(writer, b"x")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    patroni = Patroni(
        config.patroni_url,
        region=config.patroni_region,
        peers=config.patroni_peers,
        addresses=config.peer_addresses,
        tls=config.tls,
        timeout_s=config.figures.renew_s / 2,
    )
    guard = Guard(config, config.store(), config.gate(), patroni, config.postgres)
    guard.start()
    notify("READY=1")
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while True:
        began = guard.clock()
        guard.cycle()
        gate = "open" if planner.renewal_is_young(guard.known, guard.clock()) else "closed"
        notify(f"WATCHDOG=1\nSTATUS=gate {gate}: {guard.last_reason}")
        # A file descriptor that never answers is the wait: no clock of this process takes part in it.
        if poll.poll(guard.next_wake(began) * 1000):
            log("guard_stopped")
            return 0


def put_gate(config: Config) -> int:
    """At boot, before the database: the table in place and closed, unless exactly it is there already."""
    adopted = config.gate().adopt()
    log("gate_in_place", adopted=adopted)
    return 0


def read_status(path: pathlib.Path = STATUS) -> dict[str, Any]:
    try:
        status = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LeaseError(
            f"the guard has left no status ({error}): systemctl status censuschat-guard.service"
        ) from error
    if not isinstance(status, dict):
        raise LeaseError(f"{path} does not hold a guard's status")
    return status


def show_status(config: Config) -> int:
    status = read_status()
    status["status_age_s"] = round(boottime() - float(status["written_at_boottime"]), 2)
    status["kernel_gate"] = "open" if config.gate().is_open() else "closed"
    say(json.dumps(status, indent=2, sort_keys=True))
    return 0


def check(config: Config) -> int:
    """For monitoring: one line; 0 when the guard lives and the kernel's gate is as the lease says, 1 otherwise."""
    status = read_status()
    age = boottime() - float(status["written_at_boottime"])
    gate = config.gate()
    kernel_open = gate.is_open()
    found = []
    if age > config.figures.close_after_s:
        found.append(f"the guard's status is {age:.0f} s old")
    if kernel_open and status["holder"] != config.region:
        found.append(f"the gate is open while {status['holder'] or 'nobody'} holds the lease")
    if not kernel_open and status["holder"] == config.region and status["standing"] == Standing.HOLDER.value:
        found.append("this region holds the lease and the gate is closed")
    found += [f"{part}: {text}" for part, text in status["problems"].items()]
    state = "open" if kernel_open else "closed"
    say(f"gate {state}, holder {status['holder']}, epoch {status['epoch']}" + "".join(f"; {text}" for text in found))
    return 1 if found else 0


USAGE = "usage: censuschat-guard run | gate | status | check"


def main(argv: list[str]) -> int:
    commands: dict[str, Callable[[Config], int]] = {
        "run": run_guard,
        "gate": put_gate,
        "status": show_status,
        "check": check,
    }
    if len(argv) != 1 or argv[0] not in commands:
        sys.stderr.write(USAGE + "\n")
        return 2
    try:
        return commands[argv[0]](Config.load())
    except _TROUBLE as error:
        sys.stderr.write(f"censuschat-guard: {error}\n")
        return 1
