"""`scripts/bench crash-sweep`: runs killed at every point, resumed, and counted by the servers' own logs.

Takes the lab that is up, with the environment on it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from lab import verbs
from tests.faults import drill, failover
from tests.faults.sweep import Results, SweepError


def main() -> int:
    """Print a line a kill; the last is `bench crash-sweep: kills=… finished=… duplicated_effects=… two_writers_ms=…`.

    1 when a run was not finished, something was done twice, or two regions wrote at once.
    """
    parser = argparse.ArgumentParser(prog="scripts/bench crash-sweep", description=__doc__)
    parser.add_argument("--drill", type=int, default=200, metavar="N", help="kills of the drill (default 200)")
    parser.add_argument("--failovers", default="all", metavar="all|N|none", help="pairs of fail-over and fail-back")
    parser.add_argument("--seed", type=int, help="repeats the drill's moments and victims (default: the clock's)")
    parser.add_argument("--results", type=Path, help="file of the trials' results; those of this seed are not repeated")
    parser.add_argument("--lanes", type=int, default=3, help="drills side by side (default 3)")
    arguments = parser.parse_args()
    inventory = verbs.recorded()
    if inventory is None:
        print(
            "error: the lab is not up. next: scripts/run lab up && scripts/run ansible-playbook -i inventories/lab "
            "playbooks/site.yml",
            file=sys.stderr,
        )
        return 2
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    began = time.monotonic()

    def told(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} {line}", flush=True)

    told(f"seed {seed}: repeat the drill's moments with --seed {seed}")
    with tempfile.TemporaryDirectory(prefix="crash-sweep-") as directory:
        try:
            results = Results(seed, told, arguments.results)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: results.stop.set())
            if arguments.drill:
                drill.sweep_drills(inventory, Path(directory), arguments.drill, results, lanes=arguments.lanes)
            if arguments.failovers != "none" and not results.stop.is_set():
                pairs = None if arguments.failovers == "all" else int(arguments.failovers)
                failover.sweep_failovers(inventory, Path(directory), pairs, results)
        except SweepError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for trial in results.bad():
        print(f"BAD {trial.line()}")
    if results.stop.is_set():
        told("ended early; the same command goes on with the rest when --results names a file")
    print(f"bench crash-sweep: {results.line()}")
    return 1 if results.bad() or results.two_writers_ms else 0


if __name__ == "__main__":
    sys.exit(main())
