"""Who may work on what: locks per environment and per resource, held by leases, with fencing tokens.

All locks of an environment stand in one small **book**. Functions over the book decide (``take``, ``renew``, ``park``,
``release``); a store (``lock_stores``) changes the book atomically; a ``Lease`` renews in the background.

- "environment" is in the way of every other name; any other name only of itself and of "environment".
- Each taking gets a fence, which only grows: whoever comes later has the higher one, and a record with an older fence
  is refused by the journal.
- A lease ends on the store's clock. Its holder counts on its own, from before it asked, and stops itself after two
  thirds: at the end of the lease nobody is at work any more.
- Leases that have ended, and processes that are gone, do not free a lock: their work is half done. It is taken by the
  run's own resumption, its undoing or its abort.
"""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from runbooks.errors import Problem, Refused

ENVIRONMENT = "environment"
LEASE_S = 60.0
"""How long a lease lasts unless the inventory says otherwise (runbook_lease_s)."""
RENEWALS = 6
"""Renewals in the time of a lease."""
GIVE_UP = 2 / 3
"""The part of a lease after which whoever could not renew it stops itself; the rest is for ending the playbook."""

T = TypeVar("T")


class Lost(Exception):
    """The lock is somebody else's now."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from every other one anywhere: pid_start are clock ticks since boot, machine is the boot's id and
    the pid namespace (containers of one machine share the boot and may share the host's name)."""

    who: str
    host: str
    machine: str
    pid: int
    pid_start: str

    @classmethod
    def current(cls) -> Self:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - the link's target is no file
        return cls(getpass.getuser(), socket.gethostname(), machine, os.getpid(), pid_start(os.getpid()) or "")

    @property
    def boot(self) -> str:
        """The kernel's id of its boot."""
        return self.machine.partition("/")[0]

    def gone(self) -> bool:
        """Whether it certainly does not exist any more; False also where that cannot be seen from here."""
        here = self.current()
        return (self.host, self.machine) == (here.host, here.machine) and pid_start(self.pid) != self.pid_start


def pid_start(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process; None when there is none, or only its remains (a zombie)."""
    try:
        # The name in brackets may hold anything, also spaces and brackets; after the last one come state, ppid, ...
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. what: its runbook. since, ends: unix seconds of the store's clock; ends is None for a run that
    waits for a person: nobody renews it and it does not end. share: what other processes of the run hold it for as
    well, which are its fellows; empty: it holds it alone."""

    run: str
    what: str
    process: Process
    since: float
    ends: float | None
    fence: int
    share: str = ""
    fellows: tuple[Process, ...] = ()

    @property
    def processes(self) -> tuple[Process, ...]:
        return (self.process, *self.fellows)

    def gone(self) -> bool:
        """Whether none of its processes exists any more, as far as that can be seen from here."""
        return all(process.gone() for process in self.processes)

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.since))
        process = self.process
        return f"run {self.run} ({self.what}) of {process.who} (process {process.pid} on {process.host}) since {since}"


@dataclass(frozen=True, slots=True)
class Book:
    """The locks of one environment: the last fence given, and who holds what."""

    fence: int = 0
    held: Mapping[str, Holder] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any] | None) -> Self:
        if document is None:
            return cls()
        return cls(document["fence"], {name: _holder(held) for name, held in document["held"].items()})

    def of_run(self, run: str) -> Holder | None:
        return next((holder for holder in self.held.values() if holder.run == run), None)


def _holder(document: Mapping[str, Any]) -> Holder:
    fellows = tuple(Process(**process) for process in document.get("fellows", ()))
    return Holder(**{**document, "process": Process(**document["process"]), "fellows": fellows})


Standing = Literal["active", "parked", "lapsed"]


def standing(holder: Holder, now: float, gone: bool) -> Standing:
    """active: at work. parked: waits for a person. lapsed: its process is gone, or its lease has ended."""
    if holder.ends is None:
        return "parked"
    return "lapsed" if gone or now >= holder.ends else "active"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run wants. over: fences of holders whose run is over by the journal, so that what they left is nobody's.
    resuming: the run exists, and may take what its own dead or waiting process left. share: what it holds together with
    other processes of the run that say the same; empty: it wants them alone."""

    environment: str
    names: tuple[str, ...]
    run: str
    what: str
    process: Process
    lease_s: float
    resuming: bool = False
    share: str = ""
    over: frozenset[int] = frozenset()


def take(book: Book, wish: Wish, now: float, gone: Collection[int]) -> tuple[Book, int]:
    """The book with the run's locks, and its fence. gone: fences of holders whose process does not exist any more.

    Raises Refused with who, what and since when.
    """
    held = dict(book.held)
    for name, holder in book.held.items():
        state = standing(holder, now, holder.fence in gone)
        own = holder.run == wish.run
        # What this very process wrote is a taking of its own whose answer was lost on the way.
        free = state != "active" and ((own and wish.resuming) or holder.fence in wish.over)
        if free or (own and holder.process == wish.process):
            del held[name]
        elif own or any(in_the_way(name, wanted) for wanted in wish.names):
            raise _refused(wish, name, holder, state)
    fence = book.fence + 1
    mine = Holder(wish.run, wish.what, wish.process, now, now + wish.lease_s, fence, wish.share)
    return Book(fence, {**held, **dict.fromkeys(wish.names, mine)}), fence


def join(book: Book, wish: Wish, now: float, gone: Collection[int]) -> tuple[Book, int] | None:
    """The book with one process more on what its run holds to share, and that fence; None when it holds nothing so."""
    holder = book.of_run(wish.run)
    if holder is None or not wish.share or holder.share != wish.share:
        return None
    if standing(holder, now, holder.fence in gone) != "active":
        return None
    fellows = holder.fellows if wish.process in holder.processes else (*holder.fellows, wish.process)
    ends = now + wish.lease_s
    return _changed(book, holder.fence, lambda h: replace(h, ends=ends, fellows=fellows)), holder.fence


def leave(book: Book, fence: int, process: Process, gone: Collection[Process]) -> tuple[Book, bool]:
    """The book without a process that shared what the fence holds, and whether it was the last: the locks are parked
    then. Processes that are gone stay no longer either; of one elsewhere nobody knows, and the lease tells."""
    holder = next((holder for holder in book.held.values() if holder.fence == fence), None)
    if holder is None:
        return book, False
    left = [each for each in holder.processes if each != process and each not in gone]
    if not left:
        return park(book, fence), True
    return _changed(book, fence, lambda h: replace(h, process=left[0], fellows=tuple(left[1:]))), False


def in_the_way(held: str, wanted: str) -> bool:
    return held == wanted or ENVIRONMENT in (held, wanted)


def _refused(wish: Wish, name: str, holder: Holder, state: Standing) -> Refused:
    where = f"Environment {wish.environment}" if name == ENVIRONMENT else f"{name} of environment {wish.environment}"
    if state == "active":
        return Refused(
            f"{where} is being worked on by {holder.describe()}",
            code="lock-held",
            next_command=f"runbook status {holder.run}",
        )
    if state == "parked":
        return Refused(
            f"{where} is kept by {holder.describe()}, which waits for an approval",
            code="lock-of-waiting-run",
            next_command=f"runbook status {holder.run}",
        )
    return Refused(
        f"{where} is still locked by {holder.describe()}, whose process is gone with its work unfinished",
        code="lock-of-dead-run",
        next_command=f"runbook resume {holder.run}",
    )


def renew(book: Book, fence: int, now: float, lease_s: float) -> Book:
    """Raises Lost when the fence holds nothing any more. What has been parked stays so."""
    return _changed(book, fence, lambda h: h if h.ends is None else replace(h, ends=now + lease_s))


def park(book: Book, fence: int) -> Book:
    """Keep the locks without a lease, for a run that waits for a person. Raises Lost."""
    return _changed(book, fence, lambda holder: replace(holder, ends=None))


def _changed(book: Book, fence: int, change: Callable[[Holder], Holder]) -> Book:
    if not any(holder.fence == fence for holder in book.held.values()):
        raise Lost(fence)
    return Book(book.fence, {n: change(h) if h.fence == fence else h for n, h in book.held.items()})


def release(book: Book, fence: int) -> Book:
    """Without what the fence holds; nothing happens when that is nothing."""
    return Book(book.fence, {n: h for n, h in book.held.items() if h.fence != fence})


# -- the store, and the lease on it


class Store(Protocol):
    """Where an environment's book is kept. Both raise Problem when the store does not answer in its time."""

    where: str

    def another(self) -> Store:
        """The same store over a connection of its own, which a lease closes."""

    def close(self) -> None: ...

    def read(self) -> tuple[Book, float]:
        """The book, and the store's clock (unix seconds)."""

    def change(self, plan: Callable[[Book, float], tuple[Book, T]]) -> T:
        """Replace the book by what ``plan`` makes of it and of the store's clock, atomically; plan may be asked more
        than once, and may refuse by an exception."""


def acquire(store: Store, wish: Wish, known: Callable[[str], bool]) -> int:
    """Take the locks, or join those that the run holds to share; the fence. known: whether a run is one that the
    journal has and that is not over.

    Raises Refused.
    """
    book, _ = store.read()
    over = frozenset(h.fence for h in book.held.values() if not known(h.run))

    def plan(found: Book, now: float) -> tuple[Book, int]:
        gone = _gone(found)
        return join(found, wish, now, gone) or take(found, replace(wish, over=over), now, gone)

    return store.change(plan)


def _gone(book: Book) -> set[int]:
    return {holder.fence for holder in book.held.values() if holder.gone()}


def part(store: Store, fence: int) -> bool:
    """Let this process leave what it shares; whether it was the last."""

    def plan(book: Book, _: float) -> tuple[Book, bool]:
        gone = {each for holder in book.held.values() for each in holder.processes if each.gone()}
        return leave(book, fence, Process.current(), gone)

    return store.change(plan)


def check(store: Store, wish: Wish, known: Callable[[str], bool]) -> None:
    """Raises Refused when the locks could not be taken now."""
    book, now = store.read()
    over = frozenset(h.fence for h in book.held.values() if not known(h.run))
    take(book, replace(wish, over=over), now, _gone(book))


def run_standing(store: Store, run: str) -> Standing | None:
    """How the holder of a run's locks stands; None when it holds none."""
    book, now = store.read()
    holder = book.of_run(run)
    return None if holder is None else standing(holder, now, holder.gone())


def clock() -> float:
    """Seconds that also go on while the machine sleeps, as a store's clock does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """Renews what a fence holds, in the background; says when the run must stop because it cannot.

    Not by the thread alone, which may hang with the store: whoever asks compares the time by itself.
    """

    def __init__(self, store: Store, fence: int, lease_s: float, taken: float) -> None:
        """taken: ``clock`` from before the lock was asked for."""
        self.fence = fence
        self._store, self._lease_s, self._renewed = store, lease_s, taken
        self._taken_over = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def _renew(self) -> None:
        while not self._stop.wait(self._lease_s / RENEWALS):
            asked = clock()
            try:
                self._store.change(lambda book, now: (renew(book, self.fence, now, self._lease_s), None))
            except Lost:
                self._taken_over.set()
                return
            except Problem:
                continue  # The store does not answer; lost() says when that has lasted too long.
            self._renewed = asked

    def lost(self) -> str:
        """Why the run must stop; empty while it may go on."""
        if self._taken_over.is_set():
            return "another process has taken its lock"
        silent = clock() - self._renewed
        if silent > GIVE_UP * self._lease_s:
            return f"its lease could not be renewed in {self._store.where} for {silent:.0f} s"
        return ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Without waiting for a renewal that hangs."""
        self._stop.set()
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._store.close()
