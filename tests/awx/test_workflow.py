"""A workflow in an AWX: launched with the survey's answers, waiting for its approval, going on when it is given."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.awx.client import Client, Refusal
from ansible_collections.censuschat.infra.plugins.module_utils.awx.content import run
from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import things
from ansible_collections.censuschat.infra.plugins.module_utils.awx.planner import Wish

from runbooks import definition, door
from runbooks.awx import job
from runbooks.definition import Definition
from tests.awx.conftest import ENVIRONMENT, SECRETS, Site, content

PATIENCE_S = 900.0
"""Seconds that a real AWX has to pull the execution environment and to run a job."""


@pytest.fixture
def workflow(site: Site) -> tuple[Client, int]:
    """The client, and the id of the workflow template of fail-back, whose plan one person approves."""
    run(site.client(), things(content(site), SECRETS), Wish(), check=False)
    client = site.client()
    return client, next(client.list("workflow_job_templates", name=f"{ENVIRONMENT} / fail-back"))["id"]


def wait(what: Callable[[], Any], real: bool) -> Any:
    """What it yields, as soon as that is something."""
    deadline = time.monotonic() + (PATIENCE_S if real else 5.0)
    while not (found := what()):
        assert time.monotonic() < deadline, "AWX did not get that far"
        time.sleep(2.0 if real else 0.05)
    return found


def test_answers_outside_of_the_survey_are_refused(workflow: tuple[Client, int]) -> None:
    client, template = workflow
    for answers, fault in (
        ({"to": "eu-west-1"}, "expected to be one of"),
        ({"reclone_after_s": "soon"}, "reclone_after_s"),
    ):
        with pytest.raises(Refusal, match=fault) as caught:
            client.request("POST", f"workflow_job_templates/{template}/launch", {"extra_vars": answers})
        assert caught.value.status == 400


def test_the_approval_is_waited_for_and_can_be_read_by_the_job_after_it(
    site: Site, workflow: tuple[Client, int]
) -> None:
    client, template = workflow
    real = site.emulated is None
    launched = client.request("POST", f"workflow_job_templates/{template}/launch", {"extra_vars": {"to": "us-west-2"}})
    number = launched["workflow_job"]

    def nodes() -> dict[str, dict[str, Any]]:
        return {n["identifier"]: n for n in client.list(f"workflow_jobs/{number}/workflow_nodes")}

    if real and "AWX_JOBS" not in os.environ:
        # Its jobs need the execution environment and the environment's nodes: AWX_JOBS=1 says that they are there.
        assert {"begin", "approval", "approved", "check"} <= set(nodes())
        client.request("POST", f"workflow_jobs/{number}/cancel", {})
        return
    waiting = wait(lambda: nodes()["approval"]["job"], real)
    assert nodes()["begin"]["summary_fields"]["job"]["status"] == "successful"
    assert nodes()["approved"]["job"] is None
    client.request("POST", f"workflow_approvals/{waiting}/approve", {})
    given = job.read(str(number), "approval", client.get)
    assert [(g.node, g.id) for g in given] == [("approval", waiting)]
    assert given[0].name
    wait(lambda: nodes()["check"]["job"], real)
    wait(lambda: client.get(f"workflow_jobs/{number}")["status"] in ("successful", "failed"), real)
    if real:
        _journal_has(f"awx-{number}")


def _journal_has(run_id: str) -> None:
    """What the callback wrote from inside the jobs, in the journal that RUNBOOK_JOURNAL names."""
    from runbooks.journal import Journal

    journal = Journal(os.environ["RUNBOOK_JOURNAL"], os.environ.get("RUNBOOK_ENVIRONMENT", ENVIRONMENT))
    records = journal.records(run_id)
    assert {"run_started", "step_started", "step_finished"} <= {record.kind for record in records}
    assert {record.door for record in records} == {"awx"}


def test_a_denied_approval_ends_the_workflow_before_its_first_step(site: Site, workflow: tuple[Client, int]) -> None:
    if site.emulated is None and "AWX_JOBS" not in os.environ:
        return
    client, template = workflow
    real = site.emulated is None
    launched = client.request("POST", f"workflow_job_templates/{template}/launch", {"extra_vars": {"to": "us-west-2"}})
    number = launched["workflow_job"]

    def nodes() -> dict[str, dict[str, Any]]:
        return {n["identifier"]: n for n in client.list(f"workflow_jobs/{number}/workflow_nodes")}

    waiting = wait(lambda: nodes()["approval"]["job"], real)
    client.request("POST", f"workflow_approvals/{waiting}/deny", {})
    wait(lambda: client.get(f"workflow_jobs/{number}")["status"] == "failed", real)
    assert nodes()["check"]["job"] is None


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the job template of a step that is for two slices."""
    load = definition.load

    def loaded(name: str) -> Definition:
        runbook = load(name)
        first, second, *others = runbook.steps
        return replace(runbook, steps=(first, replace(second, slices=2), *others)) if name == "drill" else runbook

    monkeypatch.setattr(definition, "load", loaded)
    return f"{ENVIRONMENT} / drill / {loaded('drill').steps[1].id}"


def test_slices_are_brought_and_read_back(site: Site, sliced: str) -> None:
    wanted = things(content(site), SECRETS)
    run(site.client(), wanted, Wish(), check=False)
    assert not run(site.client(), wanted, Wish(), check=False)["changed"]
    template = next(site.client().list("job_templates", name=sliced))
    assert template["job_slice_count"] == 2
    assert json.loads(template["extra_vars"])["runbook_awx"]["slices"] == 2
    client = site.client()
    client.request("PATCH", f"job_templates/{template['id']}", {"job_slice_count": 3})
    (drift,) = run(site.client(), wanted, Wish(), check=True)["changes"]
    assert (drift["name"], drift["fields"]) == (sliced, ["job_slice_count"])


def test_each_slice_finds_its_run_step_and_fellows(emulator: Site, sliced: str) -> None:
    """From what AWX's sources say that a slice is told; a real one has not been asked."""
    assert emulator.emulated is not None
    run(emulator.client(), things(content(emulator, need=0), SECRETS), Wish(), check=False)
    client = emulator.client()
    template = next(client.list("workflow_job_templates", name=f"{ENVIRONMENT} / drill"))
    number = client.request("POST", f"workflow_job_templates/{template['id']}/launch", {"extra_vars": {}})[
        "workflow_job"
    ]
    nodes = {n["identifier"]: n for n in client.list(f"workflow_jobs/{number}/workflow_nodes")}
    step = sliced.rpartition(" / ")[2]
    nested = nodes[step]["summary_fields"]["job"]
    assert nested["type"] == "workflow_job"
    jobs = [node["job"] for node in client.list(f"workflow_jobs/{nested['id']}/workflow_nodes")]
    found = []
    for each in jobs:
        extra = emulator.emulated.told(each, {"runbook_run": f"awx-{number}"})
        plays = [_Play({"runbook_name": "drill"}), _Play({"runbook_step": step})]
        call = door.Call(definition.SHIPPED / "drill.yml", ["inventory"], plays, extra, tags=[step])
        entry = door.entry(call)
        assert entry is not None
        assert entry.slice is not None
        assert (entry.run, entry.units, entry.alone) == (f"awx-{number}", [step], True)
        found.append((entry.slice.job, entry.slice.of, entry.slice.share))
    share = f"slices of AWX job {nested['id']}"
    assert found == [(str(each), 2, share) for each in jobs]


class _Play:
    """A play as the door looks at it."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.vars, self.hosts = variables, "all"
