# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the engine looks at in files alone: kernel values, modules, documents, accounts, permissions."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node import harden_plan, plan_accounts
from ansible_collections.censuschat.infra.plugins.module_utils.node.harden_plan import Document, Permission
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_accounts import (
    Account,
    AccountsSeen,
    Group,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    NodeError,
    PathState,
    observe_path,
    owner_name,
)

_TRUST = (".rhosts", ".netrc", ".forward", ".shosts")
_TRUST_EVERYWHERE = ("/etc/hosts.equiv", "/etc/shosts.equiv")


def kernel_path(key: str) -> str:
    """The /proc/sys path of a sysctl key; a slash in the key stands for a dot in a name, as in sysctl.d."""
    return "/proc/sys/" + "/".join(part.replace("/", ".") for part in key.split("."))


def kernel(keys: Iterable[str]) -> dict[str, str]:
    """The running values of `keys`, each `*` expanded; keys the kernel does not have are left out."""
    values: dict[str, str] = {}
    for key in keys:
        for path in glob.glob(kernel_path(key)) if "*" in key else [kernel_path(key)]:
            name = ".".join(part.replace(".", "/") for part in path[len("/proc/sys/") :].split("/"))
            try:
                with open(path, encoding="utf-8") as handle:
                    values[name] = harden_plan.normal(handle.read())
            except OSError:
                continue
    return values


def modules() -> frozenset[str]:
    """The names of the loaded kernel modules; none on a kernel that was built without them."""
    try:
        with open("/proc/modules", encoding="utf-8") as handle:
            return frozenset(line.split(" ", 1)[0] for line in handle)
    except FileNotFoundError:
        return frozenset()


def permissions(wanted: Sequence[Permission]) -> dict[str, PathState]:
    """Owner and mode of all paths that `wanted` speaks of."""
    found: dict[str, PathState] = {}
    for want in wanted:
        for pattern in want.paths:
            for top in glob.glob(pattern, include_hidden=True):
                for path in _below(top) if want.recursive else (top,):
                    if path not in found:
                        found[path] = observe_path(path)
    return found


def _below(top: str) -> Iterator[str]:
    yield top
    if os.path.isdir(top) and not os.path.islink(top):
        for directory, directories, files in os.walk(top):
            for name in (*directories, *files):
                yield os.path.join(directory, name)


def read_document(document: Document) -> dict[str, Any]:
    """A program's configuration as it counts: all files of the document's paths, later ones over earlier ones."""
    try:
        import yaml  # Debian's python3-yaml, which a cluster's nodes have; other controls do without.
    except ImportError:
        raise NodeError("python3-yaml is missing on this node, which YAML is read with: install it") from None
    merged: dict[str, Any] = {}
    for pattern in document.paths:
        for path in sorted(glob.glob(pattern)):
            try:
                with open(path, encoding="utf-8") as handle:
                    content = yaml.safe_load(handle) or {}
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise NodeError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
            if not isinstance(content, Mapping):
                raise NodeError(f"{path} is not a mapping")
            merged = harden_plan.merge(merged, content)
    return harden_plan.flags_of(merged) if document.kind == "flags" else merged


def accounts(root: str = "") -> AccountsSeen:
    """All local accounts and groups, with whether their password is empty, locked or set."""
    shadow = {line[0]: line for line in _table(f"{root}/etc/shadow")}
    found = []
    trust = [path for path in _TRUST_EVERYWHERE if os.path.lexists(root + path)]
    for fields in _table(f"{root}/etc/passwd"):
        if len(fields) != 7:
            continue
        name, field, uid, gid, _comment, home, shell = fields
        entry = [*shadow.get(name, [name, "*"]), *[""] * 9]
        secret = plan_accounts.EMPTY if not entry[1] else plan_accounts.SET
        secret = plan_accounts.LOCKED if entry[1][:1] in ("!", "*") else secret
        account = Account(
            name=name,
            uid=int(uid),
            shell=shell,
            secret=secret,
            max_days=_days(entry[4]),
            gid=int(gid),
            home=home,
            home_owner=_owner(root + home),
            min_days=_days(entry[3]),
            inactive_days=_days(entry[6]),
            changed_day=_days(entry[2]),
            shadowed=field == "x",
        )
        found.append(account)
        if account.logs_in:
            trust += [f"{home}/{file}" for file in _TRUST if os.path.lexists(f"{root}{home}/{file}")]
    groups = tuple(
        Group(line[0], int(line[2]), tuple(m for m in line[3].split(",") if m))
        for line in _table(f"{root}/etc/group")
        if len(line) == 4
    )
    return AccountsSeen(tuple(found), groups, tuple(dict.fromkeys(trust)), int(time.time() // 86400))


def _table(path: str) -> Iterator[list[str]]:
    with open(path, encoding="utf-8", errors="surrogateescape") as handle:
        for line in handle:
            if line.strip() and not line.startswith(("#", "+", "-")):
                yield line.rstrip("\n").split(":")


def _days(text: str) -> int | None:
    return int(text) if text.isdigit() and int(text) < plan_accounts.NEVER_DAYS else None


def _owner(path: str) -> str:
    try:
        return owner_name(os.stat(path).st_uid)
    except OSError:
        return ""
