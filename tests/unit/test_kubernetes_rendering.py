"""What the cluster's roles write, as Ansible renders it: kubeadm's documents, its files and the balancer's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

ROLES = Path(__file__).resolve().parents[2] / "collections/ansible_collections/censuschat/infra/roles"
GIVEN: dict[str, Any] = {
    "inventory_hostname": "cp2",
    "ansible_host": "10.0.0.2",
    "ansible_managed": "managed",
    "hostvars": {f"cp{i}": {"ansible_host": f"10.0.0.{i}", "inventory_hostname": f"cp{i}"} for i in (1, 2, 3)},
    "kubernetes_control_plane_version": "1.35.4",
    "kubernetes_control_plane_cluster_name": "test-us-east-1",
    "kubernetes_control_plane_hosts": ["cp1", "cp2", "cp3"],
    "kubernetes_control_plane_endpoint": "10.0.0.100:8443",
    "kubernetes_control_plane_pod_cidr": "10.78.0.0/17",
    "kubernetes_control_plane_service_cidr": "10.79.0.0/20",
    "kubernetes_control_plane_kubeconfig": "/nowhere/kubeconfig",
    "kubernetes_control_plane_encryption_keys": [
        {"name": "second", "secret": "bmV3"},
        {"name": "first", "secret": "b2xk"},
    ],
}


@functools.cache
def plugins() -> None:
    """Let Ansible know its lookups and filters, once."""
    init_plugin_loader()


def rendered(role: str, template: str, **given: Any) -> str:
    """A template of a role, with the role's defaults and variables below what is given."""
    return str(valued(role, f"lookup('ansible.builtin.template', '{template}')", **given))


def valued(role: str, expression: str, **given: Any) -> Any:
    """An expression in a role, with the role's defaults and variables below what is given."""
    plugins()
    loader = DataLoader()
    variables: dict[str, Any] = {"role_path": str(ROLES / role), "ansible_search_path": [str(ROLES / role)]}
    for part in ("defaults", "vars"):
        path = ROLES / role / part / "main.yml"
        if path.exists():
            variables |= loader.load_from_file(str(path), trusted_as_template=True)
    templar = Templar(loader=loader, variables=variables | given)
    return templar.template(trust_as_template(f"{{{{ {expression} }}}}"))


def documents(**given: Any) -> dict[str, dict[str, Any]]:
    """kubeadm's configuration: the documents by their kind."""
    text = rendered("kubernetes_control_plane", "kubeadm.yaml.j2", **(GIVEN | given))
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def flags(component: dict[str, Any]) -> dict[str, str]:
    return {flag["name"]: flag["value"] for flag in component["extraArgs"]}


def test_kubeadm_gets_one_document_of_each_kind() -> None:
    found = documents()
    assert set(found) == {"InitConfiguration", "ClusterConfiguration", "KubeletConfiguration", "KubeProxyConfiguration"}
    cluster = found["ClusterConfiguration"]
    assert cluster["kubernetesVersion"] == "v1.35.4"
    assert cluster["controlPlaneEndpoint"] == "10.0.0.100:8443"
    assert cluster["networking"]["podSubnet"] == "10.78.0.0/17"
    assert (
        found["KubeProxyConfiguration"] | {"mode": "nftables", "clusterCIDR": "10.78.0.0/17"}
        == (found["KubeProxyConfiguration"])
    )


def test_the_api_is_known_by_all_its_addresses() -> None:
    names = documents(kubernetes_control_plane_certificate_names=["api.example.com"])["ClusterConfiguration"]
    wanted = {"10.0.0.100", "127.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "cp1", "cp2", "cp3", "api.example.com"}
    assert wanted <= set(names["apiServer"]["certSANs"])


def test_each_control_plane_listens_on_its_own_address() -> None:
    node = documents()["InitConfiguration"]
    assert node["localAPIEndpoint"] == {"advertiseAddress": "10.0.0.2", "bindPort": 6443}
    assert node["nodeRegistration"]["name"] == "cp2"
    assert {"name": "node-ip", "value": "10.0.0.2"} in node["nodeRegistration"]["kubeletExtraArgs"]


@pytest.mark.parametrize(("schedulable", "taints"), [(True, 0), (False, 1)])
def test_control_planes_take_pods_only_when_told(schedulable: bool, taints: int) -> None:
    node = documents(kubernetes_control_plane_schedulable=schedulable)["InitConfiguration"]
    assert len(node["nodeRegistration"]["taints"]) == taints


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("profiling", "false"),
        ("authorization-mode", "Node,RBAC"),
        ("audit-log-maxage", "30"),
        ("audit-log-maxbackup", "10"),
        ("audit-log-maxsize", "100"),
        ("tls-min-version", "VersionTLS12"),
        ("service-account-lookup", "true"),
        ("kubelet-certificate-authority", "/etc/kubernetes/pki/ca.crt"),
    ],
)
def test_the_api_server_keeps_the_benchmark(flag: str, value: str) -> None:
    assert flags(documents()["ClusterConfiguration"]["apiServer"])[flag] == value


def test_a_flag_of_the_site_wins() -> None:
    cluster = documents(kubernetes_control_plane_api_server={"audit-log-maxage": 90})["ClusterConfiguration"]
    assert flags(cluster["apiServer"])["audit-log-maxage"] == "90"


def test_every_file_that_a_flag_names_is_mounted() -> None:
    server = documents()["ClusterConfiguration"]["apiServer"]
    mounted = [volume["hostPath"] for volume in server["extraVolumes"]] + ["/etc/kubernetes/pki"]
    for flag, value in flags(server).items():
        if value.startswith("/"):
            assert any(value == path or value.startswith(f"{path}/") for path in mounted), flag


def seen(step: str, member: bool = False) -> dict[str, Any]:
    """What the first look at a control plane said."""
    return {"kubernetes_control_plane_member": {"step": step, "member": member}}


FOUNDED = {"kubernetes_control_plane_founded": {"step": "found"}}
MEMBER = seen("nothing", member=True)


@pytest.mark.parametrize(
    ("facts", "running", "members", "joining", "unseen"),
    [
        # A new cluster: before it is founded, and then.
        ([seen("enter")] * 3, [], [], ["cp1", "cp2", "cp3"], []),
        ([seen("enter") | FOUNDED, seen("enter"), seen("enter")], [], ["cp1"], ["cp2", "cp3"], []),
        # One that stands: the first in the inventory's order speaks for all.
        ([MEMBER, MEMBER, MEMBER], ["cp3", "cp2", "cp1"], ["cp1", "cp2", "cp3"], [], []),
        # The first was emptied.
        ([seen("enter"), MEMBER, MEMBER], ["cp2", "cp3"], ["cp2", "cp3"], ["cp1"], []),
        # One alone in the run: the API says that there are others, or says nothing.
        ([{}, {}, seen("enter")], ["cp1", "cp2"], ["cp1", "cp2"], ["cp3"], []),
        ([{}, {}, seen("enter")], [], [], ["cp3"], ["cp1", "cp2"]),
        # It was emptied, and the API has not noticed yet: what was seen on the node counts.
        ([{}, {}, seen("rejoin")], ["cp1", "cp3"], ["cp1"], ["cp3"], ["cp2"]),
    ],
)
def test_who_founds_and_who_joins(
    facts: list[dict[str, Any]], running: list[str], members: list[str], joining: list[str], unseen: list[str]
) -> None:
    hosts = {name: GIVEN["hostvars"][name] | fact for name, fact in zip(("cp1", "cp2", "cp3"), facts, strict=True)}
    given = GIVEN | {"hostvars": hosts, "kubernetes_control_plane_running": running}
    assert valued("kubernetes_control_plane", "kubernetes_control_plane_members", **given) == members
    assert valued("kubernetes_control_plane", "kubernetes_control_plane_joining", **given) == joining
    peers = valued("kubernetes_control_plane", "kubernetes_control_plane_peers", **given)
    assert (peers["first"], peers["members"], peers["unseen"]) == ("cp1", members, unseen)
    assert set(peers["bare"]) | set(members) | set(unseen) == {"cp1", "cp2", "cp3"}


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    found = yaml.safe_load(rendered("kubernetes_control_plane", "encryption.yaml.j2", **GIVEN))
    first, last = found["resources"][0]["providers"]
    assert [key["name"] for key in first["secretbox"]["keys"]] == ["second", "first"]
    assert last == {"identity": {}}


def test_nobody_unknown_reads_more_than_health() -> None:
    found = yaml.safe_load(rendered("kubernetes_control_plane", "authentication.yaml.j2", **GIVEN))
    paths = [condition["path"] for condition in found["anonymous"]["conditions"]]
    assert found["anonymous"]["enabled"] is True
    assert sorted(paths) == ["/healthz", "/livez", "/readyz"]


@pytest.mark.parametrize(("forward", "asks"), [([], False), (["10.0.0.53"], True)])
def test_the_cluster_s_dns_asks_others_only_when_there_are_some(forward: list[str], asks: bool) -> None:
    text = rendered(
        "kubernetes_control_plane", "Corefile.j2", **(GIVEN | {"kubernetes_control_plane_dns_forward": forward})
    )
    assert ("forward . 10.0.0.53 {" in text) is asks
    assert text.count("{") == text.count("}")


def test_the_audit_policy_never_logs_what_a_secret_says() -> None:
    path = ROLES / "kubernetes_control_plane/files/audit-policy.yaml"
    rules = yaml.safe_load(path.read_text(encoding="utf-8"))["rules"]
    about = [r for r in rules if any("secrets" in (g.get("resources") or ()) for g in r.get("resources", ()))]
    assert [rule["level"] for rule in about] == ["Metadata"]
    # The first rule that fits decides: none before it may speak of everything.
    before = rules[: rules.index(about[0])]
    assert all(rule["level"] == "None" for rule in before)


BALANCER: dict[str, Any] = {
    "inventory_hostname": "lb2",
    "ansible_managed": "managed",
    "kubernetes_load_balancer_address": "10.0.0.100",
    "kubernetes_load_balancer_servers": [
        {"name": "cp1", "address": "10.0.0.1"},
        {"name": "cp2", "address": "10.0.0.2"},
    ],
    "kubernetes_load_balancer_peers": ["10.0.0.1", "10.0.0.2"],
    "kubernetes_load_balancer_own_address": "10.0.0.2",
}


def test_the_balancer_ends_connections_to_an_api_server_that_is_not_ready() -> None:
    text = rendered("kubernetes_load_balancer", "haproxy.cfg.j2", **BALANCER)
    assert "option httpchk GET /readyz" in text
    assert "inter 500ms" in text
    for words in ("check-ssl", "on-marked-down shutdown-sessions", "observe layer4 error-limit 2 on-error mark-down"):
        assert words in text
    assert "    server cp1 10.0.0.1:6443\n    server cp2 10.0.0.2:6443\n" in text


def test_balancers_know_each_other_by_address_and_share_no_password() -> None:
    text = rendered("kubernetes_load_balancer", "keepalived.conf.j2", **BALANCER)
    assert "vrrp_version 3" in text
    assert "unicast_src_ip 10.0.0.2" in text
    assert "unicast_peer {\n        10.0.0.1\n    }" in text
    assert "priority 149" in text
    assert "auth" not in text
    assert "10.0.0.100/32" in text
