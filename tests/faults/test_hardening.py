"""Hardening under faults that take minutes to be over: a controller that dies over a firewall, a lock held by another.

They change the witness, and leave it hardened.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.paths import REPO
from lab.topology import Topology
from tests.integration.test_hardening import HARDEN, family, harden, kept_hardened
from tests.integration.test_hardening_domains import GUARD, SABOTAGE, entry, harden_with, own, wall
from tests.integration.trial import ENVIRONMENT, command, fresh_login, shell


@pytest.fixture(scope="module", autouse=True)
def hardened(running_lab: Topology) -> Iterator[None]:
    with kept_hardened():
        yield
        shell(
            "nft delete table inet trial 2>/dev/null; rm -f /etc/nftables.conf.d/trial.nft "
            "/var/lib/censuschat-hardening/firewall/trial.json"
        )


def test_dead_controller_leaves_the_timer_to_open_the_firewall_again(tmp_path: Path) -> None:
    choices = tmp_path / "choices.json"
    choices.write_text(json.dumps({"hardening_controls": [wall(SABOTAGE)]}))
    before = shell("nft list tables")
    with subprocess.Popen(
        command(HARDEN, "-e", f"@{choices}"),
        cwd=REPO,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as controller:
        try:
            shell(
                "for i in $(seq 1200); do nft list table inet trial >/dev/null 2>&1 && exit 0; sleep 0.05; done; exit 1"
            )
        finally:
            for pid in family(controller.pid):
                os.kill(pid, signal.SIGKILL)
    refused = harden_with(wall())
    assert refused.code != 0, "an unproven firewall was taken for a proven one"
    deadline = time.monotonic() + 120
    while shell("nft list tables") != before:
        assert time.monotonic() < deadline, "the timer did not undo the firewall"
        time.sleep(1)
    assert fresh_login() == ""
    assert shell(f"ls {GUARD} 2>/dev/null; true") == ""


def test_dpkg_lock_of_somebody_else_is_told_with_its_process() -> None:
    """It takes as long as the run waits for the lock: two minutes."""
    lock = "f = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold = f"import fcntl, time; {lock}; time.sleep(600)"
    shell(f'echo changed > /etc/issue; systemd-run --quiet --collect --unit=trial-lock python3 -c "{hold}"; sleep 1')
    try:
        outcome = harden_with(own("trial_package", "packages", {"node": {"packages": {"present": ["ed"]}}}))
        assert outcome.code == 2
        detail = entry(outcome, "trial_package")["detail"]
        assert "dpkg's lock was held by process" in detail and "then run again" in detail
        assert "\n" not in detail
        assert outcome.controls()["banners_login"] == "changed", "the lock kept other controls from being held"
    finally:
        shell("systemctl stop trial-lock.service")
    assert harden().code == 0
