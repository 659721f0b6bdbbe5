"""`lab`: bring the two regions up, look at them, cut them apart, heal them, take them down.

Exit codes: 0 done; 1 a step failed, or (status) the lab is not all up; 2 bad input or something is missing on the
machine, nothing was touched; 3 another lab command is changing the lab; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_BUSY = 3
EXIT_INTERRUPTED = 130


class Refusal(Exception):
    """Why nothing was done, in one sentence, with the exit code it means."""

    def __init__(self, reason: str, code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(reason)
        self.code = code


def parser() -> argparse.ArgumentParser:
    """The command line. Each verb names its function as MODULE:FUNCTION, imported only when it is run."""
    top = argparse.ArgumentParser(prog="lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, does: str, function: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=does, description=does)
        sub.set_defaults(function=function)
        return sub

    up = verb("up", "start the lab, or finish starting it; a second time changes nothing", "lab.verbs:up")
    profile = up.add_mutually_exclusive_group()
    for name, help_text in (
        ("small", "1 app and 2 db nodes a region, for a laptop"),
        ("ha", "three control planes behind a balancer in the primary region"),
    ):
        profile.add_argument(f"--{name}", dest="profile", action="store_const", const=name, default="", help=help_text)
    profile.add_argument("--inventory", metavar="DIR", help="other nodes instead: those of this inventory")
    status = verb("status", "show nodes, services and cuts", "lab.verbs:status")
    status.add_argument("--json", action="store_true", help="the same for programs")
    down = verb("down", "remove all that the lab made, wherever it was interrupted", "lab.verbs:down")
    down.add_argument("--images", action="store_true", help="remove the cached node images too")
    down.add_argument("--inventory", metavar="DIR", help="only the lab of this inventory; leave any other alone")
    for name, does in (
        ("cut", "cut a region off from everything outside it, at once and in both directions"),
        ("heal", "undo a cut"),
    ):
        sub = verb(name, does, f"lab.verbs:{name}")
        sub.add_argument("region", metavar="REGION", help="us-east-1, us-west-2 or witness")
    restart = verb("restart", "restart a node, which is a reboot to it", "lab.verbs:restart")
    restart.add_argument("host", metavar="HOST", help="a node's name, e.g. use1-db1")
    _probe(verbs)
    _programs(verbs)
    return top


def _programs(verbs: Any) -> None:
    """`programs`."""
    does = "prepare the programs and images of a Kubernetes version in the cache; a second time changes nothing"
    programs = verbs.add_parser("programs", help=does, description=does)
    programs.add_argument("--kubernetes", metavar="VERSION", default="", help="1.35 (the default) or 1.36")
    programs.add_argument("--only", default="main", metavar="SET", help="main (what the lab needs; the default) or all")
    programs.add_argument(
        "--from",
        dest="source",
        default="auto",
        metavar="WAY",
        help="download, source, or auto: download where upstream's site can be reached, otherwise build",
    )
    programs.add_argument("--update", action="store_true", help="write the Go module files of the catalogue anew")
    programs.set_defaults(function="lab.programs.command:run")


def _probe(verbs: Any) -> None:
    """`probe` and its verbs."""
    probe = verbs.add_parser(
        "probe", help="clients that write through everything and keep ledgers of what they were told"
    )
    actions = probe.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, does: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = actions.add_parser(name, help=does, description=does)
        sub.set_defaults(function=f"lab.probe:{name}")
        return sub

    start = action("start", "start clients in the background: those outside, or inside regions, or all")
    start.add_argument("--inside", action="append", default=[], metavar="REGION", help="only clients inside REGION")
    start.add_argument("--all", action="store_true", help="outside and inside every region")
    start.add_argument("--rate", type=float, default=10.0, help="writes per second of each client (10)")
    start.add_argument("--keep", action="store_true", help="go on with the ledgers that are there")
    action("stop", "end the clients")
    action("readback", "ask the service which acknowledged writes it holds, and note it in the ledgers")
    figures = action("figures", "what the ledgers say")
    figures.add_argument("--json", action="store_true", help="the same for programs")
    figures.add_argument("--start", type=float, metavar="T", help="from T on, seconds of CLOCK_MONOTONIC")
    figures.add_argument("--end", type=float, metavar="T", help="up to T")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lab`; returns the exit code."""
    arguments = parser().parse_args(argv)
    module, _, function = arguments.function.partition(":")
    try:
        code = int(getattr(importlib.import_module(module), function)(arguments))
        sys.stdout.flush()
        return code
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.code
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; `lab up` resumes, `lab down` removes what is there", file=sys.stderr)
        return EXIT_INTERRUPTED
