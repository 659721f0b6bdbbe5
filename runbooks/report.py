"""The report of a run: what happened, when, and what the clients' ledgers say against the environment's targets.

Figures come from the ledgers and from nothing else; what the ledgers do not say is "not measured" (None). A run is
reported in whatever state it is, also without its definition, its inventory or any ledger: what is missing is said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runbooks import errors, ledger, outlook, story
from runbooks.definition import Definition
from runbooks.environment import Environment
from runbooks.errors import Problem
from runbooks.journal import Journal, Record, RunState
from runbooks.progress import given

VERIFIED_WHOLE = 5000
"""Records: of a longer chain a report examines the run's own part. At some 0.1 ms a record, this is half a second."""
PLAN = "plan:"
"""Records about a plan are those of a run of this name and the plan's hash."""


def build(
    journal: Journal,
    run: str,
    definition: Definition | None,
    environment: Environment | None,
    *,
    measure: bool = True,
    verify: bool = True,
) -> dict[str, Any]:
    """Everything that the report tells, ready for JSON. Times are unix seconds, durations seconds.

    definition, environment: None when they cannot be had any more. measure: read the clients' ledgers.
    verify: examine the journal's chain.
    """
    state = journal.state(run)
    told = story.tell(_records(journal, run))
    shown = outlook.shown_state(journal, state)
    measured, why_not = _figures(journal, state, environment) if measure else (None, "the run has not ended")
    figures = _summary(measured, state)
    targets, no_targets = _targets(definition, environment, state)
    checks = _checks(figures, targets)
    directory = journal.directory / run
    now = time.time()
    return {
        "run": run,
        "runbook": state.runbook,
        "title": definition.title if definition else state.runbook,
        "purpose": definition.purpose if definition else "",
        "owner": definition.owner if definition else "",
        "severity": definition.severity if definition else "",
        "environment": state.environment,
        "inventory": state.inventory,
        "who": state.who,
        "host": state.host,
        "parameters": state.parameters,
        "given": given(definition, state.parameters) if definition else state.parameters,
        "state": state.state,
        "shown_state": shown,
        "reason": state.reason,
        "resumed": state.resumed,
        "left_out": state.left_out,
        "asked": state.asked,
        "started": state.started,
        "ended": state.ended,
        "elapsed_s": None if state.ended is None else round(state.ended - state.started, 3),
        "steps": [_step(definition, state, told, step) for step in state.steps],
        "outputs": state.outputs,
        "targets": _environment_targets(environment),
        "checks": checks,
        "no_targets": no_targets,
        "figures": figures,
        "not_measured": why_not,
        "ledgers": measured,
        "verdict": verdict(state, checks, why_not, shown),
        "next": outlook.next_command(journal, state, shown),
        "timeline": [asdict(event) for event in told.timeline],
        "plan": told.plan,
        "authority": told.authority,
        "approvals": told.approvals,
        "emergencies": told.emergencies,
        "windows": told.windows,
        "holders": told.holders,
        "notifications": told.notifications,
        "acknowledgements": told.acknowledgements,
        "notes": told.notes,
        "evidence": _evidence(journal, run, environment) if verify else None,
        "paths": {"html": str(directory / "report.html"), "json": str(directory / "report.json")},
        "made": now,
    }


def _evidence(journal: Journal, run: str, environment: Environment | None) -> dict[str, Any]:
    """Whether the run's records are what its writers wrote: level, state and text for people, faults, facts."""
    from runbooks import anchors, evidence
    from runbooks.journal import known_journals

    place = known_journals().get(journal.environment)
    try:
        trusted = environment.journal_keys if environment else place.keys if place else {}
        documents = environment.anchors if environment else place.anchors if place else []
        noted = [anchors.parse(each) for each in documents]
        # Before the chain, which may grow meanwhile.
        seen = evidence.look(noted, journal.environment)
        links = journal.links()
        own = [link for link in links if link.run == run]
        if not own:
            return _told("none", "no chain", "The run is older than the chain: its records are not signed.", [], {})
        whole = len(links) <= VERIFIED_WHOLE
        part = links if whole else [link for link in links if own[0].seq <= link.seq <= own[-1].seq]
        chain = evidence.Chain(journal.environment, "the journal", part, whole=whole)
        known = evidence.by_public(trusted or evidence.own_keys())
        if not whole:
            seen = evidence.look(noted, journal.environment, own[0].seq, own[-1].seq)
        judged = evidence.judge(chain, known, seen, run=run)
    except Problem as problem:
        return _told("warn", "not verified", f"{problem.what}.", [], {})
    head = links[-1]
    facts = {
        "Examined": f"{judged.records} records{'' if whole else ', from the first to the last of this run'}",
        "Signed by": ", ".join(judged.keys) or "nobody who is trusted here",
        "Head": f"record {head.seq}, {head.hash}",
        "Its signature": f"{head.signature} of {head.key}",
        "Anchors": ", ".join(judged.anchors) or "none",
    }
    faults = [str(fault) for fault in judged.faults]
    if faults:
        return _told("bad", "broken", "The journal is not what its writers wrote.", faults, facts)
    if judged.anchored is None:
        text = "Nothing was edited, taken out, put in or moved. Whether the end was cut off, only an anchor could tell."
        return _told("good", "holds", text, [], facts)
    text = f"Nothing was edited, taken out, put in, moved or cut off, up to the anchored record {judged.anchored}."
    return _told("good", "holds", text, [], facts)


def _told(level: str, state: str, text: str, faults: list[str], facts: dict[str, str]) -> dict[str, Any]:
    return {"level": level, "state": state, "text": text, "faults": faults, "facts": facts}


def _records(journal: Journal, run: str) -> list[Record]:
    """The run's records, and those of the plan that it carries out: its making and its approvals."""
    records = journal.records(run)
    plan = next((r.data.get("plan") for r in records if r.kind == "run_started"), None)
    return sorted([*(journal.records(PLAN + plan) if plan else []), *records], key=lambda record: record.seq)


def definition_of(runbook: str) -> tuple[Definition | None, str]:
    """The runbook's definition, or why there is none."""
    from runbooks import definition

    try:
        return definition.load(runbook), ""
    except Problem as problem:
        return None, problem.what


def environment_of(inventory: str) -> tuple[Environment | None, str]:
    """The environment of an inventory, or why there is none. Imports Ansible, which takes a second."""
    try:
        return Environment(Path(inventory)), ""
    except Problem as problem:
        return None, problem.what


def _targets(
    definition: Definition | None, environment: Environment | None, state: RunState
) -> tuple[dict[str, Any], str]:
    """The run's targets in seconds, or why they are not known."""
    if definition is None:
        return {}, f"there is no definition of {state.runbook} any more"
    if not definition.targets:
        return {}, ""
    if environment is None:
        return {}, f"the inventory {state.inventory} cannot be read here"
    try:
        return {name: environment.template(value, **state.parameters) for name, value in definition.targets.items()}, ""
    except Problem as problem:
        return {}, problem.what


def _environment_targets(environment: Environment | None) -> dict[str, Any]:
    try:
        return (environment.get("targets") if environment else None) or {}
    except Problem:
        return {}


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


def verdict(state: RunState, checks: list[dict[str, Any]], why_not: str, shown: str) -> dict[str, str]:
    """The first thing to read: level (good, warn, bad) and one sentence. shown: what outlook makes of the state."""
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
        "running": ("warn", f"Running{_at_step(state)}."),
        "dead": ("bad", f"Its process is gone with the work unfinished{_at_step(state)}."),
        "waiting": ("warn", "Waiting."),
        "undone": ("warn", "Undone."),
        "refused": ("bad", "Refused, and nothing was changed by the step that refused."),
        "failed": ("bad", "Failed."),
        "interrupted": ("warn", "Interrupted."),
        "aborted": ("warn", "Given up."),
    }
    level, text = texts.get(shown, ("warn", f"{shown.capitalize()}."))
    return {"level": level, "text": f"{text} {state.reason[:1].upper()}{state.reason[1:]}".strip()}


def _at_step(state: RunState) -> str:
    names = list(state.steps)
    at = next((name for name in names if state.steps[name].outcome != "ok"), None)
    return "" if at is None else f", at step {names.index(at) + 1} of {len(names)} ({at})"


# -- the figures


def _figures(journal: Journal, state: RunState, environment: Environment | None) -> tuple[dict[str, Any] | None, str]:
    """What ``ledger.measure`` says of this run, or why it says nothing."""
    if environment is None:
        return None, f"the inventory {state.inventory} cannot be read here"
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


def _step(definition: Definition | None, state: RunState, told: story.Story, name: str) -> dict[str, Any]:
    step = next((step for step in definition.steps if step.id == name), None) if definition else None
    data = asdict(state.steps[name])
    data.pop("started_mono")
    own = told.steps.get(name, story.StepStory())
    budget = step.budget_s if step else own.budget_s
    planned: dict[str, Any] = next((s for s in (told.plan or {}).get("steps") or [] if s.get("id") == name), {})
    return {
        **data,
        "id": name,
        "title": step.title if step else name,
        "budget_s": budget,
        "over_s": _over(data["elapsed_s"], budget),
        "estimate_s": planned.get("estimate_s"),
        "planned": planned.get("changes"),
        "touches": list(step.touches) if step else [],
        "gate": bool(step and step.gate),
        "tries": [asdict(attempt) for attempt in own.attempts],
        "effects": [asdict(effect) for effect in own.effects],
        "gates": own.gates,
        "undo": own.undo,
    }


def _over(elapsed: float | None, budget: float | None) -> float | None:
    """Seconds over the budget; 0 within it, None while there is nothing to compare."""
    return None if elapsed is None or not budget else round(max(0.0, elapsed - budget), 3)


def html(report: Mapping[str, Any]) -> str:
    """One page that needs nothing beside it."""
    from runbooks import page

    return page.report(report)
