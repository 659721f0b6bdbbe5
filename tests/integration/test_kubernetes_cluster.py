"""The regions' clusters on the running lab: convergence, check mode, secrets at rest and on their way, one node less.

The trials take the secondary region's last worker out of its cluster and bring it back; all nodes are Ready afterwards.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from lab import programs, report, verbs
from lab.paths import REPO, STATE
from lab.programs.catalogue import catalogue
from lab.topology import Node, Topology
from tests.integration.trial import BIN, ENVIRONMENT
from tests.nodes import entered, on

REGIONS = ("us-east-1", "us-west-2")


class Play:
    """One run of a playbook, with every word it said."""

    def __init__(self, name: str, limit: str, *options: str) -> None:
        inventory = verbs.current()[0]
        command = [str(BIN / "ansible-playbook"), "-i", str(inventory), "-l", limit, f"playbooks/{name}.yml", *options]
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
        )
        self.seconds = time.monotonic() - started
        self.code = done.returncode
        self.text = done.stdout + done.stderr
        # What -vvv says comes before; the report begins with a brace that stands alone.
        report = done.stdout[done.stdout.index("\n{\n") :] if not done.stdout.startswith("{\n") else done.stdout
        self.data: dict[str, Any] = json.JSONDecoder().raw_decode(report.lstrip())[0]

    def must(self) -> Play:
        assert self.code == 0, self.text[-4000:]
        return self

    @property
    def changed(self) -> dict[str, list[str]]:
        """Names of the tasks that changed something, by host."""
        found: dict[str, list[str]] = {}
        for entry in self.data["plays"]:
            for task in entry["tasks"]:
                for host, result in task["hosts"].items():
                    if result.get("changed"):
                        found.setdefault(host, []).append(task["task"]["name"])
        return found

    @property
    def hosts(self) -> set[str]:
        return {host for host in self.data["stats"] if host != "localhost"}

    def failure(self) -> str:
        """What the failed task said."""
        for entry in self.data["plays"]:
            for task in entry["tasks"]:
                for result in task["hosts"].values():
                    if result.get("failed"):
                        return str(result["msg"])
        raise AssertionError(f"nothing failed: {self.text[-2000:]}")


def kubectl(region: str, *arguments: str, stdin: str | None = None) -> str:
    program = programs.ready(catalogue().default) / "bin" / "kubectl"
    done = subprocess.run(
        (str(program), f"--kubeconfig={report.kubeconfig(region)}", *arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def members(lab: Topology, region: str) -> list[Node]:
    return [node for node in lab.nodes if node.site == region and node.kubernetes]


def control_planes(lab: Topology, region: str) -> list[Node]:
    return [node for node in members(lab, region) if node.kubernetes == "control-plane"]


def ready(region: str) -> set[str]:
    """Names of the region's nodes that are Ready."""
    found = json.loads(kubectl(region, "get", "nodes", "-o", "json"))["items"]
    return {
        node["metadata"]["name"]
        for node in found
        if any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"])
    }


@pytest.fixture(scope="module", autouse=True)
def clusters(running_lab: Topology) -> None:
    """Both regions have a cluster; makes what is missing."""
    if any(ready_or_none(region) != {n.name for n in members(running_lab, region)} for region in REGIONS):
        Play("cluster", "all").must()


def ready_or_none(region: str) -> set[str]:
    return ready(region) if report.kubeconfig(region).is_file() else set()


def test_a_second_run_changes_nothing(running_lab: Topology) -> None:
    assert Play("cluster", "all").must().changed == {}


def test_check_mode_on_converged_nodes_promises_nothing(running_lab: Topology) -> None:
    assert Play("cluster", "us_west_2", "--check", "--diff").must().changed == {}


@pytest.mark.parametrize("region", REGIONS)
def test_every_node_is_ready_labelled_and_known_by_its_address(running_lab: Topology, region: str) -> None:
    found = {n["metadata"]["name"]: n for n in json.loads(kubectl(region, "get", "nodes", "-o", "json"))["items"]}
    assert ready(region) == set(found) == {node.name for node in members(running_lab, region)}
    for node in members(running_lab, region):
        labels = found[node.name]["metadata"]["labels"]
        assert labels["topology.kubernetes.io/zone"] == node.zone
        assert labels["topology.kubernetes.io/region"] == region
        addresses = {a["type"]: a["address"] for a in found[node.name]["status"]["addresses"]}
        assert addresses["InternalIP"] == str(node.address)
        assert not found[node.name]["spec"].get("taints")


def test_the_regions_pods_and_services_never_overlap() -> None:
    ranges = [
        json.loads(kubectl(region, "get", "nodes", "-o", "json"))["items"][0]["spec"]["podCIDR"] for region in REGIONS
    ]
    services = [kubectl(r, "get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}") for r in REGIONS]
    assert ranges[0].startswith("10.78.") and ranges[1].startswith("10.78.")
    assert services == ["10.79.0.1", "10.79.16.1"]
    assert int(ranges[0].split(".")[2]) < 128 <= int(ranges[1].split(".")[2])


@pytest.mark.parametrize("region", REGIONS)
def test_a_secret_is_encrypted_in_etcd(running_lab: Topology, region: str) -> None:
    canary = "canary-at-rest-5f1c"
    kubectl(region, "create", "secret", "generic", "canary", f"--from-literal=value={canary}")
    try:
        etcd = "ETCDCTL_API=3 etcdctl --endpoints=https://127.0.0.1:2379 --cacert=/etc/kubernetes/pki/etcd/ca.crt "
        etcd += "--cert=/etc/kubernetes/pki/etcd/server.crt --key=/etc/kubernetes/pki/etcd/server.key "
        plane = control_planes(running_lab, region)[0].name
        stored = on(plane, f"{etcd} get /registry/secrets/default/canary --print-value-only | base64 -w0")
        value = base64.b64decode(stored)
        assert value.startswith(b"k8s:enc:secretbox:v1:first:")
        assert canary.encode() not in value
        # The API decrypts it.
        found = kubectl(region, "get", "secret", "canary", "-o", "jsonpath={.data.value}")
        assert base64.b64decode(found).decode() == canary
        # Each API server writes down what it was asked itself.
        logs = [on(node.name, "cat /var/log/kubernetes/audit/*.log") for node in control_planes(running_lab, region)]
        audit = "".join(logs)
        assert '"resource":"secrets","namespace":"default","name":"canary"' in audit
        assert canary not in audit
    finally:
        kubectl(region, "delete", "secret", "canary")


@pytest.mark.parametrize("region", REGIONS)
def test_nobody_unknown_learns_more_than_health(running_lab: Topology, region: str) -> None:
    address = str(control_planes(running_lab, region)[0].address)
    asked = ("curl", "--silent", "--insecure", "--max-time", "5", "--write-out", "\n%{http_code}")
    for path, status in (("/readyz", "200"), ("/version", "401"), ("/api/v1/secrets", "401"), ("/metrics", "401")):
        done = subprocess.run((*asked, f"https://{address}:6443{path}"), capture_output=True, text=True, timeout=20)
        assert done.stdout.rsplit("\n", 1)[1] == status, path


def test_a_privileged_pod_is_refused_where_a_namespace_says_nothing() -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "privileged", "namespace": "default"},
        "spec": {"hostNetwork": True, "containers": [{"name": "main", "image": "registry.k8s.io/pause:0"}]},
    }
    with pytest.raises(AssertionError, match=r'violates PodSecurity "baseline'):
        kubectl(REGIONS[0], "create", "-f", "-", stdin=json.dumps(pod))


def newcomer(lab: Topology) -> Node:
    """The worker that leaves and comes back."""
    workers = [node for node in members(lab, "us-west-2") if node.kubernetes == "worker"]
    return max(workers, key=lambda node: node.name)


@pytest.fixture(name="emptied")
def emptied_worker(running_lab: Topology) -> Iterator[Node]:
    """A worker that has left its cluster; it is back afterwards, whatever the test did."""
    node = newcomer(running_lab)
    Play("cluster_remove", node.name).must()
    yield node
    if node.name not in ready(node.site):
        Play("cluster", node.name).must()


@contextlib.contextmanager
def listener(node: Node, port: int) -> Iterator[None]:
    """Another program on a port of a node."""
    script = f"echo $$; exec python3 -m http.server {port}"
    command = entered(node.name, "sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        number = process.stdout.readline().strip()
        try:
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection((str(node.address), port), timeout=2).close()
                    break
                time.sleep(0.2)
            yield
        finally:
            on(node.name, f"kill {number}")


@contextlib.contextmanager
def command_lines(node: str) -> Iterator[IO[str]]:
    """Every command line that a node's processes have meanwhile, in a file that is written to as they appear."""
    script = "while :; do cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '; echo; sleep 0.1; done"
    with tempfile.TemporaryFile("w+", errors="replace") as seen:
        command = entered(node, "sh", "-c", f"echo $$; {script}")
        with subprocess.Popen(command, stdout=seen, stderr=subprocess.DEVNULL) as process:
            try:
                yield seen
            finally:
                seen.seek(0)
                on(node, f"kill {seen.readline().strip()}")
                process.wait(timeout=20)


def test_a_node_leaves_and_comes_back_without_touching_another(running_lab: Topology, emptied: Node) -> None:
    assert emptied.name not in kubectl(emptied.site, "get", "nodes", "-o", "name")
    left = "ls -d /etc/kubernetes /var/lib/kubelet/config.yaml /usr/local/bin/kubelet 2>/dev/null | wc -l"
    assert on(emptied.name, left).strip() == "0"
    assert Play("cluster_remove", emptied.name).must().changed == {}

    with listener(emptied, 10250):
        said = Play("cluster", emptied.name).failure()
    assert f"{emptied.name}'s port 10250 is taken by python3, and kubelet needs it" in said

    planned = Play("cluster", emptied.name, "--check").must()
    assert any("Join" in task for task in planned.changed[emptied.name])
    assert on(emptied.name, left).strip() == "0"

    with command_lines(emptied.name) as seen:
        added = Play("cluster", emptied.name, "-vvv").must()
        seen.seek(0)
        commands = seen.read()
    assert "kubeadm join" in commands
    assert added.hosts == {emptied.name}
    assert emptied.name in ready(emptied.site)
    # The machine is shared with everything else; alone it takes about half of this.
    assert added.seconds < 90
    token_secrets = kubectl(
        emptied.site, "get", "secrets", "-n", "kube-system", "--field-selector=type=bootstrap.kubernetes.io/token",
        "-o", "json",
    )  # fmt: skip
    tokens = [
        base64.b64decode(secret["data"]["token-secret"]).decode() for secret in json.loads(token_secrets)["items"]
    ]
    assert tokens
    journal = on(emptied.name, "journalctl --no-pager --since=-10min")
    for token in tokens:
        for where, text in (("output", added.text), ("command lines", commands), ("journal", journal)):
            assert token not in text, f"a join token is in the {where}"
    assert on(emptied.name, "ls -A /run/censuschat-join 2>/dev/null | wc -l").strip() == "0"


def test_a_node_that_was_emptied_by_hand_joins_again(running_lab: Topology) -> None:
    node = newcomer(running_lab)
    on(node.name, "systemctl stop kubelet; rm -rf /etc/kubernetes /var/lib/kubelet/config.yaml /var/lib/kubelet/pki")
    Play("cluster", node.name).must()
    assert node.name in ready(node.site)


def test_the_encryption_key_is_in_no_log(running_lab: Topology) -> None:
    region = "us-west-2"
    password = (STATE / "secrets" / f"kubernetes_{region}").read_text().strip()
    key = base64.b64encode(password.encode()).decode()
    plane = control_planes(running_lab, region)[0].name
    assert key in on(plane, "cat /etc/kubernetes/access/encryption.yaml")
    assert on(plane, "stat -c %a:%U /etc/kubernetes/access/encryption.yaml").strip() == "600:root"
    on(plane, "sed -i 's/name: first/name: drifted/' /etc/kubernetes/access/encryption.yaml")
    repaired = Play("cluster", plane, "-vvv", "--diff").must()
    assert list(repaired.changed) == [plane]
    journal = on(plane, "journalctl --no-pager; cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
    for text in (repaired.text, journal):
        assert key not in text
        assert password not in text


def test_the_last_control_plane_is_not_removed(running_lab: Topology) -> None:
    plane = control_planes(running_lab, "us-west-2")[0].name
    refused = Play("cluster_remove", plane)
    assert refused.code != 0
    assert f"{plane} is the last control plane of its cluster" in refused.failure()
    kubectl("us-west-2", "uncordon", plane)
    assert ready("us-west-2") == {node.name for node in members(running_lab, "us-west-2")}


BAD_INPUT = [
    ("kubernetes_version=1.36.3", "newer than the API server"),
    ("kubernetes_version=latest", "is not a version of Kubernetes"),
    ("container_runtime_cgroup_driver=systemd", "pods would be killed at random"),
    ("kubernetes_node_memory_mib=99999999", "MiB of memory and needs 99999999"),
    ("kubernetes_directory=/opt/kubernetes/v0.0.0", "prepare the programs and images"),
]


@pytest.mark.parametrize(("setting", "words"), BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_touched(running_lab: Topology, setting: str, words: str) -> None:
    node = newcomer(running_lab).name
    refused = Play("cluster", node, "-e", setting)
    assert refused.code != 0
    said = refused.failure()
    assert words in said
    assert node in said
    assert said.startswith("Nothing was touched. ")
    assert refused.changed == {}


def test_the_inventory_s_groups_are_checked(running_lab: Topology, tmp_path: Path) -> None:
    """An even number of etcd members, and a host in two groups."""
    node = newcomer(running_lab).name
    further = tmp_path / "further.yml"
    further.write_text(yaml.safe_dump({"kube_control_plane": {"hosts": {node: None}}}))
    said = Play("cluster", node, "-i", str(further)).failure()
    assert "would have 2 members of etcd" in said
    assert f"{node} is in the groups kube_control_plane and kube_node" in said
