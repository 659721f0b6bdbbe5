"""The stand-in's HTTP: what it says, when it keeps a connection, and its pool and deadline, without data services."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.stand_in_service import Memory, stand_in


@pytest.fixture
def served() -> Iterator[tuple[Any, Memory]]:
    store = Memory()
    server = stand_in.Server(("127.0.0.1", 0), "us-east-1", store)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server, store
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(served: tuple[Any, Memory]) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", served[0].server_address[1], timeout=5)
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


def test_trouble_is_a_503_that_ends_the_connection(
    served: tuple[Any, Memory], client: http.client.HTTPConnection
) -> None:
    served[1].broken = "database: connection refused"
    status, body, connection = ask(client, "POST", "/rows", {"client": "c", "n": 1})
    assert (status, body["error"], connection) == (503, "database: connection refused", "close")
    assert ask(client, "GET", "/readyz")[0] == 503
    assert ask(client, "GET", "/healthz") == (200, {"status": "ok", "region": "us-east-1"}, None)
    served[1].broken = None
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
    served: tuple[Any, Memory], client: http.client.HTTPConnection, request_: tuple[str, str, Any], status: int
) -> None:
    method, path, body = request_
    if status == 501:
        client.request(method, path)
        assert client.getresponse().status == status
    else:
        assert ask(client, method, path, body)[0] == status
    assert served[1].rows == {}


def test_a_body_without_a_length_is_refused(served: tuple[Any, Memory]) -> None:
    with socket.create_connection(served[0].server_address, timeout=5) as raw:
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

    pool = stand_in.Pool(connect, 3, 0.05)
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
    pool = stand_in.Pool(Connection, 3, 0.05)
    with pool.connection() as first:
        pass
    first.theirs.close()
    with pool.connection() as second:
        assert second is not first
    assert first.closed
    assert not second.closed


def test_a_busy_pool_refuses_in_time() -> None:
    pool = stand_in.Pool(Connection, 1, 0.05)
    started = time.monotonic()
    with pool.connection(), pytest.raises(stand_in.Unavailable, match="busy"), pool.connection():
        pass
    assert time.monotonic() - started < 2
    with pool.connection():
        pass


def test_a_failed_connect_gives_its_slot_back() -> None:
    def refuse() -> None:
        raise OSError("refused")

    pool = stand_in.Pool(refuse, 1, 0.05)
    for _ in range(3):
        with pytest.raises(OSError, match="refused"), pool.connection():
            pass


def test_the_deadline_ends_a_hanging_read_and_spares_a_quick_one() -> None:
    ours, theirs = socket.socketpair()
    with stand_in.Deadline(ours, 5):
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
    started = time.monotonic()
    with stand_in.Deadline(ours, 0.1):
        assert ours.recv(1) == b""
    assert 0.05 < time.monotonic() - started < 2
    ours.close()
    theirs.close()
