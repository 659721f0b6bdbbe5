# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The kernel's part of the lease: an nftables table that lets database packets pass only while a generation lives.

A generation is a number. The guard *arms* it (an element that the kernel forgets after kernel_after seconds) before it
asks the store to renew, and *confirms* it after the store said yes. Every packet of the database port needs a confirmed
generation that is still armed. So the time counts from before the renewal was sent, and no pause of the guard, at
whatever instruction, can keep the gate open longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import pathlib
import select
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import IO, Any

from .model import LeaseError

TABLE = "inet censuschat_guard"
# Children get no environment of ours: nothing secret, and no locale that changes their output.
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_LARGEST_GENERATION = 2**31 - 1


class CommandError(LeaseError):
    """A program of the node failed or took too long."""


class NoAnswer(CommandError):
    """A program could not be run or took too long."""


def run(argv: Sequence[str], text: str = "", timeout_s: float = 2.0, user: str | None = None) -> str:
    """Run a program with `text` on standard input; its standard output.

    It is killed after timeout_s, and this returns only when it is really gone: a program that lives on could still
    change the gate. Raises CommandError.
    """
    name = argv[0]
    with contextlib.ExitStack() as stack:
        # Files in memory instead of pipes: nothing can block half-way, however much is said.
        into, out, err = (stack.enter_context(os.fdopen(os.memfd_create(n), "w+b")) for n in ("in", "out", "err"))
        into.write(text.encode())
        into.seek(0)
        try:
            child = subprocess.Popen(  # pylint: disable=ansible-bad-function # the guard runs without AnsibleModule
                argv,
                stdin=into,
                stdout=out,
                stderr=err,
                env=_ENVIRONMENT,
                cwd="/",
                user=user,
                group=user,
                extra_groups=() if user else None,
            )
        except (OSError, KeyError) as error:
            raise NoAnswer(f"{name} cannot be run: {error}") from error
        # A process descriptor is waited for in the kernel: no clock of this process takes part.
        watched = os.pidfd_open(child.pid)
        stack.callback(os.close, watched)
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        in_time = bool(poll.poll(timeout_s * 1000))
        if not in_time:
            signal.pidfd_send_signal(watched, signal.SIGKILL)
        code = child.wait()
        said, complaint = (_text_of(stream) for stream in (out, err))
    if not in_time:
        raise NoAnswer(f"{name} gave no answer within {timeout_s:g} s and was ended")
    if code:
        raise CommandError(f"{name} failed with {code}: {complaint.strip()[:500]}")
    return said


def _text_of(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class GateRules:
    """What the table is made from. peers: addresses that stay connected while the gate is closed (replication)."""

    port: int
    peers: tuple[str, ...]

    def table(self) -> str:
        """The table's text. Its sets start empty: closed."""
        addresses = [ipaddress.ip_address(peer) for peer in self.peers]
        v4 = ", ".join(str(a) for a in sorted(set(addresses), key=str) if a.version == 4)
        v6 = ", ".join(str(a) for a in sorted(set(addresses), key=str) if a.version == 6)

        def chain(name: str, port: str, address: str) -> str:
            lines = [f"ip {address} {{ {v4} }} accept"] if v4 else []
            lines += [f"ip6 {address} {{ {v6} }} accept"] if v6 else []
            lines += [
                # A reset carries no data, and it is how both ends learn that the gate is closed.
                "tcp flags rst accept",
                # Without a confirmed generation the lookup leaves the mark alone, so it starts as one never armed.
                "meta mark set 0x00000000",
                f"meta mark set {port} map @confirmed",
                "meta mark @armed meta mark set 0x00000000 accept",
                "meta l4proto tcp reject with tcp reset",
            ]
            return f"  chain {name} {{\n" + "".join(f"    {line}\n" for line in lines) + "  }\n"

        return (
            f"table {TABLE} {{\n"
            "  set armed {\n    type mark\n    flags timeout\n  }\n"
            "  map confirmed {\n    type inet_service : mark\n  }\n"
            + chain("towards", "tcp dport", "saddr")
            + chain("from", "tcp sport", "daddr")
            + "  chain input {\n    type filter hook input priority filter - 5; policy accept;\n"
            f"    tcp dport {self.port} goto towards\n  }}\n"
            "  chain output {\n    type filter hook output priority filter - 5; policy accept;\n"
            f"    tcp sport {self.port} goto from\n  }}\n"
            "}\n"
        )

    def script(self) -> str:
        """One transaction that puts the table in place, closed, whatever was there before."""
        return f"table {TABLE} {{ }}\ndelete table {TABLE}\n{self.table()}"


def _elements(listing: str, kind: str) -> list[Any]:
    for part in json.loads(listing or "{}").get("nftables", []):
        if kind in part:
            return list(part[kind].get("elem", []))
    return []


class Gate:
    """The table in the kernel. Every change is one nft transaction; methods raise CommandError.

    memory: a file below /run that says what was loaded, so that a restarted guard can tell its own table from another.
    """

    def __init__(
        self,
        rules: GateRules,
        kernel_after_s: float,
        memory: pathlib.Path,
        runner: Callable[[Sequence[str], str], str] = run,
    ) -> None:
        self.rules = rules
        self.kernel_after_s = kernel_after_s
        self.memory = memory
        self._runner = runner
        self._fingerprint = ""
        self._next = 1

    def _nft(self, *arguments: str, text: str = "") -> str:
        return self._runner(("nft", *arguments), text)

    def _shape(self) -> str:
        """Fingerprint of the table without its elements; empty when there is no table."""
        try:
            text = self._nft("-s", "-t", "list", "table", *TABLE.split())
        except CommandError as error:
            if "No such file or directory" in str(error) and not isinstance(error, NoAnswer):
                return ""
            # A loaded machine that gives no answer says nothing about the table.
            raise
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> None:
        """Put the table in place, closed."""
        self._nft("-f", "-", text=self.rules.script())
        self._fingerprint = self._shape()
        if not self._fingerprint:
            raise CommandError(f"nftables table {TABLE} is missing right after it was loaded")
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        self.memory.write_text(json.dumps({"rules": self._rules_hash(), "kernel": self._fingerprint}))

    def _rules_hash(self) -> str:
        return hashlib.sha256(self.rules.script().encode()).hexdigest()

    def adopt(self) -> bool:
        """Take over a table left by an earlier guard if it is exactly ours; otherwise put ours in place, closed.

        True: it was adopted. What the kernel holds armed then runs out by itself, so the sessions of a region whose
        guard is only restarted live on. Numbers of the earlier guard are not used again.
        """
        try:
            known = json.loads(self.memory.read_text())
        except (OSError, ValueError):
            known = {}
        shape = self._shape()
        if not shape or not isinstance(known, dict) or known != {"rules": self._rules_hash(), "kernel": shape}:
            self.load()
            return False
        self._fingerprint = shape
        armed, confirmed = self.elements()
        self._next = max([0, *armed, *confirmed]) % _LARGEST_GENERATION + 1
        return True

    def intact(self) -> bool:
        """Whether the rules in the kernel are still those that were loaded (somebody may flush the ruleset)."""
        return bool(self._fingerprint) and self._shape() == self._fingerprint

    def elements(self) -> tuple[list[int], list[int]]:
        """Generations that are armed, and those that are confirmed."""
        armed = []
        for element in _elements(self._nft("-j", "list", "set", *TABLE.split(), "armed"), "set"):
            armed.append(int(element["elem"]["val"] if isinstance(element, dict) else element))
        pairs = _elements(self._nft("-j", "list", "map", *TABLE.split(), "confirmed"), "map")
        return armed, [int(pair[1]) for pair in pairs]

    def is_open(self) -> bool:
        """Whether the kernel lets database packets pass right now."""
        armed, confirmed = self.elements()
        return bool(set(armed) & set(confirmed))

    def arm(self) -> int:
        """Let a new generation live for kernel_after seconds from now; it opens nothing until it is confirmed."""
        generation = self._next
        self._next = generation % _LARGEST_GENERATION + 1
        millis = int(self.kernel_after_s * 1000)
        self._nft("-f", "-", text=f"add element {TABLE} armed {{ {generation} timeout {millis}ms }}\n")
        return generation

    def confirm(self, generation: int) -> None:
        """Open the gate for as long as this generation stays armed."""
        self._nft(
            "-f",
            "-",
            text=f"flush map {TABLE} confirmed\nadd element {TABLE} confirmed {{ {self.rules.port} : {generation} }}\n",
        )

    def shut(self) -> None:
        """Close the gate now."""
        self._nft("-f", "-", text=f"flush map {TABLE} confirmed\nflush set {TABLE} armed\n")

    def end_sessions(self) -> None:
        """Reset the open TCP sessions of the gate's port, those of peers apart, so that clients know at once.

        The gate alone is enough for safety: it answers the next packet of a session with a reset.
        """
        terms = [f"sport = :{self.rules.port}"]
        terms += [f"not dst {_ss_address(peer)}" for peer in self.rules.peers]
        self._runner(("ss", "-H", "-K", "-t", "-n", " and ".join(terms)), "")


def _ss_address(peer: str) -> str:
    return f"[{peer}]" if ":" in peer else peer
