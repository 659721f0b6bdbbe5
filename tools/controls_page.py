"""Writes the page of all hardening controls from the catalogue, or with ``--check`` tells whether it is up to date.

``scripts/run python -m tools.controls_page [--check]``. Exit code 1: with ``--check``, the page is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROLE = Path(__file__).resolve().parents[1] / "collections/ansible_collections/censuschat/infra/roles/hardening"
PAGE = ROLE / "CONTROLS.md"
PROFILES = ("baseline", "cis_level1", "cis_level2")
COMMAND = "scripts/run python -m tools.controls_page"
_NAMES = {
    "apparmor": "AppArmor",
    "pam": "PAM",
    "sshd": "sshd",
    "suid": "SUID and SGID programs",
    "sysctl": "Kernel parameters",
}


def load(role: Path = ROLE) -> tuple[dict[str, list[Mapping[str, Any]]], dict[str, Mapping[str, Any]]]:
    """The controls by domain, and what each scanner's file says, by its name."""
    domains = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((role / "files/catalogue").glob("*.yml"))}
    scanners = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((role / "files/scanners").glob("*.yml"))}
    return domains, scanners


def page(domains: Mapping[str, Sequence[Mapping[str, Any]]], scanners: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page, in Markdown."""
    controls = [control for entries in domains.values() for control in entries]
    parts = [
        "# Controls of the catalogue",
        f"<!-- Made from files/catalogue and files/scanners by `{COMMAND}`: change those. -->",
        f"{len(controls)} controls. [README.md](README.md) tells how one is chosen, changed or left out.",
        _counts(domains),
        *(_domain(name, entries) for name, entries in domains.items()),
        "## Scanners",
        *(_scanner(data) for data in scanners.values()),
    ]
    return "\n\n".join(parts) + "\n"


def _counts(domains: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        (
            f"[{_title(name)}](#{_anchor(name)})",
            str(len(entries)),
            *(str(sum(profile in c["profiles"] for c in entries)) for profile in PROFILES),
            str(sum("container" in c.get("holds", {}) for c in entries)),
        )
        for name, entries in domains.items()
    ]
    sums = [str(sum(int(row[column]) for row in rows)) for column in range(1, 6)]
    return _table(("Domain", "Controls", *PROFILES, "not in a container"), [*rows, ("All", *sums)])


def _domain(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join([f"## {_title(name)}", *(_control(control) for control in entries)])


def _control(control: Mapping[str, Any]) -> str:
    holds = control.get("holds", {})
    facts = [f"severity {control['severity']}", f"profiles {', '.join(control['profiles'])}"]
    if control.get("requires_path"):
        facts.append(f"where {control['requires_path']} exists")
    if control.get("unless_path"):
        facts.append(f"not where {control['unless_path']} exists")
    lines = [f"### {control['id']}", f"**{control['title']}.** {control['rationale']}", f"- {'; '.join(facts)}"]
    lines.append(f"- {', '.join(control['references'])}")
    lines += [f"- Side effects: {control['side_effects']}"] if control.get("side_effects") else []
    lines += [f"- Not in a {platform}: {reason}." for platform, reason in holds.items()]
    lines.append(f"- Holds: {', '.join(_state(control['state']))}")
    return "\n".join([lines[0], "", lines[1], "", *lines[2:]])


def _state(state: Mapping[str, Any]) -> Iterable[str]:
    """What of the node a control holds, in words short enough for a list."""
    for key, value in state.items():
        if key == "node":
            for kind, entries in value.items():
                names = [f"{verb} {n}" for verb, ns in entries.items() for n in ns] if kind == "packages" else entries
                yield f"{kind} {_short([_name(entry) for entry in names])}"
        elif key == "audit":
            yield f"audit: {len(value['rules'])} rules"
        elif isinstance(value, Mapping):
            yield f"{key} {_short([f'{k}={v}' if not isinstance(v, (list, dict)) else k for k, v in value.items()])}"
        else:
            yield f"{key} {_short([_name(entry) for entry in value])}"


def _name(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)
    for key in ("path", "name", "profile", "file", "scan", "unit"):
        if entry.get(key):
            return str(entry[key])
    return ", ".join(entry.get("paths") or entry.get("any_of") or entry.get("none_of") or ())


def _short(names: Sequence[str]) -> str:
    shown = [f"`{name}`" for name in names[:6]]
    return " ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _scanner(data: Mapping[str, Any]) -> str:
    held, reasons = data["rules"], data["without_control"]
    parts = [f"### {data['content']}"]
    rows = []
    for profile, rules in data.get("profiles", {}).items():
        mapped = sum(rule in held for rule in rules)
        rows.append((profile, str(len(rules)), str(mapped), str(len(rules) - mapped)))
    if rows:
        parts.append(_table(("Profile", "Rules", "held by a control", "with a reason instead"), rows))
    else:
        parts.append(f"{len(held)} tests are answered by controls.")
    parts.append("What no control holds, and why:")
    parts.append("\n".join(f"- {entry['reason']}: {', '.join(f'`{r}`' for r in entry['rules'])}" for entry in reasons))
    return "\n\n".join(parts)


def _title(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " ").capitalize())


def _anchor(name: str) -> str:
    return _title(name).lower().replace(" ", "-")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it; the exit code."""
    parser = argparse.ArgumentParser(prog="tools.controls_page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when it is not up to date")
    check = parser.parse_args(arguments).check
    wanted = page(*load())
    if PAGE.exists() and PAGE.read_text() == wanted:
        print(f"up to date: {PAGE}")
        return 0
    if check:
        print(f"not up to date: {PAGE}; run {COMMAND}", file=sys.stderr)
        return 1
    PAGE.write_text(wanted)
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
