"""Every role's argument specification against its defaults, its tasks and its variables' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).resolve().parents[2] / "collections/ansible_collections/censuschat/infra/roles"
NAMES = sorted(path.name for path in ROLES.iterdir() if path.is_dir())


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def specs(role: str) -> dict[str, Any]:
    loaded: dict[str, Any] = load(ROLES / role / "meta/argument_specs.yml")["argument_specs"]
    return loaded


@pytest.mark.parametrize("role", NAMES)
def test_defaults_are_those_of_the_specification(role: str) -> None:
    specified: dict[str, Any] = {}
    for entry in specs(role).values():
        for name, option in entry.get("options", {}).items():
            if "default" in option:
                assert specified.setdefault(name, option["default"]) == option["default"], name
    assert specified == (load(ROLES / role / "defaults/main.yml") or {})


@pytest.mark.parametrize("role", NAMES)
def test_each_entry_point_is_a_task_file_with_documented_prefixed_options(role: str) -> None:
    for name, entry in specs(role).items():
        assert (ROLES / role / "tasks" / f"{name}.yml").is_file(), name
        assert entry["short_description"]
        for option, spec in entry.get("options", {}).items():
            assert option.startswith(f"{role}_"), option
            assert spec["description"], option
            assert not (spec.get("required") and "default" in spec), option
