"""``runbook generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from runbooks import errors
from runbooks.commands.common import print_json
from runbooks.errors import Problem


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a file is not up to date")
    parser.add_argument("--into", metavar="DIRECTORY", help="write everything below it (default: the project)")


def main(arguments: argparse.Namespace) -> int:
    from runbooks import definition, generate
    from runbooks.environment import ROOT

    base = Path(arguments.into) if arguments.into else None
    if base is None and not (ROOT / "playbooks").is_dir():
        raise Problem(
            f"The runbooks are installed in {ROOT}, which is no project to write into",
            code="generate-nowhere",
            next_command="runbook generate --into DIRECTORY",
        )
    expected = generate.outputs(definition.files(), base)
    return bring_up_to_date(arguments, expected, "runbook generate")


def bring_up_to_date(arguments: argparse.Namespace, expected: Mapping[Path, str], command: str) -> int:
    """Write the generated files, or with ``--check`` tell which are not up to date; the exit code."""
    from runbooks import generate

    drifted = generate.drift(expected) if arguments.check else generate.write(expected)
    if arguments.json:
        print_json({"files": sorted(map(str, expected)), "drifted": sorted(map(str, drifted))})
    else:
        for path in drifted:
            print(f"{'not up to date' if arguments.check else 'written'}: {path}")
        if not drifted:
            print(f"All {len(expected)} files are up to date.")
    if arguments.check and drifted:
        print(f"next: {command}", file=sys.stderr)
        return errors.FAILED
    return errors.OK
