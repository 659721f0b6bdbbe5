"""What a runbook is in AWX: its job templates, its workflow with survey, approvals, undo path and schedules.

``export`` writes it as data, which the collection's role awx completes with what is the environment's own (names,
project, credentials, how many approvals) and brings into an AWX. ``job`` is what the workflow's own jobs do there.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runbooks.definition import Definition, Parameter, Schedule, Step

OBSERVED = "observed"
"""The answer that leaves a parameter to what is observed when the run begins."""
JOBS = "runbooks/awx/jobs"
"""Where the playbooks of the workflow's own jobs are in the project."""
BEGIN_S = 900
"""Seconds after which AWX ends a job that plans, records approvals or undoes a step."""
START_S = 300
"""Seconds that a job may take beyond its step's time limit: its container, the parameters' check, gates."""


def export(definitions: Iterable[Definition], base: Path | None = None) -> dict[Path, str]:
    """File -> text of what these runbooks are in AWX, below ``base`` when one is given."""
    from runbooks.generate import dump, root

    found = {}
    for runbook in definitions:
        head = (
            "---\n"
            f"# Made from {os.path.relpath(runbook.path, root(runbook))} by `runbook generate`: change that one.\n"
            "# What the runbook is in AWX. Templates are filled in from the environment's inventory, and the role\n"
            "# censuschat.infra.awx adds names, project, inventory, credentials and the environment's approvals.\n"
        )
        found[content_path(runbook, base)] = head + dump({runbook.name: content(runbook)})
    return found


def content_path(runbook: Definition, base: Path | None = None) -> Path:
    from runbooks.generate import root

    return (base or root(runbook)) / "runbooks" / "awx" / "content" / f"{runbook.name}.yml"


def content(runbook: Definition) -> dict[str, Any]:
    """The runbook's templates, as the module censuschat.infra.awx_content takes them, but for the environment's own."""
    from runbooks.generate import playbook_path, root

    playbook = os.path.relpath(playbook_path(runbook), root(runbook))
    steps = [_step_template(runbook, step, playbook) for step in runbook.steps]
    own = [
        _own_template(runbook, "begin", f"Check {runbook.name}, and plan it when people must approve", _asked(runbook))
    ]
    own.append(_own_template(runbook, "approved", "Record who approved the plan"))
    own += [
        _own_template(runbook, "approved", f"Record who approved the step {step.id}", step=step.id)
        for step in runbook.steps
        if step.approval
    ]
    if any(step.undo and step.undo.playbook for step in runbook.steps):
        undo = _own_template(runbook, "undo", "Take the effects of a run's steps back, the newest first")
        undo["timeout"] = sum(int(step.timeout_s) for step in runbook.steps) + START_S
        own.append({**undo, "survey": _undo_survey()})
    return {
        "runbook": runbook.name,
        "approvals": {"need": runbook.approvals.need},
        "job_templates": [*own, *steps],
        "workflow_job_templates": [_workflow(runbook)],
    }


# -- job templates


def _template(runbook: Definition, name: str, title: str, playbook: str, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{runbook.name} / {name}",
        "description": f"{title} (a part of the workflow {runbook.name})",
        "playbook": playbook,
        "diff_mode": True,
        "allow_simultaneous": False,
        **more,
    }


def _step_template(runbook: Definition, step: Step, playbook: str) -> dict[str, Any]:
    gates = len(step.before) + len(step.after)
    more: dict[str, Any] = {"job_tags": step.id, "timeout": math.ceil(step.timeout_s) + gates * 120 + START_S}
    # A pattern that depends on a parameter is the plays' own matter; this machine is in no group.
    # Nor is there one for slices: Ansible fails where it leaves no host of a slice's share.
    if step.hosts not in ("all", "localhost") and "{{" not in step.hosts and step.slices == 1:
        more["limit"] = f"{step.hosts}:localhost"
    own: dict[str, Any] = {"runbook": runbook.name, "part": "step", "step": step.id}
    if step.slices > 1:
        more["job_slice_count"] = step.slices
        own["slices"] = step.slices  # AWX does not tell its jobs.
    more["extra_vars"] = {"runbook_awx": own}
    return _template(runbook, step.id, step.title, playbook, **more)


def _own_template(
    runbook: Definition, part: str, title: str, more: Mapping[str, Any] | None = None, step: str = ""
) -> dict[str, Any]:
    name = f"{step} {part}" if step else part
    variables = {"runbook": runbook.name, "part": part, "step": step, **(more or {})}
    playbook = f"{JOBS}/{part}.yml"
    return _template(runbook, name, title, playbook, timeout=BEGIN_S, extra_vars={"runbook_awx": variables})


def _asked(runbook: Definition) -> dict[str, Any]:
    """Parameter -> variable that the survey asks for; secret ones apart."""
    return {
        "parameters": {p.name: variable(p) for p in runbook.parameters.values() if not p.secret},
        "secrets": [p.name for p in runbook.parameters.values() if p.secret],
    }


def _undo_survey() -> dict[str, Any]:
    question = {
        "question_name": "Run",
        "question_description": "The id of the run (runbook runs); empty when a workflow starts this",
        "variable": "undo_run",
        "type": "text",
        "required": False,
        "default": "",
        "min": 0,
        "max": 200,
    }
    return {"name": "Undo", "description": "", "spec": [question]}


# -- the survey


def variable(parameter: Parameter) -> str:
    """The variable that the survey asks for. One whose default is observed has another: it may say ``observed``."""
    return f"{parameter.name}_or_{OBSERVED}" if parameter.default_from else parameter.name


def survey(runbook: Definition) -> dict[str, Any]:
    """The parameters as questions; what AWX cannot ask (patterns, fractions as bounds) the begin job checks."""
    if not runbook.parameters:
        return {}
    return {
        "name": runbook.title,
        "description": runbook.purpose,
        "spec": [_question(p) for p in runbook.parameters.values()],
    }


def _question(parameter: Parameter) -> dict[str, Any]:
    question: dict[str, Any] = {
        "question_name": parameter.title,
        "question_description": _description(parameter),
        "variable": variable(parameter),
        "required": parameter.required,
    }
    choices, default = parameter.choices, parameter.default
    if parameter.secret:
        return {**question, "type": "password", "min": 0, "max": 1024}
    if parameter.type == "boolean":
        return {**question, "type": "multiplechoice", "choices": ["true", "false"], **_default(answer(default))}
    if parameter.default_from:
        default = OBSERVED
        choices = _with_observed(choices)
    if choices is not None:
        texts = [str(c) for c in choices] if isinstance(choices, list) else choices
        return {**question, "type": "multiplechoice", "choices": texts, **_default(answer(default))}
    if parameter.type in ("integer", "number") and not parameter.default_from:
        kind = "integer" if parameter.type == "integer" else "float"
        # Outwards: AWX knows whole numbers as bounds only.
        low = {} if parameter.minimum is None else {"min": math.floor(parameter.minimum)}
        high = {} if parameter.maximum is None else {"max": math.ceil(parameter.maximum)}
        return {**question, "type": kind, **low, **high, **_default(default)}
    return {**question, "type": "text", "min": 0, "max": 1024, **_default(answer(default))}


def _default(value: Any) -> dict[str, Any]:
    return {} if value is None else {"default": value}


def answer(value: Any) -> Any:
    """A value as AWX's multiple choice and text have it."""
    return str(value).lower() if isinstance(value, bool) else value if value is None else str(value)


def _with_observed(choices: list[Any] | str | None) -> list[Any] | str | None:
    if isinstance(choices, str):
        inner = re.fullmatch(r"\s*\{\{(.*)\}\}\s*", choices, flags=re.DOTALL)
        return f"{{{{ ['{OBSERVED}'] + ({inner[1].strip()}) }}}}" if inner else None
    return None if choices is None else [OBSERVED, *choices]


def _description(parameter: Parameter) -> str:
    said = []
    if parameter.default_from:
        said.append(f"{OBSERVED}: what is found when the run begins")
    if parameter.pattern:
        said.append(f"matches {parameter.pattern}")
    for word, bound in (("at least", parameter.minimum), ("at most", parameter.maximum)):
        if bound is not None:
            said.append(f"{word} {bound:g}")
    return "; ".join(said)


# -- the workflow


def _workflow(runbook: Definition) -> dict[str, Any]:
    workflow: dict[str, Any] = {
        "name": runbook.name,
        "description": runbook.title,
        "allow_simultaneous": False,
    }
    questions = survey(runbook)
    if questions:
        workflow["survey"] = questions
    workflow["nodes"] = nodes(runbook)
    if runbook.schedule:
        workflow["schedules"] = [_schedule(runbook, schedule) for schedule in runbook.schedule]
    return workflow


def nodes(runbook: Definition) -> list[dict[str, Any]]:
    """begin, the approval of the plan, the steps in their order with their approvals, and the undo.

    The approval of the plan is always here: the role leaves it out, or multiplies it, as the environment wants it.
    """
    found: list[dict[str, Any]] = []

    def job(identifier: str, name: str, **more: Any) -> None:
        found.append({"identifier": identifier, "job_template": f"{runbook.name} / {name}", **more})

    def entry(step: Step) -> str:
        return f"{step.id}.approval" if step.approval else step.id

    first = entry(runbook.steps[0])
    job("begin", "begin", success=["approval"])
    found.append(_approval("approval", f"Approve the plan of {runbook.name}", runbook.title, "approved"))
    job("approved", "approved", all_parents_must_converge=True, success=[first])
    for number, step in enumerate(runbook.steps):
        if step.approval:
            found.append(
                _approval(entry(step), f"Approve {step.id} of {runbook.name}", step.title, f"{step.id}.approved")
            )
            job(f"{step.id}.approved", f"{step.id} approved", success=[step.id])
        following = runbook.steps[number + 1 : number + 2]
        edges: dict[str, Any] = {"success": [entry(s) for s in following]} if following else {}
        if step.on_failure == "undo":
            edges["failure"] = ["undo"]
        job(step.id, step.id, **edges)
    if any(step.on_failure == "undo" for step in runbook.steps):
        job("undo", "undo")
    return found


def _approval(identifier: str, name: str, title: str, then: str) -> dict[str, Any]:
    return {
        "identifier": identifier,
        "approval": {
            "name": name,
            "description": title,
            "timeout": "{{ runbook_approval_s | default(14400) | int }}",
        },
        "success": [then],
    }


def _schedule(runbook: Definition, schedule: Schedule) -> dict[str, Any]:
    parameters = {
        variable(runbook.parameters[name]): value
        if runbook.parameters[name].type in ("integer", "number") and runbook.parameters[name].choices is None
        else answer(value)
        for name, value in schedule.parameters.items()
    }
    return {"name": schedule.name, "rrule": rrule(schedule.rrule), "extra_data": parameters}


def rrule(rule: str) -> str:
    """A definition's rule as AWX wants it: with a start, at the rule's own time of day, in the environment's time zone.

    AWX takes the time of day from the start, wants an INTERVAL and knows no fractions of a day otherwise.
    """
    if "DTSTART" in rule:
        return rule
    parts = dict(part.split("=", 1) for part in rule.removeprefix("RRULE:").split(";") if "=" in part)
    hour, minute = (int(parts.get(name, "0").split(",")[0]) for name in ("BYHOUR", "BYMINUTE"))
    parts.setdefault("INTERVAL", "1")
    words = ";".join(f"{name}={value}" for name, value in parts.items())
    return f"DTSTART;TZID={{{{ runbook_timezone | default('UTC') }}}}:20260101T{hour:02d}{minute:02d}00 RRULE:{words}"
