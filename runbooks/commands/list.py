"""``runbook list``."""

from __future__ import annotations

import argparse

from runbooks import errors
from runbooks.commands.common import columns, print_json


def arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond what every command takes."""


def main(arguments: argparse.Namespace) -> int:
    from runbooks import definition

    titles = definition.titles()
    if arguments.json:
        print_json([{"name": name, "title": title} for name, title in titles.items()])
    else:
        columns([(name, title) for name, title in titles.items()])
    return errors.OK
