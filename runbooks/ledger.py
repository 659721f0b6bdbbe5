"""The clients' ledgers, and the figures that follow from them alone.

A client of the service keeps one ledger: a file of JSON lines, one record a line, written at the moment the thing
happened. Recovery time, lost writes and the time with two writers are computed from these records and from nothing
else, so that no component is asked how well it did.

All times named ``t`` are seconds of the machine's CLOCK_MONOTONIC (``time.monotonic()``): every client of a lab runs on
one machine, so their ``t`` can be compared, and a clock that is set or jumps changes nothing. ``wall`` is for people.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

Kind = Literal["start", "stop", "connect", "break", "ack", "fail", "readback"]
KINDS: frozenset[str] = frozenset(get_args(Kind))
OUTSIDE = "outside"


class LedgerError(Exception):
    """A ledger that cannot be trusted: says the file, the line and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a ledger.

    kind: ``start``/``stop`` of the client, ``connect``/``break`` of its connection, ``ack`` (the write ``n`` was
    acknowledged), ``fail`` (no acknowledgement: the write may or may not exist), ``readback`` (``found`` are all
    numbers of this client that exist; ``t`` is when the question was asked).
    region and timeline: of the writer that acknowledged. address: where the client was connected.
    """

    t: float
    wall: float
    client: str
    side: str
    kind: Kind
    n: int | None = None
    region: str | None = None
    timeline: int | None = None
    address: str | None = None
    found: tuple[int, ...] | None = None
    detail: Any = None

    @property
    def writer(self) -> Writer:
        """The writer that acknowledged; only an ``ack`` has one."""
        return Writer(self.region or "", self.timeline or 0)

    def to_line(self) -> str:
        """One JSON line without the fields that say nothing."""
        return json.dumps({k: v for k, v in _plain(self).items() if v is not None}, separators=(",", ":")) + "\n"

    @classmethod
    def from_object(cls, data: object) -> Self:
        """Check one decoded line.

        Raises ValueError with the reason when it is not a record.
        """
        if not isinstance(data, dict):
            raise ValueError("not an object")
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        for name, types in _TYPES.items():
            value = data.get(name)
            if value is None and name not in _REQUIRED:
                continue
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(f"field {name!r} is missing or of the wrong type")
        if data["kind"] not in KINDS:
            raise ValueError(f"unknown kind {data['kind']!r}")
        if data["kind"] == "ack" and not all(data.get(name) is not None for name in ("n", "region", "timeline")):
            raise ValueError("an acknowledgement needs n, region and timeline")
        if data["kind"] == "readback" and data.get("found") is None:
            raise ValueError("a readback needs found")
        found = data.get("found")
        if found is not None and not all(isinstance(n, int) for n in found):
            raise ValueError("field 'found' holds something that is not a number")
        return cls(**{**data, "found": None if found is None else tuple(found)})


_TYPES: dict[str, tuple[type, ...]] = {
    "t": (int, float),
    "wall": (int, float),
    "client": (str,),
    "side": (str,),
    "kind": (str,),
    "n": (int,),
    "region": (str,),
    "timeline": (int,),
    "address": (str,),
    "found": (list, tuple),
}
_REQUIRED = {"t", "wall", "client", "side", "kind"}


def _plain(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def boot_id() -> str:
    """The kernel's id of this boot: monotonic times of two boots cannot be compared."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class LedgerWriter:
    """Appends records of one client; each is one write to the kernel before the call returns, so a killed client loses
    no record. Several processes may append to one ledger (a client and its readback).

    Raises OSError when the file cannot be written: a client that cannot keep its ledger must stop.
    """

    def __init__(self, path: Path, client: str, side: str) -> None:
        self.path, self.client, self.side = path, client, side
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            _cut_torn_tail(self._fd)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def write(
        self,
        kind: Kind,
        *,
        n: int | None = None,
        region: str | None = None,
        timeline: int | None = None,
        address: str | None = None,
        found: Sequence[int] | None = None,
        detail: Any = None,
        t: float | None = None,
    ) -> Record:
        """Append one record, now (or at ``t``, seconds of CLOCK_MONOTONIC, when the thing happened earlier)."""
        now = time.monotonic()
        at = now if t is None else t
        record = Record(
            t=round(at, 6),
            wall=round(time.time() - (now - at), 6),
            client=self.client,
            side=self.side,
            kind=kind,
            n=n,
            region=region,
            timeline=timeline,
            address=address,
            found=None if found is None else tuple(found),
            detail=detail,
        )
        line = record.to_line().encode()
        if os.write(self._fd, line) != len(line):
            raise OSError(f"{self.path}: a record was written in part (disk full?)")
        return record

    def start(self, detail: dict[str, Any] | None = None) -> Record:
        """The first record of a client's life, with the boot its times belong to."""
        return self.write("start", detail={"boot": boot_id(), "pid": os.getpid(), **(detail or {})})

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_tail(fd: int) -> None:
    """Remove a last line without its end: it was never a record, and the next one must start on a line of its own."""
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        step = min(4096, end)
        at = os.pread(fd, step, end - step).rfind(b"\n")
        if at >= 0:
            end = end - step + at + 1
            break
        end -= step
    if end != size:
        os.ftruncate(fd, end)


def read(path: Path) -> list[Record]:
    """All records of one ledger in the order they were written.

    A torn last line (its writer was killed, or is writing) is left out; anything else that is not a record raises
    LedgerError with the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror or error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(Record.from_object(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                continue
            raise LedgerError(f"{path}:{number}: not a record: {error}") from error
    return records


def read_all(paths: Iterable[Path]) -> list[Record]:
    """The records of several ledgers, one after the other; see ``read``."""
    return [record for path in sorted(paths) for record in read(path)]


@dataclass(frozen=True, slots=True, order=True)
class Writer:
    """Who acknowledged: a region's database on one PostgreSQL timeline."""

    region: str
    timeline: int


@dataclass(frozen=True, slots=True)
class WriterSpan:
    """All acknowledgements of one writer, over all ledgers: times of the first and the last in seconds."""

    region: str
    timeline: int
    first_t: float
    last_t: float
    acks: int


@dataclass(frozen=True, slots=True)
class Switch:
    """One client's change of region: the last acknowledgement before it and the first by the new region."""

    client: str
    side: str
    from_region: str
    to_region: str
    last_before_t: float
    first_after_t: float
    last_before_wall: float
    first_after_wall: float

    @property
    def gap_s(self) -> float:
        return self.first_after_t - self.last_before_t


@dataclass(frozen=True, slots=True)
class LostWrite:
    """A write that was acknowledged and is absent from the readback."""

    client: str
    side: str
    n: int
    t: float
    wall: float
    region: str
    timeline: int


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """One client's part. rto_s, lost, rpo_s: None means not measured."""

    side: str
    acks: int
    fails: int
    duplicate_acks: int
    first_ack_t: float | None
    last_ack_t: float | None
    rto_s: float | None
    lost: int | None
    rpo_s: float | None
    unverified_acks: int
    longest_gap_s: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What the ledgers say. Seconds and milliseconds as the names end; None means not measured.

    rto_s: worst outside client, last acknowledgement before the change of region to the first by the new region; None
        when no outside client changed region or one that was writing never came back (``stuck_clients``).
    lost_acknowledged: writes of all clients acknowledged and absent from their readback; None when a client that has
        acknowledgements was not read back, or not after its last one (``unread_clients``).
    rpo_s: worst client, its last acknowledgement by the writer that lost writes minus the last one before its first
        lost write; 0 when none was lost.
    two_writers_ms: time in which the acknowledgements of two writers (region, timeline) overlap, over all ledgers;
        rounded up, and at least 1 wherever one writer's acknowledgement falls into the other's span.
    database_gap_s: from the last acknowledgement of the old region to the first of the new one, over all clients of all
        sides (an in-region session may see the old region longer than an outside client); the longest.
    """

    rto_s: float | None
    rpo_s: float | None
    lost_acknowledged: int | None
    two_writers_ms: int
    database_gap_s: float | None
    acks: int
    fails: int
    lost: tuple[LostWrite, ...]
    switches: tuple[Switch, ...]
    writers: tuple[WriterSpan, ...]
    clients: dict[str, ClientFigures]
    stuck_clients: tuple[str, ...] = ()
    unread_clients: tuple[str, ...] = ()
    lost_by_side: dict[str, int] = field(default_factory=dict)

    @property
    def switch_t(self) -> float | None:
        """When the first outside client was served by the new region (the first change in the window)."""
        outside = [s.first_after_t for s in self.switches if s.side == OUTSIDE]
        return min(outside, default=None)

    @property
    def outage_t(self) -> float | None:
        """The last acknowledgement that an outside client had before the first change of region."""
        outside = [s.last_before_t for s in self.switches if s.side == OUTSIDE]
        return min(outside, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every field, and each switch's gap."""
        data: dict[str, Any] = asdict(self)
        data["switch_t"], data["outage_t"] = self.switch_t, self.outage_t
        for plain, switch in zip(data["switches"], self.switches, strict=True):
            plain["gap_s"] = switch.gap_s
        return data


def measure(
    records: Iterable[Record], *, start: float | None = None, end: float | None = None, to_region: str | None = None
) -> Figures:
    """Compute the figures of one fail-over.

    records: each client's in the order written. start, end: the window in seconds of CLOCK_MONOTONIC, both included;
    when the ledgers hold several fail-overs, give one that begins before the outage and ends after service is back.
    Readbacks count whenever they were made after the write they are asked for. to_region: count only changes to it.

    Raises LedgerError when the records' clocks cannot be compared (two boots) or a client's clock ran backwards.
    """
    everything = list(records)
    _same_clock(everything)
    low = float("-inf") if start is None else start
    high = float("inf") if end is None else end
    names = sorted({r.client for r in everything})
    by_client = {name: [r for r in everything if r.client == name] for name in names}

    inside = {name: [r for r in rows if low <= r.t <= high] for name, rows in by_client.items()}
    acks = {name: _acks(rows) for name, rows in inside.items()}
    switches = sorted(
        (s for rows in acks.values() for s in _switches(rows) if to_region in (None, s.to_region)),
        key=lambda s: s.first_after_t,
    )
    outside_switch = min((s.first_after_t for s in switches if s.side == OUTSIDE), default=None)

    clients: dict[str, ClientFigures] = {}
    lost: list[LostWrite] = []
    stuck: list[str] = []
    unread: list[str] = []
    for name, rows in inside.items():
        if not rows:
            continue
        own = acks[name]
        readbacks = [r for r in by_client[name] if r.kind == "readback"]
        missing, unverified = _lost(own, readbacks)
        lost += missing
        if unverified:
            unread.append(name)
        own_switches = [s for s in switches if s.client == name]
        rto = max((s.gap_s for s in own_switches), default=None)
        side = rows[0].side
        if outside_switch is not None and side == OUTSIDE and rto is None and _was_waiting(own, rows, outside_switch):
            stuck.append(name)
        clients[name] = ClientFigures(
            side=side,
            acks=len(own),
            fails=sum(r.kind == "fail" for r in rows),
            duplicate_acks=sum(r.kind == "ack" for r in rows) - len(own),
            first_ack_t=own[0].t if own else None,
            last_ack_t=own[-1].t if own else None,
            rto_s=rto,
            lost=None if unverified else len(missing),
            rpo_s=None if unverified else _rpo(own, missing),
            unverified_acks=unverified,
            longest_gap_s=max((b.t - a.t for a, b in itertools.pairwise(own)), default=None),
        )

    all_acks = [r for rows in acks.values() for r in rows]
    spans = _spans(all_acks)
    outside_rtos = [c.rto_s for c in clients.values() if c.side == OUTSIDE and c.rto_s is not None]
    measured = bool(all_acks) and not unread
    rpos = [c.rpo_s for c in clients.values() if c.rpo_s is not None]
    return Figures(
        rto_s=max(outside_rtos, default=None) if not stuck else None,
        rpo_s=max(rpos, default=None) if measured else None,
        lost_acknowledged=len(lost) if measured else None,
        two_writers_ms=_two_writers_ms(spans),
        database_gap_s=_database_gap(all_acks, switches),
        acks=len(all_acks),
        fails=sum(c.fails for c in clients.values()),
        lost=tuple(sorted(lost, key=lambda w: (w.t, w.client))),
        switches=tuple(switches),
        writers=tuple(spans),
        clients=clients,
        stuck_clients=tuple(stuck),
        unread_clients=tuple(unread),
        lost_by_side={s: sum(w.side == s for w in lost) for s in sorted({c.side for c in clients.values()})},
    )


def _same_clock(records: Sequence[Record]) -> None:
    boots = {
        r.detail["boot"] for r in records if r.kind == "start" and isinstance(r.detail, dict) and "boot" in r.detail
    }
    if len(boots) > 1:
        raise LedgerError("the ledgers come from two boots of the machine: their monotonic times cannot be compared")
    last: dict[str, Record] = {}
    for record in records:
        if record.kind not in ("ack", "fail"):
            continue
        before = last.get(record.client)
        if before is not None and record.t < before.t:
            raise LedgerError(
                f"{record.client}: the clock ran backwards from n={before.n} (t={before.t}) "
                f"to n={record.n} (t={record.t})"
            )
        last[record.client] = record


def _acks(rows: Sequence[Record]) -> list[Record]:
    """Acknowledgements in time order, each number once (its first)."""
    seen: set[int] = set()
    result = []
    for record in sorted((r for r in rows if r.kind == "ack"), key=lambda r: r.t):
        if record.n is not None and record.n not in seen:
            seen.add(record.n)
            result.append(record)
    return result


def _switches(acks: Sequence[Record]) -> list[Switch]:
    return [
        Switch(
            b.client,
            b.side,
            a.region or "",
            b.region or "",
            a.t,
            b.t,
            a.wall,
            b.wall,
        )
        for a, b in itertools.pairwise(acks)
        if a.region != b.region
    ]


def _was_waiting(acks: Sequence[Record], rows: Sequence[Record], switch_t: float) -> bool:
    """Whether the client was served before the change and had not been stopped by then."""
    stopped = [r.t for r in rows if r.kind == "stop"]
    return any(r.t < switch_t for r in acks) and not any(t <= switch_t for t in stopped)


def _lost(acks: Sequence[Record], readbacks: Sequence[Record]) -> tuple[list[LostWrite], int]:
    """Writes absent from the newest readback asked after them, and how many no readback was asked for."""
    if not readbacks:
        return [], len(acks)
    newest = max(readbacks, key=lambda r: r.t)
    found = set(newest.found or ())
    lost = [
        LostWrite(r.client, r.side, r.n or 0, r.t, r.wall, r.region or "", r.timeline or 0)
        for r in acks
        if r.t <= newest.t and r.n not in found
    ]
    return lost, sum(r.t > newest.t for r in acks)


def _rpo(acks: Sequence[Record], lost: Sequence[LostWrite]) -> float:
    """Worst over the writers that lost something: their last acknowledgement to this client minus the last one before
    the first that was lost (the first lost itself when none was)."""
    worst = 0.0
    for writer in {(w.region, w.timeline) for w in lost}:
        own = [r for r in acks if (r.region, r.timeline) == writer]
        first = min(w.t for w in lost if (w.region, w.timeline) == writer)
        missing = {w.n for w in lost}
        kept = [r.t for r in acks if r.t <= first and r.n not in missing]
        worst = max(worst, own[-1].t - (kept[-1] if kept else first))
    return worst


def _spans(acks: Sequence[Record]) -> list[WriterSpan]:
    times: dict[Writer, list[float]] = {}
    for record in acks:
        times.setdefault(record.writer, []).append(record.t)
    spans = [WriterSpan(w.region, w.timeline, min(ts), max(ts), len(ts)) for w, ts in times.items()]
    return sorted(spans, key=lambda s: (s.first_t, s.region, s.timeline))


def _two_writers_ms(spans: Sequence[WriterSpan]) -> int:
    """Length of the union of all pairs' overlaps, in whole milliseconds, rounded up; a touch counts 1."""
    overlaps = sorted(
        (max(a.first_t, b.first_t), min(a.last_t, b.last_t))
        for i, a in enumerate(spans)
        for b in spans[i + 1 :]
        if max(a.first_t, b.first_t) <= min(a.last_t, b.last_t)
    )
    merged: list[tuple[float, float]] = []
    for low, high in overlaps:
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    # Whole microseconds first: records are written in those, and 0.001 s must not become 2 ms by a float's error.
    return sum(max(1, -(-round((high - low) * 1e6) // 1000)) for low, high in merged)


def _database_gap(acks: Sequence[Record], switches: Sequence[Switch]) -> float | None:
    """From the last acknowledgement of the region left to the first of the region entered, over all clients."""
    gaps = []
    for old, new in {(s.from_region, s.to_region) for s in switches if s.side == OUTSIDE}:
        pair = [s for s in switches if s.side == OUTSIDE and (s.from_region, s.to_region) == (old, new)]
        middle = min(s.first_after_t for s in pair)
        olds = [r.t for r in acks if r.region == old and r.t <= middle]
        news = [r.t for r in acks if r.region == new and r.t > max(s.last_before_t for s in pair)]
        if olds and news:
            gaps.append(min(news) - max(olds))
    return max(gaps, default=None)
