"""`scripts/bench cli`: how long `runbook list` takes from its start to its end, against commands of the same kind.

Each is a command that an operator starts and that prints what there is without touching a host. All are run in
turn, so that a busy moment of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lab.paths import REPO

BIN = Path(sys.executable).parent
COMMANDS = {
    "runbook list": (str(REPO / "scripts" / "bin" / "runbook"), "list"),
    "runbook list --json": (str(REPO / "scripts" / "bin" / "runbook"), "list", "--json"),
    "python -c pass": (sys.executable, "-c", "pass"),
    "ansible-runner --version": (str(BIN / "ansible-runner"), "--version"),
    "ansible-playbook --version": (str(BIN / "ansible-playbook"), "--version"),
    "ansible-doc --list": (str(BIN / "ansible-doc"), "--list", "censuschat.infra"),
}
OURS, TARGET_S = "runbook list", 0.2


def seconds(command: tuple[str, ...]) -> float:
    """Seconds of one run. Raises SystemExit when it fails."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return took


def main() -> int:
    """Print the medians; the last line is `bench cli: list_s=… target_s=… ratio_to_ansible_playbook_version=…`.

    1 when `runbook list` misses its target.
    """
    parser = argparse.ArgumentParser(prog="scripts/bench cli", description="The start of the command line.")
    parser.add_argument("--runs", type=int, default=15, help="repetitions of each (default 15)")
    parser.add_argument("--json", type=Path, help="also write every repetition to this file")
    arguments = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # Files into the page cache, byte code onto the disk.
    rows: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.runs):
        for name, command in COMMANDS.items():
            rows[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in rows.items()}
    print(f"medians of {arguments.runs} runs each, seconds (least)")
    for name, value in medians.items():
        print(f"  {name:<32} {value:6.3f} ({min(rows[name]):.3f})  ours / this {medians[OURS] / value:5.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    ratio = medians[OURS] / medians["ansible-playbook --version"]
    print(f"bench cli: list_s={medians[OURS]:.3f} target_s={TARGET_S} ratio_to_ansible_playbook_version={ratio:.2f}")
    return 0 if medians[OURS] <= TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
