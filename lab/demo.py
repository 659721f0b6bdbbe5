"""The main job on the lab: two hardened regions, one lost, the service brought back in the other, the figures.

`scripts/demo` runs it. The last line it prints is `demo: rto_s=… lost_acknowledged=… two_writers_ms=… report=…`;
the exit code is 0 only when the targets of the environment were met.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.paths import REPO

BASELINE_S = 5.0
"""Seconds of undisturbed writing before the region is lost, so that the ledger has a "before"."""
AFTERMATH_S = 5.0
"""Seconds of writing after the heal: the time in which a returning region might wrongly acknowledge."""


class StepError(Exception):
    """A step of the main job ended with an exit code other than 0."""

    def __init__(self, title: str, code: int) -> None:
        super().__init__(f"{title} failed (exit code {code}); its output is above, clean up with scripts/clean")
        self.code = code


def run(title: str, command: Sequence[str], *, check: bool = True) -> int:
    """Run one command of the job with its output shown; raise StepError when `check` and it fails."""
    print(f"==> {title}", file=sys.stderr, flush=True)
    started = time.monotonic()
    code = subprocess.run(command, cwd=REPO, check=False).returncode
    print(f"    {title}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    if check and code:
        raise StepError(title, code)
    return code


def run_beside(title: str, command: Sequence[str], beside: str, other: Sequence[str]) -> None:
    """Run two commands of the job that do not depend on each other at once.

    The first one's output is shown, the other's is kept in a file and shown when it fails. Raises StepError.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        print(f"==> {beside} (beside the next step)", file=sys.stderr, flush=True)
        with subprocess.Popen(other, cwd=REPO, stdout=said, stderr=subprocess.STDOUT) as process:
            try:
                run(title, command)
            except BaseException:
                process.terminate()
                raise
            code = process.wait()
        print(f"    {beside}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        if code:
            said.seek(0)
            sys.stderr.write(said.read())
            raise StepError(beside, code)


def build(inventory: str, *, small: bool) -> None:
    """Bring up a fresh lab and the whole environment on it: playbooks/site.yml, with two of its parts at once."""
    lab = [sys.executable, "-m", "lab"]
    playbook = ["ansible-playbook", "-i", inventory]
    run("Remove what an earlier lab left", [*lab, "down"])
    run("Start the lab: two regions and a witness", [*lab, "up", *(["--small"] if small else [])])
    run("Harden the nodes", [*playbook, "playbooks/harden.yml"])
    run_beside(
        "Deploy the data services",
        [*playbook, "playbooks/data.yml"],
        "Build the regions' Kubernetes clusters",
        [*playbook, "playbooks/cluster.yml"],
    )
    run("Deploy the platform and the application", [*playbook, "playbooks/services.yml"])


@dataclass(frozen=True)
class Outcome:
    """What came of losing a region. Times are seconds of CLOCK_MONOTONIC, like the ledgers'."""

    code: int
    report: dict[str, Any]
    cut_t: float
    healed_t: float


def lose_and_fail_over(inventory: str, lost: str) -> Outcome:
    """Lose region `lost` under load, run the fail-over, heal the region, and measure with the clients' last word."""
    lab = [sys.executable, "-m", "lab"]
    run("Start the clients", [*lab, "probe", "start", "--all"])
    time.sleep(BASELINE_S)
    run(f"Lose {lost}", [*lab, "cut", lost])
    cut_t = time.monotonic()
    code = run(
        "runbook run fail-over",
        [sys.executable, "-m", "runbooks", "run", "fail-over", "-i", inventory, "--yes"],
        check=False,
    )
    if code not in (0, 1):
        raise StepError("runbook run fail-over", code)
    run(f"Heal {lost}", [*lab, "heal", lost])
    healed_t = time.monotonic()
    time.sleep(AFTERMATH_S)
    # In this order: what is acknowledged after the question, the answer cannot vouch for.
    run("Stop the clients", [*lab, "probe", "stop"])
    run("Ask the service which acknowledged writes it holds", [*lab, "probe", "readback"])
    code = run("Measure from the ledgers", [sys.executable, "-m", "runbooks", "report", "-i", inventory], check=False)
    return Outcome(code, report(inventory), cut_t, healed_t)


def report(inventory: str) -> dict[str, Any]:
    """The report of the environment's latest run."""
    done = subprocess.run(
        [sys.executable, "-m", "runbooks", "report", "-i", inventory, "--json"],
        cwd=REPO,
        check=False,
        capture_output=True,
        text=True,
    )
    if not done.stdout:
        raise StepError(f"runbook report: {done.stderr}", done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `scripts/demo`."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="The main job on the lab.")
    parser.add_argument(
        "--small", action="store_true", help="one application node and two database nodes a region, for a laptop"
    )
    arguments = parser.parse_args(argv)
    inventory = "inventories/lab-small" if arguments.small else "inventories/lab"
    try:
        build(inventory, small=arguments.small)
        outcome = lose_and_fail_over(inventory, "us-east-1")
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    figures = outcome.report["figures"]
    print("    come back with: scripts/run runbook run fail-back -i", inventory, file=sys.stderr)
    print(
        f"demo: rto_s={figures['rto_s']} lost_acknowledged={figures['lost_acknowledged']}"
        f" two_writers_ms={figures['two_writers_ms']} report={outcome.report['paths']['html']}"
    )
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
