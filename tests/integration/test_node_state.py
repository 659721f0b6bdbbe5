"""node_state on a lab node: a package with its service, restarts that cannot be lost, refusals, a busy dpkg."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = os.environ.get("CENSUSCHAT_INVENTORY", "inventories/lab")
NODE = "witness1"
BIN = Path(sys.executable).parent
UNIT = "/etc/systemd/system/censuschat-trial.service"
CONF = "/etc/censuschat-trial/trial.conf"

STATE: dict[str, Any] = {
    "groups": [{"name": "trial", "system": True}],
    "users": [{"name": "trial", "system": True, "groups": ["trial"], "shell": "/usr/sbin/nologin"}],
    "directories": [{"path": "/etc/censuschat-trial", "group": "trial", "mode": "0750"}],
    "files": [
        {"path": CONF, "content": "one\n", "group": "trial", "mode": "0640"},
        {"path": "/etc/censuschat-trial/password", "content": "hunter2hunter2\n", "mode": "0600", "secret": True},
        {
            "path": UNIT,
            "content": "[Service]\nUser=trial\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
            "[Install]\nWantedBy=multi-user.target\n",
        },
    ],
    "links": [{"path": "/etc/censuschat-trial/current", "target": "trial.conf"}],
    "services": [
        {
            "name": "censuschat-trial.service",
            "enabled": True,
            "state": "started",
            "restart_on": [CONF],
            "reload_on": ["/etc/censuschat-trial/password"],
        }
    ],
}
GONE: dict[str, Any] = {
    "packages": {"absent": ["cron"]},
    "services": [{"name": "censuschat-trial.service", "enabled": False, "state": "stopped"}],
}


def task(tmp_path: Path, state: dict[str, Any], *options: str) -> dict[str, Any]:
    """Run node_state with `state` on the node; returns the task's result."""
    path = tmp_path / "state.yml"
    job = {"name": "State", "become": True, "censuschat.infra.node_state": state}
    path.write_text(yaml.safe_dump([{"hosts": NODE, "gather_facts": False, "tasks": [job]}]))
    done = subprocess.run(
        [str(BIN / "ansible-playbook"), "-i", INVENTORY, str(path), *options],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    data = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
    found: dict[str, Any] = data["plays"][0]["tasks"][0]["hosts"][NODE]
    found["everything"] = done.stdout + done.stderr
    return found


def shell(tmp_path: Path, script: str) -> str:
    """Run a shell script as root on the node."""
    path = tmp_path / "shell.yml"
    job = {"name": "Shell", "become": True, "ansible.builtin.shell": {"cmd": script}}
    path.write_text(yaml.safe_dump([{"hosts": NODE, "gather_facts": False, "tasks": [job]}]))
    done = subprocess.run(
        [str(BIN / "ansible-playbook"), "-i", INVENTORY, str(path)],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    data = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
    result = data["plays"][0]["tasks"][0]["hosts"][NODE]
    assert not result.get("failed") and not result.get("unreachable"), result
    return str(result["stdout"])


def actions(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(a["kind"], a["target"]) for a in result["actions"]]


def clean(tmp_path: Path) -> None:
    task(tmp_path, GONE)
    task(tmp_path, {"absent": [UNIT, "/etc/censuschat-trial", "/etc/cron.d/censuschat-trial"]})
    shell(tmp_path, "userdel trial 2>/dev/null; groupdel trial 2>/dev/null; dpkg --purge cron 2>/dev/null; true")


@pytest.fixture(name="bare")
def bare_node(tmp_path: Path) -> Iterator[Path]:
    clean(tmp_path)
    yield tmp_path
    clean(tmp_path)


def test_bare_node_to_converged_and_drift_back(bare: Path) -> None:
    planned = task(bare, STATE, "--check", "--diff")
    assert planned["changed"] is True, planned
    assert shell(bare, f"ls -d /etc/censuschat-trial {UNIT} 2>/dev/null; getent passwd trial; true") == ""
    applied = task(bare, STATE, "--diff")
    assert actions(applied) == actions(planned)
    assert "hunter2" not in planned["everything"] + applied["everything"]
    assert "hunter2" not in shell(bare, "journalctl --since -5min")
    facts = "systemctl is-active censuschat-trial; systemctl is-enabled censuschat-trial; "
    facts += f"stat -c '%U %G %a' /etc/censuschat-trial {CONF}; readlink /etc/censuschat-trial/current; id -Gn trial"
    assert shell(bare, facts).splitlines() == [
        "active",
        "enabled",
        "root trial 750",
        "root trial 640",
        "trial.conf",
        "trial",
    ]
    assert task(bare, STATE)["actions"] == []
    assert task(bare, STATE, "--check")["changed"] is False

    # A run that wrote the file and died before the restart: the next one still restarts.
    pid = shell(bare, f"touch {CONF}; systemctl show -P MainPID censuschat-trial")
    again = task(bare, STATE)
    assert actions(again) == [("service", "censuschat-trial.service")]
    assert again["actions"][0]["detail"].startswith("restart:")
    assert shell(bare, "systemctl show -P MainPID censuschat-trial") != pid
    assert task(bare, STATE)["actions"] == []

    # A reload leaves the process, and is not repeated.
    pid = shell(bare, "touch /etc/censuschat-trial/password; systemctl show -P MainPID censuschat-trial")
    assert task(bare, STATE)["actions"][0]["detail"].startswith("reload:")
    assert shell(bare, "systemctl show -P MainPID censuschat-trial") == pid
    assert task(bare, STATE)["actions"] == []


def test_package_does_not_start_its_daemon_and_the_state_does(bare: Path) -> None:
    wanted: dict[str, Any] = {"packages": {"present": ["cron"]}}
    running = {**wanted, "services": [{"name": "cron.service", "enabled": True, "state": "started"}]}
    planned = task(bare, running, "--check")
    assert [a["kind"] for a in planned["actions"]] == ["package", "service", "service"]
    assert task(bare, wanted)["changed"] is True
    assert shell(bare, "systemctl is-active cron; ls /usr/sbin/policy-rc.d 2>/dev/null; true") == "inactive"
    assert [a["detail"] for a in task(bare, running)["actions"]] == ["start: is inactive"]
    assert task(bare, running)["actions"] == []
    assert actions(task(bare, GONE)) == [("package", "cron")]
    assert shell(bare, "systemctl is-active cron || true") == "inactive"


def test_busy_dpkg_is_waited_for(bare: Path) -> None:
    hold = "python3 -c \"import fcntl,time; f=open('/var/lib/dpkg/lock-frontend','w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); time.sleep(12)\""
    holder = threading.Thread(target=shell, args=(bare / "holder", hold))
    (bare / "holder").mkdir()
    holder.start()
    time.sleep(4)
    result = task(bare, {"packages": {"present": ["cron"]}})
    holder.join()
    assert actions(result) == [("package", "cron")], result


def test_content_that_does_not_validate_is_not_written(bare: Path) -> None:
    good = {
        "path": "/etc/sudoers.d/zz-trial",
        "content": "Defaults use_pty\n",
        "mode": "0440",
        "validate": "visudo -cf %s",
    }
    assert task(bare, {"files": [good]})["changed"] is True
    result = task(bare, {"files": [{**good, "content": "Defaults what is this\n"}]})
    assert result["failed"] is True
    assert "/etc/sudoers.d/zz-trial was not replaced: its new content does not pass `visudo -cf %s`" in result["msg"]
    assert shell(bare, "cat /etc/sudoers.d/zz-trial; ls -A /etc/sudoers.d | grep -c trial") == "Defaults use_pty\n1"
    assert task(bare, {"absent": ["/etc/sudoers.d/zz-trial"]})["changed"] is True


def test_service_that_dies_is_a_failure_with_its_own_words(bare: Path) -> None:
    unit = "[Service]\nType=notify\nExecStart=/bin/sh -c 'echo the disk is gone; exit 3'\n"
    broken = {
        "files": [{"path": UNIT, "content": unit}],
        "services": [{"name": "censuschat-trial.service", "state": "started"}],
    }
    result = task(bare, broken)
    assert result["failed"] is True
    assert "systemctl start censuschat-trial.service failed" in result["msg"]
    assert "the disk is gone" in result["msg"]
    assert actions(result) == [("file", UNIT), ("systemd", "daemon-reload")]


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"services": [{"name": "ghost.service", "state": "started"}]}, "unit ghost.service does not exist"),
        ({"packages": {"present": ["no-such-package-at-all"]}}, "Unable to locate package no-such-package-at-all"),
        ({"files": [{"path": "/etc/none/x", "content": "x"}]}, "/etc/none does not exist; list it under directories"),
        ({"files": [{"path": "/etc/x", "content": "x", "owner": "ghost"}]}, "user ghost does not exist"),
        ({"absent": ["/etc"]}, "a top-level directory is never removed"),
    ],
)
def test_state_that_cannot_be_is_one_clear_failure(bare: Path, state: dict[str, Any], sentence: str) -> None:
    result = task(bare, state)
    assert result["failed"] is True
    assert sentence in result["msg"]
