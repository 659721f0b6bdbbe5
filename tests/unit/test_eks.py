"""EKS: plans as cases (data/eks.yml), each call as botocore checks it, and the waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.aws import eks_cloud, eks_plan
from botocore.validate import validate_parameters

CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "data/eks.yml").read_text())
CLUSTER = {"name": "c", "version": "1.35", "role_arn": "arn:cluster", "subnets": ["s1", "s2"]}
GROUP = {"role_arn": "arn:node", "subnets": ["s1"], "instance_types": ["m5"], "minimum": 6, "maximum": 50, "desired": 6}
MODEL = boto3.client(
    "eks", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
).meta.service_model


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def cluster(changes: Mapping[str, Any]) -> eks_plan.Cluster:
    values: dict[str, Any] = {**CLUSTER, **changes}
    return eks_plan.Cluster(**tuples(values))


def entry(given: Mapping[str, Any]) -> eks_plan.AccessEntry:
    policies = tuple(eks_plan.Policy(p["arn"], tuple(p.get("namespaces", ()))) for p in given.get("policies", ()))
    return eks_plan.AccessEntry(
        given["principal"], given.get("type", "STANDARD"), tuple(given.get("groups", ())), policies
    )


def group(given: Mapping[str, Any], version: str | None = None) -> eks_plan.NodeGroup:
    values: dict[str, Any] = {"version": version, **GROUP, **given}
    values["taints"] = [eks_plan.Taint(**taint) for taint in values.get("taints", ())]
    values["labels"] = sorted(values.get("labels", {}).items())
    return eks_plan.NodeGroup(**tuples(values))


def planned(case: Mapping[str, Any]) -> list[eks_plan.Action]:
    there = None if case["observed"] is None else cluster(case["observed"])
    observed = eks_plan.Observed(
        there,
        tuple(entry(e) for e in case.get("observed_entries", ())),
        tuple(group(g, version="1.35") for g in case.get("observed_groups", ())),
    )
    desired = eks_plan.Desired(
        cluster(case.get("desired", {})),
        tuple(entry(e) for e in case.get("entries", ())),
        tuple(group(g) for g in case.get("groups", ())),
        tuple(case.get("purge", ())),
    )
    return eks_plan.plan(observed, desired)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_plan(case: dict[str, Any]) -> None:
    if "refused" in case:
        with pytest.raises(eks_plan.EksError, match=case["refused"]):
            planned(case)
        return
    actions = planned(case)
    assert [f"{action.call} {action.target}" for action in actions] == case["expect"]
    if "scaling" in case:
        assert actions[0].arguments["scalingConfig"] == case["scaling"]
    names = {operation.lower(): operation for operation in MODEL.operation_names}
    for action in actions:
        shape = MODEL.operation_model(names[action.call.replace("_", "")]).input_shape
        validate_parameters(dict(action.arguments), shape)


class Client:
    """EKS as far as waiting goes: each answer once, in its order."""

    class exceptions:
        ResourceNotFoundException = LookupError

    def __init__(self, updates: list[dict[str, Any]], groups: list[dict[str, Any] | None]) -> None:
        self.updates, self.groups = iter(updates), iter(groups)

    def update_nodegroup_config(self, **_: Any) -> dict[str, Any]:
        return {"update": next(self.updates)}

    def describe_update(self, **_: Any) -> dict[str, Any]:
        return {"update": next(self.updates)}

    def describe_nodegroup(self, **_: Any) -> dict[str, Any]:
        found = next(self.groups)
        if found is None:
            raise LookupError
        return {"nodegroup": found}


@pytest.fixture
def naps() -> Iterator[list[float]]:
    yield []


CHANGE = eks_plan.Action("update_nodegroup_config", "a", "labels", {}, "a")
RUNNING: dict[str, Any] = {"id": "1", "status": "InProgress"}


def test_waits_for_the_update_and_then_for_the_group(naps: list[float]) -> None:
    client = Client(
        [RUNNING, RUNNING, {"id": "1", "status": "Successful"}], [{"status": "UPDATING"}, {"status": "ACTIVE"}]
    )
    eks_cloud.apply(client, "c", CHANGE, time.monotonic() + 60, naps.append)
    assert naps == [eks_cloud.POLL_S] * 3


def test_a_failed_update_says_why(naps: list[float]) -> None:
    failed = {"id": "1", "status": "Failed", "errors": [{"errorMessage": "PodEvictionFailure: budget x"}]}
    with pytest.raises(eks_plan.EksError, match=r"Failed: PodEvictionFailure: budget x"):
        eks_cloud.apply(Client([RUNNING, failed], []), "c", CHANGE, time.monotonic() + 60, naps.append)


def test_a_group_that_degrades_says_why(naps: list[float]) -> None:
    sick = {"status": "DEGRADED", "health": {"issues": [{"code": "NodeCreationFailure", "message": "no quota"}]}}
    client = Client([{"id": "1", "status": "Successful"}], [sick])
    with pytest.raises(eks_plan.EksError, match="NodeCreationFailure: no quota"):
        eks_cloud.apply(client, "c", CHANGE, time.monotonic() + 60, naps.append)


def test_the_wait_ends(naps: list[float]) -> None:
    with pytest.raises(eks_plan.EksError, match="run this again to wait further"):
        eks_cloud.apply(Client([RUNNING, RUNNING], []), "c", CHANGE, time.monotonic() - 1, naps.append)


def test_a_group_to_be_removed_is_waited_for_until_it_is_gone() -> None:
    client = Client([], [{"status": "DELETING"}, None])
    assert not eks_cloud.settled(client, "c", "deleted:a")
    assert eks_cloud.settled(client, "c", "deleted:a")


def test_a_cluster_without_a_public_address_has_no_public_networks() -> None:
    found = {"name": "c", "version": "1.35", "roleArn": "r", "resourcesVpcConfig": {"endpointPublicAccess": False}}
    assert eks_cloud.cluster_of(found).public_cidrs == ()
    assert eks_cloud.cluster_of({**found, "resourcesVpcConfig": {}}).public_cidrs == ("0.0.0.0/0",)
