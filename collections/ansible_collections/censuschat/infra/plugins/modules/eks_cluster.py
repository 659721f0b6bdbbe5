#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin glue: observes an EKS cluster, plans, makes the calls, waits for each."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_cluster
short_description: Bring an EKS cluster, its access entries and its managed node groups to their state
version_added: 0.1.0
description:
  - Reads the whole cluster, plans what differs, makes those calls of the EKS API and waits until each took effect.
  - Who may come in is what O(access_entries) says. Whoever makes the cluster gets no rights by that.
  - It never removes a cluster. What EKS cannot change in place (roles, instance types, the service range) is refused
    before anything is touched.
  - A node group's number of nodes belongs to the autoscaler once the group is there. Only its limits are held.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
attributes:
  platform:
    support: full
    platforms: posix
requirements:
  - boto3 >= 1.42
notes:
  - Credentials, profile and endpoint come from where boto3 takes them (environment, files, instance role).
options:
  name:
    description: Name of the cluster.
    type: str
    required: true
  region:
    description: The AWS region.
    type: str
    required: true
  version:
    description: Kubernetes version of the control plane, such as V(1.35). It goes up by one minor at a time.
    type: str
    required: true
  role_arn:
    description: The control plane's IAM role. Fixed when the cluster is made.
    type: str
    required: true
  subnets:
    description: Subnets of the control plane's network interfaces, in at least two zones.
    type: list
    elements: str
    required: true
  security_groups:
    description: Further security groups of the control plane's network interfaces.
    type: list
    elements: str
    default: []
  public_cidrs:
    description: Networks that may reach the API over its public address. Empty means that it has none.
    type: list
    elements: str
    default: []
  service_cidr:
    description: Range of the Services' addresses. Fixed when the cluster is made. EKS chooses one if it is left out.
    type: str
  secrets_key_arn:
    description: KMS key that Secrets are encrypted with. Fixed when the cluster is made.
    type: str
  log_types:
    description: Logs of the control plane that go to CloudWatch.
    type: list
    elements: str
    choices: [api, audit, authenticator, controllerManager, scheduler]
    default: [api, audit, authenticator]
  authentication_mode:
    description: Where EKS looks up who may come in. It only moves towards V(API).
    type: str
    choices: [CONFIG_MAP, API_AND_CONFIG_MAP, API]
    default: API
  access_entries:
    description: Who may come in.
    type: list
    elements: dict
    default: []
    suboptions:
      principal:
        description: ARN of the IAM role or user.
        type: str
        required: true
      type:
        description: What kind of principal it is. EKS makes the entries of its own node groups itself.
        type: str
        default: STANDARD
      groups:
        description: Kubernetes groups for RBAC.
        type: list
        elements: str
        default: []
      policies:
        description: EKS access policies.
        type: list
        elements: dict
        default: []
        suboptions:
          arn:
            description: ARN of the access policy.
            type: str
            required: true
          namespaces:
            description: Namespaces in which it holds. Empty means the whole cluster.
            type: list
            elements: str
            default: []
  node_groups:
    description: Managed node groups.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the group.
        type: str
        required: true
      role_arn:
        description: The nodes' IAM role. Fixed when the group is made.
        type: str
        required: true
      subnets:
        description: The nodes' subnets. Fixed when the group is made. Those of the cluster if it is left out.
        type: list
        elements: str
      instance_types:
        description: Types of instances, fixed when the group is made. Leave them out when the launch template has one.
        type: list
        elements: str
        default: []
      min_size:
        description: Fewest nodes.
        type: int
        required: true
      max_size:
        description: Most nodes.
        type: int
        required: true
      desired_size:
        description: Nodes to start with. O(node_groups[].min_size) if it is left out.
        type: int
      capacity_type:
        description: Bought for good or on the spot market. Fixed when the group is made.
        type: str
        choices: [ON_DEMAND, SPOT]
        default: ON_DEMAND
      ami_type:
        description: The nodes' image. Fixed when the group is made. The launch template's, when there is one.
        type: str
        default: AL2023_x86_64_STANDARD
      disk_gib:
        description: Size of the system disk in GiB. Fixed when the group is made.
        type: int
      launch_template:
        description: A launch template, for what node groups have no option for (IMDSv2, encrypted volumes, networks).
        type: dict
        suboptions:
          name:
            description: Its name.
            type: str
            required: true
          version:
            description: Its version. A new one rolls the nodes.
            type: str
            required: true
      labels:
        description: Labels of the nodes.
        type: dict
        default: {}
      taints:
        description: Taints of the nodes.
        type: list
        elements: dict
        default: []
        suboptions:
          key:
            description: Key of the taint.
            type: str
            required: true
          value:
            description: Value of the taint.
            type: str
            default: ""
          effect:
            description: What it does to pods that do not tolerate it.
            type: str
            choices: [NO_SCHEDULE, NO_EXECUTE, PREFER_NO_SCHEDULE]
            required: true
      max_unavailable_percent:
        description: Nodes, in percent, that an update may take away at a time.
        type: int
        default: 25
      version:
        description: The nodes' Kubernetes version. They follow the control plane if it is left out.
        type: str
  purge:
    description:
      - Which lists are complete. What they do not name is removed.
      - Access entries that EKS keeps for nodes and for itself are never removed.
    type: list
    elements: str
    choices: [access_entries, node_groups]
    default: []
  wait_s:
    description: Seconds that all changes together may take.
    type: int
    default: 3600
"""

EXAMPLES = r"""
- name: Bring the production cluster to its state
  censuschat.infra.eks_cluster:
    name: censuschat-us-east-1
    region: us-east-1
    version: "1.35"
    role_arn: arn:aws:iam::123456789012:role/censuschat-eks
    subnets: [subnet-0a, subnet-0b, subnet-0c]
    secrets_key_arn: arn:aws:kms:us-east-1:123456789012:key/0a1b
    access_entries:
      - principal: arn:aws:iam::123456789012:role/platform-operator
        groups: [censuschat:operators]
      - principal: arn:aws:iam::123456789012:role/platform-admin
        policies:
          - arn: arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy
    node_groups:
      - name: general
        role_arn: arn:aws:iam::123456789012:role/censuschat-node
        instance_types: [c5.2xlarge]
        min_size: 6
        max_size: 35
        launch_template: {name: censuschat-node, version: "3"}
      - name: spot
        role_arn: arn:aws:iam::123456789012:role/censuschat-node
        instance_types: [c5.2xlarge, c5a.2xlarge, c6i.2xlarge]
        capacity_type: SPOT
        min_size: 0
        max_size: 15
        taints:
          - {key: censuschat.io/spot, value: "true", effect: NO_SCHEDULE}
    purge: [access_entries]
"""

RETURN = r"""
endpoint:
  description: Address of the cluster's API. Null when there is no cluster yet (check mode).
  returned: always
  type: str
  sample: https://0A1B.gr7.us-east-1.eks.amazonaws.com
certificate_authority:
  description: The certificate authority of the API, in base64 as kubeconfig files have it. Null like RV(endpoint).
  returned: always
  type: str
actions:
  description: What was done, or would be done in check mode, in its order.
  returned: always
  type: list
  elements: dict
  contains:
    call:
      description: The call of the EKS API.
      type: str
    target:
      description: The cluster, principal or node group.
      type: str
    detail:
      description: What it changes.
      type: str
  sample:
    - call: update_nodegroup_config
      target: general
      detail: 6 to 35 nodes
done:
  description: How many of the actions were made before the failure.
  returned: failure
  type: int
"""

import time
import traceback
from collections.abc import Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.censuschat.infra.plugins.module_utils.aws import eks_cloud
from ansible_collections.censuschat.infra.plugins.module_utils.aws.eks_plan import (
    AccessEntry,
    Cluster,
    Desired,
    EksError,
    NodeGroup,
    Policy,
    Taint,
    plan,
)

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    BOTO3_ERROR = None
except ImportError:
    BOTO3_ERROR = traceback.format_exc()

GROUP_OPTIONS = {
    "name": {"type": "str", "required": True},
    "role_arn": {"type": "str", "required": True},
    "subnets": {"type": "list", "elements": "str"},
    "instance_types": {"type": "list", "elements": "str", "default": []},
    "min_size": {"type": "int", "required": True},
    "max_size": {"type": "int", "required": True},
    "desired_size": {"type": "int"},
    "capacity_type": {"type": "str", "choices": ["ON_DEMAND", "SPOT"], "default": "ON_DEMAND"},
    "ami_type": {"type": "str", "default": "AL2023_x86_64_STANDARD"},
    "disk_gib": {"type": "int"},
    "launch_template": {
        "type": "dict",
        "options": {"name": {"type": "str", "required": True}, "version": {"type": "str", "required": True}},
    },
    "labels": {"type": "dict", "default": {}},
    "taints": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            # The key of a taint is a name, no secret.
            "key": {"type": "str", "required": True, "no_log": False},
            "value": {"type": "str", "default": ""},
            "effect": {
                "type": "str",
                "choices": ["NO_SCHEDULE", "NO_EXECUTE", "PREFER_NO_SCHEDULE"],
                "required": True,
            },
        },
    },
    "max_unavailable_percent": {"type": "int", "default": 25},
    "version": {"type": "str"},
}
ENTRY_OPTIONS = {
    "principal": {"type": "str", "required": True},
    "type": {"type": "str", "default": "STANDARD"},
    "groups": {"type": "list", "elements": "str", "default": []},
    "policies": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "arn": {"type": "str", "required": True},
            "namespaces": {"type": "list", "elements": "str", "default": []},
        },
    },
}


def group(given: Mapping[str, Any], subnets: tuple[str, ...]) -> NodeGroup:
    """A node group as the planner knows it."""
    template = given["launch_template"]
    return NodeGroup(
        name=given["name"],
        role_arn=given["role_arn"],
        subnets=tuple(given["subnets"]) if given["subnets"] is not None else subnets,
        instance_types=tuple(given["instance_types"]),
        minimum=given["min_size"],
        maximum=given["max_size"],
        desired=given["min_size"] if given["desired_size"] is None else given["desired_size"],
        capacity_type=given["capacity_type"],
        ami_type=given["ami_type"],
        disk_gib=given["disk_gib"],
        launch_template=(template["name"], template["version"]) if template else None,
        labels=tuple(sorted((key, str(value)) for key, value in given["labels"].items())),
        taints=tuple(Taint(**taint) for taint in given["taints"]),
        max_unavailable_percent=given["max_unavailable_percent"],
        version=given["version"],
    )


def entry(given: Mapping[str, Any]) -> AccessEntry:
    """An access entry as the planner knows it."""
    policies = tuple(Policy(policy["arn"], tuple(policy["namespaces"])) for policy in given["policies"])
    return AccessEntry(given["principal"], given["type"], tuple(given["groups"]), policies)


def desired(params: Mapping[str, Any]) -> Desired:
    """What the task asks for."""
    cluster = Cluster(
        name=params["name"],
        version=params["version"],
        role_arn=params["role_arn"],
        subnets=tuple(params["subnets"]),
        security_groups=tuple(params["security_groups"]),
        public_cidrs=tuple(params["public_cidrs"]),
        service_cidr=params["service_cidr"],
        secrets_key_arn=params["secrets_key_arn"],
        log_types=tuple(params["log_types"]),
        authentication_mode=params["authentication_mode"],
    )
    return Desired(
        cluster,
        tuple(entry(given) for given in params["access_entries"]),
        tuple(group(given, cluster.subnets) for given in params["node_groups"]),
        tuple(params["purge"]),
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "region": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "role_arn": {"type": "str", "required": True},
            "subnets": {"type": "list", "elements": "str", "required": True},
            "security_groups": {"type": "list", "elements": "str", "default": []},
            "public_cidrs": {"type": "list", "elements": "str", "default": []},
            "service_cidr": {"type": "str"},
            # The name of a key, not the key.
            "secrets_key_arn": {"type": "str", "no_log": False},
            "log_types": {
                "type": "list",
                "elements": "str",
                "choices": ["api", "audit", "authenticator", "controllerManager", "scheduler"],
                "default": ["api", "audit", "authenticator"],
            },
            "authentication_mode": {
                "type": "str",
                "choices": ["CONFIG_MAP", "API_AND_CONFIG_MAP", "API"],
                "default": "API",
            },
            "access_entries": {"type": "list", "elements": "dict", "default": [], "options": ENTRY_OPTIONS},
            "node_groups": {"type": "list", "elements": "dict", "default": [], "options": GROUP_OPTIONS},
            "purge": {
                "type": "list",
                "elements": "str",
                "choices": ["access_entries", "node_groups"],
                "default": [],
            },
            "wait_s": {"type": "int", "default": 3600},
        },
        supports_check_mode=True,
    )
    if BOTO3_ERROR:
        module.fail_json(msg=missing_required_lib("boto3"), exception=BOTO3_ERROR)
    name, region = module.params["name"], module.params["region"]
    deadline = time.monotonic() + module.params["wait_s"]
    done = 0
    said: list[dict[str, str]] = []
    try:
        # Standard retries: EKS throttles, and refuses while another update runs.
        client = boto3.client("eks", region_name=region, config=Config(retries={"mode": "standard", "max_attempts": 8}))
        observed = eks_cloud.observe(client, name)
        actions = plan(observed, desired(module.params))
        said = [{"call": action.call, "target": action.target, "detail": action.detail} for action in actions]
        if not module.check_mode:
            for action in actions:
                eks_cloud.apply(client, name, action, deadline)
                done += 1
        api = {}
        if observed.cluster is not None or not module.check_mode:
            api = client.describe_cluster(name=name)["cluster"]
    except EksError as error:
        module.fail_json(msg=str(error), actions=said, done=done)
    except (BotoCoreError, ClientError) as error:
        where = f"EKS in {region} for cluster {name}"
        module.fail_json(
            msg=f"{where}: {error}; {done} of {len(said)} changes were made, running this again goes on from there",
            actions=said,
            done=done,
        )
    module.exit_json(
        changed=bool(said),
        endpoint=api.get("endpoint"),
        certificate_authority=(api.get("certificateAuthority") or {}).get("data"),
        actions=said,
        diff={"before": "", "after": "".join(f"{one['call']} {one['target']}: {one['detail']}\n" for one in said)},
    )


if __name__ == "__main__":
    main()
