"""The report of a run: what happened, when, and what the clients' ledgers say against the environment's targets.

Figures come from the ledgers and from nothing else; what the ledgers do not say is "not measured" (None).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runbooks import errors, ledger
from runbooks.definition import Definition
from runbooks.environment import Environment
from runbooks.errors import Problem
from runbooks.journal import Journal, RunState
from runbooks.progress import given, seconds

TEMPLATES = Path(__file__).parent / "templates"


def build(journal: Journal, run: str, definition: Definition, environment: Environment) -> dict[str, Any]:
    """Everything that the report tells, ready for JSON. Times are unix seconds, durations seconds."""
    state = journal.state(run)
    measured, why_not = _figures(journal, state, environment)
    figures = _summary(measured, state)
    targets = {name: environment.template(value, **state.parameters) for name, value in definition.targets.items()}
    checks = _checks(figures, targets)
    directory = journal.directory / run
    return {
        "run": run,
        "runbook": definition.name,
        "title": definition.title,
        "severity": definition.severity,
        "environment": state.environment,
        "inventory": state.inventory,
        "who": state.who,
        "host": state.host,
        "parameters": state.parameters,
        "given": given(definition, state.parameters),
        "state": state.state,
        "reason": state.reason,
        "resumed": state.resumed,
        "left_out": state.left_out,
        "asked": state.asked,
        "started": state.started,
        "ended": state.ended,
        "elapsed_s": None if state.ended is None else round(state.ended - state.started, 3),
        "steps": [_step(definition, state, step) for step in state.steps],
        "outputs": state.outputs,
        "targets": environment.get("targets") or {},
        "checks": checks,
        "figures": figures,
        "not_measured": why_not,
        "ledgers": measured,
        "verdict": verdict(state, checks, why_not),
        "paths": {"html": str(directory / "report.html"), "json": str(directory / "report.json")},
        "made": time.time(),
    }


def exit_code(report: Mapping[str, Any]) -> int:
    """0 when the run succeeded and no measured figure misses its target."""
    codes = {"succeeded": errors.OK, "refused": errors.REFUSED, "interrupted": errors.INTERRUPTED}
    code = codes.get(report["state"], errors.FAILED)
    missed = any(check["met"] is False for check in report["checks"])
    return errors.FAILED if code == errors.OK and missed else code


def write(report: Mapping[str, Any]) -> None:
    """Write the page and the JSON beside each other. Raises Problem when that is not possible."""
    page, data = Path(report["paths"]["html"]), Path(report["paths"]["json"])
    try:
        page.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        data.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        page.write_text(html(report), encoding="utf-8")
    except OSError as error:
        raise Problem(
            f"The report {page} cannot be written ({error})",
            code="report-unwritable",
            next_command=f"df -h {page.parent}",
        ) from error


def verdict(state: RunState, checks: list[dict[str, Any]], why_not: str) -> dict[str, str]:
    """The first thing to read: level (good, warn, bad) and one sentence."""
    if state.state == "succeeded":
        missed = [c["title"] for c in checks if c["met"] is False]
        if missed:
            return {"level": "bad", "text": f"Done, but targets were missed: {', '.join(missed)}."}
        unknown = [c["title"] for c in checks if c["measured"] is None]
        if unknown and why_not:
            return {"level": "warn", "text": f"Done. Not measured: {why_not}."}
        if unknown:
            return {"level": "warn", "text": f"Done. Not measured yet: {', '.join(unknown)}."}
        return {"level": "good", "text": "Done, and every target was met." if checks else "Done."}
    texts = {
        "running": ("warn", "Not finished."),
        "refused": ("bad", "Refused, and nothing was changed by the step that refused."),
        "failed": ("bad", "Failed."),
        "interrupted": ("warn", "Interrupted."),
        "aborted": ("warn", "Given up."),
    }
    level, text = texts[state.state]
    return {"level": level, "text": f"{text} {state.reason}".strip()}


# -- the figures


def _figures(journal: Journal, state: RunState, environment: Environment) -> tuple[dict[str, Any] | None, str]:
    """What ``ledger.measure`` says of this run, or why it says nothing."""
    directory = environment.ledgers
    if directory is None:
        return None, "the environment keeps no client ledgers"
    low, high = _window(journal, state)
    to = state.parameters.get("to")
    try:
        records = _ledgers_of(directory, state, low)
        if records is None:
            return None, f"no client wrote at the time of the run (ledgers in {directory})"
        return ledger.measure(records, start=low, end=high, to_region=str(to) if to else None).to_dict(), ""
    except ledger.LedgerError as error:
        return None, str(error)


def _ledgers_of(directory: Path, state: RunState, low: float | None) -> list[ledger.Record] | None:
    """The ledgers that were being written when the run was: the directory's own, or a set below it that was put aside.

    Sets are not mixed: the clients of two sets have the same names.
    """
    until = state.ended_mono if state.ended_mono is not None else time.monotonic()
    best: tuple[float, list[ledger.Record]] | None = None
    for place in sorted({path.parent for path in directory.rglob("*.jsonl")}):
        records = ledger.read_all(place.glob("*.jsonl"))
        boots = {r.detail.get("boot") for r in records if r.kind == "start" and isinstance(r.detail, dict)}
        acks = [r.t for r in records if r.kind == "ack" and (low or 0) <= r.t <= until]
        if acks and boots <= {state.boot} and (best is None or max(acks) > best[0]):
            best = max(acks), records
    return None if best is None else best[1]


def _window(journal: Journal, state: RunState) -> tuple[float | None, float | None]:
    """From the end of the run before to the start of the run after, on the monotonic clock of this boot."""
    runs = journal.runs()
    index = runs.index(state.run)
    before = journal.state(runs[index - 1]) if index else None
    after = journal.state(runs[index + 1]) if index + 1 < len(runs) else None
    low = before.ended_mono if before is not None and before.boot == state.boot else None
    high = after.started_mono if after is not None and after.boot == state.boot else None
    return low, high


def _summary(measured: dict[str, Any] | None, state: RunState) -> dict[str, Any]:
    """The figures that the targets are about.

    rto_database_s: from the clients' last acknowledgement before the change to the first one that any client got from
    the new writer, which may be earlier than the one that the worst outside client got (rto_s).
    lease_wait_s: what the fencing step waited; a part of rto_s.
    """
    measured = measured or {}
    waits = [step.outputs["lease_waited_s"] for step in state.steps.values() if "lease_waited_s" in step.outputs]
    rto_database = None
    if measured.get("outage_t") is not None:
        firsts = [
            w["first_t"]
            for w in measured["writers"]
            if w["region"] == state.parameters.get("to") and w["first_t"] > measured["outage_t"]
        ]
        rto_database = round(min(firsts) - measured["outage_t"], 3) if firsts else None
    return {
        "rto_s": _round(measured.get("rto_s")),
        "rto_database_s": rto_database,
        "rpo_s": _round(measured.get("rpo_s")),
        "lost_acknowledged": measured.get("lost_acknowledged"),
        "two_writers_ms": measured.get("two_writers_ms"),
        "acknowledged": measured.get("acks"),
        "lease_wait_s": round(float(waits[-1]), 3) if waits else None,
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _checks(figures: Mapping[str, Any], targets: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure with its target (None: it has none); met is None when one of the two is missing."""
    if not targets:
        return []
    titles = {
        "rto_s": ("Service back for its clients", "s"),
        "rto_database_s": ("Database accepts writes again", "s"),
        "rpo_s": ("Data lost, as time", "s"),
        "lost_acknowledged": ("Acknowledged writes lost", ""),
        "two_writers_ms": ("Time with two writers", "ms"),
    }
    rows = []
    for name, (title, unit) in titles.items():
        target = 0 if name == "two_writers_ms" else targets.get(name)
        measured = figures[name]
        met = None if measured is None or target is None else measured <= float(target)
        rows.append(
            {
                "name": name,
                "title": title,
                "unit": unit,
                "target": None if target is None else float(target),
                "measured": measured,
                "met": met,
            }
        )
    return rows


def figure(check: Mapping[str, Any]) -> str:
    """A measured figure for people: a tenth of a second is precise enough, a count is a count."""
    value, unit = check["measured"], check["unit"]
    if value is None:
        return "not measured"
    text = f"{value:.1f}" if unit == "s" else f"{value:g}"
    return f"{text} {unit}".strip()


def _step(definition: Definition, state: RunState, name: str) -> dict[str, Any]:
    known = {step.id: step for step in definition.steps}
    step = known.get(name)
    data = asdict(state.steps[name])
    data.pop("started_mono")
    return {
        **data,
        "id": name,
        "title": step.title if step else name,
        "budget_s": step.budget_s if step else None,
        "touches": list(step.touches) if step else [],
        "gate": bool(step and step.gate),
    }


# -- the page


def html(report: Mapping[str, Any]) -> str:
    """One page that needs nothing beside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = seconds
    environment.filters["figure"] = figure
    environment.filters["clock"] = lambda t: time.strftime("%H:%M:%S", time.localtime(t))
    environment.filters["moment"] = lambda t: time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(t))
    return environment.get_template("report.html.j2").render(r=report, chart=chart(report))


def chart(report: Mapping[str, Any]) -> dict[str, Any]:
    """The timeline as percentages of its whole width: bars of the steps, marks of the clients."""
    steps = [s for s in report["steps"] if s["started"] is not None]
    clock = _wall_of_ledger(report)
    end = max([report["ended"] or report["made"], *(s["ended"] or 0 for s in steps)])
    begin, end = min([report["asked"], *clock.values()]), max([end, *clock.values()])
    span = max(end - begin, 0.001)

    def at(moment: float) -> float:
        return float(round(100 * (moment - begin) / span, 3))

    checked = {"id": "preflight", "outcome": "ok", "elapsed_s": report["started"] - report["asked"]}
    left, right = at(report["asked"]), at(report["started"])
    bars: list[dict[str, Any]] = [{"step": checked, "left": left, "width": max(right - left, 0.3), "wait": 0}]
    for step in report["steps"]:
        if step["started"] is None:
            bars.append({"step": step, "left": 0, "width": 0, "wait": 0})
            continue
        stop = step["ended"] or end
        width = max(at(stop) - at(step["started"]), 0.3)
        took = max(stop - step["started"], 0.001)
        wait = min(100.0, 100 * float(step["outputs"].get("lease_waited_s", 0)) / took)
        bars.append({"step": step, "left": at(step["started"]), "width": round(width, 3), "wait": round(wait, 2)})
    names = {"outage": "last write before", "back": "first write after"}
    marks = [{"at": at(t), "title": names[name], "wall": t, "name": name} for name, t in clock.items()]
    return {"bars": bars, "marks": marks, "begin": begin, "end": end, "span_s": span, "ticks": _ticks(span)}


def _ticks(span: float) -> list[dict[str, Any]]:
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800) if span / s <= 8), 3600)
    return [{"at": round(100 * s / span, 3), "text": f"+{s} s"} for s in range(0, int(span) + 1, step)]


def _wall_of_ledger(report: Mapping[str, Any]) -> dict[str, float]:
    """The clients' outage and return in unix seconds: the worst outside client's."""
    switches = [s for s in (report["ledgers"] or {}).get("switches", []) if s["side"] == ledger.OUTSIDE]
    if not switches:
        return {}
    worst = max(switches, key=lambda s: s["gap_s"])
    return {"outage": worst["last_before_wall"], "back": worst["first_after_wall"]}
