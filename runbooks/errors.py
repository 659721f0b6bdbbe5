"""What stops a runbook before or beside its steps, as one sentence for a person who has just been woken up.

Every error says three things: its cause, its blast radius, and exactly one next command.
``tests/unit/test_runbook_errors.py`` holds each that there is.
"""

from __future__ import annotations

from typing import Any, ClassVar

# The exit codes of every command; runbooks/README.md documents them.
OK = 0
FAILED = 1
BAD_INPUT = 2
REFUSED = 3
WAITING = 4
INTERRUPTED = 130

NOTHING = "Nothing was touched"


class Problem(Exception):
    """Bad input or an environment that cannot be worked on.

    what: the fault and where it is. code: a slug for machines, one a meaning. touched: the blast radius in words.
    next_command: the one command to run next.
    """

    exit_code: ClassVar[int] = BAD_INPUT

    def __init__(self, what: str, *, code: str, next_command: str, touched: str = NOTHING) -> None:
        self.what, self.code = one_line(what), code
        self.touched, self.next_command = one_line(touched), next_command
        super().__init__(what)

    def __str__(self) -> str:
        return f"{self.what}. {self.touched}. next: {self.next_command}"

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"error": {"code": self.code, "what": self.what, "touched": self.touched, "next": self.next_command}}


class Refused(Problem):
    """The input is right, but the run may not go on now."""

    exit_code: ClassVar[int] = REFUSED


class Stopped(Problem):
    """The operator stopped it before anything was touched."""

    exit_code: ClassVar[int] = INTERRUPTED


def one_line(text: str) -> str:
    """The text without line breaks and without the full stop that would end the sentence early."""
    return " ".join(text.split()).rstrip(".")
