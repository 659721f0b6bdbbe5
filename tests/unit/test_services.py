"""The gateway and the query service without data services: what they say, what they keep open, how they end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.programs.catalogue import catalogue, image_names
from lab.services import gateway, query, web
from tests.unit.services_in_memory import Memory, Region, Running

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region("us-east-1", "127.0.0.1", 0, Memory())
    yield region
    region.close()


@pytest.fixture(params=["gateway", "query"])
def client(request: pytest.FixtureRequest, region: Region) -> Iterator[http.client.HTTPConnection]:
    """A connection to each of the two: the gateway says what the query service says."""
    port = getattr(region, request.param).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    yield connection
    connection.close()


def ask(
    client: http.client.HTTPConnection, method: str, path: str, body: Any = None
) -> tuple[int, dict[str, Any], str | None]:
    client.request(method, path, None if body is None else json.dumps(body))
    response = client.getresponse()
    return response.status, json.loads(response.read()), response.getheader("Connection")


def test_a_row_is_written_once_and_listed(client: http.client.HTTPConnection) -> None:
    row = {"client": "outside-fresh", "n": 7}
    assert ask(client, "POST", "/rows", row) == (201, {**row, "region": "us-east-1", "timeline": 3}, None)
    assert ask(client, "POST", "/rows", row)[0] == 409
    assert ask(client, "GET", "/rows?client=outside-fresh") == (200, {"n": [7]}, None)
    assert ask(client, "GET", "/rows?client=nobody") == (200, {"n": []}, None)


def test_one_connection_serves_many_requests(client: http.client.HTTPConnection) -> None:
    client.connect()
    first = client.sock
    for n in range(1, 21):
        assert ask(client, "POST", "/rows", {"client": "c", "n": n})[0] == 201
    assert client.sock is first


def test_trouble_is_a_503_that_ends_the_connection(region: Region, client: http.client.HTTPConnection) -> None:
    region.store.broken = "database: connection refused"
    status, body, connection = ask(client, "POST", "/rows", {"client": "c", "n": 1})
    assert (status, body["error"], connection) == (503, "database: connection refused", "close")
    assert ask(client, "GET", "/readyz")[0] == 503
    assert ask(client, "GET", "/healthz") == (200, {"status": "ok", "region": "us-east-1"}, None)
    region.store.broken = None
    assert ask(client, "GET", "/readyz")[1] == {"status": "ready", "region": "us-east-1", "timeline": 3}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("POST", "/rows", {"client": "c"}), 400),
        (("POST", "/rows", {"client": "c", "n": "1"}), 400),
        (("POST", "/rows", {"client": "c", "n": True}), 400),
        (("POST", "/rows", {"client": "c", "n": 0}), 400),
        (("POST", "/rows", {"client": "c", "n": 2**63}), 400),
        (("POST", "/rows", {"client": "c; drop", "n": 1}), 400),
        (("POST", "/rows", {"client": "", "n": 1}), 400),
        (("POST", "/rows", ["c", 1]), 400),
        (("POST", "/rows", {"client": "c" * 5000, "n": 1}), 413),
        (("POST", "/row", {"client": "c", "n": 1}), 404),
        (("GET", "/rows", None), 400),
        (("GET", "/nothing", None), 404),
        (("DELETE", "/rows", None), 501),
    ],
)
def test_bad_requests_are_refused_and_touch_nothing(
    region: Region, client: http.client.HTTPConnection, request_: tuple[str, str, Any], status: int
) -> None:
    method, path, body = request_
    if status == 501:
        client.request(method, path)
        assert client.getresponse().status == status
    else:
        assert ask(client, method, path, body)[0] == status
    assert region.store.rows == {}


def test_a_body_without_a_length_is_refused(region: Region) -> None:
    with socket.create_connection(("127.0.0.1", region.port), timeout=5) as raw:
        raw.sendall(b"POST /rows HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 411 ")


class Connection:
    """A pair of sockets: what the pool holds, and the other end."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.closed = False

    def fileno(self) -> int:
        return self.ours.fileno()

    def close(self) -> None:
        self.closed = True
        self.ours.close()


def test_the_pool_reuses_and_drops_all_idle_connections_after_a_failure() -> None:
    made: list[Connection] = []

    def connect() -> Connection:
        made.append(Connection())
        return made[-1]

    pool = web.Pool(connect, 3, 0.05)
    with pool.connection() as a, pool.connection() as b:
        assert a is not b
    with pool.connection():
        assert len(made) == 2
    with pytest.raises(ValueError), pool.connection():
        raise ValueError
    assert [c.closed for c in made] == [True, True]
    with pool.connection() as c:
        assert not c.closed


def test_the_pool_does_not_reuse_a_connection_that_the_other_end_closed() -> None:
    pool = web.Pool(Connection, 3, 0.05)
    with pool.connection() as first:
        pass
    first.theirs.close()
    with pool.connection() as second:
        assert second is not first
    assert first.closed
    assert not second.closed


def test_a_busy_pool_refuses_in_time() -> None:
    pool = web.Pool(Connection, 1, 0.05)
    started = time.monotonic()
    with pool.connection(), pytest.raises(web.Unavailable, match="busy"), pool.connection():
        pass
    assert time.monotonic() - started < 2
    with pool.connection():
        pass


def test_a_failed_connect_gives_its_slot_back() -> None:
    def refuse() -> Connection:
        raise OSError("refused")

    pool = web.Pool(refuse, 1, 0.05)
    for _ in range(3):
        with pytest.raises(OSError, match="refused"), pool.connection():
            pass


def test_an_old_connection_is_not_reused() -> None:
    pool = web.Pool(Connection, 3, 0.05, max_age_s=0)
    with pool.connection() as first:
        time.sleep(0.01)
    with pool.connection() as second:
        assert second is not first
    assert first.closed


def test_the_deadline_ends_a_hanging_read_and_spares_a_quick_one() -> None:
    ours, theirs = socket.socketpair()
    with query.Deadline(ours, 5):
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
    started = time.monotonic()
    with query.Deadline(ours, 0.1):
        assert ours.recv(1) == b""
    assert 0.05 < time.monotonic() - started < 2
    ours.close()
    theirs.close()


def test_the_gateway_keeps_its_connection_to_the_query_service_and_leaves_a_closed_one(region: Region) -> None:
    opened: list[int] = []
    real = query.Handler.setup

    class Counting(query.Handler):
        def setup(self) -> None:
            opened.append(1)
            real(self)

    region.query.server.RequestHandlerClass = Counting
    for n in range(1, 11):
        assert region.front.ask("POST", "/rows", json.dumps({"client": "c", "n": n}).encode())[0] == 201
    assert len(opened) == 1
    region.store.broken = "database: gone"
    assert region.front.ask("GET", "/rows?client=c", None)[0] == 503
    region.store.broken = None
    assert region.front.ask("GET", "/rows?client=c", None) == (
        200,
        json.dumps({"n": list(range(1, 11))}).encode() + b"\n",
    )
    assert len(opened) == 2


def test_the_gateway_says_so_at_once_when_the_query_service_is_gone(region: Region) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", region.port, timeout=5)
    assert ask(connection, "GET", "/readyz")[0] == 200
    region.query.close()
    started = time.monotonic()
    try:
        # A kept connection may still be answered by the thread that holds it, with the advice to go elsewhere.
        deadline = started + 3
        while (answer := ask(connection, "GET", "/readyz"))[0] == 200 and time.monotonic() < deadline:
            region.front._pool._idle.clear()
        assert answer[0] == 503
        assert "the query service does not answer" in answer[1]["error"]
        assert answer[2] == "close"
        assert ask(connection, "GET", "/healthz")[0] == 200
    finally:
        connection.close()
        region.query = Running(query.Server(("127.0.0.1", 0), "us-east-1", region.store))


def test_a_write_is_handed_on_once_even_when_its_answer_is_lost() -> None:
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def swallow() -> None:
            for _ in range(2):
                try:
                    connection, _address = listener.accept()
                except OSError:
                    return
                with connection:
                    received.append(connection.recv(4096))

        threading.Thread(target=swallow, daemon=True).start()
        front = gateway.Query("127.0.0.1", listener.getsockname()[1], timeout_s=1, pool_size=2)
        with pytest.raises(web.Unavailable, match="does not answer"):
            front.ask("POST", "/rows", b"{}")
        time.sleep(0.1)
    assert len(received) == 1


def test_ending_lets_what_has_begun_end_and_sends_kept_connections_away(region: Region) -> None:
    store, server = region.store, region.query.server
    connection = http.client.HTTPConnection("127.0.0.1", region.query.port, timeout=5)
    assert ask(connection, "GET", "/readyz")[2] is None
    store.pause.clear()
    connection.request("POST", "/rows", json.dumps({"client": "c", "n": 1}))
    time.sleep(0.1)
    ending = threading.Thread(target=server.end, args=(0.05, 5.0))
    ending.start()
    time.sleep(0.3)
    assert ending.is_alive(), "it waits for the write that has begun"
    store.pause.set()
    response = connection.getresponse()
    assert (response.status, response.getheader("Connection")) == (201, "close")
    ending.join(2)
    assert not ending.is_alive()
    connection.close()


def test_ending_does_not_wait_for_idle_connections(region: Region) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", region.query.port, timeout=5)
    assert ask(connection, "GET", "/healthz")[0] == 200
    started = time.monotonic()
    region.query.server.end(0.0, 5.0)
    assert time.monotonic() - started < 2
    connection.close()


def test_the_gateway_program_serves_and_ends_at_sigterm(region: Region) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "PORT": str(port),
        "REGION": "us-east-1",
        "QUERY_HOST": "127.0.0.1",
        "QUERY_PORT": str(region.query.port),
        "TIMEOUT_S": "2",
        "POOL_SIZE": "4",
        "PATH": os.environ["PATH"],
    }
    command = [sys.executable, "-m", "lab.services.gateway"]
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"serving region us-east-1 on port {port}\n"
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            assert ask(connection, "POST", "/rows", {"client": "c", "n": 1})[0] == 201
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert ask(connection, "GET", "/rows?client=c") == (200, {"n": [1]}, "close"), "it answers while it drains"
            assert process.wait(10) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("program", ["gateway", "query"])
def test_a_program_without_its_environment_says_what_is_missing(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"lab.services.{program}"], cwd=REPO, env={}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "cannot start: KeyError('PORT')" in done.stderr


def test_the_services_image_is_the_one_of_the_catalogue() -> None:
    data = yaml.safe_load((REPO / "inventories/lab/group_vars/all/services.yml").read_text())
    images = {service["image"] for service in data["kubernetes_platform_services"].values()}
    for minor in catalogue().versions:
        assert images == {image_names(minor)["python"]}
