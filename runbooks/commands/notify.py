"""``runbook notify test | escalate | ack``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbooks import errors
from runbooks.commands.common import add_inventory, columns, latest, named_inventory, print_json
from runbooks.errors import Problem

if TYPE_CHECKING:
    from runbooks.environment import Environment

PATIENCE_S = 45.0
"""Longer than one message may take with its repetitions: nothing waits for these commands."""


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="WHAT", required=True, dest="verb")
    test = verbs.add_parser("test", help="send a message to every receiver of an environment")
    add_inventory(test)
    escalate = verbs.add_parser(
        "escalate", help="say again what nobody acknowledged; for a timer, on as many machines as you like"
    )
    add_inventory(escalate)
    ack = verbs.add_parser("ack", help="say that you look after a run: its escalation ends")
    ack.add_argument("run", metavar="RUN", help="its id or a part of it, or an alert's (event:...)")
    ack.add_argument("--as", dest="name", metavar="NAME", help="who looks after it (default: the user's name)")
    add_inventory(ack)


def main(arguments: argparse.Namespace) -> int:
    return {"test": _test, "escalate": _escalate, "ack": _ack}[arguments.verb](arguments)


def _environment(arguments: argparse.Namespace) -> Environment:
    from runbooks.environment import Environment

    command = f"runbook notify {arguments.verb}"
    return Environment(named_inventory(arguments, f"{command} is about", command))


def _test(arguments: argparse.Namespace) -> int:
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from runbooks import notify
    from runbooks.locks import Process
    from runbooks.receivers import Message

    environment = _environment(arguments)
    configured = notify.configuration(environment)
    again = f"runbook notify test -i {arguments.inventory}"
    if configured.problems:
        raise Problem("; ".join(configured.problems), code="notifications-invalid", next_command=again)
    if not configured.receivers:
        raise Problem(
            f"The inventory {environment.path} names no receiver (runbook_notifications)",
            code="notifications-missing",
            next_command=f"ansible-inventory -i {arguments.inventory} --list",
        )
    process = Process.current()
    run = f"test-{process.boot[:8]}-{process.pid}"
    what = f"A test by {process.who} on {process.host}; nothing happened"
    place = f"{environment.name}/{run}"

    def told(name: str) -> dict[str, str]:
        receiver = configured.receivers[name]
        message = Message(place, place, "trigger", "test", "low", environment.name, "notify", run, what, "none")
        answer = notify.deliver(receiver, message, threading.Event())
        if answer.outcome == "sent" and name == "pagerduty":
            resolve = Message(place, place, "resolve", "test", "low", environment.name, "notify", run, what, "none")
            answer = notify.deliver(receiver, resolve, threading.Event())
        return {"receiver": name, "outcome": answer.outcome, "detail": answer.detail}

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(told, configured.receivers))
    bad = [row for row in rows if row["outcome"] != "sent"]
    if bad:
        said = "; ".join(f"{row['receiver']}: {row['outcome']}, {row['detail']}" for row in bad)
        raise Problem(
            f"{len(bad)} of {len(rows)} receivers were not told ({said})",
            code="notification-not-sent",
            touched="The other receivers were told",
            next_command=again,
        )
    if arguments.json:
        print_json({"environment": environment.name, "receivers": rows})
    else:
        columns([(row["receiver"], row["outcome"], row["detail"]) for row in rows])
    return errors.OK


def _escalate(arguments: argparse.Namespace) -> int:
    from runbooks import escalation
    from runbooks.journal import opened

    environment = _environment(arguments)
    found: list[dict[str, Any]] = []
    if environment.has_journal():
        with opened(environment.open_journal()) as journal:
            for run, matter, number in escalation.escalate(journal, environment, PATIENCE_S):
                found.append({"run": run, "what": matter.what, "number": number, "next": matter.next_command})
    if arguments.json:
        print_json({"environment": environment.name, "due": found})
    else:
        columns([(row["run"], f"escalation {row['number']}", row["what"]) for row in found])
    return errors.OK


def _ack(arguments: argparse.Namespace) -> int:
    from runbooks.environment import Environment
    from runbooks.journal import find, opened
    from runbooks.locks import Process
    from runbooks.notify import Notifier

    environment = _environment(arguments) if arguments.inventory or arguments.run.startswith("event:") else None
    if environment is not None and arguments.run.startswith("event:"):
        journal, run = environment.open_journal(), arguments.run
    else:
        journal, run = find(latest(arguments.run), [environment.open_journal()] if environment else None)
    with opened(journal):
        if environment is None:
            environment = Environment(Path(journal.state(run).inventory))
        records = journal.records(run)
        if not records:
            raise Problem(f"The journal knows no {run}", code="run-unknown", next_command="runbook runs")
        name = arguments.name or Process.current().who
        journal.record("acknowledged", run, None, {"name": name, "key": f"acknowledged:{records[-1].seq}"})
        notifier = Notifier(journal, environment, run)
        notifier.event("acknowledged", None, f"{name} looks after it", f"acknowledged:{records[-1].seq}")
        notifier.close(PATIENCE_S)
    if arguments.json:
        print_json({"run": run, "name": name})
    else:
        print(f"{name} looks after {run}: nobody else is called for it")
    return errors.OK
