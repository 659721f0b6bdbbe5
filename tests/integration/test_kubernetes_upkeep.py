"""The jobs on a real control plane: snapshots that reach another site, certificates that are watched."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from lab import verbs
from lab.topology import Topology
from tests.nodes import on, run_on

RECEIVER = "witness1"
METRICS = "/var/lib/censuschat-metrics"


@pytest.fixture(scope="module", name="control_plane")
def first_control_plane(running_lab: Topology) -> str:
    """A control plane of the primary region, as the inventory has it."""
    hosts = yaml.safe_load((verbs.current()[0] / "hosts.yml").read_text())
    names = sorted(_group(hosts["all"], "kube_control_plane") or {})
    return next(name for name in names if running_lab.node(name).site == "us-east-1")


def _group(body: dict[str, object], wanted: str) -> dict[str, object] | None:
    children = body.get("children")
    for name, inner in (children if isinstance(children, dict) else {}).items():
        found = (inner or {}).get("hosts") if name == wanted else _group(inner or {}, wanted)
        if isinstance(found, dict):
            return found
    return None


def test_a_snapshot_is_proven_and_reaches_the_other_site(control_plane: str) -> None:
    time.sleep(1.1)  # Snapshots are named by the second.
    on(control_plane, "systemctl start censuschat-etcd-snapshot.service")
    newest = on(control_plane, "ls -1t /var/backups/etcd/*.db | head -1").strip()
    described = json.loads(on(control_plane, f"cat {newest}.json"))
    assert described["proven"] and described["keys"] > 100
    assert on(control_plane, f"stat -c '%a %U' {newest}").split() == ["600", "root"]
    copy = f"/var/lib/censuschat-etcd-copies/{control_plane}/snapshots/{described['name']}"
    assert on(RECEIVER, f"sha256sum {copy}").split()[0] == described["sha256"]
    on(RECEIVER, "systemctl start censuschat-etcd-copies.service")
    assert f'member="{control_plane}"' in on(RECEIVER, f"cat {METRICS}/censuschat_etcd_copies.prom")
    assert "last_run_success" in on(control_plane, f"cat {METRICS}/censuschat_etcd_snapshot.prom")


def test_the_key_of_the_copies_does_nothing_else(control_plane: str) -> None:
    ssh = (
        "ssh -F /dev/null -o BatchMode=yes -o UserKnownHostsFile=/etc/censuschat/etcd-snapshot.known_hosts "
        f"-i /etc/ssh/ssh_host_ed25519_key etcdcopy-{control_plane}@10.77.3.11"
    )
    for asked in ("id", "cat /etc/passwd", "", "take ../x 1 00"):
        done = run_on(control_plane, "sh", "-c", f"{ssh} {asked} </dev/null", check=False)
        assert done.returncode == 1 and "refused:" in done.stderr, done
        assert "uid=" not in done.stdout and "root:" not in done.stdout


def test_a_receiver_that_hears_nothing_complains(control_plane: str) -> None:
    directory = f"/var/lib/censuschat-etcd-copies/{control_plane}/snapshots"
    on(RECEIVER, f"mv {directory} {directory}.away && install -d -m 0700 {directory}")
    try:
        done = run_on(RECEIVER, "sh", "-c", "systemctl start censuschat-etcd-copies.service", check=False)
        assert done.returncode != 0
        said = on(RECEIVER, "journalctl -u censuschat-etcd-copies.service -o cat -n 20")
        assert f"{control_plane} of" in said and "never sent a snapshot" in said
    finally:
        on(RECEIVER, f"rmdir {directory} && mv {directory}.away {directory}")
        on(RECEIVER, "systemctl start censuschat-etcd-copies.service")


def test_certificates_are_watched_and_an_emptied_disk_would_stay_down(control_plane: str) -> None:
    on(control_plane, "systemctl start censuschat-kubernetes-certificates.service censuschat-kubelet-serving.service")
    published = on(control_plane, f"cat {METRICS}/censuschat_kubernetes_certificates.prom")
    days = {line.split('certificate="')[1].split('"')[0] for line in published.splitlines() if "days_left{" in line}
    assert {"apiserver", "etcd-server", "admin.conf", "ca", "kubelet-client", "kubelet-serving"} <= days
    assert "--initial-cluster-state=existing" in on(control_plane, "cat /etc/kubernetes/manifests/etcd.yaml")
    timers = on(control_plane, "systemctl list-timers --no-legend 'censuschat-*'")
    for name in ("censuschat-etcd-snapshot", "censuschat-kubernetes-certificates", "censuschat-kubelet-serving"):
        assert f"{name}.timer" in timers
