"""``runbook undo``."""

from __future__ import annotations

import argparse

from runbooks.commands.common import add_inventory, add_run, add_secrets
from runbooks.commands.resume import again


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_inventory(parser, "the run's environment, on a machine where it was not begun")
    add_secrets(parser)


def main(arguments: argparse.Namespace) -> int:
    from runbooks import engine

    return again(arguments, engine.undo)
