"""The planners of the hardening domains on data: what is wanted and what was observed, to steps and violations."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    guard,
    host_clock,
    plan_accounts,
    plan_apparmor,
    plan_audit,
    plan_firewall,
    plan_inventory,
    plan_mounts,
    plan_pam,
    plan_running,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_host import package_problem
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import globbed
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import PathState
from ansible_collections.censuschat.infra.plugins.plugin_utils import node_troubles

CASES = Path(__file__).parent / "cases/harden_domains"


def mounts(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    wanted = [plan_mounts.Mount.of(m) for m in case["wanted"]]
    live = plan_mounts.parse_mountinfo(case.get("mountinfo", ""))
    seen = plan_mounts.MountsSeen(live, case.get("fstab", ""), case.get("container", False))
    actions = plan_mounts.plan(wanted, seen)
    text = seen.fstab
    for action in actions:
        text = plan_mounts.with_line(text, *action.payload) if action.kind == "fstab" else text
    if "text" in case:
        assert text == case["text"]
    after = plan_mounts.plan(wanted, plan_mounts.MountsSeen(live, text, seen.container))
    assert not [a for a in after if a.kind == "fstab"], "not stable"
    return actions, [v for w in wanted for v in plan_mounts.problem(w, seen) if v]


def pam(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    profiles = [plan_pam.Profile.of(p) for p in case.get("profiles", [])]
    lines = [plan_pam.ServiceLine.of(p) for p in case.get("lines", [])]
    files = dict(case["files"])
    actions = [*plan_pam.plan_profiles(profiles, files), *plan_pam.plan_lines(lines, files)]
    for want in lines:
        now = files.get(want.path)
        if now is not None:
            files[want.path] = plan_pam.with_arguments(now, want) if want.module else plan_pam.with_line(now, want)
    for path, text in case.get("texts", {}).items():
        assert files[path] == text
    assert not plan_pam.plan_lines(lines, files), "not stable"
    return actions, plan_pam.missing(lines, case["files"])


def audit(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    seen = plan_audit.AuditSeen(
        case.get("file", ""),
        tuple(case["loaded"]) if "loaded" in case else None,
        "no permission",
        case.get("locked", False),
    )
    actions = plan_audit.plan(case["rules"], seen)
    possible, refused = plan_audit.split(actions, seen)
    assert possible == [a for a in actions if not refused or a.kind == "audit_file"]
    if "text" in case:
        assert plan_audit.render(case["rules"], "") == case["text"]
        written = plan_audit.AuditSeen(case["text"], tuple(case.get("loaded", ())))
        assert not [a for a in plan_audit.plan(case["rules"], written) if a.kind == "audit_file"], "not stable"
    return actions, [refused] if refused else []


def inventory(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    wanted = [plan_inventory.Inventory.of_suid(w) for w in case.get("suid", [])]
    wanted += [plan_inventory.Inventory.of_scan(w) for w in case.get("scans", [])]
    text = "".join(f"{scan} {path}\0" for scan, paths in case["found"].items() for path in paths)
    found = plan_inventory.parse_found(text)
    states = {
        path: PathState(path, "file", "root", "root", int(mode, 8))
        for paths in case["found"].values()
        for path, mode in paths.items()
    }
    stripped = [path for w in wanted for path in w.strip]
    actions = [a for w in wanted for a in plan_inventory.plan(w, found, states)]
    return actions, [v for w in wanted for v in plan_inventory.judge(w, found, stripped)]


def apparmor(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    seen = plan_apparmor.ApparmorSeen(
        case.get("enabled", True),
        plan_apparmor.parse_profiles(case.get("profiles", "")),
        case.get("files", {}),
        case.get("command_line", ""),
    )
    for path, text in case.get("texts", {}).items():
        assert plan_apparmor.enforcing(case["files"][path]) == text
    return plan_apparmor.plan(seen), plan_apparmor.judge(seen)


def running(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    units = {n: UnitState(n, "loaded", **u) for n, u in case.get("units", {}).items()}
    paths = {p: PathState(p, "file", ctime=t) for p, t in case.get("paths", {}).items()}
    return [], [v for w in case["wanted"] for v in plan_running.judge(plan_running.Running.of(w), units, paths)]


def accounts(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    seen = plan_accounts.AccountsSeen(
        tuple(plan_accounts.Account(**a) for a in case.get("accounts", [])),
        tuple(plan_accounts.Group(g["name"], g["gid"], tuple(g.get("members", ()))) for g in case.get("groups", [])),
        tuple(case.get("trust_files", [])),
        case.get("today", 0),
    )
    return [], plan_accounts.judge(case["rules"], seen)


def firewall(case: dict[str, Any]) -> tuple[list[Action], list[str]]:
    want = plan_firewall.Firewall.of(case["wanted"])
    text = plan_firewall.text_of(want)
    if "text" in case:
        assert text == case["text"]
    seen = case.get("seen", {})
    ours = seen.get("ours", False)
    observed = plan_firewall.FirewallSeen(
        file=text if ours else seen.get("file"),
        main=plan_firewall.main_text(None) if ours else seen.get("main"),
        loaded=seen.get("loaded", ""),
        kept=seen.get("kept", ""),
        kept_hash=plan_firewall.text_hash(text) if ours else "",
        service=UnitState(plan_firewall.SERVICE, "loaded", **seen.get("service", {})),
        drop_in=plan_firewall.service_text([want.table]) if ours else None,
    )
    problem = plan_firewall.refused(text, case.get("port", 22))
    return plan_firewall.plan(want, observed), [problem] if problem else []


KINDS = {
    "accounts": accounts,
    "apparmor": apparmor,
    "audit": audit,
    "firewall": firewall,
    "inventory": inventory,
    "mounts": mounts,
    "pam": pam,
    "running": running,
}


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda p: p.stem)
def test_plan(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    actions, said = KINDS[case["kind"]](case)
    assert [[a.kind, a.target, a.detail] for a in actions] == case.get("actions", [])
    wanted = case.get("said", [])
    assert len(said) == len(wanted), said
    assert all(found.startswith(start) for found, start in zip(said, wanted, strict=True)), said


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-w /etc/passwd -p wa -k identity", "-a always,exit -F path=/etc/passwd -F perm=wa -F key=identity"),
        ("-w /etc/sudoers.d/ -p wa -k scope", "-w /etc/sudoers.d -p wa -k scope"),
        ("-w /etc/sudoers.d/ -p wa -k scope", "-a always,exit -S all -F dir=/etc/sudoers.d -F perm=wa -F key=scope"),
        ("-w /var/log/sudo.log -p wa -k sudo", "-w /var/log/sudo.log -p aw -k sudo"),
        (
            "-a always,exit -F arch=b64 -S settimeofday -S adjtimex -k time-change",
            "-a always,exit -F arch=b64 -S adjtimex,settimeofday -F key=time-change",
        ),
        (
            "-a exit,always -F path=/usr/bin/su -F perm=x -F auid>=1000 -F auid!=unset -k privileged",
            "-a always,exit -S all -F path=/usr/bin/su -F perm=x -F auid>=1000 -F auid!=-1 -F key=privileged",
        ),
        (
            "-a always,exit -F arch=b64 -C auid!=euid -S execve -k x",
            "-a always,exit -F arch=b64 -S execve -C auid!=euid -F key=x",
        ),
        (
            "-a always,exit -F arch=b64 -S execve -C euid!=uid -F auid!=unset -F key=x",
            "-a always,exit -F arch=b64 -S execve -C uid!=euid -F auid!=-1 -F key=x",
        ),
    ],
)
def test_ways_to_write_one_audit_rule(one: str, other: str) -> None:
    assert plan_audit.normal(one) == plan_audit.normal(other)


def test_sockets_in_a_directory_that_is_to_be_mounted_over() -> None:
    lines = [
        "Num       RefCount Protocol Flags    Type St Inode Path",
        "0000000000000000: 00000002 00000000 00010000 0001 01 1001 /tmp/ssh-x/agent.7",
        "0000000000000000: 00000003 00000000 00000000 0001 03 1002 /tmp/ssh-x/agent.7",
        "0000000000000000: 00000002 00000000 00010000 0001 01 1003 /tmpfiles/other",
        "0000000000000000: 00000003 00000000 00000000 0001 03 1004",
        "0000000000000000: 00000002 00000000 00010000 0001 01 1005 @/tmp/abstract",
    ]
    assert plan_mounts.sockets_below("/tmp", "\n".join(lines)) == ["/tmp/ssh-x/agent.7"]


def test_audit_rules_that_differ_stay_apart() -> None:
    rules = [
        "-w /etc/passwd -p wa -k identity",
        "-w /etc/passwd -p w -k identity",
        "-w /etc/shadow -p wa -k identity",
        "-w /etc/passwd -p wa -k other",
        "-a always,exit -F arch=b32 -S adjtimex -k t",
        "-a always,exit -F arch=b64 -S adjtimex -k t",
        "-a never,exit -F arch=b64 -S adjtimex -k t",
    ]
    assert len({plan_audit.normal(rule) for rule in rules}) == len(rules)
    assert plan_audit.normal("-b 8192") == plan_audit.normal("-e 2") == ""


def test_a_star_does_not_reach_over_a_slash() -> None:
    assert globbed("/home/ops", "/home/*")
    assert not globbed("/home/ops/.bashrc", "/home/*")
    assert globbed("/home/ops/.bashrc", "/home/*/.[!.]*")
    assert globbed("/var/log/apt/term.log", "/var/log", below=True)
    assert not globbed("/var/logs", "/var/log", below=True)


def table(handle: int, packets: int, *, port: int = 22, learned: tuple[str, ...] = ()) -> str:
    """What `nft -j list table` says of a small table."""
    rule = {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": port}}
    items: list[dict[str, Any]] = [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "t", "handle": handle}},
        {"set": {"name": "seen", "table": "t", "handle": handle, "flags": ["dynamic"], "elem": list(learned)}},
        {"rule": {"table": "t", "handle": handle, "expr": [rule, {"counter": {"packets": packets}}, {"accept": None}]}},
    ]
    return json.dumps({"nftables": items})


def test_a_loaded_table_is_compared_by_its_rules_alone() -> None:
    first = plan_firewall.comparable(table(1, 0))
    assert first == plan_firewall.comparable(table(7, 993, learned=("192.0.2.1",)))
    assert first != plan_firewall.comparable(table(1, 0, port=23))
    assert plan_firewall.comparable("Error: No such file or directory") == ""


def test_find_walks_once_for_all_scans_and_leaves_pods_alone() -> None:
    command = plan_inventory.find_command(["/", "/boot"], ["suid", "unowned"])
    assert command[:3] == ["find", "/", "/boot"]
    assert command.count("-xdev") == 1
    assert "/var/lib/kubelet/pods" in command
    mounts = {"/": "ext4", "/proc": "proc", "/var/lib/docker/x": "overlay", "/tmp": "tmpfs", "/dev": "tmpfs"}
    assert plan_inventory.starts({**mounts, "/dev/shm": "tmpfs"}) == ["/", "/dev/shm", "/tmp"]


def test_profile_of_pam_is_known_by_its_modules_in_every_stack() -> None:
    profile = plan_pam.Profile(
        "x", "Name: x\nAuth-Type: Primary\nAuth:\n\t[success=end default=ignore]\tpam_x.so deny=3\n"
    )
    assert plan_pam.calls(profile.content, "Auth") == [("pam_x.so", ("deny=3",))]
    stack = "auth\t[success=2 default=ignore]\tpam_x.so deny=3 try_first_pass\n"
    assert plan_pam.enabled(profile, {"/etc/pam.d/common-auth": stack})
    assert not plan_pam.enabled(profile, {"/etc/pam.d/common-auth": stack.replace("deny=3", "deny=5")})
    assert not plan_pam.enabled(profile, {"/etc/pam.d/common-auth": f"# {stack}"})


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 4711 (unattended-upgr)",
            "dpkg's lock was held by process 4711 (unattended-upgr) for 120 s: wait until it has ended",
        ),
        ("E: You don't have enough free space; No space left on device", "apt has no space left"),
        ("E: dpkg was interrupted, you must manually run", "an earlier installation was interrupted: run `dpkg --conf"),
        (
            "installing aide failed: Err:1 http://x aide\n  Temporary failure resolving 'x'\nE: Unable to fetch some",
            "installing aide failed: Temporary failure resolving 'x'; E: Unable to fetch some",
        ),
    ],
)
def test_what_apt_says_becomes_a_sentence(said: str, sentence: str) -> None:
    assert package_problem(said).startswith(sentence)
    assert "\n" not in package_problem(said)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ({"msg": "MODULE FAILURE", "module_stderr": "/bin/sh: 1: sudo: not found\n"}, "web1 has no sudo: install it"),
        ({"msg": "Missing sudo password"}, "web1 asks for a sudo password: give ansible_become_password"),
        (
            {"msg": "The module interpreter '/usr/bin/python3' was not found.", "module_stdout": "python3: not found"},
            "web1 has no python3: install it first",
        ),
        (
            {"msg": "MODULE FAILURE", "module_stdout": "OSError: [Errno 28] No space left on device"},
            "web1 has a full disk, not even Ansible's own files fit",
        ),
        ({"msg": "dpkg-query cannot tell"}, "web1: dpkg-query cannot tell"),
    ],
)
def test_node_on_which_nothing_runs_is_told_with_the_remedy(result: dict[str, Any], sentence: str) -> None:
    assert node_troubles.sentence("web1", result).startswith(sentence)


def test_revert_script_puts_files_back_once(tmp_path: Path) -> None:
    state, stack = tmp_path / "state", tmp_path / "common-auth"
    (state / "pending").mkdir(parents=True)
    (state / "pending/0").write_text("auth required pam_unix.so\n")
    stack.write_text("auth required pam_deny.so\n")
    script = guard.script(str(state), [str(stack), str(tmp_path / "was-not-there")], {})
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0
    assert stack.read_text() == "auth required pam_unix.so\n"
    assert list(state.iterdir()) == []
    stack.write_text("changed since\n")
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0
    assert stack.read_text() == "changed since\n", "a revert that has nothing pending did something"


def test_revert_script_takes_tables_away_before_it_loads_them() -> None:
    lines = guard.script("/state", [], {"censuschat": "table inet censuschat { }"}).splitlines()
    assert lines.index("nft delete table inet censuschat 2>/dev/null") < lines.index(
        "[ ! -s /state/reverting/table-0 ] || nft -f /state/reverting/table-0"
    )


def test_the_kernel_answers_about_its_clock() -> None:
    assert isinstance(host_clock.synchronised(), bool)
