"""The pure part of the sshd change on data, and its files on a temporary directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node.sshd_plan import (
    MAIN,
    Login,
    Match,
    SshdObserved,
    drop_in_of,
    login_problem,
    overruled,
    parse_effective,
    plan,
    stale_keys,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, PathState

CASES = Path(__file__).parent / "cases"


def observed(data: dict[str, Any]) -> SshdObserved:
    newest = data.get("newest", {"path": MAIN, "ctime": 0})
    return SshdObserved(
        drop_in=PathState(
            drop_in_of(data.get("name", "")), "file" if "drop_in" in data else "absent", content=data.get("drop_in")
        ),
        main=PathState(MAIN, "file", content=data.get("main")),
        service=UnitState("ssh.service", "loaded", **data.get("service", {})),
        socket=UnitState("ssh.socket"),
        newest=PathState(newest["path"], "file", ctime=newest["ctime"]),
    )


@pytest.mark.parametrize("path", sorted((CASES / "sshd_plan").glob("*.yml")), ids=lambda p: p.stem)
def test_plan(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    matches = [Match(m["criteria"], m["settings"]) for m in case.get("matches", [])]
    if "error" in case:
        with pytest.raises(NodeError) as caught:
            plan(case["settings"], observed(case["observed"]), matches=matches)
        assert case["error"] in str(caught.value)
        return
    actions = plan(case["settings"], observed(case["observed"]), matches=matches)
    assert [[a.kind, a.target, a.detail] for a in actions] == case["actions"]
    if "text" in case:
        assert actions[0].payload == case["text"]


@pytest.mark.parametrize("path", sorted((CASES / "sshd_login").glob("*.yml")), ids=lambda p: p.stem)
def test_login(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    login = case["login"]
    problem = login_problem(
        case["effective"],
        Login(
            login["user"],
            tuple(login["groups"]),
            login["client"],
            login["server"],
            login["port"],
            tuple(login["key_types"]),
        ),
    )
    assert bool(problem) == bool(case["problem"]), problem
    assert case["problem"] in problem


def test_setting_that_another_file_decides_is_found_without_knowing_how_sshd_spells_it() -> None:
    settings = {"PermitRootLogin": "prohibit-password", "LoginGraceTime": "1m", "X11Forwarding": "no"}
    alone = parse_effective("permitrootlogin without-password\nlogingracetime 60\nx11forwarding no\n")
    whole = parse_effective("permitrootlogin yes\nlogingracetime 60\nx11forwarding no\n")
    assert overruled(settings, alone, whole) == ["PermitRootLogin would stay yes although without-password is wanted"]


def test_effective_values_that_repeat_are_kept() -> None:
    assert parse_effective("port 22\nport 2222\nbanner none\n") == {"port": ["22", "2222"], "banner": ["none"]}


def test_keys_that_the_drop_in_lacks() -> None:
    now = observed({"drop_in": "Port 22\nBanner none\n"})
    assert stale_keys({"Port": [22, 2222], "Banner": "none", "UsePAM": True}, now) == ["Port", "UsePAM"]


def test_name_of_a_drop_in_cannot_lead_elsewhere() -> None:
    assert drop_in_of("bastion") == "/etc/ssh/sshd_config.d/00-censuschat-bastion.conf"
    with pytest.raises(NodeError, match="cannot name a drop-in"):
        drop_in_of("../../shadow")
