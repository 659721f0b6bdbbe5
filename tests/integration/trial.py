"""What the trials of the node modules share: playbooks on one node, and a way in that does not depend on sshd."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lab import verbs
from lab.paths import REPO, STATE
from tests.nodes import call, on

#: The witness is the one node that no other test cuts off from the operator.
NODE = "witness1"
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}


class Play:
    """The outcome of one ansible-playbook run."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.text = done.stdout + done.stderr
        self.data: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]

    @property
    def changed(self) -> int:
        return int(self.data["stats"][NODE]["changed"])

    def result(self, name: str) -> dict[str, Any]:
        """The result of the task whose name ends with `name`."""
        for play_data in self.data["plays"]:
            for task in play_data["tasks"]:
                if task["task"]["name"].endswith(name) and NODE in task["hosts"]:
                    found: dict[str, Any] = task["hosts"][NODE]
                    return found
        raise AssertionError(f"no task {name} ran on {NODE}: {self.text[-2000:]}")

    def controls(self) -> dict[str, str]:
        """Control id to result."""
        report = self.result("Hold the node to its hardening profile")
        return {control["id"]: control["result"] for control in report["controls"]}


def command(playbook: Path, *options: str) -> list[str]:
    return [str(BIN / "ansible-playbook"), "-i", str(verbs.current()[0]), "-l", NODE, str(playbook), *options]


def play(playbook: Path, *options: str) -> Play:
    """Run a playbook on the node."""
    return Play(
        subprocess.run(
            command(playbook, *options),
            cwd=REPO,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    )


def playbook_of(directory: Path, tasks: list[dict[str, Any]]) -> Path:
    """A playbook that runs each of `tasks` as root, whatever became of the others."""
    blocks = [{"block": [task], "rescue": [{"ansible.builtin.meta": "noop"}]} for task in tasks]
    path = directory / "trial.yml"
    path.write_text(yaml.safe_dump([{"hosts": NODE, "gather_facts": False, "become": True, "tasks": blocks}]))
    return path


def shell(script: str) -> str:
    """Run a shell script as root on the node, past sshd."""
    return on(NODE, script).rstrip("\n")


def fresh_login(script: str = "true") -> str:
    """Run a shell script as root over an ssh connection that shares nothing with any other."""
    options = [f"UserKnownHostsFile={STATE}/ssh/known_hosts", "GlobalKnownHostsFile=/dev/null", "IdentitiesOnly=yes"]
    options += ["ControlPath=none", "BatchMode=yes", "ConnectTimeout=5", "LogLevel=ERROR"]
    flags = [flag for option in options for flag in ("-o", option)]
    key = f"{STATE}/ssh/id_ed25519"
    return call(
        "ssh", *flags, "-i", key, f"ops@{node_address()}", "sudo", "sh", text=script, timeout=120
    ).stdout.rstrip("\n")


@functools.cache
def node_address() -> str:
    """The address under which the lab's inventory reaches the node."""
    return str(verbs.current()[1].node(NODE).address)
