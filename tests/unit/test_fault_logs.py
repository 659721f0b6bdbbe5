"""What the sweeps count is what the servers' logs say; lines as the servers write them."""

from __future__ import annotations

import base64
import json
from collections import Counter

import pytest

from tests.faults import logs
from tests.faults.logs import Event
from tests.faults.sweep import Trial, compare


def watched(key: str, kind: str | None = None) -> str:
    event = {"kv": {"key": base64.b64encode(key.encode()).decode(), "mod_revision": 7}}
    return json.dumps({"Header": {}, "Events": [{**event, **({"type": kind} if kind else {})}]})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (watched("/censuschat/lab-drill/lease"), ["etcd put lab-drill/lease"]),
        (watched("/censuschat/lab-drill/lease", "DELETE"), ["etcd delete lab-drill/lease"]),
        (watched("/censuschat/lab/epoch"), ["etcd put lab/epoch"]),
        (watched("/censuschat/lab/gates/us-east-1/use1-db1"), []),
        (json.dumps({"Header": {}, "Created": True}), []),
    ],
)
def test_etcd(line: str, expected: list[str]) -> None:
    revision, events = logs._etcd("witness1", line)
    assert [event.key for event in events] == expected
    assert revision == (7 if "mod_revision" in line else 0)


def test_aws() -> None:
    change = (
        "<Change><Action>{}</Action><ResourceRecordSet><Name>app.censuschat.test.</Name></ResourceRecordSet></Change>"
    )
    body = change.format("UPSERT") + change.format("DELETE")
    events = logs._aws(json.dumps({"wall": 5.0, "body": body}))
    assert [(event.wall, event.key) for event in events] == [
        (5.0, "record set app.censuschat.test"),
        (5.0, "record delete app.censuschat.test"),
    ]


def audited(**changed: object) -> str:
    entry = {
        "verb": "patch",
        "requestURI": "/apis/apps/v1/namespaces/a/deployments/b?fieldManager=censuschat-infra",
        "user": {"username": "kubernetes-admin"},
        "userAgent": "censuschat-infra",
        "objectRef": {"resource": "deployments", "namespace": "a", "name": "b"},
        "responseStatus": {"code": 200},
        "requestReceivedTimestamp": "2026-11-21T18:12:41.964341Z",
    }
    return json.dumps({**entry, **changed})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (audited(), ["kubernetes write us-west-2 deployments/a/b"]),
        (audited(verb="delete"), ["kubernetes delete us-west-2 deployments/a/b"]),
        (audited(verb="get"), []),
        (audited(requestURI="/apis/apps/v1/namespaces/a/deployments/b?dryRun=All"), []),
        (audited(responseStatus={"code": 409}), []),
        (audited(user={"username": "system:serviceaccount:kube-system:deployment-controller"}), []),
        (audited(objectRef={"resource": "deployments", "namespace": "a", "name": "b", "subresource": "status"}), []),
    ],
)
def test_kubernetes(line: str, expected: list[str]) -> None:
    assert [event.key for event in logs._audit("us-west-2")(line)] == expected


def journaled(message: str, **more: str) -> str:
    return json.dumps({"MESSAGE": message, "__REALTIME_TIMESTAMP": "1795285185685093", **more})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (journaled("Started", UNIT="censuschat-runbook-drill.service", MESSAGE_ID=logs.STARTED),
         ["service start censuschat-runbook-drill.service"]),
        (journaled("Stopped", UNIT="censuschat-runbook-drill.service", MESSAGE_ID=logs.STOPPED),
         ["service stop censuschat-runbook-drill.service"]),
        (journaled("Starting", UNIT="censuschat-runbook-drill.service", MESSAGE_ID="other"), []),
        (journaled("Started", UNIT="ssh.service", MESSAGE_ID=logs.STARTED), []),
        (journaled('LOG:  statement: CREATE USER "runbook_drill" NOLOGIN'), ["role create runbook_drill"]),
        (journaled('LOG:  statement: DROP USER "runbook_drill"'), ["role drop runbook_drill"]),
        (journaled("LOG:  selected new timeline ID: 7"), ["timeline new"]),
        (journaled("MASTER MODE enabled (user request from 'id=3')"), ["redis master usw2-db1"]),
        (journaled("REPLICAOF 10.77.1.21:6379 enabled (user request from 'id=3')"), ["redis replicaof usw2-db1"]),
    ],
)  # fmt: skip
def test_journal(line: str, expected: list[str]) -> None:
    assert [event.key for event in logs._journal("usw2-db1", line)] == expected


def test_an_effect_that_happened_twice_or_not_at_all_is_counted() -> None:
    unbroken = Counter({"record set a": 1, "file write b": 2, "role create c": 1})
    events = [Event(1.0, "record", "set a"), Event(2.0, "record", "set a"), Event(3.0, "file", "write b")]
    events += [Event(4.0, "file", "write b"), Event(5.0, "file", "write d")]
    trial = Trial(1, "engine", "")
    compare(unbroken, events, trial)
    assert trial.duplicated == {"record set a": 1, "file write d": 1}
    assert trial.missing == {"role create c": 1}
    assert not trial.good
