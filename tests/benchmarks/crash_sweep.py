"""`scripts/bench crash-sweep`: runs killed at every point, resumed, and counted by the servers' own logs.

Takes the lab that is up, with the environment on it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from lab import verbs
from tests.faults import drill, failover
from tests.faults.sweep import SweepError, Trial


def main() -> int:
    """Print a line a kill; the last is `bench crash-sweep: kills=… finished=… duplicated_effects=… two_writers_ms=…`.

    1 when a run was not finished, something was done twice, or two regions wrote at once.
    """
    parser = argparse.ArgumentParser(prog="scripts/bench crash-sweep", description=__doc__)
    parser.add_argument("--drill", type=int, default=200, metavar="N", help="kills of the drill (default 200)")
    parser.add_argument("--failovers", default="all", metavar="all|N|none", help="pairs of fail-over and fail-back")
    parser.add_argument("--seed", type=int, help="repeats the drill's moments and victims (default: the clock's)")
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
    trials: list[Trial] = []
    two_writers_ms = 0
    with tempfile.TemporaryDirectory(prefix="crash-sweep-") as directory:
        try:
            if arguments.drill:
                trials += drill.sweep_drills(
                    inventory, Path(directory), arguments.drill, told, seed=seed, lanes=arguments.lanes
                )
            if arguments.failovers != "none":
                pairs = None if arguments.failovers == "all" else int(arguments.failovers)
                more, two_writers_ms = failover.sweep_failovers(inventory, Path(directory), pairs, told)
                trials += more
        except SweepError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    bad = [trial for trial in trials if not trial.good]
    for trial in bad:
        print(f"BAD {trial.line()}")
    finished = sum(trial.finished for trial in trials)
    duplicated = sum(sum(trial.duplicated.values()) for trial in trials)
    print(
        f"bench crash-sweep: kills={len(trials)} finished={finished} duplicated_effects={duplicated} "
        f"two_writers_ms={two_writers_ms}"
    )
    return 1 if bad or two_writers_ms else 0


if __name__ == "__main__":
    sys.exit(main())
