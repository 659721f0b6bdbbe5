"""``runbook serve``: the console."""

from __future__ import annotations

import argparse
import functools
import ipaddress
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from runbooks import errors
from runbooks.errors import Problem, Refused

if TYPE_CHECKING:
    from runbooks.console import Server
    from runbooks.journal import Journal

TOKEN_LENGTH = 16
"""Characters that a token has at least."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        "--inventory",
        action="append",
        default=[],
        metavar="INVENTORY",
        help="an environment to show (again for more; default: all that were worked on from here)",
    )
    parser.add_argument("--port", type=int, default=8765, help="0 takes any that is free (default: 8765)")
    parser.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1)")
    parser.add_argument(
        "--expose", action="store_true", help="allow an address that others reach; the pages are not encrypted"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="a name that browsers may use for an exposed console",
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="let in who knows the token in this file, instead of by links"
    )


def main(arguments: argparse.Namespace) -> int:
    names = _names(arguments)
    token = _token(arguments.token_file) if arguments.token_file else None

    from runbooks.console import Desk, Server

    journals, inventories = _journals(arguments.inventory)
    desk = Desk(journals, inventories)
    try:
        server = Server((arguments.bind, arguments.port), desk, names, token)
    except (OSError, OverflowError) as error:
        raise Problem(
            f"The console cannot listen at {arguments.bind} port {arguments.port} ({error})",
            code="console-address",
            next_command="runbook serve --port 0",
        ) from error
    with server:
        _serve(server, arguments)
    desk.close()
    return errors.OK


def _serve(server: Server, arguments: argparse.Namespace) -> None:
    host = f"[{arguments.bind}]" if ":" in arguments.bind else arguments.bind
    url = f"http://{host}:{server.server_address[1]}/"

    def announce(first: bool = False) -> None:
        way = f"{url}enter/{server.door.code}" if not server.door.asks_for_password else None
        if arguments.json:
            print(json.dumps({"event": "listening" if first else "entered", "url": url, "enter": way}), flush=True)
        elif way is None:
            print(f"The console is at {url}; the password is the token in {arguments.token_file}.", flush=True)
        elif first:
            print(f"The console only shows; Ctrl-C ends it. The link lets one browser in:\n{way}", flush=True)
        else:
            print(f"A browser was let in. For another one:\n{way}", flush=True)

    def end(_number: int, _frame: FrameType | None) -> None:
        # shutdown waits for the loop that this handler interrupts, so it must not be called from here.
        threading.Thread(target=server.shutdown, daemon=True).start()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    server.entered = announce
    try:
        announce(first=True)
        server.serve_forever(poll_interval=0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _names(arguments: argparse.Namespace) -> frozenset[str]:
    """The names that a browser may use for this server. Raises Refused for an address that others reach."""
    bind = arguments.bind
    try:
        address = ipaddress.ip_address(bind)
    except ValueError:
        raise Problem(
            f"--bind wants an address of this machine, not {bind!r}",
            code="console-bind",
            next_command="runbook serve --bind 127.0.0.1",
        ) from None
    if not address.is_loopback and not arguments.expose:
        raise Refused(
            f"At {bind} others reach the console, and its pages and the way in are not encrypted: whoever listens on "
            "the network reads along and gets in. Reach it through ssh instead, or insist with --expose",
            code="console-exposed",
            next_command=f"ssh -L {arguments.port}:127.0.0.1:{arguments.port} {os.uname().nodename}",
        )
    shown = f"[{bind}]" if address.version == 6 else bind
    own = {shown, *(name.lower() for name in arguments.name)}
    if address.is_loopback:
        own |= {"localhost", "127.0.0.1", "[::1]"}
    if address.is_unspecified:
        own |= {os.uname().nodename.lower()}
    return frozenset(own)


def _token(path: Path) -> str:
    """Raises Problem when the file cannot be read, others can read it, or its token can be guessed."""
    try:
        open_to = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(
            f"The token file {path} cannot be read ({error})", code="console-token-file", next_command=f"ls -l {path}"
        ) from error
    if open_to & 0o077:
        raise Problem(
            f"The token file {path} can be read by others (mode {open_to:03o})",
            code="console-token-open",
            next_command=f"chmod 600 {path}",
        )
    if len(token) < TOKEN_LENGTH:
        raise Problem(
            f"The token in {path} has {len(token)} characters, it needs {TOKEN_LENGTH}",
            code="console-token-weak",
            next_command=f"openssl rand -hex 32 > {path}",
        )
    return token


def _known() -> Mapping[str, Callable[[], Journal]]:
    """A server that does not answer must not keep the others' pages waiting."""
    from runbooks import journal as journals

    places = journals.known_journals()
    return {name: functools.partial(place.open, journals.GLANCE_S) for name, place in places.items()}


def _journals(
    inventories: list[str],
) -> tuple[Callable[[], Mapping[str, Callable[[], Journal]]], dict[str, str]]:
    """How the journals are opened, by environment, and the inventories by environment. Raises Problem."""
    from runbooks.environment import Environment

    if not inventories:
        return _known, {}

    environments = [Environment(Path(path)) for path in inventories]
    # Nothing is made where nothing has been run yet.
    return (
        lambda: {each.name: each.open_journal for each in environments if each.has_journal()},
        {each.name: str(each.path) for each in environments},
    )
