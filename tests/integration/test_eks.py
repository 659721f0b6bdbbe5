"""The role eks against the lab's AWS, on a server of the test's own: order and parameters of the calls, idempotence.

It cannot prove Amazon's timing, nor what EKS itself would refuse.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from lab import aws
from lab.paths import REPO

ARN = "arn:aws:iam::123456789012:role/"
ADMIN = "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"
SPOT = {"key": "censuschat.io/spot", "value": "true", "effect": "NO_SCHEDULE"}
CANARY = "canary-aws-secret-5b1d"


class Account:
    """An empty AWS account, and the role run against it."""

    def __init__(self, endpoint: str, directory: Path) -> None:
        self.environment = {**os.environ, **aws.environment(endpoint), "AWS_SECRET_ACCESS_KEY": CANARY}
        self.environment["ANSIBLE_STDOUT_CALLBACK"] = "ansible.posix.json"
        self.kubeconfig = directory / "us-east-1.kubeconfig"
        self.playbook = directory / "eks.yml"
        self.client = boto3.client(
            "eks", "us-east-1", endpoint_url=endpoint, aws_access_key_id="lab", aws_secret_access_key="lab"
        )
        self.variables: dict[str, Any] = {
            "eks_name": "censuschat",
            "eks_region": "us-east-1",
            "eks_version": "1.34",
            "eks_role_arn": ARN + "cluster",
            "eks_subnets": ["subnet-1", "subnet-2", "subnet-3"],
            "eks_kubeconfig": str(self.kubeconfig),
            "eks_wait_s": 30,
            "eks_access_entries": [
                {"principal": ARN + "operator", "groups": ["censuschat:operators"]},
                {"principal": ARN + "admin", "policies": [{"arn": ADMIN}]},
            ],
            "eks_node_groups": [
                {
                    "name": "general",
                    "role_arn": ARN + "node",
                    "instance_types": ["c5.2xlarge"],
                    "min_size": 6,
                    "max_size": 35,
                },
                {
                    "name": "spot",
                    "role_arn": ARN + "node",
                    "instance_types": ["c5.2xlarge", "c5a.2xlarge"],
                    "capacity_type": "SPOT",
                    "min_size": 0,
                    "max_size": 15,
                    "taints": [SPOT],
                },
            ],
        }

    def run(self, *options: str, **changes: Any) -> tuple[int, dict[str, Any], str]:
        """Run the role; its exit code, the module's result, and everything that was printed."""
        role = {"role": "censuschat.infra.eks", "vars": {**self.variables, **changes}}
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "roles": [role]}
        self.playbook.write_text(yaml.safe_dump([play]))
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(self.playbook)]
        command += ["-e", f"ansible_python_interpreter={sys.executable}", *options]
        done = subprocess.run(
            command, cwd=REPO, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        text = done.stdout + done.stderr
        data = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
        tasks = [task for play_data in data["plays"] for task in play_data["tasks"]]
        result = next(t for t in tasks if t["task"]["name"].endswith("to their state"))["hosts"]["localhost"]
        return done.returncode, {**result, "total": data["stats"]["localhost"]["changed"]}, text


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with socket.socket() as free:
        free.bind((aws.ADDRESS, 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "lab.aws", "--port", str(port)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert "moto serves" in server.stdout.readline()
        yield Account(f"http://{aws.ADDRESS}:{port}", tmp_path_factory.mktemp("eks"))
    finally:
        server.terminate()
        server.wait(10)


def calls(result: dict[str, Any]) -> list[str]:
    return [f"{action['call']} {action['target'].rpartition('/')[2]}" for action in result["actions"]]


def test_check_mode_shows_what_apply_does_and_a_second_run_nothing(account: Account) -> None:
    code, shown, text = account.run("--check", "--diff")
    assert code == 0, text
    assert account.client.list_clusters()["clusters"] == []
    began = time.monotonic()
    code, applied, text = account.run()
    assert code == 0, text
    assert calls(applied) == calls(shown)
    assert calls(applied) == [
        "create_cluster censuschat",
        "create_access_entry operator",
        "create_access_entry admin",
        "associate_access_policy admin",
        "create_nodegroup general",
        "create_nodegroup spot",
    ], f"after {time.monotonic() - began:.0f} s: {text}"
    group = account.client.describe_nodegroup(clusterName="censuschat", nodegroupName="spot")["nodegroup"]
    assert (group["scalingConfig"]["maxSize"], group["capacityType"], group["taints"]) == (15, "SPOT", [SPOT])
    code, again, text = account.run()
    assert (code, again["total"], again["actions"]) == (0, 0, []), text
    assert CANARY not in text


def test_the_kubeconfig_has_no_secret_and_asks_for_a_token(account: Account) -> None:
    text = account.kubeconfig.read_text()
    assert account.kubeconfig.stat().st_mode & 0o777 == 0o600
    assert CANARY not in text
    user = yaml.safe_load(text)["users"][0]["user"]
    assert list(user) == ["exec"]
    assert user["exec"]["args"][:2] == ["eks", "get-token"]
    server = yaml.safe_load(text)["clusters"][0]["cluster"]["server"]
    assert server == account.client.describe_cluster(name="censuschat")["cluster"]["endpoint"]


def test_an_upgrade_moves_the_control_plane_and_then_its_nodes(account: Account) -> None:
    code, result, text = account.run(eks_version="1.35")
    assert code == 0, text
    assert calls(result) == [
        "update_cluster_version censuschat",
        "update_nodegroup_version general",
        "update_nodegroup_version spot",
    ]
    code, again, text = account.run(eks_version="1.35")
    assert (code, again["actions"]) == (0, []), text


def test_who_is_not_named_goes_only_when_the_list_is_complete(account: Account) -> None:
    only = account.variables["eks_access_entries"][:1]
    code, result, text = account.run(eks_version="1.35", eks_access_entries=only)
    assert (code, result["actions"]) == (0, []), text
    code, result, text = account.run(eks_version="1.35", eks_access_entries=only, eks_purge=["access_entries"])
    assert (code, calls(result)) == (0, ["delete_access_entry admin"]), text
    assert account.client.list_access_entries(clusterName="censuschat")["accessEntries"] == [ARN + "operator"]


def test_what_cannot_be_is_refused_before_anything_is_touched(account: Account) -> None:
    before = account.client.describe_cluster(name="censuschat")["cluster"]
    code, result, _ = account.run(eks_version="1.37", eks_public_cidrs=["192.0.2.0/24"])
    assert code == 2
    assert result["msg"].endswith("set version to 1.36 first, not 1.37")
    after = account.client.describe_cluster(name="censuschat")["cluster"]
    assert after["resourcesVpcConfig"] == before["resourcesVpcConfig"]
