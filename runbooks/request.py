"""A run that may begin: its parameters, secret ones too, checked against the definition and the environment."""

from __future__ import annotations

import getpass
import hashlib
import os
import secrets as random_secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runbooks import preflight
from runbooks.definition import Definition, Parameter, Step
from runbooks.environment import Environment
from runbooks.errors import Problem, Refused, one_line
from runbooks.holding import Locks
from runbooks.session import Interrupted, Session, at_the_prompt

OBSERVE_S = 60.0
"""Seconds after which a playbook that observes a default is stopped."""
GATE_S = 120.0
"""Seconds after which a gate's playbook is stopped."""
HIDDEN = "***"


@dataclass(slots=True)
class Request:
    """A run that may begin: everything checked, nothing touched. left_out: hosts that may be missing and are.

    secrets: the values of secret parameters; they go to the playbooks' processes through a pipe and nowhere else.
    """

    run: str
    definition: Definition
    environment: Environment
    parameters: dict[str, Any]
    left_out: list[str] = field(default_factory=list)
    secrets: dict[str, Any] = field(default_factory=dict, repr=False)

    def variables(self) -> dict[str, Any]:
        """The playbooks' extra variables."""
        return {"runbook_run": self.run, "runbook_left_out": self.left_out, **self.parameters, **self.secrets}

    def hidden(self) -> frozenset[str]:
        """The texts that are written down nowhere."""
        return self.environment.vaulted | frozenset(map(str, self.secrets.values()))

    def clean(self, value: Any) -> Any:
        """The value without the secrets that a playbook may have let out."""
        if isinstance(value, str):
            for secret in sorted(self.hidden(), key=len, reverse=True):
                value = value.replace(secret, HIDDEN)
            return value
        if isinstance(value, Mapping):
            return {self.clean(k): self.clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(v) for v in value]
        return HIDDEN if not isinstance(value, bool) and value in self.secrets.values() else value


def new_run(definition: Definition) -> str:
    """An id that sorts by time and says what it is."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{definition.name}-{random_secrets.token_hex(2)}"


def prepare(
    definition: Definition, inventory: Path, given: Mapping[str, str], session: Session, *, planning: bool = False
) -> Request:
    """Check everything that a new run needs. Raises Problem with the first fault, Refused when it may not run now.

    planning: only look; another run may be at work meanwhile.
    """
    parsed = _parsed(definition, given)
    texts = secret_texts(definition, session)
    _warm_up(definition, given, session)
    environment = Environment(inventory)
    for name, value in parsed.items():
        _check_choice(definition, environment, definition.parameters[name], value)
    if not planning:
        _refuse_when_busy(environment, definition)
    for parameter in definition.parameters.values():
        if parameter.name not in parsed and not parameter.secret:
            parsed[parameter.name] = _default(definition, environment, parameter, parsed, session)
            _check_choice(definition, environment, parameter, parsed[parameter.name])
    secrets = check_secrets(definition, environment, texts)
    left_out = preflight.check(environment, definition.reach, {**parsed, **secrets})
    return Request(session.run, definition, environment, parsed, left_out, secrets)


def _parsed(definition: Definition, given: Mapping[str, str]) -> dict[str, Any]:
    for name in given:
        parameter = definition.parameters.get(name)
        if parameter is None:
            raise Problem(
                f"Runbook {definition.name} has no parameter {name!r}, it has: "
                f"{', '.join(definition.parameters) or 'none'}",
                code="parameter-unknown",
                next_command=f"runbook show {definition.name}",
            )
        if parameter.secret:
            raise Problem(
                f"Parameter {name} of runbook {definition.name} is secret: on the command line everyone on this "
                f"machine can read it. Give it as the environment variable {parameter.variable} or in a file",
                code="secret-on-command-line",
                next_command=f"runbook run {definition.name} -i INVENTORY --secret {name}=FILE",
            )
    return {name: parse(definition, name, text) for name, text in given.items()}


def _warm_up(definition: Definition, given: Mapping[str, str], session: Session) -> None:
    """Everything warms up while the rest is checked."""
    observed = [p.default_from for p in definition.parameters.values() if p.default_from and p.name not in given]
    session.warm.plan((source.playbook, OBSERVE_S) for source in observed)
    session.warm.plan(playbooks(definition.steps))


def playbooks(steps: Iterable[Step]) -> Iterator[tuple[Path, float]]:
    """The playbooks of steps and of their gates in the order of their turns, with the seconds that they have."""
    for step in steps:
        yield from ((gate.playbook, GATE_S) for gate in step.before)
        yield step.playbook, step.timeout_s
        yield from ((gate.playbook, GATE_S) for gate in step.after)


def _refuse_when_busy(environment: Environment, definition: Definition) -> None:
    """Raises Refused when the run's locks are held; without making a journal where there is none."""
    if environment.has_journal():
        journal = environment.open_journal()
        try:
            Locks(environment, journal).check(definition)
        finally:
            journal.close()


# -- parameters


def parse(definition: Definition, name: str, text: str) -> Any:
    """The value that a person wrote. Raises Problem."""
    parameter = definition.parameters[name]
    try:
        return parameter.parse(text)
    except ValueError as error:
        raise _wrong(definition, parameter, str(error), text) from None


def _wrong(definition: Definition, parameter: Parameter, expected: str, value: Any) -> Problem:
    shown = "" if parameter.secret else f", not {value!r}"
    return Problem(
        f"Parameter {parameter.name} of runbook {definition.name} must be {expected}{shown}",
        code="parameter-wrong",
        next_command=f"runbook show {definition.name}",
    )


def _check_choice(definition: Definition, environment: Environment, parameter: Parameter, value: Any) -> None:
    expected = parameter.expected(value)
    if expected:
        raise _wrong(definition, parameter, expected, value)
    if parameter.choices is None:
        return
    choices = list(environment.template(parameter.choices))
    if value not in choices:
        raise _wrong(definition, parameter, f"one of {', '.join(map(str, choices))}", value)


def _missing(definition: Definition, parameter: Parameter, flag: str) -> Problem:
    return Problem(
        f"Runbook {definition.name} needs the parameter {parameter.name} ({parameter.title})",
        code="parameter-missing",
        next_command=f"runbook run {definition.name} -i INVENTORY {flag}",
    )


def _default(
    definition: Definition, environment: Environment, parameter: Parameter, known: Mapping[str, Any], session: Session
) -> Any:
    source = parameter.default_from
    if source is None:
        if parameter.default is None:
            raise _missing(definition, parameter, f"--{parameter.name.replace('_', '-')} VALUE")
        return environment.template(parameter.default, **known)
    left_out = preflight.check(environment, source.reach, known, patient=False)
    process = session.warm.take(source.playbook, OBSERVE_S)
    try:
        result = process.run(known, left_out, on_activity=lambda _: None, interrupted=session.stop)
    finally:
        process.close()
    if session.stop():
        raise Interrupted
    if result.outcome != "ok" or source.output not in result.outputs:
        why = one_line(result.text()) or f"no output {source.output}"
        flag = "--" + parameter.name.replace("_", "-")
        raise Problem(
            f"What {parameter.name} should be could not be observed in environment {environment.name}: {why}",
            code="default-unobserved",
            next_command=f"runbook run {definition.name} -i {environment.path} {flag} VALUE",
        )
    return result.outputs[source.output]


# -- secret parameters


def secret_texts(definition: Definition, session: Session) -> dict[str, str]:
    """What was given as secret parameters: in the file that the operator named, in the environment variable, or typed.

    Before any other process is started: the variable is taken out of the environment that they inherit.
    Raises Problem when one is missing or cannot be read.
    """
    secret = [parameter for parameter in definition.parameters.values() if parameter.secret]
    return {parameter.name: _secret_text(definition, parameter, session) for parameter in secret}


def check_secrets(definition: Definition, environment: Environment, texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of secret parameters. Raises Problem when one is none that the parameter allows."""
    values = {name: parse(definition, name, text) for name, text in texts.items()}
    for name, value in values.items():
        _check_choice(definition, environment, definition.parameters[name], value)
    return values


def _secret_text(definition: Definition, parameter: Parameter, session: Session) -> str:
    file = session.order.secret_files.get(parameter.name)
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise Problem(
                f"Parameter {parameter.name} of runbook {definition.name} cannot be read from {file} ({error})",
                code="secret-unreadable",
                next_command=f"ls -l {file}",
            ) from error
    if parameter.variable in os.environ:
        return os.environ.pop(parameter.variable)
    if sys.stdin.isatty():
        with at_the_prompt():
            return getpass.getpass(f"{parameter.title} ({parameter.name}, not shown): ", sys.stderr)
    raise _missing(definition, parameter, f"--secret {parameter.name}=FILE")


def fingerprint(value: Any, salt: str) -> str:
    """What the journal keeps of a secret, to compare at a resume, on whatever machine.

    scrypt (16 MiB, some 50 ms a guess) with the run's id as salt, because the journal is readable by more people than
    may know the secret.
    """
    digest = hashlib.scrypt(str(value).encode(), salt=salt.encode(), n=2**14, r=8, p=1, dklen=16)
    return f"scrypt:{digest.hex()}"


def compare_secrets(request: Request, known: Mapping[str, str]) -> None:
    """Raises Refused when a secret parameter is not what the run began with."""
    for name, value in request.secrets.items():
        if known.get(name) != fingerprint(value, request.run):
            raise Refused(
                f"The secret parameter {name} is not the one that run {request.run} began with",
                code="secret-changed",
                touched="What the run did until now stays as it is",
                next_command=f"runbook resume {request.run} --secret {name}=FILE",
            )
