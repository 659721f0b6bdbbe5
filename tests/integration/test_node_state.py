"""node_state on a lab node: a package with its service, restarts that cannot be lost, refusals, a busy dpkg."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.topology import Topology
from tests.integration.trial import Play, play, playbook_of, shell

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


def job(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "censuschat.infra.node_state": state}


def run(tmp_path: Path, state: dict[str, Any], *options: str) -> Play:
    return play(playbook_of(tmp_path, [job("State", state)]), *options)


def task(tmp_path: Path, state: dict[str, Any], *options: str) -> dict[str, Any]:
    """Run node_state with `state` on the node; returns its result."""
    return run(tmp_path, state, *options).result("State")


def actions(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(a["kind"], a["target"]) for a in result["actions"]]


def clean(tmp_path: Path) -> None:
    remove = {"absent": [UNIT, "/etc/censuschat-trial", "/etc/sudoers.d/zz-trial"]}
    play(playbook_of(tmp_path, [job("Stop", GONE), job("Remove", remove)]))
    shell("userdel trial 2>/dev/null; groupdel trial 2>/dev/null; dpkg --purge cron 2>/dev/null; true")


@pytest.fixture(scope="module", autouse=True)
def left_clean(running_lab: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    clean(tmp_path_factory.mktemp("clean"))


@pytest.fixture(name="bare")
def bare_node(tmp_path: Path) -> Path:
    clean(tmp_path)
    return tmp_path


def test_bare_node_to_converged_and_drift_back(bare: Path) -> None:
    check = run(bare, STATE, "--check", "--diff")
    planned = check.result("State")
    assert planned["changed"] is True, check.text
    assert shell(f"ls -d /etc/censuschat-trial {UNIT} 2>/dev/null; getent passwd trial; true") == ""
    applied = run(bare, STATE, "--diff")
    assert actions(applied.result("State")) == actions(planned)
    assert "hunter2" not in check.text + applied.text
    assert "hunter2" not in shell("journalctl --since -5min")
    facts = "systemctl is-active censuschat-trial; systemctl is-enabled censuschat-trial; "
    facts += f"stat -c '%U %G %a' /etc/censuschat-trial {CONF}; readlink /etc/censuschat-trial/current; id -Gn trial"
    assert shell(facts).splitlines() == [
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
    pid = shell(f"touch {CONF}; systemctl show -P MainPID censuschat-trial")
    again = task(bare, STATE)
    assert actions(again) == [("service", "censuschat-trial.service")]
    assert again["actions"][0]["detail"].startswith("restart:")
    assert shell("systemctl show -P MainPID censuschat-trial") != pid
    assert task(bare, STATE)["actions"] == []

    # A reload leaves the process, and is not repeated.
    pid = shell("touch /etc/censuschat-trial/password; systemctl show -P MainPID censuschat-trial")
    assert task(bare, STATE)["actions"][0]["detail"].startswith("reload:")
    assert shell("systemctl show -P MainPID censuschat-trial") == pid
    assert task(bare, STATE)["actions"] == []


def test_package_does_not_start_its_daemon_and_the_state_does(bare: Path) -> None:
    # A run that was killed during its installation left the policy that keeps daemons from starting.
    policy = "#!/bin/sh\\n# censuschat.infra.node_state, for the time of an installation\\n"
    policy += 'case " $* " in *" start "*) exit 101;; esac\\nexit 0\\n'
    shell(f"printf '{policy}' > /usr/sbin/policy-rc.d")
    assert [a["detail"] for a in task(bare, {})["actions"]] == ["left by an interrupted run"]
    wanted: dict[str, Any] = {"packages": {"present": ["cron"]}}
    running = {**wanted, "services": [{"name": "cron.service", "enabled": True, "state": "started"}]}
    planned = task(bare, running, "--check")
    assert [a["kind"] for a in planned["actions"]] == ["package", "service", "service"]
    assert task(bare, wanted)["changed"] is True
    assert shell("systemctl is-active cron; ls /usr/sbin/policy-rc.d 2>/dev/null; true") == "inactive"
    assert [a["detail"] for a in task(bare, running)["actions"]] == ["start: is inactive"]
    assert task(bare, running)["actions"] == []
    assert actions(task(bare, GONE)) == [("package", "cron")]
    assert shell("systemctl is-active cron || true") == "inactive"


def test_busy_dpkg_is_waited_for(bare: Path) -> None:
    hold = "python3 -c \"import fcntl,time; f=open('/var/lib/dpkg/lock-frontend','w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); time.sleep(8)\""
    holder = threading.Thread(target=shell, args=(hold,))
    holder.start()
    time.sleep(1)
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
    assert shell("cat /etc/sudoers.d/zz-trial; ls -A /etc/sudoers.d | grep -c trial") == "Defaults use_pty\n1"


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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unit": ({"services": [{"name": "ghost.service", "state": "started"}]}, "unit ghost.service does not exist"),
    "package": (
        {"packages": {"present": ["no-such-package-at-all"]}},
        "Unable to locate package no-such-package-at-all",
    ),
    "directory": ({"files": [{"path": "/etc/none/x", "content": "x"}]}, "/etc/none does not exist"),
    "owner": ({"files": [{"path": "/etc/x", "content": "x", "owner": "ghost"}]}, "user ghost does not exist"),
    "removal": ({"absent": ["/etc"]}, "a top-level directory is never removed"),
}


def test_state_that_cannot_be_is_one_clear_failure(tmp_path: Path) -> None:
    outcome = play(playbook_of(tmp_path, [job(name, state) for name, (state, _sentence) in REFUSED.items()]))
    for name, (_state, sentence) in REFUSED.items():
        result = outcome.result(name)
        assert result["failed"] is True, name
        assert sentence in result["msg"], name
