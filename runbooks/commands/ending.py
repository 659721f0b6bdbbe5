"""How a run that this process has carried out is told: the report, then the cause of a failure and what to do next."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runbooks.engine import Request
    from runbooks.journal import RunState


def end(request: Request, state: RunState, code: int, *, as_json: bool) -> int:
    """Write the report and say how it went; the exit code. What to do next comes last."""
    from runbooks import report
    from runbooks.cli import tell
    from runbooks.commands.report import print_figures
    from runbooks.errors import Problem
    from runbooks.journal import Journal, opened

    with opened(Journal(request.environment.state_directory, request.environment.name)) as journal:
        result = report.build(journal, request.run, request.definition, request.environment)
    report.write(result)
    if as_json:
        document = {"event": "finished", "run": state.run, "state": state.state, "report": result["paths"]["json"]}
        print(json.dumps(document), flush=True)
    elif state.state == "succeeded":
        print_figures(result, sys.stderr)
    else:
        print(f"Report: {result['paths']['html']}", file=sys.stderr)
    if state.state != "succeeded":
        problem = Problem(
            f"Run {state.run} {state.state}: {state.reason}",
            code="run-ended",
            next_command=f"runbook resume {state.run}",
        )
        tell(problem, as_json=as_json)
    return max(code, report.exit_code(result))
