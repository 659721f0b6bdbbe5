"""Takes alerts in: what they say goes into the journal, and what follows from it (``runbooks.events``) is carried out.

Everything that is decided from is in the journal, so a restart of whoever receives the alerts loses nothing. Of several
who decide about one incident the first record counts, so an alert that comes ten times, at ten places, has one effect.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbooks import definition, events
from runbooks.errors import Problem, one_line
from runbooks.events import Decided, Decision, Policy, Rule, Tally, Unusable
from runbooks.notify import Notifier

if TYPE_CHECKING:
    from runbooks.environment import Environment
    from runbooks.journal import Journal

PLAN_S = 600.0
"""Seconds after which a plan is given up; the proposal stands without it."""
BEGIN_S = 120.0
"""Seconds in which a run that was started has to be in the journal."""
PATIENCE_S = 30.0
NOT_HANDED_ON = frozenset(
    (
        *("ANSIBLE_CALLBACK_PLUGINS", "ANSIBLE_STDOUT_CALLBACK", "ORIGINAL_STDOUT_CALLBACK", "ANSIBLE_CACHE_PLUGIN"),
        *("ANSIBLE_LOAD_CALLBACK_PLUGINS", "ANSIBLE_RETRY_FILES_ENABLED", "ANSIBLE_CACHE_PLUGIN_CONNECTION"),
        *("ANSIBLE_HOST_KEY_CHECKING", "ANSIBLE_UNSAFE_WRITES", "ANSIBLE_ROLES_PATH", "AWX_ISOLATED_DATA_DIR"),
        *("AD_HOC_COMMAND_ID", "RUNNER_OMIT_EVENTS", "RUNNER_ONLY_FAILED_EVENTS", "RUNBOOK_EVENT_TOKEN"),
    )
)
"""What ansible-runner sets for the rulebook's own playbook (it breaks another run, and takes the check of host keys
away), and the token of the rulebook's door."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is said about one region under one rule, and what was decided."""

    rule: Rule
    region: str
    tally: Tally
    decision: Decision
    decided: tuple[Decided, ...]

    @property
    def run(self) -> str:
        return place(self.rule.name, self.region)

    def document(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "runbook": self.rule.runbook,
            "region": self.region,
            "incident": self.tally.incident,
            "action": self.decision.action,
            "reason": self.decision.reason,
            "lost": dict(self.tally.lost),
            "discounted": dict(self.tally.discounted),
            "alive": list(self.tally.alive),
            "decided": [
                {"incident": d.incident, "action": d.action, "outcome": d.outcome, "run": d.run} for d in self.decided
            ],
        }


def place(rule: str, region: str) -> str:
    """The run under which the journal keeps what is said about a region."""
    return f"event:{rule}:{region}"


def policy(environment: Environment) -> Policy:
    """The environment's policy. Raises Problem."""
    given = _given(environment)
    rules = given.get("rules") if isinstance(given, Mapping) else None
    named = (
        {str(r.get("runbook")) for r in rules.values() if isinstance(r, Mapping)} if isinstance(rules, Mapping) else ()
    )
    known = definition.files()
    try:
        return events.policy(given, {name: definition.load(name).severity for name in named if name in known})
    except Unusable as error:
        raise Problem(
            f"The inventory {environment.path} says what alerts may do, but {error}",
            code="events-invalid",
            next_command=f"ansible-inventory -i {environment.path} --list",
        ) from None


def _given(environment: Environment) -> Any:
    """The variable with its templates filled in, but for a rule's parameters: they are about the region to come."""
    given = environment.raw("runbook_events")
    if not isinstance(given, Mapping):
        return environment.get("runbook_events")
    rules = given.get("rules")
    if not isinstance(rules, Mapping):
        return environment.template(given)
    filled: dict[str, Any] = {}
    for name, rule in rules.items():
        if not isinstance(rule, Mapping):
            filled[name] = rule
            continue
        filled[name] = environment.template({key: value for key, value in rule.items() if key != "parameters"})
        filled[name] |= {key: value for key, value in rule.items() if key == "parameters"}
    return {**environment.template({key: value for key, value in given.items() if key != "rules"}), "rules": filled}


def regions(environment: Environment) -> list[str]:
    return sorted(map(str, environment.get("regions") or {}))


def standing(journal: Journal, environment: Environment, known: Policy, rule: Rule, region: str) -> Standing:
    """What the journal says about one region."""
    now = time.time()
    records = journal.records(place(rule.name, region))
    found = events.tally(events.votes(records), region, rule, known, now)
    decided = events.decisions(records)
    own = next((d for d in decided if d.incident == found.incident), None)
    if own is not None:
        decision = Decision(own.action, own.reason)
    else:
        places = [place(rule.name, other) for other in regions(environment)]
        before = [d for other in places for d in events.decisions(journal.records(other))]
        decision = events.decide(found, rule, region, events.since_start(before, now))
    return Standing(rule, region, found, decision, tuple(decided))


def every(journal: Journal, environment: Environment, known: Policy) -> list[Standing]:
    """All rules and regions."""
    return [
        standing(journal, environment, known, rule, region)
        for rule in known.rules.values()
        for region in regions(environment)
    ]


def unanswered(journal: Journal, environment: Environment, now: float) -> list[tuple[Rule, str, Decided]]:
    """What was proposed, or was to start, and nobody has taken up: rule, the event's run, decision. Raises Problem."""
    known, found = policy(environment), []
    for rule in known.rules.values():
        forever = replace(rule, window_s=math.inf)
        for region in regions(environment):
            run = place(rule.name, region)
            records = journal.records(run)
            decided = events.decisions(records)
            if not decided:
                continue
            since = events.tally(events.votes(records), region, forever, known, now).incident
            waiting = events.unanswered(decided, since, _began(journal, rule.runbook), now)
            if waiting is not None:
                found.append((rule, run, waiting))
    return found


def _began(journal: Journal, runbook: str) -> float:
    """When a runbook was begun last; 0 when it never was."""
    for run in reversed(journal.runs()):
        for record in journal.records(run):
            if record.kind == "run_started" and record.data["runbook"] == runbook:
                return record.wall
    return 0.0


# -- taking in


def receive(
    journal: Journal, environment: Environment, token_digest: str, payload: Any
) -> tuple[list[Standing], list[Standing]]:
    """Keep what a message says and decide: what it is about, and those of it that this call has to carry out.

    Raises Problem when the message is refused.
    """
    known = policy(environment)
    witness = events.witness_of(known, token_digest)
    if witness is None:
        raise refuse(journal, environment, "", "its sender's token is none of the witnesses'")
    try:
        said = events.statements(events.parse(payload), known, regions(environment))
    except Unusable as error:
        raise refuse(journal, environment, witness.name, str(error)) from None
    for statement in said:
        run, rule = place(statement.rule, statement.region), known.rules[statement.rule]
        before = events.votes(journal.records(run))
        if events.worth_keeping(before, witness.name, statement.says, time.time(), rule.window_s):
            data = {
                "witness": witness.name,
                "site": witness.site,
                "says": statement.says,
                "fingerprint": statement.alert.fingerprint,
                "starts_at": statement.alert.starts_at,
            }
            journal.record("alert_seen", run, None, data)
    about, own = [], []
    for rule_name, region in dict.fromkeys((s.rule, s.region) for s in said):
        found = standing(journal, environment, known, known.rules[rule_name], region)
        about.append(found)
        if found.decision.action != "ignore" and _claim(journal, found):
            own.append(found)
        elif not found.tally.incident:
            _withdrawn(journal, environment, found)
    return about, own


def refuse(journal: Journal, environment: Environment, witness: str, why: str) -> Problem:
    """The refusal of a message, kept in the journal as long as there are few."""
    now = time.time()
    recent = [r for r in journal.records(events.REFUSED) if now - r.wall < 3600]
    if len(recent) < events.REFUSED_AN_HOUR:
        journal.record("alert_refused", events.REFUSED, None, {"witness": witness, "why": why})
    who = f"of witness {witness}" if witness else "of nobody known"
    return Problem(
        f"An alert {who} is refused: {why}",
        code="alert-refused",
        touched="Nothing was touched and nobody's word counts more or less",
        next_command=f"runbook event show -i {environment.path}",
    )


def _claim(journal: Journal, found: Standing) -> bool:
    """Whether it is this process that carries the decision out."""
    incident = found.tally.incident
    if any(d.incident == incident for d in found.decided):
        return False
    token = secrets.token_hex(6)
    data = {
        "incident": incident,
        "action": found.decision.action,
        "reason": found.decision.reason,
        "runbook": found.rule.runbook,
        "witnesses": {site: list(names) for site, names in found.tally.lost.items()},
        "claim": token,
    }
    journal.record("alert_decided", found.run, None, data)
    decided = events.decisions(journal.records(found.run))
    return any(d.incident == incident and d.claim == token for d in decided)


def _withdrawn(journal: Journal, environment: Environment, found: Standing) -> None:
    """Everybody took the word back: whoever was called for it is told so, once."""
    if not found.decided:
        return
    last = found.decided[-1]
    notifier = Notifier(journal, environment, found.run, definition.load(found.rule.runbook))
    notifier.event(
        "withdrawn", None, f"No witness says any more that {found.region} is lost", f"withdrawn:{last.incident}"
    )
    notifier.close(PATIENCE_S)


# -- carrying out


def detach(journal: Journal, environment: Environment, found: Standing) -> None:
    """Have it carried out by a process of its own: planning and running take longer than an alert's sender waits."""
    directory = _logs(journal)
    command = [sys.executable, "-m", "runbooks", "event", "carry-out", found.run, str(found.tally.incident)]
    log = os.open(directory / f"{found.tally.incident}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        subprocess.Popen(
            [*command, "-i", str(environment.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
            | {"PYTHONPATH": _python_path()},
        )
    finally:
        os.close(log)


def _logs(journal: Journal) -> Path:
    directory = journal.directory / "events"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def _python_path() -> str:
    """So that ``python -m runbooks`` is this very package, wherever the process that received the alert stands."""
    own = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH", "")])])


def carry_out(journal: Journal, environment: Environment, run: str, incident: int) -> str:
    """Propose or start what was decided about an incident; the outcome. Raises Problem when there is nothing to do."""
    known = policy(environment)
    _, rule_name, region = [*run.split(":"), "", ""][:3]
    rule = known.rules.get(rule_name)
    decided = next((d for d in events.decisions(journal.records(run)) if d.incident == incident), None)
    if rule is None or decided is None or not _carrier(journal, run, incident):
        raise Problem(
            f"Nothing is left to carry out about incident {incident} of {run}",
            code="event-done",
            next_command=f"runbook event show -i {environment.path}",
        )
    parameters = {name: environment.template(v, event_region=region) for name, v in rule.parameters.items()}
    words = [rule.runbook, "-i", str(environment.path)]
    for name, value in parameters.items():
        words += ["--param", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    notifier = Notifier(journal, environment, run, definition.load(rule.runbook))
    try:
        if decided.action == "start":
            notifier.event(
                "triggered", None, f"{decided.reason}: {rule.runbook} starts by itself", f"triggered:{incident}"
            )
            started, why = _start(journal, words, _logs(journal) / f"{incident}.run.log")
            if started:
                return _outcome(journal, run, incident, {"outcome": "started", "run": started})
            _propose(notifier, incident, f"{decided.reason}, but it did not start by itself: {why}", words)
            return _outcome(journal, run, incident, {"outcome": "refused", "detail": why})
        # People first: a plan of a lost region takes its time.
        _propose(notifier, incident, decided.reason, words)
        plan, text, command = _plan(words)
        notifier.event("planned", None, text, f"planned:{incident}", command)
        return _outcome(journal, run, incident, {"outcome": "proposed", "plan": plan, "detail": text})
    finally:
        notifier.close(PATIENCE_S)


def _carrier(journal: Journal, run: str, incident: int) -> bool:
    """Whether it is this process, and only this one ever, that carries the decision out."""
    token = secrets.token_hex(6)
    journal.record("alert_decided", run, None, {"incident": incident, "carrier": token})
    carriers = [r.data for r in journal.records(run) if "carrier" in r.data and r.data["incident"] == incident]
    return bool(carriers[0]["carrier"] == token)


def _propose(notifier: Notifier, incident: int, reason: str, words: list[str]) -> None:
    notifier.event("proposed", None, reason, f"proposed:{incident}", shlex.join(["runbook", "run", *words]))


def _outcome(journal: Journal, run: str, incident: int, data: dict[str, Any]) -> str:
    journal.record("alert_decided", run, None, {"incident": incident, **data})
    return str(data["outcome"])


def _start(journal: Journal, words: list[str], log: Path) -> tuple[str, str]:
    """The run that was begun, which goes on without this process; or why there is none."""
    began = time.time()
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "runbooks", "run", *words, "--yes"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    while time.time() - began < BEGIN_S:
        ended = child.poll()
        for run in reversed(journal.runs()[-5:]):
            for record in journal.records(run):
                if record.kind == "run_started" and record.wall >= began and record.data.get("pid") == child.pid:
                    return run, ""
        if ended is not None:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            return "", one_line(lines[-1][:300]) if lines else f"runbook run ended with {ended}"
        time.sleep(0.2)
    return "", f"it was not begun within {BEGIN_S:g} s"


def _plan(words: list[str]) -> tuple[str, str, str]:
    """The plan's hash (empty: there is none), what it says in a sentence, and the next command."""
    again = shlex.join(["runbook", "plan", *words])
    command = [sys.executable, "-m", "runbooks", "plan", *words, "--json"]
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PLAN_S
        )
        document = json.loads(done.stdout)
        if "error" in document:
            return "", f"It could not be planned: {document['error']['what']}", str(document["error"]["next"])
        plan, obstacles = str(document["hash"]), [step.get("obstacle") for step in document["steps"]]
        stop = next((str(obstacle["why"]) for obstacle in obstacles if obstacle), "")
        says = f"would be refused: {stop}" if stop else f"makes {document['changes']} changes"
        return plan, f"Plan {plan[:12]} of it {says}", str(document["next"])
    except subprocess.TimeoutExpired:
        return "", f"It could not be planned within {PLAN_S:g} s", again
    except (ValueError, KeyError, TypeError):
        return "", f"It could not be planned: runbook plan ended with {done.returncode}", again
