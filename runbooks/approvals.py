"""Approvals: who has agreed to a plan, by a signature over its hash, and whether that is enough. Pure.

An approval is worth something because of what it names: the hash of a plan, so what would change, on what, by which
code. It is void as soon as any of that is different.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMAT = "censuschat-infra approval 1"
VALID_S = 4 * 3600.0
"""Seconds an approval holds unless the inventory says (runbook_approval_s): asked for in the two hours before a
two-hour window, it must last to the window's end, and not into the next one."""
SKEW_S = 300.0
"""Seconds that two machines' clocks may differ."""

Verify = Callable[[str, bytes, str], bool]
"""(public key, data, signature) -> whether it fits."""


class Invalid(ValueError):
    """Approval settings of an inventory that cannot be understood; says what and where."""


@dataclass(frozen=True, slots=True)
class Policy:
    """need: how many people. of: whose approvals count, None: every approver's. another: not who runs it.

    valid_s: the longest that an approval may hold. approvers: name -> public key. awx: AWX user names.
    """

    need: int = 0
    of: frozenset[str] | None = None
    another: bool = False
    valid_s: float = VALID_S
    approvers: Mapping[str, str] = field(default_factory=dict)
    awx: frozenset[str] = frozenset()

    def words(self) -> str:
        """For people."""
        if not self.need:
            return "no approval"
        of = f" of {', '.join(sorted(self.of))}" if self.of is not None else ""
        other = ", not by the one who runs it" if self.another else ""
        return f"{self.need} approval{'s' if self.need > 1 else ''}{of}{other}"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is approved: a plan, or one step of a run that waits (then run and step are set)."""

    environment: str
    plan: str
    run: str = ""
    step: str = ""


@dataclass(frozen=True, slots=True)
class Approval:
    """One approval. at, expires: unix seconds. key: the public key it says it is signed with.

    journal_key: the key of the journal record that holds it, "" unless that is trusted; awx: AWX's own approval.
    """

    subject: Subject
    name: str
    at: float
    expires: float
    key: str = ""
    signature: str = ""
    door: str = "runbook"
    awx: str = ""
    journal_key: str = ""

    def statement(self) -> bytes:
        """What the signature is over."""
        return statement(self.subject, self.name, self.at, self.expires)

    def document(self) -> dict[str, Any]:
        """For the journal (record approval_given)."""
        return {
            "plan": self.subject.plan,
            "run": self.subject.run,
            "step": self.subject.step,
            "name": self.name,
            "key": self.key,
            "signature": self.signature,
            "at": self.at,
            "expires": self.expires,
            **({"awx": self.awx} if self.awx else {}),
        }


@dataclass(frozen=True, slots=True)
class Void:
    """An approval that does not count: its name, a code for machines and why."""

    name: str
    code: str
    why: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the approvals add up to."""

    need: int
    names: tuple[str, ...]
    void: tuple[Void, ...]

    @property
    def missing(self) -> int:
        return max(0, self.need - len(self.names))

    def words(self) -> str:
        """Why it is not enough."""
        have = f"{len(self.names)} of {self.need} approvals" + (f" ({', '.join(self.names)})" if self.names else "")
        return "; ".join([have, *(f"that of {v.name} {v.why}" for v in self.void)])


def statement(subject: Subject, name: str, at: float, expires: float) -> bytes:
    """The bytes that an approver signs."""
    document = {
        "format": FORMAT,
        "environment": subject.environment,
        "plan": subject.plan,
        "run": subject.run,
        "step": subject.step,
        "name": name,
        "at": at,
        "expires": expires,
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def read(environment: str, data: Mapping[str, Any], door: str = "runbook", journal_key: str = "") -> Approval:
    """The approval of a journal record; whatever is missing is empty, and then does not count."""

    def text(name: str) -> str:
        return str(data.get(name) or "")

    def number(name: str) -> float:
        value = data.get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    subject = Subject(environment, text("plan"), text("run"), text("step"))
    awx = data.get("awx")
    return Approval(
        subject,
        text("name"),
        number("at"),
        number("expires"),
        text("key"),
        text("signature"),
        door or "runbook",
        "" if not awx else awx if isinstance(awx, str) else json.dumps(awx, sort_keys=True),
        journal_key,
    )


def judge(
    given: Iterable[Approval],
    subject: Subject,
    policy: Policy,
    *,
    now: float,
    who: str,
    own: Collection[str],
    verify: Verify,
) -> Judgement:
    """Whether the approvals are enough for the subject.

    given: the approvals of this subject and of older plans, oldest first. who: the one who runs it, as the journal
    names them. own: public keys whose private halves lie with them.
    """
    names: list[str] = []
    keys: set[str] = set()
    void: list[Void] = []
    for approval in given:
        fault = _fault(approval, subject, policy, now, verify) or _not_another(approval, policy, who, own)
        if fault is None and (approval.name in names or (approval.key and approval.key in keys)):
            fault = "approval-duplicate", "is their second one, and a person counts once"
        if fault is not None:
            void.append(Void(approval.name or "nobody", *fault))
            continue
        names.append(approval.name)
        keys.add(approval.key)
    kept = [v for v in void if v.name not in names or v.code == "approval-duplicate"]
    return Judgement(policy.need, tuple(names), tuple(kept))


def _fault(approval: Approval, subject: Subject, policy: Policy, now: float, verify: Verify) -> tuple[str, str] | None:
    """Why it is not an approval of the subject by somebody who may give one: code and words."""
    if approval.subject != subject:
        what = "another step or run" if approval.subject.plan == subject.plan else "another plan"
        return "approval-void", f"is for {what} ({approval.subject.plan[:12] or 'none'})"
    if approval.door == "awx":
        if not approval.journal_key:
            return "approval-forged", "was written by a key that runbook_journal_keys does not have"
        if approval.name not in policy.awx:
            return "approval-not-approver", "came from AWX, where runbook_awx_approvers does not have them"
    else:
        trusted = policy.approvers.get(approval.name)
        if trusted is None:
            return "approval-not-approver", "does not count, because runbook_approvers does not have them"
        if not verify(trusted, approval.statement(), approval.signature):
            return "approval-forged", "is not signed with their key in runbook_approvers"
    if policy.of is not None and approval.name not in policy.of:
        return "approval-not-entitled", f"does not count here, where it takes {', '.join(sorted(policy.of))}"
    if approval.at > now + SKEW_S:
        return "approval-early", "is dated in the future"
    # The signer chose the end; the inventory has the last word.
    if now >= min(approval.expires, approval.at + policy.valid_s):
        return "approval-expired", f"has expired {_ago(now - min(approval.expires, approval.at + policy.valid_s))}"
    return None


def _not_another(approval: Approval, policy: Policy, who: str, own: Collection[str]) -> tuple[str, str] | None:
    if policy.another and (approval.name == who or (approval.key and approval.key in own)):
        return "approval-of-runner", "is that of the one who runs it, and it takes another person's"
    return None


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


# -- out of the definition and the inventory


def parse(
    runbook: str,
    definition: tuple[int, Sequence[str]],
    settings: Mapping[str, Any],
    valid_key: Callable[[str], bool],
) -> Policy:
    """The policy for a runbook. Raises Invalid with the first fault.

    definition: need and of, of the runbook's definition. settings: the inventory's runbook_approvals (runbook or "*" ->
    {need, of, another}; it comes before the definition), runbook_approvers (name -> public key), runbook_approval_s
    (seconds), runbook_awx_approvers (AWX user names).
    """
    table, approvers, valid_s, awx = (
        settings.get(f"runbook_{name}") for name in ("approvals", "approvers", "approval_s", "awx_approvers")
    )
    known = _approvers(approvers, valid_key)
    seconds = VALID_S if valid_s is None else valid_s
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
        raise Invalid(f"runbook_approval_s is {valid_s!r}, not a number of seconds above 0")
    if awx is not None and (isinstance(awx, str) or not isinstance(awx, Sequence)):
        raise Invalid(f"runbook_awx_approvers is {awx!r}, not a list of AWX user names")
    if table is not None and not isinstance(table, Mapping):
        raise Invalid(f"runbook_approvals is {table!r}, not a mapping of runbooks")
    table = table or {}
    name = next((n for n in (runbook, "*") if n in table), None)
    own: Any = {"need": definition[0], "of": list(definition[1]) or None} if name is None else table[name]
    where = f"runbook_approvals[{name}]" if name else f"the definition of {runbook}"
    if not isinstance(own, Mapping):
        raise Invalid(f"{where} is {own!r}, not a mapping with need")
    unknown = sorted(set(map(str, own)) - {"need", "of", "another"})
    if unknown:
        raise Invalid(f"{where} has an unknown {unknown[0]}")
    need, of, another = own.get("need", 1), own.get("of"), own.get("another", False)
    if isinstance(need, bool) or not isinstance(need, int) or need < 0:
        raise Invalid(f"{where}.need is {need!r}, not a number of people")
    if of is not None and (isinstance(of, str) or not isinstance(of, Sequence)):
        raise Invalid(f"{where}.of is {of!r}, not a list of names")
    if not isinstance(another, bool):
        raise Invalid(f"{where}.another is {another!r}, not true or false")
    people = frozenset(map(str, of)) if of else None
    if people is not None and need > len(people):
        raise Invalid(f"{where} needs {need} approvals of {len(people)} people")
    return Policy(need, people, another, float(seconds), known, frozenset(map(str, awx or ())))


def _approvers(approvers: Any, valid_key: Callable[[str], bool]) -> dict[str, str]:
    if approvers is not None and not isinstance(approvers, Mapping):
        raise Invalid(f"runbook_approvers is {approvers!r}, not a mapping of names to public keys")
    known = {str(name): str(key) for name, key in (approvers or {}).items()}
    for name, key in known.items():
        if not valid_key(key):
            raise Invalid(f"runbook_approvers.{name} is no public key as ed25519:BASE64")
    if len(set(known.values())) != len(known):
        double = next(n for n, key in known.items() if list(known.values()).count(key) > 1)
        raise Invalid(f"runbook_approvers has the key of {double} twice, so one person could approve as two")
    return known
