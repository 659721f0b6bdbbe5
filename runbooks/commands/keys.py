"""``runbook keys``: your own signing keys."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from runbooks import errors
from runbooks.commands.common import columns, print_json

if TYPE_CHECKING:
    from runbooks.cli import Parser


def arguments(parser: Parser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    new = actions.add_parser("new", help="make a key and show its public half, which belongs into the inventory")
    new.add_argument("name", metavar="NAME", help="your name as runbook_approvers has it")
    show = actions.add_parser("show", help="show the public half of a key")
    show.add_argument("name", metavar="NAME")
    actions.add_parser("list", help="the keys that are kept here")


def main(arguments: argparse.Namespace) -> int:
    from runbooks import keys

    if arguments.action == "list":
        told = [_told(name) for name in keys.names()]
        if arguments.json:
            print_json(told)
        else:
            columns((key["name"], key["public"]) for key in told)
        return errors.OK
    if arguments.action == "new":
        keys.create(arguments.name)
    key = _told(arguments.name)
    if arguments.json:
        print_json(key)
        return errors.OK
    if arguments.action == "new":
        print(f"The private key is in {key['file']}; it stays there. The inventory gets the public one:\n")
        print("runbook_approvers:")
    print(f"  {key['name']}: {key['public']}" if arguments.action == "new" else key["public"])
    return errors.OK


def _told(name: str) -> dict[str, str]:
    from runbooks import keys

    return {"name": name, "public": keys.public(keys.load(name)), "file": str(keys.path(name))}
