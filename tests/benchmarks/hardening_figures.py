"""The arithmetic of `scripts/bench hardening`: what its meters, Ansible, OpenSCAP and Lynis said, as figures.

Everything here is a function of text, so that each figure can be checked without a node.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TABLE = "censusbench"
"""The meter's table in the packet filter of the lab's router."""
RULE = "xccdf_org.ssgproject.content_rule_"
PROFILE = "xccdf_org.ssgproject.content_profile_"
PROFILES = (
    "standard",
    "anssi_bp28_minimal",
    "anssi_bp28_intermediary",
    "anssi_bp28_enhanced",
    "anssi_bp28_high",
    "cis_level1_server",
    "cis_level2_server",
)
"""What the Debian 12 datastream is asked for, by the names after PROFILE."""
TARGET_FIRST = 0.10
TARGET_SECOND = 0.05
TARGET_EXTRA_NODE = 0.05
TARGET_CIS_LEVEL1 = 10
TARGET_LYNIS = 85
"""Shares of the peer's time; failed rules; Lynis' index. From the project's specification."""


class FiguresError(ValueError):
    """Something measured cannot be read; the message says what and where it came from."""


# --- What Ansible says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a playbook's run did, by the callback ansible.posix.json: counts over all nodes, seconds by task."""

    tasks: int
    results: int
    skipped: int
    changed: int
    failures: tuple[str, ...]
    seconds: tuple[tuple[str, float], ...]

    @property
    def in_tasks(self) -> float:
        return sum(seconds for _name, seconds in self.seconds)


def read_play(text: str) -> Work:
    """Reads the callback's output. Warnings before and after it do no harm. Raises FiguresError when there is none."""
    start = text.find("{")
    try:
        said: dict[str, Any] = json.JSONDecoder().raw_decode(text[start:] if start >= 0 else "")[0]
        plays, stats = said["plays"], said["stats"]
    except (ValueError, KeyError, TypeError):
        raise FiguresError(f"ansible-playbook printed no result: {text.strip()[-2000:] or 'nothing at all'}") from None
    tasks = [task for play in plays for task in play["tasks"] if task["hosts"]]
    failures, results, skipped = [], 0, 0
    for task in tasks:
        for host, result in task["hosts"].items():
            # A loop's items are results too: each is a module's run on the node.
            results += len(result.get("results") or [None])
            skipped += bool(result.get("skipped"))
            if result.get("failed") or result.get("unreachable"):
                failures.append(f"{host}: {task['task']['name']}: {failure(result)}")
    broken = any(host["failures"] or host["unreachable"] for host in stats.values())
    return Work(
        tasks=len(tasks),
        results=results,
        skipped=skipped,
        changed=sum(host["changed"] for host in stats.values()),
        # Ansible's own count leaves out what a play rescues or ignores; the callback does not tell these apart.
        failures=tuple(failures) if broken else (),
        seconds=tuple((task["task"]["name"], duration(task["task"]["duration"])) for task in tasks),
    )


def failure(result: Mapping[str, Any]) -> str:
    """Why a task failed, in one line."""
    items = [item.get("msg", "") for item in result.get("results") or [] if item.get("failed")]
    text = " | ".join(str(message) for message in items if message) or str(result.get("msg", "no message"))
    return " ".join(text.split())[:500]


def duration(entry: Mapping[str, str]) -> float:
    """The seconds of a play or task of the callback; 0 when it has no end."""
    if "end" not in entry:
        return 0.0
    start, end = (datetime.datetime.fromisoformat(entry[key]) for key in ("start", "end"))
    return (end - start).total_seconds()


# --- What the node and the wire say ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuMeter:
    """The file in which the kernel counts the processor time of a container."""

    file: Path

    def seconds(self, text: str) -> float:
        """The seconds in the file's text. Raises FiguresError."""
        if self.file.name == "cpuacct.usage":
            return int(text) / 1e9
        found = re.search(r"^usage_usec (\d+)$", text, re.MULTILINE)
        if not found:
            raise FiguresError(f"{self.file} has no usage_usec")
        return int(found.group(1)) / 1e6


def cpu_meter(cgroups: str, mounts: str, container: str) -> CpuMeter:
    """The meter of a container from /proc/PID/cgroup of its first process and /proc/mounts, for cgroup v1 and v2.

    systemd moves itself below the container's own group: the path is cut after the component that names the container.
    Raises FiguresError when no group of that name counts processor time.
    """
    for line in sorted(cgroups.splitlines(), key=lambda line: line.startswith("0::")):
        _number, controllers, path = line.split(":", 2)
        found = re.match(rf".*?/[^/]*{re.escape(container)}[^/]*", path)
        if not found:
            continue
        if "cpuacct" in controllers.split(","):
            place, name = mounted(mounts, "cgroup", "cpuacct"), "cpuacct.usage"
        elif controllers == "":
            place, name = mounted(mounts, "cgroup2", ""), "cpu.stat"
        else:
            continue
        if place:
            return CpuMeter(Path(place + found.group(0)) / name)
    raise FiguresError(f"no control group of container {container[:12]} counts processor time")


def mounted(mounts: str, kind: str, option: str) -> str:
    """Where a file system of this type, with this option, is mounted; empty when it is not."""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2] == kind and (not option or option in fields[3].split(",")):
            return fields[1]
    return ""


def meter_rules(nodes: Mapping[str, str]) -> str:
    """The text for nft that counts each node's bytes in the router, apart for ssh (22) and packages (`packages`).

    `nodes`: addresses by name. Counted are whole IP packets in both directions.
    """
    counters, rules = [], []
    for name, address in sorted(nodes.items()):
        counters += [f"  counter ssh_{name} {{ }}", f"  counter other_{name} {{ }}"]
        rules += [
            f"    ip daddr {address} tcp dport 22 counter name ssh_{name} accept",
            f"    ip saddr {address} tcp sport 22 counter name ssh_{name} accept",
            f"    ip daddr {address} counter name other_{name} accept",
            f"    ip saddr {address} counter name other_{name} accept",
        ]
    chain = "  chain count {\n    type filter hook forward priority filter - 10; policy accept;\n"
    text = "\n".join(counters) + "\n" + chain + "\n".join(rules) + "\n  }\n"
    return f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{text}}}\n"


def read_meter(text: str) -> dict[str, int]:
    """Bytes by counter, from `nft -j list counters`."""
    entries = json.loads(text)["nftables"]
    return {entry["counter"]["name"]: int(entry["counter"]["bytes"]) for entry in entries if "counter" in entry}


@dataclass(frozen=True)
class Run:
    """One side's run over some nodes. Seconds and bytes; `node_cpu_s` by node."""

    wall_s: float
    work: Work
    ssh_bytes: int
    other_bytes: int
    node_cpu_s: Mapping[str, float]
    controller_cpu_s: float
    settled_s: float = 0.0
    """How long the nodes were busy afterwards with what the run had started; not part of `wall_s`."""

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "wall_s": round(self.wall_s, 3),
            "tasks": self.work.tasks,
            "results": self.work.results,
            "skipped": self.work.skipped,
            "changed": self.work.changed,
            "failures": list(self.work.failures),
            "ssh_bytes": self.ssh_bytes,
            "other_bytes": self.other_bytes,
            "node_cpu_s": {name: round(seconds, 3) for name, seconds in sorted(self.node_cpu_s.items())},
            "controller_cpu_s": round(self.controller_cpu_s, 3),
            "settled_s": round(self.settled_s, 1),
            "task_s": [[name, round(seconds, 3)] for name, seconds in self.work.seconds],
        }


@dataclass(frozen=True)
class Floor:
    """What no hardening by Ansible goes below, in seconds, for so many nodes at once.

    `empty_s`: a play without a task. `round_trip_s`: one command over an open ssh connection that starts sudo and
    Python on the node. `module_s`: a play with one module that does nothing, for comparison.
    """

    empty_s: float
    round_trip_s: float
    module_s: float

    @property
    def seconds(self) -> float:
        return self.empty_s + self.round_trip_s


# --- Ratios ------------------------------------------------------------------------------------------------------


def ratio(ours: float, peer: float) -> float:
    """Our share of the peer's figure. Raises FiguresError when the peer's is none."""
    if peer <= 0:
        raise FiguresError(f"the peer's figure is {peer}, which nothing can be a share of")
    return ours / peer


def extra_node(seconds: Mapping[int, float]) -> float | None:
    """The seconds that one more node costs: the slope of a line through all counts; None with a single one."""
    if len(seconds) < 2:
        return None
    return statistics.linear_regression([float(count) for count in seconds], list(seconds.values())).slope


# --- Scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A profile's outcome: rules that passed, rules that failed; those that do not apply are left out."""

    passed: int
    failed: tuple[str, ...]
    other: Mapping[str, int] = field(default_factory=dict)
    """How many rules ended otherwise (notchecked, error, unknown, ...), by result."""


def read_oscap(text: str) -> Score:
    """Reads `oscap xccdf eval --progress`: a line `RULE:result` each. Raises FiguresError when there is none."""
    results: dict[str, str] = {}
    for line in text.splitlines():
        rule, _, result = line.strip().rpartition(":")
        if rule.startswith(RULE) and result.isalpha():
            results[rule.removeprefix(RULE)] = result
    if not results:
        raise FiguresError(f"oscap printed no results: {text.strip()[-500:] or 'nothing at all'}")
    passed = sum(result in ("pass", "fixed") for result in results.values())
    failed = tuple(sorted(rule for rule, result in results.items() if result == "fail"))
    others = [r for r in results.values() if r not in ("pass", "fixed", "fail", "notapplicable", "notselected")]
    return Score(passed, failed, {result: others.count(result) for result in sorted(set(others))})


@dataclass(frozen=True)
class Lynis:
    """Lynis' outcome: its hardening index (0 to 100), its version, the tests that suggest or warn of something."""

    index: int
    version: str = ""
    suggested: tuple[str, ...] = ()


def read_lynis(report: str) -> Lynis:
    """Reads Lynis' report, lines of NAME=VALUE. Raises FiguresError when its audit did not come to its end."""
    index = re.search(r"^hardening_index=(\d+)$", report, re.MULTILINE)
    if not index:
        raise FiguresError("Lynis' report has no hardening_index; its audit did not come to its end")
    version = re.search(r"^lynis_version=(.*)$", report, re.MULTILINE)
    tests = re.findall(r"^(?:suggestion|warning)\[\]=([A-Z]+-\d+)\|", report, re.MULTILINE)
    return Lynis(int(index.group(1)), version.group(1) if version else "", tuple(sorted(set(tests))))


@dataclass(frozen=True)
class Why:
    """What the catalogue says of a scanner's rule: the controls that answer it, and why it may fail all the same."""

    controls: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.reason} ({', '.join(self.controls)})" if self.controls else self.reason
        return f"{', '.join(self.controls)} should hold it" if self.controls else "no control answers it"


def reasons(controls: Iterable[Mapping[str, Any]], scanner: Mapping[str, Any]) -> dict[str, Why]:
    """What is known of each rule of a scanner, by the rule's name.

    `scanner` is a file of roles/hardening/files/scanners: `rules` with the ids of the controls that answer each, and
    `without_control`, reasons with the rules that each is for. A control that a container cannot hold has its reason
    under `holds`.
    """
    cannot: dict[str, str] = {}
    for control in controls:
        holds = control.get("holds")
        reason = holds.get("container") if isinstance(holds, Mapping) else None
        if not reason and "container" not in (control.get("applies_to") or ["container"]):
            reason = "held on machines of their own only: the kernel is not the container's"
        cannot[str(control["id"])] = " ".join(str(reason or "").split())
    found = {}
    for rule, answers in (scanner.get("rules") or {}).items():
        names = tuple(str(name) for name in answers)
        found[str(rule)] = Why(names, next((cannot[name] for name in names if cannot.get(name)), ""))
    for entry in scanner.get("without_control") or []:
        reason = " ".join(str(entry["reason"]).split())
        found.update({str(rule): Why((), reason) for rule in entry["rules"]})
    return found


def read_scanner(file: Path) -> dict[str, Any]:
    """A file of what the catalogue says of a scanner's rules; empty where there is none."""
    if not file.is_file():
        return {}
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise FiguresError(f"{file} is not a mapping")
    return found


def read_catalogue(directory: Path) -> list[dict[str, Any]]:
    """The controls of the catalogue's files. Raises FiguresError naming the file that is not a list of controls."""
    found: list[dict[str, Any]] = []
    for file in sorted(directory.glob("*.yml")):
        controls = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(controls, list):
            raise FiguresError(f"{file} is not a list of controls")
        found += controls
    return found


# --- Targets -----------------------------------------------------------------------------------------------------


def missed(
    ratios: Mapping[tuple[int, str], float],
    extra: Mapping[str, float | None],
    scores: Mapping[str, Mapping[str, Score]],
    lynis: Mapping[str, Lynis],
) -> list[str]:
    """The targets that were missed, a sentence each. `scores` and `lynis`: by state (stock, peer, ours).

    Lynis' index counts where it was taken on a machine (`machine`): a container holds no kernel value, clock or audit.
    """
    found = []
    for (nodes, run), share in sorted(ratios.items()):
        target = TARGET_FIRST if run == "first" else TARGET_SECOND
        if share > target:
            found.append(f"nodes={nodes} run={run}: {share:.3f} of the peer's time, target {target:.2f}")
    for run, cost in sorted(extra.items()):
        if cost is not None and cost > TARGET_EXTRA_NODE:
            found.append(f"one more node, run={run}: {cost:.3f} of the peer's time, target {TARGET_EXTRA_NODE:.2f}")
    ours, peer = scores.get("ours", {}), scores.get("peer", {})
    for profile in ours:
        if profile in peer and len(ours[profile].failed) >= len(peer[profile].failed):
            found.append(
                f"{profile}: {len(ours[profile].failed)} rules fail, after the peer {len(peer[profile].failed)}"
            )
    level1 = ours.get("cis_level1_server")
    if level1 and len(level1.failed) > TARGET_CIS_LEVEL1:
        found.append(f"cis_level1_server: {len(level1.failed)} rules fail, target {TARGET_CIS_LEVEL1}")
    judged = "machine" if "machine" in lynis else "ours"
    if judged in lynis and lynis[judged].index < TARGET_LYNIS:
        where = "" if judged == "machine" else " (in a container; --machine takes it with a kernel of its own)"
        found.append(f"Lynis: index {lynis[judged].index}, target {TARGET_LYNIS}{where}")
    return found


# --- The peer ----------------------------------------------------------------------------------------------------

PEER_HOW = (
    "PATH is a directory that holds ansible_collections/devsec/hardening: "
    "`ansible-galaxy collection install devsec.hardening -p PATH`, "
    "or a git clone of dev-sec/ansible-collection-hardening at PATH/ansible_collections/devsec/hardening"
)
PEER_ROLES = ("os_hardening", "ssh_hardening")


def peer_problem(path: Path) -> str:
    """Why the peer cannot be run from there, in one sentence; empty when it can."""
    home = path / "ansible_collections" / "devsec" / "hardening"
    if not path.is_dir():
        return f"--peer {path} is not a directory; {PEER_HOW}"
    if not home.is_dir():
        return f"--peer {path} has no ansible_collections/devsec/hardening; {PEER_HOW}"
    for role in PEER_ROLES:
        if not (home / "roles" / role / "tasks" / "main.yml").is_file():
            return f"{home} has no role {role} (an unfinished clone?); {PEER_HOW}"
    return ""


def peer_version(path: Path) -> str:
    """The peer's version, from what an installation or a clone of it says; empty when neither does."""
    home = path / "ansible_collections" / "devsec" / "hardening"
    manifest, galaxy = home / "MANIFEST.json", home / "galaxy.yml"
    if manifest.is_file():
        return str(json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"])
    if galaxy.is_file():
        return str((yaml.safe_load(galaxy.read_text(encoding="utf-8")) or {}).get("version", ""))
    return ""


def kernel_keys(path: Path) -> list[str]:
    """The kernel values of the peer that are not the network's: a container cannot set them, and its role would fail.

    The lab's nodes share the machine's kernel, of which only net.* is theirs.
    """
    role = path / "ansible_collections" / "devsec" / "hardening" / "roles" / "os_hardening"
    keys: set[str] = set()
    for file, name in (
        (role / "defaults/main.yml", "sysctl_config"),
        (role / "vars/Debian.yml", "sysctl_custom_config"),
    ):
        if file.is_file():
            keys |= set((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get(name) or {})
    return sorted(key for key in keys if not key.startswith("net."))


# --- Lines and tables --------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def score_rows(scores: Mapping[str, Mapping[str, Score]], lynis: Mapping[str, Lynis]) -> list[list[str]]:
    """The score table: rules passed / failed by profile, and Lynis' index, for each state in the order given."""
    states = list(scores)
    rows = [["passed / failed rules", *states]]
    for profile in PROFILES:
        if any(profile in scores[state] for state in states):
            cells = [scores[state].get(profile) for state in states]
            rows.append([profile, *(f"{c.passed} / {len(c.failed)}" if c else "-" for c in cells)])
    rows.append(["Lynis index", *(str(lynis[state].index) if state in lynis else "-" for state in states)])
    return rows


def remaining(rules: Iterable[str], known: Mapping[str, Why]) -> list[str]:
    """A line for each rule that still fails: why it may, who should hold it, or that nobody answers it."""
    return [f"{rule}: {known.get(rule, Why())}" for rule in rules]


def slowest(work: Work, count: int = 5) -> list[tuple[str, float]]:
    """The tasks that took longest."""
    return sorted(work.seconds, key=lambda entry: -entry[1])[:count]
