"""``runbook resume``."""

from __future__ import annotations

import argparse

from runbooks.commands.common import add_run, latest


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def main(arguments: argparse.Namespace) -> int:
    from runbooks import engine
    from runbooks.commands.ending import end
    from runbooks.progress import choose

    with engine.signals() as stop:
        state, code, request = engine.resume(latest(arguments.run), choose(as_json=arguments.json), stop)
    return end(request, state, code, as_json=arguments.json)
