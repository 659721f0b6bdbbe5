"""Every error that the runbooks can raise: its cause, its blast radius, and exactly one next command.

``CASES`` provokes an error, by a command line as a person gives it or by a call. ``BUILT`` names those whose world the
tests of their own part build; here they are made as their source makes them, which is done for every place that makes
one. The sources are searched: a code without an entry fails, and so does an entry without a code.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from runbooks import definition as definitions
from runbooks import errors, keys, locks, outlook, preflight
from runbooks.cli import COMMANDS, main
from runbooks.definition import Reach
from runbooks.environment import Environment
from runbooks.errors import Problem, Refused, Stopped
from runbooks.locks import Process
from runbooks.session import Warm
from runbooks.step import Result
from tests.unit.runbook.workshop import DEFINITION, Workshop, fails, make_workshop

SOURCES = Path(errors.__file__).parent
CLASSES = {"Problem": Problem, "Refused": Refused, "Stopped": Stopped, "Broken": Problem}
PROGRAMS = (
    *("runbook", "ansible", "ansible-inventory", "ls", "ssh", "curl", "nc", "git", "df", "chmod", "command", "less"),
    *("grep", "aws", "openssl", "cat", "ansible-playbook", "editor", "psql"),
)
UNKNOWN = "X" * 12
"""Stands for what only a run knows."""


@dataclass(frozen=True)
class Site:
    """One place where an error is made."""

    code: str
    call: ast.Call
    where: str


def sites() -> Iterator[Site]:
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            code = next((k.value for k in node.keywords if k.arg == "code"), None)
            if name in CLASSES and code is not None:
                found = [n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                for value in found:
                    yield Site(value, node, f"{path.relative_to(SOURCES.parent)}:{node.lineno}")


SITES = list(sites())
# An approval that does not count gives the error of its refusal the code.
VOID = sorted(
    {
        node.value
        for node in ast.walk(ast.parse((SOURCES / "approvals.py").read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"approval-[a-z-]+", node.value)
    }
)
CODES = {site.code for site in SITES} | set(VOID)

Case = Callable[[Workshop, pytest.MonkeyPatch], Any]


def line(*words: str) -> Case:
    """A command line; {i} is the inventory, {d} the directory."""
    return lambda shop, _: command(shop, *words)


def command(shop: Workshop, *words: str) -> Problem:
    """Its error, in JSON."""
    given = [word.format(i=shop.inventory, d=shop.directory) for word in words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*given, "--json"])
    said = json.loads(out.getvalue().splitlines()[-1])["error"]
    kind = next((k for k in (Refused, Stopped) if k.exit_code == code), Problem)
    return kind(said["what"], code=said["code"], next_command=said["next"], touched=said["touched"])


def inventory(text: str, *words: str) -> Case:
    def case(shop: Workshop, _: pytest.MonkeyPatch) -> Problem:
        shop.inventory.write_text(text)
        return command(shop, *(words or RUN))

    return case


def variables(**values: Any) -> Case:
    def case(shop: Workshop, _: pytest.MonkeyPatch) -> Problem:
        shop.variables(**values)
        return command(shop, *RUN)

    return case


def reach(text: str, *items: Reach) -> Case:
    def case(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
        shop.inventory.write_text(text)
        return preflight.check(Environment(shop.inventory), items, {})

    return case


def parameter(data: dict[str, Any], *words: str, **environment: str) -> Case:
    def case(shop: Workshop, patch: pytest.MonkeyPatch) -> Problem:
        shop.define(parameters={"token": {"title": "The key", **data}})
        for name, value in environment.items():
            patch.setenv(name, value)
        return command(shop, *RUN, *words)

    return case


RUN = ("run", "mend", "-i", "{i}", "--yes")
FAR = """
all:
  hosts: {far: {ansible_host: 127.0.0.1, ansible_port: 1, ansible_user: nobody, KEY}}
  vars: {environment_name: far}
"""


def ssh(says: str) -> Case:
    """A node that answers a login like this."""

    def case(shop: Workshop, patch: pytest.MonkeyPatch) -> Any:
        program = shop.directory / "ssh"
        program.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 255\n")
        program.chmod(0o755)
        (shop.directory / "key").touch()
        patch.setenv("PATH", str(shop.directory), prepend=":")
        shop.inventory.write_text(FAR.replace("KEY", f"ansible_ssh_private_key_file: {shop.directory}/key"))
        return preflight.check(Environment(shop.inventory), [Reach("to mend", "all", "all", None)], {})

    return case


def no_ssh(shop: Workshop, patch: pytest.MonkeyPatch) -> Any:
    patch.setenv("PATH", str(shop.directory))
    return reach(FAR.replace(", KEY", ""), Reach("to mend", "all", "all", None))(shop, patch)


def ended(state: Any, **changes: Any) -> Case:
    """What is said about a run that ended like this."""

    def case(shop: Workshop, _: pytest.MonkeyPatch) -> Problem:
        shop.scripts["paint"] = fails
        shop.run()
        journal = shop.journal()
        found = replace(journal.state("r1"), reason="no luck", state=state, **changes)
        problem = outlook.aftermath(journal, found, state)
        journal.close()
        assert problem is not None
        assert "saw (the plank)" in problem.touched
        return problem

    return case


def timed_out(shop: Workshop, _: pytest.MonkeyPatch) -> Problem:
    shop.scripts["paint"] = lambda *_: Result("timed out", failures=[{"host": "", "task": "T", "message": "stopped"}])
    state = shop.run().state
    problem = outlook.aftermath(shop.journal(), state, state.state)
    assert problem is not None
    return problem


def followed(shop: Workshop, _: pytest.MonkeyPatch) -> Problem:
    shop.scripts["paint"] = fails
    state = shop.run().state
    shop.run(run="r2")
    problem = outlook.aftermath(shop.journal(), state, state.state)
    assert problem is not None
    return problem


def superseded(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    shop.scripts["paint"] = fails
    shop.run()
    shop.run(run="r2")
    return shop.resume()


def locked(store_state: str) -> Case:
    def case(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
        process = Process.current()
        other = replace(process, pid_start="1") if store_state == "dead" else replace(process, host="far")
        ends = {"held": 2e9, "dead": 2e9, "waiting": None}[store_state]
        holder = locks.Holder("r0", "mend", other, 1e9, ends, 1)
        journal = shop.journal()
        journal.change_book(lambda *_: (locks.Book(1, {"environment": holder}).document(), None))
        data = {"runbook": "mend", "environment": "unit", "inventory": "i", "parameters": {}, "steps": []}
        journal.begin("r0", data, fence=1)
        return shop.run()

    return case


def undoing(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    shop.run()
    shop.scripts["strip"] = fails
    shop.undo()
    return shop.resume()


def over(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    shop.run()
    shop.undo()
    return shop.undo()


def succeeded(shop: Workshop, patch: pytest.MonkeyPatch) -> Any:
    shop.run()
    return line("abort", "r1", "-i", "{i}", "--reason", "x")(shop, patch)


def changed(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    shop.scripts["paint"] = fails
    shop.run()
    shop.define(steps=[{**DEFINITION["steps"][0], "id": "other"}])
    return shop.resume()


def secret_changed(shop: Workshop, patch: pytest.MonkeyPatch) -> Any:
    shop.define(parameters={"token": {"title": "The key", "type": "string", "secret": True}})
    shop.scripts["paint"] = fails
    patch.setenv("RUNBOOK_PARAM_TOKEN", "one-of-them")
    shop.run()
    patch.setenv("RUNBOOK_PARAM_TOKEN", "another-one")
    return shop.resume()


def lost(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    def loses(_variables: Any, _interrupted: Any) -> Result:
        shop.journal().take_over("r1", {}, fence=99)
        return Result("ok")

    shop.scripts["nail"] = loses
    return shop.run()


def unobserved(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    source = {"playbook": "wood.yml", "output": "seen", "reach": []}
    shop.define(parameters={"colour": {"title": "Paint", "type": "string", "default_from": source}})
    return shop.run()


def two_runs(shop: Workshop, patch: pytest.MonkeyPatch) -> Any:
    shop.run(run="r1-a")
    shop.run(run="r1-b")
    return line("status", "r1", "-i", "{i}")(shop, patch)


def busy_store(shop: Workshop, patch: pytest.MonkeyPatch) -> Any:
    from runbooks import lock_stores

    class Busy(lock_stores._Conditional):
        def _get(self) -> tuple[dict[str, Any] | None, Any, float]:
            return None, 0, 100.0

        def _put(self, document: dict[str, Any], version: Any) -> bool:
            return False

    patch.setattr(lock_stores, "PATIENCE_S", 0.0)
    Busy("s3://busy").change(lambda book, _: (replace(book, fence=book.fence + 1), None))


def fault(shop: Workshop, patch: pytest.MonkeyPatch) -> Problem:
    patch.setattr(definitions, "titles", lambda: 1 // 0)
    return command(shop, "list")


def interrupted(shop: Workshop, patch: pytest.MonkeyPatch) -> Problem:
    def stop() -> None:
        raise KeyboardInterrupt

    patch.setattr(definitions, "titles", stop)
    return command(shop, "list")


def unconfirmed(shop: Workshop, patch: pytest.MonkeyPatch) -> Problem:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    patch.setattr("sys.stdin", Typed("no\nno\n"))
    return command(shop, "run", "mend", "-i", "{i}")


def unwritable(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    from runbooks import report

    (shop.directory / "file").touch()
    page = shop.directory / "file/report.html"
    report.write({"paths": {"html": str(page), "json": str(page)}})


def weak_token(mode: int) -> Case:
    def case(shop: Workshop, _: pytest.MonkeyPatch) -> Problem:
        (shop.directory / "token").write_text("short")
        (shop.directory / "token").chmod(mode)
        return command(shop, "serve", "--token-file", "{d}/token")

    return case


def key_file(data: bytes) -> Case:
    def case(_shop: Workshop, _patch: pytest.MonkeyPatch) -> Any:
        keys.create("broken")
        keys.path("broken").write_bytes(data)
        try:
            return keys.load("broken")
        finally:
            keys.path("broken").unlink()

    return case


def key_twice(_shop: Workshop, _patch: pytest.MonkeyPatch) -> Any:
    keys.create("twice")
    try:
        return keys.create("twice")
    finally:
        keys.path("twice").unlink()


def journal_is_a_directory(shop: Workshop, _: pytest.MonkeyPatch) -> Any:
    (shop.directory / "runs/journal.sqlite").mkdir(parents=True)
    return shop.run()


CASES: dict[str, Case] = {
    # what was typed
    "command-line": line("list", "--colour"),
    "runbook-unknown": line("show", "mand"),
    "environment-missing": line("run", "mend"),
    "inventory-missing": line("run", "mend", "-i", "{d}/nowhere"),
    "param-syntax": line(*RUN, "--param", "colour"),
    "parameter-unknown": line(*RUN, "--param", "size=3"),
    "parameter-wrong": parameter({"type": "integer", "minimum": 3}, "--param", "token=2"),
    "parameter-missing": parameter({"type": "string"}),
    "secret-on-command-line": parameter({"type": "string", "secret": True}, "--param", "token=x"),
    "secret-syntax": line(*RUN, "--secret", "token"),
    "secret-unreadable": parameter({"type": "string", "secret": True}, "--secret", "token=/nowhere/token"),
    "secret-changed": secret_changed,
    "emergency-without-reason": line(*RUN, "--emergency"),
    "confirmation-without-terminal": line("run", "mend", "-i", "{i}"),
    "not-confirmed": unconfirmed,
    "default-unobserved": unobserved,
    "interrupted": interrupted,
    "engine-fault": fault,
    "plan-unknown": line(*RUN, "--plan", "abcdef"),
    "windows-environment-missing": line("windows"),
    "windows-count": line("windows", "-i", "{i}", "--count", "0"),
    "windows-time": line("windows", "-i", "{i}", "--at", "noon"),
    "console-bind": line("serve", "--bind", "here"),
    "console-exposed": line("serve", "--bind", "0.0.0.0"),
    "console-token-file": line("serve", "--token-file", "{d}/nowhere"),
    "console-token-open": weak_token(0o644),
    "console-token-weak": weak_token(0o600),
    "notifications-missing": line("notify", "test", "-i", "{i}"),
    "key-name": line("keys", "new", "../x"),
    "key-missing": lambda *_: keys.load("nobody"),
    "key-unreadable": key_file(b"not a key"),
    "key-exists": key_twice,
    # the environment
    "inventory-unreadable": inventory("all: [unclosed"),
    "inventory-without-hosts": inventory("all: {vars: {environment_name: e}}"),
    "inventory-variable-missing": inventory("all: {hosts: {a: }}"),
    "inventory-template": variables(runbook_state="{{ nothing.here }}"),
    "inventory-pattern-empty": reach(FAR.replace(", KEY", ""), Reach("to mend", "nobody", "all", None)),
    "environment-without-runs": line("runs", "-i", "{i}"),
    "environment-unreachable": reach(FAR.replace(", KEY", ""), Reach("to mend", "all", "all", None)),
    "port-silent": reach(FAR.replace(", KEY", ""), Reach("to mend", "all", "all", None, port=1)),
    "server-silent": reach(FAR.replace(", KEY", ""), Reach("to mend", None, "all", "http://127.0.0.1:1")),
    "ssh-key-missing": reach(
        FAR.replace("KEY", "ansible_ssh_private_key_file: /nowhere"), Reach("to mend", "all", "all", None)
    ),
    "ssh-key-refused": ssh("Permission denied (publickey)."),
    "ssh-host-key": ssh("Host key verification failed."),
    "ssh-unstartable": no_ssh,
    "lock-store-unknown": variables(runbook_locks="redis://locks"),
    "lease-wrong": variables(runbook_lease_s="soon"),
    "lock-store-busy": busy_store,
    "emergency-wrong": variables(runbook_emergency_s="a while"),
    "windows-invalid": variables(runbook_windows=[{"days": ["noday"]}]),
    "journal-unopenable": journal_is_a_directory,
    "journal-password-in-url": variables(runbook_journal="postgresql://ann:secret@db/journal"),
    # other runs
    "lock-held": locked("held"),
    "lock-of-dead-run": locked("dead"),
    "lock-of-waiting-run": locked("waiting"),
    "lock-lost": lost,
    "run-unknown": lambda shop, _: shop.journal().state("r9"),
    "run-ambiguous": two_runs,
    "run-superseded": superseded,
    "run-succeeded-by-another": followed,
    "run-over": over,
    "run-undoing": undoing,
    "run-ended-already": succeeded,
    "definition-changed": changed,
    # how runs end
    "run-failed": ended("failed"),
    "run-timed-out": timed_out,
    "run-refused": ended("refused"),
    "run-interrupted": ended("interrupted"),
    "run-dead": ended("dead"),
    "run-waiting": ended("waiting"),
    "run-aborted": ended("aborted"),
    "run-undone": ended("undone"),
    "undo-unfinished": ended("failed", undoing=True),
    "report-unwritable": unwritable,
}


BUILT = frozenset(
    """
    alert-refused anchor-invalid approval-given-already approval-without-terminal approvals-invalid approvals-missing
    approver-key approver-not-entitled approver-unknown awx-approval-missing awx-approval-none awx-approval-own
    awx-approval-twice awx-few-hosts awx-no-credential awx-no-playbook awx-not-compared awx-plan-ends awx-refuses
    awx-unreachable console-address definition-broken door-inventory
    door-leaves-out door-no-step door-which-runbook event-done events-invalid evidence-broken evidence-format
    evidence-missing evidence-unreadable evidence-unwritable generate-nowhere journal-unreachable journal-unusable
    key-kind key-unwritable keys-file lock-store-unreachable not-approved notification-not-sent notifications-invalid
    plan-ambiguous plan-refused plan-stale run-not-waiting run-of-some-steps run-taken-over slice-alone slice-failed
    """.split()  # noqa: SIM905 - a table, one may add a line
)


def check(problem: Problem, code: str) -> None:
    """One sentence of cause, one of what was touched, one command."""
    assert problem.code == code
    text = str(problem)
    assert "\n" not in text
    match = re.fullmatch(r"(?P<cause>.+?)\. (?P<touched>[^.].*)\. next: (?P<next>.+)", text)
    assert match, text
    assert len(problem.what) > 10
    assert problem.touched
    one_command(problem.next_command)
    assert problem.document()["error"] == {
        "code": code,
        "what": problem.what,
        "touched": problem.touched,
        "next": problem.next_command,
    }


def one_command(text: str) -> None:
    """It is one command of a program that people have; one of ours exists."""
    assert text == text.strip()
    assert not re.search(r"\n| && |;| \| | or | and then ", text), f"more than one command: {text}"
    words = shlex.split(text.replace("{", "").replace("}", ""))
    assert words[0] in (*PROGRAMS, UNKNOWN), text
    if words[0] == "runbook":
        assert words[1] in (*COMMANDS, "--help", UNKNOWN), text


def test_every_error_has_its_case_and_every_case_its_error() -> None:
    assert CODES - set(CASES) - BUILT - set(VOID) == set(), "errors without a case here"
    assert (set(CASES) | BUILT) - CODES == set(), "cases of errors that nothing raises"
    assert set(CASES) & BUILT == set()
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in CODES)


@pytest.mark.parametrize("code", sorted(CASES))
def test_provoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    shop = make_workshop(tmp_path, monkeypatch)
    monkeypatch.setattr(Warm, "plan", lambda *_: None)  # No playbook's process is needed for an error.
    monkeypatch.setattr("sys.stdin", io.StringIO())
    try:
        problem = CASES[code](shop, monkeypatch)
    except Problem as raised:
        problem = raised
    assert isinstance(problem, Problem)
    check(problem, code)


@pytest.mark.parametrize(("words", "code"), [(("list", "--colour"), 2), (("status", "r9", "-i", "{i}"), 2)])
def test_a_person_gets_the_same_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int
) -> None:
    shop = make_workshop(tmp_path, monkeypatch)
    shop.journal().close()
    problem = command(shop, *words)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([word.format(i=shop.inventory) for word in words]) == code
    assert (out.getvalue(), err.getvalue()) == ("", f"error: {problem}\n")


def built(site: Site) -> Problem:
    """The error as its source makes it, with X for everything that only a run knows."""
    words: dict[str, str] = {}
    texts = [("what", site.call.args[0])] if site.call.args else []
    texts += [(k.arg or "", k.value) for k in site.call.keywords]
    for name, value in texts:
        words[name] = rendered(value)
    name = site.call.func.attr if isinstance(site.call.func, ast.Attribute) else getattr(site.call.func, "id", "")
    more = {"touched": words["touched"]} if words.get("touched") else {}
    return CLASSES[name](words["what"], code=site.code, next_command=words["next_command"], **more)


def rendered(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(rendered(part) for part in value.values)
    if isinstance(value, ast.IfExp):
        return rendered(value.body)
    if isinstance(value, ast.Call) and value.args and isinstance(value.args[-1], ast.JoinedStr | ast.Constant):
        return rendered(value.args[-1])  # environment.help(topic, default)
    return UNKNOWN


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site.code}-{site.where}")
def test_every_place_that_makes_an_error_makes_a_whole_one(site: Site) -> None:
    problem = built(site)
    if problem.next_command == UNKNOWN:
        # It comes from a variable; whoever provokes the error looks at it.
        problem.next_command = "runbook runs"
    check(problem, site.code)
