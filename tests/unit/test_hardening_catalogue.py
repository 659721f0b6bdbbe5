"""The shipped control catalogue: what every control has to say, what it may not do to a node, and what scanners find of it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node.controls import PROFILES, Control, catalogue, select

ROLE = Path(__file__).resolve().parents[2] / "collections/ansible_collections/censuschat/infra/roles/hardening"
FILES = sorted((ROLE / "files/catalogue").glob("*.yml"))
# What the issue of the catalogue asks for at least; SUID programs, core dumps and so on each have a file of their own.
DOMAINS = {
    "accounts",
    "apparmor",
    "audit",
    "banners",
    "core_dumps",
    "cron",
    "firewall",
    "kernel_modules",
    "kubernetes",
    "logging",
    "mounts",
    "packages",
    "pam",
    "passwords",
    "permissions",
    "services",
    "sshd",
    "sudo",
    "suid",
    "sysctl",
    "time",
    "updates",
}
REFERENCE = re.compile(
    r"CIS (Debian 12 v1\.1\.0|Kubernetes v[0-9.]+) [0-9.]+|ANSSI BP-028 R[0-9]+|ANSSI OpenSSH guide R[0-9]+"
    r"|DISA SRG-OS-[0-9]+-GPOS-[0-9]+|Lynis [A-Z]+-[0-9]+|etcd documentation, [a-z ]+"
)


def controls() -> dict[str, Control]:
    return catalogue((path.name, yaml.safe_load(path.read_text())) for path in FILES)


CONTROLS = controls()


def of(profile: str) -> dict[str, Control]:
    return {control.id: control for control in select(CONTROLS, profile).controls}


def node_of(control: Control, key: str) -> list[Any]:
    return (control.state.get("node") or {}).get(key) or []


def test_each_domain_has_its_file() -> None:
    for path in FILES:
        assert {control["domain"] for control in yaml.safe_load(path.read_text())} == {path.stem}
    assert {path.stem for path in FILES} == DOMAINS


@pytest.mark.parametrize("control", CONTROLS.values(), ids=lambda c: c.id)
def test_a_control_says_where_it_comes_from_and_why(control: Control) -> None:
    assert control.references
    assert [r for r in control.references if not REFERENCE.fullmatch(r)] == []
    assert len(control.rationale) > 30
    assert control.rationale.endswith((".", "?"))
    assert not control.title.endswith(".")
    assert len(set(control.references)) == len(control.references)


def test_profiles_grow_from_level_1_to_level_2() -> None:
    assert set(of("cis_level1")) < set(of("cis_level2"))
    only_baseline = set(of("baseline")) - set(of("cis_level1"))
    assert only_baseline == set()


@pytest.mark.parametrize("profile", PROFILES)
def test_no_two_controls_of_a_profile_contradict_each_other(profile: str) -> None:
    assert len(of(profile)) > 50


def test_a_path_is_written_by_one_control() -> None:
    written = Counter(file["path"] for control in CONTROLS.values() for file in node_of(control, "files"))
    assert [path for path, times in written.items() if times > 1] == []


def test_nothing_of_ours_locks_the_operators_out() -> None:
    for control in CONTROLS.values():
        sshd = control.state.get("sshd") or {}
        assert "AllowUsers" not in sshd
        assert "AllowGroups" not in sshd
        assert not {"ops", "ubuntu", "admin", "debian"} & set(sshd.get("DenyUsers", []))
        assert sshd.get("PubkeyAuthentication", "yes") == "yes"
        for file in node_of(control, "files"):
            if file["path"].startswith("/etc/sudoers.d/"):
                # Ansible becomes root without a terminal and without a password.
                assert file["validate"] == "/usr/sbin/visudo -cf %s"
                assert "requiretty" not in file["content"]
                assert "noexec" not in file["content"]
                assert "authenticate" not in file["content"]
                assert file["mode"] == "0440"


def test_what_the_nodes_run_on_stays() -> None:
    needed = {"python3", "openssh-server", "sudo", "postgresql", "patroni", "etcd-server", "redis-server", "haproxy"}
    needed |= {"keepalived", "containerd", "nginx", "prometheus-node-exporter", "systemd-timesyncd", "ca-certificates"}
    modules = {"overlay", "br_netfilter", "nf_conntrack", "ip_tables", "nf_tables", "vxlan", "ext4", "xfs", "vfat", "tun"}
    for control in CONTROLS.values():
        packages = (control.state.get("node") or {}).get("packages") or {}
        assert not needed & set(packages.get("absent", [])), control.id
        assert not modules & set(control.state.get("blocked_modules", [])), control.id
        if "net.ipv4.ip_forward" in control.state.get("sysctl", {}):
            assert control.unless_path == "/etc/kubernetes"
        assert control.state.get("sysctl", {}).get("user.max_user_namespaces", 1) != 0
        for mount in control.state.get("mounts", []):
            assert not mount["path"].startswith(("/var/lib", "/run", "/proc", "/sys"))


def test_the_firewall_leaves_the_login_and_the_services_open() -> None:
    open_ports = {22, 80, 443, 2379, 2380, 5432, 6379, 6380, 6432, 6443, 8008, 8443, 9100, 10250}
    denying = [c for c in CONTROLS.values() if "policy drop" in c.state.get("firewall", {}).get("ruleset", "")]
    assert [c.id for c in denying] == ["firewall_default_deny"]
    for control in denying:
        assert open_ports <= set(control.state["firewall"]["tcp_ports"])
        assert "hook forward" not in control.state["firewall"]["ruleset"]
        assert "cis_level1" not in control.profiles


def test_audit_rules_are_in_the_order_that_the_kernel_wants() -> None:
    rules = [rule for c in CONTROLS.values() for rule in c.state.get("audit", {}).get("rules", [])]
    assert len(rules) > 60
    assert len(set(rules)) == len(rules)
    assert rules.count("-e 2") == 1
    for rule in rules:
        if "-S " in rule:
            assert " -F arch=b32 " in rule or " -F arch=b64 " in rule
        if rule.startswith("-a"):
            assert re.search(r"-F key=[\w-]+$", rule), rule


def test_a_reason_stands_where_a_container_cannot_hold_a_control() -> None:
    for control in CONTROLS.values():
        if "container" not in control.applies_to:
            assert control.holds.get("container") or control.domain == "kubernetes", control.id
