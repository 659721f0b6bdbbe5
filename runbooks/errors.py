"""What stops a runbook before or beside its steps, as one sentence for a person who has just been woken up."""

from __future__ import annotations

from typing import ClassVar

# The exit codes of every command; runbooks/README.md documents them.
OK = 0
FAILED = 1
BAD_INPUT = 2
REFUSED = 3
INTERRUPTED = 130


class Problem(Exception):
    """Bad input or an environment that cannot be worked on: nothing was touched.

    what names the fault and where it is; next_command is the one command to run next.
    """

    exit_code: ClassVar[int] = BAD_INPUT

    def __init__(self, what: str, *, next_command: str) -> None:
        self.what = one_line(what)
        self.next_command = next_command
        super().__init__(f"{self.what}; next: {next_command}")


class Refused(Problem):
    """The input is right, but the run may not go on now."""

    exit_code: ClassVar[int] = REFUSED


def one_line(text: str) -> str:
    """The text without line breaks and without the full stop that would end the sentence early."""
    return " ".join(text.split()).rstrip(".")
