"""Which Redis is the primary: plans as cases (data/redis_replication.yml), and the reading of INFO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.redis import replication

CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "data/redis_replication.yml").read_text())
PATH = "/etc/redis/replication.conf"


def address(host: str | None) -> replication.Address | None:
    return replication.Address(host, 6379) if host else None


def file(text: str | None) -> str | None:
    if text == "primary":
        return replication.file_for(replication.Desired(replication.State.PRIMARY))
    if text is not None and text.startswith("replica "):
        return replication.file_for(replication.Desired(replication.State.REPLICA, address(text.split()[1])))
    return text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_plan(case: dict[str, Any]) -> None:
    observed = replication.Observed(
        running=case["observed"]["running"],
        primary=address(case["observed"].get("primary")),
        file=file(case["observed"].get("file")),
    )
    desired = replication.Desired(
        replication.State(case["desired"]["state"]),
        address(case["desired"].get("primary")),
        case["desired"].get("bootstrap", False),
    )
    actions = replication.plan(observed, desired, PATH)
    assert [a.kind if a.kind == "file" else a.target for a in actions] == case["expect"]
    assert all(a.target == PATH for a in actions if a.kind == "file")


def test_info_of_a_primary() -> None:
    observed = replication.parse_info(
        "# Replication\r\nrole:master\r\nconnected_slaves:1\r\n"
        "slave0:ip=10.77.2.21,port=6379,state=online,offset=168,lag=1\r\nmaster_repl_offset:168\r\n"
    )
    assert observed == replication.Observed(running=True, offset=168, replicas=1)
    assert observed.role == "primary"


@pytest.mark.parametrize(
    ("status", "sync", "up"), [("up", "0", True), ("up", "1", False), ("down", "0", False), ("down", "1", False)]
)
def test_info_of_a_replica(status: str, sync: str, up: bool) -> None:
    observed = replication.parse_info(
        "role:slave\r\nmaster_host:10.77.1.21\r\nmaster_port:6379\r\n"
        f"master_link_status:{status}\r\nmaster_sync_in_progress:{sync}\r\nslave_repl_offset:42\r\n"
    )
    assert (observed.role, str(observed.primary), observed.offset) == ("replica", "10.77.1.21:6379", 42)
    assert observed.link_up is up


def test_info_that_is_none() -> None:
    with pytest.raises(replication.ReplicationError, match="gave no role but: 'nonsense'"):
        replication.parse_info("nonsense")
