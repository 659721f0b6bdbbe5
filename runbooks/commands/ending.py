"""How a run that this process has carried out is told: the report, then the cause of a failure and what to do next."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runbooks.engine import Ended


def end(ended: Ended, *, as_json: bool) -> int:
    """Write the report and say how it went; the exit code. What to do next comes last."""
    from runbooks import errors, outlook, report
    from runbooks.cli import tell
    from runbooks.commands.report import print_figures
    from runbooks.journal import opened

    request, state = ended.request, ended.state
    with opened(request.environment.open_journal()) as journal:
        result = report.build(journal, request.run, request.definition, request.environment)
        problem = outlook.aftermath(journal, state, state.state)
    report.write(result)
    if as_json:
        document = {"event": "finished", "run": state.run, "state": state.state, "report": result["paths"]["json"]}
        print(json.dumps(document), flush=True)
    elif state.state == "succeeded":
        print_figures(result, sys.stderr)
    else:
        print(f"Report: {result['paths']['html']}", file=sys.stderr)
    if problem is not None:
        tell(problem, as_json=as_json)
    return report.exit_code(result) if ended.code == errors.OK and state.state == "succeeded" else ended.code
