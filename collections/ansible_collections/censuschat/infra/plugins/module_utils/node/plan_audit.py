# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of audit rules: the rules file and the loaded rules, in a form in which the two can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action

# augenrules reads the directory in order; ours come last so that nothing after them takes them back.
RULES_FILE = "/etc/audit/rules.d/99-zz-censuschat.rules"
_UNSET = ("-1", "4294967295", "unset")


@dataclasses.dataclass(frozen=True)
class AuditSeen:
    """The text of our rules file, and what `auditctl -l` says; None when the kernel does not answer, with the cause."""

    file: str = ""
    loaded: tuple[str, ...] | None = ()
    problem: str = ""
    locked: bool = False
    """The rules are immutable until the next boot (`-e 2` was loaded)."""


def normal(rule: str) -> str:
    """A rule with what the kernel may write otherwise evened out; "" for options that are no rules (-b, -e ...).

    A watch and its form as a syscall rule become one, as do -k and key=, several -S, and the ways to write "unset".
    """
    words = rule.split()
    if not words or words[0] not in ("-w", "-a", "-A"):
        return ""
    where = ""
    fields: set[str] = set()
    calls: set[str] = set()
    for flag, value in _pairs(words):
        if flag == "-w":
            where = "always,exit"
            fields.add(f"path={value.rstrip('/') or '/'}")
        elif flag in ("-a", "-A"):
            where = ",".join(sorted(value.split(",")))
        elif flag == "-p":
            fields.add(f"perm={''.join(sorted(value))}")
        elif flag == "-k":
            fields.add(f"key={value}")
        elif flag == "-S":
            calls |= set(value.split(",")) - {"all"}
        elif flag == "-F":
            fields.add(_field(value))
        elif flag == "-C":
            fields.add(_comparison(value))
    if any(field.startswith(("path=", "dir=")) for field in fields):
        # A watch on a directory is shown as dir=, one on a file as path=; without permissions all are meant.
        fields = {f"path={f[4:].rstrip('/') or '/'}" if f.startswith("dir=") else f for f in fields}
        if not calls and not any(field.startswith("perm=") for field in fields):
            fields.add("perm=arwx")
    named = [f"-S {','.join(sorted(calls))}"] if calls else []
    return " ".join([where, *named, *sorted(fields)])


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(words[i], words[i + 1]) for i in range(len(words) - 1) if words[i].startswith("-") and i % 2 == 0]


def _field(text: str) -> str:
    for operator in ("!=", ">=", "<=", "&=", "=", ">", "<", "&"):
        name, found, value = text.partition(operator)
        if found:
            value = "unset" if name in ("auid", "loginuid", "sessionid") and value in _UNSET else value
            name = "auid" if name == "loginuid" else name
            value = "".join(sorted(value)) if name == "perm" else value
            value = value.rstrip("/") or "/" if name in ("path", "dir") else value
            return f"{name}{operator}{value}"
    return text


def _comparison(text: str) -> str:
    """Two fields of the event compared with each other; the kernel names them in its own order."""
    operator = "!=" if "!=" in text else "="
    return operator.join(sorted(text.split(operator)))


def arranged(rules: Sequence[str]) -> list[str]:
    """Each line once: options of the audit system first, rules in their order, and what locks them last."""
    once = list(dict.fromkeys(" ".join(rule.split()) for rule in rules))
    last = [rule for rule in once if rule.startswith("-e")]
    middle = [rule for rule in once if normal(rule)]
    return [*(rule for rule in once if rule not in last and rule not in middle), *middle, *last]


def render(rules: Sequence[str], header: str) -> str:
    """The whole rules file for the union of all controls."""
    return header + "".join(f"{rule}\n" for rule in arranged(rules))


def plan(rules: Sequence[str], seen: AuditSeen) -> list[Action]:
    """Rules that the file lacks, and rules that the kernel has not loaded."""
    stored = {" ".join(line.split()) for line in seen.file.splitlines() if not line.startswith("#")}
    actions = [
        Action("audit_file", RULES_FILE, f"{rule} at boot", rule, after=f"{rule}\n")
        for rule in arranged(rules)
        if rule not in stored
    ]
    loaded = {normal(line) for line in seen.loaded or ()}
    actions += [
        Action("audit_rule", rule, "is not loaded", rule, "not loaded\n", f"{rule}\n")
        for rule in arranged(rules)
        if normal(rule) and normal(rule) not in loaded
    ]
    if "-e 2" in arranged(rules) and not seen.locked:
        actions.append(Action("audit_rule", "-e 2", "the rules can still be changed", "-e 2", after="-e 2\n"))
    return actions


def split(actions: Sequence[Action], seen: AuditSeen) -> tuple[list[Action], str]:
    """What of `actions` can be carried out now, and why the rest cannot; the file is written in any case."""
    loading = [action for action in actions if action.kind == "audit_rule"]
    writing = [action for action in actions if action.kind != "audit_rule"]
    if loading and seen.loaded is None:
        return writing, f"the kernel's audit rules cannot be read: {seen.problem}"
    if loading and seen.locked:
        return writing, (
            f"{len(loading)} audit rules are not loaded, and the loaded ones are locked until the next boot (-e 2): "
            "reboot the node in a maintenance window, the file is read then"
        )
    return list(actions), ""
