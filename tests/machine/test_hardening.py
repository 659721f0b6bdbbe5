"""Hardening a machine with a kernel of its own: what the lab's containers share with their host and cannot show.

One machine in the order of the tests: bare, checked, hardened, hardened again, booted, rolled back, booted.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import trial, virtual
from lab.cli import Refusal
from lab.paths import REPO, STATE
from lab.trial import Trial
from lab.virtual import NAME, Machine
from tests.integration.trial import BIN, ENVIRONMENT, Play

BESIDE = "beside1"
# What check mode could have left behind.
FINGERPRINT = """
find /etc /usr/local /home /root -xdev -not -path '*/.ansible*' -printf '%p %u %g %m %T@ %l\\n' | sort
dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n'
sysctl -a --pattern '^(kernel|fs|dev|net.ipv4)\\.' 2>/dev/null | grep -Ev 'random|file-nr|inode|dentry|last_pid|_max$'
findmnt --list --output TARGET,FSTYPE,OPTIONS
nft list ruleset
"""


@dataclass
class Hardened:
    """A machine, and what the runs on it said."""

    machine: Machine
    place: Path
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def play(self, name: str, tasks_from: str, *options: str) -> dict[str, Any]:
        """Run the role on the machine; returns the result of its module."""
        role = {"ansible.builtin.import_role": {"name": "censuschat.infra.hardening", "tasks_from": tasks_from}}
        playbook, inventory = self.place / "play.yml", self.place / "hosts.yml"
        playbook.write_text(yaml.safe_dump([{"hosts": NAME, "gather_facts": False, "tasks": [role]}]))
        inventory.write_text(yaml.safe_dump({"all": {"hosts": {NAME: dict(self.machine.host())}}}))
        command = (str(BIN / "ansible-playbook"), "-i", str(inventory), str(playbook), *options)
        outcome = Play(
            subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
        )
        results = [task["hosts"][NAME] for task in outcome.data["plays"][0]["tasks"] if NAME in task["hosts"]]
        assert outcome.code == 0, next((r["msg"] for r in results if r.get("failed")), outcome.text[-3000:])
        found: dict[str, Any] = next(r for r in results if r["action"].startswith("censuschat.infra.node_"))
        self.reports[name] = found
        return found

    def harden(self, name: str, *options: str) -> dict[str, str]:
        """Harden to the strictest profile; returns the result of each control."""
        choice = {"hardening_profile": "cis_level2", "hardening_exclude": virtual.CANNOT_HOLD}
        report = self.play(name, "main", "-e", json.dumps(choice), *options)
        return {control["id"]: control["result"] for control in report["controls"]}

    def differs(self, name: str) -> dict[str, str]:
        """What a run found to change, by control."""
        return {c["id"]: c["detail"] for c in self.reports[name]["controls"] if c["result"] in ("changed", "failed")}


@pytest.fixture(scope="module", name="node")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hardened]:
    try:
        with (
            trial.running([Trial(BESIDE)], "machine"),
            virtual.running(virtual.image_of(BESIDE), STATE / "log" / "machine.log") as machine,
        ):
            yield Hardened(machine, tmp_path_factory.mktemp("machine"))
    except Refusal as refusal:
        pytest.fail(str(refusal))


def test_check_mode_on_the_bare_machine_is_the_apply(node: Hardened) -> None:
    # The first look loads the kernel's part of nftables, which brings values of its own.
    node.machine.sh("nft list ruleset; modprobe nf_conntrack")
    before = node.machine.sh(FINGERPRINT)
    planned = node.harden("planned", "--check", "--diff")
    assert node.machine.sh(FINGERPRINT) == before, "check mode changed the machine"
    applied = node.harden("applied")
    assert planned == applied
    assert set(applied.values()) == {"changed", "pass", "excluded", "not_applicable"}
    changed = {identifier for identifier, result in applied.items() if result == "changed"}
    assert {"apparmor_enforced", "audit_immutable", "audit_sudo", "mounts_tmp", "sysctl_kptr_restrict"} <= changed


def test_second_run_plans_nothing(node: Hardened) -> None:
    node.harden("second")
    assert (node.reports["second"]["changed"], node.differs("second")) == (False, {})


def test_kernel_holds_what_a_container_cannot(node: Hardened) -> None:
    sh = node.machine.sh
    assert sh("sysctl -n kernel.kptr_restrict kernel.yama.ptrace_scope kernel.unprivileged_bpf_disabled").split() == [
        "2",
        "1",
        "1",
    ]
    assert "enabled 2" in sh("auditctl -s").splitlines()
    assert "-w /etc/sudoers -p wa -k scope" in sh("auditctl -l").splitlines()
    assert sh("cat /sys/module/apparmor/parameters/enabled").strip() == "Y"
    assert sh("modprobe --dry-run --verbose usb-storage").strip() == "install /bin/false"
    assert sh("systemctl --failed --no-legend --plain") == ""


def test_programs_find_their_files_in_the_mounted_tmp(node: Hardened) -> None:
    assert {"nosuid", "nodev", "noexec"} <= set(node.machine.sh("findmnt -no OPTIONS /tmp").strip().split(","))
    private = "systemd-private-.*-systemd-logind.service-.*"
    assert node.machine.sh(f"find /tmp -maxdepth 1 -regex '/tmp/{private}'").strip()


def test_nothing_differs_after_a_boot(node: Hardened) -> None:
    node.machine.reboot()
    node.harden("booted", "--check")
    assert node.differs("booted") == {}
    assert node.machine.sh("systemctl --failed --no-legend --plain") == ""


def test_rollback_puts_back_what_the_kernel_takes_and_names_the_rest(node: Hardened) -> None:
    choice = f"hardening_rollback_to={node.reports['applied']['run']}"
    planned = node.play("rollback planned", "rollback", "-e", choice, "--check")
    done = node.play("rolled back", "rollback", "-e", choice)
    assert done["left"] == planned["left"]
    text = " ".join(done["left"])
    assert "kernel.unprivileged_bpf_disabled stays 1 until the next boot" in text
    assert "the loaded audit rules stay until the next boot: they are locked (-e 2)" in text
    sh = node.machine.sh
    assert sh("sysctl -n kernel.kptr_restrict").strip() != "2"
    assert sh("findmnt /tmp; true") == ""
    assert "censuschat" not in sh("nft list tables")


def test_a_boot_brings_the_rest_of_the_rollback(node: Hardened) -> None:
    node.machine.reboot()
    sh = node.machine.sh
    assert sh("sysctl -n kernel.unprivileged_bpf_disabled").strip() != "1"
    assert "enabled 2" not in sh("auditctl -s").splitlines()
    assert "-k scope" not in sh("auditctl -l")
    assert sh("systemctl --failed --no-legend --plain") == ""
