"""The AWX of these tests: the real one of CONTROLLER_HOST and CONTROLLER_OAUTH_TOKEN, otherwise the emulator."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.awx.client import Client
from ansible_collections.censuschat.infra.plugins.plugin_utils.awx_runbooks import Own, complete
from jinja2 import Environment
from jinja2.nativetypes import NativeEnvironment

from runbooks import awx, definition
from tests import awx_api

REGIONS = ["us-east-1", "us-west-2"]
ENVIRONMENT = "awx-test"


@dataclass
class Site:
    """One AWX. emulated: its objects, when it is the emulator. project: as the content has it."""

    host: str
    token: str
    project: dict[str, Any]
    emulated: awx_api.Awx | None

    def client(self, **options: Any) -> Client:
        return Client(self.host, **{"token": self.token, "patience": 5.0, **options})


def _real() -> Site | None:
    host, token = os.environ.get("CONTROLLER_HOST"), os.environ.get("CONTROLLER_OAUTH_TOKEN")
    if not host or not token:
        return None
    # A checkout of this repository that the AWX can get at: a directory below its projects, or a git repository.
    project = json.loads(os.environ.get("AWX_PROJECT", '{"local_path": "censuschat"}'))
    return Site(host, token, {"name": "infra", **project}, None)


def pytest_report_header() -> str:
    real = _real()
    if real:
        return f"AWX: the real one at {real.host} (organization CensusChat test)"
    return "AWX: emulated (awx_api.py); set CONTROLLER_HOST, CONTROLLER_OAUTH_TOKEN and AWX_PROJECT for a real one"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(pytest_report_header())


@pytest.fixture
def emulator() -> Iterator[Site]:
    """The emulated AWX, whatever there is: for faults that a real one does not have on call."""
    root = Path(awx.__file__).resolve().parents[2]
    books = (*root.glob("playbooks/**/*.yml"), *root.glob("runbooks/awx/jobs/*.yml"))
    emulated = awx_api.Awx({"censuschat": [str(book.relative_to(root)) for book in books]})
    with awx_api.serving(emulated) as host:
        yield Site(host, awx_api.TOKEN, {"name": "infra", "local_path": "censuschat"}, emulated)


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Site:
    """The AWX of the tests."""
    real = _real()
    return real if real is not None else request.getfixturevalue("emulator")


INVENTORY = {
    "environment_name": ENVIRONMENT,
    "regions": {region: {} for region in REGIONS},
    "region_primary": REGIONS[0],
    "region_secondary": REGIONS[1],
    "runbook_timezone": "America/New_York",
}


def _filled(value: Any) -> Any:
    """The generated content's templates, as the inventory fills them in."""
    if isinstance(value, dict):
        return {k: _filled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v) for v in value]
    if not isinstance(value, str) or "{{" not in value:
        return value
    whole = value.startswith("{{") and value.endswith("}}")
    templates = NativeEnvironment() if whole else Environment()
    return templates.from_string(value).render(INVENTORY)


def content(site: Site, need: int = 1) -> dict[str, Any]:
    """All shipped runbooks in the environment, each plan approved by so many people."""
    runbooks = [_filled(awx.content(definition.load(name))) for name in definition.files()]
    own = Own(
        environment=ENVIRONMENT,
        project="infra",
        inventory=ENVIRONMENT,
        label=f"runbooks of {ENVIRONMENT}",
        execution_environment=f"{ENVIRONMENT} runbooks",
        credentials={"*": [f"{ENVIRONMENT} journal"], "approved": [f"{ENVIRONMENT} api"]},
        instance_groups=("default",),
        forks=20,
        approvals={"*": {"need": need}},
        notify={"error": [f"{ENVIRONMENT} hook"], "approvals": [f"{ENVIRONMENT} hook"]},
    )
    secret = {"id": "password", "label": "Password", "type": "string", "secret": True}
    return {
        "organization": {"name": "CensusChat test", "description": "Made by tests/awx"},
        "credential_types": [
            {
                "name": f"{ENVIRONMENT} journal",
                "inputs": {"fields": [{"id": "location", "label": "Location", "type": "string"}, secret]},
                "injectors": {"env": {"RUNBOOK_JOURNAL": "{{ location }}", "PGPASSWORD": "{{ password }}"}},
            }
        ],
        "credentials": [
            {
                "name": f"{ENVIRONMENT} journal",
                "credential_type": f"{ENVIRONMENT} journal",
                "inputs": {"location": "postgresql://runbooks@journal.example.org/runbooks"},
            },
            {
                "name": f"{ENVIRONMENT} api",
                "credential_type": "Red Hat Ansible Automation Platform",
                "inputs": {"host": site.host},
            },
        ],
        "execution_environments": [
            {"name": f"{ENVIRONMENT} runbooks", "image": "localhost/runbooks:1", "pull": "missing"}
        ],
        "projects": [site.project],
        "inventories": [
            {
                "name": ENVIRONMENT,
                "variables": INVENTORY,
                "hosts": [{"name": "node1", "variables": {"zone": "a"}}, {"name": "node2"}],
                "groups": [
                    {"name": "db", "hosts": ["node1"]},
                    {"name": "nodes", "hosts": ["node2"], "children": ["db"]},
                ],
            }
        ],
        "notification_templates": [
            {
                "name": f"{ENVIRONMENT} hook",
                "notification_type": "webhook",
                "notification_configuration": {"url": "http://127.0.0.1:9/", "headers": {}, "username": "awx"},
                "messages": {"error": {"message": "{{ job.name }} failed"}},
            }
        ],
        **complete(runbooks, own),
    }


SECRETS = {
    "credentials": {
        f"{ENVIRONMENT} journal": {"password": "canary-of-the-journal"},
        f"{ENVIRONMENT} api": {"oauth_token": "canary-of-the-api"},
    },
    "notification_templates": {f"{ENVIRONMENT} hook": {"password": "canary-of-the-hook"}},
}
