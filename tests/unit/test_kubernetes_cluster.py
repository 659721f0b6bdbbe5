"""The planners of the cluster: which step a node takes, what stands in its way, and what is read of files."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes import images, nodes, preflight, versions
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.api import Access, ApiError
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.member import (
    Observed,
    Peers,
    Seen,
    Wanted,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

DATA = Path(__file__).parent / "data"


def cases(name: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in yaml.safe_load((DATA / name).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("case", cases("kubernetes_member.yml"))
def test_member_plan(case: dict[str, Any]) -> None:
    wanted = dataclasses.replace(Wanted(name="a1", endpoint="10.0.0.9:6443"), **case["wanted"])
    seen = {"seen": Seen(case["observed"].get("seen", "not asked"))}
    remains = {"remains": tuple(case["observed"].get("remains", ()))}
    observed = Observed(**{**case["observed"], **seen, **remains})
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in case.get("peers", {}).items()}
    peers = Peers(**known) if known else None
    if "step" in case:
        step, why = plan(wanted, observed, peers)
        assert step.value == case["step"]
        assert bool(why) is (case["step"] != "nothing")
        return
    with pytest.raises(NodeError) as refusal:
        plan(wanted, observed, peers)
    for words in case["refused"]:
        assert words in str(refusal.value)


@pytest.mark.parametrize("case", cases("kubernetes_preflight.yml"))
def test_preflight(case: dict[str, Any]) -> None:
    wanted = preflight.Wanted(
        name="n1",
        address="10.0.0.1",
        region="us-east-1",
        roles=("worker",),
        control_planes=("c1",),
        load_balancers=(),
        version="1.35.4",
    )
    listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in case.get("wanted", {}).items()}
    facts: dict[str, Any] = {"addresses": ("10.0.0.1",), **case.get("facts", {})}
    facts = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
    found = preflight.problems(dataclasses.replace(wanted, **listed), preflight.Facts(**facts))
    assert len(found) == len(case["problems"]), found
    for sentence, words in zip(found, case["problems"], strict=True):
        assert "n1" in sentence
        for part in words:
            assert part in sentence


@pytest.mark.parametrize(
    ("kubelet", "api", "refused"),
    [
        ("1.35.4", "1.35.4", False),
        ("1.34.0", "1.35.4", False),
        ("1.32.0", "1.35.4", False),
        ("1.31.9", "1.35.4", True),
        ("1.36.0", "1.35.4", True),
    ],
)
def test_a_kubelet_beside_an_api_server(kubelet: str, api: str, refused: bool) -> None:
    assert bool(versions.refused_kubelet(kubelet, api)) is refused


def test_kubeadm_joins_to_its_own_minor_version_only() -> None:
    assert not versions.refused_join("1.35.1", "1.35.4")
    assert "1.35.4" in versions.refused_join("1.34.9", "1.35.4")


# ---- images ----


def archive(directory: Path, name: str, members: dict[str, bytes]) -> str:
    path = directory / name
    with tarfile.open(path, "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_an_archive_names_its_images(tmp_path: Path) -> None:
    manifest = json.dumps([{"Config": "abc.json", "RepoTags": ["registry.k8s.io/pause:3.10"], "Layers": ["l.tar"]}])
    read = images.read(archive(tmp_path, "pause.tar", {"l.tar": b"x" * 3000, "manifest.json": manifest.encode()}))
    assert read.names == ("registry.k8s.io/pause:3.10",)
    other = images.read(archive(tmp_path, "other.tar", {"manifest.json": manifest.replace("abc", "abd").encode()}))
    assert other.source != read.source


@pytest.mark.parametrize("content", [{}, {"manifest.json": b"[]"}, {"manifest.json": b"{broken"}])
def test_an_archive_without_images_is_named(tmp_path: Path, content: dict[str, bytes]) -> None:
    with pytest.raises(NodeError, match=r"image archive .*bad\.tar"):
        images.read(archive(tmp_path, "bad.tar", content))


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"not a tar")
    with pytest.raises(NodeError, match=r"cut\.tar cannot be read"):
        images.read(str(tmp_path / "cut.tar"))


def test_only_what_is_missing_or_other_is_imported() -> None:
    wanted = [images.Archive(f"/{n}.tar", (f"r/{n}:1",), f"hash-{n}") for n in ("same", "other", "absent")]
    listing = (
        "REF      TYPE  DIGEST  SIZE  PLATFORMS   LABELS\n"
        "r/same:1 t     sha256  1 MiB linux/amd64 censuschat.infra/source=hash-same,io.cri-containerd.pinned=pinned\n"
        "r/other:1 t    sha256  1 MiB linux/amd64 censuschat.infra/source=hash-old\n"
    )
    # ctr aligns its columns by the widest entry.
    aligned = "\n".join(_aligned(line) for line in listing.splitlines())
    steps = images.plan(wanted, images.parse_list(aligned))
    assert [(a.path, why) for a, why in steps] == [
        ("/other.tar", "r/other:1 from another archive"),
        ("/absent.tar", "r/absent:1 not there"),
    ]


def _aligned(line: str) -> str:
    head, rest = line.split(maxsplit=1)
    fields = [head, *rest.replace("1 MiB", "1_MiB").split()]
    return " ".join(f"{field:<12}" for field in fields[:-1]).replace("1_MiB", "1 MiB") + " " + fields[-1]


# ---- Node objects ----

NODE = nodes.Node("n1", "10.0.0.1", {"topology.kubernetes.io/zone": "a"})
PLANE = {"labels": {"node-role.kubernetes.io/control-plane": "", "topology.kubernetes.io/zone": "a"}}
TAINT = {"key": nodes.CONTROL_PLANE_TAINT, "effect": "NoSchedule"}
OTHER = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("node", "observed", "patch"),
    [
        (NODE, {"metadata": {"labels": {"topology.kubernetes.io/zone": "a", "x": "y"}}}, {}),
        (NODE, {"metadata": {}}, {"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}}),
        (NODE, {"metadata": PLANE, "spec": {}}, {}),
        (NODE, {"metadata": PLANE, "spec": {"taints": [TAINT]}}, {"spec": {"taints": None}}),
        (NODE, {"metadata": PLANE, "spec": {"taints": [TAINT, OTHER]}}, {"spec": {"taints": [OTHER]}}),
        (
            dataclasses.replace(NODE, schedulable=False),
            {"metadata": PLANE, "spec": {"taints": [OTHER]}},
            {"spec": {"taints": [OTHER, TAINT]}},
        ),
        (dataclasses.replace(NODE, schedulable=False), {"metadata": PLANE, "spec": {"taints": [TAINT]}}, {}),
    ],
)
def test_a_node_object_gets_what_it_lacks(node: nodes.Node, observed: dict[str, Any], patch: dict[str, Any]) -> None:
    assert nodes.merge_patch(node, observed) == patch
    assert bool(nodes.described(patch)) is bool(patch)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (nodes.Request("system:node:n1", ("n1",), ("10.0.0.1",)), ""),
        (nodes.Request("system:node:n2", ("n1",), ("10.0.0.1",)), "system:node:n2 is not n1"),
        (nodes.Request("system:node:n1", ("n1", "kubernetes"), ("10.0.0.1",)), "kubernetes"),
        (nodes.Request("system:node:n1", ("n1",), ("10.0.0.1", "10.0.0.2")), "10.0.0.2"),
    ],
)
def test_a_kubelet_gets_a_certificate_for_itself_only(request_: nodes.Request, why: str) -> None:
    refused = nodes.refused(request_, NODE)
    assert why in refused
    assert bool(refused) is bool(why)


@pytest.mark.parametrize(
    ("conditions", "why"),
    [
        ([{"type": "Ready", "status": "True"}], ""),
        ([{"type": "Ready", "status": "False", "message": "cni plugin not initialized"}], "cni plugin not initialized"),
        ([], "its kubelet has not reported yet"),
    ],
)
def test_why_a_node_is_not_ready(conditions: list[dict[str, str]], why: str) -> None:
    assert nodes.ready({"status": {"conditions": conditions}}) == why


# ---- kubeconfigs ----

KUBECONFIG = """apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: Q0E=
    server: https://10.0.0.9:6443
  name: lab
users:
- name: system:node:n1
  user:
    client-certificate: {pem}
    client-key-data: S0VZ
"""


def test_a_kubeconfig_of_a_kubelet_is_read(tmp_path: Path) -> None:
    (tmp_path / "client.pem").write_text("CERT")
    (tmp_path / "kubelet.conf").write_text(KUBECONFIG.format(pem=tmp_path / "client.pem"))
    access = Access.of(str(tmp_path / "kubelet.conf"))
    assert access == Access("https://10.0.0.9:6443", "CA", "CERT", "KEY")
    assert "KEY" not in repr(access)


@pytest.mark.parametrize("text", ["", "server: http://10.0.0.9\n", KUBECONFIG.format(pem="/absent.pem")])
def test_an_unusable_kubeconfig_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.conf").write_text(text)
    with pytest.raises(ApiError, match=r"bad\.conf"):
        Access.of(str(tmp_path / "bad.conf"))
