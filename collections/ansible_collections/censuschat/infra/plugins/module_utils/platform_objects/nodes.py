# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Node autoscaling: Karpenter's pools on EKS, the cluster-autoscaler's settings elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.model import Nodes, Platform
from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.reader import cpu_text, memory_text

Manifest = dict[str, Any]

#: Label and taint of spot nodes: only pods that tolerate it run there.
SPOT_TAINT = ("censuschat.io/spot", "true")


def objects(platform: Platform) -> Iterator[Manifest]:
    """What the node autoscaler that is switched on reads."""
    if platform.on("karpenter"):
        yield from _karpenter(platform.nodes)
    if platform.on("cluster_autoscaler"):
        yield from _cluster_autoscaler(platform.nodes)


def cluster_autoscaler_arguments(nodes: Nodes) -> dict[str, str]:
    """Arguments of the cluster-autoscaler, for its chart's ``extraArgs``."""
    return {
        "expander": "priority",
        "nodes": f"{nodes.minimum}:{nodes.maximum - nodes.spot}:{nodes.on_demand_group}",
        "nodes-spot": f"0:{nodes.spot}:{nodes.spot_group}",
        "max-nodes-total": str(nodes.maximum),
        "new-pod-scale-up-delay": f"{nodes.pending_s}s",
        "scale-down-utilization-threshold": f"{nodes.utilization_percent / 100:g}",
        "scale-down-unneeded-time": f"{nodes.idle_s}s",
        "balance-similar-node-groups": "true",
    }


def _cluster_autoscaler(nodes: Nodes) -> Iterator[Manifest]:
    # The name and the key are the priority expander's own. The spot group comes first for pods that may run there; the
    # others do not tolerate its taint, so for them it is no option.
    text = f"20:\n  - ^{nodes.spot_group}$\n10:\n  - ^{nodes.on_demand_group}$\n"
    yield _config("cluster-autoscaler-priority-expander", {"priorities": text})
    arguments = cluster_autoscaler_arguments(nodes)
    second = arguments.pop("nodes-spot")
    lines = [f"--{name}={value}" for name, value in arguments.items()]
    yield _config("cluster-autoscaler-arguments", {"arguments": "\n".join([*lines, f"--nodes={second}"]) + "\n"})


def _config(name: str, data: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "kube-system"},
        "data": data,
    }


def _karpenter(nodes: Nodes) -> Iterator[Manifest]:
    # Karpenter's pools have no minimum: the floor is a managed node group of the cluster, the pools are what is above.
    yield _node_class(nodes)
    yield _pool(nodes, "censuschat-on-demand", "on-demand", nodes.on_demand)
    yield _pool(nodes, "censuschat-spot", "spot", nodes.spot)


def _node_class(nodes: Nodes) -> Manifest:
    settings = nodes.node_class
    tagged = [{"tags": {"karpenter.sh/discovery": settings.get("cluster_tag", "")}}]

    def disk(device: str, size: str) -> dict[str, Any]:
        ebs = {"volumeSize": size, "volumeType": "gp3", "encrypted": True, "deleteOnTermination": True}
        return {"deviceName": device, "ebs": ebs}

    return {
        "apiVersion": "karpenter.k8s.aws/v1",
        "kind": "EC2NodeClass",
        "metadata": {"name": "censuschat"},
        "spec": {
            "role": settings.get("role", ""),
            "amiSelectorTerms": [{"alias": settings.get("ami_alias", "")}],
            "subnetSelectorTerms": tagged,
            "securityGroupSelectorTerms": tagged,
            "metadataOptions": {"httpEndpoint": "enabled", "httpTokens": "required", "httpPutResponseHopLimit": 1},
            "blockDeviceMappings": [disk("/dev/xvda", nodes.system_disk), disk("/dev/xvdb", nodes.data_disk)],
        },
    }


def _pool(nodes: Nodes, name: str, capacity: str, count: int) -> Manifest:
    requirements = [
        {"key": "karpenter.sh/capacity-type", "operator": "In", "values": [capacity]},
        {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": list(nodes.instance_types)},
        {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]},
    ]
    if nodes.zones:
        requirements.append({"key": "topology.kubernetes.io/zone", "operator": "In", "values": list(nodes.zones)})
    spec: dict[str, Any] = {
        "nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "censuschat"},
        "requirements": requirements,
        "expireAfter": "720h",
    }
    metadata: dict[str, Any] = {"labels": {"censuschat.io/pool": name}}
    if capacity == "spot":
        key, value = SPOT_TAINT
        metadata["labels"][key] = value
        spec["taints"] = [{"key": key, "value": value, "effect": "NoSchedule"}]
    return {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodePool",
        "metadata": {"name": name},
        "spec": {
            "template": {"metadata": metadata, "spec": spec},
            # Karpenter judges by price, not by a threshold of use; it waits as long as is specified.
            "disruption": {
                "consolidationPolicy": "WhenEmptyOrUnderutilized",
                "consolidateAfter": f"{nodes.idle_s}s",
                "budgets": [{"nodes": "10%"}],
            },
            # The count, in what such nodes have: a limit on nodes exists for pools of fixed size only.
            "limits": {"cpu": cpu_text(nodes.cpu * count), "memory": memory_text(nodes.memory * count)},
            "weight": 50 if capacity == "spot" else 10,
        },
    }
