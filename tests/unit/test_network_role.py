"""Role kubernetes_network where it needs no node: the add-on entries of real sites, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLE = "censuschat.infra.kubernetes_network"
REPO = Path(__file__).resolve().parents[2]


def include(entry: str, **variables: Any) -> dict[str, Any]:
    """A task that runs an entry point and keeps what became of it under the variables' name."""
    return {
        "block": [
            {
                "ansible.builtin.include_role": {"name": ROLE, "tasks_from": entry},
                "vars": {f"kubernetes_network_{name}": value for name, value in variables.items()},
            },
            {
                "name": "Tell",
                "ansible.builtin.debug": {"msg": "{{ kubernetes_network_addon | default({}) | to_json }}"},
            },
        ],
        "rescue": [
            {"name": "Tell", "ansible.builtin.debug": {"msg": "{{ {'refused': ansible_failed_result} | to_json }}"}}
        ],
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each, in one run of Ansible."""
    cidr = {"pod_cidr": "10.0.0.0/16"}
    tasks = [
        include("addon", provider="cilium", values={"hubble": {"enabled": True}}, **cidr),
        include("addon", provider="calico", **cidr),
        include("addon", provider="ptp", **cidr),
        include("main", provider="flannel", **cidr),
        include("main", provider="ptp", **cidr),
        include("main", provider="cilium"),
    ]
    play = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}]
    book = tmp_path_factory.mktemp("role") / "book.yml"
    book.write_text(yaml.safe_dump(play))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", book],
        cwd=REPO,
        env={
            **os.environ,
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    said = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
    results = [
        task["hosts"].get("localhost", {}) for task in said["plays"][0]["tasks"] if task["task"]["name"] == "Tell"
    ]
    found = [json.loads(result["msg"]) for result in results if isinstance(result.get("msg"), str)]
    assert len(found) == len(tasks), done.stdout + done.stderr
    return found


def test_cilium_is_an_entry_whose_values_are_merged(outcomes: list[dict[str, Any]]) -> None:
    entry = outcomes[0]
    assert (entry["chart"], entry["version"], entry["wave"]) == ("cilium", "1.19.4", 0)
    assert entry["values"]["hubble"] == {"enabled": True}
    assert entry["values"]["ipam"] == {"mode": "kubernetes"}


def test_calico_is_given_the_clusters_range(outcomes: list[dict[str, Any]]) -> None:
    entry = outcomes[1]
    assert (entry["chart"], entry["version"]) == ("tigera-operator", "v3.32.2")
    (pool,) = entry["values"]["installation"]["calicoNetwork"]["ipPools"]
    assert pool["cidr"] == "10.0.0.0/16"


def test_the_labs_network_is_no_chart(outcomes: list[dict[str, Any]]) -> None:
    assert outcomes[2] == {}


@pytest.mark.parametrize(
    ("number", "words"),
    [(3, "flannel"), (4, "needs kubernetes_network_agent_directory"), (5, "kubernetes_network_pod_cidr")],
    ids=["an unknown provider", "no agent", "no range"],
)
def test_what_cannot_be_is_refused_by_name(outcomes: list[dict[str, Any]], number: int, words: str) -> None:
    assert words in json.dumps(outcomes[number]["refused"])
