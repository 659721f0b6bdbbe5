"""The main job and the way back, on a lab of their own; what is asserted is what the clients' ledgers say.

The tests of this module run in order: each leaves the lab as the next one needs it.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import demo, probe, topology
from lab.paths import REPO, STATE
from runbooks import ledger
from tests.nodes import call, faked_clock, guard_settings, on, signal_guards

INVENTORY = "inventories/lab"
PRIMARY, SECONDARY = "us-east-1", "us-west-2"
LAB = [sys.executable, "-m", "lab"]
RUNBOOK = [sys.executable, "-m", "runbooks"]


def runs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(call(*RUNBOOK, "runs", "-i", INVENTORY, "--json").stdout)
    return found


def records() -> list[ledger.Record]:
    return ledger.read_all((STATE / "ledgers").glob("*.jsonl"))


def acks_by(region: str, since: float) -> list[ledger.Record]:
    return [r for r in records() if r.kind == "ack" and r.region == region and r.t > since]


def wait_for_acks(region: str, seconds: float) -> None:
    """Until an outside client is served by the region."""
    since, deadline = time.monotonic(), time.monotonic() + seconds
    while not any(r.side == ledger.OUTSIDE for r in acks_by(region, since)):
        assert time.monotonic() < deadline, f"no outside client was served by {region} within {seconds:.0f} s"
        time.sleep(0.5)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """A fresh lab with the whole environment on it."""
    demo.build(INVENTORY, small=False)
    yield
    call(*LAB, "probe", "stop", check=False)


@pytest.fixture(scope="module")
def lost_region() -> demo.Outcome:
    """The main job: the primary region is lost under load and the runbook brings the service back."""
    return demo.lose_and_fail_over(INVENTORY, PRIMARY)


def test_main_job_meets_the_targets(lost_region: demo.Outcome) -> None:
    figures = ledger.measure(records(), to_region=SECONDARY)
    targets = lost_region.report["targets"]
    assert lost_region.code == 0
    assert figures.two_writers_ms == 0
    assert figures.rto_s is not None
    assert figures.rto_s < targets["rto_critical_s"]
    assert figures.database_gap_s is not None
    assert figures.database_gap_s < targets["rto_database_s"]
    assert figures.rpo_s is not None
    assert figures.rpo_s < targets["rpo_s"]
    # The report says what the ledgers say, no more and no less.
    assert lost_region.report["figures"]["rto_s"] == pytest.approx(figures.rto_s, abs=0.001)
    assert lost_region.report["figures"]["lost_acknowledged"] == figures.lost_acknowledged


def test_writers_on_both_sides_wrote_through_the_cut(lost_region: demo.Outcome) -> None:
    """Without acknowledgements inside the cut region, "0 ms with two writers" would prove nothing."""
    inside = [r for r in records() if r.side == PRIMARY and r.kind == "ack" and r.t > lost_region.cut_t]
    assert inside, "no client inside the cut region was served after the cut"
    first_new = min(r.t for r in acks_by(SECONDARY, lost_region.cut_t))
    assert max(r.t for r in inside) < first_new
    assert any(r.side == SECONDARY for r in acks_by(SECONDARY, lost_region.cut_t))


def test_returned_region_acknowledges_nothing(lost_region: demo.Outcome) -> None:
    """The session that was open before the cut, and new ones, after the region has healed."""
    first_new = min(r.t for r in acks_by(SECONDARY, lost_region.cut_t))
    assert [r for r in acks_by(PRIMARY, first_new) if r.timeline is not None] == []
    tries = [r for r in records() if r.side == PRIMARY and r.kind == "fail" and r.t > lost_region.healed_t]
    assert tries, "no client inside the healed region tried to write"


def test_the_second_region_runs_the_application_in_full(lost_region: demo.Outcome) -> None:
    """Each application node leads to it, and as many pods of each service are available as there are nodes."""
    nodes = [n for n in topology.load(REPO / INVENTORY).nodes if n.site == SECONDARY and n.role == "app"]
    service = probe.service_of(REPO / INVENTORY)
    for node in nodes:
        with urllib.request.urlopen(f"http://{node.address}:{service.port}/readyz", timeout=10) as answer:
            assert json.load(answer)["region"] == SECONDARY
    script = "kubectl --kubeconfig /etc/kubernetes/admin.conf -n production-api get deployments -o json"
    items = json.loads(on(nodes[0].name, script))["items"]
    available = {item["metadata"]["name"]: item["status"].get("availableReplicas") for item in items}
    assert available == {"api-gateway": len(nodes), "query": len(nodes)}


def test_report_page_is_self_contained(lost_region: demo.Outcome) -> None:
    page = Path(lost_region.report["paths"]["html"]).read_text()
    assert "us-west-2" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_fail_back_loses_nothing(lost_region: demo.Outcome) -> None:
    call(*LAB, "probe", "start", "--all")
    wait_for_acks(SECONDARY, 30)
    before = time.monotonic()
    call(*RUNBOOK, "run", "fail-back", "-i", INVENTORY, "--yes")
    wait_for_acks(PRIMARY, 60)
    time.sleep(3)
    call(*LAB, "probe", "stop")
    call(*LAB, "probe", "readback")
    figures = ledger.measure(records(), start=before - 10, to_region=PRIMARY)
    assert figures.lost_acknowledged == 0
    assert figures.two_writers_ms == 0
    assert figures.rto_s is not None


def new_run(known: set[str]) -> dict[str, Any] | None:
    """The run that was begun since, once its first step has; runs() knows it from then on."""
    return next((r for r in runs() if r["run"] not in known), None)


def steps(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(*RUNBOOK, "status", run, "--json").stdout)["steps"]
    return found


def test_killed_after_promotion_and_resumed_promotes_once(lost_region: demo.Outcome) -> None:
    """SIGKILL of the runbook between promotion and the record change; `resume` finishes, the database forks once."""
    call(*LAB, "probe", "start", "--all")
    wait_for_acks(PRIMARY, 30)
    before = max(r.timeline for r in acks_by(PRIMARY, 0) if r.timeline)
    known = {r["run"] for r in runs()}
    cut = time.monotonic()
    call(*LAB, "cut", PRIMARY)
    process = subprocess.Popen(
        [*RUNBOOK, "run", "fail-over", "-i", INVENTORY, "--yes"],
        cwd=REPO,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    begun = None
    while begun is None or steps(begun["run"]).get("promote", {}).get("outcome") != "ok":
        assert time.monotonic() < deadline, "the run did not get through its promotion within 120 s"
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        time.sleep(0.1)
        begun = begun or new_run(known)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run = begun["run"]
    assert steps(run).get("route", {}).get("outcome") is None, "the run was killed too late to prove anything"
    assert json.loads(call(*RUNBOOK, "status", run, "--json").stdout)["shown_state"] == "dead"
    refused = call(*RUNBOOK, "run", "fail-over", "-i", INVENTORY, "--yes", check=False)
    assert refused.returncode == 3
    assert f"runbook resume {run}" in refused.stderr

    call(*RUNBOOK, "resume", run)
    wait_for_acks(SECONDARY, 60)
    # One promotion is one new timeline; a second one would have acknowledged on the next.
    assert {r.timeline for r in acks_by(SECONDARY, cut)} == {before + 1}
    return_to_primary(cut)


def return_to_primary(since: float) -> None:
    """Heal, fail back, and judge all ledgers since the cut: at no moment did both regions acknowledge."""
    call(*LAB, "heal", PRIMARY)
    call(*RUNBOOK, "run", "fail-back", "-i", INVENTORY, "--yes")
    wait_for_acks(PRIMARY, 60)
    call(*LAB, "probe", "stop")
    assert ledger.measure(records(), start=since - 5).two_writers_ms == 0


FAKED_CLOCK = "/run/censuschat-test-clock"
GUARD_FAULTS = {
    # systemd's watchdog off: else it replaces a frozen guard, and the kernel's switch is not what is tried.
    "frozen": ("WatchdogSec=0",),
    "clock jumps": faked_clock(FAKED_CLOCK),
}


@pytest.mark.parametrize("fault", GUARD_FAULTS)
def test_one_writer_at_a_time_whatever_befalls_the_guards(fault: str, lost_region: demo.Outcome) -> None:
    """The region is lost while its guards are frozen, or while their wall clocks jump; clients write on both sides."""
    guarded = [n.name for n in topology.load(REPO / INVENTORY).nodes if n.site == PRIMARY and n.role == "db"]

    def clocks(offset: str) -> None:
        for node in guarded:
            on(node, f"echo {offset} > {FAKED_CLOCK}")

    clocks("+0")
    with guard_settings(guarded, *GUARD_FAULTS[fault]):
        try:
            call(*LAB, "probe", "start", "--all")
            wait_for_acks(PRIMARY, 60)
            time.sleep(3)
            if fault == "frozen":
                signal_guards(guarded, "STOP")
            call(*LAB, "cut", PRIMARY)
            cut = time.monotonic()
            if fault == "clock jumps":
                clocks("-50m")
            call(*RUNBOOK, "run", "fail-over", "-i", INVENTORY, "--yes")
            wait_for_acks(SECONDARY, 60)
            inside = [r.t for r in acks_by(PRIMARY, cut) if r.side == PRIMARY]
            assert inside, "no client inside the cut region was served after the cut"
            assert max(inside) < min(r.t for r in acks_by(SECONDARY, cut))
        finally:
            signal_guards(guarded, "CONT")
    for node in guarded:
        on(node, f"rm -f {FAKED_CLOCK}")
    return_to_primary(cut)


def leaks(text: str, secrets: dict[str, str]) -> set[str]:
    """Names of the secrets in a text, as they are or as the API of Kubernetes carries them."""
    return {n for n, v in secrets.items() if v in text or base64.b64encode(v.encode()).decode() in text}


def test_no_secret_was_written_down_or_shown(lost_region: demo.Outcome) -> None:
    """After all of the above: no password in a journal, ledger, report, log or process list, here or on a node."""
    secrets = {f.name: f.read_text().strip() for f in (STATE / "secrets").iterdir() if f.is_file()}
    assert len(secrets) >= 3
    found = {}
    for path in (p for d in ("runs", "ledgers", "log") for p in (STATE / d).rglob("*") if p.is_file()):
        if names := leaks(path.read_bytes().decode(errors="replace"), secrets):
            found[str(path)] = names
    if names := leaks(call("ps", "axww", "-o", "args").stdout, secrets):
        found["process list"] = names
    nodes = call("podman", "ps", "--filter", "label=censuschat.lab=true", "--format", "{{.Names}}").stdout.split()
    assert len(nodes) == 13
    for node in nodes:
        # With the audit log of the API server and what the pods said.
        logs = "journalctl --no-pager; find -L /var/log -name '*.log' -exec cat {} +"
        if names := leaks(call("podman", "exec", node, "sh", "-c", logs, check=False).stdout, secrets):
            found[node] = names
    assert found == {}
