"""How the modules of the lab's playbooks end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.background import BackgroundError
from lab.fabric import FabricError
from lab.module import answer, described


class Ended(Exception):
    """What the module said last; like AnsibleModule's, its exits do not return."""

    def __init__(self, **said: Any) -> None:
        super().__init__(said)
        self.said = said


def end(**said: Any) -> None:
    raise Ended(**said)


def said(work: Callable[[Any], dict[str, Any]], **params: Any) -> dict[str, Any]:
    module = SimpleNamespace(
        params=params, exit_json=end, fail_json=lambda msg: end(failed=True, msg=msg), check_mode=False
    )
    with pytest.raises(Ended) as ended:
        answer(module, work)
    return ended.value.said


@pytest.mark.parametrize(
    ("result", "changed"), [({"actions": ["make it"]}, True), ({"actions": []}, False), ({"seen": 1}, False)]
)
def test_a_module_has_changed_what_its_actions_name(result: dict[str, Any], changed: bool) -> None:
    assert said(lambda module: result) == {"changed": changed, **result}


@pytest.mark.parametrize(
    "error", [FabricError("no such site"), BackgroundError("it ended"), FileNotFoundError(2, "not there", "x")]
)
def test_an_error_of_the_lab_is_a_failure_in_its_own_words(error: Exception) -> None:
    def fail(module: Any) -> dict[str, Any]:
        raise error

    assert said(fail) == {"failed": True, "msg": str(error)}


def test_an_error_of_the_code_keeps_its_traceback() -> None:
    def wrong(module: Any) -> dict[str, Any]:
        raise KeyError("role")

    with pytest.raises(KeyError):
        answer(SimpleNamespace(params={}), wrong)


def test_an_inventory_that_is_none_is_a_failure(tmp_path: Path) -> None:
    failure = said(lambda module: {"lab": described(module)}, inventory=str(tmp_path / "none"))
    assert failure["failed"]
    assert str(tmp_path / "none") in failure["msg"]
