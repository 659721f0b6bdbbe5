# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a task's arguments to its result: reads the set, finds the API, runs the apply, words the outcome."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube import kubeconfig, planner, waits
from ansible_collections.censuschat.infra.plugins.module_utils.kube.apply import Applier, Options, Report, WaitFor
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import Client
from ansible_collections.censuschat.infra.plugins.module_utils.kube.discovery import AnyKinds, Kinds, discover
from ansible_collections.censuschat.infra.plugins.module_utils.kube.documents import expand, read_files, read_text
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import (
    CREATED,
    InputError,
    Key,
    KubeError,
    Outcome,
    Source,
)

MOST_LINES = 20
"""Failures that a message spells out; the result's `failures` has them all."""
KUSTOMIZE_TIMEOUT_S = 120

Item = tuple[Source, Any]


def run(parameters: Mapping[str, Any], *, check: bool, diff: bool) -> dict[str, Any]:
    """The module's result; it has `msg` when it failed."""
    seconds: dict[str, float] = {}
    begun = time.monotonic()

    def lap(name: str) -> None:
        nonlocal begun
        now = time.monotonic()
        seconds[name] = round(now - begun, 3)
        begun = now

    try:
        _sensible(parameters)
        items = list(_items(parameters))
        lap("read")
        if check and parameters["kubeconfig"] and not Path(parameters["kubeconfig"]).exists():
            return _unfounded(parameters, items)
        access = kubeconfig.load(parameters["kubeconfig"] or "", parameters["context"] or "")
        client = Client(access, connections=parameters["parallelism"])
        kinds = discover(client)
        lap("discover")
        namespace = parameters["namespace"] or access.namespace or "default"
        wanted, coming = planner.build(items, kinds, namespace)
        del items
        options = _options(parameters, kinds, namespace, check=check, diff=diff)
        lap("plan")
        applier = Applier(client, kinds, wanted, options, coming)
        report = applier.run()
        lap("apply")
    except InputError as error:
        return {
            "msg": f"Nothing was applied. {_lines(error.problems)}",
            "failures": error.problems,
            "changed": False,
        }
    except KubeError as error:
        return {"msg": str(error), "failures": [str(error)], "changed": False}
    result: dict[str, Any] = {
        "changed": report.changed,
        "objects": [o.public() for o in report.outcomes],
        "counts": report.counts(),
        "rolled_back": report.rolled_back,
        "seconds": seconds,
        "requests": client.requests,
        "max_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    if diff:
        result["diff"] = report.diff()
    if report.problems:
        result["msg"] = _verdict(report, check=check)
        result["failures"] = report.problems
    return result


def _unfounded(parameters: Mapping[str, Any], items: list[Item | str]) -> dict[str, Any]:
    """The plan for a cluster that is still to be founded."""
    wanted, _coming = planner.build(items, AnyKinds(), parameters["namespace"] or "")
    report = Report([Outcome(w.key, w.resource, CREATED, str(w.source)) for w in wanted])
    return {
        "changed": report.changed,
        "objects": [o.public() for o in report.outcomes],
        "counts": report.counts(),
        "rolled_back": False,
        "seconds": {},
        "requests": 0,
        "max_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "warned": [
            f"kubeconfig {parameters['kubeconfig']} is not there yet: its cluster is taken for one to be founded, "
            "and nothing was asked of its API"
        ],
    }


def _verdict(report: Report, *, check: bool) -> str:
    counts = ", ".join(f"{n} {word}" for word, n in sorted(report.counts().items()))
    end = " What this run changed was put back." if report.rolled_back else ""
    verb = "would fail" if check else "failed"
    return f"{len(report.problems)} {verb} ({counts}). {_lines(report.problems)}{end}"


def _lines(problems: list[str]) -> str:
    shown = " | ".join(problems[:MOST_LINES])
    more = len(problems) - MOST_LINES
    return shown + (f" | and {more} more (see failures)" if more > 0 else "")


def _sensible(parameters: Mapping[str, Any]) -> None:
    if parameters["prune"] and not parameters["apply_set"]:
        raise KubeError("prune needs apply_set: without a set of its own nothing tells what may be deleted")
    for name in ("parallelism", "wait_timeout"):
        if parameters[name] < 1:
            raise KubeError(f"{name} must be at least 1, not {parameters[name]}")
    for entry in parameters["delete_named"]:
        kind, name = entry.partition("/")[::2]
        if kind not in ("Namespace", "CustomResourceDefinition") or not name:
            raise KubeError(f"delete_named: {entry!r} is neither Namespace/NAME nor CustomResourceDefinition/NAME")


def _items(parameters: Mapping[str, Any]) -> Iterator[Item | str]:
    given = False
    if parameters["payload"]:
        payload = json.loads(Path(parameters["payload"]).read_bytes())
        # An empty list is a set like any other.
        given = payload.get("definition") is not None
        for number, entry in enumerate(payload.get("definition") or [], 1):
            if isinstance(entry, str):
                yield from read_text("definition", entry)
            elif entry is not None:
                yield Source("definition", number), entry
        for entry in payload.get("templates") or []:
            given = True
            yield from read_text(entry["name"], entry["text"])
    if parameters["src"]:
        given = True
        yield from read_files(expand(parameters["src"]))
    if parameters["kustomize"]:
        given = True
        yield from read_text(f"kustomization {parameters['kustomize']}", _kustomize(parameters["kustomize"]))
    if not given and not parameters["apply_set"]:
        raise KubeError("nothing to apply: give definition, src, template or kustomize")


def _kustomize(directory: str) -> bytes:
    standalone = shutil.which("kustomize")
    kubectl = shutil.which("kubectl")
    if not standalone and not kubectl:
        raise KubeError(
            "kustomize needs the program kustomize or kubectl on the host the task runs on; neither is there"
        )
    command = [standalone, "build", directory] if standalone else [str(kubectl), "kustomize", directory]
    try:
        # pylint: disable-next=ansible-bad-function  # Runs on the controller too, where there is no AnsibleModule.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KUSTOMIZE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KubeError(f"kustomization {directory} was not built within {KUSTOMIZE_TIMEOUT_S} s") from error
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise KubeError(f"kustomization {directory} cannot be built: {said[-500:]}")
    return done.stdout


def _options(parameters: Mapping[str, Any], kinds: Kinds, namespace: str, *, check: bool, diff: bool) -> Options:
    targets = []
    for number, entry in enumerate(parameters["wait_for"], 1):
        found = kinds.find(entry["api_version"], entry["kind"])
        if found is None:
            raise KubeError(f"wait_for, entry {number}: {kinds.problem(entry['api_version'], entry['kind'])}")
        place = (entry["namespace"] or namespace) if found.namespaced else ""
        condition = waits.Condition(
            entry["condition"] or "", entry["status"], entry["field"] or "", entry["value"] or ""
        )
        targets.append(WaitFor(Key(found.group, found.kind, place, entry["name"]), found, condition))
    apply_set = parameters["apply_set"]
    return Options(
        manager=parameters["field_manager"],
        force=parameters["force_conflicts"],
        check=check,
        diff=diff,
        preflight=parameters["preflight"],
        wait=parameters["wait"],
        wait_timeout=parameters["wait_timeout"],
        wait_for=tuple(targets),
        rollback=parameters["rollback_on_failure"],
        parallelism=parameters["parallelism"],
        apply_set=planner.ApplySet(apply_set["name"], apply_set["namespace"]) if apply_set else None,
        prune=parameters["prune"],
        delete_named=tuple(parameters["delete_named"]),
    )
