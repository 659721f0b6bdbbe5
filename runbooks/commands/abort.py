"""``runbook abort``."""

from __future__ import annotations

import argparse

from runbooks import errors
from runbooks.commands.common import add_run, latest, print_json
from runbooks.errors import Problem


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, required=True)
    parser.add_argument("--reason", required=True, help="why; kept in the journal")


def main(arguments: argparse.Namespace) -> int:
    from runbooks import journal as journals

    found, run = journals.find(latest(arguments.run))
    with journals.opened(found) as journal:
        state = journal.state(run)
        if state.state == "succeeded":
            raise Problem(
                f"Run {run} has succeeded: there is nothing to give up",
                code="run-succeeded",
                next_command=f"runbook report {run}",
            )
        journal.abort(run, arguments.reason)
    if arguments.json:
        print_json({"run": run, "state": "aborted", "reason": arguments.reason})
    else:
        print(f"Run {run} was given up; what its finished steps did stays done.")
    return errors.OK
