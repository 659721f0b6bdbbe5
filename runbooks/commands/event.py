"""``runbook event alert | show | carry-out``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from runbooks import errors
from runbooks.commands.common import add_inventory, named_inventory, print_json

if TYPE_CHECKING:
    from runbooks.alerts import Standing
    from runbooks.environment import Environment


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="WHAT", required=True, dest="verb")
    alert = verbs.add_parser(
        "alert", help='take in {"witness": SHA-256 of its token, "payload": what Alertmanager sent} from standard input'
    )
    add_inventory(alert)
    alert.add_argument("--wait", action="store_true", help="carry out what follows before this command ends")
    show = verbs.add_parser("show", help="what the witnesses say now, and what was decided")
    add_inventory(show)
    carry_out = verbs.add_parser("carry-out", help="propose or start what was decided (alert does this itself)")
    carry_out.add_argument("place", metavar="EVENT", help="event:RULE:REGION")
    carry_out.add_argument("incident", metavar="INCIDENT", type=int)
    add_inventory(carry_out)


def main(arguments: argparse.Namespace) -> int:
    from runbooks.environment import Environment

    command = f"runbook event {arguments.verb}"
    environment = Environment(named_inventory(arguments, f"{command} is about", command))
    return {"alert": _alert, "show": _show, "carry-out": _carry_out}[arguments.verb](arguments, environment)


def _alert(arguments: argparse.Namespace, environment: Environment) -> int:
    from runbooks import alerts, events
    from runbooks.journal import opened

    with opened(environment.open_journal()) as journal:
        environment.remember(journal)
        text = sys.stdin.buffer.read(events.PAYLOAD_BYTES + 1)
        try:
            if len(text) > events.PAYLOAD_BYTES:
                raise ValueError
            document = json.loads(text)
            digest, payload = str(document["witness"]), document["payload"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise alerts.refuse(journal, environment, "", "it is no JSON with witness and payload") from None
        about, own = alerts.receive(journal, environment, digest, payload)
        for found in own:
            if arguments.wait:
                alerts.carry_out(journal, environment, found.run, found.tally.incident)
            else:
                alerts.detach(journal, environment, found)
    _tell(arguments, about, {found.run for found in own})
    return errors.OK


def _show(arguments: argparse.Namespace, environment: Environment) -> int:
    from runbooks import alerts
    from runbooks.journal import opened

    known = alerts.policy(environment)
    found: list[Standing] = []
    if environment.has_journal():
        with opened(environment.open_journal()) as journal:
            found = alerts.every(journal, environment, known)
    _tell(arguments, found, set())
    return errors.OK


def _carry_out(arguments: argparse.Namespace, environment: Environment) -> int:
    from runbooks import alerts
    from runbooks.journal import opened

    with opened(environment.open_journal()) as journal:
        outcome = alerts.carry_out(journal, environment, arguments.place, arguments.incident)
    if arguments.json:
        print_json({"event": arguments.place, "incident": arguments.incident, "outcome": outcome})
    else:
        print(f"{arguments.place}: {outcome}")
    return errors.OK


def _tell(arguments: argparse.Namespace, found: list[Standing], own: set[str]) -> None:
    if arguments.json:
        rows: list[dict[str, Any]] = [{**f.document(), "carried_out": f.run in own} for f in found]
        print_json(rows)
        return
    for f in found:
        print(f"{f.run}: {f.decision.action}: {f.decision.reason}")
        for site, names in f.tally.lost.items():
            print(f"  lost     {site}: {', '.join(names)}")
        for name in f.tally.alive:
            print(f"  alive    {name}")
        for name, why in f.tally.discounted.items():
            print(f"  no vote  {name}: {why}")
        for d in f.decided:
            print(f"  decided  incident {d.incident}: {d.action}, {d.outcome or 'under way'} {d.run}".rstrip())
