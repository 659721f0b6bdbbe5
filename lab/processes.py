"""The processes that serve the lab from the machine: package cache, AWS, names. Started once, ended by `lab down`."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab.background import Background
from lab.paths import STATE


class ProcessError(RuntimeError):
    """A process did not come to serve; the message says which, and where its output is."""


@dataclass(frozen=True)
class Service:
    """A program that serves in the foreground until SIGTERM; ready once it accepts TCP at `address`."""

    name: str
    command: tuple[str, ...]
    address: tuple[str, int]
    env: Mapping[str, str] = field(default_factory=dict)


def plan(wanted: Iterable[Service], alive: Iterable[str]) -> list[Service]:
    """The services to start: those that are not alive."""
    running = set(alive)
    return [service for service in wanted if service.name not in running]


def observe(state: Path = STATE) -> dict[str, int]:
    """The pids of the lab's living background processes, by name (clients included)."""
    found = {}
    for file in sorted((state / "pids").glob("*.json")):
        pid = Background(file.stem, state).pid()
        if pid is not None:
            found[file.stem] = pid
    return found


def start_all(services: Iterable[Service], state: Path = STATE, patience: float = 20.0) -> None:
    """Starts services and waits until all accept; raises ProcessError after `patience` seconds or when one ended."""
    starting = list(services)
    for service in starting:
        Background(service.name, state).start(service.command, env=service.env)
    for service in starting:
        wait(service, state, patience)


def wait(service: Service, state: Path, patience: float) -> None:
    """Waits until a started service accepts; raises ProcessError."""
    process = Background(service.name, state)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.pid() is None:
            raise ProcessError(f"{service.name} ended at once: {process.tail(3)}; its output is in {process.log_file}")
        with contextlib.suppress(OSError), socket.create_connection(service.address, timeout=1):
            return
        time.sleep(0.1)
    where = f"{service.address[0]}:{service.address[1]}"
    raise ProcessError(f"{service.name} does not accept at {where} after {patience:.0f} s; see {process.log_file}")


def stop_all(state: Path = STATE) -> list[str]:
    """Ends every background process of the lab that is alive; returns their names."""
    return [file.stem for file in sorted((state / "pids").glob("*.json")) if Background(file.stem, state).stop()]
