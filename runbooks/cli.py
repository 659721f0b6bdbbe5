"""The command line: which commands there are. Only the module of the command that is given is imported, and it imports
what is slow (Ansible above all) when it is run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from runbooks import errors
from runbooks.errors import Problem, Stopped

COMMANDS: dict[str, tuple[str, str]] = {
    "list": ("runbooks.commands.list", "the runbooks there are"),
    "show": ("runbooks.commands.show", "what a runbook does, its parameters and its steps"),
    "run": ("runbooks.commands.run", "run a runbook"),
    "resume": ("runbooks.commands.resume", "go on with a run that did not end"),
    "undo": ("runbooks.commands.undo", "take a run's effects back, the newest first"),
    "abort": ("runbooks.commands.abort", "give up a run whose process is gone, and its lock"),
    "status": ("runbooks.commands.status", "one run, step by step"),
    "runs": ("runbooks.commands.runs", "all runs"),
    "windows": ("runbooks.commands.windows", "when an environment may be worked on, and whether a runbook fits"),
    "plan": ("runbooks.commands.plan", "what a runbook would change, on what, and how long it takes"),
    "approve": ("runbooks.commands.approve", "approve a plan with your own key"),
    "keys": ("runbooks.commands.keys", "make and show signing keys"),
    "docs": ("runbooks.commands.docs", "the documentation page of a runbook"),
    "generate": ("runbooks.commands.generate", "write what the definitions yield: playbooks, pages, AWX objects"),
    "event": ("runbooks.commands.event", "take alerts in, and show what the witnesses say"),
    "awx": ("runbooks.commands.awx", "what the runbooks are in AWX, and whether a live one has it"),
    "notify": ("runbooks.commands.notify", "test receivers, say again what nobody acknowledged, acknowledge"),
    "serve": ("runbooks.commands.serve", "the console: history and live progress in a browser"),
    "evidence": ("runbooks.commands.evidence", "whether the journal is what was written, and proof of it"),
    "report": ("runbooks.commands.report", "measure again and write the report of a run"),
}
"""Name -> module and help. A module has ``arguments(parser)`` and ``main(arguments) -> exit code``."""

EXIT_CODES = (
    "exit codes: 0 done, 1 a step failed or a target was missed, 2 bad input (nothing touched), 3 refused, "
    "4 waiting for an approval, 130 interrupted"
)


class Parser(argparse.ArgumentParser):
    """One sentence instead of a usage block; ``--json`` everywhere. words: the command line that is being read."""

    words: Sequence[str] = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for machines; errors too")

    def error(self, message: str) -> NoReturn:
        raise Problem(message[:1].upper() + message[1:], code="command-line", next_command=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        complete()
    try:
        arguments = parser(words).parse_args(words, argparse.Namespace(json=False))
        return int(arguments.main(arguments))
    except Problem as problem:
        tell(problem, as_json="--json" in words)
        return problem.exit_code
    except KeyboardInterrupt:
        tell(Stopped("Interrupted", code="interrupted", next_command="runbook status"), as_json="--json" in words)
        return errors.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.FAILED
    except Exception as error:
        tell(fault(error), as_json="--json" in words)
        return errors.FAILED


def tell(problem: Problem, *, as_json: bool) -> None:
    """One sentence for a person on standard error, or one line of JSON on standard output."""
    if as_json:
        print(json.dumps(problem.document()), flush=True)
    elif sys.stderr.isatty():
        # A person at a terminal gets a line for each, so that the next command can be copied whole.
        print(f"error: {problem.what}.\n{problem.touched}.\nnext: {problem.next_command}", file=sys.stderr, flush=True)
    else:
        print(f"error: {problem}", file=sys.stderr, flush=True)


def fault(error: Exception) -> Problem:
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
        touched="What the run's finished and begun steps touched stays as it is",
        next_command="runbook status",
    )


def parser(words: Sequence[str]) -> Parser:
    """The parser of every command's name, and of the arguments of the one that ``words`` give."""
    top = Parser(prog="runbook", description="Operate an environment by runbooks.", epilog=EXIT_CODES)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    given = next((word for word in words if word in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".", epilog=EXIT_CODES)
        if name == given:
            command.words = words
            loaded = importlib.import_module(module)
            loaded.arguments(command)
            command.set_defaults(main=loaded.main, command=name)
    return top


def complete() -> NoReturn:
    """Answer the shell that asks how the line may go on, and end."""
    import argcomplete

    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT") or 0) or None]
    try:
        words = shlex.split(line)[1:]
    except ValueError:  # An open quote.
        words = line.split()[1:]
    try:
        asked = parser(words)
    except Problem:  # A definition that is broken: complete what does not need it.
        asked = parser([])
    argcomplete.autocomplete(asked, always_complete_options=False)
    sys.exit(errors.OK)
