"""Tells people what a run does, without ever holding it up.

An event is put on the journal as intended (``notify_intended``) before each receiver is asked, and its outcome after
(``notify_done``). Whoever wrote the first ``notify_intended`` of an event, a receiver and an attempt is the one who
sends: that makes two machines, and a run that is resumed, tell people once. What was intended and has no outcome,
because its process was killed, is sent again only to receivers that can tell a repetition; for the others it is
"unknown".
"""

from __future__ import annotations

import functools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from runbooks import outlook, receivers
from runbooks.errors import Problem, one_line
from runbooks.receivers import SEVERITIES, Action, Answer, ConfigurationError, Message, Receiver, Severity

if TYPE_CHECKING:
    from runbooks.definition import Definition
    from runbooks.environment import Environment
    from runbooks.journal import Journal, Record

T = TypeVar("T")
PATIENCE_S = 5.0
"""The longest that the end of a run waits for its last messages."""
GIVE_UP_S = 30.0
"""Seconds after which a message is not tried again by the process that sends it."""
ATTEMPTS = 3
SEND_S = 15.0
"""Seconds after which a receiver that drips its answer is left alone."""
TEXT = 500
"""Characters of a text that are sent and kept; the journal has the whole story."""

SECRET = 8
"""Characters below which a secret is none, and could be a part of any word."""

ROUTES: Mapping[str, tuple[str, ...]] = {
    "critical": ("pagerduty", "slack", "sms"),
    "high": ("pagerduty", "slack"),
    "normal": ("slack",),
    "low": ("slack", "email"),
    "summary": ("email",),
    "escalation": ("pagerduty", "slack", "sms", "email"),
}
"""From CensusChat's specification: PagerDuty for critical and high, Slack for all, e-mail for summaries and low, SMS
for critical."""
ESCALATE_AFTER_S = 900.0
"""The specification's 15 minutes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of an event by its name. severity None: the runbook's own; at_least raises it."""

    next_command: str
    severity: Severity | None = None
    at_least: Severity = "low"
    summary: bool = False
    page: Action = "trigger"


KINDS: Mapping[str, Kind] = {
    "started": Kind("runbook status {run}", severity="normal"),
    "waiting": Kind("runbook approve {run} --as NAME"),
    "emergency": Kind("runbook status {run}", at_least="high"),
    "failed": Kind("runbook resume {run}", summary=True),
    "refused": Kind("runbook status {run}", summary=True),
    "interrupted": Kind("runbook resume {run}", summary=True),
    "succeeded": Kind("runbook report {run}", severity="normal", summary=True, page="resolve"),
    "resumed": Kind("runbook status {run}", severity="normal", page="acknowledge"),
    "undone": Kind("runbook report {run}", summary=True),
    "aborted": Kind("runbook report {run}", severity="normal", summary=True, page="resolve"),
    # What the timer finds (escalation.py), what an alert brings (events.py), and a person.
    "dead": Kind("runbook resume {run}", at_least="high"),
    "escalated": Kind("runbook notify ack {run}", severity="critical"),
    "acknowledged": Kind("runbook status {run}", severity="normal", page="acknowledge"),
    "proposed": Kind("runbook event show", at_least="high"),
    "planned": Kind("runbook event show", severity="normal"),
    "triggered": Kind("runbook runs", at_least="high"),
    "withdrawn": Kind("runbook event show", severity="normal", page="resolve"),
    "test": Kind("runbook notify test --help", severity="low"),
}


def severity_of(event: str, runbook: Severity) -> Severity:
    """How grave an event of a runbook of that severity is."""
    kind = KINDS.get(event, Kind(""))
    return max(kind.severity or runbook, kind.at_least, key=SEVERITIES.index)


# -- configuration


@dataclass(frozen=True, slots=True)
class Configuration:
    """Who is told what in an environment. problems: one sentence each; what they are about is left out."""

    receivers: Mapping[str, Receiver] = field(default_factory=dict)
    routes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ROUTES)
    escalate_after_s: float = ESCALATE_AFTER_S
    escalations: int = 4
    """How often what nobody acknowledges is said again, once every ``escalate_after_s``."""
    problems: tuple[str, ...] = ()

    def receivers_for(self, event: str, severity: Severity) -> list[Receiver]:
        if event == "test":
            return list(self.receivers.values())
        names = list(self.routes["escalation"] if event == "escalated" else self.routes[severity])
        if KINDS.get(event, Kind("")).summary:
            names += self.routes["summary"]
        if KINDS.get(event, Kind("")).page != "trigger":
            names.append("pagerduty")
        return [self.receivers[name] for name in dict.fromkeys(names) if name in self.receivers]


def configuration(environment: Environment) -> Configuration:
    """What the inventory's ``runbook_notifications`` says. Never raises: what is wrong is left out and told."""
    problems: list[str] = []
    given = environment.raw("runbook_notifications")
    if isinstance(given, str):
        try:
            given = environment.get("runbook_notifications")
        except Problem as problem:
            return Configuration(
                problems=(f"runbook_notifications cannot be read from the inventory ({problem.code})",)
            )
    if given is None:
        return Configuration()
    if not isinstance(given, Mapping):
        return Configuration(problems=("runbook_notifications is not a mapping",))

    def part(name: str) -> Any:
        try:
            return environment.template(given[name]) if name in given else None
        except Problem as problem:
            # The library's sentence can hold the text of a vault or of a lookup.
            problems.append(f"runbook_notifications.{name} cannot be read from the inventory ({problem.code})")
            return None

    found: dict[str, Receiver] = {}
    for name in given:
        if name in receivers.NAMES and (described := part(name)) is not None:
            try:
                found[name] = receivers.make(name, described)
            except ConfigurationError as error:
                problems.append(f"runbook_notifications.{error}")
        elif name not in (*receivers.NAMES, "routes", "escalate_after_s", "escalations"):
            problems.append(f"runbook_notifications has no part {one_line(str(name))[:40]}")
    routes = dict(ROUTES)
    for key, names in (part("routes") or {}).items():
        if key not in ROUTES or not isinstance(names, list) or any(n not in receivers.NAMES for n in names):
            problems.append(
                f"runbook_notifications.routes: {one_line(str(key))[:40]} must be one of {', '.join(ROUTES)}, with a "
                f"list of {', '.join(receivers.NAMES)}"
            )
            continue
        routes[key] = tuple(names)
    after = _positive(part("escalate_after_s"), ESCALATE_AFTER_S, "escalate_after_s", problems)
    most = _positive(part("escalations"), 4, "escalations", problems)
    return Configuration(found, routes, after, int(most), tuple(problems))


def _positive(value: Any, default: float, name: str, problems: list[str]) -> float:
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if number <= 0:
        problems.append(f"runbook_notifications.{name} is not a number above 0")
        return default
    return number


# -- what the journal says was told


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one receiver. attempt counts from 1; outcome None: intended, and nothing is known."""

    key: str
    receiver: str
    attempt: int
    claim: str
    message: Mapping[str, Any]
    at: float
    outcome: receivers.Outcome | None = None


def deliveries(records: Iterable[Record]) -> dict[tuple[str, str], Delivery]:
    """The latest attempt of each event and receiver. Of two claims of one attempt the first one counts."""
    found: dict[tuple[str, str], Delivery] = {}
    for record in records:
        data = record.data
        if record.kind == "notify_intended":
            place = (data["key"], data["receiver"])
            if place not in found or found[place].attempt < data["attempt"]:
                found[place] = Delivery(*place, data["attempt"], data["claim"], data, record.wall)
        elif record.kind == "notify_done":
            place = (data["key"], data["receiver"])
            known = found.get(place)
            if known is not None and known.claim == data["claim"]:
                found[place] = Delivery(*place, known.attempt, known.claim, known.message, known.at, data["outcome"])
    return found


def paged(records: Iterable[Record]) -> bool:
    """Whether an incident was opened for the run."""
    return any(
        r.kind == "notify_intended" and r.data["receiver"] == "pagerduty" and r.data["action"] == "trigger"
        for r in records
    )


def next_attempt(known: Delivery | None, deduplicates: bool, abandoned: bool) -> int | Literal["unknown"] | None:
    """Which attempt is to be made now; None: none, "unknown": none, and that has to be written down.

    abandoned: whoever intended the known attempt can no longer be sending it.
    """
    if known is None:
        return 1
    if not abandoned:
        return None
    if known.outcome == "failed":
        return known.attempt + 1
    if known.outcome is None:
        return known.attempt + 1 if deduplicates else "unknown"
    return None


# -- sending


def bounded(send: Callable[[Message], Answer], message: Message) -> Answer:
    """The answer, or "unknown" after SEND_S: also where a receiver keeps every single read short of its time-out."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(send(message))
        except Exception as error:
            answers.put(Answer("unknown", f"it failed ({type(error).__name__})"))

    threading.Thread(target=work, name="notify-send", daemon=True).start()
    try:
        return answers.get(timeout=SEND_S)
    except queue.Empty:
        return Answer("unknown", f"no answer within {SEND_S:g} s")


def deliver(receiver: Receiver, message: Message, stop: threading.Event) -> Answer:
    """Send, and again where the receiver surely did not take it (or can tell a repetition), for GIVE_UP_S at most."""
    until = time.monotonic() + GIVE_UP_S
    for attempt in range(1, ATTEMPTS + 1):
        answer = bounded(receiver.send, message)
        if answer.again_s is None or attempt == ATTEMPTS or time.monotonic() + answer.again_s > until:
            break
        if stop.wait(answer.again_s * attempt):
            break
    return answer


class Notifier:
    """Tells what one run does. No method raises, and only ``close`` waits, for as long as it is told.

    problems: what is wrong with the configuration, one sentence each, for the person who starts the run.
    """

    def __init__(
        self, journal: Journal, environment: Environment, run: str, definition: Definition | None = None
    ) -> None:
        self._journal, self._environment, self._run, self._definition = journal, environment, run, definition
        self.configuration = _safely(lambda: configuration(environment), Configuration(), "configuration")
        self.problems = list(self.configuration.problems)
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outboxes: dict[str, queue.SimpleQueue[tuple[Message, Delivery] | None]] = {}
        self._threads: list[threading.Thread] = []
        self._own: set[str] = set()
        self._told: set[tuple[str, str, int]] = set()
        self._dispatcher: threading.Thread | None = None
        self._hurry, self._closed = threading.Event(), threading.Event()
        self.sent: list[tuple[str, Answer]] = []
        """What came of each message, receiver by receiver, in the order of the answers."""

    def event(
        self, name: str, severity: str | None = None, text: str = "", key: str | None = None, next_command: str = ""
    ) -> None:
        """Tell it to whom it concerns, in the background.

        severity: None for what follows from the event and the runbook. key: the same for the same event forever; None
        for the event's name and how often the run was resumed. "resumed" also settles what a dead process left open.
        """
        if not self.configuration.receivers:
            return
        if name == "resumed":
            self.settle()
        self._begin(lambda: self._intend(name, cast("Severity | None", severity), text, key, next_command))

    def settle(self, abandoned: Callable[[Delivery], bool] = lambda _: True) -> None:
        """Take up deliveries that a process which is gone did not finish."""
        if self.configuration.receivers:
            self._begin(lambda: self._settle(abandoned))

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for what is on its way, ``patience_s`` seconds at most. What is not done by then stays intended."""
        until = time.monotonic() + patience_s
        self._hurry.set()
        self._events.put(None)
        if self._dispatcher is not None:
            self._dispatcher.join(max(0.0, until - time.monotonic()))
        for outbox in list(self._outboxes.values()):
            outbox.put(None)
        for thread in list(self._threads):
            thread.join(max(0.0, until - time.monotonic()))
        self._closed.set()

    # -- in the background

    def _begin(self, work: Callable[[], None]) -> None:
        self._events.put(work)
        if self._dispatcher is None:
            self._dispatcher = threading.Thread(target=self._dispatch, name="notify", daemon=True)
            self._dispatcher.start()

    def _dispatch(self) -> None:
        while (work := self._events.get()) is not None and not self._closed.is_set():
            _safely(work, None, "event")

    def _intend(self, name: str, severity: Severity | None, text: str, key: str | None, next_command: str) -> None:
        # Whoever looks after a run whose journal is gone has to know it most of all: then it is told from memory.
        nothing: list[Record] = []
        records = _safely(lambda: self._journal.records(self._run), nothing, "the journal's records")
        runbook, own = self._runbook(records)
        wanted = getattr(self._definition, "notifications", None)
        if wanted is not None and name in KNOWN_TO_DEFINITIONS and name not in wanted:
            return
        severity = severity if severity in SEVERITIES else severity_of(name, own)
        kind = KINDS.get(name, Kind("runbook status {run}"))
        key = key or f"{name}:{sum(r.kind == 'run_resumed' for r in records)}"
        data = {
            "event": name,
            "severity": severity,
            "key": key,
            "runbook": runbook,
            "text": self._clean(text),
            "next": next_command or self._next(name) or kind.next_command.format(run=self._run),
        }
        known = deliveries(records)
        for receiver in self.configuration.receivers_for(name, severity):
            action: Action = "trigger"
            if receiver.name == "pagerduty":
                action = kind.page
                if action != "trigger" and not paged(records):
                    continue
            if (key, receiver.name) not in known:
                self._claim(receiver, {**data, "receiver": receiver.name, "action": action}, 1)

    def _settle(self, abandoned: Callable[[Delivery], bool]) -> None:
        for delivery in deliveries(self._journal.records(self._run)).values():
            receiver = self.configuration.receivers.get(delivery.receiver)
            if receiver is None or delivery.attempt >= 2 * ATTEMPTS or delivery.claim in self._own:
                continue
            attempt = next_attempt(delivery, receiver.deduplicates, abandoned(delivery))
            if attempt == "unknown":
                self._done(delivery, Answer("unknown", "its process was gone before the answer"))
            elif attempt is not None:
                self._claim(receiver, delivery.message, attempt)

    def _claim(self, receiver: Receiver, data: Mapping[str, Any], attempt: int) -> None:
        """Write the intent; when nobody was faster, send. A journal that cannot be written is no reason for silence:
        then it is this process alone that knows what it sent."""
        token, place = secrets.token_hex(6), (str(data["key"]), receiver.name)
        own = Delivery(*place, attempt, token, data, time.time())

        def first() -> bool:
            self._journal.record("notify_intended", self._run, None, {**data, "attempt": attempt, "claim": token})
            return deliveries(self._journal.records(self._run))[place].claim == token

        if (*place, attempt) in self._told or not _safely(first, True, "an intent") or self._closed.is_set():
            return
        self._told.add((*place, attempt))
        self._own.add(token)
        if receiver.name not in self._outboxes:
            outbox: queue.SimpleQueue[tuple[Message, Delivery] | None] = queue.SimpleQueue()
            thread = threading.Thread(target=self._send, args=(receiver, outbox), name="notify-" + receiver.name)
            thread.daemon = True
            self._outboxes[receiver.name] = outbox
            self._threads.append(thread)
            thread.start()
        self._outboxes[receiver.name].put((self.message(data), own))

    def message(self, data: Mapping[str, Any]) -> Message:
        environment = self._environment.name
        return Message(
            id=f"{environment}/{self._run}/{data['key']}",
            incident=f"{environment}/{self._run}",
            action=data["action"],
            event=data["event"],
            severity=data["severity"],
            environment=environment,
            runbook=data["runbook"],
            run=self._run,
            what=data["text"],
            next_command=data["next"],
        )

    def _send(self, receiver: Receiver, outbox: queue.SimpleQueue[tuple[Message, Delivery] | None]) -> None:
        while (item := outbox.get()) is not None:
            message, delivery = item
            answer = deliver(receiver, message, self._hurry)
            if self._closed.is_set():
                return
            self.sent.append((receiver.name, answer))
            _safely(functools.partial(self._done, delivery, answer), None, "outcome")

    def _done(self, delivery: Delivery, answer: Answer) -> None:
        data = {"key": delivery.key, "receiver": delivery.receiver, "claim": delivery.claim}
        self._journal.record(
            "notify_done", self._run, None, {**data, "outcome": answer.outcome, "detail": self._clean(answer.detail)}
        )

    def _next(self, name: str) -> str | None:
        """The one next command of a run that is over or stands still; nothing for other events."""
        if name not in ("waiting", "failed", "refused", "interrupted", "undone"):
            return None

        def look() -> str | None:
            return outlook.next_command(self._journal, self._journal.state(self._run), name)

        return _safely(look, None, "the next command")

    def _runbook(self, records: Sequence[Record]) -> tuple[str, Severity]:
        """The runbook's name and severity; a run without a start (an alert's) is told as what its id says."""
        if self._definition is None:
            from runbooks import definition

            name = next((r.data["runbook"] for r in records if r.kind == "run_started"), None)
            if name is None:
                return self._run, "normal"
            try:
                self._definition = definition.load(name)
            except Problem:
                return name, "high"
        return self._definition.name, cast("Severity", self._definition.severity)

    def _clean(self, text: str) -> str:
        """Short, and without the receivers' own secrets."""
        for receiver in self.configuration.receivers.values():
            for secret in receiver.secrets():
                if len(secret) >= SECRET:
                    text = text.replace(secret, "***")
        text = text.strip()
        return text if len(text) <= TEXT else text[: TEXT - 3] + "..."


KNOWN_TO_DEFINITIONS = frozenset(
    ("started", "waiting", "emergency", "failed", "refused", "interrupted", "succeeded", "resumed", "undone")
)


def _safely(work: Callable[[], T], default: T, what: str) -> T:
    """Nothing that goes wrong with telling may reach the run; a fault of this module is written to stderr, without
    the text of an exception, which can hold a secret."""
    try:
        return work()
    except Exception as error:
        import sys

        print(f"warning: notifications: {what} failed ({type(error).__name__})", file=sys.stderr)
        return default
