# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of the pki module: pure, from what is wanted and what lies in the directory to what is to be issued."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import re
from collections.abc import Mapping, Sequence

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
AUTHORITY = "ca"


class PkiError(Exception):
    """A failure the user can act on: one message with what, where, why and the remedy."""


@dataclasses.dataclass(frozen=True)
class NodeWant:
    """One node: its file name and common name, and the names and addresses it answers to."""

    name: str
    sans: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Want:
    """The whole desired state; spans are in days."""

    common_name: str
    nodes: tuple[NodeWant, ...]
    validity_days: int
    ca_validity_days: int
    renew_before_days: int

    def check(self) -> None:
        """PkiError names the first value that makes no sense."""
        if self.renew_before_days < 0 or self.renew_before_days >= self.validity_days:
            raise PkiError(
                f"renew_before_days ({self.renew_before_days}) must be at least 0 and less than validity_days "
                f"({self.validity_days}): every run would renew every certificate"
            )
        if self.ca_validity_days < self.validity_days + self.renew_before_days:
            raise PkiError(
                f"ca_validity_days ({self.ca_validity_days}) must be at least validity_days + renew_before_days "
                f"({self.validity_days + self.renew_before_days}): a node's certificate would outlive its authority"
            )
        seen: set[str] = set()
        for node in self.nodes:
            if not _NAME.match(node.name) or node.name == AUTHORITY:
                raise PkiError(f"nodes: {node.name!r} cannot be a node's name: letters, digits, dot, dash, not 'ca'")
            if node.name in seen:
                raise PkiError(f"nodes: {node.name} is given more than once")
            seen.add(node.name)
            if not node.sans:
                raise PkiError(f"nodes: {node.name} has no sans: give it at least one name or address")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A certificate and key as they lie in the directory.

    present: both files are there and can be read. pair: the key belongs to the certificate.
    signed: the certificate was signed by the authority's key of the directory (for the authority: by itself).
    """

    present: bool = False
    common_name: str = ""
    sans: tuple[str, ...] = ()
    not_after: datetime.datetime | None = None
    pair: bool = False
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Action:
    """One certificate to issue. keep_key: the key that is there goes on being used."""

    name: str
    reason: str
    keep_key: bool = False
    sans: tuple[str, ...] = ()

    def public(self) -> dict[str, str]:
        return {"name": self.name, "detail": f"issue: {self.reason}"}


def san_key(san: str) -> str:
    """A name or address in its canonical text, so that order and spelling do not count as differences."""
    try:
        return str(ipaddress.ip_address(san))
    except ValueError:
        return san.lower()


def plan(want: Want, stored: Mapping[str, Stored], now: datetime.datetime) -> list[Action]:
    """What to issue, the authority first. `stored` is keyed by node name; the authority's key is AUTHORITY."""
    authority = stored.get(AUTHORITY, Stored())
    soon = now + datetime.timedelta(days=want.renew_before_days)
    if not authority.present:
        reason = "there is none" if not stored else "there is none that can be read"
        return [Action(AUTHORITY, reason), *(Action(n.name, "new authority", sans=n.sans) for n in want.nodes)]
    if not (authority.pair and authority.signed):
        raise PkiError(
            "the authority's certificate does not belong to its key (ca.crt, ca.key): restore the pair from your "
            "backup, or move both away to found a new authority, which re-issues every node's certificate"
        )
    actions: list[Action] = []
    # The last node certificate of a run must not outlive the authority.
    if _expires(authority, soon + datetime.timedelta(days=want.validity_days)):
        actions.append(Action(AUTHORITY, f"expires {_day(authority)}", keep_key=True))
    elif authority.common_name != want.common_name:
        raise PkiError(
            f"the authority in the directory is {authority.common_name!r}, not {want.common_name!r}: "
            "give the directory of this environment, or the common name that it has"
        )
    for node in want.nodes:
        reason = _reason(node, stored.get(node.name, Stored()), soon)
        if reason:
            actions.append(Action(node.name, reason, sans=node.sans))
    return actions


def _reason(node: NodeWant, now: Stored, soon: datetime.datetime) -> str:
    if not now.present:
        return "there is none"
    if not now.pair:
        return "the key does not belong to the certificate"
    if not now.signed:
        return "not signed by this authority"
    if {san_key(s) for s in node.sans} != {san_key(s) for s in now.sans}:
        return f"names differ: {_names(now.sans)} -> {_names(node.sans)}"
    if _expires(now, soon):
        return f"expires {_day(now)}"
    return ""


def _names(sans: Sequence[str]) -> str:
    return ",".join(sorted(san_key(s) for s in sans))


def _expires(now: Stored, when: datetime.datetime) -> bool:
    return now.not_after is None or now.not_after <= when


def _day(now: Stored) -> str:
    return now.not_after.strftime("%Y-%m-%d") if now.not_after else "never read"
