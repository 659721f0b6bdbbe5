"""The command line. Ansible and everything else that is slow to import is imported by the commands that need it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runbooks import errors
from runbooks.errors import Problem

if TYPE_CHECKING:
    from runbooks.engine import Request
    from runbooks.journal import Journal, RunState

EXIT_CODES = (
    "exit codes: 0 done, 1 a step failed or a target was missed, 2 bad input (nothing touched), 3 refused, "
    "130 interrupted"
)


class Parser(argparse.ArgumentParser):
    """One sentence instead of a usage block."""

    def error(self, message: str) -> NoReturn:
        raise Problem(message[:1].upper() + message[1:], code="command-line", next_command=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser(words).parse_args(words)
        return int(arguments.command(arguments))
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return errors.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.FAILED
    except Exception as error:
        print(f"error: {_fault(error)}", file=sys.stderr)
        return errors.FAILED


def _fault(error: Exception) -> Problem:
    """A fault of the program itself: its details go into a file, the person gets a sentence."""
    import traceback

    from runbooks.journal import state_home

    path = state_home() / "fault.txt"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return Problem(
        f"The runbook engine itself failed ({type(error).__name__}: {error}); the details are in {path}",
        code="engine-fault",
        next_command="runbook status",
    )


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="runbook", description="Operate an environment by runbooks.", epilog=EXIT_CODES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    command = commands.add_parser("list", help="the runbooks there are")
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=_list)

    command = commands.add_parser("show", help="what a runbook does, its parameters and its steps")
    command.add_argument("name", metavar="RUNBOOK")
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=_show)

    command = commands.add_parser("run", help="run a runbook", epilog=EXIT_CODES)
    command.add_argument("name", metavar="RUNBOOK")
    command.add_argument("-i", "--inventory", metavar="INVENTORY", help="the environment")
    command.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter, by its name")
    command.add_argument("--yes", action="store_true", help="do not ask before the first step")
    _flags(command, words)
    command.set_defaults(command=_run)

    command = commands.add_parser("resume", help="go on with a run that did not end", epilog=EXIT_CODES)
    command.add_argument("run", metavar="RUN", nargs="?", help="its id or a part of it (default: the latest)")
    command.set_defaults(command=_resume)

    command = commands.add_parser("abort", help="give up a run whose process is gone, and its lock")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--reason", required=True, help="why; kept in the journal")
    command.set_defaults(command=_abort)

    for name, function, text in (
        ("status", _status, "one run, step by step"),
        ("report", _report, "measure again and write the report of a run"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", metavar="RUN", nargs="?", help="its id or a part of it (default: latest)")
        command.add_argument("-i", "--inventory", metavar="INVENTORY", help="only runs of this environment")
        command.add_argument("--json", action="store_true")
        command.set_defaults(command=function)

    command = commands.add_parser("runs", help="all runs")
    command.add_argument("-i", "--inventory", metavar="INVENTORY", help="only runs of this environment")
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=_runs)
    return parser


def _flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Each parameter of the runbook that ``run`` is asked for becomes a flag of its own."""
    if not words or words[0] != "run":
        return
    from runbooks import definition

    names = definition.files()
    inventory = ("-i", "--inventory")
    name = next((w for before, w in itertools.pairwise(words) if w in names and before not in inventory), None)
    if name is None:
        return
    for parameter in definition.load(name).parameters.values():
        choices = f" ({', '.join(map(str, parameter.choices))})" if isinstance(parameter.choices, list) else ""
        parser.add_argument(
            f"--{parameter.name.replace('_', '-')}",
            dest=f"parameter_{parameter.name}",
            metavar=parameter.type.upper(),
            help=(parameter.title + choices).replace("%", "%%"),
        )


# -- the commands


def _list(arguments: argparse.Namespace) -> int:
    from runbooks import definition

    titles = definition.titles()
    if arguments.json:
        print(json.dumps([{"name": name, "title": title} for name, title in titles.items()], indent=1))
    else:
        _columns([(name, title) for name, title in titles.items()])
    return errors.OK


def _show(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from runbooks import definition

    runbook = definition.load(arguments.name)
    if arguments.json:
        print(json.dumps(asdict(runbook), indent=1, default=str))
        return errors.OK
    print(f"{runbook.name}: {runbook.title}\n")
    print(textwrap.fill(runbook.purpose, 100))
    print(f"\nOwner: {runbook.owner}    Severity: {runbook.severity}\n\nParameters:")
    _columns(
        [
            (f"  {p.name}", p.type, "required" if p.required else _default(p), p.title)
            for p in runbook.parameters.values()
        ]
    )
    print("\nSteps:")
    _columns(
        [
            (f"  {s.id}", f"{s.budget_s:g} s", s.title, "touches " + (", ".join(s.touches) or "nothing"))
            for s in runbook.steps
        ]
    )
    return errors.OK


def _default(parameter: Any) -> str:
    if parameter.default_from:
        return "default: observed"
    return f"default: {parameter.default}"


def _run(arguments: argparse.Namespace) -> int:
    from runbooks import definition, engine
    from runbooks.progress import choose

    runbook = definition.load(arguments.name)
    given = _given(arguments)
    if not arguments.inventory:
        raise Problem(
            f"Which environment runbook {runbook.name} shall work on is not said",
            code="environment-missing",
            next_command=f"runbook run {runbook.name} -i INVENTORY",
        )
    inventory = Path(arguments.inventory)
    if not inventory.exists():
        raise Problem(
            f"There is no inventory at {inventory}",
            code="inventory-missing",
            next_command=f"ls -d {inventory.parent}/*",
        )
    run = engine.new_run(runbook)
    warm = engine.Warm(run, inventory)
    with engine.signals() as stop:
        try:
            session = engine.Session(run, warm, choose(), stop)
            request = engine.prepare(runbook, inventory, given, session)
            if not arguments.yes and not _confirmed(request):
                return errors.INTERRUPTED
            state, code = engine.start(request, session)
        except engine.Interrupted:
            print("Interrupted before anything was touched.", file=sys.stderr)
            return errors.INTERRUPTED
        finally:
            warm.close()
    return _end(request, state, code)


def _given(arguments: argparse.Namespace) -> dict[str, str]:
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


def _confirmed(request: Request) -> bool:
    if not sys.stdin.isatty():
        raise Problem(
            f"Runbook {request.definition.name} asks before it begins, and there is no terminal to ask at",
            code="confirmation-without-terminal",
            next_command=f"runbook run {request.definition.name} -i {request.environment.path} --yes",
        )
    from runbooks.progress import headline

    print(headline(request), file=sys.stderr)
    rows = [(f"  {s.id}", s.title, ", ".join(s.touches) or "nothing") for s in request.definition.steps]
    _columns([("  step", "what", "touches"), *rows], sys.stderr)
    print(f"Type {request.environment.name} to begin: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == request.environment.name


def _resume(arguments: argparse.Namespace) -> int:
    from runbooks import engine
    from runbooks.progress import choose

    with engine.signals() as stop:
        state, code, request = engine.resume(_latest(arguments.run), choose(), stop)
    return _end(request, state, code)


def _end(request: Request, state: RunState, code: int) -> int:
    """Write the report and say how it went: the cause of a failure and the one next command come last."""
    from runbooks import report
    from runbooks.journal import Journal, opened

    with opened(Journal(request.environment.state_directory, request.environment.name)) as journal:
        result = report.build(journal, request.run, request.definition, request.environment)
    report.write(result)
    if state.state == "succeeded":
        _print_figures(result, sys.stderr)
    else:
        print(f"Report: {result['paths']['html']}", file=sys.stderr)
        problem = Problem(
            f"Run {state.run} {state.state}: {state.reason}",
            code="run-ended",
            next_command=f"runbook resume {state.run}",
        )
        print(f"error: {problem}", file=sys.stderr)
    return max(code, report.exit_code(result))


def _print_figures(result: dict[str, Any], stream: Any) -> None:
    from runbooks import report

    print(result["verdict"]["text"], file=stream)
    rows = []
    for check in result["checks"]:
        target = "" if check["target"] is None else f"target {check['target']:g} {check['unit']}".strip()
        met = {True: "met", False: "MISSED", None: ""}[check["met"]]
        rows.append((f"  {check['title']}", report.figure(check), target, met))
    if result["figures"]["lease_wait_s"] is not None:
        rows.append(("  of which waited for the lease", f"{result['figures']['lease_wait_s']:.1f} s", "", ""))
    _columns(rows, stream)
    print(f"Report: {result['paths']['html']}", file=stream)


def _latest(run: str | None) -> str | None:
    return None if run in (None, "latest") else run


def _find(arguments: argparse.Namespace) -> tuple[Journal, str]:
    """The journal and the run that the arguments mean."""
    from runbooks import journal

    if not arguments.inventory:
        return journal.find(_latest(arguments.run))
    own = _of_inventory(arguments.inventory)
    return journal.find(_latest(arguments.run), [own])


def _of_inventory(path: str) -> Journal:
    from runbooks.environment import Environment
    from runbooks.journal import Journal

    environment = Environment(Path(path))
    if not (environment.state_directory / "journal.sqlite").exists():
        raise Problem(
            f"No runbook has been run in environment {environment.name} (no journal in {environment.state_directory})",
            code="environment-without-runs",
            next_command=f"runbook run RUNBOOK -i {path}",
        )
    return Journal(environment.state_directory, environment.name)


def _status(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from runbooks.journal import opened
    from runbooks.progress import MARKS, seconds

    found, run = _find(arguments)
    with opened(found) as journal:
        state = journal.state(run)
        shown = _shown_state(journal, state)
    if arguments.json:
        print(json.dumps({**asdict(state), "shown_state": shown}, indent=1, default=str))
        return errors.OK
    parameters = " ".join(f"{k}={v}" for k, v in state.parameters.items())
    print(f"{run}: {state.runbook} {parameters} on {state.environment} by {state.who}@{state.host}: {shown}")
    for step in state.steps.values():
        outcome = step.outcome or ("running" if step.attempts else "waiting")
        took = "" if step.elapsed_s is None else seconds(step.elapsed_s)
        print(f"  {MARKS[outcome]} {step.step:<14} {outcome:<12} {took:>10}  {step.says}")
        for failure in step.failures:
            print(f"      {failure['host']} {failure['task']}: {failure['message']}")
    if shown in ("dead", "failed", "interrupted", "refused"):
        print(f"next: runbook resume {run}")
    return errors.OK


def _shown_state(journal: Journal, state: RunState) -> str:
    """A run that says "running" and whose process is gone is dead."""
    if state.state != "running":
        return state.state
    lock = journal.lock()
    return "running" if lock is not None and lock.run == state.run and lock.alive() else "dead"


def _runs(arguments: argparse.Namespace) -> int:
    import time

    from runbooks import journal as journals

    found = [_of_inventory(arguments.inventory)] if arguments.inventory else journals.open_known()
    rows: list[dict[str, Any]] = []
    for each in found:
        with journals.opened(each) as journal:
            for run in journal.runs():
                state = journal.state(run)
                rows.append(
                    {
                        "run": run,
                        "runbook": state.runbook,
                        "environment": state.environment,
                        "who": state.who,
                        "started": state.started,
                        "state": _shown_state(journal, state),
                    }
                )
    rows.sort(key=lambda row: row["started"])
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return errors.OK
    for row in rows:
        row["when"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"]))
    _columns([(row["run"], row["environment"], row["state"], row["who"], row["when"]) for row in rows])
    return errors.OK


def _abort(arguments: argparse.Namespace) -> int:
    from runbooks import journal as journals

    found, run = journals.find(_latest(arguments.run))
    with journals.opened(found) as journal:
        state = journal.state(run)
        if state.state == "succeeded":
            raise Problem(
                f"Run {run} has succeeded: there is nothing to give up",
                code="run-succeeded",
                next_command=f"runbook report {run}",
            )
        journal.abort(run, arguments.reason)
    print(f"Run {run} was given up; what its finished steps did stays done.")
    return errors.OK


def _report(arguments: argparse.Namespace) -> int:
    from runbooks import definition, report
    from runbooks.environment import Environment
    from runbooks.journal import opened

    found, run = _find(arguments)
    with opened(found) as journal:
        state = journal.state(run)
        environment = Environment(Path(arguments.inventory or state.inventory))
        result = report.build(journal, run, definition.load(state.runbook), environment)
    report.write(result)
    if arguments.json:
        print(json.dumps(result, indent=1, default=str))
    else:
        _print_figures(result, sys.stdout)
    return report.exit_code(result)


def _columns(rows: Iterable[tuple[str, ...]], stream: Any = None) -> None:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=stream or sys.stdout)
