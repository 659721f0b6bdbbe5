# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What runbooks are in one environment's AWX: the generated content, completed with what is the environment's own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EVENTS = ("started", "success", "error", "approvals")
"""Of what a notification template can tell; job templates are silent, their workflow tells."""


@dataclass(frozen=True)
class Own:
    """What is the environment's own.

    approvals: runbook or "*" -> {need: how many people}, before the runbook's own. notify: event -> names of
    notification templates. credentials: part of a runbook ("*" for all) -> names of credentials.
    """

    environment: str
    project: str
    inventory: str
    label: str
    execution_environment: str | None = None
    credentials: Mapping[str, list[str]] = field(default_factory=dict)
    instance_groups: tuple[str, ...] = ()
    forks: int = 0
    approvals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notify: Mapping[str, list[str]] = field(default_factory=dict)


def complete(runbooks: Iterable[Mapping[str, Any]], own: Own) -> dict[str, list[dict[str, Any]]]:
    """The job and workflow templates of all runbooks. Raises ValueError when one is not as ``runbook generate`` makes
    them."""
    found: dict[str, list[dict[str, Any]]] = {"job_templates": [], "workflow_job_templates": []}
    for runbook in runbooks:
        try:
            name = str(runbook["runbook"])
            need = int(_policy(name, own.approvals).get("need", runbook["approvals"]["need"]))
            found["job_templates"] += [_job(template, own) for template in runbook["job_templates"]]
            for workflow in runbook["workflow_job_templates"]:
                found["workflow_job_templates"].append(_workflow(workflow, need, own))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a runbook's content as `runbook generate` makes it ({error})") from error
    return found


def _policy(runbook: str, approvals: Mapping[str, Any]) -> Mapping[str, Any]:
    policy = approvals.get(runbook, approvals.get("*", {}))
    return policy if isinstance(policy, Mapping) else {}


def _named(name: str, own: Own) -> str:
    return f"{own.environment} / {name}"


def _job(template: Mapping[str, Any], own: Own) -> dict[str, Any]:
    job = copy.deepcopy(dict(template))
    awx = job["extra_vars"]["runbook_awx"]
    awx["environment"] = own.environment
    credentials = [*own.credentials.get("*", []), *own.credentials.get(awx["part"], [])]
    return {
        **job,
        "name": _named(job["name"], own),
        "project": own.project,
        "inventory": own.inventory,
        "execution_environment": own.execution_environment,
        "credentials": sorted(set(credentials)),
        "instance_groups": list(own.instance_groups),
        "labels": [own.label],
        "forks": own.forks,
    }


def _workflow(template: Mapping[str, Any], need: int, own: Own) -> dict[str, Any]:
    workflow = copy.deepcopy(dict(template))
    workflow["name"] = _named(workflow["name"], own)
    workflow["labels"] = [own.label]
    workflow["nodes"] = approved(workflow["nodes"], need)
    for node in workflow["nodes"]:
        if node.get("job_template"):
            node["job_template"] = _named(node["job_template"], own)
    for event in EVENTS:
        workflow[f"notification_templates_{event}"] = list(own.notify.get(event, []))
    return workflow


def approved(nodes: Iterable[dict[str, Any]], need: int) -> list[dict[str, Any]]:
    """The nodes with as many approvals of the plan as people are needed: none, or all at once and each by another."""
    found = {node["identifier"]: node for node in nodes}
    approval, after = found.pop("approval"), found["approved"]
    if need == 0:
        del found["approved"]
        found["begin"]["success"] = after["success"]
        return list(found.values())
    gates = []
    for number in range(1, need + 1):
        gate = copy.deepcopy(approval)
        if need > 1:
            gate["identifier"] = f"approval-{number}"
            gate["approval"]["name"] = f"{gate['approval']['name']} ({number} of {need}, each by another person)"
        gates.append(gate)
    found["begin"]["success"] = [gate["identifier"] for gate in gates]
    begin = found.pop("begin")
    return [begin, *gates, *found.values()]
