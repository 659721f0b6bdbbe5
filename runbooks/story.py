"""What the records of one run tell beyond its state: attempts, effects, gates, approvals, windows, messages, in order.

Pure, and lenient: a record of an older or a newer program, or one without some of its keys, costs its own line only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from runbooks.journal import Record
from runbooks.progress import seconds

PART_OF_STEP = re.compile(r"\.(before|after|undo)(\.\d+)?$")


@dataclass(slots=True)
class Event:
    """One line of the timeline. at: unix seconds; level: good, warn, bad or nothing."""

    at: float
    kind: str
    step: str | None
    text: str
    level: str = ""


@dataclass(slots=True)
class Attempt:
    """One try of a step (or of its undo). Times in unix seconds, None while there is none."""

    started: float
    ended: float | None = None
    outcome: str | None = None
    elapsed_s: float | None = None
    undo: bool = False
    wait_s: float = 0.0
    """Seconds of it that a lease was waited out."""


@dataclass(slots=True)
class Effect:
    """What a task intended on a host, and what came of it. Times in unix seconds.

    open: intended, and neither its outcome nor the end of its step is recorded; so it may have happened or not.
    """

    task: str
    host: str
    action: str
    intended: float | None
    done: float | None = None
    changed: bool | None = None
    failed: bool = False
    diff: str = ""
    open: bool = True


@dataclass(slots=True)
class StepStory:
    """What happened in and around one step."""

    attempts: list[Attempt] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    windows: list[dict[str, Any]] = field(default_factory=list)
    undo: dict[str, Any] | None = None
    budget_s: float | None = None


@dataclass(slots=True)
class Story:
    """Everything of one run; steps only those that have records."""

    timeline: list[Event] = field(default_factory=list)
    steps: dict[str, StepStory] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    authority: dict[str, Any] = field(default_factory=dict)
    """What the run began by: the plan's hash, whose approvals counted, how many were needed, whether none was asked."""
    approvals: list[dict[str, Any]] = field(default_factory=list)
    emergencies: list[dict[str, Any]] = field(default_factory=list)
    holders: list[dict[str, Any]] = field(default_factory=list)
    """Who had the lock, one entry each time that it was taken."""
    notifications: list[dict[str, Any]] = field(default_factory=list)
    acknowledgements: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def step(self, name: str | None) -> StepStory:
        """Of the step, also by the name that its gates and its undo go by (STEP.before.1, STEP.undo)."""
        return self.steps.setdefault(PART_OF_STEP.sub("", name or ""), StepStory())

    @property
    def windows(self) -> list[dict[str, Any]]:
        return sorted((w for step in self.steps.values() for w in step.windows), key=lambda w: w["at"])


def tell(records: Iterable[Record]) -> Story:
    """The story of one run's records, which come in their order."""
    story = Story()
    for record in records:
        teller = TELLERS.get(record.kind, _unknown)
        text, level = teller(story, record, record.data)
        if text:
            story.timeline.append(Event(record.wall, record.kind, record.step, text, level))
    return story


Data = Mapping[str, Any]
Told = tuple[str, str]


def _unknown(story: Story, record: Record, data: Data) -> Told:
    return f"{record.kind.replace('_', ' ')}{': ' + _short(data['text']) if data.get('text') else ''}", ""


def _started(story: Story, record: Record, data: Data) -> Told:
    _holder(story, record, data, "started")
    _authorised(story, data)
    door = story.holders[-1]["door"]
    return f"Run started{f' by {door}' if door else ''}, by {_who(data)}", ""


def _resumed(story: Story, record: Record, data: Data) -> Told:
    # An attempt that has no end died with the process that made it.
    for step in story.steps.values():
        for attempt in step.attempts:
            if attempt.ended is None and attempt.outcome is None:
                attempt.outcome = "died"
    _holder(story, record, data, "resumed")
    if "plan" in data:
        _authorised(story, data)
    return f"Run resumed, by {_who(data)}", "warn"


def _authorised(story: Story, data: Data) -> None:
    story.authority = {
        "plan": data.get("plan"),
        "approvals": data.get("approvals") or [],
        "needed": data.get("approvals_needed"),
        "lifted": bool(data.get("approvals_lifted")),
    }


def _holder(story: Story, record: Record, data: Data, how: str) -> None:
    keys = ("who", "host", "pid", "fence", "door")
    taken = {key: data.get(key, getattr(record, key, None)) for key in keys}
    story.holders.append({"at": record.wall, "how": how, **taken})


def _who(data: Data) -> str:
    where = f" on {data['host']}" if data.get("host") else ""
    return f"{data.get('who') or data.get('name') or 'somebody'}{where}"


def _finished(story: Story, record: Record, data: Data) -> Told:
    state = str(data.get("state", "ended"))
    level = {"succeeded": "good", "failed": "bad", "refused": "bad"}.get(state, "warn")
    return f"Run {state}{': ' + _short(data['reason']) if data.get('reason') else ''}", level


def _step_started(story: Story, record: Record, data: Data) -> Told:
    story.step(record.step).attempts.append(Attempt(record.wall))
    story.step(record.step).budget_s = _number(data.get("budget_s"))
    number = sum(not a.undo for a in story.step(record.step).attempts)
    return f"{record.step} began{f', attempt {number}' if number > 1 else ''}", ""


def _step_finished(story: Story, record: Record, data: Data) -> Told:
    step = story.step(record.step)
    attempt = next((a for a in reversed(step.attempts) if not a.undo and a.ended is None), None)
    _end(attempt, record, data)
    for effect in step.effects:
        # A step that tells its outcome has waited for its tasks: what has no outcome of its own did nothing.
        effect.open = effect.open and data.get("outcome") in ("interrupted", "timed out")
    return _ending(f"{record.step}", data), _level(data)


def _undo_started(story: Story, record: Record, data: Data) -> Told:
    step = story.step(record.step)
    step.attempts.append(Attempt(record.wall, undo=True))
    step.undo = {"started": record.wall, "ended": None, "outcome": None, "failures": []}
    step.undo["says"] = str(data.get("title") or data.get("says") or "")
    return f"Undo of {record.step} began", "warn"


def _undo_finished(story: Story, record: Record, data: Data) -> Told:
    step = story.step(record.step)
    _end(next((a for a in reversed(step.attempts) if a.undo and a.ended is None), None), record, data)
    step.undo = {
        "started": (step.undo or {}).get("started"),
        "ended": record.wall,
        "outcome": data.get("outcome"),
        "says": str(data.get("says") or (step.undo or {}).get("says", "")),
        "failures": data.get("failures") or [],
    }
    return _ending(f"Undo of {record.step}", data), _level(data)


def _end(attempt: Attempt | None, record: Record, data: Data) -> None:
    if attempt is not None:
        attempt.ended, attempt.outcome = record.wall, data.get("outcome")
        attempt.elapsed_s = _number(data.get("elapsed_s"))
        attempt.wait_s = _number((data.get("outputs") or {}).get("lease_waited_s")) or 0.0


def _ending(what: str, data: Data) -> str:
    took = _number(data.get("elapsed_s"))
    after = f" after {seconds(took)}" if took is not None else ""
    return f"{what}: {data.get('outcome', 'ended')}{after}{': ' + _short(data['says']) if data.get('says') else ''}"


def _level(data: Data) -> str:
    return {"ok": "good", "interrupted": "warn", "told": "warn"}.get(str(data.get("outcome")), "bad")


def _effect_intended(story: Story, record: Record, data: Data) -> Told:
    hosts = data.get("hosts") or [data.get("host", "")]
    for host in hosts if isinstance(hosts, list) else [hosts]:
        story.step(record.step).effects.append(
            Effect(str(data.get("task", "")), str(host), str(data.get("action", "")), record.wall)
        )
    return "", ""


def _effect_done(story: Story, record: Record, data: Data) -> Told:
    step, task, host = story.step(record.step), str(data.get("task", "")), str(data.get("host", ""))
    effect = next(
        (e for e in reversed(step.effects) if (e.task, e.host) == (task, host) and e.done is None),
        None,
    )
    if effect is None:
        effect = Effect(task, host, str(data.get("action", "")), None)
        step.effects.append(effect)
    effect.done, effect.open, effect.changed = record.wall, False, bool(data.get("changed"))
    effect.failed = bool(data.get("failed") or data.get("unreachable"))
    effect.diff = _diff(data.get("diff"))
    effect.action = effect.action or str(data.get("action", ""))
    return "", ""


def _diff(diff: Any) -> str:
    """What differs, one line each: its name, and how many lines came and went. The lines themselves are not kept."""
    lines = []
    for one in diff if isinstance(diff, list) else [diff] if diff else []:
        if isinstance(one, Mapping):
            counts = [f"{sign}{one[key]}" for sign, key in (("+", "added"), ("-", "removed")) if one.get(key)]
            lines.append(" ".join([str(one.get("what") or ""), *counts]).strip())
        else:
            lines.append(str(one))
    return "\n".join(filter(None, lines))


def _plan_made(story: Story, record: Record, data: Data) -> Told:
    story.plan = {**_filled(data, "plan", "who"), "at": record.wall, "plan": data.get("plan") or data.get("hash")}
    return f"Plan made{' by ' + str(data['who']) if data.get('who') else ''}: {hashed(story.plan['plan'])}", ""


def _approval_given(story: Story, record: Record, data: Data) -> Told:
    story.approvals.append(
        {
            **_filled(data, "plan", "name", "key", "step"),
            "at": record.wall,
            "expires": _moment(data.get("expires")),
            "door": getattr(record, "door", None),
        }
    )
    what = f"step {data['step']}" if data.get("step") else f"plan {hashed(data.get('plan'))}"
    return f"Approved by {data.get('name', 'somebody')}: {what}", "good"


def _emergency_declared(story: Story, record: Record, data: Data) -> Told:
    story.emergencies.append(
        {**_filled(data, "who", "reason"), "at": record.wall, "expires": _moment(data.get("expires"))}
    )
    return f"Emergency declared by {_who(data)}: {_short(data.get('reason', ''))}", "bad"


def _window_checked(story: Story, record: Record, data: Data) -> Told:
    story.step(record.step).windows.append(
        {
            **_filled(data, "open", "why", "lifted"),
            "at": record.wall,
            "step": record.step,
            "next_open": _moment(data.get("next_open")),
        }
    )
    if data.get("open") and not data.get("lifted"):
        return "", ""
    lifted = ", lifted by the emergency" if data.get("lifted") else ""
    return f"Window closed for {record.step or 'the run'}{lifted}: {_short(data.get('why', ''))}", "warn"


def _notify_intended(story: Story, record: Record, data: Data) -> Told:
    known = _known(story, data)
    if known is None:
        story.notifications.append(_message(record, data))
    elif (data.get("attempt") or 1) > (known["attempt"] or 1):
        known.update(attempt=data["attempt"], claim=data.get("claim"), at=record.wall, done=None, outcome=None)
    # Otherwise another process was faster with the same attempt, and this one sends nothing.
    return "", ""


def _known(story: Story, data: Data) -> dict[str, Any] | None:
    """The message about the same event to the same receiver."""
    same = ("key", "receiver")
    return next((n for n in reversed(story.notifications) if all(n[key] == data.get(key) for key in same)), None)


def _message(record: Record, data: Data) -> dict[str, Any]:
    keys = ("event", "severity", "receiver", "key", "text", "attempt", "claim")
    return {**_filled(data, *keys), "at": record.wall, "done": None, "outcome": None, "detail": ""}


def _notify_done(story: Story, record: Record, data: Data) -> Told:
    message = _known(story, data)
    if message is not None and message["claim"] != data.get("claim"):
        return "", ""
    if message is None:
        message = _message(record, data)
        story.notifications.append(message)
    message.update(done=record.wall, outcome=data.get("outcome", "sent"), detail=str(data.get("detail") or ""))
    if message["outcome"] in ("sent", "delivered", "ok"):
        return "", ""
    return f"Message to {data.get('receiver', 'a receiver')}: {message['outcome']} {_short(message['detail'])}", "warn"


def _acknowledged(story: Story, record: Record, data: Data) -> Told:
    story.acknowledgements.append({**_filled(data, "name", "who", "key"), "at": record.wall})
    return f"Acknowledged by {_who(data)}", "good"


def _note(story: Story, record: Record, data: Data) -> Told:
    text = str(data.get("text") or data.get("says") or "")
    gate = data.get("gate")
    if isinstance(gate, Mapping):
        told = _filled(gate, "when", "title", "outcome", "says", "elapsed_s")
        story.step(record.step).gates.append({**told, "at": record.wall})
        return f"Gate {told['when'] or ''} {record.step}: {_short(text)}", _level(gate)
    if not text:
        return "", ""
    story.notes.append({"at": record.wall, "step": record.step, "text": text})
    return f"Note: {_short(text)}", ""


def _short(text: Any, most: int = 300) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def hashed(value: Any) -> str:
    """The part of a hash that people compare."""
    text = str(value or "unknown")
    return text if len(text) <= 16 else text[:12] + "…"


def _filled(data: Data, *keys: str) -> dict[str, Any]:
    """The record's values, and None for what it does not have."""
    return {**dict.fromkeys(keys), **data}


def _moment(value: Any) -> float | None:
    """Unix seconds of a moment that was recorded as such, or as ISO 8601."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return _number(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


TELLERS = {
    "run_started": _started,
    "run_resumed": _resumed,
    "run_finished": _finished,
    "step_started": _step_started,
    "step_finished": _step_finished,
    "undo_started": _undo_started,
    "undo_finished": _undo_finished,
    "effect_intended": _effect_intended,
    "effect_done": _effect_done,
    "plan_made": _plan_made,
    "approval_given": _approval_given,
    "emergency_declared": _emergency_declared,
    "window_checked": _window_checked,
    "notify_intended": _notify_intended,
    "notify_done": _notify_done,
    "acknowledged": _acknowledged,
    "note": _note,
}
