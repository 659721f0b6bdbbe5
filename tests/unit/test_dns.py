"""The lab's DNS: replies as cases (data/dns/cases.yml), then the real servers on loopback with a real resolver."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import dns.message
import dns.query
import dns.rcode
import pytest
import yaml

from lab import aws
from lab import dns as lab_dns
from lab.resolve import Names, UnresolvedError

DATA: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "data/dns/cases.yml").read_text())
ROOT = Path(aws.__file__).parent.parent


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: " ".join(case["ask"]))
def test_answer(case: dict[str, Any]) -> None:
    zones = [lab_dns.zone_of(zone["name"], zone["records"]) for zone in DATA["zones"]]
    reply = lab_dns.answer(zones, *case["ask"])
    assert reply.rcode == case["rcode"]
    assert [[r.name, r.type, r.ttl, *r.values] for r in reply.answer] == case.get("answer", [])
    assert [r.type for r in reply.authority] == case.get("authority", [])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(module: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline(), f"{module} said nothing and ended with {process.wait()}"
    return process


def ended(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    code = process.wait(10)
    assert process.stdout is not None
    process.stdout.close()
    return code


class Lab:
    """A moto server and the DNS that answers from it, on free ports."""

    def __init__(self) -> None:
        self.aws_port, self.dns_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self.aws_port}"
        self.aws = started("lab.aws", "--port", str(self.aws_port))
        self.dns = started("lab.dns", "--port", str(self.dns_port), "--endpoint", self.endpoint)
        self.route53 = boto3.client(
            "route53",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="lab",
            aws_secret_access_key="lab",
        )
        self.zone = self.route53.create_hosted_zone(Name="censuschat.test", CallerReference="1")["HostedZone"]["Id"]

    def point(self, ttl: int, *addresses: str) -> None:
        record = {
            "Name": "app.censuschat.test",
            "Type": "A",
            "TTL": ttl,
            "ResourceRecords": [{"Value": address} for address in addresses],
        }
        self.route53.change_resource_record_sets(
            HostedZoneId=self.zone,
            ChangeBatch={"Changes": [{"Action": "UPSERT", "ResourceRecordSet": record}]},
        )

    def query(self, name: str, kind: str = "A", *, tcp: bool = False) -> dns.message.Message:
        question = dns.message.make_query(name, kind)
        ask: Callable[..., dns.message.Message] = dns.query.tcp if tcp else dns.query.udp
        return ask(question, "127.0.0.1", port=self.dns_port, timeout=3)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    assert ended(lab.dns) == 0
    if lab.aws.poll() is None:
        assert ended(lab.aws) == 0


def test_a_client_follows_a_record_change_within_its_ttl(lab: Lab) -> None:
    names = Names(port=lab.dns_port)
    lab.point(1, "10.77.1.11", "10.77.1.12")
    time.sleep(lab_dns.FRESH_S)
    assert names.addresses("app.censuschat.test") == ["10.77.1.11", "10.77.1.12"]
    changed = time.monotonic()
    lab.point(1, "10.77.2.11")
    assert names.addresses("app.censuschat.test") == ["10.77.1.11", "10.77.1.12"], "the TTL still runs"
    while names.addresses("app.censuschat.test") != ["10.77.2.11"]:
        assert time.monotonic() - changed < 1 + lab_dns.FRESH_S + 0.5
        time.sleep(0.01)


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_what_a_stub_resolver_sees(lab: Lab, tcp: bool) -> None:
    lab.point(5, "10.77.1.11")
    time.sleep(lab_dns.FRESH_S)
    reply = lab.query("app.censuschat.test", tcp=tcp)
    assert reply.rcode() == dns.rcode.NOERROR
    assert reply.answer[0].ttl == 5
    assert [item.to_text() for item in reply.answer[0]] == ["10.77.1.11"]
    assert reply.flags & dns.flags.AA
    assert not reply.flags & dns.flags.RA
    assert lab.query("none.censuschat.test", tcp=tcp).rcode() == dns.rcode.NXDOMAIN
    assert lab.query("app.censuschat.test", "AAAA", tcp=tcp).rcode() == dns.rcode.NOERROR
    assert lab.query("example.org", tcp=tcp).rcode() == dns.rcode.REFUSED


def test_no_answer_from_route_53_is_servfail_and_heals(lab: Lab) -> None:
    lab.point(5, "10.77.1.11")
    lab.aws.send_signal(signal.SIGSTOP)
    try:
        time.sleep(lab_dns.FRESH_S)
        assert lab.query("app.censuschat.test").rcode() == dns.rcode.SERVFAIL
        with pytest.raises(UnresolvedError, match="SERVFAIL"):
            Names(port=lab.dns_port, timeout_s=3).addresses("app.censuschat.test")
    finally:
        lab.aws.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 5
    while lab.query("app.censuschat.test").rcode() != dns.rcode.NOERROR:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_second_server_on_the_port_says_so(lab: Lab) -> None:
    for module, port in (("lab.aws", lab.aws_port), ("lab.dns", lab.dns_port)):
        second = subprocess.run(
            [sys.executable, "-m", module, "--port", str(port)], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
        assert second.returncode == 1
        assert f"127.0.0.1:{port} cannot be bound" in second.stderr


@pytest.mark.parametrize("module", ["lab.aws", "lab.dns"])
def test_only_loopback_is_served(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--address", "0.0.0.0"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "'0.0.0.0' is not a loopback address" in result.stderr
