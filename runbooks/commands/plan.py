"""``runbook plan``: what a runbook would change, found by running every step in check mode."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from runbooks import errors
from runbooks.commands.common import (
    add_inventory,
    add_parameters,
    add_runbook,
    add_secrets,
    given_inventory,
    given_order,
    given_parameters,
    print_json,
)

if TYPE_CHECKING:
    from runbooks.approvals import Policy
    from runbooks.cli import Parser
    from runbooks.plan import Plan
    from runbooks.session import Warm


def arguments(parser: Parser) -> None:
    add_runbook(parser)
    add_inventory(parser)
    add_secrets(parser)
    add_parameters(parser)


def _together(run: str, inventory: Path, leave_out: Collection[Path]) -> Warm:
    """Processes that all warm up at once: a plan has nothing running that the machine should be left to."""
    from runbooks.session import Warm

    class Together(Warm):
        def _warm_up(self) -> None:
            while not self._closed.is_set():
                with self._mutex:
                    if self._waiting:
                        playbook, timeout_s = self._waiting.pop(0)
                        if playbook not in leave_out:
                            self._ready.append(self._make(playbook, timeout_s))
                        continue
                self._closed.wait(0.05)

    return Together(run, inventory)


def main(arguments: argparse.Namespace) -> int:
    from runbooks import definition, plan, request, session
    from runbooks.journal import opened
    from runbooks.locks import Process
    from runbooks.progress import choose

    runbook = definition.load(arguments.name)
    given = given_parameters(arguments)
    inventory = given_inventory(arguments)
    run = f"plan-{request.new_run(runbook)}"
    # Gates are about what is there when their step's turn has come.
    gates = {gate.playbook for step in runbook.steps for gate in (*step.before, *step.after)}
    warm = _together(run, inventory, gates)
    quiet = arguments.json or not sys.stderr.isatty()
    with session.signals() as stop:
        try:
            here = session.Session(run, warm, choose(as_json=arguments.json), stop, given_order(arguments))
            asked = request.prepare(runbook, inventory, given, here, planning=True)
            policy = plan.policy_of(runbook, asked.environment)
            with opened(asked.environment.open_journal()) as journal:
                asked.environment.remember(journal)
                made = plan.make(
                    asked,
                    here,
                    earlier=plan.seconds_of_earlier_runs(journal, runbook),
                    who=Process.current().who,
                    told=lambda step: None if quiet else print(f"  checking {step.id}", file=sys.stderr),
                )
                plan.keep(journal, made, policy)
        except session.Interrupted:
            raise KeyboardInterrupt from None
        finally:
            warm.close()
    if arguments.json:
        print_json({**plan.document(made, policy), "next": next_command(made, policy, given)})
    else:
        show(made, policy)
        print(f"next: {next_command(made, policy, given)}")
    return errors.REFUSED if made.obstacle else errors.OK


def next_command(plan: Plan, policy: Policy, given: dict[str, str]) -> str:
    """What to do with the plan."""
    from runbooks.plan import SHORT

    if plan.obstacle:
        return f"runbook show {plan.runbook}"
    if policy.need:
        return f"runbook approve {plan.hash[:SHORT]} -i {plan.inventory} --as NAME"
    words = "".join(f" --param {name}={value}" for name, value in given.items())
    return f"runbook run {plan.runbook} -i {plan.inventory}{words} --plan {plan.hash[:SHORT]}"


def show(plan: Plan, policy: Policy, stream: TextIO | None = None) -> None:
    """The plan for people."""
    from runbooks.plan import SHORT
    from runbooks.windows import span

    out = stream or sys.stdout

    def line(text: str = "") -> None:
        print(text, file=out)

    parameters = " ".join(f"{name}={value}" for name, value in plan.parameters.items())
    line(f"plan {plan.hash[:SHORT]}: {plan.runbook} {parameters} on {plan.environment}, {span(plan.estimate_s)} in all")
    if plan.left_out:
        line(f"without {', '.join(plan.left_out)}, which do not answer")
    for step in plan.steps:
        line()
        if not step.reached:
            line(f"{step.id}: {step.title} (not reached)")
            continue
        source = f"median of {step.earlier} earlier runs" if step.earlier else "its budget"
        line(f"{step.id}: {step.title} ({span(step.estimate_s)}, {source})")
        for title in step.gates:
            line(f"  gate {title}")
        for change in step.changes:
            line(f"  ~ {change.words()}")
            for mark, text in (("-", change.before), ("+", change.after)):
                for row in text.splitlines():
                    line(f"      {mark} {row}")
        if step.repeated:
            line(f"  {step.repeated} changes of the steps before it would be made by then")
        if not step.changes and not step.obstacle:
            line("  changes nothing")
        if step.says:
            line(f"  {step.says}")
        if step.obstacle:
            line(f"  {'would refuse' if step.obstacle.refused else 'would fail'}: {step.obstacle.why}")
    line()
    line(f"{plan.changes} changes; takes {policy.words()}")
    line(f"hash {plan.hash}")
