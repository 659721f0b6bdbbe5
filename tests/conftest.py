"""What tests on the lab share."""

from __future__ import annotations

import os

import pytest

from lab import report, topology, verbs
from lab.topology import Topology


@pytest.fixture(scope="session")
def running_lab() -> Topology:
    """The topology of the lab that is up. Fails, and does not skip, when there is none: untested is not passed."""
    if os.geteuid() != 0:
        pytest.fail("tests on the lab need root; run them with sudo")
    inventory = verbs.recorded()
    if inventory is None:
        pytest.fail("no lab is up; start it with: scripts/run lab up")
    lab = topology.load(inventory)
    missing = report.missing(report.observe(inventory, lab))
    if missing:
        pytest.fail(f"the lab is not all up ({', '.join(missing)}); finish it with: scripts/run lab up")
    return lab
