"""``runbook resume``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from runbooks.commands.common import add_inventory, add_order, add_run, given_order, latest, optional_inventory

if TYPE_CHECKING:
    from runbooks import engine


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_inventory(parser, "the run's environment, on a machine where it was not begun")
    add_order(parser)


def main(arguments: argparse.Namespace) -> int:
    from runbooks import engine

    return again(arguments, engine.resume)


def again(arguments: argparse.Namespace, take_up: Callable[..., engine.Ended]) -> int:
    """Take a run up once more, forwards or back; the exit code."""
    from runbooks.commands.ending import end
    from runbooks.progress import choose
    from runbooks.session import Interrupted, signals

    order, inventory = given_order(arguments), optional_inventory(arguments)
    with signals() as stop:
        try:
            ended = take_up(latest(arguments.run), choose(as_json=arguments.json), stop, order, inventory)
        except Interrupted:
            raise KeyboardInterrupt from None
    return end(ended, as_json=arguments.json)
