"""A hardened node: what runs there, asked of the kernel, of sshd and of the files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from testinfra.host import Host


def test_check_mode_on_the_bare_node_was_the_apply(host: Host) -> None:
    results = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "controls"
    node = host.backend.get_hostname()
    planned, applied = (json.loads((results / f"{node}.{run}.json").read_text()) for run in ("planned", "applied"))
    assert planned == applied
    assert "changed" in applied.values()


@pytest.mark.parametrize(
    "line", ["permitrootlogin no", "passwordauthentication no", "permitemptypasswords no", "permituserenvironment no"]
)
def test_sshd_would_run_with(host: Host, line: str) -> None:
    assert line in host.check_output("sshd -T").splitlines()


def test_sshd_runs_with_its_files_of_now(host: Host) -> None:
    """A daemon that started before its configuration was written is what a dropped handler leaves behind."""
    started = 'date -d "$(systemctl show -P StateChangeTimestamp ssh.service)" +%s'
    written = "stat -c %Y /etc/ssh/sshd_config /etc/ssh/sshd_config.d/*.conf | sort -n | tail -n 1"
    reloaded = "journalctl -u ssh.service -o short-unix -g 'Received SIGHUP' | tail -n 1 | cut -d. -f1"
    latest = max(int(host.check_output(started)), int(host.run(reloaded).stdout.strip() or 0))
    assert latest >= int(host.check_output(written))


def test_no_change_of_sshd_waits_for_its_proof(host: Host) -> None:
    assert not host.file("/var/lib/censuschat-sshd/pending").exists
    assert host.check_output("systemctl list-timers --all --no-legend 'censuschat-sshd*'") == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("net.ipv4.conf.all.accept_redirects", 0),
        ("net.ipv4.conf.default.accept_source_route", 0),
        ("net.ipv4.conf.eth0.send_redirects", 0),
        ("net.ipv4.tcp_syncookies", 1),
    ],
)
def test_the_kernel_has(host: Host, name: str, value: int) -> None:
    assert host.sysctl(name) == value


@pytest.mark.parametrize(("path", "mode"), [("/etc/shadow", 0o640), ("/etc/passwd", 0o644), ("/etc/cron.d", 0o700)])
def test_nobody_else_gets_at(host: Host, path: str, mode: int) -> None:
    file = host.file(path)
    assert file.user == "root"
    assert file.mode & ~mode == 0


def test_passwords_age(host: Host) -> None:
    found = host.check_output("sed -n 's/^PASS_MAX_DAYS[[:space:]]*//p' /etc/login.defs")
    assert int(found) <= 365


def test_no_unit_has_failed(host: Host) -> None:
    assert host.check_output("systemctl list-units --failed --no-legend --plain") == ""
