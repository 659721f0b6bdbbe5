"""Waits until the service's clients are served by a region, as their ledgers say; for the step that verifies."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from runbooks import ledger

RECENT_S = 10.0
"""Seconds of CLOCK_MONOTONIC: a client whose newest record is older is not running."""


def waiting(records: Iterable[ledger.Record], region: str, now: float) -> tuple[list[str], list[str]]:
    """The outside clients that run, by whether their newest acknowledgement is not, or is, by the region.

    A client that never had an acknowledgement is not waited for: it was not being served before either.
    """
    newest: dict[str, ledger.Record] = {}
    acks: dict[str, ledger.Record] = {}
    for record in records:
        if record.side == ledger.OUTSIDE and record.kind != "readback":
            newest[record.client] = max(record, newest.get(record.client, record), key=lambda r: r.t)
            if record.kind == "ack":
                acks[record.client] = max(record, acks.get(record.client, record), key=lambda r: r.t)
    running = [c for c, r in newest.items() if r.kind != "stop" and now - r.t < RECENT_S and c in acks]
    back = [c for c in running if acks[c].region == region]
    return sorted(set(running) - set(back)), sorted(back)


def main() -> int:
    """0 and one line when all are served; 1 and one line when some are not after the timeout."""
    parser = argparse.ArgumentParser(prog="python -m runbooks.served", description=__doc__)
    parser.add_argument("--ledgers", type=Path, required=True, help="directory of the clients' ledgers")
    parser.add_argument("--region", required=True)
    parser.add_argument("--timeout", type=float, default=60, help="seconds")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.timeout
    while True:
        try:
            records = ledger.read_all(arguments.ledgers.glob("*.jsonl"))
        except ledger.LedgerError as error:
            print(f"the ledgers cannot be read: {error}", file=sys.stderr)
            return 1
        missing, back = waiting(records, arguments.region, time.monotonic())
        if not missing:
            print(f"{len(back)} clients are served by {arguments.region}" if back else "No client is running")
            return 0
        if time.monotonic() > deadline:
            print(
                f"not served by {arguments.region} after {arguments.timeout:g} s: {', '.join(missing)}", file=sys.stderr
            )
            return 1
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
