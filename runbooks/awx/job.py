"""What a workflow's own jobs do inside AWX: ``python -m runbooks.awx.job begin|approved``.

``begin`` checks everything that a run needs, observes the parameters that are left to that, and makes the plan when
people must approve it. ``approved`` asks AWX who approved and puts that into the journal, bound to the plan's hash; the
first step's job then plans again and refuses when the world has changed. The steps themselves are the callback's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from runbooks import errors
from runbooks.awx import OBSERVED, variable
from runbooks.definition import Definition
from runbooks.errors import Problem, Refused

TIMEOUT_S = 30.0
"""Seconds that AWX has for one answer."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runbooks.awx.job")
    parser.add_argument("part", choices=["begin", "approved"])
    parser.add_argument("runbook")
    parser.add_argument("-i", "--inventory", required=True)
    parser.add_argument("--run", required=True, help="awx-ID of the workflow's job")
    parser.add_argument("--who", default="", help="the AWX user who started the workflow")
    parser.add_argument("--plan", default="", help="hash of the plan")
    parser.add_argument("--step", default="", help="the step that was approved; empty: the plan")
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(begin(arguments) if arguments.part == "begin" else approved(arguments)))
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return errors.OK


def answers(definition: Definition, given: Mapping[str, Any]) -> dict[str, str]:
    """The parameters that the survey's answers name; what was left out, or left to be observed, is not among them.

    given: variable of the survey -> answer. Raises Problem for a variable that no parameter has.
    """
    found = {}
    for parameter in definition.parameters.values():
        value = given.get(variable(parameter))
        if value in (None, "") or (parameter.default_from and value == OBSERVED) or parameter.secret:
            continue
        found[parameter.name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the later jobs have to know: observed parameters, the run's id, and the plan's hash when there is one.

    The survey's answers come on standard input as JSON. Raises Problem, also when the plan would end in a step.
    """
    from runbooks import definition, plan, request, session
    from runbooks.journal import opened
    from runbooks.progress import choose

    runbook = definition.load(arguments.runbook)
    given = answers(runbook, json.loads(sys.stdin.read() or "{}"))
    inventory = Path(arguments.inventory)
    name = f"plan-{request.new_run(runbook)}"
    warm = session.Warm(name, inventory)
    with session.signals() as stop:
        try:
            here = session.Session(name, warm, choose(as_json=True), stop)
            asked = request.prepare(runbook, inventory, given, here, planning=True)
            enough_hosts(runbook, len(asked.environment.hosts()), inventory)
            policy = plan.policy_of(runbook, asked.environment)
            found: dict[str, Any] = {
                "runbook_run": arguments.run,
                "runbook_plan": "",
                **{p.name: asked.parameters[p.name] for p in runbook.parameters.values() if p.default_from},
            }
            if not policy.need:
                return {**found, "says": f"{runbook.name} on {asked.environment.name} needs no approval"}
            with opened(asked.environment.open_journal()) as journal:
                earlier = plan.seconds_of_earlier_runs(journal, runbook)
                made = plan.make(asked, here, earlier=earlier, who=arguments.who)
                plan.keep(journal, made, policy)
        except session.Interrupted:
            raise KeyboardInterrupt from None
        finally:
            warm.close()
    if made.obstacle:
        step, obstacle = made.obstacle
        raise Refused(
            f"The plan of {runbook.name} would end in step {step.id}: {obstacle.why}",
            code="awx-plan-ends",
            next_command=f"runbook plan {runbook.name} -i {inventory}",
        )
    says = f"Plan {made.hash[: plan.SHORT]}: {made.changes} changes, some {made.estimate_s:.0f} s"
    return {**found, "runbook_plan": made.hash, "says": f"{says}; takes {policy.words()}"}


def enough_hosts(runbook: Definition, hosts: int, inventory: Path) -> None:
    """Raises Refused when AWX would make fewer slices of a step than its jobs wait for: never more than hosts."""
    for step in runbook.steps:
        if hosts < step.slices:
            raise Refused(
                f"Step {step.id} of {runbook.name} is for {step.slices} slices, and the inventory has {hosts} "
                "enabled hosts, of which AWX makes fewer",
                code="awx-few-hosts",
                next_command=f"ansible-inventory -i {inventory} --list",
            )


# -- who approved


@dataclass(frozen=True, slots=True)
class Given:
    """One approval as AWX knows it. at: unix seconds."""

    node: str
    name: str
    id: int
    at: float


def approved(arguments: argparse.Namespace) -> dict[str, Any]:
    """Put the approvals of the workflow's nodes before this job into the journal. Raises Problem, Refused."""
    from runbooks import definition, plan
    from runbooks.approvals import Approval, Subject
    from runbooks.environment import Environment
    from runbooks.journal import opened

    runbook = definition.load(arguments.runbook)
    environment = Environment(Path(arguments.inventory))
    policy = plan.policy_of(runbook, environment)
    wanted = f"{arguments.step}.approval" if arguments.step else "approval"
    host, found = _ask(arguments.run.removeprefix("awx-"), wanted)
    names = [given.name for given in found]
    if policy.another and arguments.who in names:
        raise Refused(
            f"{arguments.who} started the workflow and approved it, and it takes another person",
            code="awx-approval-own",
            next_command=f"runbook show {runbook.name}",
        )
    if len(set(names)) < len(names):
        raise Refused(
            f"{names[0]} approved more than once, and it takes {policy.need} people",
            code="awx-approval-twice",
            next_command=f"runbook show {runbook.name}",
        )
    subject = Subject(environment.name, arguments.plan, arguments.run if arguments.step else "", arguments.step)
    with opened(environment.open_journal()) as journal:
        for given in found:
            awx = json.dumps({"approval": given.id, "host": host}, sort_keys=True)
            approval = Approval(subject, given.name, given.at, given.at + policy.valid_s, door="awx", awx=awx)
            where = subject.run or plan.PSEUDO + subject.plan
            journal.record("approval_given", where, subject.step or None, approval.document(), door="awx")
        judgement = plan.judged(journal, environment, subject, policy, who=arguments.who)
    if not arguments.step and judgement.missing:
        raise Refused(
            f"The plan {arguments.plan[: plan.SHORT]} is not approved: {judgement.words()}",
            code="awx-approval-missing",
            next_command=f"ansible-inventory -i {environment.path} --list",
        )
    return {"says": f"Approved by {', '.join(names)}"}


def _ask(workflow: str, wanted: str) -> tuple[str, list[Given]]:
    """AWX's address, and who approved at the workflow job's nodes of that name ("approval", "approval-2")."""
    host, token = os.environ.get("CONTROLLER_HOST", ""), os.environ.get("CONTROLLER_OAUTH_TOKEN", "")
    if not host or not token:
        raise Problem(
            "The job has no credential that says which AWX to ask who approved, and lets it in (type Red Hat Ansible "
            "Automation Platform)",
            code="awx-no-credential",
            next_command="ansible-playbook playbooks/awx.yml --check --diff",
        )
    return host, read(workflow, wanted, lambda path: _get(host, token, path))


def read(workflow: str, wanted: str, get: Any) -> list[Given]:
    """The approvals of a workflow's job; get: path -> JSON. Raises Refused when there is none."""
    found = []
    for node in get(f"/api/v2/workflow_jobs/{workflow}/workflow_nodes/?page_size=200")["results"]:
        name = str(node["identifier"])
        if name != wanted and not name.startswith(f"{wanted}-"):
            continue
        if not node.get("job"):
            continue
        approval = get(f"/api/v2/workflow_approvals/{node['job']}/")
        person = (approval["summary_fields"].get("approved_or_denied_by") or {}).get("username")
        if approval["status"] == "successful" and person:
            at = approval.get("finished") or approval["modified"]
            found.append(Given(name, str(person), int(approval["id"]), datetime.fromisoformat(at).timestamp()))
    if not found:
        raise Refused(
            f"AWX knows of no approval in workflow job {workflow}",
            code="awx-approval-none",
            next_command="runbook runs",
        )
    return found


def _get(host: str, token: str, path: str) -> Any:
    import urllib3

    verify = os.environ.get("CONTROLLER_VERIFY_SSL", "true").lower() not in ("false", "0", "no", "off")
    pool = urllib3.PoolManager(cert_reqs="CERT_REQUIRED" if verify else "CERT_NONE")
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    try:
        answer = pool.request("GET", host.rstrip("/") + path, headers=headers, timeout=TIMEOUT_S, redirect=False)
    except urllib3.exceptions.HTTPError as error:
        raise Problem(
            f"AWX at {host} does not answer who approved ({error})",
            code="awx-unreachable",
            next_command=f"curl -sv {host}/api/v2/ping/",
        ) from error
    if answer.status != 200:
        raise Problem(
            f"AWX at {host} does not say who approved ({path}: HTTP {answer.status})",
            code="awx-refuses",
            next_command=f"curl -sv {host}/api/v2/ping/",
        )
    return json.loads(answer.data)


if __name__ == "__main__":
    sys.exit(main())
