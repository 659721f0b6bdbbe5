"""`lab programs`: prepares the programs of a Kubernetes version, or writes their Go module files anew."""

from __future__ import annotations

import argparse
import signal
from types import FrameType

from lab.cli import EXIT_FAILED, EXIT_INTERRUPTED, Refusal
from lab.programs import ProgramsError, Unknown, Unprepared, prepare
from lab.programs.catalogue import catalogue
from lab.programs.store import update


def run(arguments: argparse.Namespace) -> int:
    """The verb's function, and a step of `lab up`; raises Refusal."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Builds run in process groups of their own and are ended on the way out.
    before = signal.signal(signal.SIGTERM, end)
    try:
        if arguments.update:
            update()
        else:
            prepare(arguments.kubernetes or catalogue().default, arguments.only, arguments.source)
    except (Unknown, Unprepared) as error:
        raise Refusal(str(error)) from None
    except ProgramsError as error:
        raise Refusal(str(error), EXIT_FAILED) from None
    except KeyboardInterrupt:
        raise Refusal("interrupted; the same command goes on with what is missing", EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
