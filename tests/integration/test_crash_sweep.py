"""A sample of the sweep that `scripts/bench crash-sweep` does in full: the drill, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import verbs
from tests.faults import drill
from tests.faults.sweep import Results

SEED, KILLS = 4, 2
"""With it the kills are of the network and of ansible-runner; more of them take half a minute each."""


def test_a_killed_drill_is_finished_by_its_resumption_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = verbs.recorded()
    assert inventory is not None, "the lab is not up; start it with: scripts/run lab up"

    def told(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    results = Results(SEED, told)
    drill.sweep_drills(inventory, tmp_path, KILLS, results, lanes=1)
    assert [trial.line() for trial in results.bad()] == []
    assert len(results.trials) == KILLS
