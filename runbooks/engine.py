"""Starts, resumes and undoes runs: takes the locks, lets ``work`` do the steps, and says how it ended.

Everything is validated before anything is touched. Before each step its intent is in the journal, after it its outcome;
a step that had its effect but not its record is run again and observes that there is nothing left to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runbooks import definition as definitions
from runbooks import errors, outlook, plan, preflight
from runbooks.definition import Definition
from runbooks.environment import Environment
from runbooks.errors import Problem, Refused
from runbooks.holding import Locks
from runbooks.journal import Journal, LockLost, RunState, find
from runbooks.locks import Lease, Lost, Process
from runbooks.notify import Notifier
from runbooks.progress import Progress
from runbooks.records import Door
from runbooks.request import Request, check_secrets, compare_secrets, fingerprint, playbooks, secret_texts
from runbooks.session import Order, Session, Stop, Warm
from runbooks.step import end_leftovers
from runbooks.work import Ending, Work, check_settings


@dataclass(slots=True)
class Ended:
    """How a run ended, as the journal has it, and the exit code."""

    request: Request
    state: RunState
    code: int


@dataclass(frozen=True, slots=True)
class Way:
    """How a run is entered: by which door, what does its work there, and what warms its playbooks up.

    share: what the run's other processes are at work on beside this one (``runbooks.slices``); empty: it is alone.
    """

    door: Door = "runbook"
    work: Callable[[Request, Journal, Session, int, Notifier], Work] = Work
    warm: type[Warm] = Warm
    share: str = ""


COMMAND = Way()


def start(request: Request, session: Session, way: Way = COMMAND) -> Ended:
    """Run from the first step. Raises Refused when another run was faster or the plan is not approved."""
    journal = request.environment.open_journal()
    try:
        with _held(request, journal, session, resuming=False) as held:
            check_settings(request)
            authorised = _authorise(request, journal, session)
            journal.begin(
                request.run,
                {
                    "runbook": request.definition.name,
                    "environment": request.environment.name,
                    "inventory": str(request.environment.path),
                    "parameters": request.parameters,
                    "secrets": {name: fingerprint(value, request.run) for name, value in request.secrets.items()},
                    "steps": [step.id for step in request.definition.steps],
                    "left_out": request.left_out,
                    "asked": session.asked,
                    "lock_store": held.locks.where,
                    **authorised,
                },
                fence=held.lease.fence,
                door=way.door,
            )
            environment = request.environment
            environment.remember(journal)
            return _carry_out(request, journal, session, held, way, undo=False)
    finally:
        journal.close()


def resume(
    name: str | None,
    progress: Progress,
    stop: Stop,
    order: Order,
    inventory: Path | None = None,
    *,
    way: Way = COMMAND,
) -> Ended:
    """Take a run up again from its first step without a successful outcome, on whatever machine its journal is.

    Raises Problem when it cannot be, Refused when its process lives or a newer run has been there.
    """
    return _again(name, progress, stop, order, inventory, way=way, undo=False)


def undo(
    name: str | None,
    progress: Progress,
    stop: Stop,
    order: Order,
    inventory: Path | None = None,
    *,
    way: Way = COMMAND,
) -> Ended:
    """Take the effects of a run's steps back, the newest first; an undoing that ended in its middle goes on.

    Raises as ``resume`` does.
    """
    return _again(name, progress, stop, order, inventory, way=way, undo=True)


def _again(
    name: str | None, progress: Progress, stop: Stop, order: Order, inventory: Path | None, *, way: Way, undo: bool
) -> Ended:
    journal, run, environment = locate(name, inventory)
    touched = errors.NOTHING
    try:
        state = journal.state(run)
        definition = definitions.load(state.runbook)
        touched = outlook.radius(state, definition)
        environment = environment or Environment(Path(state.inventory))
        request = Request(run, definition, environment, state.parameters, state.left_out)
        if state.state == "succeeded" and not undo:
            return Ended(request, state, errors.OK)
        _refuse_what_is_over(journal, state, definition, undo=undo)
        warm = way.warm(run, environment.path)
        session = Session(run, warm, progress, stop, order)
        try:
            Locks(environment, journal).outlast(run, progress.note, stop, way.share)
            request.secrets = check_secrets(definition, environment, secret_texts(definition, session))
            compare_secrets(request, state.secrets)
            with _held(request, journal, session, resuming=True, share=way.share) as held:
                request.left_out = preflight.check(
                    environment, definition.reach, request.variables(), part=bool(way.share)
                )
                check_settings(request)
                authorised = {} if undo else _authorise_again(request, journal, session, state)
                data = {"left_out": request.left_out, "undo": undo, **authorised}
                _take_over(journal, run, data, held, way)
                ended = 0 if way.share else end_leftovers(run)
                if ended:
                    progress.note(f"Ended {ended} process(es) that the dead run had left behind")
                if not undo:
                    warm.plan(playbooks(step for step in definition.steps if step.id in state.pending))
                return _carry_out(request, journal, session, held, way, undo=undo)
        finally:
            warm.close()
    except Problem as problem:
        if problem.touched == errors.NOTHING:  # By this attempt; what the run did before is what matters.
            problem.touched = touched
        raise
    finally:
        journal.close()


def _take_over(journal: Journal, run: str, data: dict[str, object], held: Held, way: Way) -> None:
    """Go on with the run; of several processes that share it the first says so. Raises LockLost."""
    try:
        journal.take_over(run, data, fence=held.lease.fence, door=way.door)
    except LockLost:
        if not way.share:
            raise
        journal.attach(run, held.lease.fence, way.door)


def locate(name: str | None, inventory: Path | None) -> tuple[Journal, str, Environment | None]:
    """The journal that has the run: one that this machine knows, or the environment's. Raises Problem."""
    if inventory is None:
        return *find(name), None
    environment = Environment(inventory)
    return *find(name, [environment.open_journal()]), environment


def _refuse_what_is_over(journal: Journal, state: RunState, definition: Definition, *, undo: bool) -> None:
    """Raises Refused when the run is not one that can go on, or be undone."""
    run, after = state.run, outlook.radius(state, definition)
    steps = [step.id for step in definition.steps]
    if list(state.steps) != steps and set(state.steps) <= set(steps):
        raise Refused(
            f"Run {run} was of {', '.join(state.steps)} alone, which plain ansible-playbook was told to run",
            code="run-of-some-steps",
            touched=after,
            next_command=f"runbook abort {run} --reason REASON",
        )
    if list(state.steps) != steps:
        raise Refused(
            f"Runbook {state.runbook} has other steps now than when run {run} began",
            code="definition-changed",
            touched=after,
            next_command=f"runbook abort {run} --reason REASON",
        )
    if state.state == "undone" or (state.state == "aborted" and not undo):
        raise Refused(
            f"Run {run} is over: it was {'undone' if state.state == 'undone' else 'given up'} ({state.reason})",
            code="run-over",
            touched=after,
            next_command=f"runbook run {state.runbook} -i {state.inventory}",
        )
    newest = outlook.successor(journal, state, definition)
    if newest is not None:
        raise Refused(
            f"Run {run} has been superseded by {newest} in environment {journal.environment}",
            code="run-superseded",
            touched=after,
            next_command=f"runbook status {newest}",
        )
    if state.undoing and not undo:
        raise Refused(
            f"The undoing of run {run} has begun, so it can only be undone",
            code="run-undoing",
            touched=after,
            next_command=f"runbook undo {run}",
        )


def abort(run: str, journal: Journal, environment: Environment, reason: str) -> None:
    """Give up a run whose process is gone, and its locks. Raises Refused when it is alive."""
    state = journal.state(run)
    if state.state in ("succeeded", "undone", "aborted"):
        raise Problem(
            f"Run {run} has {'succeeded' if state.state == 'succeeded' else f'been {state.state}'}: there is nothing "
            "to give up",
            code="run-ended-already",
            next_command=f"runbook report {run}",
        )
    definition, locks = definitions.load(state.runbook), Locks(environment, journal)
    lease = locks.take(definition, run, resuming=True)
    try:
        end_leftovers(run)
        journal.abort(run, reason, fence=lease.fence)
    finally:
        locks.release(lease)
    notifier = Notifier(journal, environment, run, definition)
    notifier.event("aborted", None, reason)
    notifier.close()


# -- with the locks held


@dataclass(frozen=True, slots=True)
class Held:
    """The locks of a run, and the lease on them."""

    locks: Locks
    lease: Lease


@contextlib.contextmanager
def _held(request: Request, journal: Journal, session: Session, *, resuming: bool, share: str = "") -> Iterator[Held]:
    """Hold the run's locks; they are given back when it was refused before it had begun."""
    locks = Locks(request.environment, journal)
    lease = locks.take(request.definition, request.run, resuming=resuming, share=share)
    session.stop.lease = lease
    with lease:
        try:
            yield Held(locks, lease)
        except BaseException:
            # A run that has begun keeps them, for its resumption.
            with contextlib.suppress(Problem):
                if not _going(journal, request.run):
                    locks.release(lease)
                elif share:
                    locks.leave(lease)
            raise


def _going(journal: Journal, run: str) -> bool:
    return run in journal.runs() and journal.state(run).state in ("running", "waiting")


def _authorise(request: Request, journal: Journal, session: Session) -> dict[str, object]:
    order, who = session.order, Process.current().who
    given = plan.authorise(request, journal, session, given=order.plan, emergency=bool(order.emergency), who=who)
    if given.plan is not None:  # Planning has used the processes up that were warm for the steps.
        session.warm.plan(playbooks(request.definition.steps))
    return given.document()


def _authorise_again(request: Request, journal: Journal, session: Session, state: RunState) -> dict[str, object]:
    """A run that its approvals began goes on; one that an emergency began needs the approvals once that is over."""
    if not state.lifted or session.order.emergency or outlook.emergency(state):
        return {}
    return _authorise(request, journal, session)


def _carry_out(request: Request, journal: Journal, session: Session, held: Held, way: Way, *, undo: bool) -> Ended:
    """Let the work be done, record its end, and give the locks back: in this order, so that whoever takes them next
    meets neither a worker nor an unfinished record of this run."""
    state = journal.state(request.run)
    notifier = Notifier(journal, request.environment, request.run, request.definition)
    job = way.work(request, journal, session, held.lease.fence, notifier)
    ending: Ending | None = None
    try:
        with session.progress.showing(request, state):
            for problem in notifier.problems:
                session.progress.note(problem)
            try:
                ending = job.undo() if undo else job.steps()
            finally:
                if not way.share and (ending is None or ending.state not in ("succeeded", "undone")):
                    end_leftovers(request.run)
        if ending.part and not _leaves_last(journal, held, ending):
            return Ended(request, journal.state(request.run), ending.code)
        if not ending.part:
            journal.finish(ending.state, ending.reason)
        with contextlib.suppress(Lost, Problem):  # Whatever stays behind is a finished run's, and so nobody's.
            (held.locks.park if ending.state == "waiting" else held.locks.release)(held.lease)
        if not ending.quiet:
            notifier.event(ending.event(), None, request.clean(ending.reason))
    except LockLost:
        raise _lost(job, session) from None
    except Problem as problem:
        problem.touched = job.radius()
        raise
    finally:
        notifier.close()
    return Ended(request, journal.state(request.run), ending.code)


def _leaves_last(journal: Journal, held: Held, ending: Ending) -> bool:
    """Leave the run to the processes that share it; whether this was the last one, which records how the run stands."""
    try:
        if not held.locks.leave(held.lease):
            return False
        journal.finish(ending.state, ending.reason)
    except (LockLost, Problem):
        # Another one was faster, or the store does not answer: the lease of what is left there ends by itself.
        return False
    return True


def _lost(job: Work, session: Session) -> Refused:
    run = job.request.run
    return Refused(
        f"Run {run} has stopped itself: {session.stop.lost() or 'another process has taken it over'}",
        code="lock-lost",
        touched=job.radius(),
        next_command=f"runbook resume {run}",
    )
