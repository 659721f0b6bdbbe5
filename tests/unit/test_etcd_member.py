"""The planner of etcd_member: when a member starts, restarts, and waits for the others."""

from __future__ import annotations

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.etcd.member import (
    Observed,
    Step,
    may_rejoin,
    may_restart,
    plan,
)

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


@pytest.mark.parametrize(
    ("empty", "serving", "may"),
    [
        (True, frozenset({"b", "c"}), True),
        (False, frozenset({"b", "c"}), False),
        (True, frozenset({"b"}), False),
        (True, frozenset(), False),
        # Its own answer, if there is one, is no help: the others must be able to do without it.
        (True, frozenset({"a", "b"}), False),
    ],
)
def test_a_member_takes_a_new_place_only_without_data_and_beside_a_quorum(
    empty: bool, serving: frozenset[str], may: bool
) -> None:
    assert may_rejoin("a", ["a", "b", "c"], Observed(active=False, empty=empty), serving) is may
