"""The Molecule scenarios hold together: one configuration, two releases of Debian each, roles that exist, tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from molecule.model import schema_v3

from lab import topology
from lab.paths import REPO

MOLECULE = REPO / "molecule"
SCENARIOS = sorted(path.parent.name for path in MOLECULE.glob("*/molecule.yml"))
TESTED = [name for name in SCENARIOS if name != "default"]
ROLES = REPO / "collections/ansible_collections/censuschat/infra/roles"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


BASE: dict[str, Any] = load(REPO / ".config/molecule/config.yml")
GROUPS: dict[str, Any] = load(MOLECULE / "inventory/hosts.yml")["all"]["children"]


def test_the_shared_configuration_is_what_molecule_takes_and_has_the_sequence() -> None:
    whole: Any = {**BASE, "driver": {"name": "default"}, "platforms": [], "provisioner": {"name": "ansible"}}
    assert schema_v3.validate(whole) == []
    assert BASE["shared_state"] is True
    sequence = [step.split("/")[-1] for step in BASE["scenario"]["test_sequence"]]
    assert sequence == [
        "syntax", "create", "prepare.yml", "check", "converge", "idempotence", "check_again.yml", "verify", "destroy",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_says_its_name_and_leaves_the_rest_to_the_shared_configuration(name: str) -> None:
    assert load(MOLECULE / name / "molecule.yml") == {"scenario": {"name": name}}


def test_only_the_default_scenario_makes_and_removes_nodes() -> None:
    for step in ("create.yml", "destroy.yml"):
        assert [path.parent.name for path in MOLECULE.glob(f"*/{step}")] == ["default"]


@pytest.mark.parametrize("name", TESTED)
def test_a_scenario_runs_existing_roles_on_its_own_nodes_and_has_tests(name: str) -> None:
    group = f"molecule_{name}"
    for file in (MOLECULE / name).glob("*.yml"):
        for play in load(file) if file.name != "molecule.yml" else []:
            assert play["hosts"] in (group, "localhost"), file
            for role in play.get("roles", []):
                assert (ROLES / role["role"].removeprefix("censuschat.infra.")).is_dir(), role
    assert list((MOLECULE / name / "tests").glob("test_*.py"))


def test_each_scenario_has_a_node_of_both_releases_and_no_node_is_anothers() -> None:
    lab = topology.load(MOLECULE / "inventory")
    members = {name: list(GROUPS[f"molecule_{name}"]["hosts"]) for name in TESTED}
    for name, hosts in members.items():
        assert [lab.node(host).suite for host in hosts] == ["bookworm", "trixie"], name
    everybody = [host for hosts in members.values() for host in hosts]
    assert sorted(everybody) == sorted(node.name for node in lab.nodes)
    assert {node.role for node in lab.nodes} == {"plain"}
    assert sorted(GROUPS["debian_13"]["hosts"]) == sorted(n.name for n in lab.nodes if n.suite == "trixie")
    # The link of a node has its name, of 15 characters at most.
    assert max(len(host) for host in everybody) <= 15


def test_what_testinfra_reads_of_the_inventory_has_no_templates() -> None:
    values = load(MOLECULE / "inventory/group_vars/all/main.yml")
    for name in ("ansible_user", "ansible_ssh_private_key_file", "ansible_ssh_common_args"):
        assert "{{" not in values[name], name
