# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Selects the controls on the controller, runs the module once, and brings sshd in with proof when it must change."""

from __future__ import annotations

import glob
import os
from typing import Any

import yaml
from ansible.module_utils.common.yaml import yaml_load
from ansible.plugins.action import ActionBase
from ansible_collections.censuschat.infra.plugins.module_utils.node import controls as model
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError
from ansible_collections.censuschat.infra.plugins.plugin_utils import sshd_guard

_RESULTS = ("pass", "changed", "failed", "excluded", "not_applicable")


class ActionModule(ActionBase):
    """One task a node; a second call only while sshd changes."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        arguments = dict(self._task.args)
        try:
            catalogue = model.catalogue(_documents(arguments.get("catalogue"), arguments.get("own") or []))
            selection = model.select(
                catalogue,
                arguments.get("profile", "cis_level1"),
                include=arguments.get("include") or [],
                exclude=arguments.get("exclude") or {},
                overrides=arguments.get("overrides") or {},
            )
        except NodeError as error:
            return {**result, "failed": True, "msg": str(error)}
        sent = {
            "controls": [c.wire() for c in selection.controls],
            "audit_only": arguments.get("audit_only", False),
            "provable": sshd_guard.by_ssh(self),
        }
        done: dict[str, Any] = self._execute_module("censuschat.infra.node_harden", sent, task_vars=task_vars)
        result.update(done)
        settings = result.pop("sshd", {})
        if result.get("failed") or result.get("unreachable"):
            return result
        outcomes = {c["id"]: c for c in result["controls"]}
        if settings:
            self._sshd(settings, selection, outcomes, result, task_vars)
        result["controls"] = _report(catalogue, selection, outcomes)
        result["counts"] = {r: sum(c["result"] == r for c in result["controls"]) for r in _RESULTS}
        failed = [c for c in result["controls"] if c["result"] == "failed"]
        if failed and not sent["audit_only"]:
            result["failed"] = True
            texts = dict.fromkeys(f"{c['id']}: {c['detail']}" for c in failed)
            result["msg"] = f"{len(failed)} controls do not hold. " + " | ".join(texts)
        return result

    def _sshd(
        self,
        settings: dict[str, Any],
        selection: model.Selection,
        outcomes: dict[str, dict[str, str]],
        result: dict[str, Any],
        task_vars: dict[str, Any],
    ) -> None:
        changed = sshd_guard.change(self, {"settings": settings}, task_vars)
        result["changed"] = bool(result["changed"] or changed.get("changed"))
        if not changed.get("failed"):
            return
        for control in selection.controls:
            outcome = outcomes[control.id]
            if control.state.get("sshd") and outcome["result"] == "changed":
                outcome.update(result="failed", detail=str(changed.get("msg")))


def _documents(directory: str | None, own: list[Any]) -> list[tuple[str, Any]]:
    documents: list[tuple[str, Any]] = []
    if directory:
        paths = sorted(glob.glob(os.path.join(directory, "*.yml")))
        if not paths:
            raise NodeError(f"hardening catalogue: no *.yml files in {directory}")
        for path in paths:
            with open(path, encoding="utf-8") as handle:
                try:
                    documents.append((os.path.basename(path), yaml_load(handle)))
                except yaml.YAMLError as error:
                    raise NodeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if own:
        documents.append(("own controls", own))
    return documents


def _report(
    catalogue: dict[str, model.Control], selection: model.Selection, outcomes: dict[str, dict[str, str]]
) -> list[dict[str, str]]:
    excluded = {control.id: reason for control, reason in selection.excluded}
    report = []
    for control in catalogue.values():
        about = {"id": control.id, "title": control.title, "domain": control.domain, "severity": control.severity}
        if control.id in excluded:
            report.append({**about, "result": "excluded", "detail": excluded[control.id]})
        elif control.id in outcomes:
            report.append({**about, **outcomes[control.id]})
    return report
