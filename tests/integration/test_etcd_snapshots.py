"""The snapshot job and the restore on real members of etcd, on loopback: no lab is needed."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep import (
    common,
    membership,
    restore,
    snapshots,
    static_pods,
)
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import UpkeepError
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.restore import Wanted
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.snapshots import Config

from lab import programs

KUBEADM = """\
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: 10.77.1.31}
nodeRegistration: {name: cp1, criSocket: unix:///run/containerd/containerd.sock}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v%s
certificatesDir: %s
"""


@pytest.fixture(scope="module", name="binaries", autouse=True)
def binaries_on_path() -> Iterator[Path]:
    """The prepared programs, where the jobs look for theirs."""
    try:
        place = programs.ready("1.35")
    except programs.Unprepared:
        place = programs.prepare("1.35")
    kept, common.PROGRAMS = common.PROGRAMS, str(place / "bin")
    yield place / "bin"
    common.PROGRAMS = kept


@pytest.fixture(scope="module", name="pki")
def pki_of_kubeadm(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kubeadm's own authorities and etcd certificates, as on a control plane."""
    directory = tmp_path_factory.mktemp("pki")
    config = directory / "kubeadm.yaml"
    config.write_text(KUBEADM % (programs.versions("1.35")["kubernetes"], directory))
    for part in ("etcd-ca", "etcd-server", "etcd-healthcheck-client"):
        argv = (binaries / "kubeadm", "init", "phase", "certs", part, "--config", config)
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return directory / "etcd"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Members:
    """Members of one cluster on loopback; `start` begins from whatever their data directories hold."""

    def __init__(self, binaries: Path, pki: Path, directory: Path, count: int) -> None:
        self.binaries, self.pki, self.directory = binaries, pki, directory
        self.clients = {f"cp{n}": f"https://127.0.0.1:{free_port()}" for n in range(1, count + 1)}
        self.peers = {name: f"http://127.0.0.1:{free_port()}" for name in self.clients}
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name, client in self.clients.items():
            argv = [str(self.binaries / "etcd"), "--name", name, "--data-dir", str(self.directory / name)]
            argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
            argv += ["--listen-peer-urls", self.peers[name], "--initial-advertise-peer-urls", self.peers[name]]
            argv += ["--initial-cluster", ",".join(f"{n}={url}" for n, url in self.peers.items())]
            argv += ["--client-cert-auth", "--trusted-ca-file", f"{self.pki}/ca.crt", "--log-level", "error"]
            argv += ["--cert-file", f"{self.pki}/server.crt", "--key-file", f"{self.pki}/server.key"]
            with (self.directory / f"{name}.log").open("ab") as log:
                self.running.append(subprocess.Popen(argv, stdout=log, stderr=log))
        deadline = time.monotonic() + 30
        while self.ctl("endpoint", "health", check=False).returncode != 0:
            assert time.monotonic() < deadline, (self.directory / "cp1.log").read_text()[-2000:]
            time.sleep(0.2)

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.wait(10)
        self.running.clear()

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = [str(self.binaries / "etcdctl"), "--endpoints", ",".join(self.clients.values())]
        argv += ["--cacert", f"{self.pki}/ca.crt", "--cert", f"{self.pki}/healthcheck-client.crt"]
        argv += ["--key", f"{self.pki}/healthcheck-client.key", *words]
        return subprocess.run(argv, capture_output=True, text=True, check=check, timeout=30)

    def config(self, **changes: Any) -> Config:
        """The snapshot job's configuration for the first member."""
        data = {
            "cluster": "censuschat-a",
            "member": "cp1",
            "directory": str(self.directory / "backups"),
            "keep": 2,
            "endpoint": self.clients["cp1"],
            "ca_file": f"{self.pki}/ca.crt",
            "cert_file": f"{self.pki}/healthcheck-client.crt",
            "key_file": f"{self.pki}/healthcheck-client.key",
            "metrics": str(self.directory / "snapshot.prom"),
            "targets": [],
            **changes,
        }
        return Config.of(data)


@contextlib.contextmanager
def members(binaries: Path, pki: Path, directory: Path, count: int) -> Iterator[Members]:
    cluster = Members(binaries, pki, directory, count)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_snapshots_are_proven_kept_by_count_and_reported(binaries: Path, pki: Path, tmp_path: Path) -> None:
    with members(binaries, pki, tmp_path, 1) as cluster:
        lease = cluster.ctl("lease", "grant", "600").stdout.split()[1]
        # A key with a lease: Kubernetes' events have one each.
        cluster.ctl("put", "/registry/events/a", "x", f"--lease={lease}")
        cluster.ctl("put", "/registry/pods/a", "x")
        for _ in range(3):
            assert "restored as proof" in snapshots.job(cluster.config())
            time.sleep(1.1)
        backups = tmp_path / "backups"
        kept = sorted(backups.glob("*.db"))
        assert len(kept) == 2
        assert {path.stat().st_mode & 0o777 for path in [*kept, *backups.glob("*.json")]} == {0o600}
        assert backups.stat().st_mode & 0o777 == 0o700
        described = json.loads(kept[-1].with_name(f"{kept[-1].name}.json").read_text())
        assert (described["keys"], described["proven"]) == (2, True)
        assert described["sha256"] == common.sha256_of(kept[-1])
        assert not list(backups.glob(".partial*"))
        metrics = (tmp_path / "snapshot.prom").read_text()
        assert 'last_run_success{cluster="censuschat-a",member="cp1"} 1' in metrics
        assert 'keys{cluster="censuschat-a",member="cp1"} 2' in metrics
    with pytest.raises(UpkeepError, match="etcd does not answer at"):
        snapshots.job(cluster.config())
    assert 'last_run_success{cluster="censuschat-a",member="cp1"} 0' in (tmp_path / "snapshot.prom").read_text()
    assert sorted(backups.glob("*.db")) == kept, "a failed run took older snapshots away"


def test_a_damaged_snapshot_is_no_backup(binaries: Path, pki: Path, tmp_path: Path) -> None:
    with members(binaries, pki, tmp_path, 1) as cluster:
        cluster.ctl("put", "/registry/pods/a", "x" * 5000)
        taken = snapshots.take(_ready(cluster.config()))
    whole = tmp_path / "backups" / taken.name
    damaged = tmp_path / "damaged.db"
    content = bytearray(whole.read_bytes())
    where = content.index(b"x" * 100)
    content[where : where + 4] = b"yyyy"
    damaged.write_bytes(content)
    with pytest.raises(UpkeepError, match="cannot be restored, so it is no backup"):
        snapshots.prove(damaged, tmp_path / "scratch")
    damaged.write_bytes(whole.read_bytes()[:4096])
    with pytest.raises(UpkeepError, match="is not a snapshot that can be read"):
        snapshots.prove(damaged, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def _ready(config: Config) -> Config:
    config.directory.mkdir(mode=0o700)
    return config


def test_all_members_begin_anew_from_one_snapshot(
    binaries: Path, pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with members(binaries, pki, tmp_path, 3) as cluster:
        cluster.ctl("put", "before", "kept")
        taken = snapshots.take(_ready(cluster.config()))
        cluster.ctl("put", "after", "lost")
        cluster.stop()
        tokens = set()
        for name in cluster.peers:
            snapshot = tmp_path / "backups" / taken.name
            wanted = Wanted(name, cluster.peers, snapshot, taken.sha256, "trial1")
            tokens.add(wanted.token)
            monkeypatch.setattr(restore, "DATA", tmp_path / name)
            monkeypatch.setattr(restore, "ASIDE", tmp_path / f"aside-{name}")
            restore.put_back(wanted)
            # An interrupted run repeats this; what was there before the restore stays kept.
            restore.put_back(wanted)
            assert (tmp_path / name / f"before-{wanted.token}" / "member/snap/db").is_file()
            assert restore.observe().state == restore.State(wanted.token, restored=True)
        assert len(tokens) == 1
        cluster.start()
        found = json.loads(cluster.ctl("get", "", "--prefix", "-w", "json").stdout)
        assert [kv["key"] for kv in found["kvs"]] == ["YmVmb3Jl"]
        assert found["header"]["revision"] > restore.BUMP
        # A watch from before the restore is told that it missed something.
        watch = cluster.ctl("watch", "before", "--rev=3", check=False)
        assert "compacted" in watch.stdout + watch.stderr
        listed = json.loads(cluster.ctl("member", "list", "-w", "json").stdout)
        assert {member["name"] for member in listed["members"]} == set(cluster.peers)


def test_control_planes_take_turns(binaries: Path, pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_pods, "PKI", pki.parent)
    with members(binaries, pki, tmp_path, 1) as cluster:
        late = pytest.raises(UpkeepError, match="another control plane holds the lock")
        with static_pods.turn(10.0, cluster.clients["cp1"]), late, static_pods.turn(1.0, cluster.clients["cp1"]):
            pytest.fail("two had the turn at once")
        with static_pods.turn(10.0, cluster.clients["cp1"]):
            pass


def test_a_member_without_keys_is_empty(binaries: Path, pki: Path, tmp_path: Path) -> None:
    with members(binaries, pki, tmp_path, 1) as cluster:
        cluster.stop()
        assert membership.is_empty(tmp_path / "cp1"), "a member that was only started holds files, but no keys"
        cluster.start()
        cluster.ctl("put", "a", "b")
        time.sleep(0.5)  # etcd writes its database every 100 ms; until then a key is in its log only
        cluster.stop()
        assert not membership.is_empty(tmp_path / "cp1")
    shutil.rmtree(tmp_path / "cp1")
    assert membership.is_empty(tmp_path / "cp1")
