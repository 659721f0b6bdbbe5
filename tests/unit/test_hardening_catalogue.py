"""The shipped control catalogue: what controls have to say, may not do to a node, and what scanners find of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node.controls import PROFILES, Control, catalogue, select
from ansible_collections.censuschat.infra.plugins.module_utils.node.held import Held

from tools import controls_page

ROLE = Path(__file__).resolve().parents[2] / "collections/ansible_collections/censuschat/infra/roles/hardening"
FILES = sorted((ROLE / "files/catalogue").glob("*.yml"))
SCANNERS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROLE / "files/scanners").glob("*.yml"))}
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


DOCUMENTS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
CONTROLS = catalogue(DOCUMENTS.items())


def of(profile: str) -> dict[str, Control]:
    return {control.id: control for control in select(CONTROLS, profile).controls}


def node_of(control: Control, key: str) -> list[Any]:
    return (control.state.get("node") or {}).get(key) or []


def test_each_domain_has_its_file() -> None:
    for name, document in DOCUMENTS.items():
        assert {control["domain"] for control in document} == {name}
    assert set(DOCUMENTS) == DOMAINS


@pytest.mark.parametrize("control", CONTROLS.values(), ids=lambda c: c.id)
def test_a_control_says_where_it_comes_from_and_why(control: Control) -> None:
    assert control.references
    assert [r for r in control.references if not REFERENCE.fullmatch(r)] == []
    assert len(control.rationale) > 30
    assert control.rationale.endswith((".", "?"))
    assert not control.title.endswith(".")
    assert len(set(control.references)) == len(control.references)


@pytest.mark.parametrize("control", CONTROLS.values(), ids=lambda c: c.id)
def test_a_node_reads_what_the_controller_sends_of_a_control(control: Control) -> None:
    assert Held.of(control.wire()).id == control.id


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


def test_controls_of_one_mount_agree_on_its_options() -> None:
    options: dict[str, list[str]] = {}
    for control in CONTROLS.values():
        for mount in control.state.get("mounts", []):
            assert options.setdefault(mount["path"], mount["options"]) == mount["options"], control.id


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
    modules = {"overlay", "br_netfilter", "nf_conntrack", "ip_tables", "nf_tables", "vxlan", "ext4", "xfs", "tun"}
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


def test_the_dictionary_check_of_passwords_brings_its_dictionary() -> None:
    # libpam-pwquality only recommends it, and without it every new password is refused, root's tries too.
    control = CONTROLS["passwords_quality"]
    assert any("dictcheck = 1" in file["content"] for file in node_of(control, "files"))
    assert "cracklib-runtime" in control.state["node"]["packages"]["present"]


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


@pytest.mark.parametrize("name", SCANNERS)
def test_what_a_scanner_looks_for_is_held_by_a_control_or_has_its_reason(name: str) -> None:
    data = SCANNERS[name]
    reasons = [rule for entry in data["without_control"] for rule in entry["rules"]]
    assert [r for r in reasons if reasons.count(r) > 1] == []
    assert set(reasons) & set(data["rules"]) == set()
    assert {control for ids in data["rules"].values() for control in ids} - set(CONTROLS) == set()
    for rules in data.get("profiles", {}).values():
        assert [rule for rule in rules if rule not in data["rules"] and rule not in reasons] == []
    for entry in data["without_control"]:
        assert len(entry["reason"]) > 30
        assert not entry["reason"].endswith(".")


def test_the_profiles_that_are_measured_are_mapped() -> None:
    profiles = SCANNERS["openscap_debian12"]["profiles"]
    asked = {"standard", "cis_level1_server", "cis_level2_server"}
    asked |= {f"anssi_bp28_{level}" for level in ("minimal", "intermediary", "enhanced", "high")}
    assert set(profiles) == asked
    assert len(profiles["cis_level1_server"]) > 400


def test_a_rule_of_level_1_is_held_from_level_1_on() -> None:
    data, level_1 = SCANNERS["openscap_debian12"], of("cis_level1")
    late = {}
    for rule in data["profiles"]["cis_level1_server"]:
        holders = data["rules"].get(rule)
        if holders and not any(control in level_1 for control in holders):
            late[rule] = holders
    # These wait for level 2, since they can stop what a node is there for: profiles that are enforced, ports that
    # were not declared, copies by rsync. A node as Debian makes it passes the last without a control.
    assert set(late) == {
        "all_apparmor_profiles_in_enforce_complain_mode",
        "grub2_enable_apparmor",
        "nftables_ensure_default_deny_policy",
        "package_rsync_removed",
    }


def test_the_page_of_controls_is_up_to_date() -> None:
    assert controls_page.PAGE.read_text() == controls_page.page(DOCUMENTS, SCANNERS), f"run {controls_page.COMMAND}"


def test_the_page_says_what_it_has_to_say_of_a_control() -> None:
    control = {
        "id": "example",
        "title": "An example",
        "rationale": "It shows the form.",
        "references": ["ANSSI BP-028 R1"],
        "severity": "low",
        "profiles": ["baseline"],
        "holds": {"container": "the kernel is the machine's"},
        "state": {"node": {"packages": {"absent": ["telnet"]}}, "audit": {"rules": ["-e 2"]}},
    }
    scanner = {
        "content": "a scanner 1.0",
        "rules": {"one": ["example"]},
        "without_control": [{"reason": "nobody needs it", "rules": ["two"]}],
        "profiles": {"all": ["one", "two"]},
    }
    page = controls_page.page({"packages": [control]}, {"scanner": scanner})
    assert "| [Packages](#packages) | 1 | 1 | 0 | 0 | 1 |" in page
    assert "- Not in a container: the kernel is the machine's." in page
    assert "- Holds: packages `absent telnet`, audit: 1 rules" in page
    assert "| all | 2 | 1 | 1 |" in page
    assert "- nobody needs it: `two`" in page
