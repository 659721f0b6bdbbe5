"""A store and a cache, alone: what they serve, to whom, and what they refuse."""

from __future__ import annotations

from testinfra.host import Host

PKI = "/etc/censuschat/pki"
ETCDCTL = (
    f"ETCDCTL_API=3 etcdctl --endpoints https://127.0.0.1:2379 --cacert {PKI}/ca.crt --cert {PKI}/node.crt "
    f"--key {PKI}/node.key"
)
REDIS = "REDISCLI_AUTH=$(sed -n 's/^requirepass //p' /etc/redis/redis.conf) redis-cli"


def test_the_key_is_its_groups_only(host: Host) -> None:
    key = host.file(f"{PKI}/node.key")
    assert (key.user, key.group, key.mode) == ("root", "censuschat-pki", 0o640)


def test_etcd_serves_those_with_a_certificate(host: Host) -> None:
    assert host.service("etcd-trial.service").is_running
    assert (
        host.check_output(f"{ETCDCTL} put molecule there && {ETCDCTL} get --print-value-only molecule") == "OK\nthere"
    )
    assert host.run(f"ETCDCTL_API=3 etcdctl --endpoints https://127.0.0.1:2379 --cacert {PKI}/ca.crt get x").rc != 0


def test_the_package_s_own_etcd_stays_off(host: Host) -> None:
    assert host.service("etcd.service").is_masked


def test_redis_is_a_primary_for_those_with_the_password(host: Host) -> None:
    assert host.service("redis-server.service").is_running
    assert host.check_output(f"{REDIS} --no-auth-warning set molecule there") == "OK"
    assert "role:master" in host.check_output(f"{REDIS} info replication")
    assert "NOAUTH" in host.run("redis-cli get molecule").stdout
    conf = host.file("/etc/redis/redis.conf")
    assert (conf.user, conf.mode) == ("redis", 0o640)
