"""Which approvals count: tables over real keys, with a clock that stands still."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from runbooks import keys
from runbooks.approvals import VALID_S, Approval, Invalid, Policy, Subject, judge, parse, read, statement

NOW = 1_800_000_000.0
KEYS = {name: Ed25519PrivateKey.generate() for name in ("ann", "bob", "eve")}
PUBLIC = {name: keys.public(key) for name, key in KEYS.items()}
PLAN = Subject("production", "a" * 64)
ONE = Policy(1, approvers={"ann": PUBLIC["ann"], "bob": PUBLIC["bob"]})


def given(name: str = "ann", subject: Subject = PLAN, *, age_s: float = 60, by: str = "", **more: Any) -> Approval:
    """An approval that was given so many seconds ago, signed with the key of ``by`` (their own when not said)."""
    at = NOW - age_s
    expires = more.pop("expires", at + VALID_S)
    key = KEYS[by or name]
    signature = keys.sign(key, statement(subject, name, at, expires))
    return replace(Approval(subject, name, at, expires, keys.public(key), signature), **more)


def awx(name: str = "carol", **more: Any) -> Approval:
    return replace(
        Approval(PLAN, name, NOW - 60, NOW + 600, door="awx", awx="17", journal_key="ed25519:trusted"), **more
    )


TWO = replace(ONE, need=2)


@pytest.mark.parametrize(
    ("approvals", "policy", "names", "codes"),
    [
        pytest.param([], Policy(0), [], [], id="none is needed"),
        pytest.param([], ONE, [], [], id="none is there"),
        pytest.param([given()], ONE, ["ann"], [], id="one of one"),
        pytest.param([given()], TWO, ["ann"], [], id="one of two"),
        pytest.param([given(), given("bob")], TWO, ["ann", "bob"], [], id="two of two"),
        pytest.param([given(), given(age_s=30)], TWO, ["ann"], ["approval-duplicate"], id="a person counts once"),
        pytest.param(
            [given(), given("bob", by="ann")],
            replace(TWO, approvers={"ann": PUBLIC["ann"], "bob": PUBLIC["ann"]}),
            ["ann"],
            ["approval-duplicate"],
            id="one key counts once",
        ),
        pytest.param([given("eve")], ONE, [], ["approval-not-approver"], id="not an approver"),
        pytest.param([given("bob")], replace(ONE, of=frozenset({"ann"})), [], ["approval-not-entitled"], id="not of"),
        pytest.param([given(by="eve")], ONE, [], ["approval-forged"], id="another's key"),
        pytest.param([given(signature="AAAA")], ONE, [], ["approval-forged"], id="no signature"),
        pytest.param([given(expires=NOW + 9e9, at=NOW)], ONE, [], ["approval-forged"], id="its time was changed"),
        pytest.param([replace(given("bob"), name="ann")], ONE, [], ["approval-forged"], id="its name was changed"),
        pytest.param([given(age_s=VALID_S)], ONE, [], ["approval-expired"], id="expired to the second"),
        pytest.param([given(age_s=VALID_S - 1)], ONE, ["ann"], [], id="a second before"),
        pytest.param([given(expires=NOW)], ONE, [], ["approval-expired"], id="the signer chose less"),
        pytest.param(
            [given(age_s=3600, expires=NOW + 9e9)],
            replace(ONE, valid_s=1800.0),
            [],
            ["approval-expired"],
            id="the signer chose more than the inventory allows",
        ),
        pytest.param([given(age_s=-301)], ONE, [], ["approval-early"], id="of the future"),
        pytest.param([given(age_s=-299)], ONE, ["ann"], [], id="of a clock that is a little ahead"),
        pytest.param([given(age_s=VALID_S), given()], ONE, ["ann"], [], id="given again after it had expired"),
        pytest.param([given(subject=replace(PLAN, plan="b" * 64))], ONE, [], ["approval-void"], id="of another plan"),
        pytest.param(
            [given(subject=replace(PLAN, environment="staging"))], ONE, [], ["approval-void"], id="of another place"
        ),
        pytest.param([given(subject=replace(PLAN, run="r", step="s"))], ONE, [], ["approval-void"], id="of a step"),
        pytest.param(
            [replace(given(subject=replace(PLAN, plan="b" * 64)), subject=PLAN)],
            ONE,
            [],
            ["approval-forged"],
            id="moved to this plan",
        ),
        pytest.param([given()], replace(ONE, another=True), [], ["approval-of-runner"], id="the runner's name"),
        pytest.param([given("bob")], replace(ONE, another=True), [], ["approval-of-runner"], id="the runner's key"),
        pytest.param([awx()], replace(ONE, awx=frozenset({"carol"})), ["carol"], [], id="AWX"),
        pytest.param([awx()], ONE, [], ["approval-not-approver"], id="AWX, an unknown user"),
        pytest.param(
            [awx(journal_key="")], replace(ONE, awx=frozenset({"carol"})), [], ["approval-forged"], id="AWX, a stranger"
        ),
        pytest.param(
            [awx("ann", signature="")], ONE, [], ["approval-not-approver"], id="AWX does not stand in for a key"
        ),
        pytest.param(
            [given(), awx()], replace(TWO, awx=frozenset({"carol"})), ["ann", "carol"], [], id="a key and AWX"
        ),
    ],
)
def test_only_what_counts_is_counted(
    approvals: list[Approval], policy: Policy, names: list[str], codes: list[str]
) -> None:
    judgement = judge(approvals, PLAN, policy, now=NOW, who="ann", own={PUBLIC["bob"]}, verify=keys.verify)
    assert list(judgement.names) == names
    assert [void.code for void in judgement.void] == codes
    assert judgement.missing == max(0, policy.need - len(names))
    assert all(void.why in judgement.words() for void in judgement.void)


def test_another_person_than_the_runner_is_enough() -> None:
    policy = replace(ONE, another=True)
    assert judge([given()], PLAN, policy, now=NOW, who="zoe", own=(), verify=keys.verify).missing == 0


def test_an_approval_survives_the_journal() -> None:
    approval = given(subject=replace(PLAN, run="r1", step="promote"))
    assert read("production", approval.document()) == approval
    assert read("production", {}) == Approval(Subject("production", ""), "", 0, 0)
    kept = awx()
    assert read("production", kept.document(), "awx", "ed25519:trusted") == kept


OF = {"ann": PUBLIC["ann"]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Policy(2, frozenset({"ann", "bob"}))),
        ({"runbook_approvals": {"*": {"need": 1}}}, Policy(1)),
        ({"runbook_approvals": {"*": {"need": 1}, "paint": {"need": 0}}}, Policy(0)),
        ({"runbook_approvals": {"fade": {"need": 9}}}, Policy(2, frozenset({"ann", "bob"}))),
        ({"runbook_approvals": {"paint": {}}}, Policy(1)),
        ({"runbook_approvals": {"paint": {"of": ["ann"], "another": True}}}, Policy(1, frozenset({"ann"}), True)),
        ({"runbook_approval_s": 60, "runbook_approvals": {"*": {}}}, Policy(1, valid_s=60.0)),
        (
            {"runbook_approvers": OF, "runbook_awx_approvers": ["carol"], "runbook_approvals": {"*": {}}},
            Policy(1, approvers=OF, awx=frozenset({"carol"})),
        ),
    ],
)
def test_the_inventory_comes_before_the_definition(settings: dict[str, Any], expected: Policy) -> None:
    assert parse("paint", (2, ["ann", "bob"]), settings, keys.valid_public) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runbook_approvals": [1]}, "runbook_approvals is [1], not a mapping"),
        ({"runbook_approvals": {"*": 2}}, "runbook_approvals[*] is 2, not a mapping with need"),
        ({"runbook_approvals": {"*": {"needs": 2}}}, "runbook_approvals[*] has an unknown needs"),
        ({"runbook_approvals": {"paint": {"need": -1}}}, "runbook_approvals[paint].need is -1"),
        ({"runbook_approvals": {"*": {"need": True}}}, "need is True"),
        ({"runbook_approvals": {"*": {"of": "ann"}}}, "of is 'ann', not a list"),
        ({"runbook_approvals": {"*": {"need": 2, "of": ["ann"]}}}, "needs 2 approvals of 1 people"),
        ({"runbook_approvals": {"*": {"another": "yes"}}}, "another is 'yes'"),
        ({"runbook_approvers": ["ann"]}, "runbook_approvers is ['ann']"),
        ({"runbook_approvers": {"ann": "ssh-ed25519 AAAA"}}, "runbook_approvers.ann is no public key"),
        ({"runbook_approvers": {"ann": PUBLIC["ann"], "bob": PUBLIC["ann"]}}, "could approve as two"),
        ({"runbook_approval_s": "4h"}, "runbook_approval_s is '4h'"),
        ({"runbook_approval_s": 0}, "runbook_approval_s is 0"),
        ({"runbook_awx_approvers": "carol"}, "runbook_awx_approvers is 'carol'"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse("paint", (0, ()), settings, keys.valid_public)
    assert said in str(caught.value)
