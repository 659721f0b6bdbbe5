# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an AWX holds, as data: kinds, their fields, what they refer to; and content read from plain mappings.

Objects refer to each other by name, never by id, so that what is wanted and what is there compare as they are. Fields,
types and defaults are those of AWX 24.6.1 (awx/api/serializers.py, and what its API answers to OPTIONS).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, ...]
"""Kind and names: ("project", "main"), ("host", INVENTORY, NAME), ("node", WORKFLOW, IDENTIFIER)."""

SECRET = "$encrypted$"  # noqa: S105 - what AWX shows instead of a secret
TEMPLATES = ("job_template", "workflow_job_template")


class ContentError(Exception):
    """What is wrong with the wanted content, all of it; nothing was touched."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Field:
    """One field of a kind.

    refers: the kind that its value names. encoded: AWX keeps it as JSON or YAML in a string. ours: the default is ours,
    so that AWX wants to be told.
    """

    type: type | tuple[type, ...] = str
    default: Any = ""
    required: bool = False
    refers: str = ""
    encoded: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    endpoint: below /api/v2. parent: the kind that it is a part of. whole: a field that is not given has its default;
    otherwise it is left alone (objects that others own too). many: lists of names, field -> kind. ordered: those of
    them whose order matters. identity: the field that names it among its siblings.
    """

    name: str
    plural: str
    endpoint: str
    fields: Mapping[str, Field]
    many: Mapping[str, str] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    parent: str = ""
    of_organization: bool = True
    whole: bool = True
    identity: str = "name"


TEXT, NUMBER, FLAG, OFF = Field(), Field(int, 0), Field(bool, False), Field(bool, True)
MAYBE = Field((str, type(None)), None)
VARIABLES = Field(dict, {}, encoded=True)
MESSAGES: dict[str, Any] = {"started": None, "success": None, "error": None, "workflow_approval": None}


def _ref(kind: str, *, required: bool = False) -> Field:
    return Field((str, type(None)), None, required, kind)


_NOTIFIED = {f"notification_templates_{event}": "notification_template" for event in ("started", "success", "error")}
_ASKED = {
    f"ask_{what}_on_launch": FLAG
    for what in ("variables", "limit", "tags", "skip_tags", "inventory", "labels", "scm_branch")
}
_ASKED_OF_JOBS = {
    f"ask_{what}_on_launch": FLAG
    for what in (
        *("diff_mode", "job_type", "verbosity", "credential", "execution_environment", "forks", "job_slice_count"),
        *("timeout", "instance_groups"),
    )
}

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "organization", "organizations", "organizations", {"description": TEXT}, of_organization=False, whole=False
        ),
        Kind(
            "credential_type",
            "credential_types",
            "credential_types",
            {
                "description": TEXT,
                "kind": Field(str, "cloud", ours=True),
                "inputs": Field(dict, {}),
                "injectors": Field(dict, {}),
            },
            of_organization=False,
        ),
        Kind(
            "credential",
            "credentials",
            "credentials",
            {
                "description": TEXT,
                "credential_type": Field(str, None, required=True, refers="credential_type"),
                "inputs": Field(dict, {}),
            },
        ),
        Kind(
            "execution_environment",
            "execution_environments",
            "execution_environments",
            {
                "description": TEXT,
                "image": Field(str, None, required=True),
                "pull": TEXT,
                "credential": _ref("credential"),
            },
            of_organization=False,
        ),
        Kind(
            "instance_group",
            "instance_groups",
            "instance_groups",
            {
                "max_concurrent_jobs": NUMBER,
                "max_forks": NUMBER,
                "is_container_group": FLAG,
                "credential": _ref("credential"),
                "pod_spec_override": TEXT,
                "policy_instance_percentage": NUMBER,
                "policy_instance_minimum": NUMBER,
                "policy_instance_list": Field(list, []),
            },
            of_organization=False,
            whole=False,
        ),
        Kind(
            "project",
            "projects",
            "projects",
            {
                "description": TEXT,
                "scm_type": TEXT,
                "scm_url": TEXT,
                "scm_branch": TEXT,
                "scm_refspec": TEXT,
                "scm_clean": FLAG,
                "scm_delete_on_update": FLAG,
                "scm_track_submodules": FLAG,
                "scm_update_on_launch": FLAG,
                "scm_update_cache_timeout": NUMBER,
                "allow_override": FLAG,
                "timeout": NUMBER,
                "local_path": TEXT,
                "credential": _ref("credential"),
                "default_environment": _ref("execution_environment"),
            },
        ),
        Kind("inventory", "inventories", "inventories", {"description": TEXT, "variables": VARIABLES}),
        Kind(
            "host",
            "hosts",
            "hosts",
            {"description": TEXT, "enabled": OFF, "variables": VARIABLES},
            parent="inventory",
            of_organization=False,
        ),
        Kind(
            "group",
            "groups",
            "groups",
            {"description": TEXT, "variables": VARIABLES},
            {"hosts": "host", "children": "group"},
            parent="inventory",
            of_organization=False,
        ),
        Kind(
            "inventory_source",
            "sources",
            "inventory_sources",
            {
                "description": TEXT,
                "source": Field(str, "scm", ours=True),
                "source_project": _ref("project"),
                "source_path": TEXT,
                "source_vars": VARIABLES,
                "credential": _ref("credential"),
                "execution_environment": _ref("execution_environment"),
                "enabled_var": TEXT,
                "enabled_value": TEXT,
                "host_filter": TEXT,
                "limit": TEXT,
                "overwrite": FLAG,
                "overwrite_vars": FLAG,
                "update_on_launch": FLAG,
                "update_cache_timeout": NUMBER,
                "timeout": NUMBER,
                "verbosity": Field(int, 1),
            },
            parent="inventory",
            of_organization=False,
        ),
        Kind(
            "notification_template",
            "notification_templates",
            "notification_templates",
            {
                "description": TEXT,
                "notification_type": Field(str, None, required=True),
                "notification_configuration": Field(dict, {}),
                "messages": Field(dict, MESSAGES),
            },
        ),
        Kind(
            "job_template",
            "job_templates",
            "job_templates",
            {
                "description": TEXT,
                "job_type": Field(str, "run"),
                "inventory": _ref("inventory"),
                "project": Field(str, None, required=True, refers="project"),
                "playbook": Field(str, None, required=True),
                "scm_branch": TEXT,
                "execution_environment": _ref("execution_environment"),
                "forks": NUMBER,
                "limit": TEXT,
                "verbosity": NUMBER,
                "extra_vars": VARIABLES,
                "job_tags": TEXT,
                "skip_tags": TEXT,
                "start_at_task": TEXT,
                "timeout": NUMBER,
                "force_handlers": FLAG,
                "use_fact_cache": FLAG,
                "become_enabled": FLAG,
                "diff_mode": FLAG,
                "allow_simultaneous": FLAG,
                "job_slice_count": Field(int, 1),
                "prevent_instance_group_fallback": FLAG,
                **_ASKED,
                **_ASKED_OF_JOBS,
                "survey": Field(dict, {}),
            },
            {"credentials": "credential", "instance_groups": "instance_group", "labels": "label", **_NOTIFIED},
            frozenset({"instance_groups"}),
        ),
        Kind(
            "workflow_job_template",
            "workflow_job_templates",
            "workflow_job_templates",
            {
                "description": TEXT,
                "extra_vars": VARIABLES,
                "allow_simultaneous": FLAG,
                "inventory": _ref("inventory"),
                "limit": MAYBE,
                "scm_branch": MAYBE,
                "job_tags": MAYBE,
                "skip_tags": MAYBE,
                **_ASKED,
                "survey": Field(dict, {}),
            },
            {"labels": "label", **_NOTIFIED, "notification_templates_approvals": "notification_template"},
        ),
        Kind(
            "node",
            "nodes",
            "workflow_job_template_nodes",
            {
                "job_template": _ref("job_template"),
                "workflow": _ref("workflow_job_template"),
                "approval": Field((dict, type(None)), None),
                "all_parents_must_converge": FLAG,
                "extra_data": Field(dict, {}),
                "limit": MAYBE,
                "job_slice_count": Field((int, type(None)), None),
                "timeout": Field((int, type(None)), None),
            },
            {"success": "node", "failure": "node", "always": "node"},
            parent="workflow_job_template",
            of_organization=False,
            identity="identifier",
        ),
        Kind(
            "schedule",
            "schedules",
            "schedules",
            {
                "description": TEXT,
                "rrule": Field(str, None, required=True),
                "enabled": OFF,
                "extra_data": Field(dict, {}),
                "limit": MAYBE,
            },
            parent="template",
            of_organization=False,
        ),
    )
}
"""In the order in which they can come about."""

APPROVAL = {"name": Field(str, None, required=True), "description": TEXT, "timeout": NUMBER}
_PARTS = {
    "inventory": ("host", "group", "inventory_source"),
    "job_template": ("schedule",),
    "workflow_job_template": ("node", "schedule"),
}


@dataclass
class Thing:
    """One object: its fields' values (references are names) and its lists of names. id and url: of one that is there.

    given: the fields that the content names; the others have their defaults. secret: the entries that came as secrets.
    """

    key: Key
    values: dict[str, Any]
    many: dict[str, list[str]] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    secret: frozenset[str] = frozenset()
    id: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return KINDS[self.key[0]]

    @property
    def name(self) -> str:
        return " / ".join(self.key[1:])

    def describe(self) -> str:
        return f"{self.key[0].replace('_', ' ')} {self.name}"


SECRETS = {"credentials": "inputs", "notification_templates": "notification_configuration"}
"""Kinds with secrets, and in which of their fields these are."""


def things(content: Mapping[str, Any], secrets: Mapping[str, Any] | None = None) -> dict[Key, Thing]:
    """The objects of a content: a mapping with ``organization`` and a list for each kind (``projects``, ...).

    secrets: kind (``credentials``, ``notification_templates``) -> name -> entry -> value.

    Raises ContentError with everything that is unknown, missing, of a wrong type, twice, or refers to nothing that this
    content could bring (references to what only the AWX holds are for the planner).
    """
    problems: list[str] = []
    found: dict[Key, Thing] = {}
    listed = {kind.plural: kind for kind in KINDS.values() if not kind.parent and kind.name != "organization"}
    unknown = sorted(set(content) - set(listed) - {"organization"})
    problems += [f"the content has an unknown part {name}" for name in unknown]
    organization = content.get("organization")
    if isinstance(organization, str):
        organization = {"name": organization}
    if not isinstance(organization, Mapping) or not organization.get("name"):
        raise ContentError([*problems, "the content names no organization"])
    _read(found, problems, KINDS["organization"], organization, ())
    for plural, kind in listed.items():
        for item in _items(content.get(plural), plural, problems):
            _read(found, problems, kind, item, ())
    for thing in found.values():
        problems += [f"{thing.describe()}: {problem}" for problem in _faults(thing, found)]
    problems += _secret_faults(secrets or {}, found)
    if problems:
        raise ContentError(problems)
    for plural, named in (secrets or {}).items():
        for name, values in named.items():
            thing = found[listed[plural].name, name]
            thing.secret = frozenset(values)
            thing.values[SECRETS[plural]] = {**thing.values[SECRETS[plural]], **values}
    return found


def _secret_faults(secrets: Mapping[str, Any], found: Mapping[Key, Thing]) -> Iterator[str]:
    """What is wrong with the secrets, without any of them."""
    kinds = {kind.plural: kind.name for kind in KINDS.values()}
    for plural, named in secrets.items():
        if plural not in SECRETS or not isinstance(named, Mapping):
            yield f"secrets has an unknown part {plural}; it may have {' and '.join(SECRETS)}"
            continue
        for name, values in named.items():
            thing = found.get((kinds[plural], str(name)))
            if thing is None:
                yield f"secrets names the {kinds[plural].replace('_', ' ')} {name}, which the content does not have"
            elif not isinstance(values, Mapping) or not all(isinstance(v, str) for v in values.values()):
                yield f"{thing.describe()}: its secrets are not a mapping of names to texts"


def _items(value: Any, where: str, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    if value is None:
        return
    if not isinstance(value, list):
        problems.append(f"{where} is not a list")
        return
    for item in value:
        if isinstance(item, Mapping):
            yield item
        else:
            problems.append(f"{where} holds {item!r}, which is not a mapping")


def _read(
    found: dict[Key, Thing], problems: list[str], kind: Kind, item: Mapping[str, Any], parent: tuple[str, ...]
) -> None:
    name = item.get(kind.identity)
    what = f"{kind.name.replace('_', ' ')} {' / '.join([*parent, str(name)])}"
    if not isinstance(name, str) or not name:
        problems.append(f"{kind.plural}{' of ' + ' / '.join(parent) if parent else ''}: one has no {kind.identity}")
        return
    key = (kind.name, *parent, name)
    if key in found:
        problems.append(f"{what} is there twice")
        return
    parts = {KINDS[part].plural: KINDS[part] for part in _PARTS.get(kind.name, ())}
    known = {kind.identity, *kind.fields, *kind.many, *parts}
    problems += [f"{what} has an unknown field {name}" for name in sorted(set(item) - known)]
    values: dict[str, Any] = {}
    for field_name, spec in kind.fields.items():
        value = item.get(field_name, spec.default)
        if spec.required and value in (None, ""):
            problems.append(f"{what} has no {field_name}")
        elif not _is(value, spec.type):
            problems.append(f"{what}: {field_name} is {value!r}, which is no {_word(spec.type)}")
        values[field_name] = value
    many: dict[str, list[str]] = {}
    for field_name in kind.many:
        names = item.get(field_name) or []
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            problems.append(f"{what}: {field_name} is not a list of names")
            names = []
        many[field_name] = list(names) if field_name in kind.ordered else sorted(set(names))
    found[key] = Thing(key, values, many, frozenset(set(item) & known))
    for plural, part in parts.items():
        # A schedule's key names the kind of its template: both kinds may use one name.
        owner = (kind.name, name) if part.name == "schedule" else (name,)
        for child in _items(item.get(plural), f"{what}: {plural}", problems):
            _read(found, problems, part, child, owner)


def _is(value: Any, wanted: type | tuple[type, ...]) -> bool:
    types = wanted if isinstance(wanted, tuple) else (wanted,)
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types)


def _word(wanted: type | tuple[type, ...]) -> str:
    words = {str: "text", int: "whole number", bool: "truth value", dict: "mapping", list: "list", type(None): "null"}
    return " or ".join(words[t] for t in (wanted if isinstance(wanted, tuple) else (wanted,)))


# -- what AWX would refuse, or take and never do


def _faults(thing: Thing, found: Mapping[Key, Thing]) -> Iterator[str]:
    values = thing.values
    if isinstance(values.get("survey"), dict) and values["survey"]:
        yield from survey_faults(values["survey"])
    if thing.key[0] == "node":
        yield from _node_faults(thing, found)
    if thing.key[0] == "group":
        for many, kind in thing.kind.many.items():
            for name in thing.many[many]:
                if (kind, thing.key[1], name) not in found:
                    yield f"{many} names {name}, which its inventory does not have"
    if thing.key[0] == "schedule":
        yield from rrule_faults(str(values["rrule"]))
        template = found[thing.key[1:3]]
        yield from _answer_faults(template, values["extra_data"], schedule=True)
    if thing.key[0] == "workflow_job_template" and _cycle(thing.name, found):
        yield f"its nodes go in a circle ({_cycle(thing.name, found)})"
    if thing.key[0] == "job_template" and values["inventory"] is None and not values["ask_inventory_on_launch"]:
        yield "it has no inventory and does not ask for one"
    if thing.key[0] == "job_template" and values["job_slice_count"] < 1:
        yield "job_slice_count is less than 1"
    if thing.key[0] == "project":
        yield from _project_faults(values)
    if thing.key[0] == "notification_template":
        yield from _notification_faults(values)
    if thing.key[0] == "credential_type":
        yield from _injector_faults(values)


def _project_faults(values: Mapping[str, Any]) -> Iterator[str]:
    if values["scm_type"] not in ("", "git", "svn", "archive", "insights"):
        yield f"scm_type {values['scm_type']} is none of git, svn, archive, insights or empty (manual)"
    if values["scm_type"]:
        if not values["scm_url"]:
            yield "it has no scm_url"
        if values["local_path"]:
            yield "local_path is for manual projects only"
    else:
        if not values["local_path"]:
            yield "a manual project needs its local_path, a directory in AWX's projects directory"
        for name in ("scm_update_on_launch", "scm_delete_on_update", "scm_track_submodules", "scm_clean"):
            if values[name]:
                yield f"{name} is not for manual projects"


@dataclass(frozen=True)
class Entry:
    """One entry of a notification's configuration; without a default it has to be given."""

    type: type
    default: Any = None
    secret: bool = False


_WORD, _SECRET, _LIST = Entry(str), Entry(str, secret=True), Entry(list)
NOTIFICATIONS: dict[str, dict[str, Entry]] = {
    "awssns": {
        "aws_region": Entry(str, ""),
        "aws_access_key_id": Entry(str, ""),
        "aws_secret_access_key": Entry(str, "", True),
        "aws_session_token": Entry(str, "", True),
        "sns_topic_arn": Entry(str, ""),
    },
    "email": {
        **dict.fromkeys(("host", "username", "sender"), _WORD),
        "password": _SECRET,
        "port": Entry(int),
        **dict.fromkeys(("use_tls", "use_ssl"), Entry(bool)),
        "recipients": _LIST,
        "timeout": Entry(int, 30),
    },
    "slack": {"token": _SECRET, "channels": _LIST, "hex_color": Entry(str, "")},
    "twilio": {"account_sid": _WORD, "account_token": _SECRET, "from_number": _WORD, "to_numbers": _LIST},
    "pagerduty": {**dict.fromkeys(("subdomain", "service_key", "client_name"), _WORD), "token": _SECRET},
    "webhook": {
        "url": _WORD,
        "http_method": Entry(str, "POST"),
        "disable_ssl_verification": Entry(bool, False),
        "username": Entry(str, ""),
        "password": Entry(str, "", True),
        "headers": Entry(dict),
    },
    "mattermost": {
        "mattermost_url": _WORD,
        "mattermost_no_verify_ssl": Entry(bool),
        **dict.fromkeys(("mattermost_username", "mattermost_channel", "mattermost_icon_url"), Entry(str, "")),
    },
    "rocketchat": {
        "rocketchat_url": _WORD,
        "rocketchat_no_verify_ssl": Entry(bool),
        **dict.fromkeys(("rocketchat_username", "rocketchat_icon_url"), Entry(str, "")),
    },
}
"""Type -> what its configuration holds (awx/main/notifications: init_parameters). Grafana and IRC are left out."""


def _notification_faults(values: Mapping[str, Any]) -> Iterator[str]:
    known = NOTIFICATIONS.get(str(values["notification_type"]))
    if known is None:
        yield f"notification_type {values['notification_type']} is none of {', '.join(NOTIFICATIONS)}"
        return
    given = values["notification_configuration"]
    for name in sorted(set(given) - set(known)):
        yield f"notification_configuration has an unknown entry {name}"
    for name, entry in known.items():
        if name not in given:
            # A secret may be in the AWX already.
            if entry.default is None and not entry.secret:
                yield f"notification_configuration has no {name}"
        elif not _is(given[name], entry.type):
            yield f"notification_configuration: {name} is no {_word(entry.type)}"
        elif entry.type is list and not given[name]:
            yield f"notification_configuration: {name} is empty"
    for name in sorted(set(values["messages"]) - set(MESSAGES)):
        yield f"messages has an unknown event {name}"


def _injector_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """What AWX refuses of a credential type's injectors (CredentialTypeInjectorField.validate)."""
    fields = values["inputs"].get("fields", [])
    ids = [field.get("id") for field in fields]
    if len(set(ids)) != len(ids):
        yield "two of its inputs have one id"
    injectors = values["injectors"]
    for name in sorted(set(injectors) - {"file", "env", "extra_vars"}):
        yield f"injectors has an unknown part {name}"
    for name in injectors.get("env", {}):
        if name.startswith("ANSIBLE_"):
            yield f"injectors may not set {name}: AWX refuses what begins with ANSIBLE_"
    try:
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return
    files = [name for name in injectors.get("file", {}) if name.startswith("template")]
    if "template" in files and len(files) > 1:
        yield "injectors has several files, of which each needs a name (template.NAME)"
    named: Any = {name.partition(".")[2]: "EXAMPLE" for name in files if "." in name}
    space = {**{str(i): "EXAMPLE" for i in ids}, "tower": {"filename": "EXAMPLE" if "template" in files else named}}
    templates = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    for part in ("file", "env"):
        for name, text in injectors.get(part, {}).items():
            try:
                templates.from_string(text).render(space)
            except TemplateError as error:
                yield f"injectors: {name} is no template of its inputs ({error})"


def _node_faults(node: Thing, found: Mapping[Key, Thing]) -> Iterator[str]:
    runs = [name for name in ("job_template", "workflow", "approval") if node.values[name] is not None]
    if len(runs) != 1:
        yield "it must have one of job_template, workflow and approval"
    approval = node.values["approval"]
    if isinstance(approval, dict):
        for name in sorted(set(approval) - set(APPROVAL)):
            yield f"its approval has an unknown field {name}"
        if not approval.get("name"):
            yield "its approval has no name"
    seen: set[str] = set()
    for edge in node.kind.many:
        for name in node.many[edge]:
            if ("node", node.key[1], name) not in found:
                yield f"{edge} leads to {name}, which its workflow does not have"
            if name in seen:
                yield f"two edges lead to {name}"
            seen.add(name)
    template = found.get(("job_template", str(node.values["job_template"])))
    if template is None:
        return
    for name in ("limit", "job_slice_count", "timeout"):
        if node.values[name] is not None and not template.values[f"ask_{name}_on_launch"]:
            yield f"it gives {name}, which job template {template.name} does not ask for"
    yield from _answer_faults(template, node.values["extra_data"], schedule=False)


def _cycle(workflow: str, found: Mapping[Key, Thing]) -> str:
    """A node that can reach itself, if any."""
    nodes = {key[2]: thing for key, thing in found.items() if key[:2] == ("node", workflow)}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> str:
        if name in path:
            return " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in nodes:
            return ""
        for edges in nodes[name].many.values():
            for target in edges:
                circle = visit(target, (*path, name))
                if circle:
                    return circle
        done.add(name)
        return ""

    return next((circle for name in nodes if (circle := visit(name, ()))), "")


QUESTIONS: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "textarea": str,
    "password": str,
    "multiplechoice": str,
    "multiselect": str,
    "integer": int,
    "float": (float, int),
}


def survey_faults(survey: Mapping[str, Any]) -> Iterator[str]:
    """What AWX refuses of a survey (JobTemplateSurveySpec): it would leave the template behind without one."""
    for name in sorted(set(survey) - {"name", "description", "spec"}):
        yield f"its survey has an unknown field {name}"
    questions = survey.get("spec")
    if not isinstance(questions, list) or not questions:
        yield "its survey asks nothing"
        return
    variables: set[str] = set()
    for number, question in enumerate(questions, 1):
        where = f"question {number} ({question.get('variable', '?')}) of its survey"
        kind = question.get("type")
        if kind not in QUESTIONS:
            yield f"{where} is of the unknown type {kind}"
            continue
        for name, wanted in (("question_name", str), ("variable", str), ("required", bool)):
            if not isinstance(question.get(name), wanted):
                yield f"{where} has no {name}"
        if question.get("variable") in variables:
            yield f"{where} asks for a variable that another question asks for"
        variables.add(str(question.get("variable")))
        default = question.get("default", "")
        if default != "" and not _is(default, QUESTIONS[kind]):
            yield f"{where} has the default {default!r}, which is not of type {kind}"
        for bound in ("min", "max"):
            if question.get(bound) is not None and not _is(question[bound], int):
                yield f"{where} has {bound} {question[bound]!r}; AWX takes whole numbers only"
        if kind in ("multiplechoice", "multiselect"):
            choices = choices_of(question)
            if not choices:
                yield f"{where} offers no choices"
            elif default not in ("", *choices) and kind == "multiplechoice":
                yield f"{where} has the default {default!r}, which is none of its choices"


def choices_of(question: Mapping[str, Any]) -> list[str]:
    choices = question.get("choices") or []
    return [c for c in choices.splitlines() if c.strip()] if isinstance(choices, str) else [str(c) for c in choices]


def _answer_faults(template: Thing, answers: Mapping[str, Any], *, schedule: bool) -> Iterator[str]:
    """What AWX refuses of the answers that a schedule or a node brings."""
    questions = {q["variable"]: q for q in (template.values["survey"] or {}).get("spec") or [] if "variable" in q}
    for name, value in answers.items():
        question = questions.get(name)
        if question is None:
            if not template.values["ask_variables_on_launch"]:
                yield f"it answers {name}, which {template.describe()} does not ask"
        elif question.get("type") in QUESTIONS:
            choices = choices_of(question)
            if not _is(value, list if question["type"] == "multiselect" else QUESTIONS[question["type"]]):
                yield f"its answer to {name} is {value!r}, which is not of type {question['type']}"
            elif question["type"] == "multiplechoice" and value not in choices:
                yield f"its answer to {name} is {value!r}, which is none of {', '.join(choices)}"
    if schedule:
        for name, question in questions.items():
            if question.get("required") and name not in answers:
                yield f"it does not answer {name}, which {template.describe()} needs"


def rrule_faults(rrule: str) -> Iterator[str]:
    """What AWX refuses of a schedule's rule (SchedulePreviewSerializer.validate_rrule)."""
    import re

    starts = re.findall(r"DTSTART(?:;[^:]+)?:[0-9]+T[0-9]+Z?", rrule)
    if len(starts) != 1:
        yield f"its rule {rrule!r} must have one DTSTART, such as DTSTART;TZID=America/New_York:20260104T020000"
    elif re.fullmatch(r"DTSTART:[0-9]+T[0-9]+", starts[0]):
        yield f"its rule {rrule!r} has a DTSTART without a time zone"
    rules = re.findall(r"RULE:\S*", rrule)
    if not any(not rule.startswith("EXRULE") for rule in rules):
        yield f"its rule {rrule!r} has no RRULE"
    for word in ("EXDATE", "RDATE"):
        if f"{word}:" in rrule.upper():
            yield f"its rule {rrule!r} has {word}, which AWX refuses"
    for rule in rules:
        if "INTERVAL" not in rule.upper():
            yield f"its rule {rrule!r} has no INTERVAL"
        if "SECONDLY" in rule.upper():
            yield f"its rule {rrule!r} is SECONDLY, which AWX refuses"
        if re.search(r"BYDAY=[0-9]+[A-Z]{2}", rule.upper()):
            yield f"its rule {rrule!r} has a BYDAY with a number, which AWX refuses"
        if "COUNT" in rule.upper() and "UNTIL" in rule.upper():
            yield f"its rule {rrule!r} has COUNT and UNTIL"


# -- values as AWX keeps them


def decoded(value: Any) -> Any:
    """What AWX keeps as JSON or YAML in a string, as a mapping; text that is neither stays text."""
    if not isinstance(value, str):
        return value or {}
    if not value.strip() or value.strip() == "---":
        return {}
    try:
        return json.loads(value)
    except ValueError:
        import yaml

        try:
            return yaml.safe_load(value) or {}
        except yaml.YAMLError:
            return value


def encoded(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if value else ""
