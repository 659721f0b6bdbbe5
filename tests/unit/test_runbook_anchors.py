"""Anchors: files, and S3 with object lock (moto's: it proves the requests, and that locked versions are not deleted;
not AWS's own clock, its permissions, or how long anything lasts)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from runbooks import anchors, evidence, keys
from runbooks.anchors import Anchoring, FileAnchor, Head, Unanchored
from runbooks.errors import Problem
from runbooks.journal import Journal

START: dict[str, Any] = {
    "runbook": "paint",
    "environment": "unit",
    "inventory": "/i",
    "parameters": {},
    "steps": ["look"],
}
DAYS = 30


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "unit",
            "AWS_SECRET_ACCESS_KEY": "unit",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """A bucket with object lock, and a client."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    name = f"unit-{time.monotonic_ns()}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    return name, client


def run(journal: Journal, name: str, fence: int) -> None:
    journal.begin(name, START, fence=fence)
    journal.append("step_started", "look", {})
    journal.append("step_finished", "look", {"outcome": "ok", "elapsed_s": 0.1})
    journal.finish("succeeded")


def judge(journal: Journal, where: list[anchors.Anchor]) -> evidence.Verdict:
    trusted = {keys.public(keys.journal_key()): "here"}
    return evidence.verify(journal.location, journal.environment, trusted, where)


def test_run_is_anchored_under_a_lock_and_what_is_anchored_stays(tmp_path: Path, bucket: tuple[str, Any]) -> None:
    name, client = bucket
    said = {"s3": f"{name}/evidence", "retain_days": DAYS}
    journal = Journal(tmp_path, "unit", anchors=[said])
    run(journal, "r1", 1)
    journal.close()
    key = "evidence/unit/000000000004.json"
    there = client.head_object(Bucket=name, Key=key)
    assert there["ObjectLockMode"] == "COMPLIANCE"
    left = there["ObjectLockRetainUntilDate"] - datetime.now(UTC)
    assert timedelta(days=DAYS - 1) < left <= timedelta(days=DAYS)
    with pytest.raises(ClientError, match="AccessDenied"):
        client.delete_object(Bucket=name, Key=key, VersionId=there["VersionId"])
    verdict = judge(journal, [anchors.named(f"s3://{name}/evidence")])
    assert (verdict.ok, verdict.anchored) == (True, 4)


def test_deleted_and_overwritten_entries_are_found_all_the_same(tmp_path: Path, bucket: tuple[str, Any]) -> None:
    name, client = bucket
    journal = Journal(tmp_path, "unit", anchors=[{"s3": name, "retain_days": DAYS, "mode": "governance"}])
    run(journal, "r1", 1)
    journal.close()
    where = anchors.named(f"s3://{name}")
    key = "unit/000000000004.json"
    client.delete_object(Bucket=name, Key=key)  # A marker only: the version under it stays.
    with pytest.raises(ClientError):
        client.get_object(Bucket=name, Key=key)
    assert judge(journal, [where]).anchored == 4
    client.put_object(Bucket=name, Key=key, Body=b"{}", ChecksumAlgorithm="SHA256")
    verdict = judge(journal, [where])
    assert not verdict.ok
    assert "is not the entry that its name says" in verdict.sentence()


def test_second_branch_of_a_chain_is_refused_by_its_first(tmp_path: Path, bucket: tuple[str, Any]) -> None:
    """Two journals of one environment, as after a restored backup."""
    said = {"s3": f"{bucket[0]}/a", "retain_days": DAYS}
    for place in ("one", "two"):
        journal = Journal(tmp_path / place, "unit", anchors=[said])
        run(journal, "r1", 1)
        journal.close()
    kept = Journal(tmp_path / "two", "unit")
    notes = [record.data["unanchored"] for record in kept.records("r1") if record.kind == "note"]
    kept.close()
    assert len(notes) == 1
    assert "it holds another record" in notes[0]
    assert "the chain forks" in notes[0]
    verdict = judge(kept, [anchors.named(f"s3://{bucket[0]}/a")])
    assert "the chain was written anew or forks" in verdict.sentence()


def test_same_entry_twice_is_no_fault(tmp_path: Path, bucket: tuple[str, Any]) -> None:
    journal = Journal(tmp_path, "unit")
    run(journal, "r1", 1)
    head = Head.of(journal.links()[-1])
    journal.close()
    anchor = anchors.parse({"s3": bucket[0], "retain_days": DAYS})
    anchor.put(head)
    anchor.put(head)
    assert list(anchor.heads("unit")) == [head]
    assert list(anchor.heads("unit", 5)) == list(anchor.heads("other")) == []


@pytest.mark.parametrize(
    "said",
    [
        {"file": "/proc/nowhere/anchor"},
        {"s3": "no-such-bucket/a", "retain_days": DAYS},
        {"s3": "a-bucket/a", "retain_days": DAYS, "endpoint": "http://127.0.0.1:9"},
    ],
)
def test_anchor_that_does_not_work_is_noted_once_and_stops_nothing(
    tmp_path: Path, bucket: tuple[str, Any], said: dict[str, Any]
) -> None:
    good = tmp_path / "good"
    journal = Journal(tmp_path, "unit", anchors=[said, {"file": str(good)}])
    began = time.monotonic()
    for number in (1, 2):
        run(journal, f"r{number}", number)
    assert time.monotonic() - began < 2
    journal.close()
    again = Journal(tmp_path, "unit")
    notes = [record for record in again.records_of("note") if "unanchored" in record.data]
    assert len(notes) == 1
    assert [again.state(name).state for name in again.runs()] == ["succeeded", "succeeded"]
    again.close()
    assert judge(again, [FileAnchor(good)]).ok
    assert not judge(again, [anchors.parse(said)]).ok


def test_bucket_without_object_lock_is_no_anchor(tmp_path: Path, bucket: tuple[str, Any]) -> None:
    name, client = bucket
    client.create_bucket(Bucket=f"{name}-plain")
    journal = Journal(tmp_path, "unit")
    run(journal, "r1", 1)
    head = Head.of(journal.links()[-1])
    journal.close()
    with pytest.raises(Unanchored):
        anchors.parse({"s3": f"{name}-plain", "retain_days": DAYS}).put(head)


def test_slow_anchor_gets_the_newest_head_and_is_not_waited_for() -> None:
    class Slow(FileAnchor):
        def __init__(self) -> None:
            super().__init__(Path("slow"))
            self.got: list[int] = []

        def put(self, head: Head) -> None:
            time.sleep(0.2)
            self.got.append(head.seq)

    slow = Slow()
    anchoring = Anchoring([slow], print)
    began = time.monotonic()
    for seq in range(1, 30):
        anchoring.offer(Head("unit", seq, "", 0.0, "", ""))
        time.sleep(0.001)
    assert time.monotonic() - began < 0.2
    assert anchoring.close()
    assert slow.got[-1] == 29
    assert len(slow.got) < 5
    stuck = Anchoring([slow], print)
    stuck.offer(Head("unit", 1, "", 0.0, "", ""))
    assert not stuck.close(patience_s=0.01)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"file": "a", "s3": "b"},
        {"s3": "b/c"},
        {"s3": "b/c", "retain_days": 0},
        {"s3": "b/c", "retain_days": 1, "mode": "never"},
        {"s3": "b/c", "retain_days": 1, "other": 2},
    ],
)
def test_anchor_that_says_something_else_is_a_problem(said: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        anchors.parse(said)
    assert caught.value.code == "anchor-invalid"
