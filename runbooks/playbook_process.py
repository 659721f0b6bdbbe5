"""The process that runs one step's playbook: ``ansible-playbook``, started early and told to go when its turn comes.

Most of an ansible-playbook's start is the import of Ansible itself. This process imports, then waits at a pipe for the
rest of its command line, so that a step's import happens while the step before it runs. The word that it is told is
JSON: ``{"argv": [...], "environment": {...}, "variables": {...}}``. A pipe that closes without a word means that the
turn will never come.

It dies with the engine that started it: a step must not go on unwatched while a resumed run repeats it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
CALLBACK = "censuschat.infra.runbook_journal"


def main() -> int:
    """Arguments: the engine's pid, the pipe to wait at, the words of the command line that are known already."""
    engine, pipe, *arguments = sys.argv[1:]
    # SIGTERM and not SIGKILL: Ansible ends its workers on it.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(engine):
        return 1
    import ansible.executor.playbook_executor
    import ansible.plugins.action.normal
    import ansible.plugins.connection.ssh
    import ansible.plugins.strategy.linear  # noqa: F401 - loaded for the tasks to come
    from ansible import constants
    from ansible.cli.playbook import PlaybookCLI

    Path(pipe).with_name("warm").touch()
    with Path(pipe).open(encoding="utf-8") as stream:
        word = stream.read()
    if not word:
        return 0
    told = json.loads(word)
    # The run's effects are written down whatever ansible.cfg says.
    if CALLBACK not in constants.CALLBACKS_ENABLED:
        constants.CALLBACKS_ENABLED.append(CALLBACK)
    os.environ.update(told["environment"])
    # Only what this process calls its command line: what others see of it stays as it was started.
    command = ["ansible-playbook", *arguments, "-e", json.dumps(told["variables"]), *told["argv"]]
    sys.argv = command
    PlaybookCLI.cli_executor(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
