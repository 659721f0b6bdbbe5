"""Whole guards against a simulated world: whatever happens, never two regions with an open gate."""

from __future__ import annotations

import itertools
import pathlib

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.lease import etcd, holding, planner
from ansible_collections.censuschat.infra.plugins.module_utils.lease.guard import Guard
from ansible_collections.censuschat.infra.plugins.module_utils.lease.holding import Outcome, Request, settle
from ansible_collections.censuschat.infra.plugins.module_utils.lease.model import LeaseError, LeaseRecord
from ansible_collections.censuschat.infra.plugins.module_utils.lease.store import LeaseStore

from tests.unit.lease.simulated import CLOSE_AFTER_S, KERNEL_AFTER_S, RENEW_S, TTL_S, Hazards, Scene


def ask(scene: Scene, results: list[Outcome | Exception], state: str, region: str, **more: bool) -> None:
    """Have an operator at the witness site ask for the lease, as a thread of the simulation."""
    store = scene.operator()
    request = Request(state, region, TTL_S, wait_s=60, by="test", **more)

    def body() -> None:
        try:
            results.append(settle(store, request, clock=scene.machines["witness"].clock, sleep=scene.world.sleep))
        except (LeaseError, etcd.EtcdError) as error:
            results.append(error)
        scene.world.note(f"operator: {state} {region}: {results[-1]}")

    scene.world.spawn(body)


def settled(scene: Scene, state: str, region: str, seconds: float = 90, **more: bool) -> Outcome:
    results: list[Outcome | Exception] = []
    ask(scene, results, state, region, **more)
    end = scene.world.now + seconds
    while not results and scene.world.now < end:
        scene.world.run_until(scene.world.now + 0.5)
    assert results, "the operator got no answer in time"
    assert isinstance(results[0], Outcome), results[0]
    return results[0]


@pytest.fixture
def scene(tmp_path: pathlib.Path) -> Scene:
    scene = Scene(seed=1, directory=tmp_path)
    scene.world.run_until(5)
    assert scene.open_regions() == set()
    outcome = settled(scene, "held", "east", initial=True)
    assert (outcome.method, outcome.changed) == ("never_held", True)
    scene.world.run_until(scene.world.now + 5)
    assert scene.open_regions() == {"east"}
    assert scene.patroni["east"].is_primary()
    return scene


def end(scene: Scene) -> None:
    scene.world.finish()
    assert scene.violations == []


def test_nobody_writes_before_the_first_epoch_and_the_new_environment_is_left_alone(tmp_path: pathlib.Path) -> None:
    scene = Scene(seed=3, directory=tmp_path)
    scene.world.run_until(60)
    assert scene.open_regions() == set()
    assert "standby_cluster" not in scene.patroni["east"].config
    end(scene)


def test_initial_is_nothing_once_somebody_held_it(scene: Scene) -> None:
    outcome = settled(scene, "held", "west", initial=True)
    assert not outcome.changed
    assert scene.open_regions() == {"east"}
    end(scene)


def test_a_living_holder_is_not_pushed_aside(scene: Scene) -> None:
    results: list[Outcome | Exception] = []
    ask(scene, results, "held", "west")
    scene.world.run_until(scene.world.now + 30)
    assert "keeps renewing" in str(results[0])
    assert scene.open_regions() == {"east"}
    end(scene)


def test_a_cut_region_closes_before_the_other_opens_and_stays_closed_when_it_returns(scene: Scene) -> None:
    began = scene.world.now
    scene.world.cut.add("east")
    outcome = settled(scene, "held", "west")
    assert outcome.method == "expired"
    assert TTL_S * 0.8 < outcome.waited_s < TTL_S * 1.2 + 2
    scene.world.run_until(scene.world.now + 5)
    assert scene.open_regions() == {"west"}
    assert scene.patroni["west"].is_primary()
    assert scene.world.now - began < TTL_S * 1.2 + 10
    scene.world.cut.clear()
    scene.world.run_until(scene.world.now + 30)
    assert scene.open_regions() == {"west"}
    assert not scene.patroni["east"].is_primary()
    end(scene)


def test_a_region_that_was_cut_briefly_takes_its_lease_back(scene: Scene) -> None:
    scene.world.cut.add("east")
    scene.world.run_until(scene.world.now + 2 * TTL_S)
    assert scene.open_regions() == set()
    assert not scene.patroni["east"].is_primary()
    scene.world.cut.clear()
    scene.world.run_until(scene.world.now + 10)
    assert scene.open_regions() == {"east"}
    assert scene.patroni["east"].is_primary()
    end(scene)


def test_without_the_store_everything_closes_and_comes_back_by_itself(scene: Scene) -> None:
    scene.cluster.down = True
    scene.world.run_until(scene.world.now + CLOSE_AFTER_S * 1.1 + 1)
    assert scene.open_regions() == set()
    scene.world.run_until(scene.world.now + 60)
    scene.cluster.down = False
    scene.world.run_until(scene.world.now + 10)
    assert scene.open_regions() == {"east"}
    end(scene)


def test_an_election_in_the_store_is_not_noticed(scene: Scene) -> None:
    scene.cluster.down = True
    scene.world.run_until(scene.world.now + 3)
    scene.cluster.extend_all()
    scene.cluster.down = False
    for _ in range(20):
        scene.world.run_until(scene.world.now + 1)
        assert scene.open_regions() == {"east"}
    end(scene)


def test_a_hand_over_leaves_nothing_behind_and_goes_back(scene: Scene) -> None:
    for region, other in (("west", "east"), ("east", "west")):
        outcome = settled(scene, "handed_over", region)
        assert outcome.method == "handed_over"
        assert outcome.waited_s < 10
        scene.world.run_until(scene.world.now + 6)
        assert scene.open_regions() == {region}
        assert scene.patroni[region].is_primary()
        assert not scene.patroni[other].is_primary()
        assert not scene.patroni[other].stopped
    end(scene)


def test_a_hand_over_waits_for_a_dead_nodes_gate(scene: Scene) -> None:
    scene.kill("east2")
    killed_at = scene.world.now
    scene.world.run_until(scene.world.now + 0.5)
    settled(scene, "handed_over", "west")
    assert KERNEL_AFTER_S < scene.world.now - killed_at < KERNEL_AFTER_S * 1.5
    end(scene)


def test_leases_that_a_frozen_store_member_ended_open_no_second_region(scene: Scene) -> None:
    """The holder's lease is gone although it was renewed; another region's operator asks at that very moment."""
    taken = 0
    for delay in range(10):
        results: list[Outcome | Exception] = []
        ask(scene, results, "held", "west")
        scene.world.run_until(scene.world.now + delay / 5)
        scene.cluster.end_all()
        scene.world.run_until(scene.world.now + 40)
        if isinstance(results[0], Outcome):
            # The holder's guards had closed, and said so, before they could take the lease back.
            taken += 1
            assert scene.open_regions() == {"west"}
            settled(scene, "handed_over", "east")
            scene.world.run_until(scene.world.now + 8)
        assert scene.open_regions() == {"east"}
    assert taken
    end(scene)


def test_a_taker_that_trusts_the_stores_clock_would_have_made_two_writers(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart of the test above: without the proof by watching the same moments do show two open regions."""
    monkeypatch.setattr(holding, "_take", lambda _view, _request, _waiting, detail: holding.TakeIt(detail))
    monkeypatch.setattr(LeaseStore, "_closed", lambda _self, _view, _region, _revision: [])
    for delay in range(10):
        results: list[Outcome | Exception] = []
        ask(scene, results, "held", "west")
        scene.world.run_until(scene.world.now + delay / 5)
        scene.cluster.end_all()
        scene.world.run_until(scene.world.now + 20)
        if scene.open_regions() == {"west"}:
            settled(scene, "handed_over", "east")
            scene.world.run_until(scene.world.now + 8)
    scene.world.finish()
    assert scene.violations


def test_what_the_guards_saw_saves_the_operator_the_wait(scene: Scene) -> None:
    scene.world.cut.add("east")
    scene.world.run_until(scene.world.now + 2 * TTL_S)
    seen = dict(scene.guards["west1"].quiet.seen)
    store = scene.operator()
    clock = scene.machines["west1"].clock
    results: list[Outcome] = []
    request = Request("held", "west", TTL_S, wait_s=60)
    scene.world.spawn(lambda: results.append(settle(store, request, seen=seen, clock=clock, sleep=scene.world.sleep)))
    scene.world.run_until(scene.world.now + 8)
    assert results[0].waited_s < 2
    end(scene)


def planned(scene: Scene, state: str, region: str) -> tuple[Outcome | Exception, float]:
    """What check mode says, and after how many seconds."""
    results: list[Outcome | Exception] = []
    store, clock, began = scene.operator(), scene.machines["witness"].clock, scene.world.now
    revision = scene.cluster.revision

    def body() -> None:
        try:
            request = Request(state, region, TTL_S, wait_s=60)
            results.append(settle(store, request, check=True, clock=clock, sleep=scene.world.sleep))
        except LeaseError as error:
            results.append(error)

    scene.world.spawn(body)
    while not results:
        scene.world.run_until(scene.world.now + 0.5)
    if scene.open_regions() == set():
        assert scene.cluster.revision == revision, "a plan has written"
    return results[0], scene.world.now - began


def test_check_mode_refuses_a_holder_that_lives(scene: Scene) -> None:
    said, seconds = planned(scene, "held", "west")
    assert "keeps renewing" in str(said)
    assert seconds <= holding.CHECK_S * TTL_S
    assert scene.open_regions() == {"east"}
    end(scene)


def test_check_mode_plans_to_wait_for_a_holder_that_is_lost_and_changes_nothing(scene: Scene) -> None:
    scene.world.cut.add("east")
    scene.world.run_until(scene.world.now + 3)
    early, seconds = planned(scene, "held", "west")
    assert isinstance(early, Outcome)
    assert (early.changed, early.method, early.view.epoch) == (True, "expired", early.previous.epoch)
    assert early.actions[0].startswith("wait: east holds epoch 1")
    assert seconds <= holding.CHECK_S * TTL_S
    scene.world.run_until(scene.world.now + 2 * TTL_S)
    late, _ = planned(scene, "held", "west")
    assert isinstance(late, Outcome)
    assert (late.changed, late.method) == (True, "expired")
    end(scene)


def test_check_mode_of_a_hand_over_asks_nobody(scene: Scene) -> None:
    said, seconds = planned(scene, "handed_over", "west")
    assert isinstance(said, Outcome)
    assert (said.changed, said.method) == (True, "handed_over")
    assert said.actions == ["ask east to hand epoch 1 over to west"]
    assert seconds < 2
    scene.world.run_until(scene.world.now + 5)
    assert scene.open_regions() == {"east"}
    end(scene)


def test_a_hand_over_that_cannot_ship_touches_nothing(scene: Scene) -> None:
    scene.patroni["east"].peer = None
    scene.world.run_until(scene.world.now + 8)
    results: list[Outcome | Exception] = []
    ask(scene, results, "handed_over", "west")
    while not results:
        scene.world.run_until(scene.world.now + 1)
        assert scene.open_regions() == {"east"}
    assert "does not follow" in str(results[0])
    end(scene)


def test_a_hand_over_whose_operator_dies_is_finished_by_the_next_one(scene: Scene) -> None:
    results: list[Outcome | Exception] = []
    ask(scene, results, "handed_over", "west")
    scene.world.run_until(scene.world.now + 0.3)
    scene.machines["witness"].alive = False
    scene.world.run_until(scene.world.now + 20)
    assert scene.open_regions() == set()
    assert settled(scene, "handed_over", "west").method == "handed_over"
    scene.world.run_until(scene.world.now + 5)
    assert scene.open_regions() == {"west"}
    end(scene)


def test_a_hand_over_can_be_withdrawn(scene: Scene) -> None:
    results: list[Outcome | Exception] = []
    ask(scene, results, "handed_over", "west")
    scene.world.run_until(scene.world.now + 0.3)
    scene.machines["witness"].alive = False
    scene.world.run_until(scene.world.now + 20)
    outcome = settled(scene, "held", "east")
    assert outcome.changed
    scene.world.run_until(scene.world.now + 6)
    assert scene.open_regions() == {"east"}
    assert scene.patroni["east"].is_primary()
    assert not scene.patroni["east"].config.get("pause")
    end(scene)


def test_a_store_that_lost_its_memory_opens_nothing_until_told_the_epoch(scene: Scene) -> None:
    for _ in range(2):
        settled(scene, "handed_over", "west")
        scene.world.run_until(scene.world.now + 8)
        settled(scene, "handed_over", "east")
        scene.world.run_until(scene.world.now + 8)
    scene.cluster.keys.clear()
    scene.cluster.leases.clear()
    scene.world.run_until(scene.world.now + 20)
    assert scene.open_regions() == set()
    results: list[Outcome | Exception] = []
    ask(scene, results, "held", "west")
    scene.world.run_until(scene.world.now + 40)
    assert "none of its guards has renewed it" in str(results[0])
    assert scene.open_regions() == set()
    store = scene.operator()
    request = Request("held", "east", TTL_S, wait_s=60, epoch_floor=9)
    scene.world.spawn(
        lambda: results.append(settle(store, request, sleep=scene.world.sleep, clock=lambda: scene.world.now))
    )
    scene.world.run_until(scene.world.now + 60)
    assert isinstance(results[1], Outcome)
    assert results[1].view.epoch is not None
    assert results[1].view.epoch.epoch == 10
    assert scene.open_regions() == {"east"}
    end(scene)


def test_a_restarted_guard_keeps_the_gate_open(scene: Scene) -> None:
    for node in ("east1", "east2"):
        scene.kill(node)
    scene.world.run_until(scene.world.now + 2.1)
    for node in ("east1", "east2"):
        scene.boot("east", node)
    for _ in range(40):
        scene.world.run_until(scene.world.now + 0.5)
        assert scene.open_regions() == {"east"}
    end(scene)


def test_guards_that_are_gone_leave_the_kernel_to_close(scene: Scene) -> None:
    for node in ("east1", "east2"):
        scene.kill(node)
    scene.world.run_until(scene.world.now + KERNEL_AFTER_S * 1.1 + 0.1)
    assert scene.open_regions() == set()
    end(scene)


# ---- everything at once ----


def tormented(seed: int, directory: pathlib.Path, guard: type[Guard] = Guard) -> Scene:
    """Five minutes of cuts, freezes at any call, lost answers, deaths and takers, chosen by the seed."""
    hazards = Hazards(latency_s=0.05, freeze_chance=0.004, lost_answer_chance=0.01)
    scene = Scene(seed, directory, hazards, guard)
    random = scene.world.random
    results: list[Outcome | Exception] = []
    scene.world.run_until(3)
    ask(scene, results, "held", "east", initial=True)
    while scene.world.now < 300:
        scene.world.run_until(scene.world.now + random.uniform(2, 25))
        match random.randrange(10):
            case 0 | 1:
                scene.world.cut.add(random.choice(("east", "west")))
            case 2 | 3 | 4:
                scene.world.cut.clear()
                scene.cluster.down = False
            case 5:
                node = random.choice(sorted(scene.kernels))
                scene.kill(node)
                scene.world.run_until(scene.world.now + random.uniform(0, 15))
                scene.boot(node[:4], node)
            case 6:
                scene.cluster.down = True
                scene.world.run_until(scene.world.now + random.uniform(0, 4))
                scene.cluster.extend_all()
                scene.cluster.down = False
            case 7:
                scene.cluster.down = True
            case 8 | 9:
                scene.cluster.end_all()
        ask(scene, results, random.choice(("held", "handed_over")), random.choice(("east", "west")))
    return scene


@pytest.mark.parametrize("seed", range(8))
def test_no_torment_opens_two_regions(seed: int, tmp_path: pathlib.Path) -> None:
    scene = tormented(seed, tmp_path)
    scene.world.finish()
    assert scene.violations == [], "\n".join(scene.world.history)
    assert scene.openings > 20, "the guards never got to work: this run proves nothing"


class CountsFromTheAnswer(Guard):
    """A guard with the classic mistake: the kernel's time is counted from after the renewal was answered."""

    def _renew(self, lease: LeaseRecord, opens: bool) -> None:
        if opens:
            self._learn(renewal_tried=True)
            try:
                view = self._look()
                if view is None or planner.standing(self.known, self.clock()) is not planner.Standing.HOLDER:
                    return
                if not self._register(lease, self._deadline()) or self.store.keep_alive(lease.lease_id) <= 0:
                    return
                self.gate.confirm(self.gate.arm())
            except (etcd.EtcdError, LeaseError):
                return
            self._learn(renewed_at=self.clock(), shut=False)
        else:
            super()._renew(lease, opens)


# ---- one freeze at every call of a guard ----


def frozen(call: int, freeze_s: float, directory: pathlib.Path, guard: type[Guard]) -> Scene | None:
    """The holder's only guard is cut off and frozen at its call number `call`, counted in calm; the other region takes.

    None: two calm turns have fewer calls than that.
    """
    scene = Scene(seed=7, directory=directory, guard=guard, nodes=1)
    settled(scene, "held", "east", initial=True)
    scene.world.run_until(scene.world.now + 5)
    machine = scene.machines["east1"]
    machine.freeze_and_cut = (machine.calls + call, freeze_s)
    scene.world.run_until(scene.world.now + 2 * RENEW_S + 1)
    if not scene.world.cut:
        scene.world.finish()
        return None
    settled(scene, "held", "west")
    scene.world.run_until(scene.world.now + KERNEL_AFTER_S + freeze_s)
    scene.world.finish()
    return scene


def sweep(directory: pathlib.Path, guard: type[Guard], *freezes_s: float) -> tuple[int, list[str]]:
    """How many freezes were tried, and what went wrong."""
    tried, found = 0, []
    for freeze_s in freezes_s:
        for call in itertools.count(1):
            scene = frozen(call, freeze_s, directory / f"{freeze_s}-{call}", guard)
            if scene is None:
                break
            tried += 1
            found += [f"call {call}, {freeze_s} s: {violation}" for violation in scene.violations]
            if scene.open_regions() != {"west"}:
                found.append(f"call {call}, {freeze_s} s: {scene.open_regions()} open at the end")
    return tried, found


def test_a_freeze_at_any_call_opens_no_second_region(tmp_path: pathlib.Path) -> None:
    tried, found = sweep(tmp_path, Guard, 13.0, 21.0)
    assert found == []
    assert tried > 40


def test_the_sweep_finds_a_guard_that_counts_from_the_answer(tmp_path: pathlib.Path) -> None:
    _, found = sweep(tmp_path, CountsFromTheAnswer, 13.0)
    assert [text for text in found if "opened at" in text], "the sweep shows no mistake, so it proves nothing"
