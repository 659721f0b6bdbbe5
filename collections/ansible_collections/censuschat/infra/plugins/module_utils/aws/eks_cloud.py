# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The EKS API as the planner sees it: observe a cluster, make a call, wait until it took effect."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .eks_plan import AccessEntry, Action, Cluster, EksError, NodeGroup, Observed, Policy, Taint

POLL_S = 5.0
"""Seconds between two looks at something that EKS is changing; that takes it minutes."""


def observe(client: Any, name: str) -> Observed:
    """Everything the planner compares. A cluster that is not there observes empty. Raises botocore's ClientError."""
    try:
        found = client.describe_cluster(name=name)["cluster"]
    except client.exceptions.ResourceNotFoundException:
        return Observed()
    cluster = cluster_of(found)
    entries: tuple[AccessEntry, ...] = ()
    if cluster.authentication_mode != "CONFIG_MAP":
        entries = tuple(
            _entry(client, name, arn) for arn in _pages(client, "list_access_entries", "accessEntries", name)
        )
    groups = tuple(
        group_of(client.describe_nodegroup(clusterName=name, nodegroupName=group)["nodegroup"])
        for group in _pages(client, "list_nodegroups", "nodegroups", name)
    )
    return Observed(cluster, entries, groups)


def _pages(client: Any, call: str, key: str, name: str, **more: Any) -> list[Any]:
    found = []
    for page in client.get_paginator(call).paginate(clusterName=name, **more):
        found += page[key]
    return found


def _entry(client: Any, cluster: str, arn: str) -> AccessEntry:
    entry = client.describe_access_entry(clusterName=cluster, principalArn=arn)["accessEntry"]
    policies = _pages(client, "list_associated_access_policies", "associatedAccessPolicies", cluster, principalArn=arn)
    return AccessEntry(
        arn,
        entry.get("type", "STANDARD"),
        tuple(entry.get("kubernetesGroups", ())),
        tuple(Policy(p["policyArn"], tuple(p["accessScope"].get("namespaces", ()))) for p in policies),
    )


def cluster_of(found: Mapping[str, Any]) -> Cluster:
    """What ``describe_cluster`` says, as the planner's value."""
    network = found.get("resourcesVpcConfig") or {}
    public = network.get("publicAccessCidrs") or ("0.0.0.0/0",)
    logs = (found.get("logging") or {}).get("clusterLogging") or ()
    keys = [entry["provider"]["keyArn"] for entry in found.get("encryptionConfig") or () if entry.get("provider")]
    return Cluster(
        name=found["name"],
        version=found["version"],
        role_arn=found["roleArn"],
        subnets=tuple(network.get("subnetIds") or ()),
        security_groups=tuple(network.get("securityGroupIds") or ()),
        public_cidrs=tuple(public) if network.get("endpointPublicAccess", True) else (),
        service_cidr=(found.get("kubernetesNetworkConfig") or {}).get("serviceIpv4Cidr"),
        secrets_key_arn=keys[0] if keys else None,
        log_types=tuple(kind for entry in logs if entry.get("enabled") for kind in entry.get("types", ())),
        # A cluster from before access entries has no such field.
        authentication_mode=(found.get("accessConfig") or {}).get("authenticationMode") or "CONFIG_MAP",
        status=found.get("status", "ACTIVE"),
    )


def group_of(found: Mapping[str, Any]) -> NodeGroup:
    """What ``describe_nodegroup`` says, as the planner's value."""
    scaling = found.get("scalingConfig") or {}
    template = found.get("launchTemplate") or {}
    update = found.get("updateConfig") or {}
    named = template.get("name"), template.get("version")
    return NodeGroup(
        name=found["nodegroupName"],
        role_arn=found["nodeRole"],
        subnets=tuple(found.get("subnets") or ()),
        instance_types=tuple(found.get("instanceTypes") or ()),
        minimum=scaling.get("minSize", 0),
        maximum=scaling.get("maxSize", 0),
        desired=scaling.get("desiredSize", 0),
        capacity_type=found.get("capacityType") or "ON_DEMAND",
        ami_type=found.get("amiType") or "",
        disk_gib=found.get("diskSize"),
        launch_template=(named[0] or template.get("id", ""), named[1] or "") if template else None,
        labels=tuple(sorted((found.get("labels") or {}).items())),
        taints=tuple(Taint(t["key"], t.get("value", ""), t["effect"]) for t in found.get("taints") or ()),
        max_unavailable_percent=update.get("maxUnavailablePercentage", 0),
        version=found.get("version"),
        status=found.get("status", "ACTIVE"),
    )


def apply(
    client: Any, cluster: str, action: Action, deadline: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Makes the call and waits until it took effect, until ``deadline`` (time.monotonic, s); raises EksError."""
    answer = getattr(client, action.call)(**action.arguments)
    update = answer.get("update") or {}
    while update.get("status") == "InProgress":
        _pause(action, deadline, sleep)
        more = {} if action.waits == "cluster" else {"nodegroupName": action.waits}
        update = client.describe_update(name=cluster, updateId=update["id"], **more)["update"]
    if update.get("status") in ("Failed", "Cancelled"):
        why = "; ".join(error.get("errorMessage", "") for error in update.get("errors") or ()) or "it gives no reason"
        raise EksError(f"{action.call} of {action.target} ended as {update['status']}: {why}")
    while not settled(client, cluster, action.waits):
        _pause(action, deadline, sleep)


def settled(client: Any, cluster: str, waits: str) -> bool:
    """Whether what an action waits for is active (or, for ``deleted:NAME``, gone); raises EksError when it failed."""
    if not waits:
        return True
    gone = waits.startswith("deleted:")
    name = waits.removeprefix("deleted:")
    try:
        if waits == "cluster":
            status = client.describe_cluster(name=cluster)["cluster"]["status"]
        else:
            group = client.describe_nodegroup(clusterName=cluster, nodegroupName=name)["nodegroup"]
            status = group["status"]
            if status in ("CREATE_FAILED", "DELETE_FAILED", "DEGRADED"):
                issues = (group.get("health") or {}).get("issues") or ()
                why = "; ".join(f"{issue['code']}: {issue['message']}" for issue in issues) or "no reason given"
                raise EksError(f"node group {name} of cluster {cluster} is {status}: {why}")
    except client.exceptions.ResourceNotFoundException:
        return gone
    if status == "FAILED":
        raise EksError(f"cluster {cluster} is FAILED; see its health in the EKS console")
    return bool(status == "ACTIVE") and not gone


def _pause(action: Action, deadline: float, sleep: Callable[[float], None]) -> None:
    if time.monotonic() >= deadline:
        raise EksError(
            f"{action.call} of {action.target} was accepted but has not taken effect in the time given (wait_s); "
            "EKS goes on with it: run this again to wait further"
        )
    sleep(POLL_S)
