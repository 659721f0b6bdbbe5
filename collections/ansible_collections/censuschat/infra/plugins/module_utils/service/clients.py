# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether the service's clients are served by a region, as the ledgers say that they keep themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

RECENT_S = 10.0
"""Seconds of CLOCK_MONOTONIC: a client whose newest record is older is not running."""
OUTSIDE = "outside"


class LedgerError(Exception):
    """A ledger that cannot be read; says which and where."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is needed of one line of a ledger. t: seconds of CLOCK_MONOTONIC. region: who acknowledged."""

    t: float
    client: str
    side: str
    kind: str
    region: str = ""


def read(directory: Path) -> list[Entry]:
    """All lines of all ledgers; a last line that is being written is left out. Raises LedgerError."""
    entries = []
    for path in sorted(directory.glob("*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}") from error
        for number, line in enumerate(lines[:-1], 1):
            try:
                data = json.loads(line)
                entry = Entry(data["t"], data["client"], data["side"], data["kind"], data.get("region") or "")
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerError(f"{path}, line {number}, is no record") from error
            entries.append(entry)
    return entries


def waiting(entries: Iterable[Entry], region: str, now: float) -> tuple[list[str], list[str]]:
    """The outside clients that run, by whether their newest acknowledgement is not, or is, by the region.

    A client that never had an acknowledgement is not waited for: it was not being served before either.
    """
    newest: dict[str, Entry] = {}
    acks: dict[str, Entry] = {}
    for entry in entries:
        if entry.side == OUTSIDE and entry.kind != "readback":
            newest[entry.client] = max(entry, newest.get(entry.client, entry), key=lambda e: e.t)
            if entry.kind == "ack":
                acks[entry.client] = max(entry, acks.get(entry.client, entry), key=lambda e: e.t)
    running = [c for c, e in newest.items() if e.kind != "stop" and now - e.t < RECENT_S and c in acks]
    back = [c for c in running if acks[c].region == region]
    return sorted(set(running) - set(back)), sorted(back)
