"""Plans: what a runbook would change, on what, in what order, found by running every step in check mode.

The hash of a plan is over what would be changed and the files that would change it, and over nothing that time alone
changes. Approvals are bound to it (``approvals``); a run plans again before it begins, and refuses when the hash is
another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbooks import approvals, keys
from runbooks.approvals import Approval, Judgement, Policy, Subject
from runbooks.environment import ROOT
from runbooks.errors import Problem, Refused, one_line
from runbooks.redact import HIDDEN, Shown, differences, redact
from runbooks.session import Interrupted, Session

if TYPE_CHECKING:
    from runbooks.definition import Definition, Step
    from runbooks.environment import Environment
    from runbooks.journal import Journal
    from runbooks.request import Request

FORMAT = 1
PSEUDO = "plan:"
"""Records of a plan are those of a run of this name and its hash."""
SHORT = 12
"""Characters of a hash that are shown."""
EARLIER = 20
"""Runs of a runbook, the newest, that a step's time is estimated from."""
COLLECTION = ROOT / "collections/ansible_collections/censuschat/infra"
CODE = ("plugins", "roles")
SETTINGS = ("runbook_approvals", "runbook_approvers", "runbook_approval_s", "runbook_awx_approvers")


@dataclass(frozen=True, slots=True)
class Change:
    """One change that a task would make on a host. action: the module. what: which object or file, may be empty.

    before, after: what differs, redacted and cut; digest: of the whole difference.
    """

    task: str
    host: str
    action: str
    what: str = ""
    before: str = ""
    after: str = ""
    digest: str = ""

    @property
    def place(self) -> tuple[str, str, str]:
        """What it is a change of, wherever in the plan it stands."""
        return self.host, self.action, self.what

    def words(self) -> str:
        """For people: what on which host."""
        what = f" {self.what}" if self.what else ""
        return f"{self.task}{what} on {self.host}"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why the run would end in this step. refused: by a gate, without a change."""

    refused: bool
    why: str


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step would do. reached: False when the run would end before it. estimate_s of so many earlier runs."""

    id: str
    title: str
    touches: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    repeated: int = 0
    """Changes that an earlier step of the plan would have made by then."""
    says: str = ""
    obstacle: Obstacle | None = None
    reached: bool = True
    estimate_s: float = 0.0
    earlier: int = 0
    checked_s: float = 0.0
    """Seconds that the plan took for it."""
    gates: tuple[str, ...] = ()
    """Titles of the checks before and after it, which a plan does not run: they are about what is there then."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan. files: name -> sha256 of what the steps are read from. code: sha256 of the collection they use."""

    runbook: str
    environment: str
    parameters: Mapping[str, Any]
    left_out: tuple[str, ...]
    files: Mapping[str, str]
    code: str
    steps: tuple[StepPlan, ...]
    inventory: str = ""
    made: float = 0.0
    who: str = ""
    took_s: float = 0.0

    @property
    def hash(self) -> str:
        return digest(self)

    @property
    def estimate_s(self) -> float:
        return sum(step.estimate_s for step in self.steps)

    @property
    def changes(self) -> int:
        return sum(len(step.changes) for step in self.steps)

    @property
    def obstacle(self) -> tuple[StepPlan, Obstacle] | None:
        return next(((step, step.obstacle) for step in self.steps if step.obstacle), None)


# -- pure: the hash, what differs, the document


def digest(plan: Plan) -> str:
    """sha256 over what would be changed and by which files; not over times, estimates, words or the order of hosts."""
    document = {
        "format": FORMAT,
        "runbook": plan.runbook,
        "environment": plan.environment,
        "parameters": dict(plan.parameters),
        "left_out": sorted(plan.left_out),
        "files": dict(plan.files),
        "code": plan.code,
        "steps": [
            {
                "id": step.id,
                "ends": step.obstacle is not None,
                "changes": sorted([c.task, *c.place, c.digest] for c in step.changes),
            }
            for step in plan.steps
        ],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def compare(old: Plan, new: Plan) -> list[str]:
    """What is different, in words; empty exactly when the hashes are the same."""
    said = []
    for name, before, after in (
        ("the runbook", old.runbook, new.runbook),
        ("the environment", old.environment, new.environment),
    ):
        if before != after:
            said.append(f"{name} was {before} and is {after}")
    for name in sorted({*old.parameters, *new.parameters}):
        if old.parameters.get(name) != new.parameters.get(name):
            said.append(f"parameter {name} was {old.parameters.get(name)} and is {new.parameters.get(name)}")
    if sorted(old.left_out) != sorted(new.left_out):
        said.append(
            f"hosts left out were {', '.join(sorted(old.left_out)) or 'none'} and are "
            f"{', '.join(sorted(new.left_out)) or 'none'}"
        )
    for name in sorted({*old.files, *new.files}):
        if old.files.get(name) != new.files.get(name):
            how = "is new" if name not in old.files else "is gone" if name not in new.files else "has changed"
            said.append(f"the file {name} {how}")
    if old.code != new.code:
        said.append("the collection's modules or roles have changed")
    said += _compare_steps(old.steps, new.steps)
    if not said and digest(old) != digest(new):
        said.append("the order of the steps has changed")
    return said


def _compare_steps(old: Sequence[StepPlan], new: Sequence[StepPlan]) -> list[str]:
    said = []
    before, after = {s.id: s for s in old}, {s.id: s for s in new}
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in after or name not in before:
            said.append(f"step {name} is {'new' if name in after else 'gone'}")
            continue
        was, now = before[name], after[name]
        if (was.obstacle is None) != (now.obstacle is None):
            obstacle = now.obstacle or was.obstacle
            why = obstacle.why if obstacle else ""
            said.append(f"step {name} {'would now' if now.obstacle else 'would no longer'} end the run: {why}")
        mine, theirs = _by_place(was), _by_place(now)
        for place, changes in {**mine, **theirs}.items():
            gone, come = mine.get(place, ()), theirs.get(place, ())
            if sorted(c.digest for c in gone) == sorted(c.digest for c in come):
                continue
            change = changes[0]
            if not come:
                said.append(f"step {name} would no longer change: {change.words()}")
            elif not gone:
                said.append(f"step {name} would now also change: {change.words()}{_what(come)}")
            else:
                said.append(
                    f"step {name} would change otherwise: {change.words()}{_what(come)} (planned:{_what(gone)})"
                )
    return said


def _by_place(step: StepPlan) -> dict[tuple[str, ...], tuple[Change, ...]]:
    found: dict[tuple[str, ...], tuple[Change, ...]] = {}
    for change in step.changes:
        key = (change.task, *change.place)
        found[key] = (*found.get(key, ()), change)
    return found


def _what(changes: Sequence[Change]) -> str:
    change = changes[0]
    before, after = _first(change.before), _first(change.after)
    return f" from {before or 'nothing'} to {after or 'nothing'}" if before or after else ""


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = ", ".join(lines[:3])
    return shown if len(shown) <= 120 else shown[:119] + "…"


def without_repeats(steps: Iterable[StepPlan]) -> list[StepPlan]:
    """The steps without the changes that an earlier step makes: in check mode each finds the world as it is now."""
    seen: set[tuple[Any, ...]] = set()
    told = []
    for step in steps:
        kept = tuple(c for c in step.changes if (*c.place, c.digest) not in seen or not c.digest)
        seen |= {(*c.place, c.digest) for c in step.changes}
        told.append(replace(step, changes=kept, repeated=len(step.changes) - len(kept)))
    return told


def document(plan: Plan, policy: Policy | None = None) -> dict[str, Any]:
    """The plan for the journal (record plan_made) and for --json."""
    return {
        "hash": plan.hash,
        "plan": plan.hash,
        "runbook": plan.runbook,
        "environment": plan.environment,
        "inventory": plan.inventory,
        "parameters": dict(plan.parameters),
        "left_out": list(plan.left_out),
        "files": dict(plan.files),
        "code": plan.code,
        "who": plan.who,
        "made": plan.made,
        "took_s": plan.took_s,
        "estimate_s": plan.estimate_s,
        "changes": plan.changes,
        "need": policy.need if policy else 0,
        "steps": [
            {
                **asdict(step),
                "touches": list(step.touches),
                "gates": list(step.gates),
                "changes": [asdict(change) for change in step.changes],
            }
            for step in plan.steps
        ],
    }


def read(data: Mapping[str, Any]) -> Plan:
    """The plan of a document. Raises ValueError when it is none, or not the one its hash says."""
    try:
        steps = tuple(
            StepPlan(
                **{
                    **step,
                    "touches": tuple(step["touches"]),
                    "gates": tuple(step["gates"]),
                    "changes": tuple(Change(**change) for change in step["changes"]),
                    "obstacle": Obstacle(**step["obstacle"]) if step["obstacle"] else None,
                }
            )
            for step in data["steps"]
        )
        plan = Plan(
            data["runbook"],
            data["environment"],
            data["parameters"],
            tuple(data["left_out"]),
            data["files"],
            data["code"],
            steps,
            data["inventory"],
            data["made"],
            data["who"],
            data["took_s"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a plan ({error})") from None
    if plan.hash != data.get("hash"):
        raise ValueError("its hash is not that of what it says")
    return plan


# -- making one


class Watch:
    """Collects the changes that a step's events tell of."""

    def __init__(self, secrets: Collection[str]) -> None:
        self._secrets = secrets
        self._mutex = threading.Lock()
        self.changes: list[Change] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        data = event.get("event_data") or {}
        result = data.get("res") or {}
        if event.get("event") != "runner_on_ok" or not result.get("changed"):
            return
        task, host = redact(str(data.get("task", "")), self._secrets), str(data.get("host", ""))
        action = str(data.get("task_action", ""))
        found = differences(result, self._secrets) or [Shown("", "", "", "")]
        with self._mutex:
            self.changes += [Change(task, host, action, s.what, s.before, s.after, s.digest) for s in found]


def make(
    request: Request,
    session: Session,
    *,
    earlier: Mapping[str, Sequence[float]],
    who: str,
    told: Callable[[Step], None] = lambda _: None,
) -> Plan:
    """Run every step in check mode with diff, in order, up to the one in which the run would end.

    Changes nothing. earlier: step -> seconds it took in earlier runs. told: is told before each step.
    Raises Interrupted.
    """
    began = time.monotonic()
    hidden = [str(value) for value in request.secrets.values()]
    steps: list[StepPlan] = []
    outputs: dict[str, Any] = {}
    ended = False
    for step in request.definition.steps:
        seconds = earlier.get(step.id, ())
        planned = StepPlan(
            step.id,
            step.title,
            step.touches,
            reached=not ended,
            estimate_s=round(statistics.median(seconds), 1) if seconds else step.budget_s,
            earlier=len(seconds),
            gates=(*(f"before: {g.title}" for g in step.before), *(f"after: {g.title}" for g in step.after)),
        )
        if not ended:
            told(step)
            asked = time.monotonic()
            planned, more = _check(request, session, step, planned, outputs=outputs, hidden=hidden)
            planned = replace(planned, checked_s=round(time.monotonic() - asked, 2))
            outputs |= more
            ended = planned.obstacle is not None
        steps.append(planned)
    return Plan(
        runbook=request.definition.name,
        environment=request.environment.name,
        parameters={**request.parameters, **dict.fromkeys(request.secrets, HIDDEN)},
        left_out=tuple(sorted(request.left_out)),
        files=files(request.definition),
        code=code(),
        steps=tuple(without_repeats(steps)),
        inventory=str(request.environment.path),
        made=time.time(),
        who=who,
        took_s=round(time.monotonic() - began, 2),
    )


def _check(
    request: Request,
    session: Session,
    step: Step,
    planned: StepPlan,
    *,
    outputs: Mapping[str, Any],
    hidden: Collection[str],
) -> tuple[StepPlan, dict[str, Any]]:
    watch = Watch(hidden)
    process = session.warm.take(step.playbook, step.timeout_s)
    try:
        result = process.run(
            {**request.variables(), **outputs},
            request.left_out,
            options=["--check", "--diff"],
            on_event=watch,
            on_activity=lambda _: None,
            interrupted=session.stop,
        )
    finally:
        process.close()
    if session.stop():
        raise Interrupted
    obstacle = None
    if result.outcome != "ok":
        obstacle = Obstacle(step.gate, one_line(redact(result.text(), hidden)))
    changes = sorted(watch.changes, key=lambda c: (c.task, *c.place, c.digest))
    says = one_line(redact(result.says, hidden))
    return replace(planned, changes=tuple(changes), says=says, obstacle=obstacle), result.outputs


def files(definition: Definition) -> dict[str, str]:
    """Name -> sha256 of the definition, its playbooks and the task files beside them."""
    paths = {definition.path.resolve()}
    for step in definition.steps:
        paths |= {path for _, path in step.playbooks()}
    paths |= {p.default_from.playbook for p in definition.parameters.values() if p.default_from}
    paths |= {task for folder in {p.parent / "tasks" for p in paths} for task in folder.glob("*.yml")}
    base = Path(os.path.commonpath([p.parent for p in paths]))
    return {p.relative_to(base).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


def code(collection: Path = COLLECTION) -> str:
    """sha256 of the collection's modules and roles, which do the work; empty where they are not beside this package."""
    total = hashlib.sha256()
    found = sorted(
        path
        for part in CODE
        for path in (collection / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    for path in found:
        total.update(path.relative_to(collection).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest() if found else ""


def seconds_of_earlier_runs(journal: Journal, definition: Definition) -> dict[str, list[float]]:
    """Step -> seconds it took in the newest runs in which it succeeded at once."""
    known = {step.id for step in definition.steps}
    started = [r.run for r in journal.records_of("run_started") if r.data.get("runbook") == definition.name]
    newest = set(started[-EARLIER:])
    attempts: dict[tuple[str, str], int] = {}
    took: dict[str, list[float]] = {}
    for record in journal.records_of("step_started", "step_finished"):
        if record.run not in newest or record.step not in known or record.step is None:
            continue
        if record.kind == "step_started":
            attempts[record.run, record.step] = attempts.get((record.run, record.step), 0) + 1
        elif record.data.get("outcome") == "ok" and attempts.get((record.run, record.step)) == 1:
            took.setdefault(record.step, []).append(float(record.data["elapsed_s"]))
    return took


# -- kept in the journal


def keep(journal: Journal, plan: Plan, policy: Policy) -> None:
    """Put the plan into the journal, unless it is there."""
    if not any(r.kind == "plan_made" for r in journal.records(PSEUDO + plan.hash)):
        journal.record("plan_made", PSEUDO + plan.hash, None, document(plan, policy))


def kept(journal: Journal) -> list[Plan]:
    """The plans in the journal, the oldest first; those that no longer are what their hash says are left out."""
    found = []
    for record in journal.records_of("plan_made"):
        try:
            found.append(read(record.data))
        except ValueError:
            continue
    return found


def find(journal: Journal, prefix: str) -> Plan:
    """The plan whose hash begins so. Raises Problem when there is none, or more than one."""
    found = {plan.hash: plan for plan in kept(journal) if plan.hash.startswith(prefix.lower())}
    if not found:
        raise Problem(
            f"Environment {journal.environment} has no plan {prefix}",
            code="plan-unknown",
            next_command="runbook plan RUNBOOK -i INVENTORY",
        )
    if len(found) > 1:
        raise Problem(
            f"{prefix} is the beginning of {len(found)} plans of environment {journal.environment}",
            code="plan-ambiguous",
            next_command=f"runbook plan {next(iter(found.values())).runbook} -i INVENTORY",
        )
    return next(iter(found.values()))


# -- approvals


def policy_of(definition: Definition, environment: Environment) -> Policy:
    """Whose approval the runbook takes in the environment. Raises Problem when the inventory's data are faulty."""
    try:
        return approvals.parse(
            definition.name,
            (definition.approvals.need, definition.approvals.of),
            {name: environment.get(name) for name in SETTINGS},
            keys.valid_public,
        )
    except approvals.Invalid as error:
        raise Problem(
            f"The approvals of inventory {environment.path} have a fault: {error}",
            code="approvals-invalid",
            next_command=f"ansible-inventory -i {environment.path} --list",
        ) from None


def approvals_in(journal: Journal, trusted: Collection[str]) -> list[Approval]:
    """The approvals in the journal, the oldest first. trusted: the keys whose records count as written by ourselves."""
    records = journal.records_of("approval_given")
    genuine: set[str] = set()
    if any(record.door == "awx" for record in records):
        genuine = {k.id for k in journal.links() if k.key in trusted and k.digest() == k.hash and k.authentic()}
    return [
        approvals.read(journal.environment, r.data, r.door or "runbook", r.key if r.id in genuine else "")
        for r in records
    ]


def judged(journal: Journal, environment: Environment, subject: Subject, policy: Policy, *, who: str) -> Judgement:
    """What the journal's approvals add up to for the subject. who: the one who runs it."""
    found = approvals_in(journal, set(environment.journal_keys.values()))
    own = {keys.public(keys.load(name)) for name in keys.names() if name != keys.JOURNAL} if policy.another else set()
    mine = [approval for approval in found if approval.subject == subject]
    return approvals.judge(mine, subject, policy, now=time.time(), who=who, own=own, verify=keys.verify)


@dataclass(frozen=True, slots=True)
class Authorisation:
    """Why a run may begin: the plan it carries out (None: none was asked for) and who has approved it.

    lifted: an emergency took the place of the approvals.
    """

    plan: Plan | None = None
    names: tuple[str, ...] = ()
    need: int = 0
    lifted: bool = False

    def document(self) -> dict[str, Any]:
        """For the record of the run's start."""
        return {
            "plan": self.plan.hash if self.plan else None,
            "approvals": list(self.names),
            "approvals_needed": self.need,
            "approvals_lifted": self.lifted,
        }


def authorise(
    request: Request,
    journal: Journal,
    session: Session,
    *,
    given: str | None = None,
    emergency: bool = False,
    who: str,
    told: Callable[[Step], None] = lambda _: None,
) -> Authorisation:
    """Whether the run may begin, as far as plans and approvals go. Changes nothing but the journal (a plan it made).

    given: the beginning of the plan's hash that the run shall carry out. Where the runbook needs no approval and no
    plan is given, it is not planned. Raises Refused, with what has changed since or which approvals are missing, and
    Problem.
    """
    policy = policy_of(request.definition, request.environment)
    if emergency:
        return Authorisation(need=policy.need, lifted=policy.need > 0 or given is not None)
    if policy.need == 0 and given is None:
        return Authorisation()
    wanted = None if given is None else find(journal, given)
    fresh = make(request, session, earlier=seconds_of_earlier_runs(journal, request.definition), who=who, told=told)
    # The plan has used up the processes that were warm for the run.
    session.warm.plan((step.playbook, step.timeout_s) for step in request.definition.steps)
    again = f"runbook plan {request.definition.name} -i {request.environment.path}"
    keep(journal, fresh, policy)
    anew = again
    if policy.need and fresh.obstacle is None:
        anew = f"runbook approve {fresh.hash[:SHORT]} -i {request.environment.path} --as NAME"
    if wanted is not None and wanted.hash != fresh.hash:
        raise _stale(wanted, fresh, anew)
    if fresh.obstacle is not None:
        step, obstacle = fresh.obstacle
        raise Refused(
            f"The plan ends in step {step.id} ({step.title}): {obstacle.why}", code="plan-refused", next_command=again
        )
    subject = Subject(request.environment.name, fresh.hash)
    judgement = judged(journal, request.environment, subject, policy, who=who)
    if judgement.missing == 0:
        return Authorisation(fresh, judgement.names, policy.need)
    if not judgement.names and not judgement.void:
        approved = _approved_before(journal, fresh)
        if approved is not None:
            raise _stale(approved, fresh, anew)
    raise missing(judgement, policy, f"plan {fresh.hash[:SHORT]}", fresh.hash[:SHORT], request.environment.path)


def missing(judgement: Judgement, policy: Policy, what: str, target: str, inventory: Path) -> Refused:
    """Why the approvals of something are not enough, and what to do."""
    name = "NAME" if policy.of is None else sorted(policy.of)[0]
    return Refused(
        f"{what[:1].upper() + what[1:]} takes {policy.words()}, and has {judgement.words()}",
        code=judgement.void[-1].code if judgement.void else "approvals-missing",
        next_command=f"runbook approve {target} -i {inventory} --as {name}",
    )


def _stale(old: Plan, new: Plan, next_command: str) -> Refused:
    changed = compare(old, new)
    shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
    return Refused(
        f"The world has changed since plan {old.hash[:SHORT]} was made: {shown}",
        code="plan-stale",
        next_command=next_command,
    )


def _approved_before(journal: Journal, fresh: Plan) -> Plan | None:
    """The newest plan of the same runbook and parameters that somebody has approved and no run has carried out."""
    done = {str(r.data.get("plan")) for r in journal.records_of("run_started")}
    approved = {str(r.data.get("plan")) for r in journal.records_of("approval_given")} - done
    return next(
        (
            plan
            for plan in reversed(kept(journal))
            if plan.hash in approved
            and plan.runbook == fresh.runbook
            and dict(plan.parameters) == dict(fresh.parameters)
        ),
        None,
    )


def step_wants(request: Request, journal: Journal, step: Step, plan: str | None, *, who: str) -> Refused | None:
    """What is missing until a step with ``approval: true`` may begin; None when nothing is.

    plan: the hash of the plan that the run carries out, None when there is none. Its approvals are of this run and
    bound to that plan. Such a step takes one at least; the runbook's own number where that is more.
    """
    if not step.approval:
        return None
    policy = step_policy(request.definition, request.environment)
    subject = Subject(request.environment.name, plan or "", request.run, step.id)
    judgement = judged(journal, request.environment, subject, policy, who=who)
    if judgement.missing == 0:
        return None
    return missing(judgement, policy, f"step {step.id} of run {request.run}", request.run, request.environment.path)


def step_policy(definition: Definition, environment: Environment) -> Policy:
    """Whose approval a step with ``approval: true`` takes. Raises Problem."""
    policy = policy_of(definition, environment)
    return replace(policy, need=max(1, policy.need))


def plan_of(journal: Journal, run: str) -> str:
    """The hash of the plan that a run carries out; empty when it was begun without one."""
    started = [r for r in journal.records(run) if r.kind == "run_started"]
    return str(started[0].data.get("plan") or "") if started else ""
