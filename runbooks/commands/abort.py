"""``runbook abort``."""

from __future__ import annotations

import argparse

from runbooks import errors
from runbooks.commands.common import add_inventory, add_run, latest, optional_inventory, print_json


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, required=True)
    add_inventory(parser, "the run's environment, on a machine where it was not begun")
    parser.add_argument("--reason", required=True, help="why; kept in the journal")


def main(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from runbooks import engine
    from runbooks.environment import Environment
    from runbooks.journal import opened

    found, run, environment = engine.locate(latest(arguments.run), optional_inventory(arguments))
    with opened(found) as journal:
        state = journal.state(run)
        engine.abort(run, journal, environment or Environment(Path(state.inventory)), arguments.reason)
    if arguments.json:
        print_json({"run": run, "state": "aborted", "reason": arguments.reason})
    else:
        print(f"Run {run} was given up; what its finished steps did stays done.")
    return errors.OK
