"""node_state's planner on data: tests/unit/cases/node_state/*.yml holds desired and observed state and the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_host import parse_units, timestamp
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import (
    Action,
    Desired,
    Observed,
    UnitState,
    UserState,
    diff_of,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_plan import plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    PathState,
    link_atomically,
    observe_path,
    write_atomically,
)

CASES = sorted((Path(__file__).parent / "cases/node_state").glob("*.yml"))


def observed(data: dict[str, Any]) -> Observed:
    names = data.get("hostnames", ["", ""])
    return Observed(
        hostnames=(names[0], names[1]),
        leftovers=tuple(data.get("leftovers", [])),
        installed=frozenset(data.get("installed", [])),
        groups=frozenset(data.get("groups", [])),
        users={
            n: UserState(n, frozenset(u["groups"]), u["shell"], u["home"]) for n, u in data.get("users", {}).items()
        },
        paths={p: path_state(p, s) for p, s in data.get("paths", {}).items()},
        units={n: UnitState(n, **u) for n, u in data.get("units", {}).items()},
    )


def path_state(path: str, data: dict[str, Any]) -> PathState:
    return PathState(path, **{**data, "mode": int(data.get("mode", "0"), 8)})


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_plan(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    if "error" in case:
        with pytest.raises(NodeError) as caught:
            plan(Desired.of(case["desired"]), observed(case["observed"]))
        assert case["error"] in str(caught.value)
        return
    actions = plan(Desired.of(case["desired"]), observed(case["observed"]))
    assert [[a.kind, a.target, a.detail] for a in actions] == case["actions"]
    said = json.dumps([diff_of(actions), [a.public() for a in actions]])
    for secret in case.get("nowhere", []):
        assert secret not in said


def test_every_case_is_read() -> None:
    assert len(CASES) >= 30


def test_diff_has_one_entry_an_action() -> None:
    entries = diff_of([Action("package", "etcd", "install", before="absent\n", after="installed\n")])
    assert entries == [
        {
            "before_header": "etcd (package)",
            "after_header": "etcd (package)",
            "before": "absent\n",
            "after": "installed\n",
        }
    ]


def test_units_are_read_in_the_order_asked() -> None:
    text = (
        "Id=ssh.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=no\n"
        "ActiveEnterTimestamp=Sat 2026-11-21 11:13:11.542012 UTC\n"
        "StateChangeTimestamp=Sat 2026-11-21 11:14:00.000000 UTC\n\n"
        "Id=none.service\nLoadState=not-found\nActiveState=inactive\nUnitFileState=\nNeedDaemonReload=yes\n"
        "ActiveEnterTimestamp=\nStateChangeTimestamp=n/a\n"
    )
    units = parse_units(["sshd.service", "none.service"], text)
    assert units["sshd.service"] == UnitState(
        "sshd.service", "loaded", "active", "enabled", False, 1795259591.542012, 1795259640.0
    )
    assert units["none.service"] == UnitState("none.service", "not-found", "inactive", "", True, 0.0, 0.0)


def test_answer_with_too_few_units_is_an_error() -> None:
    with pytest.raises(NodeError, match="answered 1 units where 2"):
        parse_units(["a.service", "b.service"], "Id=a.service\n")


def test_no_timestamp_is_the_beginning_of_time() -> None:
    assert timestamp("n/a") == 0.0


def test_refused_content_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.conf"
    target.write_text("old")
    owner, group = observe_path(str(target)).owner, observe_path(str(target)).group
    with pytest.raises(NodeError, match=r"x\.conf was not replaced: its new content does not pass `grep -q good %s`"):
        write_atomically(str(target), "bad", owner, group, 0o600, validate="grep -q good %s", commands=Commands())
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.conf"]
    write_atomically(str(target), "good", owner, group, 0o600, validate="grep -q good %s", commands=Commands())
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("good", 0o600)


def test_bytes_that_are_not_text_are_kept_apart(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"\xff\xfe")
    seen = observe_path(str(target), read=True)
    assert seen.content is not None
    write_atomically(str(target), seen.content, seen.owner, seen.group, 0o644)
    assert target.read_bytes() == b"\xff\xfe"


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="does not exist; list it under directories"):
        write_atomically(str(tmp_path / "a/b"), "x", "root", "root", 0o644)


def test_link_replaces_a_file(tmp_path: Path) -> None:
    target = tmp_path / "localtime"
    target.write_text("copied zone")
    link_atomically(str(target), "/usr/share/zoneinfo/Etc/UTC")
    assert observe_path(str(target)).target == "/usr/share/zoneinfo/Etc/UTC"


def test_command_that_is_not_there_is_an_error_with_its_name() -> None:
    with pytest.raises(NodeError, match="looking failed: `no-such-program-here` ended with 127"):
        Commands().must(["no-such-program-here"], "looking")


def test_command_that_hangs_ends() -> None:
    assert Commands().run(["sleep", "5"], timeout=0.05).code == 124
