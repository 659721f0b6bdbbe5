"""Upkeep of a control plane: what goes, what a receiver takes, which certificates are due, which requests pass."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep import certificates, offsite, receiver, requests
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.certificates import (
    AUTHORITY,
    KUBELET,
    LEAF,
    Certificate,
    Policy,
)
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import Metric, UpkeepError, render_metrics
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.receiver import Sender
from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.snapshots import expired, name_of, taken_at

DAY = 86400.0
NOW = 1_800_000_000.0
POLICY = Policy(renew_days=30, authority_days=365, kubelet_days=14)


def test_only_our_oldest_snapshots_go_member_by_member() -> None:
    names = [name_of("censuschat-a", m, f"2026111{d}T020000Z") for m in ("cp1", "cp2") for d in range(4)]
    kept_by_hand = ["before-upgrade.db", "censuschat-a_cp1_20261110T020000Z.db.json"]
    assert expired([*names, *kept_by_hand], 3) == [names[0], names[4]]
    assert expired(names, 9) == []
    # A retention of nothing would delete the snapshot that was just made.
    assert expired(names[:1], 0) == []


def test_a_name_says_when_in_utc() -> None:
    assert taken_at("censuschat-a_cp1_20261121T143000Z.db") == 1795271400
    with pytest.raises(UpkeepError, match="is no name for a snapshot"):
        name_of("Über", "cp1", "20261121T143000Z")


def test_metrics_of_one_name_stand_together_and_are_escaped() -> None:
    metrics = [Metric("a", "A.", 1, {"t": 'x"\\'}), Metric("b", "B.", 2.5), Metric("a", "A.", 0, {"t": "y"})]
    assert render_metrics(metrics) == (
        '# HELP a A.\n# TYPE a gauge\na{t="x\\"\\\\"} 1\na{t="y"} 0\n# HELP b B.\n# TYPE b gauge\nb 2.5\n'
    )


# ---- copies ----


def sender(directory: Path, **changes: Any) -> Sender:
    base = Sender("cp1", "censuschat-a", directory, keep=2, max_bytes=1000, max_age_s=3600)
    return dataclasses.replace(base, **changes)


def wish(name: str = "censuschat-a_cp1_20261121T143000Z.db", content: bytes = b"x" * 10) -> str:
    return f"take {name} {len(content)} {hashlib.sha256(content).hexdigest()}"


def test_receiver_takes_keeps_by_count_and_never_replaces(tmp_path: Path) -> None:
    me = sender(tmp_path)
    for day in (1, 2, 3):
        content = bytes([day]) * 100
        name = f"censuschat-a_cp1_2026112{day}T143000Z.db"
        said = receiver.take(me, receiver.offer_of(wish(name, content), me), io.BytesIO(content))
        assert said == f"taken {hashlib.sha256(content).hexdigest()}"
    kept = sorted(path.name for path in tmp_path.glob("*.db"))
    assert kept == ["censuschat-a_cp1_20261122T143000Z.db", "censuschat-a_cp1_20261123T143000Z.db"]
    assert (tmp_path / kept[0]).stat().st_mode & 0o777 == 0o600
    again = wish(kept[1], bytes([3]) * 100)
    assert "it was here" in receiver.take(me, receiver.offer_of(again, me), io.BytesIO(b""))
    with pytest.raises(UpkeepError, match="already here with other content"):
        receiver.take(me, receiver.offer_of(wish(kept[1], b"other"), me), io.BytesIO(b"other"))
    assert (tmp_path / kept[1]).read_bytes() == bytes([3]) * 100


@pytest.mark.parametrize(("stream", "sentence"), [(b"x" * 9, "ended 1 bytes early"), (b"y" * 10, "another SHA-256")])
def test_receiver_keeps_nothing_that_arrived_wrong(tmp_path: Path, stream: bytes, sentence: str) -> None:
    me = sender(tmp_path)
    with pytest.raises(UpkeepError, match=sentence):
        receiver.take(me, receiver.offer_of(wish(), me), io.BytesIO(stream))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("", "takes snapshots and does nothing else"),
        ("sh -c id", "takes snapshots and does nothing else"),
        (wish("../../etc/passwd"), "is not the name of a snapshot"),
        (wish("censuschat-a_cp2_20261121T143000Z.db"), "of censuschat-a's member cp1"),
        (wish(content=b"x" * 1001), "one copy may have 1000"),
        ("take censuschat-a_cp1_20261121T143000Z.db 10 zz", "announced with its bytes"),
    ],
)
def test_receiver_refuses(tmp_path: Path, asked: str, sentence: str) -> None:
    with pytest.raises(UpkeepError, match=sentence):
        receiver.offer_of(asked, sender(tmp_path))


def test_receiver_names_who_stopped_sending(tmp_path: Path) -> None:
    fresh, late, never = (sender(tmp_path, name=name) for name in ("fresh", "late", "never"))
    now = taken_at("censuschat-a_fresh_20261121T143000Z.db") + 3000
    metrics, complaints = receiver.judge(
        {
            fresh: ["censuschat-a_fresh_20261121T143000Z.db", "censuschat-a_fresh_20261101T143000Z.db", ".partial"],
            late: ["censuschat-a_late_20261121T123000Z.db"],
            never: [],
        },
        now,
    )
    assert [c[:60] for c in complaints] == [
        "the newest snapshot of censuschat-a from late is 2.8 h old, ",
        "never of censuschat-a never sent a snapshot",
    ]
    counts = {m.labels["member"]: m.value for m in metrics if m.name.endswith("count")}
    assert counts == {"fresh": 2, "late": 1, "never": 0}


@pytest.fixture(name="aws")
def aws_of_moto() -> Iterator[None]:
    with moto.mock_aws():
        yield


@pytest.mark.usefixtures("aws")
def test_a_bucket_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "lab")
    client = boto3.client("s3", region_name="us-west-2")
    client.create_bucket(Bucket="backups", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    path = tmp_path / "censuschat-a_cp1_20261121T143000Z.db"
    path.write_bytes(b"data")
    target = offsite.Target.of(
        {"name": "t", "kind": "s3", "bucket": "backups", "prefix": "etcd/a", "region": "us-west-2"}
    )
    sha256 = hashlib.sha256(b"data").hexdigest()
    offsite.copy_out(target, path, sha256)
    offsite.copy_out(target, path, sha256)
    held = client.get_object(Bucket="backups", Key=f"etcd/a/{path.name}")
    assert (held["Body"].read(), held["ServerSideEncryption"]) == (b"data", "AES256")
    with pytest.raises(UpkeepError, match="no longer what was proven"):
        offsite.copy_out(target, path, "0" * 64)
    path.write_bytes(b"other")
    with pytest.raises(UpkeepError, match="holds something else"):
        offsite.copy_out(target, path, hashlib.sha256(b"other").hexdigest())
    with pytest.raises(UpkeepError, match="bucket does not exist"):
        offsite.copy_out(
            dataclasses.replace(target, bucket="no-such-bucket"), path, hashlib.sha256(b"other").hexdigest()
        )


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"name": "t", "kind": "ftp"}, "kind is one of ssh, s3"),
        ({"name": "t", "kind": "ssh", "host": "h"}, "lacks user, key_file, known_hosts"),
        ({"name": "t", "kind": "s3", "bucket": "backups", "command": "sh"}, "unknown: \\['command'\\]"),
    ],
)
def test_target_that_cannot_be(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UpkeepError, match=sentence):
        offsite.Target.of(data)


# ---- certificates ----


def leaf(name: str, days: float, *holders: str, changed: float = 0.0) -> Certificate:
    return Certificate(name, LEAF, NOW + days * DAY, changed, holders)


def test_nothing_is_due_on_a_young_cluster() -> None:
    young = [leaf("apiserver", 364, "kube-apiserver"), Certificate("ca", AUTHORITY, NOW + 3600 * DAY)]
    assert certificates.plan(young, {"kube-apiserver": 100.0}, POLICY, NOW).empty


def test_due_certificates_are_renewed_and_their_holders_restarted_in_order() -> None:
    found = [
        leaf("apiserver", 29, "kube-apiserver"),
        leaf("admin.conf", 29),
        leaf("etcd-server", 29.9, "etcd"),
        leaf("scheduler.conf", 31, "kube-scheduler"),
    ]
    plan = certificates.plan(found, {}, POLICY, NOW)
    assert plan.renew == ("apiserver", "admin.conf", "etcd-server")
    assert plan.restart == ("etcd", "kube-apiserver")
    assert plan.expired == ()


def test_a_restart_that_an_interrupted_run_left_is_seen() -> None:
    found = [leaf("apiserver", 364, "kube-apiserver", changed=200.0), leaf("etcd-peer", 364, "etcd", changed=50.0)]
    plan = certificates.plan(found, {"kube-apiserver": 100.0, "etcd": 100.0}, POLICY, NOW)
    assert (plan.renew, plan.restart) == ((), ("kube-apiserver",))


def test_what_has_expired_may_be_restarted_without_asking_the_others() -> None:
    plan = certificates.plan([leaf("apiserver", -1, "kube-apiserver"), leaf("etcd-peer", 3, "etcd")], {}, POLICY, NOW)
    assert plan.restart == ("etcd", "kube-apiserver")
    assert plan.expired == ("kube-apiserver",)


def test_authorities_and_kubelets_are_for_people() -> None:
    found = [
        Certificate("ca", AUTHORITY, NOW + 100 * DAY),
        Certificate("kubelet-serving", KUBELET, NOW + 3 * DAY),
        Certificate("kubelet-client", KUBELET, NOW - DAY),
    ]
    worker = certificates.plan(found, {}, POLICY, NOW, can_sign=False)
    assert worker.empty
    assert [alarm.split(":")[0] for alarm in worker.alarms] == [
        "the authority ca lasts 100 days more and is not renewed by itself",
        "kubelet-serving lasts 3 days more and was not rotated by the kubelet",
        "kubelet-client expired",
    ]
    control_plane = certificates.plan(found, {}, POLICY, NOW)
    assert control_plane.reissue_kubelet and len(control_plane.alarms) == 2


def test_a_certificate_asked_for_by_name() -> None:
    found = [leaf("apiserver", 300, "kube-apiserver"), Certificate("ca", AUTHORITY, NOW + 3600 * DAY)]
    assert certificates.plan(found, {}, POLICY, NOW, also=["apiserver"]).renew == ("apiserver",)
    with pytest.raises(UpkeepError, match="ca is not a certificate that kubeadm renews here"):
        certificates.plan(found, {}, POLICY, NOW, also=["ca"])


def test_openssl_date() -> None:
    assert certificates.not_after("notAfter=Nov 21 14:30:56 2026 GMT\n") == 1795271456
    assert certificates.not_after("notAfter=Nov  1 04:30:56 2026 GMT\n") == 1793507456


# ---- requests for serving certificates ----

ASKED = requests.Request(
    name="csr-1",
    user="system:node:n1",
    groups=frozenset({"system:nodes", "system:authenticated"}),
    usages=frozenset({"digital signature", "server auth"}),
    common_name="system:node:n1",
    organisations=("system:nodes",),
    sans=("n1", "10.77.1.11"),
)
NODES = {"n1": frozenset({"n1", "10.77.1.11"}), "n2": frozenset({"n2", "10.77.1.12"})}


def test_a_kubelets_own_names_are_approved() -> None:
    assert requests.judge(ASKED, NODES) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"user": "mallory"}, "mallory is no kubelet"),
        ({"groups": frozenset({"system:authenticated"})}, "is no kubelet"),
        ({"user": "system:node:n9"}, "there is no node n9"),
        ({"common_name": "system:node:n2"}, "asks for a certificate of system:node:n2"),
        ({"organisations": ("system:masters", "system:nodes")}, "asks for a certificate of"),
        ({"usages": frozenset({"client auth", "server auth"})}, "asks for the uses client auth, server auth"),
        ({"sans": ("n1", "10.77.1.12")}, "the names of others: 10.77.1.12"),
        ({"sans": ("n1", "kubernetes.default.svc")}, "the names of others: kubernetes.default.svc"),
        ({"sans": ()}, "a certificate without a name"),
    ],
)
def test_any_other_request_is_left_to_a_person(changes: dict[str, Any], why: str) -> None:
    assert why in requests.judge(dataclasses.replace(ASKED, **changes), NODES)


def test_only_undecided_requests_of_the_serving_signer_are_read() -> None:
    mine = {"spec": {"signerName": requests.SIGNER}, "status": {}}
    decided = {"spec": {"signerName": requests.SIGNER}, "status": {"conditions": [{"type": "Approved"}]}}
    client = {"spec": {"signerName": "kubernetes.io/kube-apiserver-client-kubelet"}}
    assert requests.pending(json.loads(json.dumps([mine, decided, client]))) == [mine]
