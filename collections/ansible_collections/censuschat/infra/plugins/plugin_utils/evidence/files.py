# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The directory of an environment's evidence: observed, planned with `report`, written whole or not at all.

DIRECTORY/report.json is the state and is written last; index.html and hardening.prom follow from it. DIRECTORY/history/
has the report of each state that was found, by the time of its run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.upkeep.common import UpkeepError, alone, write_whole
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence import documents
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence.report import EvidenceError, unix, whole

STATE, PAGE, METRICS, HISTORY, LOCK = "report.json", "index.html", "hardening.prom", "history", ".lock"
FOREIGN_S = 86400.0
"""Seconds after which a run that another machine began is taken to be over; the longest take hours."""
WAIT_S = 60.0
"""Seconds to wait for another run that writes; that takes well under one."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Texts to write by name, in this order, with their modes, and names to remove."""

    write: Mapping[str, str]
    remove: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)


def default_directory(environment: str, variables: Mapping[str, str]) -> str:
    """Where the evidence of an environment is kept when nobody says: in the user's state directory."""
    home = variables.get("XDG_STATE_HOME") or os.path.join(
        variables.get("HOME") or os.path.expanduser("~"), ".local/state"
    )
    return os.path.join(home, "censuschat-infra", environment, "hardening")


def read(directory: str) -> dict[str, Any] | None:
    """The report that is there, None when there is none. EvidenceError when it cannot be read."""
    path = os.path.join(directory, STATE)
    try:
        with open(path, encoding="utf-8") as handle:
            loaded = json.load(handle)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EvidenceError(f"{path} cannot be read: {error}. {_put_away(directory)}") from error
    if not whole(loaded):
        raise EvidenceError(f"{path} is no report. {_put_away(directory)}")
    report: dict[str, Any] = loaded
    return report


def _put_away(directory: str) -> str:
    return f"Put it away (mv {directory} {directory}.old) and run again: the history begins anew"


def kept(directory: str) -> tuple[str, ...]:
    """The names of the history's files that are there."""
    try:
        return tuple(sorted(name for name in os.listdir(os.path.join(directory, HISTORY)) if name.endswith(".json")))
    except (FileNotFoundError, NotADirectoryError):
        return ()


def plan(report: Mapping[str, Any], there: Collection[str], keep: int, *, entry: bool, copy: str = "") -> Plan:
    """What to write for a report.

    there: what `kept` found. entry: the report is a state of its own. copy: a second place of the metrics.
    """
    write: dict[str, str] = {}
    remove: tuple[str, ...] = ()
    if entry:
        name = f"{report['run']['id']}.json"
        write[f"{HISTORY}/{name}"] = as_json({k: v for k, v in report.items() if k not in ("history", "begun")})
        names = sorted({*there, name})
        remove = tuple(f"{HISTORY}/{old}" for old in names[:-keep])
    text = documents.metrics(report)
    write |= {PAGE: documents.html(report), METRICS: text, STATE: as_json(report)}
    return Plan(write, remove, {copy: text} if copy else {})


def as_json(report: Mapping[str, Any]) -> str:
    """The report as a file's text."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def apply(directory: str, planned: Plan) -> None:
    """Write what is planned. EvidenceError names the file that could not be written.

    The directory is its owner's alone. A copy of the metrics is for all: node_exporter is another user.
    """
    place = Path(directory)
    path = place
    try:
        for name, text in planned.write.items():
            path = place / name
            if path.parent != place:
                path.parent.mkdir(mode=0o700, exist_ok=True)
            write_whole(path, text, 0o644 if name == METRICS else 0o600)
        for copy, text in planned.copies.items():
            path = Path(copy)
            write_whole(path, text, 0o644)
        for name in planned.remove:
            path = place / name
            path.unlink(missing_ok=True)
    except OSError as error:
        raise EvidenceError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: OSError) -> str:
    remedy = f"see df -h {path.parent}" if error.errno in (28, 122) else f"see ls -ld {path.parent}"
    return f"{path} on the controller cannot be written: {error.strerror or error}; {remedy}"


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Hold the directory, made when there is none, against other runs of the environment."""
    place = Path(directory)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EvidenceError(_unwritable(place, error)) from error
    until = time.monotonic() + WAIT_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(alone(place / LOCK, "Writing the evidence"))
                break
            except UpkeepError as error:
                if time.monotonic() > until:
                    raise EvidenceError(f"after {WAIT_S:.0f} s still: {error}") from error
                time.sleep(0.1)
            except OSError as error:
                raise EvidenceError(_unwritable(place / LOCK, error)) from error
        yield


# -- processes, to tell a run that is under way from one that is over


def process(pid: int) -> str:
    """A name for a process of this machine that no later process has; empty where that cannot be told."""
    started = _started(pid)
    return f"{socket.gethostname()}/{_boot()}/{pid}/{started}" if started else ""


def over(begun: Mapping[str, Mapping[str, Any]], now: float) -> list[str]:
    """Ids of the begun runs that are over: their process on this machine is no more.

    Of another machine's (a job of AWX has one of its own) only age tells. now: seconds since 1970.
    """
    gone = []
    for identifier, run in begun.items():
        parts = str(run["process"]).split("/")
        if len(parts) == 4 and parts[0] == socket.gethostname():
            if not (parts[1] == _boot() and parts[2].isdigit() and _started(int(parts[2])) == parts[3]):
                gone.append(identifier)
        elif now - unix(run["began"]) > FOREIGN_S:
            gone.append(identifier)
    return gone


def _started(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            fields = handle.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return handle.read().strip()
    except OSError:
        return ""
