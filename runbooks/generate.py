"""What a definition yields: its playbook for plain Ansible, its page of documentation, and its objects in AWX.

All of it is text in the repository. ``drift`` says which file is not what the definitions yield now.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from runbooks import definition as definitions
from runbooks.definition import SHIPPED, Definition, Gate, Parameter, Step
from runbooks.environment import ROOT
from runbooks.errors import FAILED, INTERRUPTED, OK, REFUSED, WAITING

NAME_VARIABLE = "runbook_name"
STEP_VARIABLE = "runbook_step"
GATE_VARIABLE = "runbook_gate"
"""Variables of a generated playbook's plays: whose runbook's they are, of which of its steps, and as which gate."""

ARGUMENT_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}

END = r"\Z"
"""The end of a string in a pattern; a dollar sign would let a line break through."""

CODES = {
    OK: "Done, and no measured figure misses its target",
    FAILED: "A step failed, or a target of the environment was missed",
    2: "Bad input, or an environment that does not answer: nothing was touched",
    REFUSED: "Refused: another run is active, a window is closed, an approval is missing, or a gate said no",
    WAITING: "It waits for an approval",
    INTERRUPTED: "Interrupted; `runbook resume` goes on",
}


def root(definition: Definition) -> Path:
    """Below which directory a definition's files are written: the project, or what holds the runbook's definitions."""
    return ROOT if definition.path.parent == SHIPPED else definition.path.resolve().parent.parent


def playbook_path(definition: Definition, base: Path | None = None) -> Path:
    return (base or root(definition)) / "playbooks" / "runbooks" / f"{definition.name}.yml"


def page_path(definition: Definition, base: Path | None = None) -> Path:
    return (base or root(definition)) / "runbooks" / "docs" / "runbooks" / f"{definition.name}.md"


def outputs(names: Iterable[str], base: Path | None = None) -> dict[Path, str]:
    """File -> text of everything that these runbooks yield, below ``base`` when one is given.

    Raises Problem when a definition is broken.
    """
    from runbooks import awx

    runbooks = [definitions.load(name) for name in names]
    found = awx.export(runbooks, base)
    for runbook in runbooks:
        found[playbook_path(runbook, base)] = playbook(runbook, playbook_path(runbook, base).parent)
        found[page_path(runbook, base)] = page(runbook)
    return found


def drift(expected: Mapping[Path, str]) -> list[Path]:
    """The files that are missing or say something else."""
    return [path for path, text in expected.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def write(expected: Mapping[Path, str]) -> list[Path]:
    """Write what has drifted; which files that were."""
    drifted = drift(expected)
    for path in drifted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(expected[path], encoding="utf-8")
    return drifted


# -- the playbook


class _Dumper(yaml.SafeDumper):
    """Lists are indented, and templates stand in double quotes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "{{" in text else None)


_Dumper.add_representer(str, _text)


def dump(data: Any) -> str:
    """As YAML that yamllint takes."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def playbook(runbook: Definition, directory: Path) -> str:
    """The playbook that is the runbook for plain Ansible and AWX. directory: where it will be, for relative paths."""
    plays: list[dict[str, Any]] = [_validation(runbook)]
    for step in runbook.steps:
        plays += [_gate(step, f"before.{n}", gate, directory) for n, gate in enumerate(step.before)]
        plays.append(_imported(step.title, step, step.playbook, directory))
        plays += [_gate(step, f"after.{n}", gate, directory) for n, gate in enumerate(step.after)]
    head = (
        "---\n"
        f"# Made from {os.path.relpath(runbook.path, root(runbook))} by `runbook generate`: change that, not this.\n"
        f"# {runbook.title}.\n"
        "# The callback censuschat.infra.runbook_journal makes it a run: lock, windows, approvals and journal.\n"
    )
    if any(step.before or step.after for step in runbook.steps):
        head += "# Gates judge what the steps before them did, nothing in check mode: there they are left out.\n"
    return head + "\n".join(dump([play]) for play in plays)


def _imported(title: str, step: Step, playbook: Path, directory: Path) -> dict[str, Any]:
    return {
        "name": title,
        "ansible.builtin.import_playbook": os.path.relpath(playbook, directory),
        "vars": {STEP_VARIABLE: step.id},
        "tags": [step.id],
    }


def _gate(step: Step, which: str, gate: Gate, directory: Path) -> dict[str, Any]:
    imported = _imported(f"Gate: {gate.title}", step, gate.playbook, directory)
    # In check mode the steps before it had no effect, which is what it judges.
    return {**imported, "vars": {STEP_VARIABLE: step.id, GATE_VARIABLE: which}, "when": "not ansible_check_mode"}


def _validation(runbook: Definition) -> dict[str, Any]:
    tasks: list[dict[str, Any]] = [
        {
            "name": "Refuse to run unwatched",
            "ansible.builtin.assert": {
                "that": "runbook_door is defined",
                "fail_msg": (
                    "Nothing would lock the environment or keep a journal, because the callback "
                    "censuschat.infra.runbook_journal is not enabled. Nothing was touched. next: add it to "
                    "callbacks_enabled in ansible.cfg"
                ),
                "quiet": True,
            },
        }
    ]
    if runbook.parameters:
        parameters = runbook.parameters.values()
        tasks.append(
            {
                "name": "Check the parameters",
                "ansible.builtin.validate_argument_spec": {
                    "argument_spec": {p.name: _argument(p) for p in parameters},
                    "provided_arguments": {p.name: f"{{{{ {p.name} | default(omit) }}}}" for p in parameters},
                },
                **({"no_log": True} if any(p.secret for p in parameters) else {}),
            }
        )
        tasks += [
            {
                "name": f"Check the limits of {p.name}",
                "ansible.builtin.assert": {
                    "that": [f"{p.name} is not defined or {condition}" for condition in _conditions(p)],
                    "fail_msg": f"Parameter {p.name} of runbook {runbook.name} must be {_expected(p)}",
                    "quiet": True,
                },
                **({"no_log": True} if p.secret else {}),
            }
            for p in parameters
            if _conditions(p)
        ]
    return {
        "name": f"Check what {runbook.name} is given",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tags": ["always"],
        "vars": {NAME_VARIABLE: runbook.name},
        "tasks": tasks,
    }


def _argument(parameter: Parameter) -> dict[str, Any]:
    argument: dict[str, Any] = {"description": parameter.title, "type": ARGUMENT_TYPES[parameter.type]}
    if parameter.required:
        argument["required"] = True
    if parameter.choices is not None:
        argument["choices"] = parameter.choices
    if parameter.secret:
        argument["no_log"] = True
    return argument


def _conditions(parameter: Parameter) -> list[str]:
    """Conditions of a given value that an argument specification cannot express."""
    name, number = parameter.name, "int" if parameter.type == "integer" else "float"
    found = []
    if parameter.minimum is not None:
        found.append(f"{name} | {number} >= {parameter.minimum:g}")
    if parameter.maximum is not None:
        found.append(f"{name} | {number} <= {parameter.maximum:g}")
    if parameter.pattern is not None:
        found.append(f"{name} is ansible.builtin.regex({literal('^(?:' + parameter.pattern + ')' + END)})")
    return found


def literal(text: str) -> str:
    """The text as a literal of a Jinja expression."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _expected(parameter: Parameter) -> str:
    if parameter.pattern is not None:
        return f"a string that matches {parameter.pattern}"
    outside = (parameter.maximum or 0) + 1 if parameter.maximum is not None else (parameter.minimum or 0) - 1
    return parameter.expected(int(outside) if parameter.type == "integer" else outside)


# -- the page


def page(runbook: Definition) -> str:
    """The runbook's page: what it is for, what it needs, does and undoes, and how it is run."""
    parts = [
        f"# {runbook.title}",
        f"<!-- Made from {os.path.relpath(runbook.path, root(runbook))} by `runbook generate`: change that. -->",
        runbook.purpose,
        _facts(runbook),
        "## Steps",
        _diagram(runbook),
        _steps(runbook),
        *_gates(runbook),
        "## Undo",
        _undo(runbook),
        "## Parameters",
        _parameters(runbook),
        "## Run it",
        _doors(runbook),
        "## Before anything is touched",
        "These must answer: " + "; ".join(_reach(item) for item in runbook.reach) + "."
        if runbook.reach
        else "Nothing outside of this machine is needed.",
        "## Exit codes",
        _table(("Code", "Meaning"), [(str(code), meaning) for code, meaning in CODES.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(runbook: Definition) -> str:
    approvals = runbook.approvals
    need = (
        "None" if approvals.need == 0 else f"{approvals.need} of {', '.join(approvals.of) or 'the trusted approvers'}"
    )
    windows = "Only inside the environment's (`runbook_windows`)" if runbook.windows == "inherit" else "At any time"
    rows = [
        ("Owner", runbook.owner),
        ("Severity", runbook.severity),
        ("Windows", windows),
        ("Approvals", f"{need}, unless the inventory's `runbook_approvals` says otherwise"),
        ("Locks", ", ".join(runbook.locks)),
        ("Tells people", ", ".join(runbook.notifications) or "nothing"),
    ]
    rows += [(title, _code(value)) for title, value in _targets(runbook)]
    rows += [("Scheduled", f"{s.name}: `{s.rrule}`{_given(s.parameters)}") for s in runbook.schedule]
    return _table(("", ""), rows)


def _targets(runbook: Definition) -> list[tuple[str, Any]]:
    titles = {
        "rto_s": "Recovery time at most (s)",
        "rto_database_s": "Of the database at most (s)",
        "rpo_s": "Writes lost at most (s)",
        "lost_acknowledged": "Acknowledged writes lost at most",
    }
    return [(titles[name], value) for name, value in runbook.targets.items()]


def _given(parameters: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value}" for name, value in parameters.items())


def _diagram(runbook: Definition) -> str:
    lines = ["```mermaid", "flowchart TD", f"  begin([{_label(runbook.name)}])"]
    before = "begin"
    if runbook.approvals.need:
        lines += [f"  approvals{{{{{_label(f'{runbook.approvals.need} approvals')}}}}}", f"  {before} --> approvals"]
        before = "approvals"
    for number, step in enumerate(runbook.steps, 1):
        chain = [(f"b{number}_{n}", gate.title, True) for n, gate in enumerate(step.before)]
        if step.approval:
            chain.insert(0, (f"w{number}", "Approval", True))
        chain.append((f"s{number}", f"{step.id}<br/>{step.title}<br/>{step.budget_s:g} s", step.gate))
        chain += [(f"a{number}_{n}", gate.title, True) for n, gate in enumerate(step.after)]
        for node, text, gate_like in chain:
            opening, closing = ("{{", "}}") if gate_like else ("[", "]")
            lines += [f"  {node}{opening}{_label(text)}{closing}", f"  {before} --> {node}"]
            before = node
        if step.undo and step.undo.playbook:
            way = "-.->|failure|" if step.on_failure == "undo" else "-.->|runbook undo|"
            lines += [f"  u{number}[/{_label(step.undo.title)}/]", f"  s{number} {way} u{number}"]
    lines += ["  done([Done])", f"  {before} --> done", "```"]
    return "\n".join(lines)


def _label(text: str) -> str:
    return '"' + text.replace('"', "#quot;") + '"'


def _steps(runbook: Definition) -> str:
    rows = []
    for number, step in enumerate(runbook.steps, 1):
        notes = [
            "a gate: it opens the way or refuses, without a change" if step.gate else "",
            "waits for an approval" if step.approval else "",
            "takes itself and the steps before it back when it fails" if step.on_failure == "undo" else "",
            f"in AWX {step.slices} jobs, each with its share of the hosts" if step.slices > 1 else "",
        ]
        title = step.title + "".join(f"; {note}" for note in notes if note)
        touches = ", ".join(step.touches) or "nothing"
        rows.append(
            (
                str(number),
                f"`{step.id}`",
                title,
                touches,
                _code(step.hosts),
                f"{step.budget_s:g}",
                f"{step.timeout_s:g}",
            )
        )
    return _table(("", "Step", "What it does", "Touches", "Hosts", "Budget (s)", "Stopped after (s)"), rows)


def _gates(runbook: Definition) -> list[str]:
    rows = [
        (f"{where} `{step.id}`", gate.title, f"`{gate.playbook.name}`")
        for step in runbook.steps
        for where, gates in (("Before", step.before), ("After", step.after))
        for gate in gates
    ]
    if not rows:
        return []
    text = "A gate only observes. When it does not hold, the run stops there and the gate names what blocks."
    return ["## Gates", text, _table(("When", "What must hold", "Playbook"), rows)]


def _undo(runbook: Definition) -> str:
    rows = []
    for step in runbook.steps:
        if step.undo is None:
            how = "Not said"
        elif step.undo.playbook:
            how = f"{step.undo.title} (`{step.undo.playbook.name}`)"
        else:
            how = step.undo.says
        rows.append((f"`{step.id}`", how))
    ways = any(step.undo and step.undo.playbook for step in runbook.steps)
    text = (
        "`runbook undo RUN` takes back what the finished steps did, the latest first, where a playbook can:"
        if ways
        else "No step of it is taken back by a playbook:"
    )
    return text + "\n\n" + _table(("Step", "How it is undone"), rows)


def _parameters(runbook: Definition) -> str:
    if not runbook.parameters:
        return "None."
    rows = []
    for p in runbook.parameters.values():
        default = "required" if p.required else "observed" if p.default_from else _code(p.default)
        rows.append((f"`{p.name}`", p.title, p.type, default, _allowed(p)))
    secret = (
        "\n\nA secret one is read from the environment variable `RUNBOOK_PARAM_NAME` or asked for; it is never shown."
        if any(p.secret for p in runbook.parameters.values())
        else ""
    )
    return _table(("Name", "What it is", "Type", "Default", "Allowed"), rows) + secret


def _allowed(parameter: Parameter) -> str:
    parts = []
    if isinstance(parameter.choices, list):
        parts.append(", ".join(_code(choice) for choice in parameter.choices))
    elif parameter.choices:
        parts.append(_code(parameter.choices))
    if parameter.minimum is not None or parameter.maximum is not None or parameter.pattern is not None:
        parts.append(_expected(parameter).replace(parameter.pattern or "\0", _code(parameter.pattern or "")))
    return "; ".join([*parts, *(["secret"] if parameter.secret else [])])


def _doors(runbook: Definition) -> str:
    needed = [p for p in runbook.parameters.values() if p.required and not p.secret]
    flags = "".join(f" --{p.name.replace('_', '-')} {p.name.upper()}" for p in needed)
    extra = "".join(f" -e {p.name}={p.name.upper()}" for p in needed)
    name = runbook.name
    return f"""\
The three doors keep to the same lock, windows, approvals and gates, and write the same journal.

```
runbook plan {name} -i INVENTORY{flags}     # what it would change
runbook run {name} -i INVENTORY{flags}      # every parameter is a flag
ansible-playbook -i INVENTORY playbooks/runbooks/{name}.yml{extra}
```

In AWX it is a workflow template with the parameters as its survey (`playbooks/awx.yml` brings it there). Wherever it
was begun, `runbook status` shows it and `runbook resume RUN` goes on where it ended without success."""


def _reach(item: definitions.Reach) -> str:
    if item.url:
        return f"the server of {_code(item.url)}, {item.why}"
    where = _code(item.hosts) + (f" at port {item.port}" if item.port else " over ssh")
    need = {"all": "all of", "majority": "the majority of"}.get(str(item.need), f"{item.need} of")
    return f"{need} {where}, {item.why}"


def _code(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
