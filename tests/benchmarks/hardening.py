"""`scripts/bench hardening`: our hardening against devsec.hardening on equal fresh nodes, in one run: time and score.

For each number of nodes a fresh lab of disposable Debian 12 nodes is made, as many for each side (one lab lives on a
machine at a time: an earlier one has to be gone). Package lists are fetched before the clock starts, and each side has
run once on a node of its own, so that packages come from the lab's cache and no download is measured (--cold leaves
that out; ours runs first and pays for what both install). Both run with the same ansible.cfg (pipelining, kept
connections, the same forks) and none of the user's. The second run follows the first on the same nodes. Measured:

  ours_s, peer_s  wall time of ansible-playbook, from its start to its end
  tasks, results  of Ansible, over all nodes; the items of a loop are results
  ssh bytes       counted by the lab's router for port 22 of each node, whole packets, both directions
  node CPU        processor time of the node's control group
  busy afterwards how long the nodes go on with what a run started (an integrity database, say); waited for, not counted
  floor           an empty play, and one command over an open ssh connection that starts sudo and Python

Ours is the role censuschat.infra.hardening with --profile. The peer is os_hardening and ssh_hardening with their
defaults, except for what a container refuses: auditd, and kernel values other than net.* (the kernel is the machine's).
It is told of the one host key that the nodes have.

The score is taken on nodes of the smallest count: one as it came, the first of each side after its second run.
OpenSCAP and Lynis come from Debian 12, the Debian 12 datastream from ssg-debian of Debian's testing or unstable
(0.1.82; those of Debian 12 and 13 have no CIS profiles), all by apt through the lab's package cache: from the mirror
of the machine's own apt, so nothing but that mirror is needed. Where it has Debian 12 only, name the datastream with
--content. The scanners take a node for a host, as they should here, once /run/.containerenv is unmounted
and linux-base is installed. With --machine Lynis also looks at a virtual machine that ours has hardened: a container
holds no kernel value, clock, audit rule or AppArmor profile. It has one partition and no time server (twelve minutes).

Exit codes: 0 all targets met; 1 a run failed or a target was missed; 2 bad input or a missing part, nothing touched.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import fabric, machine, nodes, trial, virtual
from lab.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, Refusal
from lab.images import ImageError, find_mirror
from lab.paths import PREFIX, REPO, STATE, cache
from lab.topology import Node, Topology, TopologyError
from lab.trial import Trial, TrialError
from lab.virtual import VirtualError
from tests.benchmarks import hardening_figures as figures
from tests.benchmarks.hardening_figures import FiguresError, Floor, Run, Score

BIN = Path(sys.executable).parent
SIDES = ("ours", "peer")
RUNS = ("first", "second")
STOCK = "stock1"
NODES_MAX = 100
"""Of each side: more do not fit the network of disposable nodes."""
FLOOR_RUNS = 3
SCAN_S = 3600
"""Seconds after which a node's scan counts as stuck; seven profiles take minutes each on a slow machine."""
CATALOGUE = REPO / "collections/ansible_collections/censuschat/infra/roles/hardening/files/catalogue"
SCANNERS = CATALOGUE.parent / "scanners"
"""What the catalogue says of each rule of a scanner: the controls that answer it, or why none does."""
PLACE = "/root/censuschat-bench"
"""Where the scanners work on a node."""
ANSIBLE_CFG = """[defaults]
collections_path = {collections}
forks = {forks}
gathering = explicit
host_key_checking = true
interpreter_python = /usr/bin/python3
localhost_warning = false
retry_files_enabled = false
stdout_callback = ansible.posix.json

[ssh_connection]
pipelining = true
ssh_args = -o ControlMaster=auto -o ControlPersist=60s -o ConnectTimeout=10
control_path_dir = {directory}/cp
control_path = %(directory)s/%%C
"""
ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
PREPARE = "apt-get -qq update"
# `start` is the state of a service whose commands run before it counts as started, or as done.
SETTLE = (
    """while units=$(systemctl list-units --state=start --no-legend --plain) && [ -n "$units" ]; do sleep 1; done"""
)
SETTLE_S = 3600
"""Seconds after which the work that a run left behind counts as stuck."""
INSTALL = r"""set -eu
umask 022
export DEBIAN_FRONTEND=noninteractive
if mountpoint -q /run/.containerenv; then umount /run/.containerenv; fi
mkdir -p {place}/lists/partial
cd {place}
apt-get -qq update
# By linux-base OpenSCAP knows a system with a kernel of its own: without it half of the rules do not apply.
apt-get -qq install -y --no-install-recommends openscap-scanner lynis linux-base >/dev/null
for suite in {suites}; do
  if [ -s content.xml ]; then break; fi
  sed -n "s/ bookworm main/ $suite main/p" /etc/apt/sources.list | head -n 1 > later.list
  later="-o Dir::Etc::SourceList={place}/later.list -o Dir::Etc::SourceParts=/dev/null"
  # Mirrors may keep a suite's older state; whose signature it bears is checked all the same.
  later="$later -o Dir::State::Lists={place}/lists -o Acquire::Check-Valid-Until=false"
  rm -rf content ssg-debian_*.deb
  apt-get -qq $later update && apt-get -qq $later download ssg-debian || continue
  dpkg-deb -x ssg-debian_*.deb content
  if grep -q {wanted} content/usr/share/xml/scap/ssg/content/ssg-debian12-ds.xml; then
    mv content/usr/share/xml/scap/ssg/content/ssg-debian12-ds.xml content.xml
    dpkg-deb -f ssg-debian_*.deb Version > content.version
  fi
done
[ -s content.xml ] || {{ echo "no ssg-debian of {suites} has the profile {wanted}" >&2; exit 1; }}
cat content.version 2>/dev/null || echo "{given}"
"""
# Exit code 2 of oscap: rules fail. 1: it broke.
OSCAP = r"""cd {place}
oscap xccdf eval --progress --profile {profile} content.xml 2> oscap.err
code=$?
[ $code -eq 0 ] || [ $code -eq 2 ] || {{ tail -n 3 oscap.err >&2; exit 1; }}
"""
LYNIS = r"""cd {place}
rm -f lynis.dat
lynis audit system --quick --quiet --no-colors --logfile {place}/lynis.log --report-file {place}/lynis.dat >/dev/null
cat lynis.dat
"""
LYNIS_ONLY = """export DEBIAN_FRONTEND=noninteractive
apt-get -qq install -y --no-install-recommends lynis >/dev/null && mkdir -p {place}
"""


SUITES = ("forky", "sid")
"""Where ssg-debian with the CIS profiles of Debian 12 comes from, the first that has it: testing, unstable."""


def install() -> str:
    """The script that brings the scanners to a node and says which datastream they have."""
    wanted = f"{figures.PROFILE}cis_level1_server"
    return INSTALL.format(place=PLACE, suites=" ".join(SUITES), wanted=wanted, given="given by --content")


class BenchError(RuntimeError):
    """The benchmark cannot go on; the message says what failed and what it said."""


FAILURES = (BenchError, FiguresError, TrialError, TopologyError, VirtualError, ImageError, fabric.FabricError)


def known_rules(scanner: str = "openscap_debian12") -> dict[str, figures.Why]:
    """What the catalogue says of each rule of a scanner."""
    return figures.reasons(figures.read_catalogue(CATALOGUE), figures.read_scanner(SCANNERS / f"{scanner}.yml"))


@dataclass
class Results:
    """All that was measured, as it is written to the JSON file."""

    about: dict[str, Any]
    runs: dict[tuple[int, str, str], Run] = field(default_factory=dict)
    """By number of nodes, side and run."""
    floors: dict[int, Floor] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    lynis: dict[str, figures.Lynis] = field(default_factory=dict)

    def ratios(self) -> dict[tuple[int, str], float]:
        pairs = {(count, run) for count, _side, run in self.runs}
        return {
            (count, run): figures.ratio(self.runs[count, "ours", run].wall_s, self.runs[count, "peer", run].wall_s)
            for count, run in sorted(pairs)
            if all((count, side, run) in self.runs for side in SIDES)
        }

    def extra(self) -> dict[str, dict[str, float]]:
        """Seconds that one more node costs each side, by run; empty with a single number of nodes."""
        found = {}
        for run in RUNS:
            costs = {
                side: figures.extra_node(
                    {c: r.wall_s for (c, s, which), r in self.runs.items() if (s, which) == (side, run)}
                )
                for side in SIDES
            }
            if costs["ours"] is not None and costs["peer"]:
                found[run] = {"ours": costs["ours"], "peer": costs["peer"]}
        return found

    def missed(self) -> list[str]:
        extra = {
            run: figures.ratio(cost["ours"], cost["peer"]) for run, cost in self.extra().items() if cost["peer"] > 0
        }
        return figures.missed(self.ratios(), extra, self.scores, self.lynis)

    def remaining(self) -> dict[str, list[str]]:
        """What still fails after ours, by profile, and what Lynis still asks for, each with what is known of it."""
        known = known_rules()
        found = {p: figures.remaining(score.failed, known) for p, score in self.scores.get("ours", {}).items()}
        if "ours" in self.lynis:
            found["lynis"] = figures.remaining(self.lynis["ours"].suggested, known_rules("lynis"))
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.about,
            "runs": [
                {"nodes": count, "side": side, "run": run, **measured.to_dict()}
                for (count, side, run), measured in sorted(self.runs.items())
            ],
            "ratios": [{"nodes": c, "run": run, "ratio": round(share, 4)} for (c, run), share in self.ratios().items()],
            "extra_node_s": self.extra(),
            "floors": {
                str(count): {"empty_s": f.empty_s, "round_trip_s": f.round_trip_s, "module_s": f.module_s}
                for count, f in sorted(self.floors.items())
            },
            "scores": {
                state: {
                    profile: {"passed": s.passed, "failed": list(s.failed), "other": dict(s.other)}
                    for profile, s in profiles.items()
                }
                for state, profiles in self.scores.items()
            },
            "lynis": {state: dataclasses.asdict(outcome) for state, outcome in self.lynis.items()},
            "remaining": self.remaining(),
            "missed": self.missed(),
        }


# --- One set of nodes --------------------------------------------------------------------------------------------


class Bench:
    """The nodes of one count, and how playbooks are run and measured on them."""

    def __init__(self, inventory: Path, lab: Topology, options: argparse.Namespace, directory: Path) -> None:
        self.inventory, self.lab, self.options, self.directory = inventory, lab, options, directory
        (directory / "cp").mkdir(exist_ok=True)
        collections = [options.peer, REPO / "collections"]
        text = ANSIBLE_CFG.format(collections=":".join(map(str, collections)), forks=options.forks, directory=directory)
        (directory / "ansible.cfg").write_text(text, encoding="utf-8")
        metered = {n.name: str(n.address) for side in SIDES for n in self.side(side)}
        fabric.run((*fabric.IN_ROUTER, "nft", "-f", "-"), figures.meter_rules(metered))
        self.meters = self._cpu_meters()

    def side(self, name: str) -> list[Node]:
        """The nodes of a side, in the order of their numbers."""
        return sorted((n for n in self.lab.nodes if n.name.startswith(name)), key=lambda n: int(n.name[len(name) :]))

    def _cpu_meters(self) -> dict[str, figures.CpuMeter]:
        names = [PREFIX + node.name for node in self.lab.nodes]
        environment = dict(os.environ)
        if machine.PODMAN_SETTINGS.exists():
            environment["CONTAINERS_CONF"] = str(machine.PODMAN_SETTINGS)
        said = subprocess.run(
            ("podman", "inspect", "--format", "{{.Name}} {{.Id}} {{.State.Pid}}", *names),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if said.returncode:
            raise BenchError(f"podman cannot say where its containers are: {said.stderr.strip()}")
        mounts = Path("/proc/mounts").read_text(encoding="utf-8")
        meters = {}
        for line in said.stdout.splitlines():
            name, identifier, pid = line.split()
            groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
            meters[name.removeprefix(PREFIX)] = figures.cpu_meter(groups, mounts, identifier)
        return meters

    def _cpu(self, names: Sequence[str]) -> dict[str, float]:
        meters = self.meters
        return {name: meters[name].seconds(meters[name].file.read_text(encoding="ascii")) for name in names}

    def _bytes(self) -> dict[str, int]:
        command = (*fabric.IN_ROUTER, "nft", "-j", "list", "counters", "table", "inet", figures.TABLE)
        return figures.read_meter(fabric.run(command))

    def playbook(self, name: str, plays: list[dict[str, Any]], *options: str) -> tuple[float, str, int]:
        """Runs plays; returns its seconds, what it printed and its exit code."""
        path = self.directory / f"{name}.yml"
        path.write_text(yaml.safe_dump(plays, sort_keys=False), encoding="utf-8")
        # The user's own settings for Ansible would make the sides unequal to what is said here.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        environment["ANSIBLE_CONFIG"] = str(self.directory / "ansible.cfg")
        command = (str(BIN / "ansible-playbook"), "-i", str(self.inventory), str(path), *options)
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        took = time.perf_counter() - began
        if done.returncode and not done.stdout.strip():
            raise BenchError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        (self.directory / f"{name}.json").write_text(done.stdout, encoding="utf-8")
        return took, done.stdout, done.returncode

    def settle(self, side: str) -> float:
        """Waits until no unit of a side's nodes is starting any more; returns the seconds.

        A run may leave work behind that its node does by itself (an integrity database, say). The next run, of either
        side, must not pay for it.
        """
        began = time.monotonic()
        own = self.side(side)
        self.everywhere(lambda node: self.root(node, SETTLE, SETTLE_S), own, len(own))
        return time.monotonic() - began

    def measure(self, side: str, run: str) -> Run:
        """One run of a side, with all meters read before and after it; then its nodes come to rest."""
        names = [node.name for node in self.side(side)]
        plays, variables = play(side, self.options)
        bytes_before, cpu_before = self._bytes(), self._cpu(names)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall, text, _code = self.playbook(f"{side}-{run}", plays, "-e", json.dumps(variables))
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        bytes_after, cpu_after = self._bytes(), self._cpu(names)
        work = figures.read_play(text)

        def moved(kind: str) -> int:
            return sum(bytes_after[f"{kind}_{name}"] - bytes_before[f"{kind}_{name}"] for name in names)

        return Run(
            wall_s=wall,
            work=work,
            ssh_bytes=moved("ssh"),
            other_bytes=moved("other"),
            node_cpu_s={name: cpu_after[name] - cpu_before[name] for name in names},
            controller_cpu_s=spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime,
            settled_s=0.0 if work.failures else self.settle(side),
        )

    def warm(self, side: str) -> None:
        """One run of a side on a node of its own, which brings its packages into the lab's cache."""
        plays, variables = play(side, self.options)
        _took, text, _code = self.playbook(f"warm-{side}", aimed(plays, f"warm_{side}"), "-e", json.dumps(variables))
        failures = figures.read_play(text).failures
        if failures:
            raise BenchError(f"{side}, before anything was measured: " + "\n  ".join(failures[:5]))

    def floor(self) -> Floor:
        """Medians of the floor's parts, over all of our nodes at once."""
        empty = [{"name": "Nothing", "hosts": "ours", "gather_facts": False, "tasks": []}]
        ping = [{"name": "Ping", "ansible.builtin.ping": {}}]
        module = [{"name": "One module", "hosts": "ours", "gather_facts": False, "become": True, "tasks": ping}]
        return Floor(
            empty_s=statistics.median(self._quick("empty", empty) for _ in range(FLOOR_RUNS)),
            round_trip_s=self._round_trip(),
            module_s=statistics.median(self._quick("module", module) for _ in range(FLOOR_RUNS)),
        )

    def _quick(self, name: str, plays: list[dict[str, Any]]) -> float:
        took, text, code = self.playbook(name, plays)
        if code:
            raise BenchError(f"the play `{name}` of the floor failed: {text[-1000:]}")
        return took

    def _round_trip(self) -> float:
        """Seconds until each of our nodes has started sudo and Python once, all at a time, over open connections."""
        ours = self.side("ours")
        kept = (
            "-o",
            "ControlMaster=auto",
            "-o",
            "ControlPersist=60s",
            "-o",
            f"ControlPath={self.directory}/cp/floor-%C",
        )

        def start(node: Node) -> None:
            command = nodes.ssh(node, "sudo", "-n", "/usr/bin/python3", "-c", "pass")
            self.call(node, (command[0], *kept, *command[1:]))

        times = []
        with ThreadPoolExecutor(max_workers=len(ours)) as pool:
            for repetition in range(FLOOR_RUNS + 1):
                began = time.perf_counter()
                list(pool.map(start, ours))
                if repetition:
                    # The first one opened the connections.
                    times.append(time.perf_counter() - began)
        return statistics.median(times)

    def call(self, node: Node, command: Sequence[str], script: str = "", patience_s: float = 600) -> str:
        """Runs a command that reaches a node; returns what it printed. Raises BenchError with what went wrong."""
        try:
            done = subprocess.run(
                command, input=script, capture_output=True, text=True, check=False, timeout=patience_s
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{node.name} did not finish in {patience_s:.0f} s: {script[:200]}") from error
        if done.returncode:
            raise BenchError(f"{node.name}: {done.stderr.strip()[-1000:] or done.stdout.strip()[-1000:]}")
        return done.stdout

    def root(self, node: Node, script: str, patience_s: float = 600) -> str:
        """Runs a shell script as root on a node, by its operator's login; returns what it printed."""
        program, *rest_of = nodes.ssh(node, "sudo", "-n", "sh")
        # Ends by itself once the node is gone.
        return self.call(node, (program, *ALIVE, *rest_of), script, patience_s)

    def everywhere(self, work: Callable[[Node], Any], which: Sequence[Node], at_once: int) -> list[Any]:
        """What `work` returns for each of these nodes. The first failure ends it; what runs then is not waited for."""
        pool = ThreadPoolExecutor(max_workers=at_once)
        try:
            return list(pool.map(work, which))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def score(self, results: Results) -> None:
        """Scans the node that is as it came, and the first of each side."""
        scanned = [self.lab.node(STOCK), self.side("peer")[0], self.side("ours")[0]]
        content = Path(self.options.content).read_bytes() if self.options.content else b""

        def scan(node: Node) -> tuple[dict[str, Score], figures.Lynis]:
            if content:
                put = nodes.ssh(node, "sudo", "-n", "sh", "-c", f"'mkdir -p {PLACE}; cat > {PLACE}/content.xml'")
                sent = subprocess.run(put, input=content, capture_output=True, check=False, timeout=300)
                if sent.returncode:
                    raise BenchError(f"{node.name} did not take the datastream: {sent.stderr.decode(errors='replace')}")
            try:
                version = self.root(node, install(), 1200).splitlines()[-1]
                results.about["content"] = f"ssg-debian {version}"
            except BenchError as error:
                raise BenchError(
                    f"the scanners could not be brought to {error}. They come by apt through the lab's package cache: "
                    f"the machine's mirror needs Debian 12, and {' or '.join(SUITES)} for ssg-debian "
                    "(or name the datastream with --content)"
                ) from error
            scores = {}
            for profile in figures.PROFILES:
                said = self.root(node, OSCAP.format(place=PLACE, profile=figures.PROFILE + profile), SCAN_S)
                scores[profile] = figures.read_oscap(said)
                say(f"scanned {node.name} {profile}: {scores[profile].passed} / {len(scores[profile].failed)}")
            return scores, figures.read_lynis(self.root(node, LYNIS.format(place=PLACE), SCAN_S))

        # As many at a time as the machine has cores: a scan is processor time.
        outcome = self.everywhere(scan, scanned, os.cpu_count() or 1)
        for state, (scores, lynis) in zip(("stock", "peer", "ours"), outcome, strict=True):
            results.scores[state], results.lynis[state] = scores, lynis


def score_on_a_machine(options: argparse.Namespace, results: Results) -> None:
    """Lynis on a machine with a kernel of its own that ours has hardened. Raises BenchError."""
    with (
        tempfile.TemporaryDirectory(prefix="bh-") as directory,
        trial.running([Trial(STOCK)], "bench-hardening"),
        virtual.running(virtual.image_of(STOCK), STATE / "log" / "machine.log") as machine,
    ):
        say("a machine with a kernel of its own: ours")
        plays, variables = play("ours", options)
        inventory, playbook = Path(directory) / "hosts.yml", Path(directory) / "play.yml"
        inventory.write_text(yaml.safe_dump({"all": {"hosts": {virtual.NAME: dict(machine.host())}}}), encoding="utf-8")
        playbook.write_text(yaml.safe_dump(aimed(plays, virtual.NAME)), encoding="utf-8")
        extra = json.dumps({**variables, "hardening_exclude": virtual.CANNOT_HOLD})
        command = (str(BIN / "ansible-playbook"), "-i", str(inventory), str(playbook), "-e", extra)
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=SCAN_S)
        if done.returncode:
            raise BenchError(
                f"ours on a machine ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-500:]}"
            )
        say("a machine with a kernel of its own: Lynis")
        machine.sh(LYNIS_ONLY.format(place=PLACE), timeout=600)
        results.lynis["machine"] = figures.read_lynis(machine.sh(LYNIS.format(place=PLACE), timeout=SCAN_S))


def play(side: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The play of a side, and the variables it is run with."""
    if side == "ours":
        plays = [{"name": side, "hosts": side, "gather_facts": False, "roles": ["censuschat.infra.hardening"]}]
        return plays, {"hardening_profile": options.profile}
    roles = [f"devsec.hardening.{role}" for role in figures.PEER_ROLES]
    # Its roles become root and read the facts where the play says so.
    return [{"name": side, "hosts": side, "become": True, "gather_facts": True, "roles": roles}], peer_variables(
        options
    )


def aimed(plays: list[dict[str, Any]], hosts: str) -> list[dict[str, Any]]:
    """The same plays on other hosts."""
    return [{**entry, "hosts": hosts} for entry in plays]


def peer_variables(options: argparse.Namespace) -> dict[str, Any]:
    """What differs from the peer's defaults: that which fails on these nodes, and what the caller adds."""
    given = {
        "os_auditd_enabled": False,
        "sysctl_unsupported_entries": figures.kernel_keys(options.peer),
        # The nodes have this one; the peer's default names one of each kind.
        "ssh_host_key_files": ["/etc/ssh/ssh_host_ed25519_key"],
    }
    return {**given, **options.peer_vars}


@contextlib.contextmanager
def fresh(count: int, stock: bool, warm: bool, options: argparse.Namespace) -> Iterator[Bench]:
    """So many fresh nodes for each side; one that stays as it is, one each to warm the cache with; gone afterwards."""
    wanted = [Trial(f"{side}{number}", (side,)) for side in SIDES for number in range(1, count + 1)]
    wanted += [Trial(STOCK)] if stock else []
    wanted += [Trial(f"warm-{side}", (f"warm_{side}",)) for side in SIDES] if warm else []
    # A control path has to fit into the 108 characters of a socket's name.
    directory = Path(tempfile.mkdtemp(prefix="bh-"))
    try:
        with trial.running(wanted, "bench-hardening") as (inventory, lab):
            bench = Bench(inventory, lab, options, directory)
            # One first: the others then find the index in the lab's cache.
            for some in (lab.nodes[:1], lab.nodes[1:]):
                bench.everywhere(lambda node: bench.root(node, PREPARE), some, 4)
            yield bench
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# --- What is printed ---------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A sign of life for whoever watches; figures go to standard output."""
    print(f"... {text}", file=sys.stderr, flush=True)


def compared(count: int, run: str, results: Results) -> str:
    """The lines of one number of nodes and run."""
    ours, peer = (results.runs[count, side, run] for side in SIDES)
    share = figures.ratio(ours.wall_s, peer.wall_s)
    head = (
        f"bench hardening: nodes={count} run={run} ours_s={ours.wall_s:.2f} peer_s={peer.wall_s:.2f} ratio={share:.3f}"
    )

    def cpu(measured: Run) -> str:
        return f"{sum(measured.node_cpu_s.values()) / count:.2f}"

    rows = [
        ["", "ours", "peer"],
        ["tasks / results", *(f"{r.work.tasks} / {r.work.results}" for r in (ours, peer))],
        ["changed", *(str(r.work.changed) for r in (ours, peer))],
        ["ssh kB a node", *(f"{r.ssh_bytes / count / 1000:.0f}" for r in (ours, peer))],
        ["packages kB a node", *(f"{r.other_bytes / count / 1000:.0f}" for r in (ours, peer))],
        ["node CPU s, mean", cpu(ours), cpu(peer)],
        ["controller CPU s", *(f"{r.controller_cpu_s:.2f}" for r in (ours, peer))],
        ["busy afterwards s", *(f"{r.settled_s:.0f}" for r in (ours, peer))],
    ]
    return f"{head}\n{figures.table(rows)}"


def rest(count: int, results: Results) -> str:
    """The floor of a number of nodes, and where our time beyond it goes."""
    floor = results.floors[count]
    cores = os.cpu_count() or 1
    lines = [
        f"bench hardening: floor nodes={count} floor_s={floor.seconds:.2f} empty_play_s={floor.empty_s:.2f} "
        f"round_trip_and_python_s={floor.round_trip_s:.2f} one_module_s={floor.module_s:.2f}"
    ]
    for run in RUNS:
        ours, peer = (results.runs[count, side, run] for side in SIDES)
        processors = (ours.controller_cpu_s + sum(ours.node_cpu_s.values())) / cores
        tasks = "; ".join(f"{name}: {seconds:.2f}" for name, seconds in figures.slowest(ours.work))
        lines.append(
            f"  {run}: {ours.wall_s:.2f} s = {ours.wall_s - ours.work.in_tasks:.2f} around the tasks + {tasks}; "
            f"all processors' time / {cores} cores {processors:.2f} s; "
            f"the floor is {figures.ratio(floor.seconds, peer.wall_s):.3f} of the peer"
        )
    return "\n".join(lines)


def summary(results: Results) -> str:
    """What comes after all counts: the cost of a node, the score table, the rules that still fail, the targets."""
    lines = []
    for run, cost in results.extra().items():
        lines.append(
            f"bench hardening: extra_node run={run} ours_s={cost['ours']:.2f} peer_s={cost['peer']:.2f} "
            f"ratio={figures.ratio(cost['ours'], cost['peer']):.3f}"
        )
    if results.scores:
        lines.append(figures.table(figures.score_rows(results.scores, results.lynis)))
        known = known_rules()
        level1 = results.scores["ours"].get("cis_level1_server")
        if level1:
            lines.append(
                "rules of cis_level1_server that still fail after ours (those of all profiles are in the file):"
            )
            lines += [f"  {line}" for line in figures.remaining(level1.failed, known)]
    if "machine" in results.lynis:
        lines.append(f"bench hardening: Lynis on a machine with a kernel of its own: {results.lynis['machine'].index}")
    missed = results.missed()
    lines += [f"  missed: {sentence}" for sentence in missed]
    lines.append(f"bench hardening: targets_missed={len(missed)}")
    return "\n".join(lines)


# --- The command -------------------------------------------------------------------------------------------------


def counts(text: str) -> list[int]:
    """Numbers of nodes from `1,4,10`, each once and rising."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,4,10") from None
    if not found or found[0] < 1 or found[-1] > NODES_MAX:
        raise argparse.ArgumentTypeError(f"numbers of nodes are from 1 to {NODES_MAX}, not {text}")
    return found


def mapping(text: str) -> dict[str, Any]:
    """Variables as a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('not a JSON object such as {"os_cron_enabled": false}')
    return found


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="scripts/bench hardening", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--peer", type=Path, required=True, metavar="PATH", help=figures.PEER_HOW)
    top.add_argument("--nodes", type=counts, default=[1, 4, 10], metavar="N,N,...", help="numbers of nodes (1,4,10)")
    top.add_argument(
        "--profile",
        default="cis_level2",
        choices=["baseline", "cis_level1", "cis_level2"],
        help="what our side holds the nodes to, for times and score alike (cis_level2)",
    )
    top.add_argument("--forks", type=int, default=10, help="nodes that Ansible works on at a time, both sides (10)")
    top.add_argument("--peer-vars", type=mapping, default={}, metavar="JSON", help="further variables for the peer")
    top.add_argument("--cold", action="store_true", help="do not bring packages into the lab's cache beforehand")
    top.add_argument("--no-score", action="store_true", help="times only")
    top.add_argument("--machine", action="store_true", help="Lynis on a virtual machine as well (x86_64 only)")
    top.add_argument(
        "--content", type=Path, metavar="FILE", help="the datastream ssg-debian12-ds.xml, instead of apt's"
    )
    top.add_argument("--json", type=Path, metavar="FILE", help="where all figures go (bench/ in the project's cache)")
    return top


def problem(options: argparse.Namespace) -> str:
    """What stands in the way, in one sentence; empty when nothing does. Touches nothing."""
    found = figures.peer_problem(options.peer)
    if found:
        return found
    if options.forks < 1:
        return f"--forks {options.forks} is not a number of nodes; the default is 10"
    if options.content and not options.content.is_file():
        return f"--content {options.content} is not a file; it is ssg-debian12-ds.xml of the package ssg-debian"
    lacking = [program for program in ("qemu-system-x86_64", "mke2fs") if not shutil.which(program)]
    if options.machine and lacking:
        return f"--machine needs {' and '.join(lacking)}: apt-get install qemu-system-x86 e2fsprogs"
    if options.json and not options.json.parent.is_dir():
        return f"--json {options.json}: its directory is not there"
    if not (BIN / "ansible-playbook").is_file():
        return f"ansible-playbook is not in {BIN}; start the benchmark with: scripts/bench hardening"
    try:
        find_mirror()
    except ImageError as error:
        return str(error)
    return ""


def measure(options: argparse.Namespace, results: Results, save: Callable[[], None]) -> None:
    """All counts, smallest first; the results so far are saved after each run. Raises BenchError when one fails."""
    for position, count in enumerate(options.nodes):
        scored = position == 0 and not options.no_score
        say(f"{count} fresh nodes for each side")
        warm = position == 0 and not options.cold
        with fresh(count, scored, warm, options) as bench:
            for side in SIDES if warm else ():
                say(f"{side}, once, for its packages")
                bench.warm(side)
            for side in SIDES:
                for run in RUNS:
                    say(f"{side}, {run} run on {count}")
                    measured = results.runs[count, side, run] = bench.measure(side, run)
                    save()
                    if measured.work.failures:
                        raise BenchError(f"{side}, {run} run on {count}: " + "\n  ".join(measured.work.failures[:5]))
            results.floors[count] = bench.floor()
            for run in RUNS:
                print(compared(count, run, results), flush=True)
            print(rest(count, results), flush=True)
            if scored:
                bench.score(results)
            save()
    if options.machine:
        score_on_a_machine(options, results)
        save()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parser().parse_args(argv)
    options.peer = options.peer.resolve()
    try:
        found = problem(options)
        if found:
            raise Refusal(found)
        trial.refuse_beside_another()
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return EXIT_BAD_INPUT
    results = Results(about(options))
    print(
        f"censuschat.infra.hardening, profile {options.profile}, against devsec.hardening "
        f"{results.about['peer']['version']}; forks {options.forks}, {os.cpu_count()} cores",
        flush=True,
    )
    file = options.json or cache() / "bench" / time.strftime("hardening-%Y%m%dT%H%M%SZ.json", time.gmtime())
    file.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        nodes.write(file, json.dumps(results.to_dict(), indent=1) + "\n")

    try:
        measure(options, results, save)
    except (*FAILURES, subprocess.SubprocessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if results.runs:
            print(f"the figures so far are in {file}", file=sys.stderr)
        return EXIT_FAILED
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        so_far = f"; the figures so far are in {file}" if results.runs else ""
        print(f"interrupted; the nodes are removed{so_far}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(summary(results))
    print(f"all figures: {file}")
    return EXIT_FAILED if results.missed() else 0


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of."""
    return {
        "benchmark": "hardening",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "profile": options.profile,
        "forks": options.forks,
        "packages": "as the lab's cache has them" if options.cold else "in the lab's cache",
        "peer": {"version": figures.peer_version(options.peer), "variables": peer_variables(options)},
    }


if __name__ == "__main__":
    sys.exit(main())
