"""What a definition is in AWX, completed for an environment, and what the workflow's own jobs make of AWX's answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import ContentError, rrule_faults, things
from ansible_collections.censuschat.infra.plugins.plugin_utils.awx_runbooks import Own, approved, complete

from runbooks import awx, definition, generate
from runbooks.awx import job
from runbooks.definition import Approvals, Definition, Parameter, Schedule, Step, Undo
from runbooks.errors import Refused

HERE = Path("/project/runbooks/definitions/move.yml")


def step(name: str, **more: Any) -> Step:
    playbook = Path(f"/project/runbooks/steps/{name}.yml")
    return Step(name, name.title(), playbook, 10.0, 120.0, (), False, **more)


def runbook(*steps: Step, parameters: tuple[Parameter, ...] = (), schedule: tuple[Schedule, ...] = ()) -> Definition:
    return Definition(
        name="move",
        title="Move it",
        purpose="Moves it.",
        owner="us",
        severity="low",
        parameters={p.name: p for p in parameters},
        reach=(),
        targets={},
        steps=steps,
        path=HERE,
        approvals=Approvals(1),
        schedule=schedule,
    )


def nodes(*steps: Step) -> dict[str, dict[str, Any]]:
    return {node["identifier"]: node for node in awx.nodes(runbook(*steps))}


def test_steps_follow_each_other_after_the_approved_plan() -> None:
    found = nodes(step("one"), step("two"))
    assert [found[name]["success"] for name in ("begin", "approval", "approved", "one")] == [
        ["approval"],
        ["approved"],
        ["one"],
        ["two"],
    ]
    assert "success" not in found["two"]
    assert "failure" not in found["one"]
    assert "undo" not in found


def test_a_step_with_an_approval_waits_for_it_and_its_record() -> None:
    found = nodes(step("one"), step("two", approval=True))
    assert found["one"]["success"] == ["two.approval"]
    assert found["two.approval"]["success"] == ["two.approved"]
    assert found["two.approved"] == {
        "identifier": "two.approved",
        "job_template": "move / two approved",
        "success": ["two"],
    }


def test_a_failure_leads_to_the_undo_only_where_the_definition_says_so() -> None:
    undo = Undo("Take it back", Path("/project/back.yml"))
    found = nodes(step("one", undo=undo), step("two", undo=undo, on_failure="undo"))
    assert "failure" not in found["one"]
    assert found["two"]["failure"] == ["undo"]
    assert found["undo"]["job_template"] == "move / undo"


def test_a_steps_job_runs_the_runbooks_playbook_with_its_tag_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SHIPPED", HERE.parent)
    monkeypatch.setattr(generate, "ROOT", Path("/project"))
    made = awx.content(runbook(step("one", hosts="db"), step("two", hosts="db:&{{ regions[to].group }}")))
    templates = {t["name"]: t for t in made["job_templates"]}
    one = templates["move / one"]
    assert (one["playbook"], one["job_tags"], one["timeout"]) == ("playbooks/runbooks/move.yml", "one", 420)
    assert one["limit"] == "db:localhost"
    assert one["allow_simultaneous"] is False
    assert one["extra_vars"] == {"runbook_awx": {"runbook": "move", "part": "step", "step": "one"}}
    assert "limit" not in templates["move / two"]


def test_a_sliced_steps_template_says_so_to_awx_and_to_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SHIPPED", HERE.parent)
    monkeypatch.setattr(generate, "ROOT", Path("/project"))
    made = awx.content(runbook(step("one"), step("two", slices=4, hosts="db")))
    one, two = made["job_templates"][-2:]
    assert "job_slice_count" not in one
    assert two["job_slice_count"] == 4
    assert "limit" not in two
    assert two["extra_vars"]["runbook_awx"] == {"runbook": "move", "part": "step", "step": "two", "slices": 4}
    assert (two["allow_simultaneous"], two["job_tags"]) == (False, "two")


def test_more_slices_than_hosts_are_refused_before_the_first_step() -> None:
    """AWX would make fewer jobs, and they would wait for the others."""
    moved = runbook(step("one"), step("two", slices=4))
    job.enough_hosts(moved, 4, HERE)
    with pytest.raises(Refused, match="Step two of move is for 4 slices, and the inventory has 3 enabled hosts"):
        job.enough_hosts(moved, 3, HERE)


@pytest.mark.parametrize(
    ("parameter", "question"),
    [
        (
            Parameter("size", "How many", "integer", default=3, minimum=1, maximum=9),
            {"type": "integer", "min": 1, "max": 9, "default": 3, "required": False},
        ),
        (
            Parameter("share", "Which part", "number", minimum=0.5, maximum=1.5),
            {"type": "float", "min": 0, "max": 2, "required": True},
        ),
        (
            Parameter("again", "Go on", "boolean", default=False),
            {"type": "multiplechoice", "choices": ["true", "false"], "default": "false", "required": False},
        ),
        (
            Parameter("zone", "Where", "string", choices=["a", "b"]),
            {"type": "multiplechoice", "choices": ["a", "b"], "required": True},
        ),
        (
            Parameter("note", "Why", "string", pattern="[a-z]+"),
            {"type": "text", "min": 0, "max": 1024, "required": True},
        ),
        (Parameter("pin", "Pin", "string", secret=True), {"type": "password", "min": 0, "max": 1024, "required": True}),
    ],
)
def test_a_parameter_is_a_question(parameter: Parameter, question: dict[str, Any]) -> None:
    asked = awx.survey(runbook(step("one"), parameters=(parameter,)))["spec"][0]
    assert {
        k: v for k, v in asked.items() if k not in ("question_name", "question_description", "variable")
    } == question
    assert asked["variable"] == parameter.name
    assert (parameter.pattern or "") in asked["question_description"]


def test_a_parameter_that_is_observed_may_be_left_to_that() -> None:
    source = definition.DefaultFrom(Path("/project/look.yml"), "found", ())
    parameter = Parameter("to", "Where to", "string", choices="{{ regions.keys() | list }}", default_from=source)
    asked = awx.survey(runbook(step("one"), parameters=(parameter,)))["spec"][0]
    assert asked["variable"] == "to_or_observed"
    assert asked["choices"] == "{{ ['observed'] + (regions.keys() | list) }}"
    assert asked["default"] == "observed"
    moved = runbook(step("one"), parameters=(parameter,))
    assert job.answers(moved, {"to_or_observed": "observed"}) == {}
    assert job.answers(moved, {"to_or_observed": "us-west-2"}) == {"to": "us-west-2"}


@pytest.mark.parametrize(
    ("rule", "start", "words"),
    [
        (
            "FREQ=WEEKLY;BYDAY=SU;BYHOUR=2;BYMINUTE=30",
            "20260101T023000",
            "FREQ=WEEKLY;BYDAY=SU;BYHOUR=2;BYMINUTE=30;INTERVAL=1",
        ),
        ("RRULE:FREQ=DAILY;INTERVAL=2", "20260101T000000", "FREQ=DAILY;INTERVAL=2"),
    ],
)
def test_a_schedule_has_a_start_in_the_environments_time_zone(rule: str, start: str, words: str) -> None:
    made = awx.rrule(rule)
    assert made == f"DTSTART;TZID={{{{ runbook_timezone | default('UTC') }}}}:{start} RRULE:{words}"
    assert list(rrule_faults(made.replace("{{ runbook_timezone | default('UTC') }}", "America/New_York"))) == []


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("RRULE:FREQ=DAILY;INTERVAL=1", "DTSTART"),
        ("DTSTART:20260101T000000 RRULE:FREQ=DAILY;INTERVAL=1", "time zone"),
        ("DTSTART:20260101T000000Z RRULE:FREQ=DAILY", "INTERVAL"),
        ("DTSTART:20260101T000000Z RRULE:FREQ=SECONDLY;INTERVAL=1", "SECONDLY"),
        ("DTSTART:20260101T000000Z RRULE:FREQ=MONTHLY;INTERVAL=1;BYDAY=2SU", "BYDAY"),
        ("DTSTART:20260101T000000Z RRULE:FREQ=DAILY;INTERVAL=1 EXDATE:20260102T000000Z", "EXDATE"),
    ],
)
def test_what_awx_refuses_of_a_rule_is_found_before(rule: str, fault: str) -> None:
    assert fault in "; ".join(rrule_faults(rule))


@pytest.mark.parametrize("need", [0, 1, 3])
def test_as_many_people_approve_as_the_environment_wants(need: int) -> None:
    found = {node["identifier"]: node for node in approved(awx.nodes(runbook(step("one"))), need)}
    gates = [name for name in found if name.startswith("approval")]
    assert len(gates) == need
    assert found["begin"]["success"] == (gates or ["one"])
    assert all(found[gate]["success"] == ["approved"] for gate in gates)
    assert ("approved" in found) == bool(need)


def test_an_environments_content_has_its_name_credentials_and_approvals() -> None:
    made = complete(
        [awx.content(definition.load("fail-over"))],
        Own(
            "prod",
            "infra",
            "prod",
            "ours",
            credentials={"*": ["journal"], "approved": ["api"]},
            approvals={"fail-over": {"need": 2}},
            notify={"error": ["pager"]},
        ),
    )
    templates = {t["name"]: t for t in made["job_templates"]}
    assert templates["prod / fail-over / approved"]["credentials"] == ["api", "journal"]
    assert templates["prod / fail-over / fence"]["credentials"] == ["journal"]
    assert templates["prod / fail-over / fence"]["extra_vars"]["runbook_awx"]["environment"] == "prod"
    workflow = made["workflow_job_templates"][0]
    assert workflow["name"] == "prod / fail-over"
    assert workflow["notification_templates_error"] == ["pager"]
    assert [n["identifier"] for n in workflow["nodes"]][:4] == ["begin", "approval-1", "approval-2", "approved"]
    assert {n["job_template"] for n in workflow["nodes"] if "job_template" in n} <= set(templates)


def test_the_generated_content_is_up_to_date() -> None:
    expected = awx.export(
        definition.load(name) for name in definition.files() if not os.environ.get("RUNBOOK_DEFINITIONS")
    )
    assert generate.drift(expected) == [], "run: runbook awx export"


# -- the jobs


def answers(approvals: list[tuple[str, str, str]]) -> Any:
    """AWX's answers: identifier of a node, who, status."""
    listed = [{"identifier": name, "job": number} for number, (name, _, _) in enumerate(approvals, 1)]

    def get(path: str) -> Any:
        if "workflow_nodes" in path:
            return {"results": [{"identifier": "begin", "job": 99}, {"identifier": "late", "job": None}, *listed]}
        number = int(path.strip("/").rpartition("/")[2])
        _, person, status = approvals[number - 1]
        return {
            "id": number,
            "status": status,
            "finished": "2026-03-08T07:00:00Z",
            "modified": "2026-03-08T07:00:00Z",
            "summary_fields": {"approved_or_denied_by": {"username": person}} if person else {},
        }

    return get


def test_who_approved_is_read_from_the_workflows_nodes() -> None:
    get = answers(
        [
            ("approval-1", "ada", "successful"),
            ("approval-2", "bob", "successful"),
            ("two.approval", "eve", "successful"),
        ]
    )
    found = job.read("7", "approval", get)
    assert [(given.name, given.id) for given in found] == [("ada", 1), ("bob", 2)]
    assert found[0].at == 1772953200.0
    assert [given.name for given in job.read("7", "two.approval", get)] == ["eve"]


@pytest.mark.parametrize(("person", "status"), [("ada", "failed"), ("ada", "pending"), ("", "successful")])
def test_what_is_no_approval_does_not_count(person: str, status: str) -> None:
    with pytest.raises(Refused, match="knows of no approval in workflow job 7"):
        job.read("7", "approval", answers([("approval", person, status)]))


# -- what is refused before anything is touched


BASE: dict[str, Any] = {
    "organization": "o",
    "projects": [{"name": "p", "local_path": "p"}],
    "inventories": [{"name": "i"}],
    "job_templates": [{"name": "j", "project": "p", "inventory": "i", "playbook": "p.yml"}],
}


def workflow(**more: Any) -> dict[str, Any]:
    return {**BASE, "workflow_job_templates": [{"name": "w", **more}]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({**BASE, "teams": []}, "unknown part teams"),
        ({}, "names no organization"),
        (
            {**BASE, "projects": [{"name": "p", "local_path": "p", "branch": "x"}]},
            "project p has an unknown field branch",
        ),
        ({**BASE, "projects": [{"name": "p"}]}, "needs its local_path"),
        ({**BASE, "projects": [{"name": "p", "scm_type": "git"}]}, "it has no scm_url"),
        ({**BASE, "inventories": [{"name": "i"}, {"name": "i"}]}, "inventory i is there twice"),
        (
            {**BASE, "job_templates": [{"name": "j", "project": "p", "inventory": "i"}]},
            "job template j has no playbook",
        ),
        ({**BASE, "job_templates": [{"name": "j", "project": "p", "playbook": "x"}]}, "no inventory and does not ask"),
        (
            {
                **BASE,
                "job_templates": [{"name": "j", "project": "p", "inventory": "i", "playbook": "x", "timeout": "1"}],
            },
            "timeout is '1', which is no whole number",
        ),
        (workflow(nodes=[{"identifier": "a", "job_template": "j", "success": ["b"]}]), "success leads to b"),
        (workflow(nodes=[{"identifier": "a"}]), "one of job_template, workflow and approval"),
        (
            workflow(
                nodes=[
                    {"identifier": "a", "job_template": "j", "success": ["b"]},
                    {"identifier": "b", "job_template": "j", "success": ["a"]},
                ]
            ),
            "go in a circle (a -> b -> a)",
        ),
        (workflow(nodes=[{"identifier": "a", "job_template": "j", "limit": "x"}]), "gives limit, which job template j"),
        (
            workflow(survey={"spec": [{"question_name": "q", "variable": "v", "type": "choice", "required": True}]}),
            "unknown type choice",
        ),
        (
            workflow(
                survey={
                    "spec": [
                        {
                            "question_name": "q",
                            "variable": "v",
                            "type": "multiplechoice",
                            "required": True,
                            "choices": ["a"],
                            "default": "b",
                        }
                    ]
                }
            ),
            "the default 'b', which is none of its choices",
        ),
        (
            workflow(
                survey={"spec": [{"question_name": "q", "variable": "v", "type": "integer", "required": True}]},
                schedules=[{"name": "s", "rrule": "DTSTART:20260101T000000Z RRULE:FREQ=DAILY;INTERVAL=1"}],
            ),
            "it does not answer v",
        ),
        (
            {**BASE, "credential_types": [{"name": "c", "injectors": {"env": {"ANSIBLE_X": "1"}}}]},
            "begins with ANSIBLE_",
        ),
        (
            {**BASE, "credential_types": [{"name": "c", "injectors": {"env": {"X": "{{ absent }}"}}}]},
            "X is no template of its inputs",
        ),
        (
            {**BASE, "notification_templates": [{"name": "n", "notification_type": "webhook"}]},
            "notification_configuration has no url",
        ),
    ],
)
def test_content_that_awx_would_refuse_or_never_do(content: dict[str, Any], fault: str) -> None:
    with pytest.raises(ContentError) as caught:
        things(content)
    assert fault in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ContentError) as caught:
        things({**BASE, "teams": [], "projects": [{"name": "p"}], "inventories": [{"name": "i", "kind": "x"}]})
    assert len(caught.value.problems) == 3
