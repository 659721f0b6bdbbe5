# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads an AWX's content and brings a plan about over its API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.awx.client import AwxError, Client, Refusal
from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import (
    KINDS,
    SECRET,
    TEMPLATES,
    Key,
    Kind,
    Thing,
    decoded,
    encoded,
)
from ansible_collections.censuschat.infra.plugins.module_utils.awx.planner import (
    FETCHED,
    Observed,
    Step,
    Wish,
    plan,
    secret_names,
    shown,
)

EDGES = {"success": "success_nodes", "failure": "failure_nodes", "always": "always_nodes"}
RUNS = {"job_template": "job_template", "workflow": "workflow_job_template"}
"""What a node runs: its field -> the kind that it names."""
BUSY = ("new", "pending", "waiting", "running")
READERS = 8
"""Requests under way at once while reading."""


class Awx:
    """One organization of one AWX."""

    def __init__(self, client: Client, organization: str) -> None:
        self.client, self.organization = client, organization
        self._organization_id = 0
        self._ids: dict[tuple[str, str], int] = {}

    # -- reading

    def observe(self, wanted: Mapping[Key, Thing], wish: Wish) -> Observed:
        """What the AWX holds of what is wanted or would be pruned, and what can be referred to."""
        self.client.get("me")  # A wrong address or token shows here.
        there = Observed()
        self._ids.clear()
        found = list(self.client.list("organizations", name=self.organization))
        self._organization_id = int(found[0]["id"]) if found else 0
        for row in found:
            self._place(there, KINDS["organization"], row, wanted)
        with ThreadPoolExecutor(READERS) as pool:
            kinds = [kind for kind in KINDS.values() if not kind.parent and kind.name != "organization"]
            for kind, rows in zip(kinds, pool.map(self._rows, kinds), strict=True):
                names = there.others.setdefault(kind.name, {})
                for row in rows:
                    names[row["name"]] = names.get(row["name"], 0) + 1
                    self._place(there, kind, row, wanted)
            parts = [job for thing in there.things.values() if thing.key in wanted for job in self._parts(thing)]
            for found_parts in pool.map(lambda job: job(), parts):
                there.things.update({thing.key: thing for thing in found_parts})
            groups = [thing for thing in there.things.values() if thing.key[0] == "group"]
            list(pool.map(self._members, groups))
            projects = {str(t.values["project"]) for t in wanted.values() if t.key[0] == "job_template"}
            ids = {name: self._ids["project", name] for name in sorted(projects) if ("project", name) in self._ids}
            for name, playbooks in zip(ids, pool.map(self._playbooks, ids.values()), strict=True):
                there.playbooks[name] = playbooks
        there.states.update({k[1]: t.extra["status"] for k, t in there.things.items() if k[0] == "project"})
        return there

    def _rows(self, kind: Kind) -> list[dict[str, Any]]:
        if not kind.of_organization:
            return list(self.client.list(kind.endpoint))
        if not self._organization_id:
            return []
        return list(self.client.list(kind.endpoint, organization=self._organization_id))

    def _playbooks(self, project: int) -> set[str]:
        return set(self.client.get(f"projects/{project}/playbooks"))

    def _place(self, there: Observed, kind: Kind, row: Mapping[str, Any], wanted: Mapping[Key, Thing]) -> None:
        key = (kind.name, str(row["name"]))
        thing = _thing(kind, key, row)
        asked = wanted.get(key)
        # Of two credentials with one name, the one of the type that is wanted.
        other_type = (
            kind.name == "credential" and asked and asked.values["credential_type"] != thing.values["credential_type"]
        )
        if other_type:
            self._ids.setdefault((kind.name, key[1]), thing.id)
            return
        there.things[key] = thing
        self._ids[kind.name, key[1]] = thing.id

    def _parts(self, thing: Thing) -> list[Callable[[], list[Thing]]]:
        """Reads, one each, of what an object's own answer does not hold."""
        kind, path = thing.kind, f"{thing.kind.endpoint}/{thing.id}"

        def children(name: str, sub: str, parent: tuple[str, ...]) -> Callable[[], list[Thing]]:
            part = KINDS[name]

            def read() -> list[Thing]:
                rows = list(self.client.list(f"{path}/{sub}"))
                things = [_thing(part, (name, *parent, str(row[part.identity])), row) for row in rows]
                if name == "node":
                    names = {row["id"]: str(row["identifier"]) for row in rows}
                    for node, row in zip(things, rows, strict=True):
                        for edge, field_name in EDGES.items():
                            node.many[edge] = sorted(names[i] for i in row[field_name])
                return things

            return read

        def names_of(field_name: str) -> Callable[[], list[Thing]]:
            def read() -> list[Thing]:
                rows = [str(row["name"]) for row in self.client.list(f"{path}/{field_name}", order_by=None)]
                thing.many[field_name] = rows if field_name in kind.ordered else sorted(rows)
                return []

            return read

        def survey() -> list[Thing]:
            thing.values["survey"] = self.client.get(f"{path}/survey_spec") or {}
            return []

        if thing.key[0] == "inventory":
            return [
                children("host", "hosts", (thing.key[1],)),
                children("group", "groups", (thing.key[1],)),
                children("inventory_source", "inventory_sources", (thing.key[1],)),
            ]
        if thing.key[0] not in TEMPLATES:
            return []
        jobs = [survey, children("schedule", "schedules", thing.key)]
        jobs += [names_of(name) for name in kind.many if name not in thing.many]
        if thing.key[0] == "workflow_job_template":
            jobs.append(children("node", "workflow_nodes", (thing.key[1],)))
        return jobs

    def _members(self, group: Thing) -> None:
        for name in group.kind.many:
            group.many[name] = sorted(str(row["name"]) for row in self.client.list(f"groups/{group.id}/{name}"))

    # -- changing

    def apply(self, steps: Sequence[Step], wanted: Mapping[Key, Thing], there: Observed, wait_s: float) -> None:
        """Make the changes, in their order; wait_s: how long a project may take to be fetched.

        Raises AwxError with the first one that fails: what was done before it stays, and another run goes on there.
        """
        ids: dict[Key, int] = {key: thing.id for key, thing in there.things.items()}
        edges: list[tuple[Step, Thing]] = []
        began = {s.key[1] for s in steps if s.key[0] == "project" and (s.verb == "create" or set(s.fields) & TRIGGERS)}
        for step in steps:
            try:
                if step.verb == "synchronise":
                    self._synchronise(step.key[1], step.key[1] in began, wanted, ids, wait_s)
                elif step.verb == "delete":
                    self.client.request("DELETE", f"{KINDS[step.key[0]].endpoint}/{ids.pop(step.key)}")
                else:
                    self._write(
                        step,
                        wanted[step.key],
                        there.things.get(step.key),
                        ids,
                        secret_names(wanted[step.key], wanted, there),
                    )
                    if step.key[0] in ("node", "group"):
                        edges.append((step, wanted[step.key]))
            except Refusal as refusal:
                what = f"{step.key[0].replace('_', ' ')} {' / '.join(step.key[1:])}"
                raise AwxError(f"{what}: {refusal}") from refusal
        # Edges and groups' members once all of them are there; what goes comes before what comes.
        for remove in (True, False):
            for step, thing in edges:
                self._connect(step, thing, ids, remove=remove)

    def _id(self, kind: str, name: str, ids: Mapping[Key, int]) -> int:
        return ids.get((kind, name)) or self._ids[kind, name]

    def _write(self, step: Step, thing: Thing, found: Thing | None, ids: dict[Key, int], secrets: set[str]) -> None:
        kind = thing.kind
        body: dict[str, Any] = {}
        for name, (_now, value) in step.fields.items():
            spec = kind.fields[name]
            if name in ("survey", "approval") or (kind.name == "node" and name in RUNS):
                continue
            if spec.refers:
                body[name] = None if value is None else self._id(spec.refers, str(value), ids)
            elif name in ("inputs", "notification_configuration") and found is not None:
                # A secret that is not given stays as it is.
                kept = {n: SECRET for n in secrets if found.values.get(name, {}).get(n) == SECRET and not value.get(n)}
                body[name] = {**value, **kept}
            else:
                body[name] = encoded(value) if spec.encoded else value
        if kind.name == "node":
            runs = next((name for name in RUNS if name in step.fields and step.fields[name][1] is not None), None)
            if runs:
                body["unified_job_template"] = self._id(RUNS[runs], str(step.fields[runs][1]), ids)
        if found is None:
            body[kind.identity] = thing.key[-1]
            answer = self.client.request("POST", self._place_of(thing, body, ids), body)
            ids[thing.key] = int(answer["id"])
        elif body:
            self.client.request("PATCH", f"{kind.endpoint}/{ids[thing.key]}", body)
        path = f"{kind.endpoint}/{ids[thing.key]}"
        if kind.name == "organization":
            self._organization_id = ids[thing.key]
        if "survey" in step.fields:
            self._survey(path, step.fields["survey"][1])
        if step.fields.get("approval", (None, None))[1] is not None:
            self._approval(path, step.fields["approval"][1], found)
        if kind.name not in ("node", "group"):
            for name, (before, after) in step.many.items():
                self._associate(f"{path}/{name}", kind.many[name], (before, after), name in kind.ordered, ids)

    def _place_of(self, thing: Thing, body: dict[str, Any], ids: Mapping[Key, int]) -> str:
        """Where the object is created; what it belongs to goes into the body."""
        kind = thing.kind
        if kind.of_organization and kind.name != "job_template":  # A job template has its project's organization.
            body["organization"] = self._organization_id
        if kind.name == "schedule":
            body["unified_job_template"] = ids[thing.key[1:3]]
        elif kind.parent:
            body[kind.parent] = ids[kind.parent, thing.key[1]]
        return kind.endpoint

    def _survey(self, path: str, survey: Mapping[str, Any]) -> None:
        if survey:
            self.client.request("POST", f"{path}/survey_spec", {"name": "", "description": "", **survey})
        else:
            self.client.request("DELETE", f"{path}/survey_spec")
        self.client.request("PATCH", path, {"survey_enabled": bool(survey)})

    def _approval(self, path: str, approval: Mapping[str, Any], found: Thing | None) -> None:
        body = {"description": "", "timeout": 0, **approval}
        known = found.extra.get("approval_id") if found else None
        if known:
            self.client.request("PATCH", f"workflow_approval_templates/{known}", body)
        else:
            self.client.request("POST", f"{path}/create_approval_template", body)

    def _associate(
        self,
        path: str,
        kind: str,
        names: tuple[Sequence[str], Sequence[str]],
        ordered: bool,
        ids: Mapping[Key, int],
    ) -> None:
        before, after = names
        if kind == "label":
            labels = {str(row["name"]): int(row["id"]) for row in self.client.list(path)}
            for name in after:
                if name not in labels:
                    self.client.request("POST", path, {"name": name, "organization": self._organization_id})
            for name in before:
                if name not in after:
                    self.client.request("POST", path, {"id": labels[name], "disassociate": True})
            return
        for name in before:
            if ordered or name not in after:
                self.client.request("POST", path, {"id": self._id(kind, name, ids), "disassociate": True})
        for name in after:
            if ordered or name not in before:
                self.client.request("POST", path, {"id": self._id(kind, name, ids)})

    def _connect(self, step: Step, thing: Thing, ids: Mapping[Key, int], *, remove: bool) -> None:
        for name, (before, after) in step.many.items():
            path = f"{thing.kind.endpoint}/{ids[thing.key]}/{EDGES.get(name, name)}"
            for target in sorted(set(before) - set(after)) if remove else sorted(set(after) - set(before)):
                key = (thing.kind.many[name], thing.key[1], target)
                if key in ids:
                    body = {"id": ids[key], **({"disassociate": True} if remove else {})}
                    self.client.request("POST", path, body)

    def _synchronise(
        self, project: str, began: bool, wanted: Mapping[Key, Thing], ids: Mapping[Key, int], wait_s: float
    ) -> None:
        """Have AWX fetch the project's files, and see that the playbooks are there. began: AWX does it already."""
        path = f"projects/{self._id('project', project, ids)}"
        deadline = time.monotonic() + wait_s
        if not began or self.client.get(path)["status"] == "never updated":
            self.client.request("POST", f"{path}/update", {})
        while (status := str(self.client.get(path)["status"])) in BUSY:
            if time.monotonic() > deadline:
                raise AwxError(
                    f"project {project} is still {status} after {wait_s:g} s: see its jobs in the AWX, give it more "
                    "time (wait_s), then run this again"
                )
            time.sleep(1)
        if status != "successful":
            raise AwxError(
                f"project {project} could not be fetched by the AWX (status {status}): its jobs there have git's own "
                "words; put it right, then run this again"
            )
        needed = {str(t.values["playbook"]) for t in wanted.values() if t.values.get("project") == project}
        missing = sorted(needed - self._playbooks(self._id("project", project, ids)))
        if missing:
            raise AwxError(
                f"project {project} has no playbook {missing[0]}: is its branch (scm_branch) the one that has it?"
            )


def _thing(kind: Kind, key: Key, row: Mapping[str, Any]) -> Thing:
    """An object as the API shows it, with names in the place of ids."""
    summary: Mapping[str, Any] = row.get("summary_fields") or {}
    values: dict[str, Any] = {}
    for name, spec in kind.fields.items():
        if spec.refers:
            values[name] = (summary.get(name) or {}).get("name") if row.get(name) else None
        elif name in row:
            values[name] = decoded(row[name]) if spec.encoded else row[name]
        else:
            values[name] = spec.default
    thing = Thing(key, values, {}, frozenset(values), id=int(row["id"]))
    if kind.name == "node":
        runs = summary.get("unified_job_template") or {}
        of = {"job": "job_template", "workflow_job": "workflow"}.get(str(runs.get("unified_job_type")))
        if of:
            values[of] = runs["name"]
        elif runs.get("unified_job_type") == "workflow_approval":
            values["approval"] = {name: runs.get(name, default) for name, default in _APPROVAL_DEFAULTS.items()}
            thing.extra["approval_id"] = runs["id"]
    if kind.name == "project":
        thing.extra["status"] = str(row["status"])
    if "labels" in kind.many:
        labels = summary.get("labels") or {"count": 0, "results": []}
        if labels["count"] <= len(labels["results"]):
            thing.many["labels"] = sorted(str(label["name"]) for label in labels["results"])
    if "credentials" in kind.many:
        thing.many["credentials"] = sorted(str(c["name"]) for c in summary.get("credentials") or [])
    return thing


_APPROVAL_DEFAULTS: dict[str, Any] = {"name": "", "description": "", "timeout": 0}
TRIGGERS = frozenset(FETCHED) - {"credential"}
"""Fields of a project whose change makes AWX fetch it by itself (Project.FIELDS_TRIGGER_UPDATE)."""


def run(
    client: Client,
    wanted: Mapping[Key, Thing],
    wish: Wish,
    *,
    check: bool,
    wait_s: float = 300.0,
) -> dict[str, Any]:
    """Observe, plan and, unless check, apply and read everything back.

    The answer: changed, changes (what the plan was, without secrets), requests. Raises ContentError before anything is
    touched, AwxError.
    """
    organization = next(key[1] for key in wanted if key[0] == "organization")
    awx = Awx(client, organization)
    there = awx.observe(wanted, wish)
    steps = plan(wanted, there, wish)
    changes = [
        shown(step, secret_names(wanted[step.key], wanted, there) if step.key in wanted else set()) for step in steps
    ]
    if steps and not check:
        awx.apply(steps, wanted, there, wait_s)
        left = plan(wanted, awx.observe(wanted, Wish(wish.prune)), Wish(wish.prune))
        if left:
            kept = "; ".join(f"{s.verb} {' / '.join(s.key)} ({', '.join(s.names())})" for s in left[:5])
            raise AwxError(
                f"The AWX did not keep what it was given; still to do: {kept}{' ...' if len(left) > 5 else ''}. "
                "Somebody else may be changing it: run this again"
            )
    return {"changed": bool(steps), "changes": changes, "requests": client.requests}
