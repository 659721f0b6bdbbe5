"""The settings at the top of sshd's main file, and the ports of a socket-activated sshd."""

from __future__ import annotations

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.node import sshd_plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.sshd_plan import (
    DROP_IN,
    MAIN,
    SOCKET_DROP_IN,
    SshdObserved,
    plan,
    socket_text,
    stale_keys,
    with_block,
    without_block,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import PathState

STOCK = """# The system-wide configuration
Include /etc/ssh/sshd_config.d/*.conf
#PermitRootLogin prohibit-password
X11Forwarding yes
AcceptEnv LANG LC_*
Match User backup
  X11Forwarding no
"""
WANTED = {"PermitRootLogin": "no", "X11Forwarding": "no", "AcceptEnv": ["LANG"], "AllowGroups": ["ops"]}


def observed(main: str, *, drop_in: str = "", socket: str = "inactive", ports: str | None = None) -> SshdObserved:
    return SshdObserved(
        drop_in=PathState(DROP_IN, "file", content=drop_in),
        main=PathState(MAIN, "file", content=main),
        service=UnitState("ssh.service", "loaded", "inactive" if socket == "active" else "active", active_since=100),
        socket=UnitState("ssh.socket", "loaded", socket),
        newest=PathState(MAIN, "file", ctime=50),
        socket_drop_in=PathState(SOCKET_DROP_IN, "file" if ports else "absent", content=ports),
    )


def test_block_stands_first_and_others_of_its_keywords_sleep() -> None:
    text = with_block(STOCK, WANTED)
    assert text.splitlines()[:4] == [
        sshd_plan.BLOCK_BEGIN,
        "PermitRootLogin no",
        "X11Forwarding no",
        sshd_plan.BLOCK_END,
    ]
    assert "# censuschat.infra.sshd_config: X11Forwarding yes\n" in text
    # What a Match block says is for some only, and is left to them.
    assert text.endswith("Match User backup\n  X11Forwarding no\n")
    # What adds up when it is repeated, and who may log in, stays in the drop-in.
    assert "AllowGroups" not in text and text.count("AcceptEnv") == 1
    assert with_block(text, WANTED) == text, "not stable"
    assert without_block(text) == STOCK, "the way back is not the way in"


def test_block_is_planned_with_the_drop_in_and_kept_up_afterwards() -> None:
    first = plan(WANTED, observed(STOCK), in_main=True)
    assert [a.target for a in first if a.kind == "sshd_file"] == [DROP_IN, MAIN]
    mine, main = (str(a.payload) for a in first if a.kind == "sshd_file")
    assert plan(WANTED, observed(main, drop_in=mine), in_main=True) == []
    assert stale_keys(WANTED, observed(main, drop_in=mine), in_main=True) == []
    # A later call that does not ask for the block must not leave it with other values than the drop-in.
    other = plan({"PermitRootLogin": "yes"}, observed(main, drop_in=mine))
    assert "PermitRootLogin yes" in str(next(a.payload for a in other if a.target == MAIN))


def test_setting_that_only_the_main_file_lacks_is_stale() -> None:
    mine = sshd_plan.render(WANTED)
    assert stale_keys(WANTED, observed(STOCK, drop_in=mine), in_main=True) == ["PermitRootLogin", "X11Forwarding"]
    assert stale_keys(WANTED, observed(STOCK, drop_in=mine)) == []


def test_without_a_block_the_main_file_is_left_alone() -> None:
    assert [a.target for a in plan(WANTED, observed(STOCK)) if a.kind == "sshd_file"] == [DROP_IN]


@pytest.mark.parametrize(
    ("settings", "listens"),
    [
        ({"PermitRootLogin": "no"}, []),
        ({"Port": 2222}, ["2222"]),
        ({"Port": [22, 2222]}, ["22", "2222"]),
        ({"ListenAddress": "192.0.2.1"}, ["192.0.2.1:22"]),
        (
            {"Port": [22, 2222], "ListenAddress": ["192.0.2.1", "2001:db8::1"]},
            ["192.0.2.1:22", "192.0.2.1:2222", "[2001:db8::1]:22", "[2001:db8::1]:2222"],
        ),
        ({"Port": 22, "ListenAddress": ["192.0.2.1:2222"]}, ["192.0.2.1:2222"]),
    ],
)
def test_ports_of_the_socket(settings: dict[str, object], listens: list[str]) -> None:
    lines = socket_text(settings).splitlines()
    assert [line.removeprefix("ListenStream=") for line in lines if line.startswith("ListenStream=")] == (
        ["", *listens] if listens else []
    )


def test_socket_gets_the_ports_where_it_listens_and_loses_them_again() -> None:
    both = {"Port": [22, 2222]}
    actions = plan(both, observed(STOCK, socket="active"))
    assert [(a.kind, a.target) for a in actions] == [
        ("sshd_file", DROP_IN),
        ("sshd_file", SOCKET_DROP_IN),
        ("sshd_socket", "ssh.socket"),
    ]
    mine, ports = sshd_plan.render(both), socket_text(both)
    assert plan(both, observed(STOCK, drop_in=mine, socket="active", ports=ports)) == []
    back = plan({"PermitRootLogin": "no"}, observed(STOCK, drop_in=mine, socket="active", ports=ports))
    assert next(a for a in back if a.target == SOCKET_DROP_IN).payload is None
    # Where sshd itself listens the socket is nobody's.
    assert not [a for a in plan(both, observed(STOCK)) if a.kind == "sshd_socket"]
