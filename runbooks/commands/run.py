"""``runbook run``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from runbooks.commands.common import (
    add_inventory,
    add_order,
    add_parameters,
    add_runbook,
    columns,
    given_inventory,
    given_order,
    given_parameters,
)
from runbooks.errors import Problem, Stopped

if TYPE_CHECKING:
    from runbooks.cli import Parser
    from runbooks.request import Request


def arguments(parser: Parser) -> None:
    add_runbook(parser)
    add_inventory(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask before the first step")
    parser.add_argument(
        "--plan", metavar="HASH", help="carry out this plan, and refuse when the world has changed since"
    )
    add_order(parser)
    add_parameters(parser)


def main(arguments: argparse.Namespace) -> int:
    from runbooks import definition, engine
    from runbooks.commands.ending import end
    from runbooks.progress import choose
    from runbooks.request import new_run, prepare
    from runbooks.session import Interrupted, Session, Warm, signals

    runbook = definition.load(arguments.name)
    given, order = given_parameters(arguments), given_order(arguments)
    inventory = given_inventory(arguments)
    run = new_run(runbook)
    warm = Warm(run, inventory)
    with signals() as stop:
        try:
            session = Session(run, warm, choose(as_json=arguments.json), stop, order)
            request = prepare(runbook, inventory, given, session)
            if not arguments.yes:
                _confirm(request)
            if stop():
                raise Interrupted
            ended = engine.start(request, session)
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            warm.close()
    return end(ended, as_json=arguments.json)


def _confirm(request: Request) -> None:
    if not sys.stdin.isatty():
        raise Problem(
            f"Runbook {request.definition.name} asks before it begins, and there is no terminal to ask at",
            code="confirmation-without-terminal",
            next_command=f"runbook run {request.definition.name} -i {request.environment.path} --yes",
        )
    from runbooks.progress import headline
    from runbooks.session import at_the_prompt

    print(headline(request), file=sys.stderr)
    rows = [(f"  {s.id}", s.title, ", ".join(s.touches) or "nothing") for s in request.definition.steps]
    columns([("  step", "what", "touches"), *rows], sys.stderr)
    print(f"Type {request.environment.name} to begin: ", end="", file=sys.stderr, flush=True)
    with at_the_prompt():
        typed = sys.stdin.readline().strip()
    if typed != request.environment.name:
        raise Stopped(
            f"The name {request.environment.name} was not typed, so run {request.run} was not begun",
            code="not-confirmed",
            next_command=f"runbook show {request.definition.name}",
        )
