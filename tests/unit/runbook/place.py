"""A place of its own for one test of the engine: real processes, real playbooks on this machine, no lab."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ansible.utils.display  # noqa: F401 - looks at the real output streams, so it is loaded before they are replaced

from runbooks.cli import main

ROOT = Path(__file__).resolve().parents[3]
INVENTORY = ROOT / "tests/unit/runbook/inventory.yml"


@dataclass
class Place:
    """A place of its own for one test: state, effects, environment."""

    directory: Path
    environment: dict[str, str]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """In this process, which has Ansible loaded already; what it starts are real processes."""
        out, err = io.StringIO(), io.StringIO()
        with (
            unittest.mock.patch.dict(os.environ, self.environment, clear=True),
            unittest.mock.patch("sys.stdin", io.StringIO()),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main(words)
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def process(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As a person does it."""
        return subprocess.run(
            [sys.executable, "-m", "runbooks", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=240,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return self.begin(sys.executable, "-m", "runbooks", "run", "paint", "-i", str(INVENTORY), "--yes", *words)

    def begin(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start a program in the checkout, with the place's environment and these variables."""
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *words: str, runbook: str = "paint") -> subprocess.CompletedProcess[str]:
        return self.command("run", runbook, "-i", str(INVENTORY), "--yes", *words)

    def wait_for(self, path: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.directory / path).exists():
            assert time.monotonic() < deadline, f"{path} did not come"
            time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def effects(self) -> list[str]:
        return (self.directory / "effects").read_text().split()

    def everything(self) -> bytes:
        """All that was kept on disk."""
        return b"".join(p.read_bytes() for p in self.directory.rglob("*") if p.is_file())


def make_place(directory: Path) -> Place:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RUNBOOK_DEFINITIONS": str(ROOT / "tests/unit/runbook/definitions"),
        "RUNBOOK_TEST_PLACE": str(directory),
        "XDG_STATE_HOME": str(directory / "state"),
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    }
    return Place(directory, environment)
