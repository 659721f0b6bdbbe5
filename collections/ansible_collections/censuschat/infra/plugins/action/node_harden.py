# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Selects the controls on the controller, runs the module once, and proves what could have cut it off."""

from __future__ import annotations

import glob
import os
from typing import Any

import yaml
from ansible.module_utils.common.yaml import yaml_load
from ansible.plugins.action import ActionBase
from ansible_collections.censuschat.infra.plugins.module_utils.node import controls as model
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError
from ansible_collections.censuschat.infra.plugins.plugin_utils import node_troubles, sshd_guard

_MODULE = "censuschat.infra.node_harden"
_RESULTS = ("pass", "changed", "failed", "excluded", "not_applicable")
_ARGUMENTS = ("catalogue", "profile", "include", "exclude", "overrides", "own", "audit_only")


class ActionModule(ActionBase):
    """One task a node; further calls only while something changes that could cut the controller off."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        arguments = dict(self._task.args)
        node = str(task_vars.get("inventory_hostname", "this node"))
        profile = arguments.get("profile", "cis_level1")
        try:
            unknown = [name for name in arguments if name not in _ARGUMENTS]
            if unknown:
                raise NodeError(f"node_harden takes {', '.join(_ARGUMENTS)}, not {unknown[0]}")
            catalogue = model.catalogue(_documents(arguments.get("catalogue"), arguments.get("own") or []))
            selection = model.select(
                catalogue,
                profile,
                include=arguments.get("include") or [],
                exclude=arguments.get("exclude") or {},
                overrides=arguments.get("overrides") or {},
            )
        except NodeError as error:
            return {**result, "failed": True, "msg": f"{node}: {error}"}
        audit = bool(arguments.get("audit_only", False))
        sent = {
            "controls": [{**c.wire(), "asked_for": c.id in selection.included} for c in selection.controls],
            "audit_only": audit,
            "provable": sshd_guard.by_ssh(self),
        }
        done: dict[str, Any] = self._execute_module(_MODULE, sent, task_vars=task_vars)
        result.update(done)
        settings, token = result.pop("sshd", {}), result.pop("token", "")
        guarded = result.pop("guarded", [])
        if result.get("failed") or result.get("unreachable"):
            result["msg"] = node_troubles.sentence(node, result)
            return result
        outcomes = {c["id"]: c for c in result["controls"]}
        if token and self._prove(token, guarded, outcomes, task_vars):
            # What was undone has not changed the node.
            result["changed"] = any(outcome["result"] == "changed" for outcome in outcomes.values())
        if settings:
            self._sshd(settings, selection, outcomes, result, task_vars)
        result["controls"] = _report(catalogue, selection, outcomes)
        result["counts"] = {r: sum(c["result"] == r for c in result["controls"]) for r in _RESULTS}
        result["mode"] = "audit" if audit else "check" if self._task.check_mode else "apply"
        result["profile"] = profile
        failed = [c for c in result["controls"] if c["result"] == "failed"]
        if failed and not audit:
            result["failed"] = True
            texts = dict.fromkeys(f"{c['id']}: {c['detail']}" for c in failed)
            result["msg"] = f"{node}: {len(failed)} controls do not hold. " + " | ".join(texts)
        return result

    def _prove(
        self, token: str, guarded: list[str], outcomes: dict[str, dict[str, Any]], task_vars: dict[str, Any]
    ) -> str:
        """Have the node keep what it changed in PAM and firewall when a new connection becomes root, else undo it.

        Returns what went wrong, "" when it is kept.
        """
        problem = sshd_guard.prove(self, token, as_root=True)
        ended = self._execute_module(
            _MODULE, {"phase": "revert" if problem else "confirm", "token": token}, task_vars=task_vars
        )
        if ended.get("failed") or ended.get("unreachable"):
            problem = f"{problem}; {ended.get('msg')}" if problem else f"it was not kept: {ended.get('msg')}"
        elif problem:
            problem = f"after the change no new connection was possible: {problem}. It was undone."
        for identifier in guarded if problem else ():
            outcomes[identifier].update(result="failed", detail=problem)
        return problem

    def _sshd(
        self,
        settings: dict[str, Any],
        selection: model.Selection,
        outcomes: dict[str, dict[str, Any]],
        result: dict[str, Any],
        task_vars: dict[str, Any],
    ) -> None:
        arguments = {"settings": settings, "in_main": True, "run": result["run"]}
        changed = sshd_guard.change(self, arguments, task_vars)
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
    catalogue: dict[str, model.Control], selection: model.Selection, outcomes: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    excluded = {control.id: reason for control, reason in selection.excluded}
    report = []
    for control in catalogue.values():
        about = {
            "id": control.id,
            "title": control.title,
            "domain": control.domain,
            "severity": control.severity,
            "references": list(control.references),
        }
        if control.id in excluded:
            report.append({**about, "result": "excluded", "detail": excluded[control.id], "diff": []})
        elif control.id in outcomes:
            report.append({**about, **outcomes[control.id]})
    return report
