"""Plans: what their hash is over and what differs between two, as tables; then all of it with real playbooks."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import yaml

from runbooks import approvals, definition, keys, plan
from runbooks.approvals import Policy, Subject
from runbooks.errors import Problem, Refused
from runbooks.journal import Journal, opened
from runbooks.plan import Change, Obstacle, Plan, StepPlan, compare, digest, read, without_repeats
from runbooks.request import Request
from tests.unit.runbook.place import INVENTORY, Place, make_place

if TYPE_CHECKING:
    from runbooks.environment import Environment
    from runbooks.session import Session

CHANGE = Change("Point the record", "localhost", "amazon.aws.route53", "app", "10.1", "10.2", "d1")
ROW = Change("Write a row", "localhost", "service_answers")
STEPS = (
    StepPlan("check", "See", says="all is well", estimate_s=3),
    StepPlan("route", "Route", ("the record",), (CHANGE, ROW), estimate_s=5),
)
BASE = Plan(
    "fail-over", "lab", {"to": "west"}, ("db2",), {"a.yml": "1", "b.yml": "2"}, "c0de", STEPS, "/inv", 1.0, "ann"
)


def with_step(step: StepPlan) -> Plan:
    return replace(BASE, steps=tuple(step if s.id == step.id else s for s in STEPS))


ROUTE = STEPS[1]


@pytest.mark.parametrize(
    "same",
    [
        replace(BASE, made=99.0, who="bob", took_s=9.0, inventory="/elsewhere"),
        replace(BASE, steps=(replace(STEPS[0], says="3 renewals in 7 s", estimate_s=9, earlier=4), STEPS[1])),
        with_step(replace(ROUTE, changes=(ROW, CHANGE))),
        with_step(replace(ROUTE, changes=(replace(CHANGE, before="…", after="…"), ROW))),
        read(json.loads(json.dumps(plan.document(BASE)))),
    ],
    ids=["who and when", "words and times", "order of events", "how much is shown", "read from the journal"],
)
def test_the_hash_is_over_nothing_that_time_alone_changes(same: Plan) -> None:
    assert digest(same) == digest(BASE)
    assert compare(BASE, same) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(BASE, environment="staging"), ["the environment was lab and is staging"]),
        (replace(BASE, runbook="fail-back"), ["the runbook was fail-over and is fail-back"]),
        (replace(BASE, parameters={"to": "east"}), ["parameter to was west and is east"]),
        (replace(BASE, left_out=()), ["hosts left out were db2 and are none"]),
        (
            replace(BASE, files={"a.yml": "9", "c.yml": "2"}),
            ["the file a.yml has changed", "the file b.yml is gone", "the file c.yml is new"],
        ),
        (replace(BASE, code="n3w"), ["the collection's modules or roles have changed"]),
        (
            with_step(replace(ROUTE, changes=(replace(CHANGE, before="10.7", digest="d2"), ROW))),
            [
                "step route would change otherwise: Point the record app on localhost from 10.7 to 10.2 "
                "(planned: from 10.1 to 10.2)"
            ],
        ),
        (
            with_step(replace(ROUTE, changes=(ROW,))),
            ["step route would no longer change: Point the record app on localhost"],
        ),
        (
            with_step(replace(ROUTE, changes=(CHANGE, ROW, replace(CHANGE, host="h2", digest="d3")))),
            ["step route would now also change: Point the record app on h2 from 10.1 to 10.2"],
        ),
        (
            with_step(replace(ROUTE, obstacle=Obstacle(True, "the holder lives"))),
            ["step route would now end the run: the holder lives"],
        ),
        (replace(BASE, steps=STEPS[:1]), ["step route is gone"]),
        (replace(BASE, steps=(*STEPS, StepPlan("more", "More"))), ["step more is new"]),
        (replace(BASE, steps=STEPS[::-1]), ["the order of the steps has changed"]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
def test_what_has_changed_is_told_in_words(other: Plan, said: list[str]) -> None:
    assert digest(other) != digest(BASE)
    assert compare(BASE, other) == said
    back = compare(other, BASE)
    assert back
    assert digest(other) != digest(BASE)


def test_a_document_that_was_edited_is_no_plan() -> None:
    document = json.loads(json.dumps(plan.document(BASE)))
    document["steps"][1]["changes"][0]["digest"] = "d9"
    with pytest.raises(ValueError, match="its hash is not that"):
        read(document)
    with pytest.raises(ValueError, match="not a plan"):
        read({"hash": "x"})


def test_what_an_earlier_step_makes_is_not_planned_twice() -> None:
    again = StepPlan("verify", "Verify", changes=(replace(CHANGE, task="Have it all"), ROW))
    told = without_repeats([ROUTE, again])
    assert [(len(step.changes), step.repeated) for step in told] == [(2, 0), (1, 1)]
    assert told[1].changes == (ROW,), "a change without a digest may be another one"


# -- with real playbooks


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = make_place(tmp_path)
    place.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    yield place


def inventory(place: Place, **variables: Any) -> str:
    """The inventory of the unit tests with more variables."""
    data = yaml.safe_load(INVENTORY.read_text())
    data["all"]["vars"] |= variables
    path = place.directory / "inventory.yml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def new_key(place: Place, name: str) -> str:
    done = place.command("keys", "new", name, "--json")
    assert done.returncode == 0, done.stderr
    return str(document(done)["public"])


def test_a_plan_tells_what_would_change_and_changes_nothing(place: Place) -> None:
    done = place.command("plan", "paint", "-i", str(INVENTORY), "--coats", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = document(done)
    look, paint, admire = told["steps"]
    assert (look["changes"], admire["changes"]) == ([], [])
    assert {(c["host"], c["after"]) for c in paint["changes"]} == {
        ("here1", "red 2"),
        ("here2", "red 2"),
        ("here1", "red"),
    }
    assert admire["says"] == "The shed is red, after blue", "outputs of earlier steps are known to later ones"
    assert (told["changes"], told["estimate_s"], told["need"]) == (3, 30.0, 0)
    assert not list(place.directory.glob("here*"))
    assert not (place.directory / "effects").exists()
    assert json.loads(place.command("runs", "--json").stdout) == [], "a plan is no run"


def test_a_gate_that_would_refuse_ends_the_plan(place: Place) -> None:
    done = place.command("plan", "paint", "-i", str(INVENTORY), "--fail-at", "look")
    assert done.returncode == 3
    assert "would refuse: here1: Refuse to paint" in done.stdout
    assert "It rains" in done.stdout
    assert "admire: Admire it (not reached)" in done.stdout


def test_what_would_fail_ends_the_plan_and_tells_no_secret(place: Place) -> None:
    done = place.command("plan", "paint", "-i", str(INVENTORY), "--fail-at", "paint", "--json")
    assert done.returncode == 3
    paint = document(done)["steps"][1]
    assert not paint["obstacle"]["refused"]
    assert "The bucket of here2 has a hole" in paint["obstacle"]["why"]
    assert b"canary-4711" not in place.everything()
    assert "canary-4711" not in done.stdout + done.stderr


def test_from_a_plan_by_its_approval_to_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, approved; the world changes, so the run is refused and says what changed; planned, approved, run."""
    # Whoever works on the collection meanwhile changes it.
    monkeypatch.setattr(plan, "code", lambda: "c0de")
    ann, bob = new_key(place, "ann"), new_key(place, "bob")
    path = inventory(place, runbook_approvals={"paint": {"need": 2}}, runbook_approvers={"ann": ann, "bob": bob})

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return place.command("run", "paint", "-i", path, "--yes", *words)

    def approve(target: str, name: str) -> subprocess.CompletedProcess[str]:
        done = place.command("approve", target, "--as", name, "-i", path, "--yes")
        assert done.returncode == 0, done.stderr
        return done

    refused = run()
    assert refused.returncode == 3
    assert "takes 2 approvals, and has 0 of 2 approvals. Nothing was touched" in refused.stderr
    first = refused.stderr.split("next: runbook approve ")[1].split()[0]
    assert refused.stderr.startswith(f"error: Plan {first} ")
    one = approve(first, "ann")
    assert "1 of 2 approvals (ann)" in one.stdout
    assert "~ Put the paint on" in one.stderr, "one sees what one approves"
    assert f"next: runbook run paint -i {path}" in approve(first[:8], "bob").stdout

    (place.directory / "here2").write_text("green 1\n")
    stale = run("--plan", first)
    assert stale.returncode == 3
    assert f"The world has changed since plan {first} was made: step paint would change otherwise" in stale.stderr
    assert "from green 1 to red 1 (planned: from nothing to red 1)" in stale.stderr
    assert "here1" not in stale.stderr
    assert (place.directory / "here2").read_text() == "green 1\n"
    assert not (place.directory / "effects").exists()

    second = stale.stderr.split("next: runbook approve ")[1].split()[0]
    approve(second, "ann")
    approve(second, "bob")
    done = run("--plan", second)
    assert done.returncode == 0, done.stderr
    assert place.effects() == ["red"]
    assert (place.directory / "here2").read_text() == "red 1\n"


# -- without playbooks: plans are put into the journal


SHED = replace(BASE, runbook="paint", environment="unit", parameters={}, left_out=())
GREEN = replace(SHED, steps=(STEPS[0], replace(ROUTE, changes=(replace(CHANGE, before="10.7", digest="d2"), ROW))))


@pytest.fixture
def journal(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    with opened(Journal(place.directory / "runs", "unit")) as journal:
        yield journal


def test_who_may_approve_is_the_inventorys_to_say(place: Place, journal: Journal) -> None:
    ann, bob = new_key(place, "ann"), new_key(place, "bob")
    plan.keep(journal, SHED, Policy())
    target = SHED.hash

    def approve(name: str, *words: str, **approvers: str) -> tuple[int, str]:
        path = inventory(place, runbook_approvals={"*": {"of": ["ann"]}}, runbook_approvers=approvers)
        done = place.command("approve", *(words or (target, "--yes")), "--as", name, "-i", path, "--json")
        return done.returncode, json.loads(done.stdout).get("error", {}).get("code", "")

    assert approve("ann", ann="x") == (2, "approvals-invalid")
    assert approve("eve", ann=ann) == (2, "key-missing")
    assert approve("bob", ann=ann) == (3, "approver-unknown")
    assert approve("bob", ann=ann, bob=bob) == (3, "approver-not-entitled")
    assert approve("ann", ann=bob) == (3, "approver-key")
    assert approve("ann", target, ann=ann) == (2, "approval-without-terminal")
    assert approve("ann", "abcdef012345", "--yes", ann=ann) == (2, "plan-unknown")
    assert not journal.records_of("approval_given")
    assert approve("ann", ann=ann) == (0, "")
    assert approve("ann", ann=ann) == (3, "approval-given-already")
    blocked = replace(SHED, steps=(replace(STEPS[0], obstacle=Obstacle(True, "it rains")),))
    plan.keep(journal, blocked, Policy())
    assert approve("ann", blocked.hash, "--yes", ann=ann) == (3, "plan-refused")


@dataclass
class Here:
    """What authorise needs of an environment."""

    settings: dict[str, Any]
    name: str = "unit"
    path: Path = Path("inventory.yml")
    journal_keys: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        return self.settings.get(name)


class Cold:
    """Warms nothing up."""

    def plan(self, _: object) -> None: ...


@dataclass
class Case:
    """authorise with plans made by the case instead of by playbooks."""

    journal: Journal
    monkeypatch: pytest.MonkeyPatch
    settings: dict[str, Any] = field(default_factory=dict)
    made: int = 0

    def authorise(self, fresh: Plan, **more: Any) -> plan.Authorisation:
        def make(*_: object, **__: object) -> Plan:
            self.made += 1
            return fresh

        self.monkeypatch.setattr(plan, "make", make)
        request = Request("r1", definition.load("paint"), cast("Environment", Here(self.settings)), {})
        session = cast("Session", SimpleNamespace(warm=Cold()))
        return plan.authorise(request, self.journal, session, **{"who": "runner", **more})

    def refused(self, fresh: Plan, **more: Any) -> tuple[str, str]:
        with pytest.raises(Refused) as caught:
            self.authorise(fresh, **more)
        return caught.value.code, caught.value.what

    def approve(self, name: str, of: Plan, age_s: float = 0, told: str = "") -> None:
        """As the approver's command does it; told: the name that a forger writes instead."""
        at = time.time() - age_s
        subject = Subject("unit", of.hash)
        signature = keys.sign(keys.load(name), approvals.statement(subject, name, at, at + 3600))
        public = keys.public(keys.load(name))
        approval = approvals.Approval(subject, told or name, at, at + 3600, public, signature)
        self.journal.record("approval_given", plan.PSEUDO + of.hash, None, approval.document())


@pytest.fixture
def case(place: Place, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Case:
    approvers = {name: new_key(place, name) for name in ("ann", "bob")}
    return Case(journal, monkeypatch, {"runbook_approvals": {"*": {"need": 1}}, "runbook_approvers": approvers})


def test_nothing_is_planned_where_nothing_is_asked_for(case: Case) -> None:
    case.settings = {}
    assert case.authorise(SHED).document() == {
        "plan": None,
        "approvals": [],
        "approvals_needed": 0,
        "approvals_lifted": False,
    }
    assert case.made == 0


def test_an_approved_plan_is_carried_out_named_or_not(case: Case) -> None:
    plan.keep(case.journal, SHED, Policy())
    case.approve("ann", SHED)
    for given in (None, SHED.hash[:8]):
        allowed = case.authorise(SHED, given=given)
        assert (allowed.plan, allowed.names, allowed.need) == (SHED, ("ann",), 1)


def test_each_way_in_which_an_approval_is_none_has_its_code(case: Case) -> None:
    plan.keep(case.journal, SHED, Policy())
    assert case.refused(SHED)[0] == "approvals-missing"
    case.approve("bob", SHED, told="ann")
    assert case.refused(SHED)[0] == "approval-forged"
    case.approve("ann", SHED, age_s=4000)
    code, what = case.refused(SHED)
    assert (code, "has expired 7 min ago" in what, "is not signed" in what) == ("approval-expired", True, True)
    case.settings["runbook_approvals"] = {"*": {"need": 2}}
    case.approve("ann", SHED)
    case.approve("ann", SHED)
    assert case.refused(SHED)[0] == "approval-duplicate"
    case.approve("bob", SHED)
    assert case.authorise(SHED).names == ("ann", "bob")
    case.settings["runbook_approvals"] = {"*": {"need": 2, "another": True}}
    assert case.refused(SHED, who="ann")[0] == "approval-of-runner"


def test_a_changed_world_voids_the_approval_and_is_told(case: Case) -> None:
    plan.keep(case.journal, SHED, Policy())
    case.approve("ann", SHED)
    for given in (SHED.hash, None):
        code, what = case.refused(GREEN, given=given)
        assert code == "plan-stale"
        assert "step route would change otherwise: Point the record app on localhost from 10.7 to 10.2" in what
    blocked = replace(SHED, steps=(replace(STEPS[0], obstacle=Obstacle(True, "it rains")),))
    assert case.refused(blocked) == ("plan-refused", "The plan ends in step check (See): it rains")
    case.settings = {}
    assert case.refused(GREEN, given=SHED.hash)[0] == "plan-stale", "a plan that is named binds without approvals too"
    assert case.authorise(SHED, given=SHED.hash).plan == SHED


def test_an_approval_is_for_one_run_of_the_plan_it_names(case: Case) -> None:
    plan.keep(case.journal, SHED, Policy())
    case.approve("ann", SHED)
    other = replace(SHED, parameters={"coats": 2})
    assert case.refused(other)[0] == "approvals-missing", "other parameters are another matter, not a changed world"


def test_an_emergency_lifts_approvals_without_a_plan_and_says_so(case: Case) -> None:
    allowed = case.authorise(GREEN, emergency=True)
    assert allowed.document() == {"plan": None, "approvals": [], "approvals_needed": 1, "approvals_lifted": True}
    assert case.made == 0


def test_a_plan_is_found_by_the_beginning_of_its_hash(case: Case) -> None:
    for each in (SHED, GREEN):
        plan.keep(case.journal, each, Policy())
    plan.keep(case.journal, SHED, Policy())
    assert len(case.journal.records_of("plan_made")) == 2, "the same plan is kept once"
    assert plan.find(case.journal, SHED.hash[:6].upper()) == SHED
    for prefix, code in (("", "plan-ambiguous"), ("f" * 64, "plan-unknown")):
        with pytest.raises(Problem) as caught:
            plan.find(case.journal, prefix)
        assert caught.value.code == code


def test_a_step_that_wants_an_approval_takes_that_of_this_run(case: Case) -> None:
    request = Request("r1", definition.load("paint"), cast("Environment", Here(case.settings)), {})
    step = replace(request.definition.step("paint"), approval=True)
    assert plan.step_wants(request, case.journal, request.definition.step("paint"), None, who="zoe") is None
    wanted = plan.step_wants(request, case.journal, step, SHED.hash, who="zoe")
    assert wanted is not None
    assert wanted.what == "Step paint of run r1 takes 1 approval, and has 0 of 1 approvals"
    assert wanted.next_command == "runbook approve r1 -i inventory.yml --as NAME"
    at = time.time()
    for run in ("r0", "r1"):
        subject = Subject("unit", SHED.hash, run, "paint")
        signature = keys.sign(keys.load("ann"), approvals.statement(subject, "ann", at, at + 60))
        approval = approvals.Approval(subject, "ann", at, at + 60, "", signature)
        case.journal.record("approval_given", run, "paint", approval.document())
        still = plan.step_wants(request, case.journal, step, SHED.hash, who="zoe")
        assert (still is None) is (run == "r1")
