"""Import, read back, compare, import again: the whole content of all runbooks in one AWX."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.awx.client import AwxError
from ansible_collections.censuschat.infra.plugins.module_utils.awx.content import run
from ansible_collections.censuschat.infra.plugins.module_utils.awx.model import ContentError, things
from ansible_collections.censuschat.infra.plugins.module_utils.awx.planner import Wish

from tests import awx_api
from tests.awx.conftest import ENVIRONMENT, SECRETS, Site, content

WISH = Wish(prune=f"runbooks of {ENVIRONMENT}")


def go(site: Site, wanted: dict[str, Any], *, check: bool = False, secrets: Any = SECRETS) -> dict[str, Any]:
    return run(site.client(), things(wanted, secrets), WISH, check=check, wait_s=60)


def briefly(result: dict[str, Any]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(c["action"], c["kind"], c["name"], tuple(c["fields"])) for c in result["changes"]]


@pytest.fixture
def brought(site: Site) -> Site:
    """An AWX that has everything."""
    go(site, content(site))
    return site


def test_check_mode_says_what_the_import_does_and_a_second_import_changes_nothing(site: Site) -> None:
    planned = go(site, content(site), check=True)
    done = go(site, content(site))
    assert briefly(planned) == briefly(done)
    again = go(site, content(site))
    assert not again["changed"], again["changes"]
    assert not go(site, content(site), check=True)["changed"]


def test_drift_is_found_shown_and_taken_back(brought: Site) -> None:
    client = brought.client()

    def one(kind: str, name: str) -> dict[str, Any]:
        return next(row for row in client.list(kind, name=name))

    workflow = one("workflow_job_templates", f"{ENVIRONMENT} / drill")
    step = one("job_templates", f"{ENVIRONMENT} / fail-over / fence")
    nodes = {n["identifier"]: n for n in client.list(f"workflow_job_templates/{workflow['id']}/workflow_nodes")}
    client.request("PATCH", f"job_templates/{step['id']}", {"timeout": 1, "allow_simultaneous": True})
    client.request(
        "POST", f"job_templates/{step['id']}/labels", {"name": "other", "organization": step["organization"]}
    )
    client.request("DELETE", f"workflow_job_template_nodes/{nodes['approved']['id']}")
    client.request(
        "POST", "workflow_job_template_nodes", {"workflow_job_template": workflow["id"], "identifier": "odd"}
    )
    client.request("PATCH", f"inventories/{one('inventories', ENVIRONMENT)['id']}", {"variables": "a: 1"})
    stray = {"name": f"{ENVIRONMENT} / gone", "project": step["project"], "inventory": step["inventory"]}
    stray |= {"playbook": step["playbook"]}
    made = client.request("POST", "job_templates", stray)
    label = {"name": WISH.prune, "organization": step["organization"]}
    client.request("POST", f"job_templates/{made['id']}/labels", label)

    planned = go(brought, content(brought), check=True)
    found = {(c["action"], c["kind"], c["name"]): c for c in planned["changes"]}
    assert found["change", "job_template", f"{ENVIRONMENT} / fail-over / fence"]["fields"] == [
        "allow_simultaneous",
        "labels",
        "timeout",
    ]
    assert found["change", "inventory", ENVIRONMENT]["before"] == {"variables": {"a": 1}}
    assert ("delete", "node", f"{ENVIRONMENT} / drill / odd") in found
    assert ("create", "node", f"{ENVIRONMENT} / drill / approved") in found
    assert ("change", "node", f"{ENVIRONMENT} / drill / approval") in found
    assert ("delete", "job_template", f"{ENVIRONMENT} / gone") in found
    assert briefly(planned) == briefly(go(brought, content(brought)))
    assert not go(brought, content(brought))["changed"]


def test_the_number_of_approvals_follows_the_environment(brought: Site) -> None:
    for need in (2, 0, 1):
        go(brought, content(brought, need))
        client = brought.client()
        workflow = next(client.list("workflow_job_templates", name=f"{ENVIRONMENT} / fail-back"))
        nodes = list(client.list(f"workflow_job_templates/{workflow['id']}/workflow_nodes"))
        approvals = [n for n in nodes if n["identifier"].startswith("approval")]
        assert len(approvals) == need
        begin = next(n for n in nodes if n["identifier"] == "begin")
        assert len(begin["success_nodes"]) == max(need, 1)
        assert not go(brought, content(brought, need))["changed"]


def test_secrets_are_sent_once_never_shown_and_kept_when_they_are_not_given(brought: Site) -> None:
    client = brought.client()
    credential = next(client.list("credentials", name=f"{ENVIRONMENT} journal"))
    assert credential["inputs"]["password"] == "$encrypted$"
    wanted = content(brought)
    wanted["credentials"][0]["inputs"]["location"] = "postgresql://runbooks@other.example.org/runbooks"
    result = go(brought, wanted, secrets={})
    assert briefly(result) == [("change", "credential", f"{ENVIRONMENT} journal", ("inputs",))]
    assert next(client.list("credentials", name=f"{ENVIRONMENT} journal"))["inputs"]["password"] == "$encrypted$"
    if brought.emulated:
        rows = brought.emulated.objects["credentials"].values()
        assert "canary-of-the-journal" in [row["inputs"].get("password") for row in rows]
    again = run(brought.client(), things(content(brought), SECRETS), Wish(WISH.prune, update_secrets=True), check=True)
    assert {c["kind"] for c in again["changes"]} == {"credential", "notification_template"}
    assert "canary" not in json.dumps([result, again])


def test_a_secret_in_the_content_is_refused_before_anything_is_touched(site: Site) -> None:
    wanted = content(site)
    wanted["credentials"][0]["inputs"]["password"] = "canary"
    with pytest.raises(ContentError, match="password is a secret; give it in secrets") as caught:
        go(site, wanted, secrets={})
    assert "canary" not in str(caught.value)
    _untouched(site)


def test_what_refers_to_nothing_is_refused_before_anything_is_touched(site: Site) -> None:
    wanted = content(site)
    wanted["job_templates"][0]["credentials"] = ["absent"]
    wanted["job_templates"][1]["inventory"] = "nowhere"
    wanted["workflow_job_templates"][0]["nodes"][0]["job_template"] = "no template"
    with pytest.raises(ContentError) as caught:
        go(site, wanted)
    said = str(caught.value)
    assert "credential absent" in said
    assert "inventory nowhere" in said
    assert "job template no template" in said
    _untouched(site)


def _untouched(site: Site) -> None:
    if site.emulated:
        assert {method for method, _ in site.emulated.requests} <= {"GET"}


def test_a_wrong_token_a_wrong_address_and_no_answer_are_one_clear_sentence(site: Site) -> None:
    wanted = things(content(site), SECRETS)
    for client, said in (
        (site.client(token="wrong"), "does not take the token"),
        (site.client(), ""),
    ):
        if said:
            with pytest.raises(AwxError, match=said):
                run(client, wanted, WISH, check=True)
    elsewhere = copy.copy(site)
    elsewhere.host = site.host + "/other"
    with pytest.raises(AwxError, match="There is no AWX at"):
        run(elsewhere.client(), wanted, WISH, check=True)
    elsewhere.host = "http://127.0.0.1:9"
    with pytest.raises(AwxError, match=r"does not answer .* see whether it is up"):
        run(elsewhere.client(patience=0.5), wanted, WISH, check=True)
    with pytest.raises(AwxError, match="neither a token nor a user"):
        site.client(token="")


def _objects(site: Site) -> awx_api.Awx:
    assert site.emulated is not None
    return site.emulated


@pytest.mark.parametrize("status", [500, 403, 400])
def test_an_import_that_awx_breaks_off_says_where_and_the_next_one_completes_it(emulator: Site, status: int) -> None:
    _objects(emulator).faults = [("POST", "/job_templates/", status)]
    with pytest.raises(AwxError, match=r"job template awx-test / drill / .*: ") as caught:
        go(emulator, content(emulator))
    assert "\n" not in str(caught.value)
    left = go(emulator, content(emulator), check=True)
    assert ("create", "project", "infra") not in {(c["action"], c["kind"], c["name"]) for c in left["changes"]}
    go(emulator, content(emulator))
    assert not go(emulator, content(emulator))["changed"]


def test_a_survey_that_was_refused_is_completed_by_the_next_import(emulator: Site) -> None:
    _objects(emulator).faults = [("POST", "/survey_spec/", 400)]
    with pytest.raises(AwxError):
        go(emulator, content(emulator))
    again = go(emulator, content(emulator))
    assert any("survey" in c["fields"] for c in again["changes"])
    assert not go(emulator, content(emulator))["changed"]


def test_a_busy_awx_is_asked_again(emulator: Site) -> None:
    _objects(emulator).faults = [("GET", "/me/", 503), ("GET", "/projects/", 502)]
    assert go(emulator, content(emulator), check=True)["changed"]


def test_a_project_without_its_playbooks_is_said_before_anything_is_touched(emulator: Site) -> None:
    go(emulator, content(emulator))
    _objects(emulator).playbooks["censuschat"] = ["playbooks/site.yml"]
    _objects(emulator).requests.clear()
    with pytest.raises(ContentError, match=r"project infra has no playbook .* and \d+ more"):
        go(emulator, content(emulator))
    _untouched(emulator)
