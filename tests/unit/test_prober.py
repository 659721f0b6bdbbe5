"""The clients against the real gateway and query service on loopback addresses and a DNS whose record changes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import background, probe, prober
from lab import dns as lab_dns
from lab.resolve import Names
from lab.services import query
from runbooks import ledger
from tests.unit.services_in_memory import Memory, Region

SERVICE = "app.censuschat.test"


class World:
    """Two regions' services on 127.0.0.2 and 127.0.0.3, one table of rows, a record that points at one of them."""

    def __init__(self) -> None:
        self.store = Memory()
        self.stores = {"us-east-1": Memory(), "us-west-2": Memory()}
        self.addresses = {"us-east-1": "127.0.0.2", "us-west-2": "127.0.0.3"}
        for store in self.stores.values():
            store.rows = self.store.rows
        first = self._serve("us-east-1", 0)
        self.port = first.port
        self.regions = {"us-east-1": first, "us-west-2": self._serve("us-west-2", self.port)}
        self.ttl = 1
        self.record = ["127.0.0.2"]
        resolver = lab_dns.Resolver(self._zones, fresh_s=0, log=lambda _line: None)
        self.dns = lab_dns.serve(resolver, "127.0.0.1", 0)
        self.dns_port: int = self.dns[0].server.server_address[1]

    def _serve(self, name: str, port: int) -> Region:
        return Region(name, self.addresses[name], port, self.stores[name])

    def _zones(self) -> tuple[lab_dns.Zone, ...]:
        return (lab_dns.Zone("censuschat.test", (lab_dns.RecordSet(SERVICE, "A", self.ttl, tuple(self.record)),)),)

    def close(self) -> None:
        for region in self.regions.values():
            region.close()
        for server in self.dns:
            server.stop()
            server.server.server_close()

    def names(self) -> Names:
        return Names(port=self.dns_port)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


class Running:
    """A client that writes in a thread, with its ledger."""

    def __init__(self, world: World, path: Path, *, kept: bool) -> None:
        self.path = path
        self.name = "outside-kept" if kept else "outside-fresh"
        self.writer = ledger.LedgerWriter(path, self.name, "outside")
        self.client = prober.HttpClient(self.writer, world.names(), SERVICE, world.port, kept=kept)
        self.ending = threading.Event()
        self.thread = threading.Thread(
            target=prober.write_rows, args=(self.client, self.writer, 1, 100.0, self._sleep), daemon=True
        )
        self.thread.start()

    def _sleep(self, seconds: float) -> None:
        if self.ending.wait(seconds):
            raise prober.Ended

    def acks(self, region: str | None = None) -> list[ledger.Record]:
        return [r for r in ledger.read(self.path) if r.kind == "ack" and region in (None, r.region)]

    def until(self, what: Callable[[], bool], seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, ledger.read(self.path)[-5:]
            time.sleep(0.01)

    def stop(self) -> list[ledger.Record]:
        self.ending.set()
        self.thread.join(5)
        assert not self.thread.is_alive()
        self.writer.close()
        return ledger.read(self.path)


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
def test_a_client_follows_the_service_to_the_other_region(world: World, tmp_path: Path, kept: bool) -> None:
    client = Running(world, tmp_path / "a.jsonl", kept=kept)
    client.until(lambda: len(client.acks("us-east-1")) >= 5)
    world.stores["us-east-1"].broken = "the region lost the right to write"
    world.record = ["127.0.0.3"]
    client.until(lambda: len(client.acks("us-west-2")) >= 5)
    records = client.stop()
    numbers = [r.n for r in records if r.kind in ("ack", "fail")]
    assert numbers == list(range(1, len(numbers) + 1)), "each attempt has a number of its own"
    with ledger.LedgerWriter(tmp_path / "a.jsonl", client.name, "outside") as writer:
        writer.write("readback", found=world.store.numbers(client.name))
    figures = ledger.measure(ledger.read(tmp_path / "a.jsonl"))
    assert figures.rto_s is not None
    assert figures.rto_s < world.ttl + 1
    assert (figures.lost_acknowledged, figures.two_writers_ms) == (0, 0)


def test_a_kept_connection_stays_when_only_the_record_changes(world: World, tmp_path: Path) -> None:
    client = Running(world, tmp_path / "a.jsonl", kept=True)
    client.until(lambda: len(client.acks()) >= 5)
    world.record = ["127.0.0.3"]
    changed = time.monotonic()
    client.until(lambda: time.monotonic() > changed + world.ttl + 0.5)
    records = client.stop()
    assert {r.region for r in records if r.kind == "ack"} == {"us-east-1"}
    assert [r.kind for r in records].count("connect") == 1


def test_a_fresh_client_leaves_when_the_record_changes(world: World, tmp_path: Path) -> None:
    client = Running(world, tmp_path / "a.jsonl", kept=False)
    client.until(lambda: len(client.acks()) >= 5)
    world.record = ["127.0.0.3"]
    changed = time.monotonic()
    client.until(lambda: bool(client.acks("us-west-2")), world.ttl + 1)
    client.stop()
    assert time.monotonic() - changed < world.ttl + 1


def test_a_silent_address_costs_one_attempt_and_the_next_has_its_turn(world: World, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.4", world.port), backlog=16):
        world.record = ["127.0.0.4", "127.0.0.2"]
        client = Running(world, tmp_path / "a.jsonl", kept=False)
        client.until(lambda: len(client.acks()) >= 3)
        records = client.stop()
    first = next(r for r in records if r.kind == "fail")
    assert (first.n, first.address) == (1, "127.0.0.4")
    assert "timed out" in first.detail
    assert records[1].kind == "ack"
    assert 0.9 < records[1].t - records[0].t + prober.ATTEMPT_S < 2.5


def test_an_acknowledgement_of_another_row_is_none(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ledger.LedgerWriter(tmp_path / "a.jsonl", "outside-fresh", "outside") as writer:
        client = prober.HttpClient(writer, world.names(), SERVICE, world.port, kept=False)
        answer = query.Handler.reply

        def another(self: query.Handler, status: int, body: Any, *, close: bool = False) -> None:
            answer(self, status, {**body, "n": 9}, close=close)

        monkeypatch.setattr(query.Handler, "reply", another)
        with pytest.raises(prober.AttemptError, match="another row was acknowledged"):
            client.attempt(1)


def test_clients_run_in_the_background_and_are_measured(world: World, tmp_path: Path) -> None:
    service = probe.Service(SERVICE, world.port)
    (client,) = [p for p in probe.outside(service) if p.name == "outside-fresh"]
    client = probe.Prober(client.name, client.side, (*client.command, "--dns-port", str(world.dns_port)))
    path = tmp_path / "ledgers" / "outside-fresh.jsonl"
    assert probe.start_all([client], rate=50, keep=False, state=tmp_path) == ["outside-fresh"]
    deadline = time.monotonic() + 10
    while not path.exists() or sum(r.kind == "ack" for r in ledger.read(path)) < 5:
        assert time.monotonic() < deadline, probe.process("outside-fresh", tmp_path).tail()
        time.sleep(0.05)
    assert probe.start_all([client], rate=50, keep=False, state=tmp_path) == [], "it runs already"
    assert probe.running(tmp_path) == ["outside-fresh"]
    assert probe.stop_all(tmp_path) == ["outside-fresh"]
    assert probe.running(tmp_path) == []
    records = ledger.read(path)
    assert (records[0].kind, records[-1].kind) == ("start", "stop")
    count = probe.readback_all(service, tmp_path, world.names())["outside-fresh"]
    figures = ledger.measure(ledger.read(path))
    assert figures.acks >= 5
    assert count >= figures.acks
    assert (figures.lost_acknowledged, figures.rto_s) == (0, None)
    text = "\n".join(probe.lines(figures))
    assert "recovery time        not measured" in text
    assert "lost acknowledged    0" in text

    used = max(r.n for r in records if r.n is not None)
    probe.archive(tmp_path)
    assert probe.ledgers(tmp_path) == []
    assert probe.next_number("outside-fresh", tmp_path) > used
    assert probe.next_number("another", tmp_path) == 1


def test_a_pid_file_of_another_process_is_nobody(tmp_path: Path) -> None:
    other = background.Background("other", tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        other.pid_file.parent.mkdir(parents=True)
        started = background.start_time(process.pid)
        assert started is not None
        other.pid_file.write_text(f'{{"pid": {process.pid}, "start_time": {started - 1}}}')
        assert other.pid() is None
        assert other.stop() is False
        assert process.poll() is None, "it was not signalled"
        process.kill()
    assert background.start_time(os.getpid()) is not None


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    stubborn = background.Background("stubborn", tmp_path)
    assert stubborn.start([sys.executable, "-c", code])
    deadline = time.monotonic() + 5
    while stubborn.tail() != "up":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert stubborn.stop(timeout_s=0.2) is True
    assert stubborn.pid() is None
