"""`scripts/bench failover`: a whole fail-over at the client's clock against the least it could cost.

The floor, measured beside each fail-over: the rest of the lease when the clients lost the region, a bare `pg_promote`
of a caught-up PostgreSQL standby on a node of the lab, one Route 53 record change, and the record's time to live (a
client that resolved just before the change asks again only then). The rest is ours, and is shown step by step.

Each repetition loses the region that writes and fails over to the other one, so the lab alternates between the two.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.lease.etcd import Etcd, EtcdError, Tls
from ansible_collections.censuschat.infra.plugins.module_utils.lease.store import LeaseStore

from lab import demo, topology
from lab.paths import REPO, STATE

INVENTORY = "inventories/lab"
VARIABLES = yaml.safe_load((REPO / INVENTORY / "group_vars/all/main.yml").read_text())
SETTLE_S = 8.0
"""Seconds of undisturbed writing between two repetitions."""


@dataclass
class Repetition:
    """Seconds of one fail-over."""

    lost: str
    ours_s: float
    lease_s: float
    promote_s: float
    record_s: float
    ttl_s: float
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def floor_s(self) -> float:
        return self.lease_s + self.promote_s + self.record_s + self.ttl_s


class LeaseWatch(threading.Thread):
    """Notes when the lease of the lost region was gone, as the lease store's members outside it say."""

    def __init__(self, lost: str) -> None:
        super().__init__(daemon=True)
        self.lost, self.gone_t = lost, None
        pki = STATE / "pki"
        witness = next(node for node in topology.load(REPO / INVENTORY).nodes if node.role == "witness")
        tls = Tls(str(pki / "ca.crt"), str(pki / f"{witness.name}.crt"), str(pki / f"{witness.name}.key"))
        self.store = LeaseStore(Etcd([f"https://{witness.address}:12379"], tls), VARIABLES["environment_name"])

    gone_t: float | None

    def run(self) -> None:
        while self.gone_t is None:
            try:
                lease = self.store.observe().lease
                if lease is None or lease.region != self.lost:
                    self.gone_t = time.monotonic()
            except EtcdError:
                pass  # the member is electing a leader without the lost one: ask again
            time.sleep(0.05)


def raw_promote(region: str) -> float:
    """Seconds that a bare pg_promote took on a database node of the region."""
    nodes = topology.load(REPO / INVENTORY).nodes
    node = next(n.name for n in nodes if n.site == region and n.role == "db")
    result = subprocess.run(
        [
            "ansible",
            node,
            "-i",
            INVENTORY,
            "-b",
            "-m",
            "ansible.builtin.script",
            "-a",
            "tests/benchmarks/raw_promote.sh",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    times = re.findall(r"Time: ([0-9.]+) ms", result.stdout)
    if not times:
        raise SystemExit(f"error: the bare pg_promote could not be measured:\n{result.stdout}{result.stderr}")
    return float(times[-1]) / 1000


def record_change() -> float:
    """Seconds of one record change, on a record of the benchmark's own."""
    client = boto3.client(
        "route53",
        endpoint_url=VARIABLES["aws_endpoint_url"],
        region_name="us-east-1",
        aws_access_key_id="lab",
        aws_secret_access_key="lab",
    )
    zone = next(
        z["Id"] for z in client.list_hosted_zones()["HostedZones"] if z["Name"] == VARIABLES["service_zone"] + "."
    )
    record = {
        "Name": "bench." + VARIABLES["service_zone"],
        "Type": "A",
        "TTL": VARIABLES["service_ttl"],
        "ResourceRecords": [{"Value": "10.77.0.2"}],
    }
    started = time.monotonic()
    change = client.change_resource_record_sets(
        HostedZoneId=zone, ChangeBatch={"Changes": [{"Action": "UPSERT", "ResourceRecordSet": record}]}
    )
    client.get_change(Id=change["ChangeInfo"]["Id"])
    took = time.monotonic() - started
    client.change_resource_record_sets(
        HostedZoneId=zone, ChangeBatch={"Changes": [{"Action": "DELETE", "ResourceRecordSet": record}]}
    )
    return took


def fail_over(lost: str) -> Repetition:
    """Lose the writing region, fail over, heal; measure both sides of the comparison."""
    other = next(r for r in VARIABLES["regions"] if r != lost)
    promote, record = raw_promote(other), record_change()
    time.sleep(SETTLE_S)
    watch = LeaseWatch(lost)
    demo.run(f"lose {lost}", [sys.executable, "-m", "lab", "cut", lost])
    watch.start()
    code = demo.run(
        "fail over", [sys.executable, "-m", "runbooks", "run", "fail-over", "-i", INVENTORY, "--yes"], check=False
    )
    time.sleep(VARIABLES["service_ttl"] + 2)
    demo.run(f"heal {lost}", [sys.executable, "-m", "lab", "heal", lost])
    if code not in (0, 1) or watch.gone_t is None:
        raise SystemExit(f"error: the fail-over ended with exit code {code}")
    report = demo.report(INVENTORY)
    outage = report["ledgers"]["outage_t"]
    return Repetition(
        lost=lost,
        ours_s=report["figures"]["rto_s"],
        lease_s=watch.gone_t - outage,
        promote_s=promote,
        record_s=record,
        ttl_s=float(VARIABLES["service_ttl"]),
        steps={step["id"]: step["elapsed_s"] for step in report["steps"]},
    )


def stand_by(region: str, writer: str) -> None:
    """Make the healed region the warm standby of the other one, as it was before the repetition."""
    for step, to in (("resynchronise", region), ("stand-down", writer)):
        demo.run(
            f"{step} for {to}",
            ["ansible-playbook", "-i", INVENTORY, f"runbooks/steps/{step}.yml", "-e", f"to={to}"],
        )


def main() -> int:
    """Print the comparison; the last line is `bench failover: ours_s=… floor_s=… ratio=…` (medians)."""
    parser = argparse.ArgumentParser(prog="scripts/bench failover", description="A fail-over against its floor.")
    parser.add_argument("--runs", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--keep-lab", action="store_true", help="on the lab that is up, instead of a fresh one")
    parser.add_argument("--json", type=Path, help="also write every repetition to this file")
    arguments = parser.parse_args()
    try:
        if not arguments.keep_lab:
            demo.build(INVENTORY, small=False)
        demo.run("start the clients", [sys.executable, "-m", "lab", "probe", "start", "--all"])
        rows = []
        lost = VARIABLES["region_primary"]
        for number in range(1, arguments.runs + 1):
            row = fail_over(lost)
            rows.append(row)
            print(f"run {number}: lost {lost}: ours {row.ours_s:.1f} s, floor {row.floor_s:.1f} s", flush=True)
            writer = next(r for r in VARIABLES["regions"] if r != lost)
            stand_by(lost, writer)
            lost = writer
    finally:
        demo.run("stop the clients", [sys.executable, "-m", "lab", "probe", "stop"], check=False)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    return 0


def show(rows: list[Repetition]) -> None:
    """Medians of the parts of the floor and of our steps, then the one line."""
    steps: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, seconds in row.steps.items():
            steps[name].append(seconds)
    print(f"\nmedians of {len(rows)} fail-overs, seconds")
    for title, values in (
        ("floor: rest of the lease", [r.lease_s for r in rows]),
        ("floor: bare pg_promote", [r.promote_s for r in rows]),
        ("floor: record change", [r.record_s for r in rows]),
        ("floor: record's time to live", [r.ttl_s for r in rows]),
        *((f"ours: step {name}", values) for name, values in steps.items()),
        ("ours above the floor", [r.ours_s - r.floor_s for r in rows]),
    ):
        print(f"  {title:<32} {statistics.median(values):7.2f}")
    ours, floor = statistics.median(r.ours_s for r in rows), statistics.median(r.floor_s for r in rows)
    print(f"bench failover: ours_s={ours:.1f} floor_s={floor:.1f} ratio={ours / floor:.2f}")


if __name__ == "__main__":
    sys.exit(main())
