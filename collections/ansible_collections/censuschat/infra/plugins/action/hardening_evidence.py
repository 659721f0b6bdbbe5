# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Glue: what Ansible knows of the play's nodes in, the environment's evidence out. Works on the controller alone."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence import documents, files
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence import report as model

ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["present", "begun", "shown"], "default": "present"},
    "environment_name": {"type": "str", "required": True},
    "directory": {"type": "path"},
    "report": {"type": "str", "default": "hardening_report"},
    "expected": {"type": "list", "elements": "str"},
    "metrics": {"type": "path"},
    "keep": {"type": "int", "default": 50},
    "secrets": {"type": "list", "elements": "str", "default": [], "no_log": True},
}


class ActionModule(ActionBase):
    """One task a play."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        given = self.validate_argument_spec(argument_spec=ARGUMENTS)[1]
        try:
            _check(given)
            return {**result, **self._done(given, task_vars)}
        except model.EvidenceError as error:
            return {**result, "failed": True, "msg": f"Hardening evidence of {given['environment_name']}: {error}"}

    def _done(self, given: Mapping[str, Any], task_vars: Mapping[str, Any]) -> dict[str, Any]:
        environment = given["environment_name"]
        directory = os.path.abspath(given["directory"] or files.default_directory(environment, os.environ))
        if given["state"] == "shown":
            report = files.read(directory)
            if report is None:
                raise model.EvidenceError(f"there is none in {directory} yet; run censuschat.infra.harden")
            return _result(directory, report, changed=False)
        if self._task.check_mode:
            old = files.read(directory)
            report, differs, planned = _planned(given, task_vars, directory, old)
            paths = [*(os.path.join(directory, p) for p in (*planned.write, *planned.remove)), *planned.copies]
            done = _result(directory, report, changed=differs, old=old, begun=given["state"] == "begun")
            return {**done, "would_write": paths}
        with files.locked(directory):
            old = files.read(directory)
            report, differs, planned = _planned(given, task_vars, directory, old)
            files.apply(directory, planned)
        return _result(directory, report, changed=differs, old=old, begun=given["state"] == "begun")


def _planned(
    given: Mapping[str, Any], task_vars: Mapping[str, Any], directory: str, old: Mapping[str, Any] | None
) -> tuple[dict[str, Any], bool, files.Plan]:
    now = datetime.datetime.now(datetime.UTC)
    # Tasks run in processes that ansible-playbook starts: the parent is the run.
    process = files.process(os.getppid())
    identifier = f"{now:%Y%m%dT%H%M%SZ}-{os.getppid()}"
    run = model.Run(identifier, model.iso(now), model.iso(now), process)
    over = files.over(old["begun"] if old else {}, now.timestamp())
    environment = given["environment_name"]
    there = files.kept(directory)
    copy = given["metrics"] or ""
    if given["state"] == "begun":
        report = model.begin(old, run, _nodes(task_vars), environment, over=over, keep=given["keep"])
        return report, False, files.plan(report, there, given["keep"], entry=False, copy=copy)
    found = list(_found(task_vars, given["report"]))
    known = [node["name"] for node in old["nodes"]] if old else []
    expected = known if given["expected"] is None else given["expected"]
    secrets = [*given["secrets"], *_vaulted(task_vars, given["report"])]
    report, differs = model.end(old, run, found, expected, environment, secrets=secrets, over=over, keep=given["keep"])
    return report, differs, files.plan(report, there, given["keep"], entry=differs, copy=copy)


def _check(given: Mapping[str, Any]) -> None:
    environment, metrics = given["environment_name"], given["metrics"]
    if not re.fullmatch(r"\w[\w. -]*", environment):
        raise model.EvidenceError(f"environment_name {environment!r} is no name: letters, digits and dashes will do")
    if given["keep"] < 2:
        raise model.EvidenceError(f"keep is {given['keep']}: a trend needs 2 at least")
    if metrics and not metrics.endswith(".prom"):
        raise model.EvidenceError(f"metrics {metrics}: node_exporter reads files whose names end in .prom only")


def _result(
    directory: str,
    report: Mapping[str, Any],
    *,
    changed: bool,
    old: Mapping[str, Any] | None = None,
    begun: bool = False,
) -> dict[str, Any]:
    sides = ["".join(f"{line}\n" for line in documents.summary(each)) if each else "" for each in (old, report)]
    diff = {"before": sides[0], "after": sides[1], "before_header": directory, "after_header": directory}
    return {
        **({"diff": diff} if changed else {}),
        "begun": begun,
        "changed": changed,
        "directory": directory,
        "page": os.path.join(directory, files.PAGE),
        "verdict": report["verdict"],
        "totals": report["totals"],
        "summary": documents.summary(report),
    }


def _nodes(task_vars: Mapping[str, Any]) -> list[str]:
    return [str(node) for node in task_vars.get("ansible_play_hosts_all") or []]


def _found(task_vars: Mapping[str, Any], name: str) -> Iterator[model.Seen]:
    """What came of each node of the play, as far as its turn has come."""
    left, turn = task_vars.get("ansible_play_hosts") or [], task_vars.get("ansible_play_batch") or []
    for node in _nodes(task_vars):
        variables = task_vars["hostvars"][node]
        report, failure = variables.get(name), variables.get("ansible_failed_result")
        told = failure or (isinstance(report, Mapping) and report and not report.get("begun"))
        if not told and node in left and node not in turn:
            # Of a batch that is still to come (serial).
            continue
        task = variables.get("ansible_failed_task") or {}
        yield model.seen(node, report, failure, node not in left, str(task.get("name") or ""))


def _vaulted(task_vars: Mapping[str, Any], report: str) -> list[str]:
    """The texts that the inventory keeps as vaulted strings."""
    from ansible.parsing.vault import EncryptedString

    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, EncryptedString):
            try:
                found.add(str(value))
            except AnsibleError:
                # Without the vault's password nobody can have used it in this run.
                return
        elif isinstance(value, Mapping):
            for each in value.values():
                look(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    for node in _nodes(task_vars):
        raw = task_vars["hostvars"].raw_get(node)
        look({key: value for key, value in raw.items() if key not in (report, "ansible_facts", "hostvars", "vars")})
    return sorted(found)
