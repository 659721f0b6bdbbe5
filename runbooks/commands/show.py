"""``runbook show``."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

from runbooks import errors
from runbooks.commands.common import add_runbook, columns, print_json

if TYPE_CHECKING:
    from runbooks.definition import Parameter


def arguments(parser: argparse.ArgumentParser) -> None:
    add_runbook(parser)


def main(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from runbooks import definition

    runbook = definition.load(arguments.name)
    if arguments.json:
        print_json(asdict(runbook))
        return errors.OK
    print(f"{runbook.name}: {runbook.title}\n")
    print(textwrap.fill(runbook.purpose, 100))
    print(f"\nOwner: {runbook.owner}    Severity: {runbook.severity}\n\nParameters:")
    columns(
        [
            (f"  {p.name}", p.type, "required" if p.required else _default(p), p.title)
            for p in runbook.parameters.values()
        ]
    )
    print("\nSteps:")
    columns(
        [
            (f"  {s.id}", f"{s.budget_s:g} s", s.title, "touches " + (", ".join(s.touches) or "nothing"))
            for s in runbook.steps
        ]
    )
    return errors.OK


def _default(parameter: Parameter) -> str:
    return "default: observed" if parameter.default_from else f"default: {parameter.default}"
