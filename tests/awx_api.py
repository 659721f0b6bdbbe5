"""An AWX's API in memory, on the loopback, built from the sources of AWX 24.6.1 (awx/api/serializers.py and views) and
held against its real API.

It has what the content of an AWX needs: lists with pages, links, names in summary_fields, associations, surveys, nodes
and their edges, approvals, schedules, the secrets that come back as $encrypted$, and AWX's refusals (unknown survey
type, missing playbook, SECONDLY, wrong answers; a refused survey leaves its template behind). A launched workflow can
be driven by a test: its jobs succeed at once, its approvals wait.

What it cannot prove: that jobs run, what AWX's roles and other versions allow, and anything of AWX that nobody looked
up. tests/awx runs against a real one when CONTROLLER_HOST and CONTROLLER_OAUTH_TOKEN are given.
"""

from __future__ import annotations

import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = "a-token"
VERSION = "24.6.1"
SECRET = "$encrypted$"

ASKED = (
    *("variables", "limit", "tags", "skip_tags", "inventory", "labels", "scm_branch", "diff_mode", "job_type"),
    *("verbosity", "credential", "execution_environment", "forks", "job_slice_count", "timeout", "instance_groups"),
)

# kind -> (singular, required fields, defaults, references field -> kind, lists, natural key)
KINDS: dict[str, dict[str, Any]] = {
    "organizations": {"type": "organization", "need": ["name"], "defaults": {"description": ""}, "unique": ["name"]},
    "credential_types": {
        "type": "credential_type",
        "need": ["name", "kind"],
        "defaults": {"description": "", "inputs": {}, "injectors": {}, "managed": False},
        "unique": ["name", "kind"],
    },
    "credentials": {
        "type": "credential",
        "need": ["name", "credential_type", "organization"],
        "defaults": {"description": "", "inputs": {}},
        "refers": {"organization": "organizations", "credential_type": "credential_types"},
        "unique": ["name", "organization", "credential_type"],
    },
    "execution_environments": {
        "type": "execution_environment",
        "need": ["name", "image"],
        "defaults": {"description": "", "organization": None, "pull": "", "credential": None},
        "refers": {"organization": "organizations", "credential": "credentials"},
        "unique": ["name"],
    },
    "instance_groups": {
        "type": "instance_group",
        "need": ["name"],
        "defaults": {
            "max_concurrent_jobs": 0,
            "max_forks": 0,
            "is_container_group": False,
            "credential": None,
            "pod_spec_override": "",
            "policy_instance_percentage": 0,
            "policy_instance_minimum": 0,
            "policy_instance_list": [],
        },
        "unique": ["name"],
    },
    "projects": {
        "type": "project",
        "need": ["name"],
        "defaults": {
            **dict.fromkeys(["description", "local_path", "scm_type", "scm_url", "scm_branch", "scm_refspec"], ""),
            **dict.fromkeys(
                ["scm_clean", "scm_track_submodules", "scm_delete_on_update", "scm_update_on_launch"], False
            ),
            "scm_update_cache_timeout": 0,
            "allow_override": False,
            "timeout": 0,
            "credential": None,
            "default_environment": None,
            "organization": None,
        },
        "refers": {
            "organization": "organizations",
            "credential": "credentials",
            "default_environment": "execution_environments",
        },
        "unique": ["name", "organization"],
    },
    "inventories": {
        "type": "inventory",
        "need": ["name", "organization"],
        "defaults": {"description": "", "variables": "", "kind": ""},
        "refers": {"organization": "organizations"},
        "unique": ["name", "organization"],
    },
    "hosts": {
        "type": "host",
        "need": ["name", "inventory"],
        "defaults": {"description": "", "variables": "", "enabled": True},
        "refers": {"inventory": "inventories"},
        "unique": ["name", "inventory"],
    },
    "groups": {
        "type": "group",
        "need": ["name", "inventory"],
        "defaults": {"description": "", "variables": ""},
        "refers": {"inventory": "inventories"},
        "lists": {"hosts": "hosts", "children": "groups"},
        "unique": ["name", "inventory"],
    },
    "inventory_sources": {
        "type": "inventory_source",
        "need": ["name", "inventory"],
        "defaults": {
            **dict.fromkeys(
                ["description", "source", "source_path", "source_vars", "enabled_var", "enabled_value", "host_filter"],
                "",
            ),
            "limit": "",
            **dict.fromkeys(["overwrite", "overwrite_vars", "update_on_launch"], False),
            "update_cache_timeout": 0,
            "timeout": 0,
            "verbosity": 1,
            "credential": None,
            "execution_environment": None,
            "source_project": None,
        },
        "refers": {
            "inventory": "inventories",
            "source_project": "projects",
            "credential": "credentials",
            "execution_environment": "execution_environments",
        },
        "unique": ["name", "inventory"],
    },
    "notification_templates": {
        "type": "notification_template",
        "need": ["name", "organization", "notification_type"],
        "defaults": {
            "description": "",
            "notification_configuration": {},
            "messages": {"started": None, "success": None, "error": None, "workflow_approval": None},
        },
        "refers": {"organization": "organizations"},
        "unique": ["name", "organization"],
    },
    "labels": {
        "type": "label",
        "need": ["name", "organization"],
        "defaults": {},
        "refers": {"organization": "organizations"},
        "unique": ["name", "organization"],
    },
    "job_templates": {
        "type": "job_template",
        "need": ["name"],
        "defaults": {
            **dict.fromkeys(
                ["description", "playbook", "scm_branch", "limit", "extra_vars", "job_tags", "skip_tags"], ""
            ),
            "start_at_task": "",
            "job_type": "run",
            **dict.fromkeys(["inventory", "project", "execution_environment", "organization"], None),
            **dict.fromkeys(["forks", "verbosity", "timeout"], 0),
            "job_slice_count": 1,
            **dict.fromkeys(
                [
                    "force_handlers",
                    "use_fact_cache",
                    "become_enabled",
                    "diff_mode",
                    "allow_simultaneous",
                    "prevent_instance_group_fallback",
                    "survey_enabled",
                    *(f"ask_{what}_on_launch" for what in ASKED),
                ],
                False,
            ),
        },
        "refers": {
            "inventory": "inventories",
            "project": "projects",
            "execution_environment": "execution_environments",
            "organization": "organizations",
        },
        "lists": {
            "credentials": "credentials",
            "labels": "labels",
            "instance_groups": "instance_groups",
            **{f"notification_templates_{e}": "notification_templates" for e in ("started", "success", "error")},
        },
        "unique": ["name", "organization"],
    },
    "workflow_job_templates": {
        "type": "workflow_job_template",
        "need": ["name"],
        "defaults": {
            "description": "",
            "extra_vars": "",
            "organization": None,
            "inventory": None,
            **dict.fromkeys(["limit", "scm_branch", "job_tags", "skip_tags"], None),
            **dict.fromkeys(
                [
                    "allow_simultaneous",
                    "survey_enabled",
                    *(
                        f"ask_{what}_on_launch"
                        for what in ("variables", "limit", "tags", "skip_tags", "inventory", "labels", "scm_branch")
                    ),
                ],
                False,
            ),
        },
        "refers": {"organization": "organizations", "inventory": "inventories"},
        "lists": {
            "labels": "labels",
            **{
                f"notification_templates_{e}": "notification_templates"
                for e in ("started", "success", "error", "approvals")
            },
        },
        "unique": ["name", "organization"],
    },
    "workflow_approval_templates": {
        "type": "workflow_approval_template",
        "need": ["name"],
        "defaults": {"description": "", "timeout": 0},
        "unique": [],
    },
    "workflow_job_template_nodes": {
        "type": "workflow_job_template_node",
        "need": ["workflow_job_template"],
        "defaults": {
            "identifier": "",
            "unified_job_template": None,
            "extra_data": {},
            "all_parents_must_converge": False,
            **dict.fromkeys(
                ["inventory", "limit", "job_tags", "skip_tags", "scm_branch", "job_slice_count", "timeout"], None
            ),
        },
        "refers": {"workflow_job_template": "workflow_job_templates"},
        "lists": {f"{edge}_nodes": "workflow_job_template_nodes" for edge in ("success", "failure", "always")},
        "unique": ["workflow_job_template", "identifier"],
    },
    "schedules": {
        "type": "schedule",
        "need": ["name", "rrule", "unified_job_template"],
        "defaults": {"description": "", "enabled": True, "extra_data": {}, "limit": None, "inventory": None},
        "unique": ["name", "unified_job_template"],
    },
}
CHILDREN = {
    ("inventories", "hosts"): ("hosts", "inventory"),
    ("inventories", "groups"): ("groups", "inventory"),
    ("inventories", "inventory_sources"): ("inventory_sources", "inventory"),
    ("job_templates", "schedules"): ("schedules", "unified_job_template"),
    ("workflow_job_templates", "schedules"): ("schedules", "unified_job_template"),
    ("workflow_job_templates", "workflow_nodes"): ("workflow_job_template_nodes", "workflow_job_template"),
}
JOB_TYPES = {
    "job_templates": "job",
    "workflow_job_templates": "workflow_job",
    "workflow_approval_templates": "workflow_approval",
}
SURVEY_TYPES: dict[str, type | tuple[type, ...]] = {
    "textarea": str,
    "text": str,
    "password": str,
    "multiplechoice": str,
    "multiselect": str,
    "integer": int,
    "float": (float, int),
}


class Refused(Exception):
    def __init__(self, status: int, body: Any) -> None:
        self.status, self.body = status, body


class Awx:
    """The objects of one AWX. faults: (method, part of a path) -> status that is answered instead, once each."""

    def __init__(self, playbooks: dict[str, list[str]] | None = None) -> None:
        self.objects: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.lists: dict[tuple[str, int, str], list[int]] = {}
        self.surveys: dict[int, dict[str, Any]] = {}
        self.jobs: dict[int, dict[str, Any]] = {}
        self.nodes_of_jobs: dict[int, list[dict[str, Any]]] = {}
        self.playbooks = playbooks or {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, int]] = []
        self.updates = 0
        self._next = 1
        for name, kind, fields in (
            ("Machine", "ssh", [{"id": "username"}, {"id": "password", "secret": True}]),
            ("Red Hat Ansible Automation Platform", "cloud", [{"id": "host"}, {"id": "oauth_token", "secret": True}]),
        ):
            row = self._make("credential_types", {"name": name, "kind": kind, "inputs": {"fields": fields}})
            row["managed"] = True
        self._make("instance_groups", {"name": "default"})

    # -- the objects

    def _make(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        row = {"id": self._next, **json.loads(json.dumps(KINDS[kind]["defaults"])), **body}
        self._next += 1
        self.objects[kind][row["id"]] = row
        return row

    def _kind_of(self, template: int) -> str:
        return next(kind for kind in JOB_TYPES if template in self.objects[kind])

    def create(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        spec = KINDS[kind]
        missing = {n: ["This field is required."] for n in spec["need"] if body.get(n) in (None, "")}
        if missing:
            raise Refused(400, missing)
        # AWX drops what it does not know, without a word.
        known = {n: v for n, v in body.items() if n in spec["defaults"] or n in spec["need"]}
        row = {**json.loads(json.dumps(spec["defaults"])), **known}
        self._check(kind, row, None)
        for other in self.objects[kind].values():
            if spec["unique"] and all(other.get(n) == row.get(n) for n in spec["unique"]):
                raise Refused(
                    400, {"__all__": [f"{spec['type']} with this {', '.join(spec['unique'])} already exists."]}
                )
        return self._make(kind, row)

    def change(self, kind: str, number: int, body: dict[str, Any]) -> dict[str, Any]:
        row = self._row(kind, number)
        spec = KINDS[kind]
        if row.get("managed"):
            raise Refused(403, {"detail": "Modifications not allowed for managed credential types"})
        changed = {**row, **{n: v for n, v in body.items() if n in spec["defaults"] or n in spec["need"]}}
        for name in ("inputs", "notification_configuration"):
            if name in body and name in row:
                kept = {n: row[name].get(n) if v == SECRET else v for n, v in body[name].items()}
                changed[name] = kept
        self._check(kind, changed, row)
        if kind == "projects" and any(changed[n] != row[n] for n in ("scm_type", "scm_url", "scm_branch")):
            self.updates += 1
        row.update(changed)
        return row

    def _row(self, kind: str, number: int) -> dict[str, Any]:
        try:
            return self.objects[kind][number]
        except KeyError:
            raise Refused(404, {"detail": f"No {KINDS[kind]['type']} matches the given query."}) from None

    def _check(self, kind: str, row: dict[str, Any], old: dict[str, Any] | None) -> None:
        for name, other in KINDS[kind].get("refers", {}).items():
            if row.get(name) is not None and row[name] not in self.objects[other]:
                raise Refused(400, {name: [f'Invalid pk "{row[name]}" - object does not exist.']})
        if kind == "projects":
            self._check_project(row, old)
        if kind == "job_templates":
            self._check_template(row)
        if kind == "notification_templates":
            self._check_notification(row)
        if kind == "schedules":
            self._check_rule(row["rrule"])
            self._check_answers(row["unified_job_template"], row["extra_data"], required=True)
        if kind == "workflow_job_template_nodes" and row["unified_job_template"]:
            template = row["unified_job_template"]
            if template in self.objects["job_templates"]:
                if row["limit"] and not self.objects["job_templates"][template]["ask_limit_on_launch"]:
                    raise Refused(400, {"limit": ["Field is not configured to prompt on launch."]})
                self._check_answers(template, row["extra_data"], required=False)
        if kind == "credentials":
            fields = {
                f["id"] for f in self.objects["credential_types"][row["credential_type"]]["inputs"].get("fields", [])
            }
            extra = sorted(set(row["inputs"]) - fields)
            if extra:
                raise Refused(400, {"inputs": [f"Additional properties are not allowed ('{extra[0]}' was unexpected)"]})
        if kind == "credential_types":
            for name in row["injectors"].get("env", {}):
                if name.startswith("ANSIBLE_"):
                    raise Refused(400, {"injectors": [f"Environment variable {name} may affect Ansible configuration"]})

    def _check_project(self, row: dict[str, Any], old: dict[str, Any] | None) -> None:
        if row["scm_type"]:
            if old is None:
                self.updates += 1
            row["local_path"] = f"_{row['name']}"
        elif row["local_path"] not in self.playbooks:
            raise Refused(400, {"local_path": ["This path is already being used by another manual project."]})

    def _check_template(self, row: dict[str, Any]) -> None:
        if row["project"] is None:
            raise Refused(400, {"project": ["This field is required."]})
        if row["inventory"] is None and not row["ask_inventory_on_launch"]:
            raise Refused(400, {"inventory": ["You must either set a default value or ask to prompt on launch."]})
        project = self.objects["projects"][row["project"]]
        if row["playbook"] not in self._playbooks(project):
            raise Refused(400, {"playbook": ["Playbook not found for project."]})
        row["organization"] = project["organization"]

    def _playbooks(self, project: dict[str, Any]) -> list[str]:
        return self.playbooks.get(project["scm_url"] or project["local_path"], [])

    def _check_notification(self, row: dict[str, Any]) -> None:
        needed = {"webhook": ["url", "headers"], "slack": ["token", "channels"]}.get(row["notification_type"], [])
        missing = [n for n in needed if n not in row["notification_configuration"]]
        if missing:
            raise Refused(400, [f"Missing required fields for Notification Configuration: {missing}."])
        if row["notification_type"] == "webhook":
            defaults = {"http_method": "POST", "disable_ssl_verification": False, "username": "", "password": ""}
            row["notification_configuration"] = {**defaults, **row["notification_configuration"]}

    def _check_rule(self, rule: str) -> None:
        if not re.search(r"DTSTART(;[^:]+)?:[0-9]+T[0-9]+Z?", rule):
            raise Refused(400, {"rrule": ["Valid DTSTART required in rrule."]})
        if "INTERVAL" not in rule:
            raise Refused(400, {"rrule": [f"INTERVAL required in rrule: {rule}"]})
        if "SECONDLY" in rule:
            raise Refused(400, {"rrule": [f"SECONDLY is not supported: {rule}"]})

    def _check_answers(self, template: int, given: dict[str, Any], *, required: bool) -> None:
        row = self.objects[self._kind_of(template)][template]
        questions = {q["variable"]: q for q in self.surveys.get(template, {}).get("spec", [])}
        wrong = []
        for name, question in questions.items():
            if name not in given:
                if required and question["required"]:
                    wrong.append(f"'{name}' value missing")
            elif question["type"] == "multiplechoice":
                choices = question["choices"]
                choices = choices.splitlines() if isinstance(choices, str) else choices
                if given[name] not in choices:
                    wrong.append(f"Value {given[name]} for '{name}' expected to be one of {choices}.")
            elif not isinstance(given[name], SURVEY_TYPES[question["type"]]):
                wrong.append(f"Value {given[name]} for '{name}' expected to be of type {question['type']}.")
        if wrong:
            raise Refused(400, {"variables_needed_to_start": wrong})
        if set(given) - set(questions) and not row["ask_variables_on_launch"]:
            raise Refused(
                400, {"extra_vars": [f"Variables {sorted(set(given) - set(questions))} are not allowed on launch."]}
            )

    def survey(self, template: int, spec: dict[str, Any]) -> None:
        for name in ("name", "description", "spec"):
            if name not in spec:
                raise Refused(400, {"error": f"Field '{name}' is missing from survey spec."})
        for number, question in enumerate(spec["spec"]):
            for name in ("type", "question_name", "variable", "required"):
                if name not in question:
                    raise Refused(400, {"error": f"'{name}' missing from survey question {number}"})
            if question["type"] not in SURVEY_TYPES:
                raise Refused(
                    400, {"error": f"'{question['type']}' in survey question {number} is not one of the types"}
                )
            default = question.get("default", "")
            if default != "" and not isinstance(default, SURVEY_TYPES[question["type"]]):
                raise Refused(
                    400, {"error": f"Default value {default} in survey question {number} is of another type."}
                )
            for bound in ("min", "max"):
                if question.get(bound) is not None and not isinstance(question[bound], int):
                    raise Refused(
                        400, {"error": f"The {bound} limit in survey question {number} expected to be integer."}
                    )
        self.surveys[template] = spec

    # -- as the API shows them

    def shown(self, kind: str, row: dict[str, Any]) -> dict[str, Any]:
        spec = KINDS[kind]
        path = f"/api/v2/{kind}/{row['id']}/"
        summary: dict[str, Any] = {}
        for name, other in spec.get("refers", {}).items():
            if row.get(name) is not None:
                summary[name] = {"id": row[name], "name": self.objects[other][row[name]]["name"]}
        answer = {**row, "type": spec["type"], "url": path, "related": {}, "summary_fields": summary}
        for name in spec.get("lists", {}):
            answer["related"][name] = f"{path}{name}/"
        if "labels" in spec.get("lists", {}):
            labels = [self.objects["labels"][i] for i in self.lists.get((kind, row["id"], "labels"), [])]
            summary["labels"] = {
                "count": len(labels),
                "results": [{"id": r["id"], "name": r["name"]} for r in labels[:10]],
            }
        if kind == "job_templates":
            own = self.lists.get((kind, row["id"], "credentials"), [])
            summary["credentials"] = [{"id": i, "name": self.objects["credentials"][i]["name"]} for i in own]
        if kind == "credentials":
            answer["inputs"] = self._veiled(row["inputs"], self._secret_inputs(row["credential_type"]))
        if kind == "notification_templates":
            answer["notification_configuration"] = self._veiled(
                row["notification_configuration"], {"token", "password"}
            )
        if kind == "projects":
            answer["status"] = ("successful" if row["scm_type"] else "ok") if self._playbooks(row) else "failed"
        if kind == "workflow_job_template_nodes":
            for edge in ("success_nodes", "failure_nodes", "always_nodes"):
                answer[edge] = self.lists.get((kind, row["id"], edge), [])
            if row["unified_job_template"]:
                summary["unified_job_template"] = self._unified(row["unified_job_template"])
        return answer

    def _unified(self, template: int) -> dict[str, Any]:
        kind = self._kind_of(template)
        row = self.objects[kind][template]
        more = {"timeout": row["timeout"]} if kind == "workflow_approval_templates" else {}
        common = {"id": template, "name": row["name"], "description": row["description"]}
        return {**common, "unified_job_type": JOB_TYPES[kind], **more}

    def _secret_inputs(self, kind: int) -> set[str]:
        return {f["id"] for f in self.objects["credential_types"][kind]["inputs"].get("fields", []) if f.get("secret")}

    @staticmethod
    def _veiled(values: dict[str, Any], secrets: set[str]) -> dict[str, Any]:
        return {n: SECRET if n in secrets and v else v for n, v in values.items()}

    # -- requests

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        parts = path.removeprefix("/api/v2/").strip("/").split("/")
        if parts == ["me"]:
            return 200, {"count": 1, "results": [{"id": 1, "username": "admin"}]}
        if parts == ["ping"]:
            return 200, {"version": VERSION}
        if parts[0] in ("workflow_jobs", "workflow_approvals", "jobs"):
            return self._running(method, parts)
        kind = parts[0]
        if kind not in KINDS:
            raise Refused(404, {"detail": "The requested resource could not be found."})
        if len(parts) == 1:
            if method == "POST":
                return 201, self.shown(kind, self.create(kind, body))
            rows = [self.shown(kind, row) for row in self.objects[kind].values()]
            return 200, self._page(path, self._filtered(rows, query), query)
        number = int(parts[1])
        if len(parts) == 2:
            return self._one(method, kind, number, body)
        return self._below(method, kind, number, parts[2], path=path, query=query, body=body)

    def _one(self, method: str, kind: str, number: int, body: Any) -> tuple[int, Any]:
        row = self._row(kind, number)
        if method == "PATCH":
            row = self.change(kind, number, body)
        elif method == "DELETE":
            del self.objects[kind][number]
            for key, ids in list(self.lists.items()):
                target = {**KINDS[key[0]].get("lists", {})}.get(key[2])
                if target == kind and number in ids:
                    ids.remove(number)
            if kind == "workflow_job_templates":
                for node in [
                    n for n, r in self.objects["workflow_job_template_nodes"].items() if r[kind[:-1]] == number
                ]:
                    del self.objects["workflow_job_template_nodes"][node]
            return 204, None
        return 200, self.shown(kind, row)

    def _below(
        self, method: str, kind: str, number: int, name: str, *, path: str, query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        row = self._row(kind, number)
        if name == "survey_spec":
            if method == "POST":
                self.survey(number, body)
            elif method == "DELETE":
                self.surveys.pop(number, None)
            shown = json.loads(json.dumps(self.surveys.get(number, {})))
            for question in shown.get("spec", []):
                if question["type"] == "password" and question.get("default"):
                    question["default"] = SECRET
            return 200, shown if method == "GET" else {}
        if name == "playbooks":
            return 200, self._playbooks(row)
        if name == "update":
            self.updates += 1
            return 202, {}
        if name == "launch":
            return 201, self._launch(number, body or {})
        if name == "create_approval_template":
            made = self._make("workflow_approval_templates", {"name": body["name"], **body})
            row["unified_job_template"] = made["id"]
            return 201, self.shown("workflow_approval_templates", made)
        if (kind, name) in CHILDREN:
            child, field = CHILDREN[kind, name]
            rows = [self.shown(child, r) for r in self.objects[child].values() if r[field] == number]
            return 200, self._page(path, rows, query)
        target = KINDS[kind].get("lists", {}).get(name)
        if target is None:
            raise Refused(404, {"detail": "The requested resource could not be found."})
        ids = self.lists.setdefault((kind, number, name), [])
        if method == "GET":
            return 200, self._page(path, [self.shown(target, self.objects[target][i]) for i in ids], query)
        return self._associate(kind, number, name, target, body)

    def _associate(self, kind: str, number: int, name: str, target: str, body: dict[str, Any]) -> tuple[int, Any]:
        ids = self.lists[kind, number, name]
        if target == "labels" and "id" not in body:
            same = [
                i for i, r in self.objects["labels"].items() if all(r[n] == body[n] for n in ("name", "organization"))
            ]
            body = {"id": same[0] if same else self.create("labels", body)["id"]}
        other = self._row(target, int(body["id"]))["id"]
        if body.get("disassociate"):
            ids.remove(other)
            return 204, None
        if name.endswith("_nodes"):
            others = [e for e in ("success_nodes", "failure_nodes", "always_nodes") if e != name]
            if any(other in self.lists.get((kind, number, e), []) for e in others):
                raise Refused(400, {"Error": "Relationship not allowed."})
            if other == number or number in self._after(other):
                raise Refused(400, {"Error": "Cycle detected."})
        if other not in ids:
            ids.append(other)
        return 204, None

    def _after(self, node: int) -> set[int]:
        found: set[int] = set()
        waiting = [node]
        while waiting:
            here = waiting.pop()
            for edge in ("success_nodes", "failure_nodes", "always_nodes"):
                for other in self.lists.get(("workflow_job_template_nodes", here, edge), []):
                    if other not in found:
                        found.add(other)
                        waiting.append(other)
        return found

    @staticmethod
    def _filtered(rows: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
        filters = {n: v for n, v in query.items() if n not in ("page", "page_size", "order_by")}
        return [row for row in rows if all(str(row.get(n)) == v for n, v in filters.items())]

    @staticmethod
    def _page(path: str, rows: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        size = min(int(query.get("page_size", "25")), 200)
        page = int(query.get("page", "1"))
        more = page * size < len(rows)
        words = urllib.parse.urlencode({**query, "page": page + 1})
        return {
            "count": len(rows),
            "next": f"{path}?{words}" if more else None,
            "previous": None,
            "results": rows[(page - 1) * size : page * size],
        }

    # -- workflows that run: jobs succeed at once, approvals wait

    def _launch(self, template: int, body: dict[str, Any]) -> dict[str, Any]:
        given = body.get("extra_vars") or {}
        given = json.loads(given) if isinstance(given, str) else given
        self._check_answers(template, given, required=True)
        number = self._next
        self._next += 1
        nodes = [
            r for r in self.objects["workflow_job_template_nodes"].values() if r["workflow_job_template"] == template
        ]
        self.jobs[number] = {"id": number, "type": "workflow_job", "status": "running", "extra_vars": json.dumps(given)}
        self.nodes_of_jobs[number] = [
            {"id": n["id"], "identifier": n["identifier"], "job": None, "summary_fields": {}} for n in nodes
        ]
        self._advance(number)
        return {"workflow_job": number, **self.jobs[number]}

    def _advance(self, workflow: int) -> None:
        nodes = {n["id"]: n for n in self.nodes_of_jobs[workflow]}
        again = True
        while again:
            again = False
            for number, node in nodes.items():
                edges = [(p, self.lists.get(("workflow_job_template_nodes", p, "success_nodes"), [])) for p in nodes]
                parents = [p for p, targets in edges if number in targets]
                done = [nodes[p]["job"] and self.jobs[nodes[p]["job"]]["status"] == "successful" for p in parents]
                failure = any(
                    number in self.lists.get(("workflow_job_template_nodes", p, "failure_nodes"), []) for p in nodes
                )
                converge = self.objects["workflow_job_template_nodes"][number]["all_parents_must_converge"]
                ready = (all(done) if converge else any(done)) if parents else not failure
                if node["job"] is None and ready:
                    self._start(workflow, number, node)
                    again = True
        states = [self.jobs[n["job"]]["status"] for n in nodes.values() if n["job"]]
        if "failed" in states:
            self.jobs[workflow]["status"] = "failed"
        elif "pending" not in states:
            self.jobs[workflow]["status"] = "successful"

    def _start(self, workflow: int, number: int, node: dict[str, Any]) -> None:
        template = self._unified(self.objects["workflow_job_template_nodes"][number]["unified_job_template"])
        job = self._next
        self._next += 1
        kind = template["unified_job_type"]
        status = "pending" if kind == "workflow_approval" else "successful"
        finished = "2026-01-01T00:00:00.000000Z"
        if kind == "job" and self._slices(template["id"]) > 1:
            kind = "workflow_job"
            self._start_slices(template, job)
        self.jobs[job] = {
            "id": job,
            "type": kind,
            "name": template["name"],
            "status": status,
            "workflow": workflow,
            "finished": finished,
            "modified": finished,
            "summary_fields": {},
        }
        node["job"] = job
        node["summary_fields"] = {"job": {"id": job, "type": kind, "status": status, "name": template["name"]}}

    def _slices(self, template: int) -> int:
        """Never more than hosts (JobTemplate.get_effective_slice_ct)."""
        row = self.objects["job_templates"][template]
        hosts = [h for h in self.objects["hosts"].values() if h["inventory"] == row["inventory"]]
        return min(int(row["job_slice_count"]), len(hosts))

    def _start_slices(self, template: dict[str, Any], sliced: int) -> None:
        """A job template of several slices becomes a workflow's job of its own, whose nodes are the slices
        (JobTemplate.create_unified_job)."""
        self.nodes_of_jobs[sliced] = []
        of = self._slices(template["id"])
        for number in range(1, of + 1):
            job = self._next
            self._next += 1
            self.jobs[job] = {
                "id": job,
                "type": "job",
                "name": template["name"],
                "status": "successful",
                "workflow": sliced,
                "job_template": template["id"],
                "job_slice_number": number,
                "job_slice_count": of,
            }
            self.nodes_of_jobs[sliced].append({"id": -job, "identifier": f"slice-{number}", "job": job})

    def told(self, job: int, artifacts: dict[str, Any]) -> dict[str, Any]:
        """The variables that a workflow's job is given (RunJob.build_extra_vars_file, awx_meta_vars): its template's,
        what earlier jobs have set, and AWX's own, among which there is nothing about slices."""
        row = self.jobs[job]
        own = json.loads(self.objects["job_templates"][row["job_template"]]["extra_vars"] or "{}")
        return {**own, **artifacts, "awx_job_id": job, "awx_workflow_job_id": row["workflow"]}

    def _running(self, method: str, parts: list[str]) -> tuple[int, Any]:
        number = int(parts[1])
        if number not in self.jobs:
            raise Refused(404, {"detail": "No job matches the given query."})
        job = self.jobs[number]
        if parts[2:] == ["workflow_nodes"]:
            return 200, {"count": len(self.nodes_of_jobs[number]), "next": None, "results": self.nodes_of_jobs[number]}
        if method == "POST" and parts[2:] in (["approve"], ["deny"]):
            if job["status"] != "pending":
                raise Refused(400, {"error": "This workflow step has already been approved or denied."})
            job["status"] = "successful" if parts[2] == "approve" else "failed"
            job["summary_fields"]["approved_or_denied_by"] = {"id": 1, "username": "admin"}
            self._advance(job["workflow"])
            return 204, None
        return 200, job


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    awx: Awx
    lock: threading.Lock

    def handle_one(self, method: str) -> None:
        url = urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        text = self.rfile.read(length)
        query = dict(urllib.parse.parse_qsl(url.query))
        with self.lock:
            self.awx.requests.append((method, url.path))
            fault = next((f for f in self.awx.faults if f[0] == method and f[1] in url.path), None)
            if fault:
                self.awx.faults.remove(fault)
                status, body = fault[2], {"detail": "a fault"}
            elif not url.path.startswith("/api/v2/"):
                return self.say(404, "<html>not found</html>")
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, body = 401, {"detail": "Authentication credentials were not provided."}
            else:
                try:
                    status, body = self.awx.answer(method, url.path, query, json.loads(text) if text else None)
                except Refused as refused:
                    status, body = refused.status, refused.body
        return self.say(status, None if body is None else json.dumps(body))

    def say(self, status: int, text: str | None) -> None:
        data = (text or "").encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PATCH(self) -> None:
        self.handle_one("PATCH")

    def do_DELETE(self) -> None:
        self.handle_one("DELETE")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(awx: Awx) -> Iterator[str]:
    """The address of a server of this AWX."""
    handler = type("Bound", (Handler,), {"awx": awx, "lock": threading.Lock()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
