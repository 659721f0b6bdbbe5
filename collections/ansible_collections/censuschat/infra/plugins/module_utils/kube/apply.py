# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Bringing a desired set about: read once, apply what differs in waves and in parallel, wait, prune, or undo it all."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ansible_collections.censuschat.infra.plugins.module_utils.kube import planner, waits
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import (
    APPLY,
    MERGE,
    METADATA_ONLY,
    ApiError,
    Client,
)
from ansible_collections.censuschat.infra.plugins.module_utils.kube.discovery import Kinds
from ansible_collections.censuschat.infra.plugins.module_utils.kube.fields import Censor, diff_pair, unchanged
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import (
    CONFIGURED,
    CREATED,
    FAILED,
    KEPT,
    PRUNED,
    REMOVED,
    RESTORED,
    UNCHANGED,
    Document,
    Key,
    KubeError,
    Outcome,
    Resource,
    Wanted,
)

IN_EFFECT_WITHIN_S = 15.0
"""How long an established CRD's path may still answer 404, and a new quota be without a count; mostly a second."""
_POLL_FIRST_S, _POLL_MOST_S = 0.2, 2.0
_LOOK_S = 3.0
"""How often the pods of what is waited for are looked at for what waiting does not mend."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class WaitFor:
    """An object of the set, or any other, that is waited for until a condition holds."""

    key: Key
    resource: Resource
    condition: waits.Condition


@dataclasses.dataclass(frozen=True)
class Options:
    """How to apply. wait_timeout: seconds for all waits together."""

    manager: str = "censuschat-infra"
    force: bool = False
    check: bool = False
    diff: bool = False
    preflight: bool = False
    wait: bool = False
    wait_timeout: float = 300.0
    wait_for: tuple[WaitFor, ...] = ()
    rollback: bool = False
    parallelism: int = 8
    apply_set: planner.ApplySet | None = None
    prune: bool = False
    delete_named: tuple[str, ...] = ()


@dataclasses.dataclass
class Report:
    """What became of the set. problems: one line for each object or wait that failed."""

    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    rolled_back: bool = False

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for outcome in self.outcomes:
            found[outcome.result] = found.get(outcome.result, 0) + 1
        return found

    @property
    def changed(self) -> bool:
        return any(o.result in (CREATED, CONFIGURED, PRUNED) for o in self.outcomes)

    def diff(self) -> list[dict[str, Any]]:
        """Before and after of every object that changed; Secrets without their values."""
        found = []
        for outcome in self.outcomes:
            if outcome.result in (CREATED, CONFIGURED, PRUNED):
                before, after = diff_pair(outcome.before, outcome.after)
                found.append(
                    {
                        "before_header": str(outcome.key),
                        "after_header": str(outcome.key),
                        "before": before,
                        "after": after,
                    }
                )
        return found


@dataclasses.dataclass
class _Live:
    """What was read of an object. known: whether it could be read at all."""

    known: bool = False
    there: bool = False
    version: str = ""
    same: bool = False
    body: Document | None = None


class Applier:
    """One run over one set. `coming`: the (group, kind) that CRDs of the set will bring."""

    def __init__(
        self,
        client: Client,
        kinds: Kinds,
        wanted: Sequence[Wanted],
        options: Options,
        coming: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self.client, self.kinds, self.options, self.coming = client, kinds, options, coming
        self.apply_set = options.apply_set
        if self.apply_set:
            member = self.apply_set.member
            wanted = [dataclasses.replace(w, body=member(w.body)) for w in wanted]
        self.wanted = wanted
        self.censor = Censor(w.body for w in wanted)
        self.report = Report()
        self.live: dict[Key, _Live] = {w.key: _Live() for w in wanted}
        self._ended = ""
        self._deadline = 0.0
        self._failed_crds: dict[tuple[str, str], str] = {}
        self._failed_namespaces: set[str] = set()
        self._asked: dict[Key, Outcome] = {}
        """What a dry run of all objects has said of each."""

    def run(self) -> Report:
        """Does it all. KubeError only for what makes the whole run impossible; other failures are in the report."""
        self._check_parent()
        with ThreadPoolExecutor(self.options.parallelism) as pool:
            self.pool = pool
            self._read()
            if self.options.check:
                self._dry_run()
                self._prune()
                return self.report
            if self.options.preflight:
                self._dry_run()
                if self.report.problems:
                    for outcome in self.report.outcomes:
                        if outcome.result in (CREATED, CONFIGURED):
                            outcome.result, outcome.message = UNCHANGED, "nothing was applied: others would fail"
                    return self.report
                self._asked = {outcome.key: outcome for outcome in self.report.outcomes}
                self.report.outcomes.clear()
            self._apply()
            self._deadline = time.monotonic() + self.options.wait_timeout
            if not (self.report.problems and self.options.rollback) and not self._ended:
                self._wait()
            if self.report.problems:
                if self.options.rollback:
                    self._roll_back()
            else:
                self._prune()
            return self.report

    def _each(self, work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        return self.pool.map(work, items)

    # ---- read ----

    def _read(self) -> None:
        readable = [w for w in self.wanted if (w.resource.group, w.resource.kind) not in self.coming]
        bodies = {w.key: w for w in readable}
        for w in self.wanted:
            if w.key not in bodies:
                self.live[w.key].known = True
        listed, single = [], []
        for read in planner.reads(readable):
            if read.listed:
                listed.append(read)
            else:
                single += [bodies[k] for k in read.keys]

        def one_list(read: planner.Read) -> None:
            expected = set(read.keys)
            try:
                for page in self.client.pages(read.resource.path(read.namespace)):
                    for body in page:
                        metadata = body["metadata"]
                        key = Key(
                            read.resource.group, read.resource.kind, metadata.get("namespace", ""), metadata["name"]
                        )
                        if key in expected:
                            body["apiVersion"], body["kind"] = read.resource.api_version, read.resource.kind
                            self._note(bodies[key], body)
                            expected.discard(key)
            except ApiError as error:
                if error.status in (403, 404, 405):
                    return
                raise
            for key in expected:
                self._note(bodies[key], None)

        def one_get(wanted: Wanted) -> None:
            try:
                self._note(wanted, self.client.get(wanted.path))
            except ApiError as error:
                if error.status != 403:
                    raise

        for _done in self._each(one_list, listed):
            pass
        for _done in self._each(one_get, single):
            pass

    def _note(self, wanted: Wanted, body: Document | None) -> None:
        live = self.live[wanted.key]
        live.known, live.there = True, body is not None
        if body is None:
            return
        live.version = body["metadata"].get("resourceVersion", "")
        live.same = unchanged(wanted.body, body, self.options.manager)
        if not live.same:
            live.body = body

    # ---- check mode ----

    def _dry_run(self) -> None:
        missing = {w.key.name for w in self.wanted if planner.wave(w.key) == planner.NAMESPACES and self._new(w)}

        def one(wanted: Wanted) -> Outcome:
            if self.live[wanted.key].same:
                return self._outcome(wanted, UNCHANGED)
            if (wanted.key.group, wanted.key.kind) in self.coming or wanted.key.namespace in missing:
                # The API cannot look at it before its kind or its namespace is there.
                return self._outcome(wanted, CREATED, after=wanted.body)
            return self._patch(wanted, dry_run=True)

        self._take(self._each(one, self.wanted))

    def _new(self, wanted: Wanted) -> bool:
        live = self.live[wanted.key]
        return live.known and not live.there

    # ---- apply ----

    def _apply(self) -> None:
        parent_written = False
        for group in planner.in_waves(self.wanted):
            wave = planner.wave(group[0].key)
            if not parent_written and wave > planner.NAMESPACES:
                self._write_parent()
                parent_written = True
            outcomes = list(self._each(self._apply_one, group))
            self._take(outcomes)
            if wave == planner.DEFINITIONS:
                self._await_definitions(group, outcomes)
            elif wave == planner.NAMESPACES:
                self._failed_namespaces = {o.key.name for o in outcomes if o.result == FAILED}
        if not parent_written:
            self._write_parent()

    def _apply_one(self, wanted: Wanted) -> Outcome:
        if self.live[wanted.key].same:
            return self._outcome(wanted, UNCHANGED)
        crd = self._failed_crds.get((wanted.key.group, wanted.key.kind))
        if crd:
            return self._failure(wanted, f"not applied, because its CustomResourceDefinition {crd} is not established")
        if wanted.key.namespace in self._failed_namespaces:
            return self._failure(wanted, f"not applied, because the namespace {wanted.key.namespace} could not be made")
        if self._ended:
            return self._outcome(wanted, FAILED, message="not applied")
        if self.live[wanted.key].there:
            # What the fields' owners do not settle, the API does, without a write in its audit log. Its refusal does
            # not count: an admission webhook may know no dry run.
            asked = self._asked.get(wanted.key) or self._patch(wanted, dry_run=True)
            if asked.result == UNCHANGED or self._ended:
                return asked
        return self._patch(wanted)

    def _patch(self, wanted: Wanted, *, dry_run: bool = False) -> Outcome:
        query = {
            "fieldManager": self.options.manager,
            "force": self.options.force,
            "fieldValidation": "Strict",
            "dryRun": "All" if dry_run else None,
        }
        live = self.live[wanted.key]
        until = time.monotonic() + IN_EFFECT_WITHIN_S
        tries = 0
        while True:
            try:
                after = self.client.request("PATCH", wanted.path, query=query, body=wanted.body, content_type=APPLY)
                break
            except ApiError as error:
                tries += 1
                if _not_yet(error, wanted, self.coming) and time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                if error.status == 409 and not error.causes and tries < 5:
                    continue  # another writer came between; the apply itself is still what is wanted
                return self._failure(wanted, explain(error, wanted, self.options.manager))
            except KubeError as error:
                self._ended = self._ended or str(error)
                return self._outcome(wanted, FAILED, message="not applied")
        metadata = after["metadata"]
        if metadata.get("deletionTimestamp"):
            blockers = metadata.get("finalizers") or (after.get("spec") or {}).get("finalizers") or []
            return self._failure(
                wanted,
                f"it is being deleted since {metadata['deletionTimestamp']}"
                + (f" and waits for {', '.join(blockers)}" if blockers else "")
                + "; run again when it is gone",
            )
        if live.known:
            if not live.there:
                result = CREATED
            else:
                # A dry run stores nothing, so its answer may carry the stored version.
                same = (
                    _equal_but_version(live.body, after) if dry_run else metadata.get("resourceVersion") == live.version
                )
                result = UNCHANGED if same else CONFIGURED
        else:
            result = CONFIGURED
        return self._outcome(wanted, result, after=after)

    def _outcome(self, wanted: Wanted, result: str, *, message: str = "", after: Document | None = None) -> Outcome:
        outcome = Outcome(wanted.key, wanted.resource, result, str(wanted.source), message)
        outcome.uid = ((after or {}).get("metadata") or {}).get("uid", "")
        if result in (CREATED, CONFIGURED) and (self.options.diff or self.options.rollback):
            outcome.before, outcome.after = self.live[wanted.key].body, after
        return outcome

    def _failure(self, wanted: Wanted, why: str) -> Outcome:
        return self._outcome(wanted, FAILED, message=self.censor(why))

    def _take(self, outcomes: Iterable[Outcome]) -> None:
        lost = 0
        for outcome in outcomes:
            self.report.outcomes.append(outcome)
            if outcome.result == FAILED:
                if outcome.message == "not applied":
                    lost += 1
                else:
                    self.report.problems.append(f"{outcome.source}: {outcome.key}: {outcome.message}")
        if lost:
            done = sum(o.result != FAILED for o in self.report.outcomes)
            self.report.problems.append(
                f"{self._ended}; {done} of {len(self.wanted)} objects were done before; run again to complete the set"
            )

    def _await_definitions(self, group: Sequence[Wanted], outcomes: Sequence[Outcome]) -> None:
        fresh = {o.key for o in outcomes if o.result in (CREATED, CONFIGURED)}
        failed = {o.key: "it could not be applied" for o in outcomes if o.result == FAILED}
        deadline = time.monotonic() + min(60.0, self.options.wait_timeout)
        pending = [WaitFor(w.key, w.resource, waits.Condition(type="Established")) for w in group if w.key in fresh]
        for target, why in self._poll(pending, deadline).items():
            failed[target.key] = why
            self.report.problems.append(f"{target.key}: {why}")
        for wanted in group:
            if wanted.key in failed:
                spec = wanted.body.get("spec") or {}
                kind = str((spec.get("names") or {}).get("kind"))
                group_name = str(spec.get("group"))
                if (group_name, kind) in self.coming:
                    self._failed_crds[(group_name, kind)] = wanted.key.name

    # ---- waits ----

    def _wait(self) -> None:
        failed = {o.key for o in self.report.outcomes if o.result == FAILED}
        targets = list(self.options.wait_for)
        explicit = {t.key for t in targets}
        if self.options.wait:
            targets += [
                WaitFor(w.key, w.resource, waits.Condition())
                for w in self.wanted
                if waits.waited(w.key) and w.key not in failed and w.key not in explicit
            ]
        if not targets:
            return
        sources = {w.key: str(w.source) for w in self.wanted}
        for target, why in self._poll(targets, self._deadline).items():
            trouble = waits.pod_trouble(self._pods_of(target))
            source = f"{sources[target.key]}: " if target.key in sources else ""
            self.report.problems.append(
                self.censor(f"{source}{target.key} is not ready: {why}" + (f"; its pods: {trouble}" if trouble else ""))
            )

    def _poll(self, targets: Sequence[WaitFor], deadline: float) -> dict[WaitFor, str]:
        """Waits until all are ready; gives those that are not, with why. All kinds are read side by side."""
        pending, broken = list(targets), {}
        began, delay = time.monotonic(), _POLL_FIRST_S
        look = began + _LOOK_S
        while pending:
            states: dict[WaitFor, waits.State] = dict(zip(pending, self._each(self._state_of, pending), strict=True))
            broken.update({t: s.why for t, s in states.items() if s.state == waits.BROKEN})
            pending = [t for t, s in states.items() if s.state == waits.PENDING]
            if pending and time.monotonic() >= look:
                look = time.monotonic() + _LOOK_S
                for target, why in zip(pending, list(self._each(self._hopeless, pending)), strict=True):
                    if why:
                        broken[target] = why
                pending = [t for t in pending if t not in broken]
            if not pending:
                break
            if time.monotonic() + delay > deadline:
                waited = time.monotonic() - began
                broken.update({t: f"{states[t].why} after {waited:.0f} s" for t in pending})
                break
            time.sleep(delay)
            delay = min(_POLL_MOST_S, delay * 1.3)
        return broken

    def _state_of(self, target: WaitFor) -> waits.State:
        condition = target.condition if target.condition.type or target.condition.field else None
        try:
            live = self.client.get(target.resource.path(target.key.namespace, target.key.name))
        except ApiError as error:
            return waits.State(waits.BROKEN if error.status == 403 else waits.PENDING, error.message)
        except KubeError as error:
            return waits.State(waits.BROKEN, str(error))
        return waits.assess(target.key, live, condition)

    def _pods_of(self, target: WaitFor) -> list[Document]:
        """The pods of a workload's present revision; none where there are none or they may not be read."""
        if target.key.group not in ("apps", "batch") or target.condition.type or target.condition.field:
            return []
        try:
            live = self.client.get(target.resource.path(target.key.namespace, target.key.name)) or {}
            labels = ((live.get("spec") or {}).get("selector") or {}).get("matchLabels") or {}
            if not labels:
                return []
            query = {"labelSelector": ",".join(f"{k}={v}" for k, v in labels.items()), "limit": 50}
            pods = self.client.request("GET", f"/api/v1/namespaces/{target.key.namespace}/pods", query=query)
            sets: Document = {}
            if target.key.kind == "Deployment":
                path = f"/apis/apps/v1/namespaces/{target.key.namespace}/replicasets"
                sets = self.client.request("GET", path, query=query)
        except KubeError:
            return []
        return waits.newest(live, pods.get("items") or [], sets.get("items") or [])

    def _hopeless(self, target: WaitFor) -> str:
        return waits.hopeless(self._pods_of(target))

    # ---- the set's own record ----

    def _check_parent(self) -> None:
        self._parent: Document | None = None
        if not self.apply_set:
            return
        self._parent = self.client.get(
            f"/api/v1/namespaces/{self.apply_set.namespace}/configmaps/{self.apply_set.name}"
        )
        problem = self.apply_set.problem(self._parent) if self._parent else ""
        if problem:
            raise KubeError(problem)

    def _write_parent(self, *, exact: bool = False) -> None:
        """Records kinds and namespaces: before an apply those of old and new members, after a prune the new ones."""
        if not self.apply_set or self._ended:
            return
        kinds = planner.group_kinds(w.key for w in self.wanted)
        namespaces = {w.key.namespace for w in self.wanted}
        if not exact:
            kinds |= planner.recorded(self._parent, planner.GROUP_KINDS)
            namespaces |= planner.recorded(self._parent, planner.NAMESPACES_OF)
        body = self.apply_set.parent(kinds, namespaces)
        if self._parent and all(
            (self._parent["metadata"].get(part) or {}).get(k) == v
            for part in ("labels", "annotations")
            for k, v in body["metadata"][part].items()
        ):
            return
        path = f"/api/v1/namespaces/{self.apply_set.namespace}/configmaps/{self.apply_set.name}"
        query = {"fieldManager": self.options.manager, "force": True}
        try:
            self._parent = self.client.request("PATCH", path, query=query, body=body, content_type=APPLY)
        except KubeError as error:
            self.report.problems.append(f"apply_set {self.apply_set.namespace}/{self.apply_set.name}: {error}")

    # ---- prune ----

    def _prune(self) -> None:
        if not self.apply_set or not self.options.prune or self.report.problems:
            return
        members: list[planner.Member] = []
        recorded = planner.recorded(self._parent, planner.GROUP_KINDS)
        if self._parent is not None:
            kinds = sorted(recorded | planner.group_kinds(w.key for w in self.wanted))
            for found in self._each(self._members, kinds):
                members += found
        gone, kept = planner.prune(members, (w.key for w in self.wanted), self.options.delete_named)
        for member in kept:
            self.report.outcomes.append(
                Outcome(
                    member.key,
                    member.resource,
                    KEPT,
                    message="no longer in the set; it is deleted only when delete_named names it",
                )
            )
        problems = False
        for outcome in self._each(self._delete, gone):
            self.report.outcomes.append(outcome)
            if outcome.result == FAILED:
                problems = True
                self.report.problems.append(f"{outcome.key}: {outcome.message}")
        if not problems and not kept and not self.options.check:
            self._write_parent(exact=True)

    def _members(self, group_kind: str) -> list[planner.Member]:
        if not self.apply_set:
            return []
        kind, group = group_kind.partition(".")[::2]
        resource = self.kinds.preferred(group, kind)
        if resource is None or (group, kind) in self.coming:
            return []
        query = {"labelSelector": f"{planner.PART_OF}={self.apply_set.id}"}
        places = [""]
        found: list[planner.Member] = []
        while places:
            place = places.pop()
            try:
                for page in self.client.pages(resource.path(place), query=query, accept=METADATA_ONLY):
                    found += [_member(resource, item) for item in page]
            except ApiError as error:
                if error.status == 403 and resource.namespaced and not place:
                    known = planner.recorded(self._parent, planner.NAMESPACES_OF) | {
                        w.key.namespace for w in self.wanted
                    }
                    places = sorted((known | {self.apply_set.namespace}) - {""})
                    continue
                if error.status in (404, 405):
                    return []
                raise KubeError(f"the members of apply_set {self.apply_set.name} cannot be listed: {error}") from error
        return found

    def _delete(self, member: planner.Member) -> Outcome:
        outcome = Outcome(member.key, member.resource, PRUNED)
        path = member.resource.path(member.key.namespace, member.key.name)
        try:
            if self.options.diff:
                outcome.before = self.client.get(path)
            self._delete_uid(path, member.uid, dry_run=self.options.check)
        except KubeError as error:
            outcome.result, outcome.message = FAILED, f"could not be pruned: {error}"
        return outcome

    def _delete_uid(self, path: str, uid: str, *, dry_run: bool = False) -> bool:
        body: Document = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        if dry_run:
            body["dryRun"] = ["All"]
        try:
            self.client.request("DELETE", path, body=body)
        except ApiError as error:
            # Gone, or replaced by somebody's object of the same name.
            if error.status in (404, 409):
                return False
            raise
        return True

    # ---- undo ----

    def _roll_back(self) -> None:
        """What this run created is removed, what it changed is as it was. Namespaces and CRDs stay unless named."""
        named = set(self.options.delete_named)
        done = [o for o in self.report.outcomes if o.result in (CREATED, CONFIGURED)]
        done.sort(key=lambda o: -planner.wave(o.key))
        lock = threading.Lock()

        def one(outcome: Outcome) -> None:
            path = outcome.resource.path(outcome.key.namespace, outcome.key.name)
            try:
                if outcome.result == CREATED:
                    if planner.keeps(outcome.key) and f"{outcome.key.kind}/{outcome.key.name}" not in named:
                        outcome.message = "created by this run and kept: it is removed only when delete_named names it"
                        return
                    self._delete_uid(path, outcome.uid)
                    outcome.result = REMOVED
                else:
                    self._restore(outcome, path)
                    outcome.result = RESTORED
            except KubeError as error:
                with lock:
                    self.report.problems.append(self.censor(f"{outcome.key} could not be put back: {error}"))

        for number in sorted({planner.wave(o.key) for o in done}, reverse=True):
            for _done in self._each(one, [o for o in done if planner.wave(o.key) == number]):
                pass
        self.report.rolled_back = True

    def _restore(self, outcome: Outcome, path: str) -> None:
        before = outcome.before
        if before is None:
            raise KubeError("its state before this run could not be read")
        for attempt in range(5):
            now = self.client.get(path)
            if now is None:
                raise KubeError("it is gone")
            body = {**before, "metadata": {**before["metadata"], "resourceVersion": now["metadata"]["resourceVersion"]}}
            try:
                put = self.client.request("PUT", path, body=body, query={"fieldManager": self.options.manager})
                break
            except ApiError as error:
                if error.status != 409 or attempt == 4:
                    raise
        # The PUT made us owner of what it set back; the owners of before are part of what was before.
        fields = before["metadata"].get("managedFields")
        if fields:
            owners = {"metadata": {"managedFields": fields, "uid": put["metadata"]["uid"]}}
            self.client.request("PATCH", path, body=owners, content_type=MERGE)


def explain(error: ApiError, wanted: Wanted, manager: str) -> str:
    """Why the API refused an object, with field and remedy."""
    conflicts = [c for c in error.causes if c.get("reason") == "FieldManagerConflict"]
    if conflicts:
        fields: dict[str, list[str]] = {}
        for cause in conflicts:
            owner = str(cause.get("message", "")).removeprefix("conflict with ")
            fields.setdefault(owner, []).append(str(cause.get("field", "")))
        owned = "; ".join(f"{', '.join(names)} belongs to {owner}" for owner, names in fields.items())
        return f"{owned}; take the fields out of the manifest, or take them over with force_conflicts: true"
    text = " ".join(error.message.split())
    if error.status == 422 and error.causes:
        found = [
            f"{str(c.get('field')).replace('[]', 'the object')}: {' '.join(str(c.get('message', '')).split())}"
            for c in error.causes
        ]
        text = "; ".join(dict.fromkeys(found))
        if "immutable" in text or "may not be changed" in text or "forbidden: updates to" in text.lower():
            text += "; this field cannot be changed: put the old value back, or delete the object and apply again"
        return text
    if "field not declared in schema" in text or "unknown field" in text:
        fields_named = text.partition("): ")[2] or text.partition("strict decoding error: ")[2] or text
        return (
            f"{fields_named} ({wanted.resource.api_version} has no such field; is it misspelt or in the wrong place?)"
        )
    if error.status == 403 and "exceeded quota" in text:
        return f"{text.partition('forbidden: ')[2] or text}; ask for less, or raise the ResourceQuota"
    if error.status == 403 and "is being terminated" in text:
        return f"{text}; run again when the namespace is gone"
    if error.status == 403:
        return f"{text}; give the user of the kubeconfig a role with that verb"
    if error.status == 404 and "namespaces" in text:
        return f"the namespace {wanted.key.namespace} does not exist; add it to the set, or make it first"
    if error.status == 413 or "too large" in text:
        return f"{text}; split the object's data: etcd takes 1.5 MiB in one object"
    return text


def _not_yet(error: ApiError, wanted: Wanted, coming: frozenset[tuple[str, str]]) -> bool:
    """Whether the refusal is about something of the set that is there and not yet in effect."""
    if error.status == 403:
        # A new ResourceQuota refuses everything until its controller has counted.
        return "status unknown for quota" in error.message
    fresh = (wanted.key.group, wanted.key.kind) in coming
    return error.status == 404 and fresh and 'namespaces "' not in error.message


def _equal_but_version(before: Document | None, after: Document) -> bool:
    if before is None:
        return False

    def bare(document: Document) -> Document:
        metadata = {
            k: v for k, v in document["metadata"].items() if k not in ("resourceVersion", "managedFields", "generation")
        }
        return {**document, "metadata": metadata}

    def owners(document: Document) -> list[Any]:
        entries = document["metadata"].get("managedFields") or []
        return [{k: v for k, v in e.items() if k != "time"} for e in entries]

    return bare(before) == bare(after) and owners(before) == owners(after)


def _member(resource: Resource, item: Document) -> planner.Member:
    metadata = item["metadata"]
    return planner.Member(
        Key(resource.group, resource.kind, metadata.get("namespace", ""), metadata["name"]),
        resource,
        metadata["uid"],
        owned=any(o.get("controller") for o in metadata.get("ownerReferences") or []),
        terminating=bool(metadata.get("deletionTimestamp")),
    )
