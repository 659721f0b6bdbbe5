"""Clients, names, balancer, Redis and the stand-in on the running lab, with the region that holds the write lease."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from lab import aws, probe, topology
from lab.paths import PREFIX, REPO, STATE
from lab.resolve import Names, UnresolvedError
from runbooks import ledger

INVENTORY = os.environ.get("CENSUSCHAT_INVENTORY", "inventories/lab")
BIN = Path(sys.executable).parent
SERVICE = probe.service_name(REPO / INVENTORY)
LAB = topology.load(REPO / INVENTORY)
LIMIT_S = 3.5
"""Seconds in which the stand-in must say no: its own 2 s for the work and what a loaded machine adds."""


def call(*command: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, **more)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def on(node: str, script: str) -> str:
    return call("podman", "exec", f"{PREFIX}{node}", "sh", "-c", script).stdout


def lab(*arguments: str) -> str:
    return call(sys.executable, "-m", "lab", *arguments).stdout


def changed(playbook: str, *arguments: str) -> set[str]:
    """Run a playbook; the hosts it changed something on."""
    done = call(str(BIN / "ansible-playbook"), "-i", INVENTORY, *arguments, playbook)
    recap = re.findall(r"^(\S+) +: ok=(\d+) +changed=(\d+)", done.stdout.partition("PLAY RECAP")[2], re.MULTILINE)
    assert recap, done.stdout
    return {host for host, _, count in recap if int(count)}


def ask(address: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, probe.PORT, timeout=10)
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
    first = Names().addresses(SERVICE)[0]
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
    assert sorted(Names().addresses(SERVICE)) == sorted(str(n.address) for n in app(writing))


def test_a_record_of_route_53_is_followed_within_its_ttl() -> None:
    name, ttl = f"trial-{os.getpid()}.{SERVICE.partition('.')[2]}", 1
    client = boto3.client(
        "route53",
        endpoint_url=aws.ENDPOINT,
        region_name="us-east-1",
        aws_access_key_id="lab",
        aws_secret_access_key="lab",
    )
    (zone,) = [
        z["Id"] for z in client.list_hosted_zones()["HostedZones"] if z["Name"] == f"{SERVICE.partition('.')[2]}."
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


def test_the_writing_region_serves_and_the_other_keeps_one_warm(writing: str, other: str) -> None:
    for node in app(writing):
        assert ask(str(node.address), "GET", "/readyz")[0] == 200, node.name
    warm, *cold = app(other)
    assert ask(str(warm.address), "GET", "/healthz")[0] == 200
    started = time.monotonic()
    status, body = ask(str(warm.address), "GET", "/readyz")
    assert status == 503, body
    assert "database" in body["error"]
    assert time.monotonic() - started < LIMIT_S
    for node in cold:
        with pytest.raises(ConnectionRefusedError):
            ask(str(node.address), "GET", "/healthz")


def test_without_redis_the_service_says_no_quickly_and_comes_back(writing: str) -> None:
    redis = next(h for h in redis_nodes() if LAB.node(h).site == writing)
    address = str(app(writing)[0].address)
    on(redis, "systemctl stop redis-server.service")
    try:
        started = time.monotonic()
        status, body = ask(address, "POST", "/rows", {"client": "integration", "n": time.time_ns() // 1000})
        assert status == 503
        assert "redis" in body["error"]
        assert time.monotonic() - started < LIMIT_S
        assert ask(address, "GET", "/readyz")[0] == 503
        assert ask(address, "GET", "/healthz")[0] == 200
    finally:
        on(redis, "systemctl start redis-server.service")
    deadline = time.monotonic() + 15
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
    node = app(writing)[0].name
    secrets = [(STATE / "secrets" / name).read_text().split()[0] for name in ("postgresql_app", "redis")]
    seen = on(node, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; journalctl --no-pager -u censuschat-stand-in -u haproxy")
    assert not any(secret in seen for secret in secrets)
    assert on(node, "stat -c '%U:%G %a' /etc/censuschat/stand-in.json /etc/haproxy/haproxy.cfg").split("\n")[:2] == [
        "root:censuschat-stand-in 640",
        "root:root 600",
    ]
    assert on(node, "systemctl show -p User -p NoNewPrivileges censuschat-stand-in.service").split() == [
        "User=censuschat-stand-in",
        "NoNewPrivileges=yes",
    ]
    machine = b"".join(p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists())
    assert not any(secret.encode() in machine for secret in secrets)
