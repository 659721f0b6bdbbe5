"""The locks of one environment, for whoever runs something in it: the engine and the other doors alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runbooks import locks
from runbooks.definition import Definition
from runbooks.errors import Problem
from runbooks.journal import Journal
from runbooks.lock_stores import LEAST_S, JournalStore, open_store
from runbooks.locks import LEASE_S, Lease, Process, Wish

if TYPE_CHECKING:
    from runbooks.environment import Environment

SETTINGS = {
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region_name": "AWS_DEFAULT_REGION",
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
}
"""Options of an AWS client, from the inventory's ``aws_environment``; AWS's own ways hold for what is not there."""


class Locks:
    """Takes, keeps and gives back what a runbook locks. Raises Problem when the inventory's settings are wrong.

    Inventory: ``runbook_locks`` (dynamodb://TABLE or s3://BUCKET/PREFIX; default: the journal's database) and
    ``runbook_lease_s``.
    """

    def __init__(self, environment: Environment, journal: Journal) -> None:
        self._environment, self._journal = environment.name, journal
        where = str(environment.get("runbook_locks") or "")
        aws = environment.get("aws_environment") or {} if where else {}
        options: dict[str, Any] = {name: aws[variable] for name, variable in SETTINGS.items() if aws.get(variable)}
        self.store = open_store(journal, where, options)
        self.where = where
        self.lease_s = _seconds(environment, 1.0 if isinstance(self.store, JournalStore) else LEAST_S)

    def _wish(self, definition: Definition, run: str, *, resuming: bool, share: str = "") -> Wish:
        me = Process.current()
        return Wish(self._environment, definition.locks, run, definition.name, me, self.lease_s, resuming, share)

    def _going(self, run: str) -> bool:
        """Whether the journal has the run and it is not over: a lock that is left by any other is nobody's."""
        try:
            return self._journal.state(run).state in ("running", "waiting")
        except Problem as problem:
            if problem.code == "run-unknown":
                return False
            raise

    def check(self, definition: Definition) -> None:
        """Raises Refused when the runbook's locks could not be taken now."""
        locks.check(self.store, self._wish(definition, "", resuming=False), self._going)

    def take(self, definition: Definition, run: str, *, resuming: bool = False, share: str = "") -> Lease:
        """Take the runbook's locks for a run, at once or not at all; the lease, not yet being renewed.

        share: what other processes of the run hold them for as well: whoever comes first takes them, the others join.
        Raises Refused with who has them, for what and since when.
        """
        asked = locks.clock()
        fence = locks.acquire(self.store, self._wish(definition, run, resuming=resuming, share=share), self._going)
        return Lease(self.store.another(), fence, self.lease_s, asked)

    def outlast(self, run: str, note: Callable[[str], None], stop: Callable[[], bool], share: str = "") -> None:
        """Wait until the lease of a run's holder on another machine has ended, as long as nobody renews it.

        share: what it may be held for; there is nothing to wait for then.

        From here nobody can see whether that process lives; its lease tells, by its end or by its renewal.
        """
        book, now = self.store.read()
        holder = book.of_run(run)
        here = Process.current()
        if holder is None or holder.ends is None or now >= holder.ends or (share and holder.share == share):
            return
        if (holder.process.host, holder.process.machine) == (here.host, here.machine):
            return
        note(f"Waiting up to {holder.ends - now:.0f} s for the lease of {holder.describe()} to end")
        ends = holder.ends
        while not stop() and holder is not None and holder.ends == ends and now < ends:
            time.sleep(min(0.5, max(0.05, ends - now)))
            book, now = self.store.read()
            holder = book.of_run(run)

    def park(self, lease: Lease) -> None:
        """Keep the locks while the run waits for a person. Raises Lost."""
        self.store.change(lambda book, _: (locks.park(book, lease.fence), None))

    def leave(self, lease: Lease) -> bool:
        """Leave the locks to the processes that share them; True, and they are parked, when this was the last."""
        return locks.part(self.store, lease.fence)

    def release(self, lease: Lease) -> None:
        self.store.change(lambda book, _: (locks.release(book, lease.fence), None))


def _seconds(environment: Environment, least: float) -> float:
    given = environment.get("runbook_lease_s", LEASE_S)
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = 0.0
    if seconds < least:
        raise Problem(
            f"runbook_lease_s of environment {environment.name} is {given!r}, which is not a number of seconds of at "
            f"least {least:g}",
            code="lease-wrong",
            next_command=f"ansible-inventory -i {environment.path} --list",
        )
    return seconds
