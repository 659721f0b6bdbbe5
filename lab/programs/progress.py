"""Signs of life: what is being made, how far it is, and since when."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Seconds without a line after which one is printed.
INTERVAL = 20.0
Say = Callable[[str], None]


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)


def elapsed(seconds: float) -> str:
    """Seconds in the words of a human: 7 s, 2 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Step:
    """What is under way. `detail` may be set by whoever works: it is shown in the next line."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.detail = ""
        self.started = time.monotonic()

    def line(self) -> str:
        """The sign of life."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"    ... {self.what}{detail}: {elapsed(time.monotonic() - self.started)}"


@dataclass(frozen=True)
class Job:
    """What whoever makes a part needs to know: for which machine, where to log, what to tell, and the lock's file
    descriptor, which a child inherits: when we are killed it goes on, and whoever comes next waits for it."""

    architecture: str
    log: Path
    step: Step
    lock: int


@contextlib.contextmanager
def step(what: str, tell: Say, interval: float = INTERVAL) -> Iterator[Step]:
    """Prints that `what` is under way every `interval` seconds until the block ends."""
    current = Step(what)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(interval):
            tell(current.line())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield current
    finally:
        over.set()
        thread.join()
