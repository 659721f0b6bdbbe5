"""``runbook awx export`` and ``runbook awx compare``: what the runbooks are in AWX, and whether a live one has them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from runbooks import errors
from runbooks.commands.common import add_inventory, given_inventory, print_json
from runbooks.errors import Problem


def arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="WHAT", required=True, dest="what")
    export = commands.add_parser("export", help="write the runbooks' objects of AWX")
    export.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a file is not up to date")
    compare = commands.add_parser("compare", help="what differs in the AWX of CONTROLLER_HOST (exit code 1), unchanged")
    add_inventory(compare)
    compare.add_argument("--vars", metavar="FILE", help="further variables, as ansible-playbook -e @FILE")


def main(arguments: argparse.Namespace) -> int:
    return _export(arguments) if arguments.what == "export" else _compare(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from runbooks import awx, definition
    from runbooks.commands.generate import bring_up_to_date

    expected = awx.export(definition.load(name) for name in definition.files())
    return bring_up_to_date(arguments, expected, "runbook awx export")


def _compare(arguments: argparse.Namespace) -> int:
    inventory = given_inventory(arguments)
    changes = differences(inventory, Path(arguments.vars) if arguments.vars else None)
    if arguments.json:
        print_json({"changes": changes})
    else:
        for change in changes:
            fields = f" ({', '.join(change['fields'])})" if change["action"] == "change" else ""
            print(f"{change['action']}: {change['kind'].replace('_', ' ')} {change['name']}{fields}")
        print(f"{len(changes)} differences" if changes else "The AWX has everything as the definitions say.")
    if changes:
        print(f"next: ansible-playbook -i {inventory} playbooks/awx.yml --diff", file=sys.stderr)
        return errors.FAILED
    return errors.OK


def differences(inventory: Path, extra: Path | None = None) -> list[dict[str, Any]]:
    """What playbooks/awx.yml would change, found by its check mode. Raises Problem with what the AWX, or Ansible, said.

    extra: a file with further variables. The AWX is that of the inventory's awx_controller_host or CONTROLLER_HOST.
    """
    import os
    import shlex
    import tempfile

    import ansible_runner

    from runbooks.environment import ANSIBLE_CONFIG, ROOT
    from runbooks.step import message

    playbook = ROOT / "playbooks" / "awx.yml"
    if not playbook.is_file():
        raise Problem(
            f"There is no {playbook}: the runbooks are installed here, without the project around them",
            code="awx-no-playbook",
            next_command="git clone PROJECT",
        )
    found: dict[str, Any] = {}
    said: list[str] = []

    def take(event: dict[str, Any]) -> bool:
        data = event.get("event_data") or {}
        kind, result = event.get("event"), data.get("res") or {}
        if kind == "runner_on_ok" and data.get("task_action") == "censuschat.infra.awx_content":
            found["changes"] = result.get("changes", [])
        elif kind in ("runner_on_failed", "runner_on_unreachable"):
            said.append(message(result))
        elif kind == "verbose" and str(event.get("stdout", "")).strip():
            said.append(str(event["stdout"]).strip())
        return False

    words = ["--check", *(["-e", f"@{extra.resolve()}"] if extra else [])]
    with tempfile.TemporaryDirectory(prefix="runbook-awx-") as directory:
        ansible_runner.run(
            private_data_dir=directory,
            playbook=str(playbook),
            inventory=str(inventory.resolve()),
            cmdline=shlex.join(words),
            envvars={"ANSIBLE_CONFIG": os.environ.get("ANSIBLE_CONFIG", str(ANSIBLE_CONFIG))},
            settings={"suppress_output_file": True},
            project_dir=str(ROOT),
            quiet=True,
            event_handler=take,
        )
    if "changes" not in found:
        raise Problem(
            f"The AWX could not be compared: {said[-1] if said else 'ansible-playbook said nothing'}",
            code="awx-not-compared",
            next_command=f"ansible-playbook -i {inventory} playbooks/awx.yml --check --diff",
        )
    changes: list[dict[str, Any]] = found["changes"]
    return changes
