"""``runbook runs``."""

from __future__ import annotations

import argparse
import time
from typing import Any

from runbooks import errors
from runbooks.commands.common import add_inventory, columns, of_inventory, print_json


def arguments(parser: argparse.ArgumentParser) -> None:
    add_inventory(parser, "only runs of this environment")


def main(arguments: argparse.Namespace) -> int:
    from runbooks import journal as journals
    from runbooks import outlook

    found = [of_inventory(arguments.inventory)] if arguments.inventory else journals.open_known()
    rows: list[dict[str, Any]] = []
    for each in found:
        with journals.opened(each) as journal:
            for run in journal.runs():
                state = journal.state(run)
                rows.append(
                    {
                        "run": run,
                        "runbook": state.runbook,
                        "environment": state.environment,
                        "who": state.who,
                        "started": state.started,
                        "state": outlook.shown_state(journal, state),
                    }
                )
    rows.sort(key=lambda row: row["started"])
    if arguments.json:
        print_json(rows)
        return errors.OK
    for row in rows:
        row["when"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"]))
    columns([(row["run"], row["environment"], row["state"], row["who"], row["when"]) for row in rows])
    return errors.OK
