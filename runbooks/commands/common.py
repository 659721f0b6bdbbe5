"""What several commands share: arguments, their completion, finding a run, and tables for people."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbooks.errors import Problem

if TYPE_CHECKING:
    from runbooks.cli import Parser
    from runbooks.journal import Journal
    from runbooks.session import Order


def add_runbook(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    _completed(parser.add_argument("name", metavar="RUNBOOK", nargs=None if required else "?"), _runbooks)


def add_inventory(parser: argparse.ArgumentParser, text: str = "the environment") -> None:
    parser.add_argument("-i", "--inventory", metavar="INVENTORY", help=text)


def add_run(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    if required:
        action = parser.add_argument("run", metavar="RUN", help="its id or a part of it")
    else:
        action = parser.add_argument(
            "run", metavar="RUN", nargs="?", help="its id or a part of it (default: the latest)"
        )
    _completed(action, _runs)


def add_parameters(parser: Parser) -> None:
    """``--param NAME=VALUE``, and each parameter of the runbook that is named a flag of its own."""
    from runbooks import definition

    parser.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter, by its name")
    names = definition.files()
    inventory = ("-i", "--inventory")
    pairs = itertools.pairwise(parser.words)
    name = next((word for before, word in pairs if word in names and before not in inventory), None)
    if name is None:
        return
    for parameter in definition.load(name).parameters.values():
        choices = parameter.choices if isinstance(parameter.choices, list) else []
        shown = f" ({', '.join(map(str, choices))})" if choices else ""
        action = parser.add_argument(
            f"--{parameter.name.replace('_', '-')}",
            dest=f"parameter_{parameter.name}",
            metavar=parameter.type.upper(),
            help=(parameter.title + shown).replace("%", "%%"),
        )
        words = [str(c) for c in choices] or (["true", "false"] if parameter.type == "boolean" else [])
        if words:
            _completed(action, lambda words=words, **_: words)


def add_order(parser: argparse.ArgumentParser) -> None:
    """Break-glass, and where secret parameters are."""
    parser.add_argument("--emergency", action="store_true", help="wait for no approval and no window, for a while")
    parser.add_argument("--reason", default="", help="why it is an emergency; kept in the evidence")
    add_secrets(parser)


def add_secrets(parser: argparse.ArgumentParser) -> None:
    text = "the file with a secret parameter (or set RUNBOOK_PARAM_NAME, or type it)"
    parser.add_argument("--secret", action="append", default=[], metavar="NAME=FILE", help=text)


def given_order(arguments: argparse.Namespace) -> Order:
    """What the operator said beside the parameters. Raises Problem when it is contradictory."""
    from runbooks.session import Order

    emergency, reason = getattr(arguments, "emergency", False), getattr(arguments, "reason", "")
    if emergency != bool(reason.strip()):
        missing = "--reason" if emergency else "--emergency"
        raise Problem(
            f"An emergency needs both --emergency and --reason TEXT, and {missing} is missing",
            code="emergency-without-reason",
            next_command=f"runbook {arguments.command} --help",
        )
    files = {}
    for text in arguments.secret:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise Problem(
                "--secret wants NAME=FILE",
                code="secret-syntax",
                next_command=f"runbook {arguments.command} --help",
            )
        files[name] = Path(file)
    return Order(getattr(arguments, "plan", None), reason.strip(), files)


def given_parameters(arguments: argparse.Namespace) -> dict[str, str]:
    """Name -> text of the parameters on the command line. Raises Problem when one is not NAME=VALUE."""
    given = {}
    for text in arguments.param:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise Problem(
                f"--param wants NAME=VALUE, not {text!r}",
                code="param-syntax",
                next_command=f"runbook show {arguments.name}",
            )
        given[name] = value
    for key, value in vars(arguments).items():
        if key.startswith("parameter_") and value is not None:
            given[key.removeprefix("parameter_")] = value
    return given


def given_inventory(arguments: argparse.Namespace) -> Path:
    """The inventory of a command that needs one. Raises Problem when it is not given or not there."""
    name = vars(arguments).get("name", "")  # Who resumes has the inventory from the journal, and no name.
    inventory = named_inventory(arguments, f"runbook {name} shall work on", f"runbook run {name}")
    if not inventory.exists():
        raise Problem(
            f"There is no inventory at {inventory}",
            code="inventory-missing",
            next_command=f"ls -d {inventory.parent}/*",
        )
    return inventory


def named_inventory(arguments: argparse.Namespace, purpose: str, command: str) -> Path:
    """What -i says, there or not. Raises Problem when it is not given. purpose, command: for its sentence."""
    if not arguments.inventory:
        raise Problem(
            f"Which environment {purpose} is not said",
            code="environment-missing",
            next_command=f"{command} -i INVENTORY",
        )
    return Path(arguments.inventory)


def optional_inventory(arguments: argparse.Namespace) -> Path | None:
    return given_inventory(arguments) if arguments.inventory else None


def _completed(action: argparse.Action, completer: Any) -> None:
    """argcomplete looks for this attribute."""
    action.completer = completer  # type: ignore[attr-defined]


def _runbooks(**_: Any) -> list[str]:
    from runbooks import definition

    return sorted(definition.files())


def _runs(**_: Any) -> list[str]:
    from runbooks import journal as journals

    found = []
    for each in journals.open_known():
        with journals.opened(each) as journal:
            found += journal.runs()
    return sorted(found, reverse=True)


# -- runs


def latest(run: str | None) -> str | None:
    return None if run in (None, "latest") else run


def find(arguments: argparse.Namespace) -> tuple[Journal, str]:
    """The journal and the run that the arguments mean. Raises Problem when there is none, or more than one."""
    from runbooks import journal

    if not arguments.inventory:
        return journal.find(latest(arguments.run))
    return journal.find(latest(arguments.run), [of_inventory(arguments.inventory)])


def of_inventory(path: str) -> Journal:
    """The journal of an environment. Raises Problem when nothing has been run in it."""
    from runbooks.environment import Environment

    environment = Environment(Path(path))
    if not environment.has_journal():
        raise Problem(
            f"No runbook has been run in environment {environment.name} (no journal in {environment.state_directory})",
            code="environment-without-runs",
            next_command=f"runbook run RUNBOOK -i {path}",
        )
    return environment.open_journal()


# -- output


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, default=str))


def columns(rows: Iterable[tuple[str, ...]], stream: Any = None) -> None:
    """A table for people, on standard output unless another stream is given."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=stream or sys.stdout)
