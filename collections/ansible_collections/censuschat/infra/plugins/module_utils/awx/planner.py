# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What has to change so that an AWX holds the wanted content: a pure function over what is wanted and what is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import (
    KINDS,
    MESSAGES,
    NOTIFICATIONS,
    SECRET,
    ContentError,
    Key,
    Thing,
)

Verb = Literal["create", "change", "delete", "synchronise"]
ORDER = {name: number for number, name in enumerate(KINDS)}
_MESSAGE_EVENTS = tuple(MESSAGES)


@dataclass(frozen=True)
class Step:
    """One change. fields: name -> (value there, value wanted), secrets as they are; lists of names likewise in many.

    synchronise: the project's files are to be fetched again; why says what for.
    """

    verb: Verb
    key: Key
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    many: Mapping[str, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)
    why: str = ""

    def names(self) -> list[str]:
        return sorted([*self.fields, *self.many])


@dataclass(frozen=True)
class Wish:
    """How the content is to be brought about.

    prune: delete templates with this label that are not wanted, and schedules of ours that are not. update_secrets:
    send every secret that is given although AWX never shows whether it has changed.
    """

    prune: str = ""
    update_secrets: bool = False


@dataclass
class Observed:
    """What an AWX holds. others: names of what can be referred to, by kind, with how many objects have the name.

    playbooks: project -> what its files offer. states: project -> what AWX says of its last synchronisation.
    """

    things: dict[Key, Thing] = field(default_factory=dict)
    others: dict[str, dict[str, int]] = field(default_factory=dict)
    playbooks: dict[str, set[str]] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)


def plan(wanted: Mapping[Key, Thing], there: Observed, wish: Wish) -> list[Step]:
    """The changes, in an order in which they can be made.

    Raises ContentError when something refers to what is neither wanted nor there, or a playbook will not be there.
    """
    dangling = [problem for thing in wanted.values() for problem in _dangling(thing, wanted, there)]
    dangling += [problem for thing in wanted.values() for problem in _open_secrets(thing, wanted, there)]
    steps: list[Step] = []
    for key, thing in sorted(wanted.items(), key=lambda item: (ORDER[item[0][0]], item[0])):
        found = there.things.get(key)
        step = _created(thing) if found is None else _changed(thing, found, secret_names(thing, wanted, there), wish)
        if step is not None:
            steps.append(step)
    steps += _synchronised(wanted, there, steps, dangling)
    if dangling:
        raise ContentError(dangling)
    # Templates ask for playbooks that the project must have by then.
    steps.sort(key=lambda step: (ORDER[step.key[0]], step.verb == "synchronise"))
    return [*_deleted(wanted, there, wish), *steps]


def _created(thing: Thing) -> Step:
    fields = {name: (None, value) for name, value in thing.values.items() if _sent(thing, name)}
    return Step("create", thing.key, fields, {name: ((), names) for name, names in thing.many.items() if names})


def _sent(thing: Thing, name: str) -> bool:
    """At creation: what is given, and what AWX wants to be told."""
    spec = thing.kind.fields[name]
    return name in thing.given or spec.required or spec.ours


def _changed(thing: Thing, found: Thing, secrets: set[str], wish: Wish) -> Step | None:
    fields: dict[str, tuple[Any, Any]] = {}
    for name, value in thing.values.items():
        if not thing.kind.whole and name not in thing.given:
            continue
        now = found.values.get(name, thing.kind.fields[name].default)
        if thing.key[0] == "project" and name == "local_path" and thing.values["scm_type"]:
            continue  # AWX's own choice for everything but manual projects.
        if _differs(name, value, now, secrets) or (wish.update_secrets and thing.secret & set(_flat(value))):
            fields[name] = (now, value)
    many = {}
    for name, names in thing.many.items():
        if not thing.kind.whole and name not in thing.given:
            continue
        now_names = found.many.get(name, [])
        if list(names) != list(now_names):
            many[name] = (list(now_names), list(names))
    return Step("change", thing.key, fields, many) if fields or many else None


def _flat(value: Any) -> Iterable[str]:
    return value.keys() if isinstance(value, Mapping) else ()


def secret_names(thing: Thing, wanted: Mapping[Key, Thing], there: Observed) -> set[str]:
    """The entries of an object's mappings that AWX keeps encrypted."""
    if thing.key[0] == "credential":
        key = ("credential_type", str(thing.values["credential_type"]))
        kind = wanted.get(key) or there.things.get(key)
        fields = kind.values["inputs"].get("fields", []) if kind else []
        return {f["id"] for f in fields if f.get("secret")} | set(thing.secret)
    if thing.key[0] == "notification_template":
        known = NOTIFICATIONS.get(str(thing.values["notification_type"]), {})
        return {name for name, entry in known.items() if entry.secret}
    return set()


def _open_secrets(thing: Thing, wanted: Mapping[Key, Thing], there: Observed) -> Iterable[str]:
    """Secrets that the content itself holds, which shows in logs."""
    field_name = {"credential": "inputs", "notification_template": "notification_configuration"}.get(thing.key[0])
    if field_name:
        for name in sorted(secret_names(thing, wanted, there) & set(thing.values[field_name]) - thing.secret):
            if thing.values[field_name][name] not in ("", SECRET):
                yield f"{thing.describe()}: {name} is a secret; give it in secrets, not in the content"


def _differs(name: str, wanted: Any, now: Any, secrets: set[str]) -> bool:
    if name in ("inputs", "notification_configuration"):
        return _mapping_differs(wanted, now, secrets)
    if name == "survey":
        return bool(_survey(wanted) != _survey(now))
    if name == "messages":
        return bool(_messages(wanted) != _messages(now))
    if name == "approval" and isinstance(wanted, Mapping) and isinstance(now, Mapping):
        return any(
            wanted.get(part, default) != now.get(part, default)
            for part, default in (("name", None), ("description", ""), ("timeout", 0))
        )
    return bool(wanted != now)


def _mapping_differs(wanted: Mapping[str, Any], now: Mapping[str, Any], secrets: set[str]) -> bool:
    for name in set(wanted) | set(now):
        if name in secrets:
            # A secret that is not given is whatever was put in by hand.
            if name in wanted and wanted[name] and not now.get(name):
                return True
        elif (wanted.get(name) or _nothing(name)) != (now.get(name) or _nothing(name)):
            return True
    return False


def _nothing(name: str) -> Any:
    """What an entry is when it is left out: what AWX puts in, of whatever type of nothing."""
    return next((e[name].default for e in NOTIFICATIONS.values() if name in e and e[name].default), None)


def _survey(survey: Mapping[str, Any]) -> Any:
    """A survey as it compares: what a question leaves out has AWX's default; a secret default is only there or not."""
    questions = []
    for question in survey.get("spec") or []:
        choices = question.get("choices") or []
        default = question.get("default", "")
        if question.get("type") == "password" and default:
            default = SECRET
        questions.append(
            {
                "question_name": question.get("question_name"),
                "question_description": question.get("question_description", ""),
                "variable": question.get("variable"),
                "type": question.get("type"),
                "required": question.get("required"),
                "min": question.get("min"),
                "max": question.get("max"),
                "default": "" if default is None else default,
                "choices": choices.splitlines() if isinstance(choices, str) else [str(c) for c in choices],
            }
        )
    return (survey.get("name", ""), survey.get("description", ""), questions) if questions else None


def _messages(messages: Any) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cleaned for k, v in value.items() if (cleaned := clean(v)) not in (None, "", {})}
        return value

    return clean({name: (messages or {}).get(name) for name in _MESSAGE_EVENTS})


def _dangling(thing: Thing, wanted: Mapping[Key, Thing], there: Observed) -> Iterable[str]:
    references = [
        (name, spec.refers, thing.values[name])
        for name, spec in thing.kind.fields.items()
        if spec.refers and thing.values[name] is not None
    ]
    if thing.key[0] not in ("group", "node"):
        references += [
            (name, kind, value)
            for name, kind in thing.kind.many.items()
            if kind != "label"
            for value in thing.many[name]
        ]
    for name, kind, value in references:
        if (kind, value) in wanted:
            continue
        there_are = there.others.get(kind, {}).get(value, 0)
        word = kind.replace("_", " ")
        if there_are == 0:
            yield f"{thing.describe()}: {name} names the {word} {value}, which is neither in the content nor in the AWX"
        elif there_are > 1:
            yield f"{thing.describe()}: {name} names the {word} {value}, and the AWX has {there_are} of that name"


FETCHED = ("scm_type", "scm_url", "scm_branch", "scm_refspec", "credential")
UNFETCHED = ("never updated", "failed", "error", "canceled", "missing", "new")


def _synchronised(
    wanted: Mapping[Key, Thing], there: Observed, steps: Sequence[Step], problems: list[str]
) -> Iterable[Step]:
    """Fetch a project when it is new, has moved, was never fetched, or lacks a playbook that a template asks for."""
    needed: dict[str, set[str]] = {}
    for thing in wanted.values():
        if thing.key[0] == "job_template":
            needed.setdefault(str(thing.values["project"]), set()).add(str(thing.values["playbook"]))
    moved = {s.key[1] for s in steps if s.key[0] == "project" and (s.verb == "create" or set(s.fields) & set(FETCHED))}
    for project in sorted({key[1] for key in wanted if key[0] == "project"} | set(needed)):
        own = wanted.get(("project", project))
        missing = sorted(needed.get(project, set()) - there.playbooks.get(project, set()))
        if own is not None and not own.values["scm_type"]:
            if project in there.playbooks and missing and project not in moved:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                problems.append(
                    f"project {project} has no playbook {missing[0]}{more}: its directory {own.values['local_path']} "
                    "below AWX's projects directory does not hold these files"
                )
        elif project in moved:
            yield Step("synchronise", ("project", project), why="it is new here, or its source has changed")
        elif there.states.get(project) in UNFETCHED:
            yield Step("synchronise", ("project", project), why=f"its last synchronisation: {there.states[project]}")
        elif missing:
            yield Step("synchronise", ("project", project), why=f"it has no {missing[0]} yet")


def _deleted(wanted: Mapping[Key, Thing], there: Observed, wish: Wish) -> list[Step]:
    """Nodes of our workflows that are not wanted; with prune, our templates' schedules and templates with our label."""
    steps = []
    for key, thing in there.things.items():
        if key in wanted:
            continue
        if key[0] == "node":
            gone = ("workflow_job_template", key[1]) in wanted
        elif key[0] == "schedule":
            gone = bool(wish.prune) and key[1:3] in wanted
        else:
            gone = bool(wish.prune) and wish.prune in thing.many.get("labels", ())
        if gone:
            steps.append(Step("delete", key))
    return sorted(steps, key=lambda step: (-ORDER[step.key[0]], step.key))


# -- what people see


def shown(step: Step, secrets: set[str]) -> dict[str, Any]:
    """A change without its secrets."""
    return {
        "action": step.verb,
        "kind": step.key[0],
        "name": " / ".join(step.key[1:]),
        "fields": step.names(),
        **({"why": step.why} if step.why else {}),
        "before": _side(step, 0, secrets),
        "after": _side(step, 1, secrets),
    }


def _side(step: Step, side: int, secrets: set[str]) -> dict[str, Any]:
    """The values before (0) or after (1)."""
    fields = {name: veiled(values[side], secrets) for name, values in step.fields.items()}
    return {**fields, **{name: list(names[side]) for name, names in step.many.items()}}


def veiled(value: Any, secrets: set[str]) -> Any:
    """The value with its secrets taken out, also the defaults of a survey's passwords."""
    if isinstance(value, Mapping):
        password = value.get("type") == "password"
        return {
            k: "(secret)" if v and (k in secrets or (password and k == "default")) else veiled(v, secrets)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [veiled(item, secrets) for item in value]
    return value


def difference(change: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a module's diff."""
    header = f"{change['kind']} {change['name']}"
    return {
        "before_header": header,
        "after_header": header + (f" ({change['why']})" if "why" in change else ""),
        "before": "" if change["action"] == "create" else {"state": "present", **change["before"]},
        "after": "" if change["action"] == "delete" else {"state": "present", **change["after"]},
    }
