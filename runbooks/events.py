"""When alerts may propose or start a runbook: who said what, who of them counts, and what follows. Pure.

A witness is whoever sends alerts with a token of its own (an Alertmanager, a prober outside the regions). It stands at
a site. What counts is how many *sites* say that a region is lost, within a window of time: two witnesses at one site
are one, and a site of the lost region itself is none, because it may be the thing that is broken. A resolved alert
takes its witness's word back. Whoever says that the region lives turns a start into a proposal.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from runbooks.journal import Record

Says = Literal["lost", "not lost", "alive", "not alive"]
Action = Literal["ignore", "propose", "start"]

WITNESSES = 3
"""How many sites must say that a region is lost; for a critical runbook never fewer."""
WINDOW_S = 600.0
COOLDOWN_S = 24 * 3600.0
"""Seconds after an automatic start in which the same rule only proposes: regions that come and go must not drag the
service to and fro."""
ALERTS = 100
"""More alerts than this in one message are refused."""
PAYLOAD_BYTES = 1024 * 1024
REFUSED_AN_HOUR = 20
"""How many refusals an hour are kept in the journal; the rest is told to the caller only."""
REFUSED = "event:refused"
"""The run under which refusals are kept."""


class Unusable(Exception):
    """A payload or a configuration that cannot be used: why, in one sentence without anything that was sent."""


@dataclass(frozen=True, slots=True)
class Witness:
    """Who may speak. digest: SHA-256 of its token in hex."""

    name: str
    site: str
    digest: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Which alerts speak about a region, and what they lead to. lost, alive: the labels that an alert must have."""

    name: str
    runbook: str
    lost: Mapping[str, str]
    alive: Mapping[str, str] = field(default_factory=dict)
    region_label: str = "region"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    witnesses: int = WITNESSES
    window_s: float = WINDOW_S
    cooldown_s: float = COOLDOWN_S
    action: Literal["propose", "start"] = "propose"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the inventory's ``runbook_events`` says."""

    witnesses: Mapping[str, Witness] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert of a message. starts_at as it was sent: only for the reader."""

    firing: bool
    labels: Mapping[str, str]
    fingerprint: str
    starts_at: str


@dataclass(frozen=True, slots=True)
class Statement:
    """What an alert says about a region under a rule."""

    rule: str
    region: str
    says: Says
    alert: Alert


@dataclass(frozen=True, slots=True)
class Vote:
    """A statement of a witness as the journal holds it. at: unix seconds when it was received."""

    seq: int
    at: float
    witness: str
    says: Says


@dataclass(frozen=True, slots=True)
class Tally:
    """What is said about one region now. incident: the record with which it began; 0 when nobody says it is lost.

    lost: site -> witnesses that count. discounted: witness -> why it does not. alive: who says that the region lives.
    """

    incident: int
    lost: Mapping[str, tuple[str, ...]]
    discounted: Mapping[str, str]
    alive: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    reason: str


# -- configuration


def policy(given: Any, severities: Mapping[str, str]) -> Policy:
    """The policy that an inventory describes. severities: of the runbooks there are. Raises Unusable."""
    if given is None:
        return Policy()
    if not isinstance(given, Mapping) or set(given) - {"witnesses", "rules"}:
        raise Unusable("runbook_events wants witnesses and rules, and nothing else")
    witnesses = {}
    for name, data in _mapping(given.get("witnesses", {}), "witnesses").items():
        if not isinstance(data, Mapping) or set(data) != {"site", "token_sha256"}:
            raise Unusable(f"runbook_events.witnesses.{name} wants site and token_sha256")
        digest = str(data["token_sha256"]).lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise Unusable(f"runbook_events.witnesses.{name}.token_sha256 is not 64 hexadecimal digits")
        witnesses[str(name)] = Witness(str(name), str(data["site"]), digest)
    digests = [w.digest for w in witnesses.values()]
    if len(set(digests)) != len(digests):
        raise Unusable("two witnesses of runbook_events have one token: each must have its own")
    rules = {str(n): _rule(str(n), r, severities) for n, r in _mapping(given.get("rules", {}), "rules").items()}
    return Policy(witnesses, rules)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Unusable(f"runbook_events.{name} is not a mapping")
    return value


def _rule(name: str, data: Any, severities: Mapping[str, str]) -> Rule:
    where = f"runbook_events.rules.{name}"
    known = {
        "runbook", "lost", "alive", "region_label", "parameters", "witnesses", "window_s", "cooldown_s", "action"
    }  # fmt: skip
    if not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise Unusable(f"{where}: a rule's name has small letters, digits and hyphens")
    if not isinstance(data, Mapping) or set(data) - known or not {"runbook", "lost"} <= set(data):
        raise Unusable(f"{where} wants runbook and lost, and may have {', '.join(sorted(known - {'runbook', 'lost'}))}")
    runbook = str(data["runbook"])
    if runbook not in severities:
        raise Unusable(f"{where}: there is no runbook {runbook}")
    lost, alive = _labels(data["lost"], where + ".lost"), _labels(data.get("alive", {}), where + ".alive")
    if not lost:
        raise Unusable(f"{where}.lost names no label: every alert would say that a region is lost")
    numbers: dict[str, float] = {}
    for key, default in (("witnesses", WITNESSES), ("window_s", WINDOW_S), ("cooldown_s", COOLDOWN_S)):
        value = data.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise Unusable(f"{where}.{key} is not a number above 0")
        numbers[key] = value
    count = int(numbers["witnesses"])
    if count < WITNESSES and severities[runbook] == "critical":
        raise Unusable(f"{where}: a critical runbook wants at least {WITNESSES} witnesses, not {count}")
    action = data.get("action", "propose")
    if action not in ("propose", "start"):
        raise Unusable(f"{where}.action is propose or start")
    return Rule(
        name,
        runbook,
        lost,
        alive,
        str(data.get("region_label", "region")),
        dict(_mapping(data.get("parameters", {}), f"rules.{name}.parameters")),
        count,
        numbers["window_s"],
        numbers["cooldown_s"],
        action,
    )


def _labels(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise Unusable(f"{where} is not a mapping of labels")
    return {str(k): str(v) for k, v in value.items()}


# -- one message


def digest(token: str) -> str:
    """What the inventory keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def witness_of(known: Policy, token_digest: str) -> Witness | None:
    """Whose token it was, looked at in a time that says nothing about it."""
    found = None
    for witness in known.witnesses.values():
        if hmac.compare_digest(witness.digest, token_digest.lower()):
            found = witness
    return found


def parse(payload: Any) -> list[Alert]:
    """The alerts of an Alertmanager webhook message (version 4). Raises Unusable."""
    if not isinstance(payload, Mapping) or payload.get("version") != "4":
        raise Unusable("it is not an Alertmanager message of version 4")
    alerts = payload.get("alerts")
    if not isinstance(alerts, list) or not 1 <= len(alerts) <= ALERTS:
        raise Unusable(f"it does not hold 1 to {ALERTS} alerts")
    return [_alert(alert) for alert in alerts]


def _alert(data: Any) -> Alert:
    if not isinstance(data, Mapping) or data.get("status") not in ("firing", "resolved"):
        raise Unusable("an alert of it is neither firing nor resolved")
    labels = data.get("labels")
    if not isinstance(labels, Mapping) or any(
        not isinstance(k, str) or not isinstance(v, str) or len(v) > 1024 for k, v in labels.items()
    ):
        raise Unusable("the labels of an alert of it are no short texts")
    starts_at, fingerprint = data.get("startsAt", ""), data.get("fingerprint", "")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{8,30}(Z|[+-]\d\d:\d\d)", str(starts_at)):
        raise Unusable("an alert of it does not say when it began")
    if not re.fullmatch("[0-9a-f]{0,64}", str(fingerprint)):
        raise Unusable("the fingerprint of an alert of it is none")
    return Alert(data["status"] == "firing", dict(labels), str(fingerprint), str(starts_at))


def statements(alerts: Iterable[Alert], known: Policy, regions: Iterable[str]) -> list[Statement]:
    """What the alerts say under the rules; alerts that no rule is about say nothing.

    Where one message says both, its witness's word is taken back last. Raises Unusable for a region that there is not.
    """
    regions, found = set(regions), []
    for alert in alerts:
        for rule in known.rules.values():
            for labels, yes, no in ((rule.lost, "lost", "not lost"), (rule.alive, "alive", "not alive")):
                if not labels or any(alert.labels.get(k) != v for k, v in labels.items()):
                    continue
                region = alert.labels.get(rule.region_label, "")
                if region not in regions:
                    raise Unusable(f"its label {rule.region_label} names no region of this environment")
                says: Any = yes if alert.firing else no
                found.append(Statement(rule.name, region, says, alert))
    return sorted(found, key=lambda s: s.says in ("not lost", "alive"))


# -- what was said until now


def votes(records: Iterable[Record]) -> list[Vote]:
    """The statements about one region under one rule, in the journal's order."""
    return [Vote(r.seq, r.wall, r.data["witness"], r.data["says"]) for r in records if r.kind == "alert_seen"]


def worth_keeping(said: Sequence[Vote], witness: str, says: Says, now: float, window_s: float) -> bool:
    """Whether a statement adds anything to the journal: not the same word again, unless its time is half over."""
    lost, alive = ("lost", "not lost"), ("alive", "not alive")
    pair = lost if says in lost else alive
    last = next((v for v in reversed(said) if v.witness == witness and v.says in pair), None)
    if last is None:
        # Nothing to take back.
        return says == pair[0]
    return last.says != says or (says == "lost" and now - last.at > window_s / 2)


def tally(said: Sequence[Vote], region: str, rule: Rule, known: Policy, now: float) -> Tally:
    """Who counts now. Sites and names are those of today's configuration, whatever the journal holds."""
    lost: dict[str, Vote] = {}
    alive: set[str] = set()
    incident = 0

    def counts(at: float) -> dict[str, Vote]:
        return {
            name: vote
            for name, vote in lost.items()
            if at - vote.at <= rule.window_s and not why_not(name, region, known)
        }

    for vote in said:
        if vote.says == "lost":
            before = counts(vote.at)
            lost[vote.witness] = vote
            if not before and counts(vote.at):
                incident = vote.seq
        elif vote.says == "not lost":
            lost.pop(vote.witness, None)
        elif vote.says == "alive":
            alive.add(vote.witness)
        else:
            alive.discard(vote.witness)
    counted = counts(now)
    sites: dict[str, list[str]] = {}
    for name in counted:
        if name not in alive:
            sites.setdefault(known.witnesses[name].site, []).append(name)
    discounted = {name: why_not(name, region, known) for name in lost}
    discounted |= {
        name: f"it said so more than {rule.window_s:g} s ago"
        for name, vote in lost.items()
        if now - vote.at > rule.window_s
    }
    discounted |= {name: "it also says that the region lives" for name in lost if name in alive}
    return Tally(
        incident if counted else 0,
        {site: tuple(sorted(names)) for site, names in sorted(sites.items())},
        {name: why for name, why in sorted(discounted.items()) if why},
        tuple(sorted(name for name in alive if name in known.witnesses)),
    )


def why_not(name: str, region: str, known: Policy) -> str:
    """Why a witness's word on a region does not count; nothing when it does."""
    witness = known.witnesses.get(name)
    if witness is None:
        return "it is no witness any more"
    if witness.site == region:
        return f"it stands in {region} itself"
    return ""


def decide(found: Tally, rule: Rule, region: str, since_start_s: float | None) -> Decision:
    """What follows. since_start_s: seconds since this rule started something by itself, None when it never did."""
    count = len(found.lost)
    if count < rule.witnesses:
        return Decision("ignore", f"{count} of {rule.witnesses} independent sites say that {region} is lost")
    who = f"{count} independent sites say that {region} is lost ({', '.join(found.lost)})"
    if found.alive:
        return Decision("propose", f"{who}, but {', '.join(found.alive)} says that it lives")
    if rule.action != "start":
        return Decision("propose", who)
    if since_start_s is not None and since_start_s < rule.cooldown_s:
        return Decision("propose", f"{who}, but this rule started a runbook by itself less than {_hours(rule)} ago")
    return Decision("start", who)


def _hours(rule: Rule) -> str:
    return f"{rule.cooldown_s / 3600:g} h"


# -- what came of it


@dataclass(frozen=True, slots=True)
class Decided:
    """The decision about one incident, and what came of it. outcome: none while nothing is known."""

    seq: int
    at: float
    incident: int
    action: Action
    reason: str
    claim: str
    outcome: str = ""
    run: str = ""
    acknowledged: bool = False


def decisions(records: Iterable[Record]) -> list[Decided]:
    """All decisions about one region under one rule. Of two about one incident the first one counts."""
    found: dict[int, Decided] = {}
    for r in records:
        data = r.data
        if r.kind == "alert_decided" and "claim" in data:
            decided = Decided(r.seq, r.wall, data["incident"], data["action"], data["reason"], data["claim"])
            found.setdefault(data["incident"], decided)
        elif r.kind == "alert_decided" and "outcome" in data and data["incident"] in found:
            known = found[data["incident"]]
            found[known.incident] = Decided(
                known.seq, known.at, known.incident, known.action, known.reason, known.claim, data["outcome"],
                data.get("run", ""), known.acknowledged,
            )  # fmt: skip
        elif r.kind == "acknowledged":
            found = {
                key: Decided(d.seq, d.at, d.incident, d.action, d.reason, d.claim, d.outcome, d.run, True)
                for key, d in found.items()
            }
    return list(found.values())


def since_start(decided: Iterable[Decided], now: float) -> float | None:
    """Seconds since the newest automatic start."""
    starts = [d.at for d in decided if d.action == "start"]
    return now - max(starts) if starts else None


UNDECIDED_S = 60.0
"""Seconds after which a decision without an outcome is one whose process was killed."""


def unanswered(decided: Sequence[Decided], said_since: int, run_began: float, now: float) -> Decided | None:
    """The decision that still waits for a person: a proposal, or a start of which nothing came.

    said_since: the incident as it is when words do not grow old (0: all were taken back); a proposal waits longer than
    its witnesses' words count. run_began: unix seconds when the rule's runbook was begun last, by whomever.
    """
    for d in reversed(decided):
        still = 0 < said_since <= d.incident and not d.acknowledged and run_began <= d.at
        if still and (d.outcome in ("proposed", "refused") or (not d.outcome and now - d.at > UNDECIDED_S)):
            return d
    return None
