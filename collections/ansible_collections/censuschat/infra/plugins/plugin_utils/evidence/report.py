# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The report of an environment's hardening: what a run found, put onto what the report before it says.

Pure: results and the earlier report in, the new report out; files, locks and clocks are `files`' business.

Two kinds of change are told apart. The report's *substance* is which nodes reported, and each control's result on
them. The times of the last look, and how often it found the same, belong to the looks: they move on at each run and
are no change.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence.redact import cleaned, printable

SCHEMA = 1
RESULTS = ("pass", "failed", "excluded", "not_applicable")
"""Of a control on a node. `changed` of an apply is `pass` with `repaired`: it was observed again and holds."""
SEVERITIES = ("high", "medium", "low")
KNOWN = ("reported", "earlier")
"""States of a node whose results count: those of this run, and those of an earlier one that this run left out."""
STATES = (*KNOWN, "unreachable", "no_report", "never")
TRENDS = ("newly_failed", "newly_passing", "left_out", "added", "removed")
DIFFS, LINES = 12, 24
"""Differences of a control, and lines of each side, that are kept."""


class EvidenceError(Exception):
    """A failure the user can act on: one sentence with what, where, why and the remedy."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What came of one node in a run: reported (with node_harden's result), unreachable or no_report (with why)."""

    node: str
    state: str
    why: str = ""
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its id, when it began and when it looked (ISO 8601, UTC), and the controller's process behind it."""

    id: str
    began: str
    at: str
    process: str = ""


def iso(moment: datetime.datetime) -> str:
    """The moment as ISO 8601 in UTC, to the second."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix(moment: str) -> float:
    """Seconds since 1970 of what `iso` wrote."""
    return datetime.datetime.fromisoformat(moment).timestamp()


def seen(node: str, report: Any, failure: Any, removed: bool, task: str = "") -> Seen:
    """What came of a node, from what Ansible knows of it.

    report: what node_harden's task registered, if it did. failure: the result of the task that failed before it, and
    task: its name. removed: the play went on without the node. What `begun` registered is no report: it takes the place
    of one that an earlier play of the same run left.
    """
    report = report if isinstance(report, Mapping) and not report.get("begun") else {}
    failure = failure if isinstance(failure, Mapping) else {}
    if report.get("unreachable"):
        return Seen(node, "unreachable", _why(report) or "it did not answer")
    if isinstance(report.get("controls"), Sequence) and not report.get("censored"):
        if all(isinstance(c, Mapping) and c.get("id") and c.get("result") for c in report["controls"]):
            return Seen(node, "reported", result=report)
        return Seen(node, "no_report", "its report has controls without id or result; is it node_harden's?")
    if report.get("censored"):
        return Seen(node, "no_report", "its report is hidden by no_log; take no_log from the role's task")
    if report.get("skipped"):
        return Seen(node, "no_report", "its hardening was skipped by a condition")
    if report:
        return Seen(node, "no_report", _why(report) or "its hardening failed without a word")
    if failure.get("unreachable"):
        return Seen(node, "unreachable", _why(failure) or "it did not answer")
    if failure:
        where = f"{task}: " if task else ""
        return Seen(node, "no_report", f"failed before its hardening: {where}{_why(failure) or 'no cause was given'}")
    if removed:
        return Seen(node, "unreachable", "it did not answer before its hardening")
    return Seen(node, "no_report", "the run did not come to its hardening")


def _why(result: Mapping[str, Any]) -> str:
    return str(result.get("msg") or result.get("module_stderr") or "").strip()


# -- from results to the report


def begin(
    old: Mapping[str, Any] | None,
    run: Run,
    nodes: Sequence[str],
    environment: str,
    *,
    over: Collection[str] = (),
    keep: int = 50,
) -> dict[str, Any]:
    """The report with a run that has begun. over: ids of begun runs whose process is no more; they left no result."""
    report = _base(old, environment)
    _close(report, over, run.at)
    if run.process and report["run"].get("process") == run.process:
        # The next batch of the same run.
        run = dataclasses.replace(run, id=report["run"]["id"], began=report["run"]["began"])
    if run.process:
        # Of a process that has no name nobody could tell that it is over.
        report["begun"][run.id] = {"began": run.began, "nodes": sorted(map(printable, nodes)), "process": run.process}
    del report["history"][:-keep]
    return _derived(report)


def end(
    old: Mapping[str, Any] | None,
    run: Run,
    found: Sequence[Seen],
    expected: Collection[str],
    environment: str,
    *,
    secrets: Collection[str] = (),
    over: Collection[str] = (),
    keep: int = 50,
) -> tuple[dict[str, Any], bool]:
    """The report after a run, and whether its substance differs from the report before.

    expected: all nodes of the environment; others are taken out. keep: number of entries of the history.
    """
    report = _base(old, environment)
    before = _substance(report) if old else None
    run = _adopted(report, run)
    report["begun"].pop(run.id, None)
    _close(report, over, run.at)
    found = [dataclasses.replace(each, node=printable(each.node)) for each in found]
    nodes = {node["name"]: node for node in report["nodes"]}
    catalogue = {control["id"]: control for control in report["controls"]}
    known = {each.node for each in found}
    fresh, repaired = [], 0
    for each in found:
        record, repairs = _node(nodes.get(each.node), each, run, secrets)
        repaired += repairs
        fresh.append(record)
        for control in each.result.get("controls", []) if each.state == "reported" else []:
            catalogue[str(control["id"])] = _about(control, secrets)
    for name in sorted({printable(name) for name in expected} - known):
        record = nodes.get(name) or _unknown(name)
        fresh.append({**record, "state": "earlier" if record["state"] == "reported" else record["state"]})
    report["nodes"] = sorted(fresh, key=lambda node: node["name"])
    report["controls"] = list(catalogue.values())
    same_run = report["run"].get("id") == run.id
    report["run"] = {"id": run.id, "began": run.began, "ended": run.at, "process": run.process}
    report["observed"] = run.at
    differs = before != _substance(report) or repaired > 0
    if differs:
        report["since"], report["runs"] = run.at, 1
    elif not same_run:
        report["runs"] += 1
    report = _derived(report)
    _remember(report, run, differs, repaired, keep, same_run=same_run)
    return report, differs


def _base(old: Mapping[str, Any] | None, environment: str) -> dict[str, Any]:
    if old is None:
        return {
            "schema": SCHEMA,
            "environment": environment,
            "since": None,
            "observed": None,
            "runs": 0,
            "run": {},
            "begun": {},
            "nodes": [],
            "controls": [],
            "history": [],
        }
    if old.get("schema") != SCHEMA:
        raise EvidenceError(f"its schema is {old.get('schema')!r}, this collection writes {SCHEMA}")
    if old.get("environment") != environment:
        raise EvidenceError(f"it is of the environment {old.get('environment')!r}, not of {environment!r}")
    return copy.deepcopy(dict(old))


def whole(report: Any) -> bool:
    """Whether it has the form of a report, as far as `begin` and `end` build on it."""
    try:
        lists = isinstance(report["history"], list) and isinstance(report["controls"], list)
        begun = all({"began", "nodes", "process"} <= set(run) for run in report["begun"].values())
        nodes = all({*_unknown(""), "counts"} <= set(node) for node in report["nodes"])
        results = all({"id", "result", "detail"} <= set(c) for node in report["nodes"] for c in node["controls"])
        return lists and begun and nodes and results and {"schema", "environment", "runs", "run"} <= set(report)
    except (AttributeError, KeyError, TypeError):
        return False


def _adopted(report: Mapping[str, Any], run: Run) -> Run:
    """The run under the id that it began with."""
    begun = [(i, b["began"]) for i, b in report["begun"].items() if run.process and b["process"] == run.process]
    if begun:
        identifier, began = begun[-1]
        return dataclasses.replace(run, id=identifier, began=began)
    if run.process and report["run"].get("process") == run.process:
        return dataclasses.replace(run, id=report["run"]["id"], began=report["run"]["began"])
    return run


def _close(report: dict[str, Any], over: Collection[str], at: str) -> None:
    """Begun runs that are over without a result are told as what they are, for each of their nodes."""
    nodes = {node["name"]: node for node in report["nodes"]}
    for identifier in [i for i in report["begun"] if i in over]:
        begun = report["begun"].pop(identifier)
        why = f"the run of {begun['began']} ended without a result: nothing was reached, or it was killed"
        for name in begun["nodes"]:
            record = nodes.setdefault(name, _unknown(name))
            # Times are whole seconds: what was seen in the same one was seen before, by the run that ended then.
            if (record["seen"] or "") <= begun["began"]:
                record.update(state="no_report", why=why, seen=at)
        report["history"].append(
            {"at": begun["began"], "run": identifier, "ended": False, "nodes": len(begun["nodes"])}
        )
    report["nodes"] = sorted(nodes.values(), key=lambda node: node["name"])


def _unknown(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "state": "never",
        "why": "no run has reported it yet",
        "seen": None,
        "observed": None,
        "since": None,
        "mode": "",
        "profile": "",
        "applied": "",
        "run": "",
        "controls": [],
        "trend": _no_trend(),
    }


def _no_trend() -> dict[str, Any]:
    return {"at": None, "against": None, **{name: [] for name in TRENDS}, "unchanged": 0}


def _node(old: Mapping[str, Any] | None, now: Seen, run: Run, secrets: Collection[str]) -> tuple[dict[str, Any], int]:
    """A node's record after the run, and how many of its controls the run repaired."""
    record: dict[str, Any] = dict(old or _unknown(now.node))
    again = record["run"] == run.id and record["state"] == now.state
    record.update(state=now.state, why=cleaned(now.why, secrets, 600), seen=run.at, run=run.id)
    if now.state != "reported":
        return record, 0
    before = {control["id"]: control for control in record["controls"]}
    after = [_control(before.get(str(c["id"])), c, run, secrets) for c in now.result["controls"]]
    if again and _classes(after) == _classes(record["controls"]):
        # A later batch of the same run tells of this node again.
        return record, 0
    if record["observed"] is None:
        record["trend"] = {**_no_trend(), "unchanged": len(after)}
    elif _classes(after) != _classes(record["controls"]):
        record["trend"] = {
            "at": run.at,
            "against": record["observed"],
            **_compared(_classes(record["controls"]), _classes(after)),
        }
    repairs = sum(str(control.get("result")) == "changed" for control in now.result["controls"])
    if record["observed"] is None or repairs or _told(record["controls"]) != _told(after):
        record["since"] = run.at
    record.update(
        observed=run.at,
        mode=cleaned(now.result.get("mode"), secrets, 40),
        profile=cleaned(now.result.get("profile"), secrets, 80),
        controls=after,
    )
    if now.result.get("run"):
        # The last run that changed the node, which a rollback would name.
        record["applied"] = cleaned(now.result["run"], secrets, 80)
    return record, repairs


def _control(
    old: Mapping[str, Any] | None, now: Mapping[str, Any], run: Run, secrets: Collection[str]
) -> dict[str, Any]:
    result = str(now.get("result"))
    detail, diff = cleaned(now.get("detail"), secrets), _diff(now.get("diff"), secrets)
    record: dict[str, Any] = {"id": cleaned(now["id"], longest=120), "result": result, "detail": detail}
    if result == "changed":
        return {**record, "result": "pass", "detail": "", "repaired": {"at": run.at, "detail": detail, "diff": diff}}
    if result not in RESULTS:
        raise EvidenceError(f"control {record['id']} has the result {result!r}, which nobody knows here")
    if result == "failed" and diff:
        record["diff"] = diff
    if result == "pass" and old and old.get("repaired"):
        record["repaired"] = old["repaired"]
    return record


def _diff(value: Any, secrets: Collection[str]) -> list[dict[str, str]]:
    entries = value if isinstance(value, list) else []
    return [
        {key: _some(cleaned(entry.get(key), secrets)) for key in ("what", "before", "after")}
        for entry in entries[:DIFFS]
        if isinstance(entry, Mapping)
    ]


def _some(text: str) -> str:
    lines = text.splitlines()
    more = [f"… {len(lines) - LINES} more lines"] if len(lines) > LINES else []
    return "\n".join([*lines[:LINES], *more])


def _about(control: Mapping[str, Any], secrets: Collection[str]) -> dict[str, Any]:
    references = control.get("references")
    return {
        "id": cleaned(control["id"], longest=120),
        "title": cleaned(control.get("title") or control["id"], secrets, 300),
        "domain": cleaned(control.get("domain") or "other", longest=80),
        "severity": cleaned(control.get("severity") or "medium", longest=20),
        "references": [cleaned(r, secrets, 200) for r in references] if isinstance(references, list) else [],
    }


# -- trend


def _class(result: str) -> str:
    return {"pass": "held", "failed": "failed"}.get(result, "out")


def _classes(controls: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {control["id"]: _class(control["result"]) for control in controls}


def _compared(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """What became of each control between two reports of a node. A control that is new and fails has newly failed."""
    trend: dict[str, Any] = {name: [] for name in TRENDS}
    for identifier, now in after.items():
        was = before.get(identifier)
        if now == was:
            continue
        if now == "failed":
            trend["newly_failed"].append(identifier)
        elif was is None:
            trend["added"].append(identifier)
        elif now == "out":
            # Excluding a control that fails is no way to make it pass.
            trend["left_out"].append(identifier)
        else:
            trend["newly_passing" if was == "failed" else "added"].append(identifier)
    trend["removed"] = [identifier for identifier in before if identifier not in after]
    trend["unchanged"] = sum(before.get(identifier) == now for identifier, now in after.items())
    return trend


def _told(controls: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Results as far as they matter: what a passing control says is about the look, not about the node."""
    return [(c["id"], c["result"], "" if c["result"] == "pass" else c["detail"]) for c in controls]


def _substance(report: Mapping[str, Any]) -> Any:
    return [
        (
            node["name"],
            "known" if node["state"] in KNOWN else node["state"],
            node["mode"] if node["state"] in KNOWN else "",
            node["profile"],
            _told(node["controls"]),
        )
        for node in report["nodes"]
    ]


# -- what follows from the nodes' records


def _derived(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its sums, its controls by node, its trend and its verdict."""
    for node in report["nodes"]:
        node["counts"] = {result: sum(c["result"] == result for c in node["controls"]) for result in RESULTS}
    counted = [node for node in report["nodes"] if node["state"] in KNOWN]
    held: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for node in counted:
        for control in node["controls"]:
            held.setdefault(control["id"], []).append((node["name"], control))
    shown = {c["id"] for node in report["nodes"] for c in node["controls"]}
    report["controls"] = [
        {**_only_about(control), **_by_node(held.get(control["id"], []), counted)}
        for control in report["controls"]
        if control["id"] in shown
    ]
    report["controls"].sort(key=lambda c: (c["domain"], c["id"]))
    report["totals"] = {
        "nodes": {state: sum(node["state"] == state for node in report["nodes"]) for state in STATES},
        "results": {result: sum(node["counts"][result] for node in counted) for result in RESULTS},
        "failed_by_severity": {
            severity: sum(len(c["failed_on"]) for c in report["controls"] if c["severity"] == severity)
            for severity in SEVERITIES
        },
    }
    report["verdict"] = verdict(report)
    return report


def _only_about(control: Mapping[str, Any]) -> dict[str, Any]:
    return {key: control[key] for key in ("id", "title", "domain", "severity", "references")}


def _by_node(results: Sequence[tuple[str, Mapping[str, Any]]], counted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    identifier = results[0][1]["id"] if results else ""
    on = {result: [node for node, control in results if control["result"] == result] for result in RESULTS}
    trend = {
        name: [node["name"] for node in counted if identifier in node["trend"][name]] if identifier else []
        for name in ("newly_failed", "newly_passing", "left_out")
    }
    return {**{f"{result}_on": names for result, names in on.items()}, "trend": trend}


def verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """The first thing to read: level (good, warn, bad) and one sentence."""
    nodes = report["totals"]["nodes"]
    total = len(report["nodes"])
    failing = sum(node["counts"]["failed"] > 0 for node in report["nodes"] if node["state"] in KNOWN)
    controls = sum(bool(control["failed_on"]) for control in report["controls"])
    lost = nodes["unreachable"] + nodes["no_report"]
    said = []
    if controls:
        where = f"on {failing} of {_many(total, 'node', 'nodes')}"
        said.append(f"{_many(controls, 'control does', 'controls do')} not hold, {where}")
    if lost:
        said.append(f"{_many(lost, 'node', 'nodes')} gave no report")
    if said:
        return {"level": "bad", "text": f"{'; '.join(said)}."}
    if nodes["never"] or nodes["earlier"] or not total:
        old = nodes["never"] + nodes["earlier"]
        text = f"All controls hold; {_many(old, 'node was', 'nodes were')} not in the last run."
        return {"level": "warn", "text": text if nodes["earlier"] + nodes["reported"] else "No node has reported yet."}
    if not report["totals"]["results"]["pass"]:
        return {"level": "warn", "text": "No control concerns any node, so nothing is proven."}
    return {"level": "good", "text": f"All controls hold on {f'all {total} nodes' if total > 1 else 'the node'}."}


def _many(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _remember(report: dict[str, Any], run: Run, differs: bool, repaired: int, keep: int, *, same_run: bool) -> None:
    """One entry of the history for each state that was found; a look that found the same moves its end."""
    history, totals = report["history"], report["totals"]
    lost = totals["nodes"]["unreachable"] + totals["nodes"]["no_report"]
    entry = {
        "at": run.at,
        "until": run.at,
        "runs": 1,
        "run": run.id,
        "ended": True,
        "nodes": len(report["nodes"]),
        "lost": lost,
        "repaired": repaired,
        **totals["results"],
    }
    last = history[-1] if history else None
    if last and last["run"] == run.id and last["ended"]:
        entry.update(at=last["at"], runs=last["runs"], repaired=last["repaired"] + repaired)
        history[-1] = entry
    elif differs or not last or not last["ended"]:
        history.append(entry)
    else:
        last.update(until=run.at, runs=last["runs"] + (not same_run))
    del history[:-keep]
