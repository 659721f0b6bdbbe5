# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The report as a page, as metrics and as lines for a terminal. Pure functions of the report."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import Metric, render_metrics
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence import report as model

PREFIX = "hardening_"
SAID = {
    "reported": "reported",
    "earlier": "not in the last run",
    "unreachable": "unreachable",
    "no_report": "no report",
    "never": "never reported",
}


@functools.cache
def _asset(name: str) -> str:
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as handle:
        return handle.read()


def html(report: Mapping[str, Any]) -> str:
    """One page that needs nothing beside it. Everything of the report's is escaped; the page may run no script."""
    style = _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["moment"] = moment
    domains: dict[str, list[Any]] = {}
    for control in report["controls"]:
        domains.setdefault(control["domain"], []).append(control)
    details = {(node["name"], control["id"]): control for node in report["nodes"] for control in node["controls"]}
    return environment.from_string(_asset("page.html.j2")).render(
        r=report,
        domains=domains,
        details=details,
        failing=sorted(
            (c for c in report["controls"] if c["failed_on"]),
            key=lambda c: (_rank(c["severity"]), -len(c["failed_on"]), c["id"]),
        ),
        excluded=_by_reason(report, "excluded"),
        not_applicable=_by_reason(report, "not_applicable"),
        changes=changes(report),
        chart=chart(report),
        titles={control["id"]: control["title"] for control in report["controls"]},
        known=model.KNOWN,
        said=SAID,
        style=markupsafe.Markup(style),  # noqa: S704 - a file of this collection
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    )


def moment(at: str | None) -> str:
    """A time of the report for people."""
    return at.replace("T", " ").replace("Z", " UTC") if at else "never"


def _rank(severity: str) -> int:
    return model.SEVERITIES.index(severity) if severity in model.SEVERITIES else len(model.SEVERITIES)


def _by_reason(report: Mapping[str, Any], result: str) -> list[dict[str, Any]]:
    """Controls with this result: one entry for all nodes where it has the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in report["nodes"]:
        for control in node["controls"] if node["state"] in model.KNOWN else []:
            if control["result"] == result:
                groups.setdefault((control["id"], control["detail"]), []).append(node["name"])
    return [{"id": i, "reason": reason, "nodes": nodes} for (i, reason), nodes in sorted(groups.items())]


def changes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What became different, newest first: one entry for all nodes with the same trend and the same repairs."""
    told: dict[str, dict[str, Any]] = {}
    for node in report["nodes"]:
        trend = node["trend"]
        moments = {trend["at"]} if any(trend[name] for name in model.TRENDS) else set()
        repaired = [c for c in node["controls"] if c.get("repaired")]
        newest = max((c["repaired"]["at"] for c in repaired), default=None)
        for at in moments | ({newest} if newest else set()):
            entry = {
                "at": at,
                "trend": trend if at in moments else None,
                "repaired": [{"id": c["id"], **c["repaired"]} for c in repaired if c["repaired"]["at"] == at],
            }
            told.setdefault(json.dumps(entry), {**entry, "nodes": []})["nodes"].append(node["name"])
    return sorted(told.values(), key=lambda each: (each["at"], each["nodes"]), reverse=True)


def chart(report: Mapping[str, Any], most: int = 30) -> list[dict[str, Any]]:
    """A column for each of the newest entries of the history that has results; heights in percent of the highest."""
    entries = [entry for entry in report["history"] if entry["ended"]][-most:]
    whole = max((entry["pass"] + entry["failed"] for entry in entries), default=0) or 1
    width = 100 / max(len(entries), 8)
    return [
        {
            "x": round(index * width, 3),
            "width": round(width * 0.8, 3),
            "held": round(100 * entry["pass"] / whole, 3),
            "failed": round(100 * entry["failed"] / whole, 3),
            "entry": entry,
        }
        for index, entry in enumerate(entries)
    ]


def metrics(report: Mapping[str, Any]) -> str:
    """The report for node_exporter's textfile collector.

    Results are those of the nodes whose results count; a node that gave no report has none, and
    hardening_node_reported 0. Of each held control there is a series for each node, as of a unit in node_exporter.
    """
    where = {"environment": report["environment"]}
    about = {control["id"]: control for control in report["controls"]}
    samples: list[Metric] = []

    def add(name: str, text: str, value: float, **labels: str) -> None:
        samples.append(Metric(PREFIX + name, text, value, {**where, **labels}))

    begins = [run["began"] for run in report["begun"].values()] + [report["run"].get("began")]
    newest = max((model.unix(began) for began in begins if began), default=None)
    if newest is not None:
        add("run_start_timestamp_seconds", "When the newest hardening run began.", newest)
    if report["run"]:
        add(
            "run_end_timestamp_seconds",
            "When the last hardening run that left results ended.",
            model.unix(report["run"]["ended"]),
        )
    for node in report["nodes"]:
        gave = node["state"] in model.KNOWN
        add("node_reported", "Whether the last run that tried the node has its results.", gave, node=node["name"])
    for node in report["nodes"]:
        if node["observed"]:
            text = "When the newest results of the node were observed."
            add("node_report_timestamp_seconds", text, model.unix(node["observed"]), node=node["name"])
    counted = [node for node in report["nodes"] if node["state"] in model.KNOWN]
    for node in counted:
        for result in model.RESULTS:
            text = "Controls of the node by result."
            add("controls", text, node["counts"][result], node=node["name"], result=result)
    for node in counted:
        for trend in ("newly_failed", "newly_passing"):
            text = "Controls whose result differs from the node's report before."
            add("controls_differing", text, len(node["trend"][trend]), node=node["name"], trend=trend)
    for node in counted:
        for control in node["controls"]:
            if control["result"] in ("pass", "failed"):
                add(
                    "control_failed",
                    "Whether a control that the node is held to does not hold.",
                    control["result"] == "failed",
                    node=node["name"],
                    control=control["id"],
                    domain=about[control["id"]]["domain"],
                    severity=about[control["id"]]["severity"],
                )
    for node in counted:
        for control in node["controls"]:
            if control.get("repaired"):
                add(
                    "control_repaired_timestamp_seconds",
                    "When the control was last found not to hold and was put right.",
                    model.unix(control["repaired"]["at"]),
                    node=node["name"],
                    control=control["id"],
                )
    return render_metrics(samples)


def summary(report: Mapping[str, Any], most: int = 20) -> list[str]:
    """The report in lines for a terminal; `most` is the number of failing results that are named."""
    results = report["totals"]["results"]
    lines = [f"{report['environment']}: {report['verdict']['text']}"]
    if report["observed"]:
        lines.append(
            f"as of {moment(report['observed'])}, unchanged since {moment(report['since'])}: "
            + ", ".join(f"{results[result]} {result.replace('_', ' ')}" for result in model.RESULTS)
        )
    wide = max((len(node["name"]) for node in report["nodes"]), default=0)
    for node in report["nodes"]:
        said = SAID[node["state"]]
        if node["state"] in model.KNOWN:
            counts = ", ".join(f"{n} {r.replace('_', ' ')}" for r, n in node["counts"].items() if n)
            said = f"{counts or 'no controls'}{'' if node['state'] == 'reported' else f' ({said})'}{_trend(node)}"
        else:
            said = f"{said}: {' '.join(node['why'].split())[:200]}"
        lines.append(f"  {node['name']:<{wide}}  {said}")
    failing = [
        f"  {node['name']:<{wide}}  FAILED {control['id']}: {' '.join(control['detail'].split())[:200]}"
        for node in report["nodes"]
        if node["state"] in model.KNOWN
        for control in node["controls"]
        if control["result"] == "failed"
    ]
    lines += failing[:most]
    if len(failing) > most:
        lines.append(f"  and {len(failing) - most} more, in the page")
    for begun in report["begun"].values():
        lines.append(f"  the run of {moment(begun['began'])} on {len(begun['nodes'])} nodes has left no result yet")
    return lines


def _trend(node: Mapping[str, Any]) -> str:
    trend = node["trend"]
    parts = [f"{len(trend[t])} {t.replace('_', ' ')}" for t in ("newly_failed", "newly_passing") if trend[t]]
    return f"; since {moment(trend['against'])}: {', '.join(parts)}" if parts else ""
