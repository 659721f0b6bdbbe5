"""Clients, names, balancers, Redis and the application's pods on the running lab, with the region that writes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from lab import aws, probe, topology
from lab.paths import REPO, STATE
from lab.resolve import Names, UnresolvedError
from runbooks import ledger
from tests.nodes import call, on

INVENTORY = os.environ.get("CENSUSCHAT_INVENTORY", "inventories/lab")
BIN = Path(sys.executable).parent
SERVICE = probe.service_of(REPO / INVENTORY)
LAB = topology.load(REPO / INVENTORY)
LIMIT_S = 3.5
"""Seconds in which the service must say no: its own 2 s for the work and what a loaded machine adds."""


def lab(*arguments: str) -> str:
    return call(sys.executable, "-m", "lab", *arguments).stdout


def changed(playbook: str, *arguments: str) -> set[str]:
    """Run a playbook; the hosts it changed something on."""
    done = call(str(BIN / "ansible-playbook"), "-i", INVENTORY, *arguments, playbook)
    recap = re.findall(r"^(\S+) +: ok=(\d+) +changed=(\d+)", done.stdout.partition("PLAY RECAP")[2], re.MULTILINE)
    assert recap, done.stdout
    return {host for host, _, count in recap if int(count)}


def ask(address: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, SERVICE.port, timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def app(region: str) -> list[topology.Node]:
    return [n for n in LAB.nodes if n.site == region and n.role == "app"]


@pytest.fixture(scope="module")
def services() -> None:
    """The services where the write lease is: an earlier test may have moved it."""
    changed("playbooks/services.yml")
    time.sleep(5.5)  # the record's time to live, for clients that run


@pytest.fixture(scope="module")
def writing(services: None) -> str:
    """The region that serves: the one of the addresses that the service's name leads to."""
    first = Names().addresses(SERVICE.name)[0]
    return next(n.site for n in LAB.nodes if str(n.address) == first)


@pytest.fixture(scope="module")
def other(writing: str) -> str:
    return next(c.site for c in LAB.clients if c.site != writing)


@pytest.fixture
def clients() -> Iterator[None]:
    lab("probe", "stop")
    lab("probe", "start", "--all")
    yield
    lab("probe", "stop")


def until_acks(minimum: int, *names: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    for name in names:
        path = STATE / "ledgers" / f"{name}.jsonl"
        while not path.exists() or sum(r.kind == "ack" for r in ledger.read(path)) < minimum:
            assert time.monotonic() < deadline, (name, path.exists() and ledger.read(path)[-3:])
            time.sleep(0.1)


def test_the_name_leads_to_all_application_nodes_of_the_writing_region(writing: str) -> None:
    assert sorted(Names().addresses(SERVICE.name)) == sorted(str(n.address) for n in app(writing))


def test_a_record_of_route_53_is_followed_within_its_ttl() -> None:
    name, ttl = f"trial-{os.getpid()}.{SERVICE.name.partition('.')[2]}", 1
    client = boto3.client(
        "route53",
        endpoint_url=aws.ENDPOINT,
        region_name="us-east-1",
        aws_access_key_id="lab",
        aws_secret_access_key="lab",
    )
    (zone,) = [
        z["Id"] for z in client.list_hosted_zones()["HostedZones"] if z["Name"] == f"{SERVICE.name.partition('.')[2]}."
    ]

    def change(action: str, address: str) -> None:
        record = {"Name": name, "Type": "A", "TTL": ttl, "ResourceRecords": [{"Value": address}]}
        batch = {"Changes": [{"Action": action, "ResourceRecordSet": record}]}
        client.change_resource_record_sets(HostedZoneId=zone, ChangeBatch=batch)

    names = Names()
    with pytest.raises(UnresolvedError, match="NXDOMAIN"):
        names.addresses(name)
    change("UPSERT", "10.77.1.11")
    try:
        time.sleep(0.5)
        assert names.addresses(name) == ["10.77.1.11"]
        changed_at = time.monotonic()
        change("UPSERT", "10.77.2.11")
        while names.addresses(name) != ["10.77.2.11"]:
            assert time.monotonic() - changed_at < ttl + 1
            time.sleep(0.02)
    finally:
        change("DELETE", "10.77.2.11")


def test_a_row_goes_through_postgresql_and_redis(writing: str) -> None:
    client, n = "integration", time.time_ns() // 1000
    node, reader = app(writing)[0], app(writing)[-1]
    status, row = ask(str(node.address), "POST", "/rows", {"client": client, "n": n})
    assert status == 201, row
    assert (row["client"], row["n"], row["region"]) == (client, n, writing)
    assert ask(str(node.address), "POST", "/rows", {"client": client, "n": n})[0] == 409
    assert n in ask(str(reader.address), "GET", f"/rows?client={client}")[1]["n"]
    redis = next(h for h in redis_nodes() if LAB.node(h).site == writing)
    value = on(
        redis, f"REDISCLI_AUTH=$(sed -n 's/^requirepass //p' /etc/redis/redis.conf) redis-cli get row:{client}:{n}"
    )
    assert value.strip() == f"{writing}/{row['timeline']}"


def redis_nodes() -> list[str]:
    hosts = yaml.safe_load((REPO / INVENTORY / "hosts.yml").read_text())
    return list(hosts["all"]["children"]["redis"]["hosts"])


def kubectl(region: str, *arguments: str) -> str:
    """The region's cluster, asked on its first control plane; each node there has the role app."""
    return on(
        app(region)[0].name, f"kubectl --kubeconfig /etc/kubernetes/admin.conf -n production-api {' '.join(arguments)}"
    )


def deployments(region: str) -> dict[str, tuple[int, int]]:
    """Wanted and available replicas by Deployment."""
    items = json.loads(kubectl(region, "get", "deployments", "-o", "json"))["items"]
    return {i["metadata"]["name"]: (i["spec"]["replicas"], i["status"].get("availableReplicas", 0)) for i in items}


def test_the_writing_region_serves_and_the_other_keeps_one_warm(writing: str, other: str) -> None:
    for node in app(writing):
        assert ask(str(node.address), "GET", "/readyz")[0] == 200, node.name
    full = len(app(writing))
    assert deployments(writing) == {"api-gateway": (full, full), "query": (full, full)}
    for node in app(other):
        assert ask(str(node.address), "GET", "/healthz")[0] == 200
        started = time.monotonic()
        status, body = ask(str(node.address), "GET", "/readyz")
        assert status == 503, body
        assert time.monotonic() - started < LIMIT_S
    # The query service's pod is there and runs, but is not ready: its region's database takes no writes.
    assert deployments(other) == {"api-gateway": (1, 1), "query": (1, 0)}
    phase = "jsonpath={.items[*].status.phase}"
    assert kubectl(other, "get", "pods", "-l", "app.kubernetes.io/name=query", "-o", f"'{phase}'") == "Running"


def test_the_balancer_serves_its_pods_and_its_region_and_nobody_else(writing: str) -> None:
    """This machine is outside the region; the clients inside it and the pods are served, as the other tests show."""
    for port in (6432, 6380):
        # The reset may come before the connection has even been returned.
        closed = contextlib.suppress(ConnectionResetError, BrokenPipeError)
        with closed, socket.create_connection((str(app(writing)[0].address), port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(100) == b""


def test_a_rollout_of_both_services_fails_no_write(clients: None, writing: str) -> None:
    """Pods that end answer what has begun and send kept connections to their successors."""
    outside = ("outside-fresh", "outside-kept")
    until_acks(20, *outside)
    before = time.monotonic()
    kubectl(writing, "rollout", "restart", "deployment/query", "deployment/api-gateway")
    for name in ("query", "api-gateway"):
        kubectl(writing, "rollout", "status", f"deployment/{name}", "--timeout=90s")
    time.sleep(6)  # the last of the old pods have drained
    lab("probe", "stop")
    lab("probe", "readback")
    records = [r for r in ledger.read_all(probe.ledgers()) if r.side == ledger.OUTSIDE and r.t > before]
    assert [r for r in records if r.kind == "fail"] == []
    assert sum(r.kind == "ack" for r in records) > 50
    assert ledger.measure(ledger.read_all(probe.ledgers())).lost_acknowledged == 0


def test_without_redis_the_service_says_no_quickly_and_comes_back(writing: str) -> None:
    redis = next(h for h in redis_nodes() if LAB.node(h).site == writing)
    address = str(app(writing)[0].address)
    on(redis, "systemctl stop redis-server.service")
    try:
        started = time.monotonic()
        status, body = ask(address, "POST", "/rows", {"client": "integration", "n": time.time_ns() // 1000})
        assert status == 503
        # Once no pod of the query service is ready, the gateway says that it has none.
        assert "redis" in body["error"] or "the query service does not answer" in body["error"]
        assert time.monotonic() - started < LIMIT_S
        assert ask(address, "GET", "/readyz")[0] == 503
        assert ask(address, "GET", "/healthz")[0] == 200
    finally:
        on(redis, "systemctl start redis-server.service")
    deadline = time.monotonic() + 20
    while ask(address, "GET", "/readyz")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_clients_on_all_sides_see_one_writer(clients: None, writing: str, other: str) -> None:
    inside = [f"inside-{writing}-session", f"inside-{writing}-direct"]
    until_acks(20, "outside-fresh", "outside-kept", *inside)
    lab("probe", "stop")
    lab("probe", "readback")
    figures = ledger.measure(ledger.read_all(probe.ledgers()))
    assert (figures.lost_acknowledged, figures.two_writers_ms, figures.rpo_s) == (0, 0, 0)
    assert [w.region for w in figures.writers] == [writing]
    for kind in ("session", "direct"):
        standby = figures.clients[f"inside-{other}-{kind}"]
        assert standby.acks == 0
        assert standby.fails > 0, "the client inside the standby region did try"
    kept = ledger.read(STATE / "ledgers" / "outside-kept.jsonl")
    assert sum(r.kind == "connect" for r in kept) == 1
    assert json.loads(lab("probe", "figures", "--json"))["lost_acknowledged"] == 0


def test_a_switchover_inside_the_region_moves_every_client_and_loses_nothing(clients: None, writing: str) -> None:
    names = ["outside-fresh", "outside-kept", f"inside-{writing}-session", f"inside-{writing}-direct"]
    until_acks(20, *names)
    node = next(n for n in LAB.nodes if n.site == writing and n.role == "db")
    patronictl = "patronictl -c /etc/patroni/config.yml"
    deadline = time.monotonic() + 30
    roles: dict[str, str] = {}
    while not {"Leader", "Sync Standby"} <= set(roles):
        assert time.monotonic() < deadline, roles
        roles = {m["Role"]: m["Member"] for m in json.loads(on(node.name, f"{patronictl} list -f json"))}
    leader, candidate = roles["Leader"], roles["Sync Standby"]
    moved = time.monotonic()
    on(node.name, f"{patronictl} switchover --master {leader} --candidate {candidate} --force")
    deadline = time.monotonic() + 45
    while True:
        records = ledger.read_all(probe.ledgers())
        newest = max(r.timeline or 0 for r in records if r.kind == "ack")
        after = {r.client for r in records if r.kind == "ack" and r.timeline == newest and r.t > moved}
        oldest = min(r.timeline or 0 for r in records if r.kind == "ack")
        if newest > oldest and after >= set(names):
            break
        assert time.monotonic() < deadline, (oldest, newest, after)
        time.sleep(0.2)
    lab("probe", "stop")
    lab("probe", "readback")
    figures = ledger.measure(ledger.read_all(probe.ledgers()))
    assert (figures.lost_acknowledged, figures.two_writers_ms, figures.rto_s) == (0, 0, None)
    assert [w.region for w in figures.writers] == [writing, writing]
    assert max(figures.clients[name].longest_gap_s or 0 for name in names) < 30


def test_redis_is_promoted_and_follows_again_and_the_role_survives_a_restart(
    tmp_path: Path, writing: str, other: str
) -> None:
    primary, replica = (next(h for h in redis_nodes() if LAB.node(h).site == site) for site in (writing, other))

    def role(entry: str, *arguments: str) -> bool:
        playbook = tmp_path / "role.yml"
        playbook.write_text(
            f"- hosts: {replica}\n  gather_facts: false\n  tasks:\n    - ansible.builtin.include_role:\n"
            f"        name: censuschat.infra.redis\n        tasks_from: {entry}\n"
        )
        extra = ("-e", f"redis_primary_address={LAB.node(primary).address}")
        return replica in changed(str(playbook), *extra, *arguments)

    def says() -> str:
        command = "REDISCLI_AUTH=$(sed -n 's/^requirepass //p' /etc/redis/redis.conf) redis-cli INFO replication"
        return next(line for line in on(replica, command).splitlines() if line.startswith("role:")).strip()

    try:
        assert role("promote.yml", "--check") is True
        assert says() == "role:slave"
        assert role("promote.yml") is True
        assert says() == "role:master"
        on(replica, "systemctl restart redis-server.service")
        assert says() == "role:master"
        assert role("promote.yml") is False
    finally:
        role("follow.yml")
    assert says() == "role:slave"
    assert role("follow.yml") is False


def test_a_second_run_of_the_services_changes_nothing_in_check_mode_and_out_of_it(services: None) -> None:
    assert changed("playbooks/services.yml", "--check") == set()
    assert changed("playbooks/services.yml") == set()


def test_secrets_are_in_their_files_only(writing: str) -> None:
    secrets = [(STATE / "secrets" / name).read_text().split()[0] for name in ("postgresql_app", "redis")]

    def told(text: str) -> bool:
        return any(secret in text or base64.b64encode(secret.encode()).decode() in text for secret in secrets)

    for node in app(writing):
        seen = on(
            node.name,
            "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' ';"
            " journalctl --no-pager -u kubelet -u containerd -u haproxy; cat /var/log/pods/*/*/*.log",
        )
        assert "lab.services" in seen
        assert not told(seen)
        assert on(node.name, "stat -c '%U:%G %a' /etc/haproxy/haproxy.cfg").strip() == "root:root 600"
    objects = kubectl(writing, "get", "all,configmaps,events", "-o", "yaml")
    assert "lab.services.query" in objects
    assert not told(objects)
    assert told(kubectl(writing, "get", "secrets", "-o", "yaml")), "that is where they are"
    machine = b"".join(p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists())
    assert not told(machine.decode(errors="replace"))
