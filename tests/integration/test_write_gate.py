"""The kernel's part of the write lease in network namespaces of its own: the real nft, real sessions, real time."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.lease.gate import TABLE, Gate, GateRules, run

SERVER, CLIENT, PEER = "192.0.2.1", "192.0.2.2", "192.0.2.3"
PORT = 5432
# How long an armed generation lives in these tests, in seconds.
LIFE_S = 1.0
# What a loaded machine may add to a moment that a process of the test sees, in seconds.
SLACK_S = 0.3

# Answers what it is sent with itself. A session that begins with "talk" is sent numbered lines until it breaks, and one
# that begins with "late" one line after two seconds. All it hears is kept in the file it is given.
SERVER_PROGRAM = """
import pathlib, socket, sys, threading, time
heard = pathlib.Path(sys.argv[1]).open("wb", buffering=0)
def serve(conn):
    try:
        first = conn.recv(100)
        heard.write(first)
        number = 0
        while first.startswith(b"talk"):
            number += 1
            conn.sendall(b"%d\\n" % number)
            time.sleep(0.02)
        if first.startswith(b"late"):
            time.sleep(2)
        while first:
            conn.sendall(first)
            first = conn.recv(100)
            heard.write(first)
    except OSError:
        pass
listener = socket.create_server(("0.0.0.0", 5432))
print("listening", flush=True)
while True:
    conn, _ = listener.accept()
    threading.Thread(target=serve, args=(conn,), daemon=True).start()
"""


class Place:
    """The server's namespace with its gate, and the client's beside it."""

    def __init__(self, server: str, client: str, memory: pathlib.Path) -> None:
        self.server, self.client = server, client
        inside = ("ip", "netns", "exec", server)
        self.gate = Gate(
            GateRules(PORT, (PEER,)), LIFE_S, memory, runner=lambda argv, text: run((*inside, *argv), text)
        )
        self.gate.load()

    def open(self) -> float:
        """Open the gate; the instant before the generation was armed."""
        began = time.monotonic()
        self.gate.confirm(self.gate.arm())
        return began

    def connect(self, address: str = SERVER, source: str = "", inside: str = "") -> socket.socket:
        """A session to the server from the client's namespace (or the one named), with short timeouts."""
        sock = _socket_in(inside or self.client)
        sock.settimeout(2)
        if source:
            sock.bind((source, 0))
        try:
            sock.connect((address, PORT))
        except OSError:
            sock.close()
            raise
        return sock


def _socket_in(namespace: str) -> socket.socket:
    """A socket belongs to the network namespace its thread was in when it was made."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        os.setns(there, os.CLONE_NEWNET)
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)
        os.close(there)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def place(tmp_path: pathlib.Path) -> Iterator[Place]:
    tag = f"{os.getpid() % 100000}"
    server, client = f"censusgate-s{tag}", f"censusgate-c{tag}"
    with contextlib.ExitStack() as stack:
        for name in (server, client):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", server, "link", "add", "leg", "type", "veth", "peer", "name", "leg", "netns", client)
        for name, addresses in ((server, [SERVER]), (client, [CLIENT, PEER])):
            for address in addresses:
                ip("-n", name, "address", "add", f"{address}/24", "dev", "leg")
            ip("-n", name, "link", "set", "leg", "up")
        program = subprocess.Popen(
            ["ip", "netns", "exec", server, sys.executable, "-c", SERVER_PROGRAM, str(tmp_path / "heard")],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(program.wait)
        stack.callback(program.kill)
        assert program.stdout is not None
        assert program.stdout.readline() == "listening\n"
        yield Place(server, client, tmp_path / "gate.json")


def echo(session: socket.socket, text: bytes = b"hello") -> bytes:
    session.sendall(text)
    return session.recv(100)


def assert_refused(place: Place, **how: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        place.connect(**how)


def test_a_new_gate_is_closed_on_the_network_and_on_loopback(place: Place) -> None:
    assert_refused(place)
    assert_refused(place, address="127.0.0.1", inside=place.server)
    assert_refused(place, address=SERVER, inside=place.server)
    assert not place.gate.is_open()


def test_an_armed_generation_alone_opens_nothing(place: Place) -> None:
    place.gate.arm()
    assert_refused(place)
    assert_refused(place, address="127.0.0.1", inside=place.server)
    assert not place.gate.is_open()


def test_a_packet_cannot_bring_an_armed_generation_as_its_own_mark(place: Place, tmp_path: pathlib.Path) -> None:
    place.open()
    with place.connect(address="127.0.0.1", inside=place.server) as session:
        assert echo(session, b"before") == b"before"
        place.gate.shut()
        # Over loopback a packet keeps the mark its sender gave it.
        session.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, place.gate.arm())
        with pytest.raises(ConnectionResetError):
            echo(session, b"after")
    assert (tmp_path / "heard").read_bytes() == b"before"


def test_a_confirmed_generation_opens_until_it_runs_out(place: Place) -> None:
    began = place.open()
    with place.connect() as session, place.connect(address="127.0.0.1", inside=place.server) as local:
        assert echo(session) == b"hello"
        assert echo(local) == b"hello"
        assert place.gate.is_open()
        answered = began
        with pytest.raises(ConnectionResetError):
            for _ in itertools.count():
                assert echo(session) == b"hello"
                answered = time.monotonic()
                time.sleep(0.01)
        assert LIFE_S - SLACK_S < answered - began < LIFE_S + SLACK_S
        with pytest.raises(ConnectionResetError):
            echo(local)
    assert not place.gate.is_open()
    assert_refused(place)


def test_renewed_generations_keep_one_session_alive(place: Place) -> None:
    place.open()
    with place.connect() as session:
        end = time.monotonic() + 3 * LIFE_S
        while time.monotonic() < end:
            place.open()
            assert echo(session) == b"hello"
            time.sleep(0.2)


def test_what_the_server_says_after_the_end_reaches_nobody(place: Place) -> None:
    began = place.open()
    with place.connect() as session:
        session.sendall(b"talk")
        session.settimeout(0.6)
        heard_at = began
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while session.recv(100):
                heard_at = time.monotonic()
        assert LIFE_S - SLACK_S < heard_at - began < LIFE_S + SLACK_S
        # The server's end is gone too: the client's next word is answered with a reset.
        session.settimeout(2)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(10):
                session.sendall(b"still there?")
                if not session.recv(100):
                    break
                time.sleep(0.05)


def test_an_answer_that_is_ready_only_after_the_end_is_not_delivered(place: Place) -> None:
    place.open()
    with place.connect() as session:
        session.sendall(b"late")
        session.settimeout(2 + SLACK_S)
        # The client says nothing meanwhile, so only the way out can stop this answer.
        with pytest.raises(TimeoutError):
            session.recv(100)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            echo(session)


def test_a_confirmation_that_comes_after_the_end_opens_nothing(place: Place) -> None:
    generation = place.gate.arm()
    time.sleep(LIFE_S + SLACK_S)
    place.gate.confirm(generation)
    assert_refused(place)
    assert not place.gate.is_open()


def test_a_late_confirmation_gets_only_what_is_left_of_its_time(place: Place) -> None:
    began = time.monotonic()
    generation = place.gate.arm()
    time.sleep(LIFE_S * 0.6)
    place.gate.confirm(generation)
    with place.connect() as session:
        answered = began
        with pytest.raises(ConnectionResetError):
            for _ in itertools.count():
                echo(session)
                answered = time.monotonic()
                time.sleep(0.01)
    assert answered - began < LIFE_S + SLACK_S


def test_shutting_ends_at_once_and_ending_sessions_tells_an_idle_client(place: Place) -> None:
    place.open()
    with place.connect() as idle, place.connect() as busy:
        assert echo(idle) == b"hello"
        assert echo(busy) == b"hello"
        place.gate.shut()
        with pytest.raises(ConnectionResetError):
            echo(busy)
        place.gate.end_sessions()
        idle.settimeout(SLACK_S)
        with pytest.raises(ConnectionResetError):
            idle.recv(100)
    assert_refused(place)


def test_peers_pass_a_closed_gate_and_keep_their_sessions(place: Place) -> None:
    with place.connect(source=PEER) as peer:
        assert echo(peer) == b"hello"
        place.gate.shut()
        place.gate.end_sessions()
        assert echo(peer) == b"hello"
    assert_refused(place)


def test_a_flushed_ruleset_is_noticed_and_put_back_closed(place: Place) -> None:
    place.open()
    assert place.gate.intact()
    run(("ip", "netns", "exec", place.server, "nft", "flush", "ruleset"))
    assert not place.gate.intact()
    place.gate.load()
    assert place.gate.intact()
    assert_refused(place)


@pytest.mark.parametrize(
    "change",
    [
        f"insert rule {TABLE} towards accept",
        f"delete rule {TABLE} from handle 0",
        f"add element {TABLE} confirmed {{ 9999 : 1 }}",
    ],
    ids=["a rule added", "a rule removed", "an element added"],
)
def test_changed_rules_are_noticed_and_changed_elements_are_not_rules(place: Place, change: str) -> None:
    inside = ("ip", "netns", "exec", place.server, "nft")
    if "handle" in change:
        listing = run((*inside, "-a", "list", "chain", *TABLE.split(), "from"))
        handle = next(line.rsplit(" ", 1)[1] for line in listing.splitlines() if "reject" in line)
        change = change.replace("handle 0", f"handle {handle}")
    run((*inside, "-f", "-"), change + "\n")
    assert place.gate.intact() is ("element" in change)


def test_a_restarted_guard_takes_over_its_own_open_gate_and_no_other(place: Place) -> None:
    place.open()
    with place.connect() as session:
        assert echo(session) == b"hello"
        runner = place.gate._runner
        again = Gate(place.gate.rules, LIFE_S, place.gate.memory, runner)
        assert again.adopt()
        assert echo(session) == b"hello"
        # A generation of the new guard is none of the old one's.
        armed, _ = again.elements()
        assert again.arm() not in armed
        other = Gate(GateRules(PORT, (PEER, CLIENT)), LIFE_S, place.gate.memory, runner)
        assert not other.adopt()
        assert not other.is_open()
