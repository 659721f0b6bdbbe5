"""The sweep of fail-over and fail-back: killed once before and once after every side effect, under clients' load.

A fail-over is killed and resumed, the region heals, a fail-back is killed and resumed: one pair. What their side
effects are is learned from an unbroken pair, from the tasks that changed something on a host.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import topology
from lab.paths import REPO, STATE
from runbooks import ledger
from tests.faults import sweep
from tests.faults.drill import open_journal, verify
from tests.faults.logs import Event, Logs
from tests.faults.sweep import PLUGINS, UNHARMED, Place, Results, Run, SweepError, Trial, place, read_lines

LAB = (sys.executable, "-m", "lab")
VICTIMS = ("engine", "all", "runner", "worker")
ELSEWHERE = 5
"""Every so many kills the run is resumed from another machine."""
STEPS = {
    "etcd": {"fence", "hand-over"},
    "record": {"route"},
    "kubernetes": {"promote", "verify", "stand-down"},
    "redis": {"promote", "resynchronise", "stand-down"},
    # A guard promotes when its region has the lease.
    "timeline": {"fence", "hand-over"},
}


@dataclass(frozen=True, slots=True)
class Point:
    """One side effect of a runbook: the task that changes a host, and which time of several."""

    step: str
    task: str
    host: str
    nth: int

    def __str__(self) -> str:
        return f"{self.step}: {self.task} ({self.host}{f', time {self.nth}' if self.nth > 1 else ''})"


@dataclass
class Sweep:
    """Pairs of fail-over and fail-back on the lab that is up."""

    where: Place
    logs: Logs
    results: Results
    primary: str
    secondary: str
    unbroken: dict[str, Counter[str]] = field(default_factory=dict)
    points: dict[str, list[Point]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    def command(self, runbook: str) -> list[str]:
        return ["run", runbook, "-i", str(self.where.inventory), "--yes"]

    def learn(self) -> None:
        """An unbroken pair: what it changes, and what the servers say."""
        for runbook in ("fail-over", "fail-back"):
            notes = self.where.directory / f"{runbook}.jsonl"
            self._lose() if runbook == "fail-over" else self._heal()
            run = Run(self.where, self.command(runbook), more=self._plugin({"notes": str(notes), "mark": "/"}))
            code = run.wait(600)
            if not self._succeeded(run.name):
                raise SweepError(f"an unbroken {runbook} ended with {code}:\n{run.said}")
            self._heal()
            time.sleep(2)
            self.unbroken[runbook] = Counter(event.key for event in self._events(run.began))
            self.points[runbook] = [
                Point(line["step"], line["task"], line["host"], line["nth"]) for line in read_lines(notes)
            ]
            self.results.told(
                f"unbroken {runbook}: {time.time() - run.began:.0f} s, {len(self.points[runbook])} side effects, "
                f"{sum(self.unbroken[runbook].values())} changes on servers"
            )

    def _plugin(self, plan: dict[str, Any]) -> dict[str, str]:
        file = self.where.directory / "kill.json"
        file.write_text(json.dumps(plan))
        return {"SWEEP_KILL": str(file), "ANSIBLE_CALLBACK_PLUGINS": str(PLUGINS)}

    def kills(self, runbook: str) -> list[tuple[Point, str]]:
        return [(point, moment) for point in self.points[runbook] for moment in ("before", "after")]

    def pair(self, number: int, over: tuple[Point, str] | None, back: tuple[Point, str] | None) -> None:
        """Lose the region, fail over, heal it, fail back; each killed at its point, if it has one."""
        self._lose()
        self._one(number, "fail-over", over)
        self._heal()
        self._one(number, "fail-back", back)

    def _one(self, number: int, runbook: str, kill: tuple[Point, str] | None) -> None:
        # Both moments of a point have one victim: otherwise an after would always be what a worker falls on.
        victim = VICTIMS[number // 2 % len(VICTIMS)]
        if kill is not None and kill[1] == "after" and victim == "worker":
            victim = "engine"  # A worker that has given its result is gone.
        at_point = f"of {runbook} {kill[1]} {kill[0]}" if kill else f"of {runbook}"
        trial = Trial(number, victim if kill else UNHARMED, at_point)
        mark = self.where.directory / f"mark-{number}-{runbook}"
        began = time.monotonic()
        more = {}
        if kill is not None:
            point, moment = kill
            plan = {"step": point.step, "task": point.task, "host": point.host, "nth": point.nth}
            more = self._plugin({**plan, "moment": moment, "victim": victim, "mark": str(mark)})
        first = Run(self.where, self.command(runbook), more=more)
        try:
            code = first.wait(600)
            trial.run = first.name
            if kill is not None and not mark.exists():
                raise SweepError(f"the kill did not come to pass (exit code {code}):\n{first.said}")
            self._resume(number, trial)
        except SweepError as error:
            trial.error = str(error)
        trial.finished = bool(trial.run) and self._succeeded(trial.run)
        if runbook == "fail-over":
            # What a region that is cut off did shows in its servers' logs all the same.
            self._heal()
        self._judge(runbook, trial, first)
        trial.seconds = time.monotonic() - began
        self.runs += [trial.run] if trial.run else []
        self.results.add(f"{runbook} {number}", trial)

    def _resume(self, number: int, trial: Trial) -> None:
        machine = f"machine-{number}" if trial.victim in ("engine", "all") and number % ELSEWHERE == 0 else "here"
        trial.elsewhere = machine != "here"
        while not self._succeeded(trial.run):
            if trial.resumes == 3:
                raise SweepError(trial.error)
            trial.resumes += 1
            again = Run(self.where, ["resume", trial.run, "-i", str(self.where.inventory)], machine=machine)
            trial.error = f"exit code {again.wait(600)}: {again.said}"

    def _succeeded(self, run: str) -> bool:
        if not run:
            return False
        journal = open_journal(self.where)
        try:
            return journal.state(run).state == "succeeded"
        finally:
            journal.close()

    def _events(self, since: float) -> list[Event]:
        """What a runbook changes; a lease that ends by itself is the store's own doing."""
        return [
            event
            for event in self.logs.read()
            if event.wall >= since
            and event.kind in STEPS
            and (event.kind != "etcd" or event.what in ("put lab/epoch", "put lab/handover"))
            # A drill beside it has its own.
            and "runbook" not in event.what
        ]

    def _judge(self, runbook: str, trial: Trial, first: Run) -> None:
        deadline = time.monotonic() + 3
        while True:
            events = self._events(first.began)
            sweep.compare(self.unbroken[runbook], events, trial)
            if not trial.missing or time.monotonic() > deadline:
                break
            time.sleep(0.3)
        if not trial.run:
            return
        journal = open_journal(self.where)
        try:
            records = [r for r in journal.records(trial.run) if r.kind == "effect_intended"]
        finally:
            journal.close()
        for event in events:
            steps = STEPS[event.kind]
            if not any(r.step in steps and r.wall <= event.wall for r in records):
                trial.unannounced.append(event.key)

    def _lose(self) -> None:
        call(*LAB, "cut", self.primary)

    def _heal(self) -> None:
        call(*LAB, "heal", self.primary)


def call(*command: str) -> str:
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SweepError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def prepared(directory: Path, inventory: Path) -> Place:
    """The sweep's place. On a lab of one application node a region the writing one runs two pods of each service:
    otherwise a fail-over would have nothing to scale."""
    where = place(directory, inventory, {})
    services = where.inventory / "group_vars" / "all" / "services.yml"
    text = services.read_text()
    nodes = [n for n in topology.load(inventory).nodes if n.role == "app"]
    if len(nodes) == 2:
        more = text.replace('| length }}"\n      standby', '| length + 1 }}"\n      standby')
        if more == text:
            raise SweepError("services.yml does not say any more how many pods the writing region runs")
        services.unlink()
        services.write_text(more)
    return where


def sweep_failovers(inventory: Path, directory: Path, pairs: int | None, results: Results) -> None:
    """So many pairs that have no result yet, or as many as it takes; and for how long the clients saw two writers."""
    lab = topology.load(inventory)
    variables = yaml.safe_load((inventory / "group_vars/all/main.yml").read_text())
    where = prepared(directory / "failover", inventory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sweep.operator(directory))
        started = time.monotonic()
        play = str(Path(sys.executable).parent / "ansible-playbook")
        call(play, "-i", str(where.inventory), "playbooks/services.yml")
        call(*LAB, "probe", "start", "--all")
        # The lab is left with its clients stopped, whole, and with the pods that its own inventory wants.
        stack.callback(call, play, "-i", str(inventory), "playbooks/services.yml")
        stack.callback(call, *LAB, "heal", variables["region_primary"])
        stack.callback(call, *LAB, "probe", "stop")
        logs = stack.enter_context(Logs(lab))
        work = Sweep(where, logs, results, variables["region_primary"], variables["region_secondary"])
        work.learn()
        over, back = work.kills("fail-over"), work.kills("fail-back")
        wanted = [number for number in range(max(len(over), len(back))) if f"fail-back {number}" not in results.trials]
        for number in wanted[:pairs]:
            if results.stop.is_set():
                break
            work.pair(number, at(over, number), at(back, number))
        faults = verify(where, work.runs)
        results.judge(lambda trial: faults.get(trial.run, ""))
        time.sleep(5)
    records = ledger.read_all((STATE / "ledgers").glob("*.jsonl"))
    results.add_two_writers(ledger.measure(records, start=started).two_writers_ms)


def at(kills: Sequence[tuple[Point, str]], number: int) -> tuple[Point, str] | None:
    return kills[number] if number < len(kills) else None
