"""The sweep of the drill: killed at seeded random moments, resumed, and counted by the servers' logs."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import topology
from runbooks import evidence
from runbooks.journal import Journal
from tests.faults import sweep
from tests.faults.logs import Event, Logs, of, role_changes_logged
from tests.faults.sweep import Network, Place, Results, Run, SweepError, Trial, network_of, place, strike
from tests.local_postgresql import LocalPostgreSQL
from tests.nodes import on

#: Which step's intent comes before which change; removals are the last step's.
STEPS = {"etcd put": "lease", "record set": "record", "kubernetes write": "scale", "file write": "node"}
STEPS |= {"service start": "node", "role create": "role"}


RECENT = 3
"""How many unbroken drills say how long one takes: the machine may be busier at times."""


def step_of(event: Event) -> str:
    return STEPS.get(" ".join(event.key.split()[:2]), "clear")


@dataclass
class Lane:
    """Runs drills one after the other, under a name of its own."""

    name: str
    place: Place
    logs: Logs
    network: Network
    seconds: list[float] = field(default_factory=list)
    """What unbroken drills took, from their first step on."""
    unbroken: Counter[str] = field(default_factory=Counter)

    def command(self) -> list[str]:
        inventory = str(self.place.inventory)
        return ["run", "drill", "-i", inventory, "--yes", "--param", f"rehearsal={self.name}"]

    def learn(self) -> None:
        """What an unbroken drill changes, and how long it takes; the second one of two, when all is there."""
        for _ in range(2):
            run = Run(self.place, self.command())
            if run.wait() != 0:
                raise SweepError(f"an unbroken drill failed:\n{run.said}")
            self.seconds.append(time.time() - run.began_work)
            # What the slowest log says of it comes in late.
            deadline, seen = time.monotonic() + 15, -1
            while (events := self._events(run.began)) and seen < len(events) and time.monotonic() < deadline:
                seen = len(events)
                time.sleep(2)
            self.unbroken |= Counter(event.key for event in events)

    def _events(self, since: float) -> list[Event]:
        needles = (f"runbook-{self.name}", f"runbook_{self.name}", f"-{self.name}/")
        events = self.logs.read()
        return [event for needle in needles for event in of(events, needle, since - 0.5, time.time() + 1)]

    def trial(self, number: int, seed: int) -> Trial:
        """One drill, killed once; what became of it. The seed and the number say who is killed, when, and the rest."""
        dice = random.Random(f"{seed}/{number}")
        victim = dice.choices(sweep.VICTIMS, sweep.WEIGHTS)[0]
        share = dice.random()
        elsewhere = (victim in ("engine", "all") and dice.random() < 0.2) or (victim == "network" and self.shared)
        began = time.monotonic()
        while True:
            trial = Trial(number, victim, f"at {share:.3f} of the run", lane=self.name)
            first = self._killed(trial, share, dice)
            if first is not None:
                break
            # It was over before: earlier in the next one.
            share *= 0.7
        try:
            self._resumed(trial, first, f"machine-{self.name}-{number}" if elsewhere else "here")
        except SweepError as error:
            trial.error = str(error)
        self._judge(trial, first)
        trial.seconds = time.monotonic() - began
        return trial

    def _killed(self, trial: Trial, share: float, dice: random.Random) -> Run | None:
        """The run after its kill; None when it had ended by then."""
        cut = trial.victim == "network"
        run = Run(self.place, self.command())
        if cut:
            self.network.join(run.process.pid)
        run.started.wait(120)
        if not run.name:
            run.wait()
            raise SweepError(f"a drill did not begin:\n{run.said}")
        trial.run = run.name
        # From its start to its end: what comes before is no run yet.
        try:
            run.process.wait(share * statistics.median(self.seconds[-RECENT:]))
        except subprocess.TimeoutExpired:
            pass
        else:
            self.seconds.append(time.time() - run.began_work)
            return None
        if not cut:
            trial.victim = strike(run, trial.victim, dice)
            return run
        self.network.cut()
        if not self.shared:
            # Nobody else can reach this journal, so nobody is to take the run over: the network comes back.
            time.sleep(dice.uniform(2, 8))
            self.network.heal()
        return run

    @property
    def shared(self) -> bool:
        """Whether other machines reach the journal."""
        return "runbook_journal" in self.place.settings

    def _resumed(self, trial: Trial, first: Run, machine: str) -> None:
        """Until it succeeds, as an operator would: what the first one says is done, three times at most."""
        inventory = str(self.place.inventory)
        if not self.network.down:
            code = first.wait()
            if code == 0:
                # Who was killed had nothing left to do.
                trial.finished = True
                return
        trial.elsewhere = machine != "here"
        for _ in range(3):
            trial.resumes += 1
            again = Run(self.place, ["resume", trial.run, "-i", inventory], machine=machine)
            code = again.wait()
            if code == 0:
                trial.finished = True
                break
            trial.error = f"exit code {code}: {again.said}"
        if self.network.down:
            # The first engine must have ended itself: without its lease it may not act, whether it is healed or not.
            self.network.heal()
            first.wait(60)

    def _judge(self, trial: Trial, first: Run) -> None:
        deadline = time.monotonic() + 3
        while True:
            events = self._events(first.began)
            sweep.compare(self.unbroken, events, trial)
            if not trial.missing or time.monotonic() > deadline:
                break
            time.sleep(0.3)
        journal = open_journal(self.place)
        try:
            records = journal.records(trial.run)
            for event in events:
                step = step_of(event)
                if not any(r.kind == "effect_intended" and r.step == step and r.wall <= event.wall for r in records):
                    trial.unannounced.append(event.key)
        finally:
            journal.close()


def location(where: Place) -> str | Path:
    return where.settings.get("runbook_journal") or where.journal / "journal.sqlite"


def open_journal(where: Place) -> Journal:
    return Journal(location(where), "lab", where.journal)


def verify(where: Place, runs: Sequence[str]) -> dict[str, str]:
    """Run -> what is wrong with its evidence, as `runbook evidence verify RUN` would say by the sweep's own key."""
    chain = evidence.read(location(where), "lab")
    verdict = evidence.judge(chain, evidence.by_public(evidence.own_keys()), ())
    if not verdict.ok:
        return dict.fromkeys(runs, verdict.sentence())
    return {run: "the journal does not have the run" for run in runs if chain.find(run) != run}


def left_over(names: Sequence[str], inventory: Path) -> list[str]:
    """What the drills left on the servers, asked one by one; an unbroken drill leaves nothing."""
    lab = topology.load(inventory)
    found = []
    for node in lab.nodes:
        if node.role == "db":
            found += on(node.name, "ls -d /etc/censuschat-runbook-* 2>/dev/null || :").split()
            found += on(node.name, "systemctl --plain --no-legend list-units 'censuschat-runbook-*'").splitlines()
            roles = "SELECT rolname FROM pg_roles WHERE rolname LIKE 'runbook%'"
            found += on(node.name, f'psql -Atqc "{roles}"', user="postgres").split()
        elif node.kubernetes == "control-plane":
            kubectl = "kubectl --kubeconfig /etc/kubernetes/admin.conf -n production-api get deployments -o name"
            found += [name for name in on(node.name, kubectl).split() if "runbook-" in name]
    return found


def sweep_drills(inventory: Path, directory: Path, count: int, results: Results, *, lanes: int) -> None:
    """Kill and resume the first so many drills of the seed that have no result yet, in lanes side by side.

    The lanes' names and journals keep them apart. Raises SweepError when something is left on the servers in the end.
    """
    lab = topology.load(inventory)
    told = results.told
    numbers = iter([number for number in range(1, count + 1) if f"drill {number}" not in results.trials])
    mutex, over = threading.Lock(), threading.Event()
    own: list[Trial] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(sweep.operator(directory))
        stack.enter_context(role_changes_logged(primary_of(lab)))
        logs = stack.enter_context(Logs(lab))
        server = stack.enter_context(LocalPostgreSQL())
        os.environ["PGPASSFILE"] = str(server.passfile)
        all_lanes = []
        for index in range(lanes):
            # One lane's journal is in PostgreSQL, as several operators share it.
            settings: dict[str, Any] = {"runbook_journal": server.url} if index == 1 else {}
            # A drill touches nothing that the clients see, and reading their ledgers takes a report's time.
            settings["runbook_ledgers"] = str(directory / "no-ledgers")
            name = f"lane{index}"
            where = place(directory / name, inventory, settings)
            all_lanes.append(Lane(name, where, logs, stack.enter_context(network_of(index))))
        stack.callback(over.set)
        told(f"lanes: {lanes}, learning what an unbroken drill does")
        side_by_side([lane.learn for lane in all_lanes])
        together = agreed(all_lanes)
        for lane in all_lanes:
            lane.unbroken = Counter({key.replace("LANE", lane.name): times for key, times in together.items()})
            told(f"{lane.name}: {sum(lane.unbroken.values())} changes in {lane.seconds[-1]:.1f} s")

        def work(lane: Lane) -> None:
            while True:
                with mutex:
                    number = None if over.is_set() or results.stop.is_set() else next(numbers, None)
                if number is None:
                    return
                try:
                    trial = lane.trial(number, results.seed)
                except (SweepError, OSError, subprocess.CalledProcessError) as error:
                    trial = Trial(number, "?", "", lane=lane.name, error=str(error))
                own.append(trial)
                results.add(f"drill {number}", trial, f"/{count}")

        side_by_side([lambda lane=lane: work(lane) for lane in all_lanes])  # type: ignore[misc]
        for lane in all_lanes:
            faults = verify(lane.place, [trial.run for trial in own if trial.run and trial.lane == lane.name])
            results.judge(lambda trial, faults=faults: faults.get(trial.run, ""))  # type: ignore[misc]
        remains = left_over([lane.name for lane in all_lanes], inventory)
    if remains:
        raise SweepError(f"the drills left something behind: {remains}")


def agreed(lanes: Sequence[Lane]) -> Counter[str]:
    """What an unbroken drill changes, with LANE for the lane's name. Raises SweepError when the lanes differ."""
    found = [Counter({key.replace(lane.name, "LANE"): n for key, n in lane.unbroken.items()}) for lane in lanes]
    for other in found[1:]:
        if other != found[0]:
            raise SweepError(f"unbroken drills differ: {dict(other - found[0])} and {dict(found[0] - other)}")
    return found[0]


def side_by_side(works: Sequence[Callable[[], object]]) -> None:
    """Do all of it in threads; the first error of any is raised when all have ended."""
    errors: list[BaseException] = []

    def one(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def primary_of(lab: topology.Topology) -> str:
    """The node whose PostgreSQL takes writes."""
    for node in lab.nodes:
        if (
            node.role == "db"
            and on(node.name, 'psql -Atqc "SELECT pg_is_in_recovery()"', user="postgres").strip() == "f"
        ):
            return node.name
    raise SweepError("no node has a primary PostgreSQL")
