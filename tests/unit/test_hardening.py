"""Controls as data: the shipped catalogue, a user's choices, and the planners of each kind of state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node import harden_plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.controls import (
    PROFILES,
    Control,
    catalogue,
    select,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_host import Hardening, Held, kernel_path
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import Account, Facts
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands, NodeError, PathState

CASES = Path(__file__).parent / "cases"
ROLE = Path(__file__).resolve().parents[2] / "collections/ansible_collections/censuschat/infra/roles/hardening"
FILES = sorted((ROLE / "files/catalogue").glob("*.yml"))


@pytest.fixture(scope="module", name="shipped")
def shipped_catalogue() -> dict[str, Control]:
    return catalogue((path.name, yaml.safe_load(path.read_text())) for path in FILES)


def example(**changes: Any) -> dict[str, Any]:
    control: dict[str, Any] = {
        "id": "example",
        "title": "An example",
        "rationale": "It shows the form.",
        "references": ["none"],
        "domain": "sysctl",
        "severity": "low",
        "profiles": ["baseline"],
        "applies_to": ["vm", "container"],
        "state": {"sysctl": {"net.ipv4.tcp_syncookies": 1}},
    }
    return {**control, **changes}


def facts(data: dict[str, Any]) -> Facts:
    return Facts(
        kernel=data.get("kernel", {}),
        modules=frozenset(data.get("modules", [])),
        files=data.get("files", {}),
        permissions={
            p: PathState(p, s["kind"], s["owner"], s["group"], int(s["mode"], 8))
            for p, s in data.get("permissions", {}).items()
        },
        accounts=tuple(Account(**a) for a in data.get("accounts", [])),
    )


@pytest.mark.parametrize("path", sorted((CASES / "harden").glob("*.yml")), ids=lambda p: p.stem)
def test_plan(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    held = Held.of({"id": "x", "applies_to": ["vm"], "state": case["control"]})
    seen = facts(case["facts"])
    actions = [
        *harden_plan.plan_sysctl(held.sysctl, seen),
        *harden_plan.plan_modules(held.modules, seen),
        *(a for s in held.settings for a in harden_plan.plan_setting(s, seen)),
        *(a for p in held.permissions for a in harden_plan.plan_permission(p, seen)),
    ]
    assert [[a.kind, a.target, a.detail] for a in actions] == case["actions"]
    violations = harden_plan.judge_accounts(held.accounts, seen)
    assert len(violations) == len(case.get("violations", []))
    assert all(found.startswith(wanted) for found, wanted in zip(violations, case.get("violations", []), strict=True))
    for name, text in case.get("texts", {}).items():
        now = seen.files.get(name) or ""
        for setting in held.settings:
            now = harden_plan.set_keys(now, setting)
        assert now == text
        after = Facts(files={name: now})
        assert not [a for s in held.settings for a in harden_plan.plan_setting(s, after)], "not stable"


def test_rendered_files_are_what_the_planners_ask_for() -> None:
    desired = {"net.ipv4.tcp_syncookies": "1", "net.ipv4.ip_local_port_range": "32768\t60999"}
    modules = ["usb-storage", "cramfs", "cramfs"]
    written = Facts(
        files={
            harden_plan.SYSCTL_FILE: harden_plan.render_sysctl(desired),
            harden_plan.MODPROBE_FILE: harden_plan.render_modules(modules),
        }
    )
    assert harden_plan.plan_sysctl(desired, written) == []
    assert harden_plan.plan_modules(modules, written) == []


def test_interface_with_a_dot_in_its_name() -> None:
    assert kernel_path("net.ipv4.conf.eth0/100.rp_filter") == "/proc/sys/net/ipv4/conf/eth0.100/rp_filter"


def test_shipped_catalogue_is_whole(shipped: dict[str, Control]) -> None:
    assert len(shipped) >= 60
    for control in shipped.values():
        Held.of(control.wire())
        # A profile is a floor: what it asks for the stricter ones ask for too.
        lowest = min(PROFILES.index(p) for p in control.profiles)
        assert set(PROFILES[lowest:]) == set(control.profiles), control.id
        assert all(text.endswith(".") for text in (control.rationale, control.side_effects) if text), control.id
        assert not control.title.endswith("."), control.id


def test_shipped_controls_do_not_contradict_each_other(shipped: dict[str, Control]) -> None:
    Hardening([c.wire() for c in shipped.values()], True, Commands())


def test_containers_never_write_the_machines_kernel(shipped: dict[str, Control]) -> None:
    for control in shipped.values():
        if "container" in control.applies_to:
            assert all(key.startswith("net.") for key in control.state.get("sysctl", {})), control.id
            assert not control.state.get("blocked_modules"), control.id


def test_forwarding_is_left_to_the_cluster(shipped: dict[str, Control]) -> None:
    assert not [c.id for c in shipped.values() for key in c.state.get("sysctl", {}) if "forward" in key]


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_holds_its_controls(shipped: dict[str, Control], profile: str) -> None:
    chosen = select(shipped, profile).controls
    assert [c.id for c in chosen] == [c.id for c in shipped.values() if profile in c.profiles]


def test_choices_are_applied(shipped: dict[str, Control]) -> None:
    chosen = select(
        shipped,
        "baseline",
        include=["sshd_banner"],
        exclude={"sshd_x11": "operators look at graphs here"},
        overrides={"sysctl_rp_filter": {"sysctl": {"net.ipv4.conf.all.rp_filter": 2}}},
    )
    held = {c.id: c for c in chosen.controls}
    assert "sshd_banner" in held
    assert "sshd_x11" not in held
    assert [(c.id, reason) for c, reason in chosen.excluded] == [("sshd_x11", "operators look at graphs here")]
    assert held["sysctl_rp_filter"].state["sysctl"]["net.ipv4.conf.all.rp_filter"] == 2
    assert held["sysctl_rp_filter"].state["sysctl"]["net.ipv4.conf.default.rp_filter"] == 1
    assert shipped["sysctl_rp_filter"].state["sysctl"]["net.ipv4.conf.all.rp_filter"] == 1, "the catalogue changed"


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"profile": "paranoid"}, "profile 'paranoid' does not exist: choose baseline, cis_level1, cis_level2"),
        ({"include": ["sshd_baner"]}, "control 'sshd_baner' is not in the catalogue; did you mean sshd_banner?"),
        ({"exclude": {"zzz": "not wanted here"}}, "hardening exclude: control 'zzz' is not in the catalogue"),
        ({"exclude": {"sshd_x11": "no"}}, "sshd_x11 needs its reason in words"),
        ({"exclude": {"sshd_x11": None}}, "sshd_x11 needs its reason in words"),
        (
            {"exclude": {"sshd_x11": "not wanted here"}, "overrides": {"sshd_x11": {"sshd": {"X11Forwarding": "yes"}}}},
            "sshd_x11 is excluded and also overridden or included: keep one of them",
        ),
        ({"overrides": {"sshd_banner": {"sshd": {}}}}, "sshd_banner is not in profile baseline"),
        ({"overrides": {"sshd_x11": {"shell": "rm"}}}, "state knows accounts,"),
        (
            {"overrides": {"sysctl_syncookies": {"sysctl": {"net.ipv4.tcp_syncookies": True}}}},
            "sysctl net.ipv4.tcp_syncookies needs a number or a text, not True",
        ),
    ],
)
def test_choice_that_cannot_be(shipped: dict[str, Control], choices: dict[str, Any], sentence: str) -> None:
    arguments = {"profile": "baseline", **choices}
    with pytest.raises(NodeError) as caught:
        select(shipped, **arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"id": "x"}, "own.yml: a catalogue file is a list of controls"),
        (["x"], "own.yml: a control is a mapping"),
        ([example(id="")], "lacks id"),
        ([example(id="Big-Id")], "an id is lower-case letters, digits and underscores"),
        ([example(rationale="")], "control example lacks rationale"),
        ([example(colour="red")], "has unknown keys: colour"),
        ([example(profiles=["cis"])], "profiles knows baseline, cis_level1, cis_level2, not cis"),
        ([example(severity="huge")], "severity knows low, medium, high, not huge"),
        ([example(state={"sysctl": {"net": 1}})], "'net' is not a sysctl key in dots"),
        ([example(state={"permissions": [{"paths": ["/x"], "mode": 420}]})], "an octal mode in quotes"),
        ([example(state={"settings": [{"path": "/x"}]})], "settings need a path and values"),
        ([example(), example()], "control example is defined twice"),
    ],
)
def test_catalogue_that_cannot_be(document: Any, sentence: str) -> None:
    with pytest.raises(NodeError) as caught:
        catalogue([("own.yml", document)])
    assert sentence in str(caught.value)


def test_controls_that_want_different_things_are_named() -> None:
    other = example(id="other", state={"sysctl": {"net.ipv4.tcp_syncookies": 0}})
    both = catalogue([("own.yml", [example(), other])])
    with pytest.raises(NodeError, match=r"controls example and other want different things of net.ipv4.tcp_syncookies"):
        Hardening([c.wire() for c in both.values()], True, Commands())


@pytest.mark.parametrize(
    ("audit", "actions", "error", "expected"),
    [
        (False, False, "", "pass"),
        (False, True, "", "changed"),
        (True, True, "", "failed"),
        (False, True, "disk is full", "failed"),
    ],
)
def test_result_of_a_control(audit: bool, actions: bool, error: str, expected: str) -> None:
    held = Held.of(example())
    held.actions = harden_plan.plan_sysctl(held.sysctl, Facts()) if actions else []
    held.error = error
    assert held.result(audit)["result"] == expected
