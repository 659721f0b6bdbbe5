"""``runbook evidence``: whether the journal is what its writers wrote, and proof of it for another machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runbooks import errors
from runbooks.commands.common import add_inventory, add_run, print_json
from runbooks.errors import Problem

if TYPE_CHECKING:
    from runbooks.evidence import Verdict
    from runbooks.journal import Place


def arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    verify = commands.add_parser(
        "verify", help="check chain, signatures and anchors; exit code 1 when they do not hold"
    )
    add_run(verify)
    where = verify.add_mutually_exclusive_group()
    where.add_argument("-i", "--inventory", metavar="INVENTORY", help="the environment; reads Ansible's inventory")
    where.add_argument("--journal", metavar="PATH_OR_URL", help="a journal's file, or postgresql://...")
    where.add_argument("--export", metavar="FILE", help="a file that `runbook evidence export` wrote")
    _sources(verify)
    export = commands.add_parser("export", help="write a run's evidence into a file that proves itself")
    export.add_argument("run", metavar="RUN", help="its id or a part of it")
    export.add_argument("file", metavar="FILE")
    add_inventory(export, "only runs of this environment")
    _sources(export)


def _sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", metavar="FILE", help="trusted keys, NAME: ed25519:... (default: the environment's)")
    parser.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="FILE|s3://...",
        help="read this one, and not the environment's",
    )


def main(arguments: argparse.Namespace) -> int:
    return _export(arguments) if arguments.what == "export" else _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    verdicts = _verdicts(arguments)
    broken = [verdict for verdict in verdicts if not verdict.ok]
    if arguments.json:
        print_json({"ok": not broken, "chains": [verdict.document() for verdict in verdicts]})
        return errors.FAILED if broken else errors.OK
    for verdict in verdicts:
        if verdict.ok:
            print(f"{verdict.sentence()}. Signed by: {', '.join(verdict.keys) or 'nobody'}.")
    if broken:
        from runbooks.evidence import Broken

        words = " ".join(sys.argv[1:])
        raise Broken(
            "; ".join(verdict.sentence() for verdict in broken),
            code="evidence-broken",
            next_command=f"runbook {words} --json",
        )
    return errors.OK


def _verdicts(arguments: argparse.Namespace) -> list[Verdict]:
    from runbooks import anchors, evidence, journal

    given = [anchors.named(word) for word in arguments.anchor]
    if arguments.export:
        chain, sealed_by = evidence.read_export(Path(arguments.export))
        known = journal.known_journals().get(chain.environment)
        if arguments.run and arguments.run not in str(chain.run):
            raise Problem(
                f"{arguments.export} is evidence of run {chain.run}, not of {arguments.run}",
                code="evidence-missing",
                next_command=f"runbook evidence verify --export {arguments.export}",
            )
        links = [link.seq for link in chain.links]
        seen = evidence.look(given, chain.environment, min(links, default=1), max(links, default=1))
        trusted = _trusted(arguments, known.keys if known else {})
        return [evidence.judge(chain, trusted, seen, sealed_by=sealed_by)]
    if arguments.journal:
        verdicts = [
            evidence.verify(arguments.journal, name, _trusted(arguments, {}), given, run=arguments.run)
            for name in evidence.environments(arguments.journal)
        ]
    else:
        verdicts = [
            evidence.verify(
                place.location,
                place.environment,
                _trusted(arguments, place.keys),
                given or [anchors.parse(each) for each in place.anchors],
                run=arguments.run,
            )
            for place in _places(arguments)
        ]
    if arguments.run:
        # A chain that is broken is told as that: the run may be what was taken out of it.
        verdicts = [verdict for verdict in verdicts if verdict.run or not verdict.ok]
    if not verdicts:
        name = f"There is no run {arguments.run}" if arguments.run else "There is no chain"
        raise Problem(f"{name} in any journal that was looked into", code="run-unknown", next_command="runbook runs")
    return verdicts


def _places(arguments: argparse.Namespace) -> list[Place]:
    """The journals that are meant: the inventory's, or all that are known on this machine."""
    from runbooks import journal

    if not arguments.inventory:
        return list(journal.known_journals().values())
    from runbooks.environment import Environment

    environment = Environment(Path(arguments.inventory))
    return [
        journal.Place(
            environment.name,
            str(environment.journal_location),
            environment.state_directory,
            environment.anchors,
            environment.journal_keys,
        )
    ]


def _trusted(arguments: argparse.Namespace, environments: Mapping[str, str]) -> dict[str, str]:
    """Public key -> name: those of --keys, else the environment's, else the one that this machine writes with."""
    from runbooks import evidence

    named = evidence.keys_in(Path(arguments.keys)) if arguments.keys else environments or evidence.own_keys()
    return evidence.by_public(named)


def _export(arguments: argparse.Namespace) -> int:
    from runbooks import anchors, evidence

    for place in _places(arguments):
        read = [anchors.named(word) for word in arguments.anchor] or [anchors.parse(each) for each in place.anchors]
        seen = evidence.look(read, place.environment)
        chain = evidence.read(place.location, place.environment)
        run = chain.find(arguments.run)
        if run is not None:
            break
    else:
        raise Problem(
            f"There is no run {arguments.run} in any journal that was looked into",
            code="run-unknown",
            next_command="runbook runs",
        )
    trusted = _trusted(arguments, place.keys)
    verdict = evidence.judge(chain, trusted, seen, run=run)
    if not verdict.ok:
        raise evidence.Broken(
            verdict.sentence(), code="evidence-broken", next_command=f"runbook evidence verify {run} --json"
        )
    count = evidence.export(chain, run, Path(arguments.file), trusted, seen)
    if arguments.json:
        print_json({"run": run, "file": arguments.file, "records": count, "anchored": verdict.anchored})
    else:
        print(f"{count} records of run {run} and around it are in {arguments.file}.")
    return errors.OK
