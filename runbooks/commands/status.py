"""``runbook status``."""

from __future__ import annotations

import argparse

from runbooks import errors
from runbooks.commands.common import add_inventory, add_run, find, print_json


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_inventory(parser, "only runs of this environment")


def main(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from runbooks import outlook
    from runbooks.journal import opened
    from runbooks.progress import MARKS, UNDONE, seconds

    found, run = find(arguments)
    with opened(found) as journal:
        state = journal.state(run)
        shown = outlook.shown_state(journal, state)
        problem = outlook.aftermath(journal, state, shown)
    if arguments.json:
        print_json({**asdict(state), "shown_state": shown, **(problem.document() if problem else {})})
        return errors.OK
    parameters = " ".join(f"{k}={v}" for k, v in state.parameters.items())
    print(f"{run}: {state.runbook} {parameters} on {state.environment} by {state.who}@{state.host}: {shown}")
    for step in state.steps.values():
        outcome = UNDONE.get(step.undone or "") or step.outcome or ("running" if step.attempts else "waiting")
        took = "" if step.elapsed_s is None else seconds(step.elapsed_s)
        print(f"  {MARKS[outcome]} {step.step:<14} {outcome:<12} {took:>10}  {step.says}")
        for failure in step.failures:
            print(f"      {failure['host']} {failure['task']}: {failure['message']}")
    if problem is not None:
        print(problem)
    return errors.OK
