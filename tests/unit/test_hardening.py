"""Controls as data: the shipped catalogue, a user's choices, and the planners of each kind of state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node import harden_plan, plan_accounts
from ansible_collections.censuschat.infra.plugins.module_utils.node.controls import (
    PROFILES,
    Control,
    catalogue,
    refuse_conflicts,
    select,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_observe import kernel_path, read_document
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import Document, Facts
from ansible_collections.censuschat.infra.plugins.module_utils.node.held import Held
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_accounts import Account, AccountsSeen
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, PathState

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
        documents={tuple(d["paths"]): d["content"] for d in data.get("documents", [])},
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
    accounts = AccountsSeen(tuple(Account(**a) for a in case["facts"].get("accounts", [])))
    violations = plan_accounts.judge(held.accounts, accounts)
    violations += [v for d in held.documents for v in harden_plan.judge_document(d, seen)]
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
    refuse_conflicts(list(shipped.values()))


def test_containers_never_write_the_machines_kernel(shipped: dict[str, Control]) -> None:
    for control in shipped.values():
        if "container" in control.applies_to:
            assert all(key.startswith("net.") for key in control.state.get("sysctl", {})), control.id
            modules = control.state.get("blocked_modules", [])
            loaded = Facts(container="podman", modules=frozenset(m.replace("-", "_") for m in modules))
            assert {a.kind for a in harden_plan.plan_modules(modules, loaded)} <= {"module_file"}, control.id


def test_forwarding_is_left_to_the_cluster(shipped: dict[str, Control]) -> None:
    forwarding = [c for c in shipped.values() for key in c.state.get("sysctl", {}) if "forward" in key]
    assert all(control.unless_path == "/etc/kubernetes" for control in forwarding)


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
        ([example(state={"documents": [{"paths": ["/x"], "kind": "toml"}]})], "a kind (yaml, flags) and a remedy"),
        (
            [
                example(
                    state={"documents": [{"paths": ["/x"], "kind": "yaml", "remedy": "r", "expect": {"a": {"is": 1}}}]}
                )
            ],
            "expect a: a value, or a mapping of absent, at_least",
        ),
    ],
)
def test_catalogue_that_cannot_be(document: Any, sentence: str) -> None:
    with pytest.raises(NodeError) as caught:
        catalogue([("own.yml", document)])
    assert sentence in str(caught.value)


def manifest(flags: dict[str, str]) -> str:
    command = ["program", *(f"--{name}={value}" for name, value in flags.items())]
    return yaml.safe_dump({"kind": "Pod", "spec": {"containers": [{"name": "program", "command": command}]}})


def test_documents_are_merged_in_order_and_flags_are_read_from_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("authentication: {anonymous: {enabled: true}, x509: {clientCAFile: /ca}}\n")
    (tmp_path / "10-own.conf").write_text("authentication: {anonymous: {enabled: false}}\n")
    merged = read_document(Document((f"{tmp_path}/config.yaml", f"{tmp_path}/*.conf"), "yaml", {}, "r"))
    assert merged == {"authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": "/ca"}}}
    (tmp_path / "pod.yaml").write_text(manifest({"profiling": "false", "authorization-mode": "Node,RBAC"}))
    flags = read_document(Document((f"{tmp_path}/pod.yaml",), "flags", {}, "r"))
    assert flags == {"profiling": "false", "authorization-mode": "Node,RBAC"}
    (tmp_path / "pod.yaml").write_text("a: [")
    with pytest.raises(NodeError, match=r"pod.yaml cannot be read as YAML"):
        read_document(Document((f"{tmp_path}/pod.yaml",), "flags", {}, "r"))


ROLES = ROLE.parent
#: Where each component's flags come from: this role's variables, and kubeadm's own (v1.35).
SET_BY_KUBEADM = {
    "kube-apiserver": {
        "client-ca-file": "/pki/ca.crt",
        "etcd-cafile": "/pki/etcd/ca.crt",
        "etcd-certfile": "/pki/apiserver-etcd-client.crt",
        "etcd-keyfile": "/pki/apiserver-etcd-client.key",
        "kubelet-client-certificate": "/pki/apiserver-kubelet-client.crt",
        "kubelet-client-key": "/pki/apiserver-kubelet-client.key",
        "service-account-key-file": "/pki/sa.pub",
        "tls-cert-file": "/pki/apiserver.crt",
        "tls-private-key-file": "/pki/apiserver.key",
    },
    "kube-controller-manager": {
        "bind-address": "127.0.0.1",
        "root-ca-file": "/pki/ca.crt",
        "service-account-private-key-file": "/pki/sa.key",
        "use-service-account-credentials": "true",
    },
    "kube-scheduler": {"bind-address": "127.0.0.1"},
}


def test_what_our_control_plane_sets_is_what_the_catalogue_expects(shipped: dict[str, Control]) -> None:
    """The roles' values and the controls are one benchmark: neither may drift from the other."""
    given = yaml.safe_load((ROLES / "kubernetes_control_plane/vars/main.yml").read_text())
    names = {
        "kube-apiserver": "api_server",
        "kube-controller-manager": "controller_manager",
        "kube-scheduler": "scheduler",
    }
    ciphers = yaml.safe_load((ROLES / "kubernetes_node/vars/main.yml").read_text())["kubernetes_node_kubelet_settings"]
    for component, name in names.items():
        flags = {**SET_BY_KUBEADM[component], **given[f"kubernetes_control_plane_{name}_flags"]}
        if "tls-cipher-suites" in flags:
            flags["tls-cipher-suites"] = ",".join(ciphers["tlsCipherSuites"])
        path = f"/etc/kubernetes/manifests/{component}.yaml"
        documents = [d for c in shipped.values() for d in Held.of(c.wire()).documents if d.paths == (path,)]
        assert documents, component
        for document in documents:
            assert harden_plan.judge_document(document, Facts(documents={(path,): flags})) == []
            # None of them is met by a component that was told nothing.
            assert harden_plan.judge_document(document, Facts(documents={(path,): {}})) != []


def test_what_our_kubelet_is_told_is_what_the_catalogue_expects(shipped: dict[str, Control]) -> None:
    settings = yaml.safe_load((ROLES / "kubernetes_node/vars/main.yml").read_text())["kubernetes_node_kubelet_settings"]
    documents = [d for c in shipped.values() for d in Held.of(c.wire()).documents if "kubelet" in d.paths[0]]
    assert len(documents) == 3
    for document in documents:
        assert harden_plan.judge_document(document, Facts(documents={document.paths: settings})) == []
        assert harden_plan.judge_document(document, Facts(documents={document.paths: {}})) != []


def test_a_node_without_a_cluster_says_why_a_control_does_not_apply(shipped: dict[str, Control]) -> None:
    mine = [c for c in shipped.values() if c.domain == "kubernetes"]
    assert len(mine) >= 18
    assert all(c.requires_path.startswith(("/etc/kubernetes/", "/var/lib/kubelet/")) and c.otherwise for c in mine)


def test_controls_that_want_different_things_are_named() -> None:
    other = example(id="other", state={"sysctl": {"net.ipv4.tcp_syncookies": 0}})
    both = catalogue([("own.yml", [example(), other])])
    with pytest.raises(NodeError, match=r"controls example and other want different things of net.ipv4.tcp_syncookies"):
        select(both, "baseline")


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


def test_controls_on_one_path_do_not_undo_each_other() -> None:
    """One takes the group's right, one everybody's, one gives it to root: in any order all of it is done."""
    before = "bin:bin 2666"
    payloads = [("bin", "bin", 0o2644), ("bin", "bin", 0o2664), ("root", "bin", 0o666), ("bin", "bin", 0o3666)]
    actions = [Action("permission", "/etc/shells", "", payload, f"{before}\n") for payload in payloads]
    other = Action("permission", "/etc/passwd", "as planned", ("root", "root", 0o644))
    for order in (actions, actions[::-1]):
        *agreed, last = harden_plan.agree([*order, other])
        assert {a.payload for a in agreed} == {("root", "bin", 0o1644)}
        assert {a.detail for a in agreed} == {f"{before} -> root:bin 1644"}
        assert last is other
