"""The engine's way with many controls at once, on what a test lets it see; this machine is not read or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.node import (
    harden_host,
    harden_seen,
    sshd_host,
    state_host,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.guard import Guard
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_host import Hardening
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import Facts
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_seen import Seen
from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import DIRECTORY, JOURNAL, Keeper
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_audit import AuditSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_firewall import FirewallSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.sshd_plan import Login
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Observed
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    Completed,
    NodeError,
    PathState,
)


class NoCommands(Commands):
    """No program is installed; what was to be run is remembered."""

    def __init__(self, said: str = "no program runs in this test") -> None:
        self.ran: list[str] = []
        self.said = said

    def run(self, argv: Any, **_options: Any) -> Completed:
        self.ran.append(" ".join(argv))
        return Completed(127, "", self.said)


def control(identifier: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": identifier, "applies_to": ["vm", "container"], "state": state, **more}


@pytest.fixture(name="node")
def what_the_engine_sees(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`seen`, `container` and `login` of the node; a test fills them in."""
    about: dict[str, Any] = {"seen": Seen(), "container": "", "login": None}
    monkeypatch.setattr(harden_seen, "observe", lambda _controls, _commands: about["seen"])
    monkeypatch.setattr(harden_host, "container", lambda: about["container"])
    monkeypatch.setattr(sshd_host, "present_login", lambda: about["login"])
    return about


def results(outcome: harden_host.Outcome) -> dict[str, str]:
    return {line["id"]: line["result"] for line in outcome.results}


def detail(outcome: harden_host.Outcome, identifier: str) -> str:
    return next(str(line["detail"]) for line in outcome.results if line["id"] == identifier)


ONE = {"sysctl": {"net.ipv4.tcp_syncookies": 1}}
RULE = "-w /etc/passwd -p wa -k identity"


def test_control_that_the_node_cannot_hold_fails_only_where_it_was_asked_for(node: dict[str, Any]) -> None:
    node["container"] = "podman"
    impossible = control("clock", {"time": {"synchronised": True}}, applies_to=["vm"], holds={"container": "no clock"})
    outcome = Hardening([impossible], True, NoCommands()).run(check=True, audit=False)
    assert (results(outcome), detail(outcome, "clock")) == ({"clock": "not_applicable"}, "no clock")
    outcome = Hardening([{**impossible, "asked_for": True}], True, NoCommands()).run(check=True, audit=False)
    assert results(outcome) == {"clock": "failed"}
    assert detail(outcome, "clock").startswith("this node cannot hold it: no clock; do not include it for this node")


def test_paths_decide_where_a_control_means_something(node: dict[str, Any], tmp_path: Path) -> None:
    node["seen"] = Seen(facts=Facts(kernel={"net.ipv4.tcp_syncookies": "1"}))
    here, gone = str(tmp_path), str(tmp_path / "none")
    controls = [
        control("needs", ONE, requires_path=gone, otherwise="no member"),
        control("forbids", ONE, unless_path=here, otherwise="in a cluster"),
        control("both", ONE, requires_path=here, unless_path=gone),
    ]
    outcome = Hardening(controls, True, NoCommands()).run(check=True, audit=False)
    assert results(outcome) == {"needs": "not_applicable", "forbids": "not_applicable", "both": "changed"}
    assert detail(outcome, "needs") == f"no member: {gone} does not exist on this node"
    assert detail(outcome, "forbids") == f"in a cluster: {here} exists on this node"


def test_domain_that_cannot_be_looked_at_is_an_error_of_its_controls_only(node: dict[str, Any]) -> None:
    node["seen"] = Seen(facts=Facts(kernel={"net.ipv4.tcp_syncookies": "0"}), problems={"inventories": "find: no"})
    controls = [control("suid", {"suid": {"allowed": ["/usr/bin/su"]}}), control("cookies", ONE)]
    outcome = Hardening(controls, True, NoCommands()).run(check=True, audit=False)
    assert results(outcome) == {"suid": "failed", "cookies": "changed"}
    assert detail(outcome, "suid") == "find: no"


def test_locked_audit_rules_are_written_for_the_next_boot_and_told(node: dict[str, Any]) -> None:
    node["seen"] = Seen(audit=AuditSeen("", (), locked=True))
    outcome = Hardening([control("identity", {"audit": {"rules": [RULE]}})], True, NoCommands()).run(
        check=True, audit=False
    )
    assert [a.kind for a in outcome.actions] == ["audit_file"]
    assert results(outcome) == {"identity": "failed"}
    assert "locked until the next boot" in detail(outcome, "identity")


def test_firewall_that_would_cut_this_run_off_is_refused_in_check_mode_too(node: dict[str, Any]) -> None:
    node["login"] = Login("ops", port=2222)
    node["seen"] = Seen(firewall={"t": FirewallSeen()})
    rules = "chain input { type filter hook input priority 0; policy drop; tcp dport { @TCP_PORTS@ } accept }"
    wall = control("wall", {"firewall": {"table": "t", "ruleset": rules, "tcp_ports": [22]}})
    outcome = Hardening([wall], True, NoCommands()).run(check=True, audit=False)
    assert "does not accept new connections to TCP port 2222" in detail(outcome, "wall")
    node["login"] = Login("ops", port=22)
    assert results(Hardening([wall], True, NoCommands()).run(check=True, audit=False)) == {"wall": "changed"}


def test_unproven_change_of_an_earlier_run_fails_its_controls_in_check_mode(
    node: dict[str, Any], tmp_path: Path
) -> None:
    node["seen"] = Seen(facts=Facts(kernel={"net.ipv4.tcp_syncookies": "0"}), firewall={"t": FirewallSeen()})
    wall = control("wall", {"firewall": {"table": "t", "ruleset": "chain input { }"}})
    engine = Hardening([wall, control("cookies", ONE)], True, NoCommands())
    engine.guard = Guard(NoCommands(), str(tmp_path))
    (tmp_path / "pending").mkdir()
    outcome = engine.run(check=True, audit=False)
    assert results(outcome) == {"wall": "failed", "cookies": "changed"}
    assert "left unproven; a run without check mode undoes it first" in detail(outcome, "wall")


def test_ruleset_that_nft_does_not_take_is_refused_in_check_mode_too(node: dict[str, Any]) -> None:
    class Nft(NoCommands):
        def run(self, argv: Any, **options: Any) -> Completed:
            super().run(argv)
            return (
                Completed(1, "", "syntax error, unexpected acept")
                if "acept" in options["stdin"]
                else Completed(0, "", "")
            )

    node["seen"] = Seen(firewall={"t": FirewallSeen()})
    wall = control("wall", {"firewall": {"table": "t", "ruleset": "chain input { tcp dport 22 acept }"}})
    commands = Nft()
    outcome = Hardening([wall], True, commands).run(check=True, audit=False)
    assert "nft does not take the ruleset of table t, nothing was changed: syntax error" in detail(outcome, "wall")
    assert commands.ran == ["/usr/sbin/nft --check -f -"]


def test_audit_only_reports_and_plans_nothing(node: dict[str, Any]) -> None:
    node["seen"] = Seen(facts=Facts(kernel={"net.ipv4.tcp_syncookies": "0"}))
    commands = NoCommands()
    outcome = Hardening([control("cookies", ONE)], True, commands).run(check=False, audit=True)
    assert (results(outcome), outcome.changed, outcome.run, commands.ran) == ({"cookies": "failed"}, False, "", [])
    assert [step["what"] for step in outcome.results[0]["diff"]] == [
        "net.ipv4.tcp_syncookies (sysctl_file)",
        "net.ipv4.tcp_syncookies (sysctl)",
    ]


def test_one_control_that_fails_keeps_no_other_from_being_held_nor_its_own_lines_out(
    node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt cannot install; the other control's file is written, with the lines that the failing one has in it."""
    node["seen"] = Seen(node=Observed())
    written: dict[str, str] = {}
    monkeypatch.setattr(Hardening, "_write", lambda _self, path, text: written.update({path: text}))
    monkeypatch.setattr(state_host.Executor, "install", refuse)
    failing = control("aide", {"node": {"packages": {"present": ["aide"]}}, "blocked_modules": ["udf"]})
    engine = Hardening([failing, control("modules", {"blocked_modules": ["cramfs"]})], True, NoCommands())
    engine.keep = Keeper("run-1", root=str(tmp_path))
    outcome = engine.run(check=False, audit=False)
    assert detail(outcome, "aide").startswith("dpkg's lock was held by process 4711 (unattended-upgr)")
    # What was written is not seen here, and so the verification says.
    assert "the node still differs" in detail(outcome, "modules")
    text = written["/etc/modprobe.d/censuschat-hardening.conf"]
    assert "install cramfs /bin/false" in text and "install udf /bin/false" in text
    assert outcome.run == "run-1"
    journal = (tmp_path / DIRECTORY.lstrip("/") / "run-1" / JOURNAL).read_text()
    assert '"kind": "package"' in journal and "/etc/modprobe.d/censuschat-hardening.conf" in journal


def refuse(_executor: Any, _packages: Any) -> None:
    raise NodeError(
        "installing aide failed: E: Could not get lock /var/lib/dpkg/lock-frontend. "
        "It is held by process 4711 (unattended-upgr)"
    )


def test_what_cannot_be_kept_stops_the_run_before_anything_is_changed(
    node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node["seen"] = Seen()
    written: list[str] = []
    monkeypatch.setattr(harden_host, "write_atomically", lambda path, *_about: written.append(path))
    engine = Hardening([control("modules", {"blocked_modules": ["cramfs"]})], True, NoCommands())
    (tmp_path / "var").write_text("a file where a directory is to be")
    engine.keep = Keeper("run-1", root=str(tmp_path))
    with pytest.raises(NodeError, match=r"what this run would replace cannot be kept in .*, so nothing was changed"):
        engine.run(check=False, audit=False)
    assert written == []


def test_permissions_of_a_path_that_several_controls_name(node: dict[str, Any]) -> None:
    """A star of one control does not reach the files that another one looked at."""
    seen = {
        "/home/ops": PathState("/home/ops", "directory", "ops", "ops", 0o755),
        "/home/ops/.bashrc": PathState("/home/ops/.bashrc", "file", "ops", "ops", 0o644),
    }
    node["seen"] = Seen(facts=Facts(permissions=seen))
    controls = [
        control("homes", {"permissions": [{"paths": ["/home/*"], "mode": "0750"}]}),
        control("dots", {"permissions": [{"paths": ["/home/*/.[!.]*"], "kind": "file", "mode": "0740"}]}),
    ]
    outcome = Hardening(controls, True, NoCommands()).run(check=True, audit=False)
    assert detail(outcome, "homes") == "/home/ops: ops:ops 0755 -> ops:ops 0750"
    assert detail(outcome, "dots") == "/home/ops/.bashrc: ops:ops 0644 -> ops:ops 0640"
