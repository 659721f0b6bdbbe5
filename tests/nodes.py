"""Commands on this machine, and scripts on the lab's nodes past their sshd: what the tests on the lab do by hand."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence

from lab.paths import PREFIX, REPO

GUARD_DROPIN = "/run/systemd/system/censuschat-guard.service.d"
LIBFAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


def call(
    *command: str, check: bool = True, text: str | None = None, timeout: float | None = 600
) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, with ``text`` as its input; fails with all it said. timeout: seconds."""
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, input=text, timeout=timeout)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def entered(node: str, *command: str, user: str = "root") -> tuple[str, ...]:
    """The command that runs another one on a node, with its input, also when its region is cut off."""
    return ("podman", "exec", "-i", "-u", user, f"{PREFIX}{node}", *command)


def run_on(
    node: str, *command: str, user: str = "root", check: bool = True, text: str = "", timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run a command on a node. timeout: seconds."""
    return call(*entered(node, *command, user=user), check=check, text=text, timeout=timeout)


def on(node: str, script: str, *, user: str = "root", check: bool = True, text: str = "", timeout: float = 180) -> str:
    """Run a shell script on a node; what it printed. timeout: seconds."""
    return run_on(node, "sh", "-c", script, user=user, check=check, text=text, timeout=timeout).stdout


def faked_clock(path: str) -> tuple[str, ...]:
    """Settings of a unit whose wall clock is what the file says (libfaketime); its monotonic clock stays true."""
    return (
        f"Environment=LD_PRELOAD={LIBFAKETIME} FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_NO_CACHE=1",
        f"Environment=FAKETIME_TIMESTAMP_FILE={path}",
    )


@contextlib.contextmanager
def guard_settings(nodes: Sequence[str], *lines: str) -> Iterator[None]:
    """The write guards of these nodes run with these settings of their unit, and as before afterwards."""
    restart = "systemctl daemon-reload && systemctl restart censuschat-guard.service"
    settings = "\n".join(("[Service]", *lines)) + "\n"
    try:
        for node in nodes:
            on(node, f"mkdir -p {GUARD_DROPIN} && cat > {GUARD_DROPIN}/test.conf && {restart}", text=settings)
        yield
    finally:
        for node in nodes:
            on(node, f"rm -rf {GUARD_DROPIN}; {restart}")


def signal_guards(nodes: Sequence[str], name: str) -> float:
    """Send all guards a signal, all within a moment; when the first got it (CLOCK_MONOTONIC seconds)."""
    began = time.monotonic()
    running = [
        subprocess.Popen(entered(node, "systemctl", "kill", f"-s{name}", "censuschat-guard.service")) for node in nodes
    ]
    assert [process.wait(30) for process in running] == [0] * len(running)
    return began
