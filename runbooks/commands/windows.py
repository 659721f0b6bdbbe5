"""``runbook windows``: when an environment may be worked on, and whether a runbook's steps fit."""

from __future__ import annotations

import argparse
import datetime as dt
from typing import TYPE_CHECKING, Any

from runbooks import errors
from runbooks.commands.common import add_inventory, columns, print_json
from runbooks.errors import Problem

if TYPE_CHECKING:
    from runbooks.definition import Definition
    from runbooks.windows import Calendar


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUNBOOK", nargs="?", help="whether the steps of this one fit")
    add_inventory(parser)
    parser.add_argument("--at", metavar="TIME", help="as if it were then: 2027-03-14T02:30, in the environment's zone")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="how many openings (default: 5)")


def main(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from runbooks import definition, windows
    from runbooks.environment import Environment

    if not arguments.inventory:
        raise Problem(
            "Which environment's windows are asked for is not said",
            code="windows-environment-missing",
            next_command="runbook windows -i INVENTORY",
        )
    if arguments.count < 1:
        raise Problem(
            f"--count is {arguments.count}, not at least 1", code="windows-count", next_command="runbook windows --help"
        )
    runbook = definition.load(arguments.name) if arguments.name else None
    environment = Environment(Path(arguments.inventory))
    calendar = windows.load(environment, runbook)
    now = _instant(arguments.at, calendar) if arguments.at else windows.now()
    document = {
        "environment": environment.name,
        "zone": calendar.zone.key,
        "now": now.isoformat(),
        "any_time": calendar.windows is None,
        "windows": [str(w) for w in calendar.windows or ()],
        "openings": [_interval(i, calendar) for i in calendar.openings(now, arguments.count)],
        "blackouts": [
            {**_interval((b.begin, b.end), calendar), "why": b.why} for b in calendar.blackouts if b.end > now
        ],
    }
    if runbook is not None:
        document["runbook"] = _fitting(runbook, calendar, now)
    if arguments.json:
        print_json(document)
    else:
        _show(document)
    return errors.OK


def _instant(text: str, calendar: Calendar) -> dt.datetime:
    try:
        instant = dt.datetime.fromisoformat(text)
    except ValueError:
        raise Problem(
            f"--at wants a time as 2027-03-14T02:30, not {text!r}",
            code="windows-time",
            next_command="runbook windows --help",
        ) from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=calendar.zone)).astimezone(dt.UTC)


def _interval(interval: tuple[dt.datetime, dt.datetime], calendar: Calendar) -> dict[str, Any]:
    begin, end = interval
    return {
        "from": begin.astimezone(calendar.zone).isoformat(),
        "to": end.astimezone(calendar.zone).isoformat(),
        "from_utc": begin.isoformat(),
        "to_utc": end.isoformat(),
        "seconds": round((end - begin).total_seconds()),
    }


def _fitting(runbook: Definition, calendar: Calendar, now: dt.datetime) -> dict[str, Any]:
    """Step by step, each begun when the budgets of those before it are over."""
    steps, begins = [], now
    for step in runbook.steps:
        verdict = calendar.fits(begins, step.budget_s)
        steps.append(
            {
                "id": step.id,
                "needs_s": step.budget_s,
                "fits": verdict.open,
                "why": verdict.why,
                "next_open": verdict.next_open.isoformat() if verdict.next_open else None,
            }
        )
        begins += dt.timedelta(seconds=step.budget_s)
    whole = calendar.fits(now, sum(step.budget_s for step in runbook.steps))
    return {
        "name": runbook.name,
        "fits": whole.open,
        "why": whole.why,
        "next_open": whole.next_open.isoformat() if whole.next_open else None,
        "steps": steps,
    }


def _show(document: dict[str, Any]) -> None:
    from runbooks.windows import span

    zone = document["zone"]
    print(f"{document['environment']}: {'; '.join(document['windows']) or 'any time'}")
    if document["windows"] or document["blackouts"]:
        rows = [("  next opening", zone, "to", "UTC", "to", "length")]
        rows += [
            (
                "",
                _short(o["from"], day=True),
                _short(o["to"], like=o["from"]),
                _short(o["from_utc"]),
                _short(o["to_utc"], like=o["from_utc"]),
                span(o["seconds"]),
            )
            for o in document["openings"]
        ]
        columns(rows)
    for blackout in document["blackouts"]:
        begin, end = (_short(blackout[name], day=True) for name in ("from", "to"))
        print(f"  blackout  {begin} to {end}: {blackout['why']}")
    runbook = document.get("runbook")
    if runbook is None:
        return
    print(f"\n{runbook['name']}: {'fits' if runbook['fits'] else 'does not fit'}, {runbook['why']}")
    columns(
        (f"  {s['id']}", f"{s['needs_s']:g} s", "fits" if s["fits"] else "does not fit", s["why"])
        for s in runbook["steps"]
    )


def _short(text: str, *, day: bool = False, like: str = "") -> str:
    """A time for people; only the time of day when the date is that of ``like``."""
    instant = dt.datetime.fromisoformat(text)
    if like and dt.datetime.fromisoformat(like).date() == instant.date():
        return f"{instant:%H:%M}"
    return f"{instant:%a %Y-%m-%d %H:%M}" if day else f"{instant:%Y-%m-%d %H:%M}"
