# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The judgement of accounts and groups: what only a person can put right, each violation a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

EMPTY, LOCKED, SET = "empty", "locked", "set"
# shadow(5): what useradd writes for "never".
NEVER_DAYS = 99999
# login.defs(5): Debian's first uid of people's accounts, and the uid of nobody.
FIRST_UID, NOBODY_UID = 1000, 65534
_NO_LOGIN = ("/nologin", "/false", "/sync")


@dataclasses.dataclass(frozen=True)
class Account:
    """One line of passwd with what shadow says of it; days as chage(1) counts them.

    `secret` is empty, locked or set; `max_days` is how long it lasts, None when it does not expire; `changed_day` is
    counted from 1970. `home_owner` is "" for a home that does not exist.
    """

    name: str
    uid: int
    shell: str
    secret: str
    max_days: int | None = None
    gid: int = -1
    home: str = ""
    home_owner: str = ""
    min_days: int | None = None
    inactive_days: int | None = None
    changed_day: int | None = None
    shadowed: bool = True

    @property
    def logs_in(self) -> bool:
        """Whether a person could: root, or an account of people, with a shell."""
        people = self.uid == 0 or FIRST_UID <= self.uid != NOBODY_UID
        return people and not self.shell.endswith(_NO_LOGIN)


@dataclasses.dataclass(frozen=True)
class Group:
    """One line of group."""

    name: str
    gid: int
    members: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AccountsSeen:
    """All local accounts and groups, files by which others are trusted, and today as a day since 1970."""

    accounts: tuple[Account, ...] = ()
    groups: tuple[Group, ...] = ()
    trust_files: tuple[str, ...] = ()
    today: int = 0


def judge(rules: Mapping[str, Any], seen: AccountsSeen) -> list[str]:
    """The violations of `rules`, in the order of the rules below."""
    found: list[str] = []
    for rule, check in _CHECKS.items():
        if rules.get(rule):
            found += check(seen, rules[rule])
    return found


def _root_uid(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if account.uid == 0 and account.name != "root":
            yield f"account {account.name} has uid 0: give it a uid of its own or remove it"


def _empty(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if account.secret == EMPTY:
            yield f"account {account.name} has an empty password: lock it with `passwd -l {account.name}`"


def _uids(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    owners: dict[int, str] = {}
    for account in seen.accounts:
        if account.uid in owners:
            yield f"accounts {owners[account.uid]} and {account.name} share uid {account.uid}: give one another uid"
        owners.setdefault(account.uid, account.name)


def _system_shells(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        no_login = account.shell.endswith(_NO_LOGIN)
        if 0 < account.uid < FIRST_UID and account.secret == SET and not no_login:
            yield f"system account {account.name} has a password and the shell {account.shell}: lock it"


def _key_logins(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if account.uid >= FIRST_UID and account.secret == LOCKED and account.max_days is not None:
            yield (
                f"account {account.name} logs in by key, and PAM will refuse it {account.max_days} days after its "
                f"last password change: run `chage -M -1 {account.name}`"
            )


def _shadowed(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if not account.shadowed:
            yield f"account {account.name} has its password in /etc/passwd: run `pwconv`"


def _twice(names: Sequence[str], what: str) -> Iterator[str]:
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"{what} {name} is there more than once: remove or rename one"


def _names(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    yield from _twice([a.name for a in seen.accounts], "account")


def _group_names(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    yield from _twice([g.name for g in seen.groups], "group")


def _gids(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    yield from _twice([str(g.gid) for g in seen.groups], "the group number")


def _primary_groups(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    known = {g.gid for g in seen.groups}
    for account in seen.accounts:
        if account.gid not in known:
            yield f"account {account.name} has the group {account.gid}, which does not exist: create it or change it"


def _root_gid(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if account.name == "root" and account.gid != 0:
            yield f"root's group is {account.gid}: run `usermod -g 0 root`"


def _root_group(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for group in seen.groups:
        if group.gid == 0 and group.name != "root":
            yield f"group {group.name} has gid 0: give it a gid of its own or remove it"
    for account in seen.accounts:
        if account.gid == 0 and account.name not in ("root", "sync", "shutdown", "halt", "operator"):
            yield f"account {account.name} has root's group as its own: run `usermod -g GROUP {account.name}`"


def _shadow_group(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for group in seen.groups:
        if group.name == "shadow":
            inside = [*group.members, *(a.name for a in seen.accounts if a.gid == group.gid)]
            for name in inside:
                yield f"account {name} is in group shadow, which reads all password hashes: take it out"


def _people(seen: AccountsSeen) -> list[Account]:
    return [a for a in seen.accounts if a.logs_in and a.uid != 0]


def _homes(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in _people(seen):
        if not account.home_owner:
            yield f"account {account.name} has no home directory {account.home}: make it or lock the account"


def _home_owners(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in _people(seen):
        if account.home_owner and account.home_owner != account.name:
            yield f"{account.home}, the home of {account.name}, belongs to {account.home_owner}: chown it"


def _trust(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for path in seen.trust_files:
        yield f"{path} lets others in, or holds a password, without anybody asking: remove it"


def _root_password(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if account.name == "root" and account.secret == EMPTY:
            yield "root has no password: set one or lock it with `passwd -l root`"


def _past(seen: AccountsSeen, _wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        if account.secret == SET and account.changed_day is not None and account.changed_day > seen.today:
            yield f"the password of {account.name} was changed in the future: set it anew, its age counts from then"


def _expire(seen: AccountsSeen, wanted: Any) -> Iterator[str]:
    most, least = wanted.get("max"), wanted.get("min")
    for account in seen.accounts:
        if account.secret != SET or not account.logs_in:
            continue
        if account.max_days is None or account.max_days > most:
            lasts = "for ever" if account.max_days is None else f"{account.max_days} days"
            yield f"the password of {account.name} lasts {lasts}: run `chage -M {most} {account.name}`"
        if least is not None and (account.min_days or 0) < least:
            yield f"the password of {account.name} can be changed back at once: run `chage -m {least} {account.name}`"


def _inactive(seen: AccountsSeen, wanted: Any) -> Iterator[str]:
    for account in seen.accounts:
        days = account.inactive_days
        if account.secret == SET and account.logs_in and (days is None or days > int(wanted)):
            yield f"account {account.name} outlives its expired password: run `chage -I {wanted} {account.name}`"


_CHECKS = {
    "only_root_has_uid_0": _root_uid,
    "no_empty_passwords": _empty,
    "unique_uids": _uids,
    "system_accounts_have_no_shell": _system_shells,
    "key_logins_do_not_expire": _key_logins,
    "passwords_shadowed": _shadowed,
    "unique_names": _names,
    "unique_group_names": _group_names,
    "unique_gids": _gids,
    "primary_groups_exist": _primary_groups,
    "root_has_gid_0": _root_gid,
    "only_root_group_has_gid_0": _root_group,
    "shadow_group_empty": _shadow_group,
    "homes_exist": _homes,
    "homes_owned": _home_owners,
    "no_trust_files": _trust,
    "root_password_set_or_locked": _root_password,
    "password_changes_in_past": _past,
    "passwords_expire": _expire,
    "passwords_inactive": _inactive,
}
