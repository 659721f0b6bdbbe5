"""The platform role run on a LocalCluster, as tests need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lab.paths import REPO
from tests.local_cluster import LocalCluster

CRDS = REPO / "tests/integration/platform/crds.yml"


class Platform:
    """A cluster, and the role run on it with a site's variables."""

    def __init__(self, cluster: LocalCluster, site: dict[str, Any]) -> None:
        self.cluster, self.site = cluster, site

    def run(self, *options: str, **more: Any) -> tuple[int, str, dict[str, Any]]:
        """Exit code, all that was printed, and the result of the call that applies (empty when it was not reached)."""
        values = {"kubernetes_platform_kubeconfig": str(self.cluster.kubeconfig), **self.site, **more}
        role = {"name": "censuschat.infra.kubernetes_platform"}
        tasks = [{"name": "Have the platform", "ansible.builtin.include_role": role}]
        python = {"ansible_python_interpreter": sys.executable}
        plays = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": python, "tasks": tasks}]
        playbook = self.cluster.directory / "platform-playbook.yml"
        playbook.write_text(yaml.safe_dump(plays))
        variables = self.cluster.directory / "platform-variables.yml"
        variables.write_text(yaml.safe_dump(values))
        program = str(Path(sys.executable).parent / "ansible-playbook")
        done = subprocess.run(
            [program, "-i", "localhost,", str(playbook), "-e", f"@{variables}", *options],
            cwd=REPO,
            env={**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"},
            capture_output=True,
            text=True,
            timeout=180,
        )
        text = done.stdout + done.stderr
        data = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
        for task in data["plays"][0]["tasks"]:
            if task["task"]["name"].endswith("Apply the platform's objects"):
                return done.returncode, text, task["hosts"]["localhost"]
        return done.returncode, text, {}

    def apply(self, **more: Any) -> dict[str, Any]:
        """The result of a run that must succeed."""
        code, text, result = self.run(**more)
        assert code == 0, text[-4000:]
        return result

    def get(self, *what: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", *what, "-o", "json"))
        return found
