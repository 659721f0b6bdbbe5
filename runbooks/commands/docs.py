"""``runbook docs``."""

from __future__ import annotations

import argparse

from runbooks import errors
from runbooks.commands.common import add_runbook, print_json


def arguments(parser: argparse.ArgumentParser) -> None:
    add_runbook(parser, required=False)
    parser.add_argument("--write", action="store_true", help="write the pages into the project instead of showing them")


def main(arguments: argparse.Namespace) -> int:
    from runbooks import definition, generate

    names = [arguments.name] if arguments.name else sorted(definition.files())
    runbooks = [definition.load(name) for name in names]
    if arguments.write:
        written = generate.write({generate.page_path(each): generate.page(each) for each in runbooks})
        if arguments.json:
            print_json({"written": sorted(map(str, written))})
        else:
            for path in written:
                print(f"written: {path}")
    elif arguments.json:
        print_json({each.name: generate.page(each) for each in runbooks})
    else:
        print("\n".join(generate.page(each) for each in runbooks), end="")
    return errors.OK
