"""The data services on the running lab: the two regions' PostgreSQL, who may connect to it and how, and their etcd."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.paths import REPO, STATE
from tests.nodes import call, run_on

INVENTORY = os.environ.get("CENSUSCHAT_INVENTORY", "inventories/lab")
BIN = Path(sys.executable).parent
PKI = "/etc/censuschat/pki"
# One HTTPS request from a node, with or without the node's certificate: status and body, or the TLS error.
REQUEST = """
import http.client, json, ssl, sys
url, method, path, certificate, body = sys.argv[1:]
context = ssl.create_default_context(cafile="/etc/censuschat/pki/ca.crt")
if certificate == "yes":
    context.load_cert_chain("/etc/censuschat/pki/node.crt", "/etc/censuschat/pki/node.key")
host, port = url.split(":")
connection = http.client.HTTPSConnection(host, int(port), timeout=5, context=context)
try:
    connection.request(method, path, body or None)
    answer = connection.getresponse()
    print(json.dumps([answer.status, answer.read().decode()]))
except (ssl.SSLError, ConnectionError) as error:
    print(json.dumps([0, str(error)]))
"""


def request(node: str, url: str, method: str, path: str, *, certificate: bool, body: str = "") -> tuple[int, str]:
    done = run_on(node, "python3", "-", url, method, path, "yes" if certificate else "no", body, text=REQUEST)
    status, answer = json.loads(done.stdout)
    return status, answer


def local_sql(node: str, sql: str, database: str = "postgres") -> str:
    """SQL as the superuser, over the node's own socket."""
    psql = ("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database)
    return run_on(node, "runuser", "-u", "postgres", "--", *psql, text=sql).stdout.strip()


def remote_sql(node: str, conninfo: str, password: str, sql: str = "select 1") -> subprocess.CompletedProcess[str]:
    """SQL from a node over the network."""
    return run_on(
        node, "env", f"PGPASSWORD={password}", "PGCONNECT_TIMEOUT=5", "psql", "-XAtqw", conninfo, "-c", sql, check=False
    )


@functools.cache
def inventory() -> dict[str, Any]:
    """The inventory as Ansible reads it, templates left as they are."""
    found: dict[str, Any] = json.loads(call(str(BIN / "ansible-inventory"), "-i", INVENTORY, "--list").stdout)
    return found


def hosts(group: str) -> list[str]:
    entry = inventory()[group]
    return sorted({*entry.get("hosts", []), *(host for child in entry.get("children", []) for host in hosts(child))})


def members(role: str, group: str) -> list[str]:
    return [host for host in hosts(role) if host in hosts(group)]


def address(node: str) -> str:
    return str(inventory()["_meta"]["hostvars"][node]["ansible_host"])


class Region:
    """A region's database nodes and its cluster as Patroni shows it now."""

    def __init__(self, name: str, group: str) -> None:
        self.name = name
        self.db = members("db", group)
        self.app = members("app", group)

    def cluster(self) -> list[dict[str, Any]]:
        """The members as the first node that answers knows them; a lost node does not."""
        answers = []
        for node in self.db:
            status, answer = request(node, f"{address(node)}:8008", "GET", "/cluster", certificate=False)
            if status == 200:
                found: list[dict[str, Any]] = json.loads(answer)["members"]
                return found
            answers.append(answer)
        raise AssertionError(f"no Patroni of {self.name} answers: {answers}")

    def having(self, *roles: str) -> list[str]:
        return [m["name"] for m in self.cluster() if m["role"] in roles]


REGIONS = [Region("us-east-1", "us_east_1"), Region("us-west-2", "us_west_2")]


@pytest.fixture(scope="module")
def writing() -> Region:
    found = [r for r in REGIONS if r.having("leader")]
    assert len(found) == 1, f"regions with a primary: {[r.name for r in found]}"
    return found[0]


@pytest.fixture(scope="module")
def standing_by(writing: Region) -> Region:
    return next(r for r in REGIONS if r is not writing)


@pytest.fixture
def password() -> str:
    return (STATE / "secrets/postgresql_app").read_text().split()[0]


def eventually(what: str, holds: Any, seconds: float = 20) -> None:
    """Wait for a condition of the running system; the message says what never came."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.3)


def test_the_writing_region_has_a_primary_and_a_synchronous_standby(writing: Region) -> None:
    primary = writing.having("leader")[0]
    assert local_sql(primary, "select pg_is_in_recovery()") == "f"
    others = local_sql(
        primary, "select application_name, sync_state from pg_stat_replication where state = 'streaming'"
    ).splitlines()
    own = dict(line.split("|") for line in others if line.split("|")[0] in writing.db)
    assert set(own) == set(writing.db) - {primary}
    assert list(own.values()).count("sync") == 1
    assert writing.having("sync_standby") == [name for name, state in own.items() if state == "sync"]


def test_the_other_region_is_a_standby_cluster_that_streams(writing: Region, standing_by: Region) -> None:
    leader = standing_by.having("standby_leader")
    assert len(leader) == 1
    assert not standing_by.having("leader")
    assert all(local_sql(node, "select pg_is_in_recovery()") == "t" for node in standing_by.db)
    source = "select sender_host from pg_stat_wal_receiver where status = 'streaming'"
    # A member that has just been copied begins to stream a moment after Patroni calls it running.
    for node in standing_by.db:
        senders = [address(n) for n in writing.db] if node == leader[0] else [address(leader[0])]
        eventually(f"{node} streams from its source", lambda n=node, s=senders: local_sql(n, source) in s)


def test_what_is_written_reaches_every_node_of_both_regions(writing: Region, standing_by: Region) -> None:
    primary = writing.having("leader")[0]
    client = f"test-{time.time_ns()}"
    local_sql(primary, f"insert into rows (client, n, region) values ('{client}', 1, '{writing.name}')", "censuschat")
    try:
        for node in writing.db + standing_by.db:
            count = f"select count(*) from rows where client = '{client}'"
            eventually(f"the row on {node}", lambda n=node, c=count: local_sql(n, c, "censuschat") == "1")
    finally:
        local_sql(primary, f"delete from rows where client = '{client}'", "censuschat")


def test_the_standby_region_takes_no_write(standing_by: Region) -> None:
    for node in standing_by.db:
        with pytest.raises(AssertionError, match="read-only transaction"):
            local_sql(node, "insert into rows (client, n, region) values ('test', 1, 'x')", "censuschat")


def test_the_application_connects_with_tls_and_its_password_only(writing: Region, password: str) -> None:
    client, primary = writing.app[0], address(writing.having("leader")[0])
    base = f"host={primary} dbname=censuschat user=censuschat"
    strict = f"{base} sslmode=verify-full sslrootcert={PKI}/ca.crt"
    assert remote_sql(client, strict, password).stdout == "1\n"
    plain = remote_sql(client, f"{base} sslmode=disable", password)
    assert plain.returncode != 0
    assert "no encryption" in plain.stderr
    wrong = remote_sql(client, strict, "wrong")
    assert wrong.returncode != 0
    assert "password authentication failed" in wrong.stderr
    for other in (
        "dbname=postgres user=postgres",
        "dbname=censuschat user=postgres",
        "dbname=postgres user=censuschat",
    ):
        refused = remote_sql(client, f"host={primary} {other} sslmode=require", password)
        assert refused.returncode != 0
        assert "no pg_hba.conf entry" in refused.stderr


def test_database_nodes_may_replicate_and_nothing_else(writing: Region, standing_by: Region, password: str) -> None:
    primary = writing.having("leader")[0]
    for node in (writing.db[-1], standing_by.db[0]):
        if node == primary:
            continue
        refused = remote_sql(node, f"host={address(primary)} dbname=censuschat user=censuschat", password)
        assert refused.returncode != 0
        assert "pg_hba.conf rejects connection" in refused.stderr


def test_passwords_are_scram_and_the_superuser_has_none(writing: Region) -> None:
    stored = dict(
        line.split("|", 1)
        for line in local_sql(
            writing.having("leader")[0],
            "select rolname, coalesce(split_part(rolpassword, '$', 1), '') from pg_authid where rolcanlogin",
        ).splitlines()
    )
    assert stored == {
        "postgres": "",
        **dict.fromkeys(("censuschat", "replicator", "rewind_user"), "SCRAM-SHA-256"),
    }


def test_every_stream_between_nodes_is_encrypted(writing: Region, standing_by: Region) -> None:
    for region in (writing, standing_by):
        leader = region.having("leader", "standby_leader")[0]
        streams = local_sql(leader, "select ssl from pg_stat_replication join pg_stat_ssl using (pid)").split()
        assert streams
        assert set(streams) == {"t"}


def test_pages_have_checksums_and_rewind_is_possible(writing: Region) -> None:
    settings = local_sql(writing.having("leader")[0], "show data_checksums; show wal_log_hints; show fsync").split()
    assert settings == ["on", "on", "on"]


def test_patroni_is_changed_only_by_its_regions_database_nodes_with_a_certificate(writing: Region) -> None:
    node, other = writing.db[0], writing.app[0]
    own = f"{address(node)}:8008"
    # The health checks of the balancer need no certificate.
    assert request(other, own, "OPTIONS", "/health", certificate=False)[0] == 200
    # What it is already: nothing would change even if one of these got through.
    config = json.loads(request(node, own, "GET", "/config", certificate=False)[1])
    patch = json.dumps({"ttl": config["ttl"]})
    assert request(node, own, "PATCH", "/config", certificate=False, body=patch)[0] == 403
    assert request(other, own, "PATCH", "/config", certificate=True, body=patch)[0] == 403
    assert request(node, own, "PATCH", "/config", certificate=True, body=patch)[0] == 200


@pytest.mark.parametrize(
    ("group", "port"), [("dcs", 2379), ("lease", 12379)], ids=["the database's etcd", "the lease's etcd"]
)
def test_etcd_serves_those_with_a_certificate_only(group: str, port: int) -> None:
    for node in hosts(group):
        url = f"{address(node)}:{port}"
        status, answer = request(node, url, "GET", "/health", certificate=True)
        assert (status, json.loads(answer)) == (200, {"health": "true"})
        status, error = request(node, url, "GET", "/health", certificate=False)
        assert status == 0, error
        assert re.search("certificate required|bad certificate", error)


def test_private_keys_are_for_their_services_only() -> None:
    for node in hosts("nodes"):
        shown = run_on(node, "stat", "-c", "%U:%G %a", f"{PKI}/node.key").stdout.split()
        assert shown == ["root:censuschat-pki", "640"]
    outsider = run_on(hosts("db")[0], "runuser", "-u", "nobody", "--", "cat", f"{PKI}/node.key", check=False)
    assert outsider.returncode != 0


def play(path: str, *arguments: str) -> dict[str, dict[str, int]]:
    """Run a playbook; its statistics by host."""
    environment = {
        **os.environ,
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_DEPRECATION_WARNINGS": "false",
    }
    done = subprocess.run(
        [str(BIN / "ansible-playbook"), "-i", INVENTORY, path, *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # Other callbacks may write after the JSON.
    result = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{"))[0]
    stats: dict[str, dict[str, int]] = result["stats"]
    return stats


@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["apply", "check mode"])
def test_another_run_changes_nothing(arguments: tuple[str, ...], writing: Region) -> None:
    before = writing.having("leader")
    stats = play("playbooks/data.yml", *arguments)
    assert {host: s["changed"] for host, s in stats.items() if s["changed"]} == {}
    assert set(stats) >= set(hosts("nodes"))
    assert writing.having("leader") == before


def reclone(path: Path, region: Region) -> Path:
    path.write_text(
        json.dumps(
            [
                {
                    "name": "Clone a region anew",
                    "hosts": ",".join(region.db),
                    "gather_facts": False,
                    "any_errors_fatal": True,
                    "tasks": [
                        {
                            "name": "Clone",
                            "ansible.builtin.include_role": {
                                "name": "censuschat.infra.postgresql",
                                "tasks_from": "reclone",
                            },
                        }
                    ],
                }
            ]
        )
    )
    return path


def test_a_standby_region_can_be_cloned_anew(tmp_path: Path, writing: Region, standing_by: Region) -> None:
    inode = ("stat", "-c", "%i", "/var/lib/postgresql/15/censuschat/PG_VERSION")
    before = {node: run_on(node, *inode).stdout for node in standing_by.db}
    play(str(reclone(tmp_path / "reclone.yml", standing_by)))
    assert all(run_on(node, *inode).stdout != before[node] for node in standing_by.db)
    test_the_other_region_is_a_standby_cluster_that_streams(writing, standing_by)


def test_the_writing_region_is_never_cloned_over(tmp_path: Path, writing: Region) -> None:
    primary = writing.having("leader")
    with pytest.raises(AssertionError, match="Its data would be the only copy"):
        play(str(reclone(tmp_path / "reclone.yml", writing)))
    assert writing.having("leader") == primary


@pytest.fixture
def etcd_playbook(tmp_path: Path, standing_by: Region) -> Iterator[Path]:
    path = tmp_path / "etcd.yml"
    nodes = sorted(set(hosts("dcs")) & set(standing_by.db + standing_by.app))
    path.write_text(
        json.dumps(
            [
                {
                    "name": "Members of one region",
                    "hosts": ",".join(nodes),
                    "gather_facts": False,
                    "roles": [{"role": "censuschat.infra.etcd", "vars": {"etcd_hosts": nodes}}],
                }
            ]
        )
    )
    yield path


def test_members_of_etcd_restart_one_after_the_other(etcd_playbook: Path, standing_by: Region) -> None:
    nodes = sorted(set(hosts("dcs")) & set(standing_by.db + standing_by.app))
    for node in nodes:
        run_on(node, "touch", "/etc/etcd/dcs.yml")
    stats = play(str(etcd_playbook))
    assert {host: s["changed"] for host, s in stats.items()} == dict.fromkeys(nodes, 1)
    spans = []
    for node in nodes:
        show = ("systemctl", "show", "etcd-dcs.service", "--value", "-p")
        # The monotonic clock is the machine's, the same for all nodes. In microseconds.
        down, up = (int(run_on(node, *show, f"Active{edge}TimestampMonotonic").stdout) for edge in ("Exit", "Enter"))
        assert down < up
        spans.append((down, up))
    spans.sort()
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans)), spans
    assert all(s["changed"] == 0 for s in play(str(etcd_playbook)).values())


def test_a_member_of_etcd_that_lost_its_data_takes_a_new_place(etcd_playbook: Path, standing_by: Region) -> None:
    nodes = sorted(set(hosts("dcs")) & set(standing_by.db + standing_by.app))
    lost = nodes[-1]
    run_on(lost, "sh", "-c", "systemctl stop etcd-dcs.service && rm -rf /var/lib/etcd/dcs/*")
    stats = play(str(etcd_playbook))
    assert {host for host, s in stats.items() if s["changed"]} == {lost}
    status, answer = request(lost, f"{address(lost)}:2379", "GET", "/health", certificate=True)
    assert (status, json.loads(answer)) == (200, {"health": "true"})
    assert all(s["changed"] == 0 for s in play(str(etcd_playbook)).values())


def test_a_lost_primary_is_replaced_inside_its_region_without_loss(writing: Region) -> None:
    lost = writing.having("leader")[0]
    successor = writing.having("sync_standby")
    client = f"test-{time.time_ns()}"
    local_sql(lost, f"insert into rows (client, n, region) values ('{client}', 1, '{writing.name}')", "censuschat")
    # A crash: neither Patroni nor PostgreSQL can say goodbye, and systemd does not bring them back.
    drop_in = "/run/systemd/system/patroni.service.d"
    run_on(lost, "sh", "-c", f"mkdir -p {drop_in} && cat > {drop_in}/lost.conf", text="[Service]\nRestart=no\n")
    run_on(lost, "systemctl", "daemon-reload")
    try:
        run_on(lost, "systemctl", "kill", "-s", "KILL", "--kill-whom=all", "patroni.service")
        eventually("a new primary", lambda: writing.having("leader") == successor, 60)
        found = local_sql(successor[0], f"select count(*) from rows where client = '{client}'", "censuschat")
        assert found == "1"
    finally:
        run_on(lost, "rm", "-r", drop_in)
        run_on(lost, "systemctl", "daemon-reload")
        run_on(lost, "systemctl", "start", "patroni.service")
    streams = f"select count(*) from pg_stat_replication where application_name = '{lost}' and state = 'streaming'"
    eventually("the lost node streams from its successor", lambda: local_sql(successor[0], streams) == "1", 90)
    local_sql(successor[0], f"delete from rows where client = '{client}'", "censuschat")
    eventually("a synchronous standby", lambda: bool(writing.having("sync_standby")), 30)
