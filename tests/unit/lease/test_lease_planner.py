"""The decisions of the guard and of write_lease, as cases (data/lease/)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.lease import planner
from ansible_collections.censuschat.infra.plugins.module_utils.lease.holding import (
    AskHolder,
    Request,
    Swap,
    TakeIt,
    Waiting,
    decide,
)
from ansible_collections.censuschat.infra.plugins.module_utils.lease.model import (
    EpochRecord,
    Figures,
    Follower,
    GateRecord,
    HandOver,
    LeaseError,
    LeaseRecord,
    Shipped,
    StoreView,
    decode,
    encode,
)
from ansible_collections.censuschat.infra.plugins.module_utils.lease.planner import MARKER, Observed, PatroniView
from ansible_collections.censuschat.infra.plugins.module_utils.lease.quiet import QuietWatch

DATA = Path(__file__).parents[1] / "data/lease"
GUARD: list[dict[str, Any]] = yaml.safe_load((DATA / "guard.yml").read_text())
CONFIRM: list[dict[str, Any]] = yaml.safe_load((DATA / "confirm.yml").read_text())
HOLDING: list[dict[str, Any]] = yaml.safe_load((DATA / "holding.yml").read_text())

NOW = 1000.0
FIGURES = Figures(ttl_s=15, renew_s=2, close_after_s=9, kernel_after_s=11)
STANDBY = {"host": "w1,w2", "port": 5432}


def named(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def view_of(raw: dict[str, Any]) -> StoreView:
    return StoreView(
        epoch=EpochRecord(*raw["epoch"]) if "epoch" in raw else None,
        lease=LeaseRecord(raw["lease"][0], raw["lease"][1], 77) if "lease" in raw else None,
        handover=HandOver(**raw["handover"]) if "handover" in raw else None,
        shipped=Shipped(**raw["shipped"]) if "shipped" in raw else None,
        follower=Follower(**raw["follower"]) if "follower" in raw else None,
        gates=tuple(GateRecord(*gate) for gate in raw.get("gates", [])),
    )


def patroni_of(raw: dict[str, Any]) -> PatroniView:
    config = dict(raw.get("config", {}))
    if config.pop("follows", False):
        config["standby_cluster"] = dict(STANDBY)
    if node := config.pop("marker", ""):
        config[MARKER] = {"node": node, "epoch": 4}
    return PatroniView(raw["role"], config)


def observed(case: dict[str, Any]) -> Observed:
    def ago(name: str) -> float | None:
        return NOW - case[name] if name in case else None

    return Observed(
        node="e1",
        region="east",
        figures=FIGURES,
        standby_cluster=STANDBY,
        started_at=NOW - case.get("started_ago", 100),
        view=view_of(case["view"]) if "view" in case else None,
        view_at=ago("viewed_ago"),
        renewed_at=ago("renewed_ago"),
        shut=case.get("shut", False),
        renewal_tried=case.get("tried", False),
        remembered_epoch=case.get("remembered", 0),
        patroni=patroni_of(case["patroni"]) if "patroni" in case else None,
        differs_since=ago("differs_ago"),
    )


def said(action: planner.Action) -> str:
    match action:
        case planner.Shut(reason):
            return f"shut: {reason}"
        case planner.Renew(_, opens):
            return f"renew {'open' if opens else 'shut'}"
        case planner.Take(view):
            return f"take {view.epoch.epoch if view.epoch else 0}"
        case planner.Remember(epoch):
            return f"remember {epoch}"
        case planner.SetPatroni(patch, _):
            return "follow" if patch["standby_cluster"] else "lead"
        case planner.StopCleanly():
            return "stop cleanly"
        case planner.Unregister(gate):
            return f"unregister {gate.node}"


@named(GUARD)
def test_guard(case: dict[str, Any]) -> None:
    o = observed(case)
    assert planner.standing(o, NOW) is planner.Standing[case["standing"]]
    actions = [said(action) for action in planner.plan(o, NOW)]
    wanted = case["actions"]
    assert [a if ":" in w else a.split(":")[0] for a, w in zip(actions, wanted, strict=False)] == wanted
    assert len(actions) == len(wanted)


@named(GUARD)
def test_no_plan_opens_or_promotes_for_a_region_without_the_lease(case: dict[str, Any]) -> None:
    o = observed(case)
    holds = planner.standing(o, NOW) is planner.Standing.HOLDER
    for action in planner.plan(o, NOW):
        if isinstance(action, planner.Renew):
            assert holds or not action.opens
        if isinstance(action, planner.SetPatroni) and action.patch["standby_cluster"] is None:
            assert holds


def test_following_replaces_what_is_there_and_ends_only_our_own_pause() -> None:
    patroni = PatroniView(
        "master", {"standby_cluster": {"host": "x", "primary_slot_name": "s"}, MARKER: {"node": "e1"}}
    )
    o = dataclasses.replace(observed(GUARD[0]), patroni=patroni)
    assert planner.wanted_patch(o, planner.Standing.OTHER, NOW) == {
        "standby_cluster": {**STANDBY, "primary_slot_name": None},
        "pause": None,
        MARKER: None,
    }


@named(CONFIRM)
def test_confirm(case: dict[str, Any]) -> None:
    view = view_of(case.get("view", {"epoch": [4, "east"], "lease": [4, "east"]}))
    renewal = planner.Renewal(
        armed_at=NOW + case.get("armed_at", 0.0),
        asked_at=NOW + case.get("asked_at", 0.01),
        answered_at=NOW + case.get("answered_at", 0.05),
        view=view,
        lease=LeaseRecord(4, "east", case.get("lease_id", 77)),
        registered=case.get("registered", True),
        ttl_s=case.get("ttl", 15),
    )
    o = dataclasses.replace(observed(GUARD[0]), remembered_epoch=4)
    why = planner.why_not_confirm(renewal, o)
    assert case["why"] in why
    assert bool(why) is bool(case["why"])


@named(HOLDING)
def test_holding(case: dict[str, Any]) -> None:
    request = Request(**{"ttl_s": 15, "wait_s": 60, **case["request"]})
    decision = decide(view_of(case["view"]), request, Waiting(**case.get("waiting", {})))
    assert type(decision).__name__ == case["decision"]
    text = " ".join(str(value) for value in dataclasses.asdict(decision).values())
    for words in case.get("says", []):
        assert words in text
    if isinstance(decision, AskHolder | Swap):
        assert decision.handover.to == request.region
    if isinstance(decision, TakeIt | Swap) and "quiet_revision" in case:
        assert decision.quiet_revision == case["quiet_revision"]


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ((15, 2, 9, 11), ""),
        ((15, 2, 11, 11), "0 < renew"),
        ((11, 2, 9, 11), "0 < renew"),
        ((15, 0, 9, 11), "0 < renew"),
        ((15, 5, 9, 11), "second try"),
        ((4, 0.5, 2, 3), "at least 5"),
    ],
)
def test_figures_that_would_break_the_argument_are_refused(figures: tuple[float, ...], problem: str) -> None:
    problems = Figures(*figures).problems()
    assert bool(problems) is bool(problem)
    assert problem in "; ".join(problems)


def gates(*revisions: int, epoch: int = 3) -> StoreView:
    """A view in which east's nodes wrote their records at these revisions, and west's an old one."""
    east = tuple(GateRecord(f"e{n}", "east", epoch, 11.0, revision) for n, revision in enumerate(revisions, 1))
    return StoreView(EpochRecord(epoch, "east"), gates=(*east, GateRecord("w1", "west", epoch - 1, 11.0, 999)))


def test_a_gate_counts_as_closed_only_after_its_kernels_time_and_the_drift() -> None:
    watch = QuietWatch()
    watch.note(gates(5, 7), 100.0)
    watch.note(gates(5, 7), 110.0)
    assert watch.left_s(110.0) == pytest.approx({"e1": 3.2, "e2": 3.2})
    assert (watch.renewals, watch.revision, watch.age_s(110.0)) == (0, 7, 10.0)
    assert watch.left_s(113.21) == {}


def test_one_writing_starts_that_nodes_time_again() -> None:
    watch = QuietWatch()
    watch.note(gates(5, 7), 100.0)
    watch.note(gates(5, 9), 112.0)
    assert watch.left_s(114.0) == pytest.approx({"e2": 11.2})
    assert (watch.renewals, watch.revision, watch.age_s(114.0)) == (1, 9, 2.0)


def test_what_an_earlier_watcher_saw_is_used_only_while_it_is_still_so() -> None:
    seen = {"e1": (5, 80.0), "e2": (6, 80.0), "e9": (1, 80.0)}
    watch = QuietWatch(seen)
    watch.note(gates(5, 7), 100.0)
    assert watch.left_s(100.0) == pytest.approx({"e2": 13.2})
    assert watch.renewals == 0
    from_the_future = QuietWatch({"e1": (5, 300.0)})
    from_the_future.note(gates(5), 100.0)
    assert from_the_future.left_s(100.0) == pytest.approx({"e1": 13.2})


def test_a_region_without_records_is_quiet_and_an_old_record_is_not_trusted_to_be_short() -> None:
    watch = QuietWatch()
    watch.note(StoreView(), 1.0)
    assert (watch.left_s(1.0), watch.revision) == ({}, 0)
    assert watch.age_s(1.0) == float("inf")
    old = decode(GateRecord, '{"node": "e1", "region": "east", "epoch": 3}', "here", revision=4)
    watch.note(StoreView(EpochRecord(3, "east"), gates=(old,)), 1.0)
    assert watch.left_s(60.0) == pytest.approx({"e1": 13.0})


@pytest.mark.parametrize(
    "record",
    [
        EpochRecord(4, "east", 1.5, "x"),
        HandOver("west", 4, "x", False),
        GateRecord("e1", "east", 4),
        Follower("e1", 4, True),
        Shipped(4, "e1", "0/1"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_survive_the_store_and_newer_fields(record: Any) -> None:
    text = encode(record).replace("{", '{"from_a_newer_version": 1, ', 1)
    assert decode(type(record), text, "here") == record


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"epoch": "4", "region": "east"}', '{"epoch": 4, "region": 5}', "\x00"]
)
def test_a_record_that_cannot_be_read_is_named_and_not_acted_upon(text: str) -> None:
    with pytest.raises(LeaseError, match="here does not hold a EpochRecord"):
        decode(EpochRecord, text, "here")
