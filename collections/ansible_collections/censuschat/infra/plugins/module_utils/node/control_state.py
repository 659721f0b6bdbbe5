# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a control's state may be made of: shapes, value ranges, merging, and what two controls may not both claim.

Pure: runs on the controller before any node is touched. Every refusal is one sentence that names control and remedy.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Desired
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

# Documents are programs' own configurations: read, never written here.
DOCUMENT_KINDS = ("yaml", "flags")
EXPECTATIONS = ("absent", "at_least", "contains", "default", "equals", "excludes", "one_of", "present", "within")
ACCOUNT_RULES = (
    "homes_exist",
    "homes_owned",
    "key_logins_do_not_expire",
    "no_empty_passwords",
    "no_trust_files",
    "only_root_group_has_gid_0",
    "only_root_has_uid_0",
    "password_changes_in_past",
    "passwords_shadowed",
    "primary_groups_exist",
    "root_has_gid_0",
    "root_password_set_or_locked",
    "shadow_group_empty",
    "system_accounts_have_no_shell",
    "unique_gids",
    "unique_group_names",
    "unique_names",
    "unique_uids",
)
# Judged for accounts with a password only: days, as chage(1) takes them.
PASSWORD_AGES = ("passwords_expire", "passwords_inactive")
SCANS = ("no_sticky", "unowned", "world_writable")
# Which key tells the entries of a list apart, so that an override reaches one of them.
IDENTITIES = ("path", "profile", "file", "unit", "name", "scan")

_SYSCTL = re.compile(r"^[a-z0-9_]+(\.[A-Za-z0-9_/*-]+)+$")
_MODULE = re.compile(r"^[A-Za-z0-9_-]+$")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_OPTION = re.compile(r"^[A-Za-z0-9_=.:/%-]+$")
_UNIT = re.compile(r"^[A-Za-z0-9:_.\\@-]+\.(service|socket|timer|target|path|mount|slice)$")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The keys of a mapping: `required` ones and others it may have."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def check(self, data: Any, where: str) -> None:
        """NodeError when `data` is not a mapping of these keys; `where` begins the sentence."""
        known = (*self.required, *self.optional)
        if not isinstance(data, Mapping):
            raise NodeError(f"{where} is a mapping of {', '.join(known)}, not {data!r}")
        missing = [key for key in self.required if data.get(key) in (None, "", [], {})]
        if missing:
            raise NodeError(f"{where} lacks {', '.join(missing)}")
        unknown = [str(key) for key in data if key not in known]
        if unknown:
            raise NodeError(f"{where} knows {', '.join(known)}, not {', '.join(unknown)}")


_NODE = Shape(optional=("packages", "groups", "users", "directories", "files", "links", "absent", "services"))
_NODE_ENTRIES: Mapping[str, Shape] = {
    "groups": Shape(("name",), ("system",)),
    "users": Shape(("name",), ("system", "groups", "shell", "home", "create_home")),
    "directories": Shape(("path",), ("owner", "group", "mode")),
    "files": Shape(("path",), ("content", "owner", "group", "mode", "secret", "validate")),
    "links": Shape(("path", "target")),
    "services": Shape(("name",), ("enabled", "state", "restart_on", "reload_on", "masked")),
}


def check_state(state: Any, name: str) -> None:
    """Refuse a desired state that the engine would not understand; `name` says whose it is."""
    if not isinstance(state, Mapping) or not state:
        raise NodeError(f"{name}: state is a mapping of {', '.join(STATE_KEYS)}")
    unknown = [str(key) for key in state if key not in _CHECKS]
    if unknown:
        raise NodeError(f"{name}: state knows {', '.join(STATE_KEYS)}, not {', '.join(unknown)}")
    for key, value in state.items():
        _CHECKS[key](value, f"{name}: {key}")


def _entries(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise NodeError(f"{where} is a list with at least one entry, not {value!r}")
    return value


def _texts(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise NodeError(f"{where} is a list of texts, not {value!r}")


def _paths(value: Any, where: str) -> None:
    _texts(value, where)
    wrong = [path for path in value if not path.startswith("/")]
    if wrong:
        raise NodeError(f"{where}: {wrong[0]!r} is not an absolute path")


def _boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise NodeError(f"{where} is true or false, not {value!r}")


def _scalars(value: Any, where: str) -> None:
    if not isinstance(value, Mapping) or not value:
        raise NodeError(f"{where} is a mapping of keys to values, not {value!r}")
    for key, one in value.items():
        if not isinstance(one, (int, str)) or isinstance(one, bool) or "\n" in str(one):
            raise NodeError(f"{where} {key} needs a number or a text, not {one!r}")


def _sysctl(value: Any, where: str) -> None:
    for key in value if isinstance(value, Mapping) else ():
        if not _SYSCTL.match(str(key)):
            raise NodeError(f"{where}: {key!r} is not a sysctl key in dots")
    _scalars(value, where)


def _modules(value: Any, where: str) -> None:
    _texts(value, where)
    wrong = [name for name in value if not _MODULE.match(name)]
    if wrong:
        raise NodeError(f"{where}: {wrong[0]!r} is not the name of a kernel module")


def _settings(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        if not isinstance(entry, Mapping) or not entry.get("path") or not isinstance(entry.get("values"), Mapping):
            raise NodeError(f"{where} need a path and values")
        Shape(("path", "values"), ("separator",)).check(entry, f"{where} of {entry['path']}")
        if entry.get("separator", " ") not in (" ", " = ", "="):
            raise NodeError(f"{where}: separator is ' ', '=' or ' = '")
        _paths([entry["path"]], where)
        _scalars(entry["values"], f"{where} of {entry['path']}:")


def _octal(entry: Mapping[str, Any], key: str) -> bool:
    mode = entry.get(key, "0000")
    return isinstance(mode, str) and re.fullmatch(r"0?[0-7]{3,4}", mode) is not None


def _permissions(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        if isinstance(entry, Mapping) and "scan" in entry:
            Shape(("scan",), ("allowed", "repair")).check(entry, f"{where} scan")
            if entry["scan"] not in SCANS:
                raise NodeError(f"{where}: scan is one of {', '.join(SCANS)}, not {entry['scan']!r}")
            _paths(entry.get("allowed", []), f"{where} scan {entry['scan']}: allowed")
            _boolean(entry.get("repair", False), f"{where} scan {entry['scan']}: repair")
            if entry["scan"] == "unowned" and entry.get("repair"):
                raise NodeError(f"{where} scan unowned: repair is not possible, only a person knows whose a file is")
            continue
        if not isinstance(entry, Mapping) or not entry.get("paths"):
            raise NodeError(f"{where} need paths and an octal mode in quotes")
        if not _octal(entry, "mode") or not _octal(entry, "directory_mode"):
            raise NodeError(f"{where} need paths and an octal mode in quotes")
        known = ("owner", "owners", "groups", "mode", "directory_mode", "recursive", "except", "kind")
        Shape(("paths",), known).check(entry, where)
        _paths(entry["paths"], f"{where}: paths")
        _paths(entry.get("except", []), f"{where}: except")
        _texts(entry.get("groups", []), f"{where}: groups")
        _texts(entry.get("owners", []), f"{where}: owners")
        _boolean(entry.get("recursive", False), f"{where}: recursive")
        if entry.get("kind", "file") not in ("file", "directory"):
            raise NodeError(f"{where}: kind is file or directory, or left out for both, not {entry['kind']!r}")
        if "owner" in entry and "owners" in entry:
            raise NodeError(f"{where}: owner and owners say the same: keep one of them")
        if "directory_mode" in entry and not entry.get("recursive"):
            raise NodeError(f"{where}: directory_mode belongs to recursive: true")


def _days(value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 99999:
        raise NodeError(f"{where} is a number of days from 1 to 99998, not {value!r}")


def _accounts(value: Any, where: str) -> None:
    Shape(optional=(*ACCOUNT_RULES, *PASSWORD_AGES)).check(value, where)
    for rule, wanted in value.items():
        if rule == "passwords_inactive":
            _days(wanted, f"{where} {rule}")
        elif rule == "passwords_expire":
            Shape(("max",), ("min",)).check(wanted, f"{where} {rule}")
            for days in wanted.values():
                _days(days, f"{where} {rule}")
        else:
            _boolean(wanted, f"{where} {rule}")


def _documents(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        if (
            not isinstance(entry, Mapping)
            or not entry.get("paths")
            or entry.get("kind") not in DOCUMENT_KINDS
            or not entry.get("remedy")
        ):
            raise NodeError(f"{where} need paths, a kind ({', '.join(DOCUMENT_KINDS)}) and a remedy")
        Shape(("paths", "kind", "remedy"), ("expect",)).check(entry, where)
        for key, wanted in (entry.get("expect") or {"(nothing)": {}}).items():
            unknown = [t for t in wanted if t not in EXPECTATIONS] if isinstance(wanted, Mapping) else []
            if unknown or wanted == {} or isinstance(wanted, list):
                raise NodeError(f"{where} expect {key}: a value, or a mapping of {', '.join(EXPECTATIONS)}")


def _sshd(value: Any, where: str) -> None:
    if not isinstance(value, Mapping) or not value:
        raise NodeError(f"{where} is a mapping of sshd_config keywords to values, not {value!r}")
    for key, wanted in value.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if not values or any(isinstance(v, Mapping) or v is None for v in values):
            raise NodeError(f"{where} {key} needs a value or a list of values, not {wanted!r}")


def _node(value: Any, where: str) -> None:
    _NODE.check(value, where)
    Shape(optional=("present", "absent")).check(value.get("packages", {}), f"{where} packages")
    for key, shape in _NODE_ENTRIES.items():
        for entry in value.get(key) or ():
            shape.check(entry, f"{where} {key}")
            if key == "files" and not isinstance(entry.get("content"), str):
                raise NodeError(f"{where} files: {entry['path']} needs its content as a text")
    try:
        Desired.of(value)
    except NodeError as error:
        raise NodeError(f"{where}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise NodeError(f"{where} cannot be read: {error}") from error


def _mounts(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        Shape(("path",), ("options", "kind", "size", "separate")).check(entry, where)
        path = entry["path"]
        _paths([path], where)
        _texts(entry.get("options", []), f"{where} {path}: options")
        wrong = [option for option in entry.get("options", []) if not _OPTION.match(option)]
        if wrong:
            raise NodeError(f"{where} {path}: {wrong[0]!r} is not one mount option")
        if entry.get("kind", "tmpfs") != "tmpfs":
            raise NodeError(f"{where} {path}: kind is tmpfs or left out, other filesystems are made by a person")
        if "size" in entry and not re.fullmatch(r"[1-9][0-9]*[kmgKMG%]?", str(entry["size"])):
            raise NodeError(f"{where} {path}: size is a number with k, m, g or %, as in 2G, not {entry['size']!r}")
        if "size" in entry and "kind" not in entry:
            raise NodeError(f"{where} {path}: size belongs to kind: tmpfs")
        _boolean(entry.get("separate", True), f"{where} {path}: separate")
        if entry.get("separate", True) is False and "kind" in entry:
            raise NodeError(f"{where} {path}: separate: false and kind contradict each other, keep one of them")


def _pam(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        Shape(("profile",), ("content", "disable")).check(entry, where)
        if not _NAME.match(entry["profile"]):
            raise NodeError(f"{where}: {entry['profile']!r} is not a file name for /usr/share/pam-configs")
        if bool(entry.get("content")) == bool(entry.get("disable")):
            raise NodeError(f"{where} {entry['profile']} needs either its content or disable: true")
        if entry.get("content") and not re.search(r"^(Auth|Account|Password|Session)-Type:", entry["content"], re.M):
            raise NodeError(f"{where} {entry['profile']}: its content is not in the form of pam-configs")


def _pam_service(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        Shape(("file",), ("line", "after", "module", "add", "remove")).check(entry, where)
        if not _NAME.match(entry["file"]):
            raise NodeError(f"{where}: {entry['file']!r} is not a file name in /etc/pam.d")
        if bool(entry.get("line")) == bool(entry.get("module")):
            raise NodeError(f"{where} {entry['file']} needs either a line or a module with add or remove")
        if "line" in entry and not re.match(
            r"-?(auth|account|password|session)\s+(\[[^]]*\]|\S+)\s+\S+", entry["line"]
        ):
            raise NodeError(f"{where} {entry['file']}: {entry['line']!r} is not `type control module arguments`")
        _texts(entry.get("add", []), f"{where} {entry['file']}: add")
        _texts(entry.get("remove", []), f"{where} {entry['file']}: remove")
        if "module" in entry and not entry.get("add") and not entry.get("remove"):
            raise NodeError(f"{where} {entry['file']}: {entry['module']} needs arguments to add or to remove")


def _audit(value: Any, where: str) -> None:
    Shape(("rules",)).check(value, where)
    _texts(value["rules"], f"{where}: rules")
    wrong = [r for r in value["rules"] if not re.match(r"-(w|a|A|b|f|e|r|D|c|i)\b|--[a-z]", r) or "\n" in r]
    if wrong:
        raise NodeError(f"{where}: {wrong[0]!r} is not a line of auditctl(8)")


def _ports(value: Any, where: str) -> None:
    if not isinstance(value, list):
        raise NodeError(f"{where} is a list of port numbers, not {value!r}")
    for port in value:
        ends = str(port).split("-")
        good = not isinstance(port, bool) and len(ends) <= 2 and all(e.isdigit() and 0 < int(e) < 65536 for e in ends)
        if not good or int(ends[0]) > int(ends[-1]):
            raise NodeError(f"{where}: {port!r} is not a port from 1 to 65535 or a range of them such as 6000-6010")


def _firewall(value: Any, where: str) -> None:
    Shape(("table", "ruleset"), ("tcp_ports", "udp_ports")).check(value, where)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(value["table"])):
        raise NodeError(f"{where}: {value['table']!r} is not a name for a table")
    ruleset = value["ruleset"]
    if not isinstance(ruleset, str) or re.search(r"^\s*(table|flush|include)\b", ruleset, re.M):
        raise NodeError(
            f"{where}: ruleset holds the chains and sets of its table only, without table, flush or include"
        )
    for protocol in ("tcp", "udp"):
        key = f"{protocol}_ports"
        _ports(value.get(key, []), f"{where}: {key}")
        if value.get(key) and f"@{key.upper()}@" not in ruleset:
            raise NodeError(f"{where}: {key} are given, but the ruleset has no @{key.upper()}@ for them")


def _suid(value: Any, where: str) -> None:
    Shape(optional=("allowed", "strip")).check(value, where)
    if not value:
        raise NodeError(f"{where} needs the paths that are allowed, or those to strip")
    for key in ("allowed", "strip"):
        _paths(value.get(key, []), f"{where}: {key}")
    both = sorted(set(value.get("allowed", [])) & set(value.get("strip", [])))
    if both:
        raise NodeError(f"{where}: {both[0]} is both allowed and to be stripped: keep one of them")


def _flag(key: str) -> Callable[[Any, str], None]:
    def check(value: Any, where: str) -> None:
        Shape((), (key,)).check(value, where)
        if value.get(key) is not True:
            raise NodeError(f"{where} knows {key}: true only; to leave it out exclude the control")

    return check


def _running(value: Any, where: str) -> None:
    for entry in _entries(value, where):
        Shape(("remedy",), ("any_of", "none_of", "unit", "newer_than")).check(entry, where)
        kinds = [key for key in ("any_of", "none_of", "unit") if entry.get(key)]
        if len(kinds) != 1:
            raise NodeError(f"{where}: an entry has one of any_of, none_of and unit")
        if "newer_than" in entry and kinds != ["unit"]:
            raise NodeError(f"{where}: newer_than belongs to unit")
        units = [entry["unit"]] if kinds == ["unit"] else entry[kinds[0]]
        _texts(units, f"{where}: {kinds[0]}")
        wrong = [unit for unit in units if not _UNIT.match(unit)]
        if wrong:
            raise NodeError(
                f"{where}: {wrong[0]!r} is not a full unit name; write it with its suffix, as in ssh.service"
            )
        _paths(entry.get("newer_than", []), f"{where}: newer_than")


_CHECKS: Mapping[str, Callable[[Any, str], None]] = {
    "accounts": _accounts,
    "apparmor": _flag("enforce"),
    "audit": _audit,
    "blocked_modules": _modules,
    "documents": _documents,
    "firewall": _firewall,
    "mounts": _mounts,
    "node": _node,
    "pam": _pam,
    "pam_service": _pam_service,
    "permissions": _permissions,
    "running": _running,
    "settings": _settings,
    "sshd": _sshd,
    "suid": _suid,
    "sysctl": _sysctl,
    "time": _flag("synchronised"),
}
STATE_KEYS = tuple(_CHECKS)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` put over it key by key; lists of mappings merge by what identifies their entries."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        now = result.get(key)
        if isinstance(value, Mapping) and isinstance(now, Mapping):
            result[key] = merged(now, value)
        elif isinstance(value, list) and isinstance(now, list):
            result[key] = _merged_list(now, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _identity(entry: Any) -> str:
    names = [key for key in IDENTITIES if isinstance(entry, Mapping) and isinstance(entry.get(key), str)]
    return f"{names[0]}={entry[names[0]]}" if names else ""


def _merged_list(base: Sequence[Any], over: Sequence[Any]) -> list[Any]:
    names = [_identity(entry) for entry in [*base, *over]]
    distinct = len(set(names[: len(base)])) == len(base) and len(set(names[len(base) :])) == len(over)
    if not all(names) or not distinct:
        return list(copy.deepcopy(over))
    result = {_identity(entry): entry for entry in copy.deepcopy(list(base))}
    for entry in over:
        result[_identity(entry)] = merged(result.get(_identity(entry), {}), entry)
    return list(result.values())


def check_ranges(ranges: Any, name: str) -> None:
    """Refuse `ranges` (leaf key to min and max, or one_of) that say nothing."""
    if not isinstance(ranges, Mapping):
        raise NodeError(f"{name}: ranges is a mapping of keys to min and max, or to one_of")
    for key, bounds in ranges.items():
        Shape(optional=("min", "max", "one_of")).check(bounds, f"{name}: ranges {key}")
        numbers = [bounds[edge] for edge in ("min", "max") if edge in bounds]
        if not bounds or any(not isinstance(n, (int, float)) or isinstance(n, bool) for n in numbers):
            raise NodeError(f"{name}: ranges {key}: min and max are numbers, one_of is a list")


def check_values(state: Mapping[str, Any], ranges: Mapping[str, Any], name: str) -> None:
    """Refuse a value of `state` outside its range, or a range of a key that the state does not have."""
    found = list(_leaves(state))
    for key, bounds in ranges.items():
        values = [value for leaf, value in found if leaf == key]
        if not values:
            raise NodeError(f"{name}: ranges names {key}, which its state does not have")
        for value in values:
            problem = _outside(value, bounds)
            if problem:
                raise NodeError(f"{name}: {key} = {value} is out of range: {problem}")


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def _outside(value: Any, bounds: Mapping[str, Any]) -> str:
    if "one_of" in bounds:
        choices = [str(choice) for choice in bounds["one_of"]]
        return "" if str(value) in choices else f"choose {', '.join(choices)}"
    low, high = bounds.get("min"), bounds.get("max")
    span = f"from {low} to {high}" if low is not None and high is not None else ""
    span = span or (f"at least {low}" if low is not None else f"at most {high}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"it takes a number {span}"
    inside = (low is None or number >= low) and (high is None or number <= high)
    return "" if inside else f"it takes {span}"


def claims(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a state asks for, as (what, value): two controls may not want different values of one thing."""
    for key, value in (state.get("sysctl") or {}).items():
        yield key, str(value)
    for key, value in (state.get("sshd") or {}).items():
        yield f"sshd {key.lower()}", str(value)
    for setting in state.get("settings") or ():
        for key, value in setting["values"].items():
            yield f"{setting['path']}: {key}", str(value)
    node = state.get("node") or {}
    for file in node.get("files") or ():
        yield file["path"], file["content"]
    for path in node.get("absent") or ():
        yield path, "absent"
    packages = node.get("packages") or {}
    for verb in ("present", "absent"):
        for package in packages.get(verb) or ():
            yield f"package {package}", verb
    for service in node.get("services") or ():
        if service.get("masked") is not None:
            yield f"unit {service['name']}", "masked" if service["masked"] else "usable"
        elif service.get("enabled") or service.get("state") == "started":
            yield f"unit {service['name']}", "usable"
    for profile in state.get("pam") or ():
        yield f"PAM profile {profile['profile']}", profile.get("content") or "disabled"
    firewall = state.get("firewall") or {}
    if firewall:
        yield f"table inet {firewall['table']}", str(sorted(firewall.items(), key=str))
    suid = state.get("suid") or {}
    for verb in ("allowed", "strip"):
        for path in suid.get(verb) or ():
            yield f"the SUID bit of {path}", verb
