"""Hardening on the running lab: check mode, apply, convergence, drift of what runs, and sshd under sabotage.

The trials change the witness, which no other test cuts off, and leave it hardened; every test ends with a node
that a new ssh connection reaches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.paths import REPO
from lab.topology import Topology
from tests.integration.trial import ENVIRONMENT, NODE, Play, command, fresh_login, play, playbook_of, shell

HARDEN = Path(__file__).parent / "plays/harden.yml"
DROP_IN = "/etc/ssh/sshd_config.d/00-censuschat.conf"
PENDING = "/var/lib/censuschat-sshd/pending"

# What each kind of state looks like when it has drifted, so that every domain has something to repair.
DRIFT = """
set -eu
rm -f /etc/sysctl.d/99-zz-censuschat.conf
sed -i '/^Storage/d' /etc/systemd/journald.conf
sed -i '/^minlen/d' /etc/security/pwquality.conf
rm -f /etc/sudoers.d/60-censuschat-log /etc/security/limits.d/60-censuschat-core.conf
sysctl -qw net.ipv4.conf.all.accept_redirects=1 net.ipv4.conf.eth0.send_redirects=1
sed -i 's/^PASS_MAX_DAYS.*/PASS_MAX_DAYS 99999/' /etc/login.defs
chmod 0666 /etc/shells
chmod 0755 /etc/cron.d /home/ops
echo changed > /etc/issue
systemctl -q unmask rsync.service
rm -f /etc/ssh/sshd_config.d/00-censuschat.conf
sed -i '/^# BEGIN censuschat/,/^# END censuschat/d' /etc/ssh/sshd_config
systemctl reload ssh.service
"""
# Everything a check mode run could have written: files with owner and mode, kernel values, units, sshd's start.
FINGERPRINT = """
find /etc /home/ops /root -xdev -type f -not -path '*/.ansible/*' \
  -printf '%p %u %g %m %C@ ' -exec sha256sum {} ';' | sort
ls -la /var/lib/censuschat-sshd
sysctl -a --pattern '^net\\.(ipv4|ipv6)\\.(conf|icmp|tcp)' 2>/dev/null | sort
systemctl list-unit-files --no-pager
systemctl show ssh.service systemd-journald.service -p ActiveEnterTimestamp -p StateChangeTimestamp
"""


def harden(*options: str) -> Play:
    return play(HARDEN, *options)


def sshd_task(settings: dict[str, Any], name: str = "Change sshd", revert_after: int = 60) -> dict[str, Any]:
    """A task that asks for these sshd settings and nothing else."""
    return {"name": name, "censuschat.infra.sshd_config": {"settings": settings, "revert_after": revert_after}}


def change_sshd(tmp_path: Path, settings: dict[str, Any], *options: str) -> tuple[bool, dict[str, Any]]:
    """Ask for these sshd settings; returns whether that failed, and the task's result."""
    result = play(playbook_of(tmp_path, [sshd_task(settings)]), *options).result("Change sshd")
    return bool(result.get("failed")), result


def drop_in() -> str:
    return shell(f"cat {DROP_IN}; stat -c '%u %g %a' {DROP_IN}")


def leftovers() -> str:
    return shell(f"ls -d {PENDING} /var/lib/censuschat-sshd/re* /etc/systemd/system/censuschat-sshd* 2>/dev/null; true")


@contextmanager
def kept_hardened() -> Iterator[None]:
    """The node is hardened before and after, whatever was done to it."""
    first = harden()
    assert first.code == 0, first.text[-3000:]
    yield
    last = harden()
    assert last.code == 0, last.text[-3000:]
    assert harden().changed == 0


@pytest.fixture(scope="module", autouse=True)
def hardened(running_lab: Topology) -> Iterator[None]:
    with kept_hardened():
        yield


def test_check_mode_is_the_apply_and_a_second_run_plans_nothing() -> None:
    shell(DRIFT)
    before = shell(FINGERPRINT)
    planned = harden("--check", "--diff")
    assert planned.code == 0, planned.text[-3000:]
    assert shell(FINGERPRINT) == before, "check mode changed the node"
    applied = harden("--diff")
    assert applied.code == 0, applied.text[-3000:]
    assert planned.controls() == applied.controls()
    repaired = {identifier for identifier, result in applied.controls().items() if result == "changed"}
    assert {
        "core_dumps_limits",
        "banners_login",
        "logging_journal_persistent",
        "passwords_aging",
        "passwords_quality",
        "permissions_account_files",
        "permissions_cron",
        "permissions_home_directories",
        "services_rsync",
        "sshd_root_login",
        "sudo_log",
        "sysctl_accept_redirects",
        "sysctl_send_redirects",
    } <= repaired
    assert "failed" not in applied.controls().values()
    second = harden()
    assert (second.code, second.changed) == (0, 0)
    assert set(second.controls().values()) == {"pass", "not_applicable", "excluded"}
    again = harden("--check")
    assert (again.code, again.changed) == (0, 0)
    running = shell("sysctl -n net.ipv4.conf.all.accept_redirects net.ipv4.conf.eth0.send_redirects; sshd -T")
    assert running.splitlines()[:2] == ["0", "0"]
    assert "permitrootlogin no" in running.splitlines()


def test_kernel_value_that_drifted_from_its_file_is_found_and_put_back() -> None:
    shell("sysctl -qw net.ipv4.conf.default.rp_filter=0")
    audit = harden("-e", "hardening_audit_only=true")
    assert (audit.code, audit.changed) == (0, 0)
    assert audit.controls()["sysctl_rp_filter"] == "failed"
    assert shell("sysctl -n net.ipv4.conf.default.rp_filter") == "0"
    applied = harden()
    assert {i for i, r in applied.controls().items() if r == "changed"} == {"sysctl_rp_filter"}
    assert shell("sysctl -n net.ipv4.conf.default.rp_filter") == "1"


def test_container_leaves_the_machines_kernel_alone() -> None:
    """A value of the machine is kept in the file where it already is the wanted one, and never changed."""
    catalogue = REPO / "collections/ansible_collections/censuschat/infra/roles/hardening/files/catalogue"
    wanted = [c for path in catalogue.glob("*.yml") for c in yaml.safe_load(path.read_text())]
    keys = sorted({k for c in wanted for k in c["state"].get("sysctl", {}) if not k.startswith("net.")})
    assert keys
    before = shell(f"sysctl -e {' '.join(keys)}")
    shell("rm -f /etc/sysctl.d/99-zz-censuschat.conf")
    outcome = harden()
    assert outcome.code == 0, outcome.text[-3000:]
    assert shell(f"sysctl -e {' '.join(keys)}") == before
    stored = shell("grep -v '^#' /etc/sysctl.d/99-zz-censuschat.conf").splitlines()
    assert {line for line in stored if not line.startswith("net.")} <= set(before.splitlines())
    report = outcome.result("Hold the node to its hardening profile")
    theirs = [c for c in report["controls"] if c["domain"] == "sysctl" and c["result"] == "not_applicable"]
    assert all(c["detail"] for c in theirs)


def test_sshd_that_runs_an_older_configuration_is_reloaded() -> None:
    """The file is right and the daemon never read it: a dropped handler, as others leave it behind."""
    shell(f"mv {DROP_IN} /root/kept && systemctl reload ssh.service && sleep 1 && mv /root/kept {DROP_IN}")
    planned = harden("--check").controls()
    assert planned["sshd_root_login"] == "changed"
    before = shell("journalctl -u ssh.service -o cat | grep -cx 'Received SIGHUP; restarting.'")
    applied = harden()
    assert applied.code == 0, applied.text[-3000:]
    assert applied.controls()["sshd_root_login"] == "changed"
    assert shell("journalctl -u ssh.service -o cat | grep -cx 'Received SIGHUP; restarting.'") == str(int(before) + 1)
    assert harden().changed == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "allow users": ({"AllowUsers": ["nobody"]}, "AllowUsers nobody does not let ops in"),
    "allow groups": ({"AllowGroups": ["wheel"]}, "AllowGroups wheel holds none of ops's groups"),
    "no keys": ({"PubkeyAuthentication": False}, "leaves ops without its key"),
    "other keys": ({"AuthorizedKeysFile": "/etc/none"}, "holds a key of ops"),
    "algorithm": ({"KexAlgorithms": ["rot13"]}, "sshd does not accept the new configuration"),
    "keyword": ({"PermitRotLogin": "no"}, "sshd does not accept the new configuration"),
    "port": ({"Port": 2222}, "first listen on the old and the new port"),
    "match": ({"Match": "User ops"}, "Match blocks are not settings"),
}


@pytest.mark.parametrize("mode", ["--diff", "--check"])
def test_sshd_changes_that_would_lock_out_are_refused(tmp_path: Path, mode: str) -> None:
    before = drop_in()
    tasks = [sshd_task(settings, name) for name, (settings, _cause) in REFUSED.items()]
    outcome = play(playbook_of(tmp_path, tasks), mode)
    for name, (_settings, cause) in REFUSED.items():
        result = outcome.result(name)
        assert result["failed"] is True, name
        assert cause in result["msg"], name
    assert drop_in() == before
    assert leftovers() == ""
    assert fresh_login() == ""


def test_sshd_change_that_only_the_live_proof_finds_is_undone_at_once(tmp_path: Path) -> None:
    """sshd takes the setting, but has no host key for it: no client can connect any more."""
    before = drop_in()
    started = time.monotonic()
    failed, result = change_sshd(tmp_path, {"HostKeyAlgorithms": ["ecdsa-sha2-nistp256"]})
    assert failed
    assert "no new connection was possible" in result["msg"]
    assert "It was undone and sshd reloaded" in result["msg"]
    assert result["changed"] is False
    assert time.monotonic() - started < 55, "undone by the timer instead of the controller"
    assert fresh_login() == ""
    assert drop_in() == before
    assert leftovers() == ""


def test_second_port_beside_the_first_is_proven_and_kept(tmp_path: Path) -> None:
    both = {"Port": [22, 2222], "PermitRootLogin": False}
    _failed, result = change_sshd(tmp_path, both)
    assert result["proof"] == "a new connection ran a command", result
    listening = fresh_login("ss -Hltn 'sport = :22 or sport = :2222' | awk '{print $4}' | sort -u")
    assert {entry.rsplit(":", 1)[1] for entry in listening.split()} == {"22", "2222"}
    assert change_sshd(tmp_path, both)[1]["changed"] is False
    assert harden().code == 0
    assert ":2222" not in fresh_login("ss -Hltn")


def family(pid: int) -> list[int]:
    """`pid` and all its descendants: Ansible's workers have sessions of their own and outlive their parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def armed_and_controller_killed(tmp_path: Path, revert_after: int) -> None:
    """Start a change whose proof hangs, and kill the controller with SIGKILL while it waits for it."""
    shut = (
        "nft add table inet trial && nft 'add chain inet trial input { type filter hook input priority filter; }' && "
        "nft add rule inet trial input tcp dport 22 tcp flags syn / syn,ack drop"
    )
    watch = f"for i in $(seq 1200); do test -e {PENDING} && systemctl -q is-active censuschat-sshd-revert.timer && "
    watch += "sshd -T | grep -qx 'logingracetime 33' && exit 0; sleep 0.05; done; exit 1"
    # Ansible's own connection stands before the door is shut: only new ones are kept out.
    assert play(playbook_of(tmp_path, [{"name": "Ping", "ansible.builtin.ping": {}}])).code == 0
    shell(shut)
    with subprocess.Popen(
        command(playbook_of(tmp_path, [sshd_task({"LoginGraceTime": 33}, revert_after=revert_after)])),
        cwd=REPO,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as controller:
        try:
            shell(watch)
            time.sleep(0.5)
            assert controller.poll() is None, "the controller ended before it could be killed"
        finally:
            for pid in family(controller.pid):
                os.kill(pid, signal.SIGKILL)
            shell("nft delete table inet trial")


def test_dead_controller_leaves_the_timer_to_undo_the_change(tmp_path: Path) -> None:
    before = drop_in()
    armed_and_controller_killed(tmp_path, revert_after=25)
    assert "LoginGraceTime 33" in shell(f"cat {DROP_IN}"), "the trial did not stop between reload and proof"
    failed, result = change_sshd(tmp_path, {"LoginGraceTime": 33})
    assert failed, "the unproven configuration was taken for the wanted one"
    assert "still waits for its proof" in result["msg"]
    deadline = time.monotonic() + 40
    while drop_in() != before:
        assert time.monotonic() < deadline, "the timer did not undo the change"
        time.sleep(1)
    assert "logingracetime 60" in fresh_login("sshd -T").splitlines()
    assert leftovers() == ""
    after = harden()
    assert (after.code, after.changed) == (0, 0)


def test_dead_controller_and_lost_timer_are_settled_by_the_next_run(tmp_path: Path) -> None:
    before = drop_in()
    armed_and_controller_killed(tmp_path, revert_after=300)
    shell("systemctl stop censuschat-sshd-revert.timer")
    failed, result = change_sshd(tmp_path, {"LoginGraceTime": 33}, "--check")
    assert failed
    assert "left unproven; a run without check mode undoes it first" in result["msg"]
    assert "LoginGraceTime 33" in shell(f"cat {DROP_IN}"), "check mode settled the earlier change"
    after = harden()
    assert (after.code, after.controls()["sshd_grace"]) == (0, "pass"), after.text[-3000:]
    assert drop_in() == before
    assert leftovers() == ""
    assert fresh_login() == ""


def test_dead_controller_and_restarted_node_come_back_with_the_proven_configuration(tmp_path: Path) -> None:
    before = drop_in()
    armed_and_controller_killed(tmp_path, revert_after=300)
    assert "LoginGraceTime 33" in shell(f"cat {DROP_IN}")
    subprocess.run(
        [sys.executable, "-m", "lab", "restart", NODE], cwd=REPO, check=True, capture_output=True, timeout=90
    )
    deadline = time.monotonic() + 30
    while drop_in() != before:
        assert time.monotonic() < deadline, "the boot did not undo the change"
        time.sleep(1)
    assert leftovers() == ""
    assert "logingracetime 60" in fresh_login("sshd -T").splitlines()


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"hardening_exclude": {"sshd_baner": "a typing error"}}, "did you mean sshd_banner?"),
        ({"hardening_exclude": {"sshd_banner": ""}}, "sshd_banner needs its reason in words"),
        ({"hardening_overrides": {"sshd_banner": {"sshdd": {}}}}, "not sshdd"),
        ({"hardening_include": ["nothing_like_it"]}, "control 'nothing_like_it' is not in the catalogue"),
        ({"hardening_profile": "paranoid"}, "paranoid"),
    ],
)
def test_choice_that_cannot_be_stops_before_the_node_is_touched(choices: dict[str, Any], sentence: str) -> None:
    outcome = harden("-e", json.dumps(choices))
    assert outcome.code == 2
    assert sentence in outcome.text
    assert outcome.data["stats"][NODE]["changed"] == 0


def test_exclusion_and_override_are_reported_and_held() -> None:
    choices = {
        "hardening_exclude": {"sshd_banner": "programs here read ssh's standard error"},
        "hardening_overrides": {"sshd_grace": {"sshd": {"LoginGraceTime": 30}}},
    }
    applied = harden("-e", json.dumps(choices))
    assert applied.code == 0, applied.text[-3000:]
    report = applied.result("Hold the node to its hardening profile")
    excluded = [c for c in report["controls"] if c["result"] == "excluded"]
    assert [(c["id"], c["detail"]) for c in excluded] == [("sshd_banner", "programs here read ssh's standard error")]
    effective = fresh_login("sshd -T").splitlines()
    assert "banner none" in effective
    assert "logingracetime 30" in effective
    assert harden("-e", json.dumps(choices)).changed == 0
    assert harden().code == 0
