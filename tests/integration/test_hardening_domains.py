"""Hardening on the running lab beyond the first domains: live drift, the way back, sabotage, nodes that cannot.

The trials change the witness, which no other test cuts off, and leave it hardened; every test ends with a node that
a new ssh connection reaches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.paths import REPO
from lab.topology import Topology
from tests.integration.test_hardening import DRIFT, harden, kept_hardened, sshd_task
from tests.integration.trial import (
    NODE,
    Play,
    fresh_login,
    node_address,
    play,
    playbook_of,
    shell,
)

CATALOGUE = REPO / "collections/ansible_collections/censuschat/infra/roles/hardening/files/catalogue"
CONTROLS = {c["id"]: c for path in sorted(CATALOGUE.glob("*.yml")) for c in yaml.safe_load(path.read_text())}
GUARD = "/var/lib/censuschat-hardening/guard/pending"
# What a rollback has to bring back: bytes, owners and modes, kernel values, how units are installed.
STANDS = """
find /etc -xdev -type f -printf '%p %u %g %m ' -exec sha256sum {} ';' | sort
find /etc -xdev '(' -type d -o -type l ')' -printf '%p %y %u %g %m %l\\n' | sort
sysctl -a --pattern '^net\\.(ipv4|ipv6)\\.(conf|icmp|tcp)' 2>/dev/null | sort
systemctl list-unit-files --no-pager
nft list tables
"""


@pytest.fixture(scope="module", autouse=True)
def hardened(running_lab: Topology) -> Iterator[None]:
    with kept_hardened():
        yield


def own(identifier: str, domain: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A control of one's own, in every profile."""
    return {
        "id": identifier,
        "title": "A trial",
        "rationale": "It shows what the engine does.",
        "references": ["none"],
        "domain": domain,
        "severity": "low",
        "profiles": ["baseline", "cis_level1", "cis_level2"],
        "state": state,
        **more,
    }


def harden_with(control: dict[str, Any], *options: str) -> Play:
    return harden("-e", json.dumps({"hardening_controls": [control]}), *options)


def entry(outcome: Play, identifier: str) -> dict[str, Any]:
    report = outcome.result("Hold the node to its hardening profile")
    return next(dict(control) for control in report["controls"] if control["id"] == identifier)


def holding(kind: str) -> list[dict[str, Any]]:
    """The controls of cis_level1 that have this kind of state."""
    return [c for c in CONTROLS.values() if kind in c["state"] and "cis_level1" in c["profiles"]]


def test_live_mount_that_differs_from_fstab_is_remounted() -> None:
    if not any(m["path"] == "/dev/shm" for c in holding("mounts") for m in c["state"]["mounts"]):
        pytest.fail("no control speaks of /dev/shm any more: choose another mount for this test")
    shell("mount -o remount,exec /dev/shm")
    before = shell("grep /dev/shm /etc/fstab")
    applied = harden()
    assert applied.code == 0, applied.text[-3000:]
    changed = {i for i, r in applied.controls().items() if r == "changed"}
    assert changed and changed <= {c["id"] for c in holding("mounts")}
    assert "noexec" in shell("findmnt -no OPTIONS /dev/shm")
    assert shell("grep /dev/shm /etc/fstab") == before
    assert harden().changed == 0


def test_profile_that_was_taken_out_of_pam_comes_back() -> None:
    profile = next(p["profile"] for c in holding("pam") for p in c["state"]["pam"] if p.get("content"))
    stacks = shell("cat /etc/pam.d/common-*")
    shell(f"DEBIAN_FRONTEND=noninteractive pam-auth-update --package --disable {profile}")
    assert shell("cat /etc/pam.d/common-*") != stacks
    applied = harden()
    assert applied.code == 0, applied.text[-3000:]
    assert shell("cat /etc/pam.d/common-*") == stacks
    assert shell(f"ls {GUARD} 2>/dev/null; true") == ""
    assert fresh_login("id -un") == "root"
    assert harden().changed == 0


def test_unknown_suid_and_world_writable_files_are_told() -> None:
    shell("cp /bin/true /usr/local/bin/trial-suid && chmod 4755 /usr/local/bin/trial-suid")
    try:
        audit = harden("-e", "hardening_audit_only=true")
        judged = [c["id"] for c in holding("suid") if c["state"]["suid"].get("allowed")]
        assert judged
        for identifier in judged:
            assert entry(audit, identifier)["result"] == "failed"
            assert "/usr/local/bin/trial-suid" in entry(audit, identifier)["detail"]
        assert shell("stat -c %a /usr/local/bin/trial-suid") == "4755"
    finally:
        shell("rm -f /usr/local/bin/trial-suid")


RULES = """chain input {
  type filter hook input priority filter; policy accept;
  tcp dport @TCP_PORTS@ accept
  tcp dport 4444 drop
}
"""


def wall(ruleset: str = RULES, ports: tuple[int, ...] = (22,)) -> dict[str, Any]:
    text = ruleset.replace("@TCP_PORTS@", "{ @TCP_PORTS@ }")
    return own("trial_wall", "firewall", {"firewall": {"table": "trial", "ruleset": text, "tcp_ports": list(ports)}})


@pytest.fixture(name="clean_wall")
def no_wall_of_ours() -> Iterator[None]:
    yield
    shell(
        "nft delete table inet trial 2>/dev/null; rm -f /etc/nftables.conf.d/trial.nft "
        "/var/lib/censuschat-hardening/firewall/trial.json; "
        "rm -rf /etc/systemd/system/nftables.service.d/censuschat.conf; systemctl daemon-reload"
    )


@pytest.mark.usefixtures("clean_wall")
def test_firewall_is_loaded_proven_and_compared_with_what_is_loaded() -> None:
    others = shell("nft list tables")
    planned = harden_with(wall(), "--check", "--diff")
    assert entry(planned, "trial_wall")["result"] == "changed"
    assert shell("nft list tables") == others, "check mode loaded a table"
    applied = harden_with(wall())
    assert applied.code == 0, applied.text[-3000:]
    assert "tcp dport 4444 drop" in shell("nft list table inet trial")
    assert "tcp dport 4444 drop" in shell("cat /etc/nftables.conf.d/trial.nft")
    assert set(others.splitlines()) <= set(shell("nft list tables").splitlines()), "tables of others are gone"
    assert shell(f"ls {GUARD} 2>/dev/null; true") == ""
    assert harden_with(wall()).changed == 0
    shell("nft add rule inet trial input tcp dport 4445 drop")
    assert "is loaded with other rules" in entry(harden_with(wall(), "--check"), "trial_wall")["detail"]
    assert harden_with(wall()).code == 0
    assert "4445" not in shell("nft list table inet trial")
    # Its service can be stopped and started without a word about tables of others.
    shell("systemctl restart nftables.service")
    assert set(others.splitlines()) <= set(shell("nft list tables").splitlines())
    assert harden_with(wall()).changed == 0


def test_firewall_that_would_cut_us_off_is_refused_before_anything_is_changed() -> None:
    closed = RULES.replace("policy accept", "policy drop")
    before = shell("nft list ruleset; ls /etc/nftables.conf.d 2>/dev/null; true")
    for mode in ("--check", "--diff"):
        outcome = harden_with(wall(closed, (443,)), mode)
        assert outcome.code == 2
        assert "does not accept new connections to TCP port 22" in entry(outcome, "trial_wall")["detail"]
    assert shell("nft list ruleset; ls /etc/nftables.conf.d 2>/dev/null; true") == before


def test_ruleset_that_nft_does_not_take_is_told_in_check_mode() -> None:
    before = shell("nft list tables")
    outcome = harden_with(wall(RULES.replace("drop", "dropp")), "--check")
    assert outcome.code == 2
    assert "nft does not take the ruleset of table trial" in entry(outcome, "trial_wall")["detail"]
    assert shell("nft list tables") == before


#: It reads as if it let ssh in, and an earlier rule drops it.
SABOTAGE = RULES.replace("  tcp dport @", "  tcp dport 22 ct state new drop\n  tcp dport @")


@pytest.mark.usefixtures("clean_wall")
def test_firewall_that_only_the_live_proof_finds_is_undone_at_once() -> None:
    before = shell("nft list tables")
    started = time.monotonic()
    outcome = harden_with(wall(SABOTAGE))
    assert outcome.code == 2
    found = entry(outcome, "trial_wall")
    assert found["result"] == "failed"
    assert "no new connection was possible" in found["detail"] and "It was undone" in found["detail"]
    assert time.monotonic() - started < 80, "undone by the timer instead of the controller"
    assert shell("nft list tables") == before
    assert shell("ls /etc/nftables.conf.d/trial.nft 2>/dev/null; true") == ""
    assert fresh_login() == ""


def roll_back(to: str, *options: str, force: bool = False) -> Play:
    variables = {"hardening_rollback_to": to, "hardening_rollback_force": force}
    return play(REPO / "playbooks/harden-rollback.yml", "-e", json.dumps(variables), *options)


ROLLBACK = "Bring the node back to before a hardening run"


def test_rollback_restores_bytes_modes_kernel_values_and_services() -> None:
    shell(DRIFT)
    before = shell(STANDS)
    applied = harden()
    assert applied.code == 0, applied.text[-3000:]
    after = shell(STANDS)
    run = applied.result("Hold the node to its hardening profile")["run"]
    assert run and after != before
    kept = f"/var/lib/censuschat-hardening/runs/{run}"
    assert shell(f"stat -c '%U %a' {kept} {kept}/manifest.jsonl") == "root 700\nroot 600"

    planned = roll_back(run, "--check", "--diff")
    assert planned.code == 0, planned.text[-3000:]
    assert shell(STANDS) == after, "check mode rolled back"
    back = roll_back(run)
    assert back.code == 0, back.text[-3000:]
    assert back.result(ROLLBACK)["actions"] == planned.result(ROLLBACK)["actions"]
    assert shell(STANDS) == before
    assert "permitrootlogin no" not in fresh_login("sshd -T").splitlines(), "sshd still runs the rolled back settings"
    assert roll_back(run).changed == 0
    # The rollback is a run itself.
    assert roll_back(str(back.result(ROLLBACK)["run"])).code == 0
    assert harden().changed == 0


def test_rollback_refuses_what_something_else_has_changed_since() -> None:
    shell("echo changed > /etc/issue")
    run = harden().result("Hold the node to its hardening profile")["run"]
    shell("echo somebody elses > /etc/issue")
    refused = roll_back(run)
    assert refused.code == 2
    assert "/etc/issue was changed by something else since" in refused.result(ROLLBACK)["msg"]
    assert shell("cat /etc/issue") == "somebody elses"
    assert roll_back(run, force=True).code == 0
    assert shell("cat /etc/issue") == "changed"
    unknown = roll_back("20260101T000000.000000Z-0000")
    assert "is not kept on this node; the last ones are:" in unknown.result(ROLLBACK)["msg"]
    assert harden().code == 0


def test_allow_users_that_exclude_us_are_refused_by_the_control_and_the_rest_is_held() -> None:
    shell("echo changed > /etc/issue")
    before = shell("sshd -T | sort")
    outcome = harden_with(own("trial_who", "sshd", {"sshd": {"AllowUsers": ["nobody"]}}))
    assert outcome.code == 2
    assert "AllowUsers nobody does not let ops in" in entry(outcome, "trial_who")["detail"]
    assert outcome.controls()["banners_login"] == "changed", "one control kept the others from being held"
    assert shell("sshd -T | sort") == before
    assert fresh_login() == ""


@contextmanager
def started_by_socket() -> Iterator[None]:
    shell("systemctl disable --now ssh.service; systemctl enable --now ssh.socket")
    try:
        yield
    finally:
        shell(
            "rm -rf /etc/systemd/system/ssh.socket.d; systemctl daemon-reload; "
            "systemctl disable --now ssh.socket; systemctl enable --now ssh.service"
        )


def test_ports_of_a_socket_activated_sshd_change_with_proof(tmp_path: Path) -> None:
    with started_by_socket():
        assert harden().code == 0
        assert fresh_login() == ""
        moved = play(playbook_of(tmp_path, [sshd_task({"Port": 2222})])).result("Change sshd")
        assert moved["failed"] and "first listen on the old and the new port" in moved["msg"]
        both = {"Port": [22, 2222], "PermitRootLogin": False}
        changed = play(playbook_of(tmp_path, [sshd_task(both)])).result("Change sshd")
        assert changed["proof"] == "a new connection ran a command", changed
        listening = fresh_login("ss -Hltn 'sport = :22 or sport = :2222' | awk '{print $4}' | sort -u")
        assert {line.rsplit(":", 1)[1] for line in listening.split()} == {"22", "2222"}
        assert play(playbook_of(tmp_path, [sshd_task(both)])).changed == 0
        broken = play(playbook_of(tmp_path, [sshd_task({**both, "HostKeyAlgorithms": ["ecdsa-sha2-nistp256"]})]))
        assert "It was undone" in broken.result("Change sshd")["msg"]
        assert fresh_login() == ""
    assert harden().code == 0


def test_control_that_a_container_cannot_hold_is_named_where_it_was_asked_for() -> None:
    impossible = own(
        "trial_machine",
        "audit",
        {"audit": {"rules": ["-w /etc/passwd -p wa -k trial"]}},
        holds={"container": "the audit system is the machine's"},
    )
    assert entry(harden_with(impossible), "trial_machine")["result"] == "not_applicable"
    choices = {"hardening_controls": [impossible], "hardening_include": ["trial_machine"]}
    asked = harden("-e", json.dumps(choices))
    assert asked.code == 2
    assert NODE in asked.text
    detail = entry(asked, "trial_machine")["detail"]
    assert detail.startswith("this node cannot hold it: the audit system is the machine's; do not include it")


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (
            {
                "hardening_controls": [
                    own(
                        "trial_range",
                        "sysctl",
                        {"sysctl": {"net.ipv4.tcp_syncookies": 1}},
                        ranges={"net.ipv4.tcp_syncookies": {"one_of": [1, 2]}},
                    )
                ],
                "hardening_overrides": {"trial_range": {"sysctl": {"net.ipv4.tcp_syncookies": 7}}},
            },
            "control trial_range: net.ipv4.tcp_syncookies = 7 is out of range: choose 1, 2",
        ),
        (
            {"hardening_controls": [own("trial_other", "sshd", {"sshd": {"PermitRootLogin": "yes"}})]},
            "want different things of sshd permitrootlogin: exclude one",
        ),
        (
            {
                "hardening_controls": [
                    own(
                        "trial_wall",
                        "firewall",
                        {
                            "firewall": {
                                "table": "t",
                                "ruleset": "chain x { tcp dport { @TCP_PORTS@ } accept }",
                                "tcp_ports": [70000],
                            }
                        },
                    )
                ]
            },
            "70000 is not a port from 1 to 65535",
        ),
        (
            {"hardening_controls": [own("trial_key", "mounts", {"mounts": [{"path": "/tmp", "option": ["noexec"]}]})]},
            "not option",
        ),
    ],
)
def test_choice_that_cannot_be_stops_before_the_node_is_touched(choices: dict[str, Any], sentence: str) -> None:
    outcome = harden("-e", json.dumps(choices))
    assert outcome.code == 2
    assert sentence in outcome.text
    assert outcome.data["stats"][NODE]["changed"] == 0


def test_read_only_directory_fails_its_controls_by_name_and_the_others_are_held() -> None:
    shell("rm -f /etc/sysctl.d/99-zz-censuschat.conf; echo changed > /etc/issue")
    shell("mount --bind /etc/sysctl.d /etc/sysctl.d && mount -o remount,ro,bind /etc/sysctl.d")
    try:
        outcome = harden()
        assert outcome.code == 2
        results = outcome.controls()
        assert results["banners_login"] == "changed"
        assert results["sysctl_rp_filter"] == "failed"
        detail = entry(outcome, "sysctl_rp_filter")["detail"]
        assert (
            "99-zz-censuschat.conf cannot be written: Read-only file system in /etc/sysctl.d: mount it writable"
            in detail
        )
        assert shell("ls -A /etc/sysctl.d | grep '[.]new$'; true") == "", "a half-written file stayed"
    finally:
        shell("umount /etc/sysctl.d")
    assert harden().code == 0


def test_full_disk_stops_the_run_before_anything_is_changed() -> None:
    shell("echo changed > /etc/issue")
    shell(
        "mkdir -p /var/lib/censuschat-hardening && mount -t tmpfs -o size=64k tmpfs /var/lib/censuschat-hardening && "
        "dd if=/dev/zero of=/var/lib/censuschat-hardening/full bs=4k 2>/dev/null; true"
    )
    try:
        outcome = harden()
        assert outcome.code == 2
        assert "cannot be kept in /var/lib/censuschat-hardening/runs, so nothing was changed" in outcome.text
        assert "No space left on device" in outcome.text
        assert NODE in outcome.text
        assert shell("cat /etc/issue") == "changed"
    finally:
        shell("umount /var/lib/censuschat-hardening")
    assert harden().code == 0


def both_nodes(tmp_path: Path, **broken: str) -> dict[str, Any]:
    """Harden the node under its own name and as `broken`, a second name of it; each one's result."""
    inventory = tmp_path / "broken.yml"
    about = {"ansible_host": node_address(), **broken}
    inventory.write_text(yaml.safe_dump({"nodes": {"hosts": {"broken": about}}}))
    task = {"name": "Harden", "censuschat.infra.node_harden": {"catalogue": str(CATALOGUE), "profile": "baseline"}}
    book = tmp_path / "both.yml"
    book.write_text(
        yaml.safe_dump([{"hosts": f"{NODE}:broken", "gather_facts": False, "become": True, "tasks": [task]}])
    )
    done = play(book, "-i", str(inventory), "-l", f"{NODE}:broken")
    found: dict[str, Any] = {}
    for task_data in done.data["plays"][0]["tasks"]:
        found.update(task_data["hosts"])
    return found


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"ansible_become_exe": "/usr/bin/no-such-sudo"}, "broken has no sudo: install it"),
        ({"ansible_python_interpreter": "/usr/bin/no-such-python3"}, "broken has no python3: install it first"),
    ],
)
def test_node_without_sudo_or_python_is_told_and_the_other_goes_on(
    tmp_path: Path, broken: dict[str, str], sentence: str
) -> None:
    found = both_nodes(tmp_path, **broken)
    assert found["broken"].get("failed") and found["broken"]["msg"].startswith(sentence), found["broken"]
    assert not found[NODE].get("failed"), found[NODE]


def test_second_run_asks_little_of_the_node(tmp_path: Path) -> None:
    """What a converged run starts on the node, by the numbers that its kernel gives processes one by one."""
    left_out = {"packages_aide": "as in the lab's inventory"}
    arguments = {"catalogue": str(CATALOGUE), "exclude": left_out}
    book = playbook_of(tmp_path, [{"name": "Harden", "censuschat.infra.node_harden": arguments}])
    assert play(book).code == 0
    before = int(shell("echo $$"))
    assert play(book).changed == 0
    started = int(shell("echo $$")) - before
    # The login with its shell, sudo and Python; then dpkg-query, systemctl, nft, find, two sshd -T, and threads.
    assert 0 < started < 60
