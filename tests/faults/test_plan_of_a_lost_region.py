"""The plan of a fail-over while a region is really lost; on any lab that has the whole environment on it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from lab.topology import Topology
from tests.integration.test_runbook_plan import Planner, changes, nothing_happens, planner_of, same, writer
from tests.nodes import call, on


@pytest.fixture
def planner(running_lab: Topology, tmp_path: Path) -> Planner:
    return planner_of(tmp_path)


def well_again(lab: Topology, region: str) -> None:
    """Until every database node of the region has its gate open again: the next fault finds a whole lab."""
    end = time.monotonic() + 120
    for node in (n.name for n in lab.nodes if n.site == region and n.role == "db"):
        while json.loads(on(node, "censuschat-guard status", check=False) or "{}").get("kernel_gate") != "open":
            assert time.monotonic() < end, f"{node} does not serve again"
            time.sleep(1)


def test_a_plan_after_a_region_is_lost_is_the_same_before_and_after_its_lease_has_ended(
    running_lab: Topology, planner: Planner
) -> None:
    here = writer()
    there = next(r for r in ("us-east-1", "us-west-2") if r != here)
    call(sys.executable, "-m", "lab", "cut", here)
    try:
        with nothing_happens(running_lab, lost=here):
            code, early = planner.plan("fail-over", "--to", there)
            assert code == 0
            assert any(f"last_region: {there}" in c for c in changes(early, "fence"))
            assert any("turn from standby to primary" in c for c in changes(early, "promote"))
            time.sleep(20)
            code, late = planner.plan("fail-over")
            assert code == 0
            assert late["parameters"]["to"] == there, "observed"
            assert same(early, late) == []
    finally:
        call(sys.executable, "-m", "lab", "heal", here)
        well_again(running_lab, here)
