"""``runbook approve``: sign a plan, or a step of a run that waits for it."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runbooks import errors
from runbooks.commands.common import add_inventory, print_json
from runbooks.errors import Problem, Refused, Stopped

if TYPE_CHECKING:
    from runbooks.approvals import Policy, Subject
    from runbooks.environment import Environment
    from runbooks.journal import Journal
    from runbooks.plan import Plan

HASH = re.compile(r"[0-9a-fA-F]{6,64}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="HASH|RUN", help="a plan's hash or its beginning, or a run that waits")
    parser.add_argument(
        "--as", dest="approver", metavar="NAME", required=True, help="who you are: the key to sign with"
    )
    add_inventory(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be approved. plan: None for a step of a run that was begun without one."""

    subject: Subject
    environment: Environment
    plan: Plan | None
    policy: Policy
    title: str
    next_command: str


def main(arguments: argparse.Namespace) -> int:
    from runbooks import approvals, keys
    from runbooks import plan as plans
    from runbooks.commands.plan import show
    from runbooks.journal import opened

    journal, target = _find(arguments)
    with opened(journal):
        key = keys.load(arguments.approver)
        _may(arguments.approver, keys.public(key), target)
        judgement = plans.judged(journal, target.environment, target.subject, target.policy, who="")
        if arguments.approver in judgement.names:
            raise Refused(
                f"{arguments.approver} has approved {target.title} already ({judgement.words()})",
                code="approval-given-already",
                next_command=target.next_command,
            )
        if target.plan and target.plan.obstacle:
            step, obstacle = target.plan.obstacle
            raise Refused(
                f"There is nothing to approve: the plan ends in step {step.id}: {obstacle.why}",
                code="plan-refused",
                next_command=f"runbook plan {target.plan.runbook} -i {target.environment.path}",
            )
        if not arguments.json and target.plan:
            show(target.plan, target.policy, sys.stderr)
        if not arguments.yes:
            _confirm(target, arguments)
        now = round(time.time(), 3)
        expires = now + target.policy.valid_s
        signature = keys.sign(key, approvals.statement(target.subject, arguments.approver, now, expires))
        approval = approvals.Approval(target.subject, arguments.approver, now, expires, keys.public(key), signature)
        where = target.subject.run or plans.PSEUDO + target.subject.plan
        journal.record("approval_given", where, target.subject.step or None, approval.document())
        judgement = plans.judged(journal, target.environment, target.subject, target.policy, who="")
    if arguments.json:
        print_json(
            {
                **approval.document(),
                "names": list(judgement.names),
                "need": judgement.need,
                "missing": judgement.missing,
                "next": target.next_command,
            }
        )
        return errors.OK
    until = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(expires))
    print(f"{arguments.approver} has approved {target.title} until {until}: {judgement.words()}")
    if not judgement.missing:
        print(f"next: {target.next_command}")
    return errors.OK


def _find(arguments: argparse.Namespace) -> tuple[Journal, Target]:
    """The journal and what of it is meant. Raises Problem."""
    from runbooks import journal as journals
    from runbooks import plan as plans
    from runbooks.environment import Environment

    environment = Environment(Path(arguments.inventory)) if arguments.inventory else None
    known = [environment.open_journal()] if environment else journals.open_known()
    if HASH.fullmatch(arguments.target):
        prefix = arguments.target.lower()
        for journal in known:
            if any(plan.hash.startswith(prefix) for plan in plans.kept(journal)):
                return journal, _of_plan(plans.find(journal, prefix), environment)
        raise Problem(
            f"No environment {'here ' if environment else 'known on this machine '}has a plan {arguments.target}",
            code="plan-unknown",
            next_command="runbook plan RUNBOOK -i INVENTORY",
        )
    journal, run = journals.find(arguments.target, known)
    return journal, _of_run(journal, run, environment)


def _of_plan(plan: Plan, environment: Environment | None) -> Target:
    from runbooks import definition
    from runbooks import plan as plans
    from runbooks.approvals import Subject
    from runbooks.environment import Environment

    environment = environment or Environment(Path(plan.inventory))
    words = "".join(f" --param {name}={value}" for name, value in plan.parameters.items())
    return Target(
        Subject(environment.name, plan.hash),
        environment,
        plan,
        plans.policy_of(definition.load(plan.runbook), environment),
        f"plan {plan.hash[: plans.SHORT]}",
        f"runbook run {plan.runbook} -i {environment.path}{words} --plan {plan.hash[: plans.SHORT]}",
    )


def _of_run(journal: Journal, run: str, environment: Environment | None) -> Target:
    from runbooks import definition
    from runbooks import plan as plans
    from runbooks.approvals import Subject
    from runbooks.environment import Environment

    state = journal.state(run)
    runbook = definition.load(state.runbook)
    step = next((s for s in runbook.steps if s.id in state.pending), None)
    if step is None or not step.approval:
        raise Refused(
            f"Run {run} does not wait for an approval", code="run-not-waiting", next_command=f"runbook status {run}"
        )
    environment = environment or Environment(Path(state.inventory))
    digest = plans.plan_of(journal, run)
    return Target(
        Subject(environment.name, digest, run, step.id),
        environment,
        plans.find(journal, digest) if digest else None,
        plans.step_policy(runbook, environment),
        f"step {step.id} ({step.title}) of run {run}",
        f"runbook resume {run}",
    )


def _may(name: str, public: str, target: Target) -> None:
    """Raises Refused when this key's approval would not count."""
    trusted = target.policy.approvers.get(name)
    if trusted is None:
        raise Refused(
            f"{name} is no approver of environment {target.environment.name}: runbook_approvers in its inventory has "
            f"{', '.join(sorted(target.policy.approvers)) or 'nobody'}",
            code="approver-unknown",
            next_command=f"runbook keys show {name}",
        )
    if trusted != public:
        raise Refused(
            f"The key {name} on this machine is not the one that runbook_approvers of environment "
            f"{target.environment.name} has for {name}",
            code="approver-key",
            next_command=f"runbook keys show {name}",
        )
    if target.policy.of is not None and name not in target.policy.of:
        raise Refused(
            f"The approval of {name} does not count for {target.title}, which takes {target.policy.words()}",
            code="approver-not-entitled",
            next_command=f"runbook approve {arguments_of(target)} --as {sorted(target.policy.of)[0]}",
        )


def arguments_of(target: Target) -> str:
    """How the target is named on the command line."""
    return f"{target.subject.run or target.subject.plan[:12]} -i {target.environment.path}"


def _confirm(target: Target, arguments: argparse.Namespace) -> None:
    if arguments.json or not sys.stdin.isatty():
        raise Problem(
            "An approval is asked for first, and there is no terminal to ask at",
            code="approval-without-terminal",
            next_command=f"runbook approve {arguments_of(target)} --as {arguments.approver} --yes",
        )
    print(f"Type approve to approve {target.title} as {arguments.approver}: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != "approve":
        raise Stopped(
            f"{target.title[:1].upper() + target.title[1:]} was not approved",
            code="not-approved",
            next_command=f"runbook approve {arguments_of(target)} --as {arguments.approver}",
        )
