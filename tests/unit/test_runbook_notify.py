"""People are told, once an event; and whatever a receiver does, the run does not wait for it."""

from __future__ import annotations

import dataclasses
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import Message as Mail
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from runbooks import notify, receivers
from runbooks.notify import Configuration, Notifier, configuration, deliveries, next_attempt, severity_of
from runbooks.receivers import Answer, ConfigurationError, Message, Severity
from tests.unit.runbook.post_office import accepted, closed_port, dripping, office, ok
from tests.unit.runbook.world import World

CANARY = "canary-4711"
RUN = "20261121-180000-paint-ab12"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with World.made(tmp_path) as made:
        made.begin(RUN)
        yield made


def slack(url: str) -> dict[str, Any]:
    return {"slack": {"webhook": f"{url}/services/{CANARY}"}}


def pagerduty(url: str) -> dict[str, Any]:
    return {"pagerduty": {"routing_key": CANARY, "url": url}}


def tell(world: World, *events: str, close: float = 5.0, severity: str | None = None) -> Notifier:
    notifier = world.notifier(RUN)
    for event in events:
        notifier.event(event, severity, f"what of {event}")
    notifier.close(close)
    return notifier


def outcomes(world: World) -> dict[tuple[str, str], str | None]:
    return {place: d.outcome for place, d in deliveries(world.journal.records(RUN)).items()}


# -- severities and routes

ALL: dict[str, dict[str, Any]] = {
    "slack": {"webhook": "https://hooks.slack.com/services/x"},
    "pagerduty": {"routing_key": "x"},
    "email": {"server": "mail.example.com", "from": "a@example.com", "to": ["b@example.com"]},
    "sms": {"numbers": ["+15550100"], "region": "us-east-1"},
}


@pytest.mark.parametrize(
    ("event", "runbook", "severity", "told"),
    [
        ("failed", "critical", "critical", ["pagerduty", "slack", "sms", "email"]),
        ("failed", "high", "high", ["pagerduty", "slack", "email"]),
        ("failed", "normal", "normal", ["slack", "email"]),
        ("failed", "low", "low", ["slack", "email"]),
        ("started", "critical", "normal", ["slack"]),
        ("waiting", "critical", "critical", ["pagerduty", "slack", "sms"]),
        ("waiting", "low", "low", ["slack", "email"]),
        ("emergency", "low", "high", ["pagerduty", "slack"]),
        ("succeeded", "critical", "normal", ["slack", "email", "pagerduty"]),
        ("resumed", "critical", "normal", ["slack", "pagerduty"]),
        ("escalated", "low", "critical", ["pagerduty", "slack", "sms", "email"]),
        ("dead", "normal", "high", ["pagerduty", "slack"]),
    ],
)
def test_severity_and_routes_follow_the_specification(
    event: str, runbook: Severity, severity: str, told: list[str]
) -> None:
    assert severity_of(event, runbook) == severity
    every = Configuration(receivers={name: receivers.make(name, given) for name, given in ALL.items()})
    assert [r.name for r in every.receivers_for(event, severity_of(event, runbook))] == told


# -- what receivers get


def test_slack_is_told_in_short_and_nothing_in_it_is_a_mention(world: World) -> None:
    with office(ok) as place:
        world.notifications = slack(place.url)
        notifier = world.notifier(RUN)
        notifier.event("failed", None, "db1 said <!channel> & broke")
        notifier.close()
        (got,) = place.got
    assert got["path"] == f"/services/{CANARY}"
    assert got["body"]["text"].splitlines() == [
        "*[critical] unit: paint failed*",
        "db1 said &lt;!channel&gt; &amp; broke",
        f"Run: {RUN}",
        f"Next: runbook resume {RUN}",
    ]
    assert outcomes(world) == {("failed:0", "slack"): "sent"}
    assert CANARY.encode() not in world.kept()


def test_slack_token_is_a_header_and_a_200_that_says_no_is_a_failure(world: World) -> None:
    with office(lambda _: (200, {}, b'{"ok": false, "error": "channel_not_found"}')) as place:
        world.notifications = {"slack": {"token": CANARY, "channel": "#ops", "api": place.url}}
        notifier = tell(world, "failed")
        (got,) = place.got
    assert (got["path"], got["body"]["channel"]) == ("/chat.postMessage", "#ops")
    assert got["headers"]["Authorization"] == f"Bearer {CANARY}"
    assert [a.detail for _, a in notifier.sent] == ["Slack says channel_not_found"]
    assert outcomes(world) == {("failed:0", "slack"): "failed"}


def test_pagerduty_opens_acknowledges_and_resolves_one_incident_a_run(world: World) -> None:
    with office(accepted) as place:
        world.notifications = pagerduty(place.url)
        tell(world, "started", "failed")
        world.take_over(RUN)
        tell(world, "resumed", "succeeded")
        got = [g["body"] for g in place.got]
    assert [g["event_action"] for g in got] == ["trigger", "acknowledge", "resolve"]
    assert {g["dedup_key"] for g in got} == {f"unit/{RUN}"}
    assert {g["routing_key"] for g in got} == {CANARY}
    assert got[0]["payload"]["severity"] == "critical"
    assert got[0]["payload"]["source"] == "unit"
    assert got[0]["payload"]["custom_details"]["next"] == f"runbook resume {RUN}"
    assert CANARY.encode() not in world.kept()


def test_no_incident_is_resolved_that_was_never_opened(world: World) -> None:
    with office(accepted) as place:
        world.notifications = pagerduty(place.url)
        tell(world, "started", "succeeded")
        assert place.got == []


def test_email_has_the_same_message_id_for_the_same_event(world: World) -> None:
    from aiosmtpd.controller import Controller
    from aiosmtpd.handlers import Message as Handler

    got: list[Mail] = []

    class Keep(Handler):
        def handle_message(self, message: Mail) -> None:
            got.append(message)

    controller = Controller(Keep(), hostname="127.0.0.1", port=closed_port())
    controller.start()
    try:
        world.notifications = {
            "email": {
                "server": "127.0.0.1",
                "port": controller.port,
                "from": "runbooks@example.com",
                "to": ["ops@example.com"],
                "starttls": False,
            }
        }
        notifier = tell(world, "failed")
        message = notifier.message(deliveries(world.journal.records(RUN))["failed:0", "email"].message)
        assert notifier.configuration.receivers["email"].send(message).outcome == "sent"
    finally:
        controller.stop()
    assert [m["Subject"] for m in got] == ["[critical] unit: paint failed"] * 2
    assert got[0]["Message-ID"] == got[1]["Message-ID"]
    assert f"Next: runbook resume {RUN}" in got[0].get_payload()


def test_email_over_starttls_with_a_password_and_a_server_that_must_prove_itself(world: World, tmp_path: Path) -> None:
    from aiosmtpd.controller import Controller
    from aiosmtpd.handlers import Message as Handler
    from aiosmtpd.smtp import AuthResult

    got: list[Mail] = []
    logins: list[bytes] = []

    class Keep(Handler):
        def handle_message(self, message: Mail) -> None:
            got.append(message)

    def login(_server: object, _session: object, _envelope: object, _mechanism: str, data: Any) -> AuthResult:
        logins.append(data.password)
        return AuthResult(success=data.password == CANARY.encode(), handled=False)

    certificate = own_certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    controller = Controller(
        Keep(),
        hostname="127.0.0.1",
        port=closed_port(),
        tls_context=tls,
        require_starttls=True,
        authenticator=login,
        auth_required=True,
    )
    controller.start()
    described = {
        "server": "127.0.0.1",
        "port": controller.port,
        "from": "runbooks@example.com",
        "to": ["ops@example.com", "second@example.com"],
        "user": "runbooks",
        "password": CANARY,
    }
    try:
        good = receivers.make("email", {**described, "ca_file": str(certificate)})
        assert good.send(message()) == Answer("sent")
        stranger = receivers.make("email", described).send(message())
        assert (stranger.outcome, stranger.detail) == ("failed", "127.0.0.1 does not prove who it is (TLS)")
        wrong = receivers.make("email", {**described, "ca_file": str(certificate), "password": "wrong"}).send(message())
        assert (wrong.outcome, wrong.again_s) == ("failed", None)
        assert "does not accept the user or the password" in wrong.detail
    finally:
        controller.stop()
    assert set(logins) == {CANARY.encode(), b"wrong"} and logins.count(CANARY.encode()) == 1, (
        "a server that does not prove itself gets no password"
    )
    assert [m["To"] for m in got] == ["ops@example.com, second@example.com"]
    assert CANARY not in repr(good)


def own_certificate(directory: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mail")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "mail.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_mail_server_that_is_gone_or_refuses(world: World) -> None:
    described = {"server": "127.0.0.1", "from": "a@example.com", "to": ["b@example.com"], "starttls": False}
    gone = receivers.make("email", {**described, "port": closed_port()}).send(message())
    assert (gone.outcome, gone.again_s) == ("failed", 1.0)
    with dripping() as port:
        lying = receivers.make("email", {**described, "port": port}).send(message())
        assert lying.outcome == "failed"


def test_sms_by_numbers_and_by_a_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    from moto import mock_aws
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.sns.models import sns_backends

    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        sns = sns_backends[DEFAULT_ACCOUNT_ID]["us-east-1"]
        numbers = receivers.make("sms", {"numbers": ["+15550100", "+15550101"], "region": "us-east-1"})
        assert numbers.send(message()) == Answer("sent")
        told = dict(entry[:2] for entry in sns.sms_messages.values())
        assert set(told) == {"+15550100", "+15550101"}
        assert set(told.values()) == {"[high] unit: paint failed: what Next: next"}
        long = dataclasses.replace(message(), what="x" * 500)
        assert numbers.send(long).outcome == "sent"
        assert max(len(entry[1]) for entry in sns.sms_messages.values()) == receivers.SMS_CHARACTERS
        topic = sns.create_topic("oncall.fifo", {"FifoTopic": "true"}, {})
        fifo = receivers.make("sms", {"topic": topic.arn})
        assert fifo.deduplicates
        assert fifo.send(message()) == Answer("sent")
        gone = receivers.make("sms", {"topic": topic.arn.replace("oncall.fifo", "no-such")}).send(message())
        assert (gone.outcome, gone.detail, gone.again_s) == ("failed", "SNS says NotFound", None)
    assert not numbers.deduplicates


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        (500, "InternalError", Answer("unknown", "SNS says InternalError")),
        (400, "Throttling", Answer("failed", "SNS says Throttling", 1.0)),
        (403, "AuthorizationError", Answer("failed", "SNS says AuthorizationError")),
    ],
)
def test_sms_where_sns_fails(monkeypatch: pytest.MonkeyPatch, status: int, code: str, wanted: Answer) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    body = f"<ErrorResponse><Error><Code>{code}</Code></Error></ErrorResponse>".encode()
    with office(lambda _: (status, {"Content-Type": "text/xml"}, body)) as place:
        described = {"numbers": ["+15550100"], "region": "us-east-1", "endpoint_url": place.url}
        assert receivers.make("sms", described).send(message()) == wanted
        assert len(place.got) == 1, "boto3 does not try again by itself"
        gone = receivers.make("sms", {**described, "endpoint_url": f"http://127.0.0.1:{closed_port()}"}).send(message())
        assert (gone.outcome, gone.again_s) == ("failed", 1.0)


# -- sent once


def test_event_is_sent_once_also_by_two_processes_and_again_after_a_resume(world: World) -> None:
    with office(ok) as place:
        world.notifications = slack(place.url)
        tell(world, "started", "started")
        notifiers = [world.notifier(RUN) for _ in range(8)]
        for notifier in notifiers:
            notifier.event("failed", None, "x")
        for notifier in notifiers:
            notifier.close()
        assert len(place.got) == 2
        world.take_over(RUN)
        tell(world, "resumed", "failed")
        assert len(place.got) == 4, "what happens after a resume is another event"


@pytest.mark.parametrize(
    ("outcome", "deduplicates", "abandoned", "wanted"),
    [
        (None, True, True, 2),
        (None, False, True, "unknown"),
        (None, True, False, None),
        (None, False, False, None),
        ("sent", True, True, None),
        ("failed", False, True, 2),
        ("failed", False, False, None),
        ("unknown", True, True, None),
    ],
)
def test_what_a_dead_process_left_open(
    outcome: receivers.Outcome | None, deduplicates: bool, abandoned: bool, wanted: int | str | None
) -> None:
    known = notify.Delivery("failed:0", "slack", 1, "c", {}, 0.0, outcome)
    assert next_attempt(known, deduplicates, abandoned) == wanted
    assert next_attempt(None, deduplicates, abandoned) == 1


KILLED = """
import sys
from pathlib import Path
from tests.unit.runbook.world import World
with World.made(Path(sys.argv[1]), {parts}) as world:
    notifier = world.notifier(sys.argv[2])
    notifier.event("failed", None, "x")
    notifier.close(60)
"""


def test_process_killed_between_intent_and_outcome(world: World, tmp_path: Path) -> None:
    """PagerDuty can tell a repetition and is told again; Slack cannot, and the journal says that nobody knows."""
    with office(lambda n: None if n == 1 else accepted(n)) as pages, office(lambda _: None) as chat:
        world.notifications = {**pagerduty(pages.url), **slack(chat.url)}
        code = KILLED.format(parts=repr(world.notifications))
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), RUN], cwd=Path.cwd(), env=os.environ)
        pages.wait(1)
        chat.wait(1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert set(outcomes(world).values()) == {None}
        world.take_over(RUN)
        tell(world, "resumed", severity="low", close=1.5)
        assert [g["body"]["event_action"] for g in pages.got] == ["trigger", "trigger", "acknowledge"]
        assert len({g["body"]["dedup_key"] for g in pages.got}) == 1
        told = outcomes(world)
        assert told["failed:0", "pagerduty"] == "sent"
        assert told["failed:0", "slack"] == "unknown"
        assert [g["body"]["text"].splitlines()[0] for g in chat.got[1:]] == ["*[low] unit: paint resumed*"]


# -- receivers that are dead, slow or lie


def test_receivers_that_are_dead_slow_or_lie_delay_nothing(world: World) -> None:
    with office(lambda _: None) as silent, office(lambda _: (500, {}, b"")) as broken:
        world.notifications = {
            **slack(silent.url),
            **pagerduty(broken.url),
            "email": {
                "server": "127.0.0.1",
                "port": closed_port(),
                "from": "a@example.com",
                "to": ["b@example.com"],
                "starttls": False,
            },
        }
        before = time.monotonic()
        notifier = world.notifier(RUN)
        for n in range(5):
            notifier.event("failed", None, "x", key=f"failed:{n}")
        assert time.monotonic() - before < 0.5, "an event waits for nobody"
        before = time.monotonic()
        notifier.close(3.0)
        assert time.monotonic() - before < 4.0
        records = [r for r in world.journal.records(RUN) if r.kind == "notify_intended"]
        assert len(records) == 15, "what was not sent in time is known"


def test_answer_that_drips_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "SEND_S", 0.5)
    with dripping() as port:
        world.notifications = slack(f"http://127.0.0.1:{port}")
        before = time.monotonic()
        notifier = tell(world, "failed")
        assert time.monotonic() - before < 3
    assert [(name, a.outcome) for name, a in notifier.sent] == [("slack", "unknown")]


@pytest.mark.parametrize(
    ("answers", "requests", "outcome"),
    [
        ([(429, {"Retry-After": "0.1"}, b""), (200, {}, b"ok")], 2, "sent"),
        ([(429, {"Retry-After": "3600"}, b"")], 1, "failed"),
        ([(429, {"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}, b""), (200, {}, b"ok")], 2, "sent"),
        ([(500, {}, b"")], 1, "unknown"),
        ([(404, {}, b"no_team")], 1, "failed"),
        ([(302, {"Location": "http://127.0.0.1:1/"}, b"")], 1, "failed"),
    ],
)
def test_slack_is_asked_again_only_when_it_surely_took_nothing(
    world: World, answers: list[tuple[int, dict[str, str], bytes]], requests: int, outcome: str
) -> None:
    with office(lambda n: answers[n - 1]) as place:
        world.notifications = slack(place.url)
        receiver = configuration(world.environment).receivers["slack"]
        answer = notify.deliver(receiver, message(), threading.Event())
        assert (len(place.got), answer.outcome) == (requests, outcome)
        assert CANARY not in answer.detail


def message() -> Message:
    return Message("unit/r/k", "unit/r", "trigger", "failed", "high", "unit", "paint", "r", "what", "next")


def test_pagerduty_is_asked_again_because_it_knows_repetitions(world: World) -> None:
    with office(lambda n: (500, {}, b"") if n == 1 else accepted(n)) as place:
        world.notifications = pagerduty(place.url)
        receiver = configuration(world.environment).receivers["pagerduty"]
        assert notify.deliver(receiver, message(), threading.Event()).outcome == "sent"
        assert len(place.got) == 2


def test_journal_that_fails_is_no_reason_for_silence(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with office(ok) as place:
        world.notifications = slack(place.url)
        notifier = world.notifier(RUN)
        world.journal.close()
        for _ in range(3):
            notifier.event("failed", None, "the journal is gone", "failed:0")
        notifier.close()
        (got,) = place.got
    assert "the journal is gone" in got["body"]["text"]
    said = capfd.readouterr().err
    assert "warning: notifications: an intent failed" in said
    assert CANARY not in said


# -- configuration

BAD: list[tuple[dict[str, Any], str]] = [
    ({"slack": {}}, "slack: it wants one of webhook and token"),
    ({"slack": {"webhook": "ftp://x/" + CANARY}}, "slack: webhook is not an https:// address"),
    ({"slack": {"webhook": "http://example.com/" + CANARY}}, "slack: webhook is not an https:// address"),
    ({"slack": {"webhook_file": "/nowhere"}}, "slack: the file /nowhere holds nothing"),
    ({"slack": {"token": CANARY}}, "slack: a token wants a channel beside it"),
    ({"slack": {"token": CANARY, "channel": "#a", "colour": 1}}, "slack: it has no field colour"),
    ({"slack": "https://example.com/" + CANARY}, "slack: it is not a mapping"),
    ({"pagerduty": {}}, "pagerduty: routing_key is missing"),
    ({"pagerduty": {"routing_key_env": "NO_SUCH"}}, "pagerduty: the environment variable NO_SUCH holds nothing"),
    ({"email": {"server": "x", "from": "a", "to": ["b@c"]}}, "email: it wants server, from and to"),
    (
        {"email": {"server": "mail.example.com", "from": "a@b", "to": ["b@c"], "starttls": False}},
        "email: only a server on this machine may be used without starttls",
    ),
    ({"email": {"server": "x", "from": "a@b", "to": ["b@c"], "user": "u"}}, "email: user and password go together"),
    ({"sms": {"numbers": ["0123"], "region": "us-east-1"}}, "sms: a number is written as +15550100"),
    ({"sms": {"numbers": ["+15550100"]}}, "sms: region is missing"),
    ({"sms": {}}, "sms: it wants one of topic (an ARN) and numbers"),
    ({"pager": {}}, "runbook_notifications has no part pager"),
    ({"routes": {"critical": ["fax"]}}, "runbook_notifications.routes: critical must be one of"),
    ({"escalate_after_s": 0}, "runbook_notifications.escalate_after_s is not a number above 0"),
]


@pytest.mark.parametrize(("given", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_configuration_is_one_sentence_and_leaves_the_rest(
    world: World, given: dict[str, Any], sentence: str
) -> None:
    good = {"pagerduty": {"routing_key": "k"}} if "pagerduty" not in given else {}
    world.notifications = {**given, **good}
    made = configuration(world.environment)
    (problem,) = made.problems
    assert sentence in problem
    assert CANARY not in problem
    assert "\n" not in problem
    assert set(made.receivers) == set(good)
    notifier = world.notifier(RUN)
    assert notifier.problems == [problem]
    notifier.close()


def test_secrets_come_from_files_and_variables_and_do_not_show(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(CANARY + "\n")
    monkeypatch.setenv("SLACK", "https://hooks.slack.com/" + CANARY)
    world.notifications = {
        "pagerduty": {"routing_key_file": str(tmp_path / "key")},
        "slack": {"webhook_env": "SLACK"},
    }
    made = configuration(world.environment)
    assert made.problems == ()
    assert {s for r in made.receivers.values() for s in r.secrets()} == {CANARY, "https://hooks.slack.com/" + CANARY}
    assert CANARY not in repr(made) + str(made)


def test_nothing_configured_is_nothing_done(world: World) -> None:
    before = threading.active_count()
    notifier = tell(world, "started", "failed")
    assert (notifier.problems, threading.active_count()) == ([], before)
    assert outcomes(world) == {}


def test_definition_says_which_events_are_told(world: World) -> None:
    with office(ok) as place:
        world.notifications = slack(place.url)
        world.wanted = ("failed",)
        tell(world, "started", "failed", "dead")
        titles = [g["body"]["text"].splitlines()[0] for g in place.got]
        assert titles == ["*[critical] unit: paint failed*", "*[critical] unit: paint dead*"]


@pytest.mark.parametrize("call", [lambda: receivers.make("fax", {}), lambda: receivers.make("slack", {"webhook": 1})])
def test_make_refuses(call: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        call()
