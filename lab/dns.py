"""The lab's DNS: a real server on loopback that answers from the records of the lab's Route 53, and nothing else.

``python -m lab.dns`` serves UDP and TCP in the foreground until SIGTERM. An answer carries the record's own TTL; a
change in Route 53 is visible in at most ``FRESH_S``. It never asks another server: a name outside its zones is refused,
a name that a zone does not have is NXDOMAIN, and while Route 53 cannot be asked the answer is SERVFAIL.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from dnslib import CLASS, QTYPE, RCODE, RR, DNSRecord
from dnslib.dns import OPCODE
from dnslib.server import DNSHandler, DNSLogger, DNSServer

from lab.aws import CREDENTIALS, ENDPOINT, loopback

ADDRESS = "127.0.0.1"
PORT = 15353
FRESH_S = 0.25
"""Seconds for which records read from Route 53 are used again."""
UDP_SIZE = 1232
"""Bytes of the longest answer over UDP (the size DNS Flag Day 2020 settled on); longer ones are truncated."""
TYPES = ("A", "AAAA", "CNAME", "MX", "NS", "SOA", "SRV", "TXT", "CAA", "PTR")


class Unanswerable(Exception):
    """Records that this server would answer wrongly; says which and why."""


@dataclass(frozen=True, slots=True)
class RecordSet:
    """One name and type: values as in a zone file, ttl in seconds."""

    name: str
    type: str
    ttl: int
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Zone:
    """A hosted zone. unanswerable: record sets that need what this server does not do (aliases, routing policies)."""

    name: str
    records: tuple[RecordSet, ...]
    unanswerable: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer: rcode by name, the record sets of the answer and of the authority section."""

    rcode: str
    answer: tuple[RecordSet, ...] = ()
    authority: tuple[RecordSet, ...] = ()
    authoritative: bool = True


def plain(name: str) -> str:
    """A domain name to compare: lower case, without the last dot."""
    return name.rstrip(".").lower()


def answer(zones: Sequence[Zone], name: str, qtype: str) -> Reply:
    """The reply to one question. Pure."""
    name = plain(name)
    owners = [z for z in zones if name == z.name or name.endswith("." + z.name)]
    if not owners:
        return Reply("REFUSED", authoritative=False)
    zone = max(owners, key=lambda z: len(z.name))
    soa = tuple(r for r in zone.records if r.name == zone.name and r.type == "SOA")
    found: list[RecordSet] = []
    for _ in range(8):
        if (name, qtype) in zone.unanswerable or (name, "CNAME") in zone.unanswerable:
            return Reply("SERVFAIL")
        own = [r for r in zone.records if r.name == name]
        match = [r for r in own if qtype in ("ANY", r.type)]
        alias = next((r for r in own if r.type == "CNAME"), None)
        if match or alias is None:
            found += match
            break
        found.append(alias)
        name = plain(alias.values[0])
        if name != zone.name and not name.endswith("." + zone.name):
            return Reply("NOERROR", tuple(found))
    else:
        return Reply("SERVFAIL")
    if found and (match or own):
        return Reply("NOERROR", tuple(found), () if match else soa)
    # A name exists too when something below it does (RFC 8020).
    exists = bool(own) or any(r.name.endswith("." + name) for r in zone.records)
    return Reply("NOERROR" if exists else "NXDOMAIN", tuple(found), soa)


def zone_of(name: str, record_sets: Sequence[Mapping[str, Any]]) -> Zone:
    """A hosted zone from Route 53's answer to ListResourceRecordSets."""
    records: list[RecordSet] = []
    unanswerable: set[tuple[str, str]] = set()
    for each in record_sets:
        key = (plain(each["Name"]), str(each["Type"]))
        if "SetIdentifier" in each or "AliasTarget" in each or key[1] not in TYPES:
            unanswerable.add(key)
            continue
        values = tuple(_value(str(v["Value"])) for v in each.get("ResourceRecords", ()))
        records.append(RecordSet(key[0], key[1], int(each["TTL"]), values))
    return Zone(plain(name), tuple(records), frozenset(unanswerable))


def _value(text: str) -> str:
    """A record's value; moto 5.2 gives a zone's own SOA as the text of a Python dictionary around the value."""
    return text[len("{'Value': '") : -len("'}")] if text.startswith("{'Value': '") else text


def route53(endpoint: str) -> Callable[[], tuple[Zone, ...]]:
    """A function that reads all zones from Route 53; it raises what boto3 raises when there is no answer in 1 s."""
    import boto3  # half a second, not for those who only want `answer`
    from botocore.config import Config

    client = boto3.client(
        "route53",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        config=Config(connect_timeout=1, read_timeout=1, retries={"total_max_attempts": 1}),
    )

    def read() -> tuple[Zone, ...]:
        zones = [z for page in client.get_paginator("list_hosted_zones").paginate() for z in page["HostedZones"]]
        pages = client.get_paginator("list_resource_record_sets")
        return tuple(
            zone_of(z["Name"], [r for page in pages.paginate(HostedZoneId=z["Id"]) for r in page["ResourceRecordSets"]])
            for z in zones
        )

    return read


@dataclass
class Resolver:
    """Answers dnslib's requests from ``read``'s zones, read again when older than ``fresh_s``."""

    read: Callable[[], tuple[Zone, ...]]
    fresh_s: float = FRESH_S
    log: Callable[[str], None] = print
    _zones: tuple[Zone, ...] = ()
    _read_at: float = float("-inf")
    _said: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def zones(self) -> tuple[Zone, ...]:
        """The zones, at most ``fresh_s`` old."""
        with self._lock:
            if time.monotonic() - self._read_at > self.fresh_s:
                asked = time.monotonic()
                self._zones = self.read()
                self._read_at = asked
            return self._zones

    def resolve(self, request: Any, _handler: Any) -> Any:
        """dnslib's entry: one request, one reply."""
        reply = request.reply(ra=0, aa=0)
        if request.header.opcode != OPCODE.QUERY or len(request.questions) != 1:
            reply.header.rcode = RCODE.NOTIMP
            return reply
        name, qtype = str(request.q.qname), QTYPE.get(request.q.qtype)
        if request.q.qclass != CLASS.IN:
            reply.header.rcode = RCODE.REFUSED
            return reply
        try:
            result = answer(self.zones(), name, qtype)
            for section, add in ((result.answer, reply.add_answer), (result.authority, reply.add_auth)):
                for record in section:
                    add(*_to_wire(record))
        except Exception as error:  # whatever is wrong with the records or their source, a client gets an answer
            result, reply = Reply("SERVFAIL", authoritative=False), request.reply(ra=0, aa=0)
            self._say(f"{name} {qtype}", f"SERVFAIL: {error}")
        else:
            self._say(f"{name} {qtype}", " ".join([result.rcode, *(v for r in result.answer for v in r.values)]))
        reply.header.rcode = getattr(RCODE, result.rcode)
        reply.header.aa = int(result.authoritative)
        return reply

    def _say(self, question: str, outcome: str) -> None:
        """Log an outcome when it changed, so that the log is the history of what clients were told."""
        if self._said.get(question) != outcome:
            self._said[question] = outcome
            self.log(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {time.monotonic():.3f} {question}: {outcome}")


def _to_wire(record: RecordSet) -> list[Any]:
    if not record.values:
        raise Unanswerable(f"{record.name} {record.type} has no values")
    # dnslib's parser drops a last number that no newline follows.
    lines = "".join(f"{record.name}. {record.ttl} IN {record.type} {value}\n" for value in record.values)
    return list(RR.fromZone(lines))


def serve(resolver: Resolver, address: str, port: int) -> list[Any]:
    """Bind UDP and TCP and serve in threads; returns the two servers.

    Port 0 takes a port that is free for both. Raises OSError when the port is taken.
    """
    handler = type("Handler", (DNSHandler,), {"udplen": UDP_SIZE})
    logger = DNSLogger("error")
    for last in (*[False] * 20, True):
        servers = [DNSServer(resolver, address=address, port=port, logger=logger, handler=handler)]
        both = servers[0].server.server_address[1]
        try:
            servers.append(DNSServer(resolver, address=address, port=both, tcp=True, logger=logger, handler=handler))
            break
        except OSError:
            servers[0].server.server_close()
            if last or port:
                raise
    for server in servers:
        server.start_thread()
    return servers


def ask(name: str, address: str = ADDRESS, port: int = PORT, timeout_s: float = 1.0) -> Any:
    """One A question to the lab's DNS, for checks; raises OSError when there is no answer."""
    return DNSRecord.parse(DNSRecord.question(name).send(address, port, timeout=timeout_s))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 then, 1 when the port is taken."""
    parser = argparse.ArgumentParser(prog="python -m lab.dns", description="The lab's DNS, from its Route 53.")
    parser.add_argument("--address", type=loopback, default=ADDRESS)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--endpoint", default=ENDPOINT, help="where Route 53 is asked")
    arguments = parser.parse_args(argv)
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)

    def log(line: str) -> None:
        print(line, flush=True)

    try:
        servers = serve(Resolver(route53(arguments.endpoint), log=log), arguments.address, arguments.port)
    except OSError as error:
        print(f"error: {arguments.address}:{arguments.port} cannot be bound: {error}", file=sys.stderr)
        return 1
    print(f"DNS on {arguments.address}:{servers[0].server.server_address[1]} from {arguments.endpoint}", flush=True)
    ended.wait()
    for server in servers:
        server.stop()
        server.server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
