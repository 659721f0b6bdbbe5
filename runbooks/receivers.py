"""Who is told: Slack, PagerDuty, e-mail and SMS, each one request with a bounded time.

apprise was looked at and left out (it cannot acknowledge or resolve a PagerDuty incident and answers only yes or no, so
"not accepted" and "perhaps accepted" are one); slack_sdk and pagerduty (the successor of pdpyras) too: each is one POST
here, and their retries wait longer than a fail-over may. urllib3, smtplib and boto3 carry it.

What a receiver answers is one of three things, because only one of them may be tried again everywhere: it took the
message, it surely did not, or nobody knows. Nothing here repeats a library's error text: it names URLs, and a URL of
Slack is a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import smtplib
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from urllib.parse import urlsplit

from runbooks.errors import one_line

Severity = Literal["critical", "high", "normal", "low"]
SEVERITIES: tuple[Severity, ...] = ("low", "normal", "high", "critical")
Action = Literal["trigger", "acknowledge", "resolve"]
Outcome = Literal["sent", "failed", "unknown"]

CONNECT_S = 3.0
ANSWER_S = 5.0
"""Seconds for a connection, and for each read of the answer."""
TOTAL_S = 10.0
"""Seconds for one request in all, so that an answer that comes byte by byte ends too."""
RETRY_AFTER_S = 20.0
"""The longest that a receiver may ask to be left alone before a message is given up."""
ANSWER_BYTES = 4096
SMS_CHARACTERS = 160


class ConfigurationError(Exception):
    """A receiver's configuration cannot be used; says which and why, in one sentence without a secret."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A value that never shows itself."""

    value: str

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__


@dataclass(frozen=True, slots=True)
class Message:
    """What is said. id is the same for the same event forever; incident is one per run (PagerDuty's dedup_key)."""

    id: str
    incident: str
    action: Action
    event: str
    severity: Severity
    environment: str
    runbook: str
    run: str
    what: str
    next_command: str

    @property
    def title(self) -> str:
        return one_line(f"[{self.severity}] {self.environment}: {self.runbook} {self.event}")

    @property
    def text(self) -> str:
        """What a person reads, without the title."""
        lines = [self.what, f"Run: {self.run}" if self.run else "", self.next_command and f"Next: {self.next_command}"]
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it. again_s: seconds after which it may be tried again; None: not at all."""

    outcome: Outcome
    detail: str = ""
    again_s: float | None = None


class Receiver(Protocol):
    """deduplicates: the same message sent twice reaches people once."""

    name: ClassVar[str]

    @property
    def deduplicates(self) -> bool: ...

    def send(self, message: Message) -> Answer: ...

    def secrets(self) -> tuple[str, ...]: ...


# -- HTTP


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    retry_after_s: float | None


class SurelyNot(Exception):
    """The request did not reach the receiver."""


class Perhaps(Exception):
    """The request went out, and what came of it is not known."""


def post(url: str, document: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
    """One POST of JSON without redirections. Raises SurelyNot and Perhaps, whose texts hold no part of the URL's path.

    A proxy of the environment (HTTPS_PROXY, NO_PROXY) is used.
    """
    import urllib3

    host = urlsplit(url).hostname or ""
    until = time.monotonic() + TOTAL_S
    timeout = urllib3.Timeout(connect=CONNECT_S, read=ANSWER_S)
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(urlsplit(url).scheme)
    pool: urllib3.PoolManager = urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()
    with pool:
        try:
            answer = pool.request(
                "POST",
                url,
                body=json.dumps(document).encode(),
                headers={"Content-Type": "application/json; charset=utf-8", **headers},
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            body = b""
            for piece in answer.stream(ANSWER_BYTES):
                body += piece
                if len(body) >= ANSWER_BYTES:
                    break
                if time.monotonic() > until:
                    raise Perhaps(f"{host} did not end its answer within {TOTAL_S:g} s")
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
            raise SurelyNot(f"{host} cannot be reached ({_kind(error)})") from None
        except urllib3.exceptions.SSLError:
            raise SurelyNot(f"{host} does not prove who it is (TLS)") from None
        except urllib3.exceptions.TimeoutError:
            raise Perhaps(f"{host} did not answer within {ANSWER_S:g} s") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Perhaps(f"{host} broke off ({_kind(error)})") from None
        return Reply(answer.status, body, _seconds(answer.headers.get("Retry-After")))


def _kind(error: BaseException) -> str:
    return type(error).__name__.removesuffix("Error").removesuffix("Exception")


def _seconds(text: str | None) -> float | None:
    """A Retry-After in seconds; one that is a date or nonsense counts as none."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(text or ""))
    return None


def judge(reply: Reply, deduplicates: bool) -> Answer | None:
    """What an HTTP status says on its own; None when the body has to be looked at (2xx)."""
    if 200 <= reply.status < 300:
        return None
    if reply.status in (429, 503):
        # Both say that it was not taken.
        wait = 1.0 if reply.retry_after_s is None else reply.retry_after_s
        return Answer("failed", f"HTTP {reply.status}", wait if wait <= RETRY_AFTER_S else None)
    if reply.status >= 500:
        return Answer("failed" if deduplicates else "unknown", f"HTTP {reply.status}", 1.0 if deduplicates else None)
    return Answer("failed", f"HTTP {reply.status}")


def send_http(url: str, document: Mapping[str, Any], headers: Mapping[str, str], deduplicates: bool) -> Reply | Answer:
    """The 2xx reply, or what any other course of things means."""
    try:
        reply = post(url, document, headers)
    except SurelyNot as error:
        return Answer("failed", str(error), 1.0)
    except Perhaps as error:
        return Answer("failed" if deduplicates else "unknown", str(error), 1.0 if deduplicates else None)
    return judge(reply, deduplicates) or reply


# -- the receivers


@dataclass(frozen=True, slots=True)
class Slack:
    """An incoming webhook, or chat.postMessage with a bot's token and a channel. Slack knows no duplicate."""

    name: ClassVar[str] = "slack"
    webhook: Secret | None
    token: Secret | None
    channel: str
    api: str
    deduplicates: bool = False

    def send(self, message: Message) -> Answer:
        text = f"*{_slack(message.title)}*\n{_slack(message.text)}"[:3000]
        if self.webhook is not None:
            answer = send_http(self.webhook.value, {"text": text}, {}, self.deduplicates)
            return Answer("sent") if isinstance(answer, Reply) else answer
        assert self.token is not None
        answer = send_http(
            f"{self.api}/chat.postMessage",
            {"channel": self.channel, "text": text},
            {"Authorization": f"Bearer {self.token.value}"},
            self.deduplicates,
        )
        if isinstance(answer, Answer):
            return answer
        # The Web API says 200 to everything and puts the truth into the body.
        try:
            document = json.loads(answer.body)
        except ValueError:
            return Answer("unknown", "the answer is no JSON")
        if isinstance(document, dict) and document.get("ok") is True:
            return Answer("sent")
        return Answer("failed", one_line(f"Slack says {str(document.get('error', 'no'))[:80]}"))

    def secrets(self) -> tuple[str, ...]:
        return tuple(s.value for s in (self.webhook, self.token) if s is not None)


def _slack(text: str) -> str:
    """Slack's three characters; nothing in a message may become a mention or a link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True, slots=True)
class PagerDuty:
    """Events API v2: one incident a run, triggered, acknowledged and resolved by its dedup_key."""

    name: ClassVar[str] = "pagerduty"
    routing_key: Secret
    url: str
    deduplicates: bool = True

    SEVERITY: ClassVar[Mapping[Severity, str]] = {
        "critical": "critical",
        "high": "error",
        "normal": "warning",
        "low": "info",
    }

    def send(self, message: Message) -> Answer:
        document: dict[str, Any] = {
            "routing_key": self.routing_key.value,
            "event_action": message.action,
            "dedup_key": message.incident[-255:],
        }
        if message.action == "trigger":
            document["payload"] = {
                "summary": f"{message.title}: {one_line(message.what)}"[:1024],
                "source": message.environment,
                "severity": self.SEVERITY[message.severity],
                "component": message.runbook,
                "class": message.event,
                "custom_details": {"run": message.run, "what": message.what, "next": message.next_command},
            }
        answer = send_http(self.url, document, {}, self.deduplicates)
        return Answer("sent") if isinstance(answer, Reply) else answer

    def secrets(self) -> tuple[str, ...]:
        return (self.routing_key.value,)


@dataclass(frozen=True, slots=True)
class Email:
    """SMTP with STARTTLS. The Message-ID follows from the event, so a mailbox can tell a repetition."""

    name: ClassVar[str] = "email"
    server: str
    port: int
    sender: str
    to: tuple[str, ...]
    starttls: bool
    user: str
    password: Secret | None
    ca_file: str | None
    deduplicates: bool = True

    def send(self, message: Message) -> Answer:
        mail = EmailMessage()
        mail["Subject"] = message.title
        mail["From"] = self.sender
        mail["To"] = ", ".join(self.to)
        mail["Date"] = formatdate()
        digest = hashlib.sha256(message.id.encode()).hexdigest()[:40]
        mail["Message-ID"] = f"<{digest}@{self.sender.rpartition('@')[2]}>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(f"{message.title}\n\n{message.text}\n")
        try:
            with self._connected() as smtp:
                refused = smtp.send_message(mail)
        except smtplib.SMTPAuthenticationError:
            return Answer("failed", f"{self.server} does not accept the user or the password")
        except smtplib.SMTPResponseException as error:
            return Answer("failed", f"{self.server} says {error.smtp_code}", 1.0 if error.smtp_code < 500 else None)
        except smtplib.SMTPRecipientsRefused:
            return Answer("failed", f"{self.server} refuses every recipient")
        except smtplib.SMTPNotSupportedError:
            return Answer("failed", f"{self.server} does not offer STARTTLS or a login")
        except ssl.SSLError:
            return Answer("failed", f"{self.server} does not prove who it is (TLS)")
        except (OSError, smtplib.SMTPException) as error:
            return Answer("failed", f"{self.server} cannot be reached or broke off ({_kind(error)})", 1.0)
        return Answer("sent", f"{len(refused)} recipient(s) refused" if refused else "")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[smtplib.SMTP]:
        # The name of this machine is not asked of DNS: that can take longer than everything else.
        with smtplib.SMTP(self.server, self.port, local_hostname="localhost", timeout=ANSWER_S) as smtp:
            if self.starttls:
                smtp.starttls(context=ssl.create_default_context(cafile=self.ca_file))
            if self.password is not None:
                smtp.login(self.user, self.password.value)
            yield smtp

    def secrets(self) -> tuple[str, ...]:
        return () if self.password is None else (self.password.value,)


@dataclass(frozen=True, slots=True)
class Sms:
    """SNS: a topic or telephone numbers, with the credentials that boto3 finds. Only a FIFO topic knows duplicates."""

    name: ClassVar[str] = "sms"
    topic: str
    numbers: tuple[str, ...]
    region: str
    endpoint_url: str | None

    @property
    def deduplicates(self) -> bool:
        return self.topic.endswith(".fifo")

    def send(self, message: Message) -> Answer:
        import boto3
        import botocore.config
        import botocore.exceptions

        text = one_line(f"{message.title}: {message.what} Next: {message.next_command}".replace("\n", " "))
        if len(text) > SMS_CHARACTERS:
            text = text[: SMS_CHARACTERS - 3] + "..."
        client = boto3.client(
            "sns",
            region_name=self.region,
            endpoint_url=self.endpoint_url,
            config=botocore.config.Config(
                connect_timeout=CONNECT_S,
                read_timeout=ANSWER_S,
                retries={"total_max_attempts": 1},
                ignore_configured_endpoint_urls=True,
            ),
        )
        exceptions = botocore.exceptions
        arguments: dict[str, Any] = {
            "Message": text,
            "MessageAttributes": {"AWS.SNS.SMS.SMSType": {"DataType": "String", "StringValue": "Transactional"}},
        }
        if self.deduplicates:
            arguments["MessageGroupId"] = "runbooks"
            arguments["MessageDeduplicationId"] = hashlib.sha256(message.id.encode()).hexdigest()
        targets = [{"TopicArn": self.topic}] if self.topic else [{"PhoneNumber": number} for number in self.numbers]
        told = 0
        for target in targets:
            try:
                client.publish(**target, **arguments)
            except (
                exceptions.EndpointConnectionError,
                exceptions.ConnectTimeoutError,
                exceptions.NoCredentialsError,
            ) as e:
                answer = Answer("failed", f"SNS cannot be reached ({_kind(e)})", 1.0)
            except exceptions.ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", "?"))
                status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
                throttled = code in ("Throttling", "ThrottledException", "ThrottlingException")
                answer = Answer(
                    "unknown" if status >= 500 else "failed", f"SNS says {code}", 1.0 if throttled else None
                )
            except (exceptions.BotoCoreError, OSError) as error:
                answer = Answer("unknown", f"SNS did not answer ({_kind(error)})", 1.0 if self.deduplicates else None)
            else:
                told += 1
                continue
            if told:
                return Answer("unknown", f"{told} of {len(targets)} numbers told, then: {answer.detail}")
            return answer
        return Answer("sent")

    def secrets(self) -> tuple[str, ...]:
        return ()


# -- configuration


NAMES = ("slack", "pagerduty", "email", "sms")


def make(name: str, given: Mapping[str, Any]) -> Receiver:
    """The receiver that an inventory describes. Raises ConfigurationError."""
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{name}: it is not a mapping")
    fields = _Fields(name, dict(given))
    receiver: Receiver
    if name == "slack":
        webhook, token = fields.secret("webhook"), fields.secret("token")
        if (webhook is None) == (token is None):
            raise ConfigurationError("slack: it wants one of webhook and token (each also as _file or _env)")
        if webhook is not None:
            _https("slack", "webhook", webhook.value)
        channel = fields.text("channel")
        if token is not None and not channel:
            raise ConfigurationError("slack: a token wants a channel beside it")
        receiver = Slack(webhook, token, channel, _https(name, "api", fields.text("api", SLACK_API)))
    elif name == "pagerduty":
        key = fields.secret("routing_key")
        if key is None:
            raise ConfigurationError("pagerduty: routing_key is missing (also as routing_key_file or routing_key_env)")
        receiver = PagerDuty(key, _https(name, "url", fields.text("url", PAGERDUTY_URL)))
    elif name == "email":
        to = fields.texts("to")
        server, sender = fields.text("server"), fields.text("from")
        if not server or not to or "@" not in sender or any("@" not in address for address in to):
            raise ConfigurationError("email: it wants server, from and to, the latter two as addresses")
        starttls = fields.boolean("starttls", True)
        if not starttls and not _loopback(server):
            raise ConfigurationError("email: only a server on this machine may be used without starttls")
        user, password = fields.text("user"), fields.secret("password")
        if bool(user) != (password is not None):
            raise ConfigurationError("email: user and password go together")
        ca_file = fields.text("ca_file") or None
        receiver = Email(server, fields.integer("port", 587), sender, to, starttls, user, password, ca_file)
    elif name == "sms":
        topic, numbers = fields.text("topic"), fields.texts("numbers")
        if bool(topic) == bool(numbers):
            raise ConfigurationError("sms: it wants one of topic (an ARN) and numbers")
        if any(not number.startswith("+") or not number[1:].isdigit() for number in numbers):
            raise ConfigurationError("sms: a number is written as +15550100")
        region = fields.text("region") or (topic.split(":")[3] if topic.count(":") >= 5 else "")
        if not region:
            raise ConfigurationError("sms: region is missing")
        endpoint = fields.text("endpoint_url")
        receiver = Sms(topic, numbers, region, _https(name, "endpoint_url", endpoint) if endpoint else None)
    else:
        raise ConfigurationError(f"{name}: there is no such receiver, there are {', '.join(NAMES)}")
    fields.end()
    return receiver


SLACK_API = "https://slack.com/api"
PAGERDUTY_URL = "https://events.pagerduty.com/v2/enqueue"


def _https(name: str, field: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and _loopback(parts.hostname or "")):
        raise ConfigurationError(f"{name}: {field} is not an https:// address")
    return url.rstrip("/")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(OSError):
        return socket.inet_aton(host)[0] == 127
    return host == "::1"


class _Fields:
    """Takes fields out of a receiver's configuration and complains about what is left."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self._name, self._given = name, given

    def text(self, field: str, default: str = "") -> str:
        value = self._given.pop(field, default)
        if not isinstance(value, str):
            raise ConfigurationError(f"{self._name}: {field} is not a text")
        return value.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        value = self._given.pop(field, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigurationError(f"{self._name}: {field} is not a list of texts")
        return tuple(v.strip() for v in value)

    def integer(self, field: str, default: int) -> int:
        value = self._given.pop(field, default)
        with contextlib.suppress(ValueError, TypeError):
            if 0 < int(value) < 65536:
                return int(value)
        raise ConfigurationError(f"{self._name}: {field} is not a number from 1 to 65535")

    def boolean(self, field: str, default: bool) -> bool:
        value = self._given.pop(field, default)
        if not isinstance(value, bool):
            raise ConfigurationError(f"{self._name}: {field} is not true or false")
        return value

    def secret(self, field: str) -> Secret | None:
        """FIELD (from a vault or a lookup), FIELD_file or FIELD_env."""
        given = [
            (suffix, self.text(field + suffix)) for suffix in ("", "_file", "_env") if field + suffix in self._given
        ]
        if not given:
            return None
        if len(given) > 1:
            raise ConfigurationError(f"{self._name}: {field} is given more than once")
        suffix, value = given[0]
        if suffix == "_env":
            value, where = os.environ.get(value, ""), f"the environment variable {value}"
        elif suffix == "_file":
            path, where = Path(value).expanduser(), f"the file {value}"
            try:
                value = path.read_text(encoding="utf-8") if path.is_file() else ""
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{self._name}: {where} cannot be read ({_kind(error)})") from None
        else:
            where = field
        if not value.strip():
            raise ConfigurationError(f"{self._name}: {where} holds nothing")
        return Secret(value.strip())

    def end(self) -> None:
        if self._given:
            raise ConfigurationError(f"{self._name}: it has no field {sorted(map(str, self._given))[0]}")
