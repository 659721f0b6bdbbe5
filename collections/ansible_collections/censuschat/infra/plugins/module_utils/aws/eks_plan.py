# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""An EKS cluster: what is wanted, what was observed, and the calls between them. Everything here is pure.

The rules are Amazon's: the control plane moves one minor version at a time and never back, nodes follow it by at most
three minors (Kubernetes' version skew policy), the authentication mode only moves towards the API, and most of a node
group cannot be changed after it is made.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MODES = ("CONFIG_MAP", "API_AND_CONFIG_MAP", "API")
"""Authentication modes in the only direction in which a cluster may move."""
NODE_SKEW = 3
"""Minor versions by which a kubelet may be older than its API server (Kubernetes' version skew policy)."""
AMAZONS_ENTRIES = ("EC2_LINUX", "EC2_WINDOWS", "EC2", "FARGATE_LINUX", "HYBRID_LINUX", "HYPERPOD_LINUX")
"""Types of access entries that let nodes join. EKS makes them with a node group; purging one takes its nodes away."""


class EksError(Exception):
    """The wanted cluster cannot be reached from the observed one; says what, where, why and what to do next."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """An access policy and where it holds: in the whole cluster, or in the named namespaces."""

    arn: str
    namespaces: tuple[str, ...] = ()

    @property
    def scope(self) -> dict[str, Any]:
        if self.namespaces:
            return {"type": "namespace", "namespaces": list(self.namespaces)}
        return {"type": "cluster"}


@dataclasses.dataclass(frozen=True)
class AccessEntry:
    """Who may come in, with which groups and policies."""

    principal: str
    type: str = "STANDARD"
    groups: tuple[str, ...] = ()
    policies: tuple[Policy, ...] = ()


@dataclasses.dataclass(frozen=True)
class Taint:
    key: str
    value: str
    effect: str


@dataclasses.dataclass(frozen=True)
class NodeGroup:
    """A managed node group. Disk in GiB. ``desired`` is what it starts with; afterwards the autoscaler owns it."""

    name: str
    role_arn: str
    subnets: tuple[str, ...]
    instance_types: tuple[str, ...]
    minimum: int
    maximum: int
    desired: int
    capacity_type: str = "ON_DEMAND"
    ami_type: str = "AL2023_x86_64_STANDARD"
    disk_gib: int | None = None
    launch_template: tuple[str, str] | None = None
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[Taint, ...] = ()
    max_unavailable_percent: int = 25
    version: str | None = None
    status: str = "ACTIVE"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A control plane. An empty ``public_cidrs`` means that its API has no public address."""

    name: str
    version: str
    role_arn: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...] = ()
    public_cidrs: tuple[str, ...] = ()
    service_cidr: str | None = None
    secrets_key_arn: str | None = None
    log_types: tuple[str, ...] = ()
    authentication_mode: str = "API"
    status: str = "ACTIVE"


@dataclasses.dataclass(frozen=True)
class Desired:
    cluster: Cluster
    access_entries: tuple[AccessEntry, ...] = ()
    node_groups: tuple[NodeGroup, ...] = ()
    purge: tuple[str, ...] = ()
    """Which lists are complete: what they do not name is removed (``access_entries``, ``node_groups``)."""


@dataclasses.dataclass(frozen=True)
class Observed:
    cluster: Cluster | None = None
    access_entries: tuple[AccessEntry, ...] = ()
    node_groups: tuple[NodeGroup, ...] = ()


@dataclasses.dataclass(frozen=True)
class Action:
    """One call of the EKS API. ``waits`` names what must be active again before the next: cluster or a node group."""

    call: str
    target: str
    detail: str
    arguments: Mapping[str, Any]
    waits: str = ""


def plan(observed: Observed, desired: Desired) -> list[Action]:
    """The calls that take ``observed`` to ``desired``, in their order; raises EksError when there is no way."""
    _check(desired)
    actions = _cluster(observed.cluster, desired.cluster)
    actions += _entries(observed.access_entries, desired)
    actions += _groups(observed, desired)
    return actions


def minor(version: str) -> int:
    """The minor of a version such as 1.35; raises EksError."""
    found = re.fullmatch(r"1\.(\d+)", version)
    if not found:
        raise EksError(f"{version!r} is not a Kubernetes version as EKS names them; write it like '1.35'")
    return int(found.group(1))


def _check(desired: Desired) -> None:
    minor(desired.cluster.version)
    for what, names in (
        ("access_entries names the principal", [entry.principal for entry in desired.access_entries]),
        ("node_groups has the name", [group.name for group in desired.node_groups]),
    ):
        twice = _twice(names)
        if twice:
            raise EksError(f"{what} {twice} twice; merge the two")
    for entry in desired.access_entries:
        twice = _twice(policy.arn for policy in entry.policies)
        if twice:
            raise EksError(f"access entry {entry.principal} has the policy {twice} twice; merge their namespaces")
    for group in desired.node_groups:
        if not group.minimum <= group.desired <= group.maximum:
            raise EksError(
                f"node group {group.name}: min_size {group.minimum} <= desired_size {group.desired} <= max_size "
                f"{group.maximum} does not hold; correct the three sizes"
            )
        if group.launch_template and group.disk_gib:
            raise EksError(
                f"node group {group.name}: the disk of a group with a launch template is the template's; "
                "remove disk_gib or launch_template"
            )


def _twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _public(cluster: Cluster) -> dict[str, Any]:
    access: dict[str, Any] = {"endpointPrivateAccess": True, "endpointPublicAccess": bool(cluster.public_cidrs)}
    if cluster.public_cidrs:
        access["publicAccessCidrs"] = list(cluster.public_cidrs)
    return access


def _logging(cluster: Cluster) -> dict[str, Any]:
    every = ("api", "audit", "authenticator", "controllerManager", "scheduler")
    off = [kind for kind in every if kind not in cluster.log_types]
    wanted = []
    if cluster.log_types:
        wanted.append({"types": sorted(cluster.log_types), "enabled": True})
    if off:
        wanted.append({"types": off, "enabled": False})
    return {"clusterLogging": wanted}


def _cluster(there: Cluster | None, wanted: Cluster) -> list[Action]:
    name = wanted.name
    if there is None:
        arguments: dict[str, Any] = {
            "name": name,
            "version": wanted.version,
            "roleArn": wanted.role_arn,
            "resourcesVpcConfig": {
                "subnetIds": list(wanted.subnets),
                "securityGroupIds": list(wanted.security_groups),
                **_public(wanted),
            },
            "logging": _logging(wanted),
            # Who may come in is what access_entries says, not who happened to run the play.
            "accessConfig": {
                "authenticationMode": wanted.authentication_mode,
                "bootstrapClusterCreatorAdminPermissions": False,
            },
        }
        if wanted.service_cidr:
            arguments["kubernetesNetworkConfig"] = {"serviceIpv4Cidr": wanted.service_cidr}
        if wanted.secrets_key_arn:
            arguments["encryptionConfig"] = [{"resources": ["secrets"], "provider": {"keyArn": wanted.secrets_key_arn}}]
        return [Action("create_cluster", name, f"Kubernetes {wanted.version}", arguments, "cluster")]

    if there.status not in ("ACTIVE", "UPDATING", "CREATING"):
        raise EksError(f"cluster {name} is {there.status}; see its health in the EKS console, then run this again")
    for what, is_now, should in (
        ("role_arn", there.role_arn, wanted.role_arn),
        ("service_cidr", there.service_cidr, wanted.service_cidr or there.service_cidr),
        ("encryption key of secrets", there.secrets_key_arn, wanted.secrets_key_arn or there.secrets_key_arn),
    ):
        # Envelope encryption can be added later, by its own irreversible call, which an operator should make knowingly.
        if is_now != should:
            raise EksError(
                f"cluster {name}: its {what} is {is_now}, {should} is wanted, and EKS does not change it in place; "
                f"set it to {is_now}, or make a new cluster beside this one and move to it"
            )
    actions = []

    def update(what: str, detail: str, arguments: dict[str, Any]) -> None:
        # EKS takes one kind of change a call, and one call at a time.
        actions.append(Action("update_cluster_config", name, detail, {"name": name, what: arguments}, "cluster"))

    if set(there.subnets) != set(wanted.subnets) or set(there.security_groups) != set(wanted.security_groups):
        subnets = {"subnetIds": list(wanted.subnets), "securityGroupIds": list(wanted.security_groups)}
        update("resourcesVpcConfig", "subnets and security groups", subnets)
    if set(there.public_cidrs) != set(wanted.public_cidrs):
        said = ", ".join(wanted.public_cidrs) or "none"
        update("resourcesVpcConfig", f"public access to the API: {said}", _public(wanted))
    if set(there.log_types) != set(wanted.log_types):
        update("logging", f"control plane logs: {', '.join(sorted(wanted.log_types)) or 'none'}", _logging(wanted))
    if there.authentication_mode != wanted.authentication_mode:
        now, then = MODES.index(there.authentication_mode), MODES.index(wanted.authentication_mode)
        if then < now:
            raise EksError(
                f"cluster {name}: its authentication mode is {there.authentication_mode} and cannot go back to "
                f"{wanted.authentication_mode}; set authentication_mode to {there.authentication_mode}"
            )
        for mode in MODES[now + 1 : then + 1]:
            update("accessConfig", f"authentication mode {mode}", {"authenticationMode": mode})
    actions += _version(there, wanted)
    return actions


def _version(there: Cluster, wanted: Cluster) -> list[Action]:
    now, then = minor(there.version), minor(wanted.version)
    if then == now:
        return []
    if then < now:
        raise EksError(
            f"cluster {wanted.name} runs Kubernetes {there.version}; EKS does not go back to {wanted.version}; "
            f"set version to {there.version}"
        )
    if then > now + 1:
        raise EksError(
            f"cluster {wanted.name} runs Kubernetes {there.version}; EKS goes one minor at a time; "
            f"set version to 1.{now + 1} first, not {wanted.version}"
        )
    arguments = {"name": wanted.name, "version": wanted.version}
    detail = f"Kubernetes {there.version} to {wanted.version}"
    return [Action("update_cluster_version", wanted.name, detail, arguments, "cluster")]


def _entries(there: Sequence[AccessEntry], desired: Desired) -> list[Action]:
    cluster = desired.cluster.name
    known = {entry.principal: entry for entry in there}
    actions = []

    def add(call: str, principal: str, detail: str, **more: Any) -> None:
        actions.append(Action(call, principal, detail, {"clusterName": cluster, "principalArn": principal, **more}))

    for wanted in desired.access_entries:
        have = known.get(wanted.principal)
        if have is not None and have.type != wanted.type:
            raise EksError(
                f"access entry {wanted.principal} of cluster {cluster} is of type {have.type} and EKS does not change "
                f"it to {wanted.type}; delete the entry first, when nobody needs it"
            )
        if have is None:
            more = {"type": wanted.type}
            groups: dict[str, Any] = {"kubernetesGroups": list(wanted.groups)} if wanted.groups else {}
            add("create_access_entry", wanted.principal, ", ".join(wanted.groups) or wanted.type, **more, **groups)
        elif set(have.groups) != set(wanted.groups):
            listed = sorted(wanted.groups)
            said = f"groups {', '.join(listed) or 'none'}"
            add("update_access_entry", wanted.principal, said, kubernetesGroups=listed)
        holds = {policy.arn: policy for policy in have.policies} if have else {}
        for policy in wanted.policies:
            held = holds.pop(policy.arn, None)
            if held is None or set(held.namespaces) != set(policy.namespaces):
                where = ", ".join(policy.namespaces) or "the whole cluster"
                add(
                    "associate_access_policy",
                    wanted.principal,
                    f"{_short(policy.arn)} in {where}",
                    policyArn=policy.arn,
                    accessScope=policy.scope,
                )
        for arn in holds:
            add("disassociate_access_policy", wanted.principal, _short(arn), policyArn=arn)
    if "access_entries" in desired.purge:
        named = {entry.principal for entry in desired.access_entries}
        for entry in there:
            if (
                entry.principal not in named
                and entry.type not in AMAZONS_ENTRIES
                and "/aws-service-role/" not in (entry.principal)
            ):
                add("delete_access_entry", entry.principal, "not in access_entries")
    return actions


def _short(arn: str) -> str:
    return arn.rpartition("/")[2]


#: Attribute of a node group -> its option, for what EKS fixes when the group is made.
FIXED = {
    "role_arn": "role_arn",
    "subnets": "subnets",
    "instance_types": "instance_types",
    "capacity_type": "capacity_type",
    "ami_type": "ami_type",
    "disk_gib": "disk_gib",
}


def _groups(observed: Observed, desired: Desired) -> list[Action]:
    cluster = desired.cluster
    known = {group.name: group for group in observed.node_groups}
    actions = []
    for wanted in desired.node_groups:
        if not wanted.launch_template:
            _goes_with(cluster, wanted)
        have = known.pop(wanted.name, None)
        actions += _create_group(cluster, wanted) if have is None else _change_group(cluster, have, wanted)
    if "node_groups" in desired.purge:
        for name in known:
            arguments = {"clusterName": cluster.name, "nodegroupName": name}
            actions.append(Action("delete_nodegroup", name, "not in node_groups", arguments, f"deleted:{name}"))
    return actions


def _create_group(cluster: Cluster, wanted: NodeGroup) -> list[Action]:
    arguments: dict[str, Any] = {
        "clusterName": cluster.name,
        "nodegroupName": wanted.name,
        "nodeRole": wanted.role_arn,
        "subnets": list(wanted.subnets),
        "scalingConfig": {"minSize": wanted.minimum, "maxSize": wanted.maximum, "desiredSize": wanted.desired},
        "capacityType": wanted.capacity_type,
        "labels": dict(wanted.labels),
        "taints": [dataclasses.asdict(taint) for taint in wanted.taints],
        "updateConfig": {"maxUnavailablePercentage": wanted.max_unavailable_percent},
        "nodeRepairConfig": {"enabled": True},
    }
    if wanted.instance_types:
        arguments["instanceTypes"] = list(wanted.instance_types)
    if wanted.launch_template:
        name, version = wanted.launch_template
        arguments["launchTemplate"] = {"name": name, "version": version}
    else:
        arguments["amiType"] = wanted.ami_type
        arguments["version"] = wanted.version or cluster.version
        if wanted.disk_gib:
            arguments["diskSize"] = wanted.disk_gib
    said = f"{wanted.minimum} to {wanted.maximum} {wanted.capacity_type.lower()} nodes"
    return [Action("create_nodegroup", wanted.name, said, arguments, wanted.name)]


def _change_group(cluster: Cluster, have: NodeGroup, wanted: NodeGroup) -> list[Action]:
    where = f"node group {wanted.name} of cluster {cluster.name}"
    if have.status in ("CREATE_FAILED", "DELETE_FAILED", "DELETING"):
        raise EksError(f"{where} is {have.status}; see its health in the EKS console, remove it, then run this again")
    for attribute, option in FIXED.items():
        is_now, should = getattr(have, attribute), getattr(wanted, attribute)
        if attribute == "disk_gib" and should is None:
            continue
        if wanted.launch_template and attribute in ("ami_type", "disk_gib"):
            continue
        if attribute == "instance_types" and not should:
            continue
        if (set(is_now) != set(should)) if isinstance(should, tuple) else is_now != should:
            raise EksError(
                f"{where}: {option} is {_said(is_now)}, {_said(should)} is wanted, and EKS does not change it in "
                "place; add a group of another name with it, drain this one, then remove it"
            )
    if bool(have.launch_template) != bool(wanted.launch_template):
        raise EksError(
            f"{where}: a launch template can be neither given nor taken away later; add a group of another name"
        )
    actions = []
    change: dict[str, Any] = {}
    said = []
    if (have.minimum, have.maximum) != (wanted.minimum, wanted.maximum):
        size = min(max(have.desired, wanted.minimum), wanted.maximum)
        change["scalingConfig"] = {"minSize": wanted.minimum, "maxSize": wanted.maximum, "desiredSize": size}
        said.append(f"{wanted.minimum} to {wanted.maximum} nodes")
    labels, wanted_labels = dict(have.labels), dict(wanted.labels)
    if labels != wanted_labels:
        changed = {key: value for key, value in wanted_labels.items() if labels.get(key) != value}
        gone = sorted(labels.keys() - wanted_labels.keys())
        change["labels"] = {"addOrUpdateLabels": changed, "removeLabels": gone}
        said.append("labels")
    if set(have.taints) != set(wanted.taints):
        keys = {(taint.key, taint.effect) for taint in wanted.taints}
        gone_taints = [taint for taint in have.taints if (taint.key, taint.effect) not in keys]
        changed_taints = [taint for taint in wanted.taints if taint not in have.taints]
        change["taints"] = {
            "addOrUpdateTaints": [dataclasses.asdict(taint) for taint in changed_taints],
            "removeTaints": [dataclasses.asdict(taint) for taint in gone_taints],
        }
        said.append("taints")
    if have.max_unavailable_percent != wanted.max_unavailable_percent:
        change["updateConfig"] = {"maxUnavailablePercentage": wanted.max_unavailable_percent}
        said.append(f"at most {wanted.max_unavailable_percent} % unavailable in an update")
    names = {"clusterName": cluster.name, "nodegroupName": wanted.name}
    if change:
        detail = "; ".join(said)
        actions.append(Action("update_nodegroup_config", wanted.name, detail, {**names, **change}, wanted.name))
    actions += _group_version(cluster, have, wanted, names)
    return actions


def _group_version(cluster: Cluster, have: NodeGroup, wanted: NodeGroup, names: dict[str, Any]) -> list[Action]:
    if wanted.launch_template:
        if have.launch_template == wanted.launch_template:
            return []
        name, version = wanted.launch_template
        detail = f"launch template {name} version {version}"
        arguments = {**names, "launchTemplate": {"name": name, "version": version}}
        return [Action("update_nodegroup_version", wanted.name, detail, arguments, wanted.name)]
    should = wanted.version or cluster.version
    if have.version is None or have.version == should:
        return []
    if minor(should) < minor(have.version):
        raise EksError(f"node group {wanted.name} runs {have.version}; EKS does not go back to {should}")
    detail = f"Kubernetes {have.version} to {should}"
    return [Action("update_nodegroup_version", wanted.name, detail, {**names, "version": should}, wanted.name)]


def _goes_with(cluster: Cluster, wanted: NodeGroup) -> None:
    """Raises EksError when the group's version breaks Kubernetes' skew policy."""
    should = wanted.version or cluster.version
    behind = minor(cluster.version) - minor(should)
    if behind < 0 or behind > NODE_SKEW:
        raise EksError(
            f"node group {wanted.name}: version {should} does not go with a {cluster.version} control plane (nodes may "
            f"be at most {NODE_SKEW} minors older, never newer); leave its version out to follow the control plane"
        )


def _said(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, tuple) else str(value)
