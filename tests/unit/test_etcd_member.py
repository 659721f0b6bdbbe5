"""The planner of etcd_member: when a member starts, restarts, and waits for the others."""

from __future__ import annotations

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.etcd.member import Observed, Step, may_restart, plan

ALL = frozenset({"a", "b", "c"})
STALE = ("/etc/etcd/dcs.yml",)


@pytest.mark.parametrize(
    ("observed", "step"),
    [
        (Observed(active=True), Step.NOTHING),
        (Observed(active=True, serving=ALL), Step.NOTHING),
        (Observed(active=False), Step.START),
        (Observed(active=False, stale=STALE, serving=ALL), Step.START),
        (Observed(active=True, stale=STALE, serving=ALL), Step.RESTART_IN_TURN),
        (Observed(active=True, stale=STALE, serving=frozenset({"b"})), Step.RESTART_IN_TURN),
        (Observed(active=True, stale=STALE), Step.RESTART),
    ],
)
def test_plan(observed: Observed, step: Step) -> None:
    assert plan(observed)[0] is step


def test_the_reason_names_the_files() -> None:
    assert "/etc/etcd/dcs.yml newer than the running member" in plan(Observed(active=True, stale=STALE))[1]


@pytest.mark.parametrize(
    ("serving", "why"),
    [
        (ALL, ""),
        (frozenset({"b", "c"}), ""),
        (frozenset({"a", "b"}), "c not serving"),
        (frozenset({"a"}), "b, c not serving"),
    ],
)
def test_a_member_restarts_only_while_the_others_serve(serving: frozenset[str], why: str) -> None:
    assert may_restart("a", ["a", "b", "c"], serving) == why
