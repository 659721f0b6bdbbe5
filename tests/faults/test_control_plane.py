"""Each fault: what a client sees, that nothing acknowledged is lost, and the command that mends it.

Outages are bounded with room for a busy machine; the printed figures are the measurement.
"""

from __future__ import annotations

import time

from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.snapshots import taken_at

from tests.faults.client import Client
from tests.faults.conftest import CONTROL_PLANES, Cluster, Report

WATCHED_S = 8.0
"""How long a client polls after a fault that needs no hand."""


def nothing_lost(cluster: Cluster, client: Client) -> None:
    """All that the API acknowledged is there."""
    acknowledged = dict(client.acknowledged)
    missing = sorted(set(acknowledged) - cluster.api.names())
    assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged writes are lost: {missing[:5]}"


def test_control_plane_node_killed(cluster: Cluster, client: Client, report: Report) -> None:
    victim = next(node for node in CONTROL_PLANES if node != cluster.holder())
    cluster.kill(victim)
    time.sleep(WATCHED_S)
    client.wait_good(10)
    nothing_lost(cluster, client)
    assert client.outage_s < 10
    command = cluster.boot(victim)
    cluster.wait_well()
    client.wait_good(10)
    nothing_lost(cluster, client)
    report("control_plane_node_killed", client, command)


def test_active_load_balancer_killed(cluster: Cluster, client: Client, report: Report) -> None:
    holder = cluster.holder()
    # Both at once and without a chance to say goodbye: the address has to be missed by the others.
    cluster.on(holder, "systemctl kill --signal=KILL kubernetes-api-haproxy.service kubernetes-api-keepalived.service")
    time.sleep(WATCHED_S)
    client.wait_good(10)
    nothing_lost(cluster, client)
    assert client.outage_s < 10
    report("active_load_balancer_killed", client, "nothing: another balancer takes the address")


def test_etcd_disk_emptied(cluster: Cluster, client: Client, report: Report) -> None:
    """On the first control plane, which with kubeadm's own manifest would found an empty cluster and serve it."""
    victim = CONTROL_PLANES[0]
    cluster.on(victim, "rm -rf /var/lib/etcd/member; kill -KILL $(pidof etcd)")
    time.sleep(WATCHED_S)
    client.wait_good(10)
    nothing_lost(cluster, client)
    command = cluster.play("replace-etcd-member", "-e", f"member={victim}")
    cluster.wait_well()
    client.wait_good(10)
    nothing_lost(cluster, client)
    assert client.outage_s < 10
    names = {line.split(", ")[2] for line in cluster.etcd(victim, "member list").splitlines()}
    assert names == set(CONTROL_PLANES)
    report("etcd_disk_emptied", client, command)


def test_expired_certificate(cluster: Cluster, client: Client, report: Report) -> None:
    """All API servers' certificates were issued at the same time, and so expire at the same time."""
    short = (
        "umask 077; sed '/^certificateValidityPeriod:/d; s/^kind: ClusterConfiguration$/&\\n"
        "certificateValidityPeriod: 1m0s/' /etc/kubernetes/kubeadm.yaml > /run/short.yaml && "
        "kubeadm certs renew apiserver --config /run/short.yaml && rm /run/short.yaml"
    )
    for node in CONTROL_PLANES:
        cluster.on(node, short)
    deadline = time.monotonic() + 150
    while not all("expired" in poll.failure for poll in client.ready[-5:]):
        assert time.monotonic() < deadline, f"the API servers still serve: {client.ready[-1]}"
        time.sleep(0.5)
    command = cluster.play("recover-certificates", "-l", "us_east_1")
    cluster.wait_well()
    client.wait_good(10)
    nothing_lost(cluster, client)
    report("expired_certificate", client, command)


def test_all_etcd_members_lost(cluster: Cluster, client: Client, report: Report) -> None:
    """What was acknowledged before the snapshot is there again; what came after it is lost, as documented."""
    first = CONTROL_PLANES[0]
    cluster.on(first, "systemctl start censuschat-etcd-snapshot.service")
    newest = cluster.on(first, "ls -1t /var/backups/etcd/*.db | head -1").rpartition("/")[2]
    before = set(client.acknowledged)
    settled = {name for name in before if client.acknowledged[name] < taken_at(newest)}
    time.sleep(2)
    version = revision(cluster)
    for node in CONTROL_PLANES:
        cluster.on(node, "rm -rf /var/lib/etcd/member; kill -KILL $(pidof etcd)")
    time.sleep(3)
    copy = f"witness1:/var/lib/censuschat-etcd-copies/{first}/snapshots/{newest}"
    options = ("-l", "us_east_1", "-e", "confirm=lab-us-east-1", "-e", f"snapshot={copy}")
    command = cluster.play("restore-etcd", *options)
    cluster.wait_well()
    client.wait_good(10)
    there = cluster.api.names()
    assert settled and settled <= there, f"lost from before the snapshot: {sorted(settled - there)[:5]}"
    # A watcher that waits for the next revision must not be told that nothing happened.
    assert revision(cluster) > version + 500_000_000
    report("all_etcd_members_lost", client, command)


def revision(cluster: Cluster) -> int:
    """The API's newest resource version."""
    status, found = cluster.api.call("GET", "/api/v1/namespaces?limit=1", timeout_s=10)
    assert status == 200, found
    return int(found["metadata"]["resourceVersion"])
