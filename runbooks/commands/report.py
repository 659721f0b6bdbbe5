"""``runbook report``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from runbooks.commands.common import add_inventory, add_run, columns, find, print_json


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_inventory(parser, "only runs of this environment")


def main(arguments: argparse.Namespace) -> int:
    from runbooks import report
    from runbooks.journal import opened

    found, run = find(arguments)
    with opened(found) as journal:
        state = journal.state(run)
        runbook, _ = report.definition_of(state.runbook)
        environment, _ = report.environment_of(arguments.inventory or state.inventory)
        result = report.build(journal, run, runbook, environment)
    report.write(result)
    if arguments.json:
        print_json(result)
    else:
        print_figures(result, sys.stdout)
    return report.exit_code(result)


def print_figures(result: dict[str, Any], stream: Any) -> None:
    """The verdict, each figure against its target, and where the page is."""
    from runbooks import page

    print(result["verdict"]["text"], file=stream)
    rows = []
    for check in result["checks"]:
        target = "" if check["target"] is None else f"target {check['target']:g} {check['unit']}".strip()
        met = {True: "met", False: "MISSED", None: ""}[check["met"]]
        rows.append((f"  {check['title']}", page.figure(check), target, met))
    if result["figures"]["lease_wait_s"] is not None:
        rows.append(("  of which waited for the lease", f"{result['figures']['lease_wait_s']:.1f} s", "", ""))
    columns(rows, stream)
    print(f"Report: {result['paths']['html']}", file=stream)
