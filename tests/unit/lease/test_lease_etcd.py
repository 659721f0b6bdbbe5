"""The etcd client against small servers on loopback that answer well, badly, late or not at all."""

from __future__ import annotations

import base64
import http.server
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.lease import etcd
from ansible_collections.censuschat.infra.plugins.module_utils.lease.model import EpochRecord, LeaseError, LeaseRecord
from ansible_collections.censuschat.infra.plugins.module_utils.lease.store import LeaseStore, view_of

Answer = tuple[int, str]


class Member:
    """One member: its answers are given by a function of path and body; it remembers what it was asked."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Answer]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0
        self.close_after_answer = False
        member = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                member.connections += 1
                super().setup()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                member.asked.append((self.path, body))
                status, text = answer(self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
                # Closing without a word is what a member does to a connection that lay idle.
                self.close_connection = member.close_after_answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def member() -> Iterator[Callable[..., Member]]:
    made: list[Member] = []

    def make(answer: Callable[[str, dict[str, Any]], Answer] | Answer) -> Member:
        made.append(Member(answer if callable(answer) else lambda _path, _body: answer))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A member that takes connections and never says a word, like one that is frozen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


OK = (200, json.dumps({"succeeded": True}))
NO_LEADER = (503, json.dumps({"error": "etcdserver: no leader", "message": "etcdserver: no leader", "code": 14}))
NOT_FOUND = (404, json.dumps({"error": "etcdserver: requested lease not found", "code": 5}))


def test_members_are_tried_in_turn_and_the_one_that_answered_is_asked_first_next_time(
    member: Callable[..., Member],
) -> None:
    sick, well = member(NO_LEADER), member(OK)
    client = etcd.Etcd([nobody(), sick.url, well.url])
    assert client.transaction([], [])
    assert client.transaction([], [])
    assert (len(sick.asked), len(well.asked)) == (1, 2)
    assert well.connections == 1


def test_a_silent_member_costs_one_timeout_and_the_budget_holds(member: Callable[..., Member], black_hole: str) -> None:
    well = member(OK)
    began = time.monotonic()
    assert etcd.Etcd([black_hole, well.url], request_timeout_s=0.2).transaction([], [])
    assert 0.15 < time.monotonic() - began < 1
    began = time.monotonic()
    with pytest.raises(etcd.EtcdUnreachable, match="budget was spent"):
        etcd.Etcd([black_hole] * 9, request_timeout_s=0.2, budget_s=0.5).transaction([], [])
    assert 0.4 < time.monotonic() - began < 1


def test_a_deadline_is_shorter_than_the_budget(black_hole: str) -> None:
    client = etcd.Etcd([black_hole], request_timeout_s=5, budget_s=5)
    began = time.monotonic()
    with pytest.raises(etcd.EtcdUnreachable):
        client.read("/x/", deadline=client.clock() + 0.2)
    assert time.monotonic() - began < 1


def test_the_clusters_no_is_final_and_not_asked_of_others(member: Callable[..., Member]) -> None:
    refusing, other = member((403, json.dumps({"error": "permission denied", "code": 7}))), member(OK)
    with pytest.raises(etcd.EtcdRefused, match="permission denied") as caught:
        etcd.Etcd([refusing.url, other.url]).transaction([], [])
    assert caught.value.code == 7
    assert other.asked == []


def test_nobody_answering_names_everybody(member: Callable[..., Member]) -> None:
    sick, gone = member(NO_LEADER), nobody()
    with pytest.raises(etcd.EtcdUnreachable) as caught:
        etcd.Etcd([sick.url, gone]).read("/x/")
    assert "no leader" in str(caught.value)
    assert gone in str(caught.value)


@pytest.mark.parametrize("answer", [(200, "<html>"), (200, ""), (200, "[1]"), (500, "oops")])
def test_what_is_no_answer_of_etcd_is_no_answer(member: Callable[..., Member], answer: Answer) -> None:
    with pytest.raises(etcd.EtcdUnreachable):
        etcd.Etcd([member(answer).url]).read("/x/")


def test_a_connection_closed_while_idle_is_made_again_on_the_same_member(member: Callable[..., Member]) -> None:
    first, second = member(OK), member(OK)
    first.close_after_answer = True
    client = etcd.Etcd([first.url, second.url])
    for _ in range(3):
        assert client.transaction([], [])
        time.sleep(0.05)
    assert (len(first.asked), first.connections, second.asked) == (3, 3, [])


@pytest.mark.parametrize(
    ("answer", "ttl"),
    [
        ((200, '{"result":{"header":{},"ID":"77","TTL":"15"}}\n'), 15),
        ((200, '{"result":{"header":{},"ID":"77"}}\n'), 0),
        ((200, '{"result":{"header":{},"ID":"77","TTL":"0"}}\n'), 0),
        ((200, '{"result":{"header":{},"ID":"78","TTL":"15"}}\n'), 0),
        ((200, '{"result":{"ID":"77","TTL":"15"}}\n{"result":{"ID":"77","TTL":"3"}}\n'), 15),
    ],
    ids=["alive", "gone: no TTL", "gone: TTL 0", "somebody else's", "a stream"],
)
def test_keep_alive(member: Callable[..., Member], answer: Answer, ttl: int) -> None:
    assert etcd.Etcd([member(answer).url]).keep_alive(77) == ttl


@pytest.mark.parametrize(
    "answer",
    [
        (200, '{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}\n'),
        (504, '{"error":"etcdserver: request timed out","code":4}'),
    ],
)
def test_a_keep_alive_that_was_not_carried_out_is_no_answer(member: Callable[..., Member], answer: Answer) -> None:
    with pytest.raises(etcd.EtcdUnreachable):
        etcd.Etcd([member(answer).url]).keep_alive(77)


def test_a_shorter_lease_than_asked_is_refused(member: Callable[..., Member]) -> None:
    with pytest.raises(etcd.EtcdRefused, match="10"):
        etcd.Etcd([member((200, '{"ID":"5","TTL":"10"}')).url]).grant(15)
    assert etcd.Etcd([member((200, '{"ID":"5","TTL":"15"}')).url]).grant(15) == 5


def test_ending_a_lease_that_is_gone_is_no_trouble(member: Callable[..., Member]) -> None:
    etcd.Etcd([member(NOT_FOUND).url]).revoke(5)


def test_a_missing_certificate_is_named_before_anything_is_asked(tmp_path: pathlib.Path) -> None:
    tls = etcd.Tls(str(tmp_path / "ca"), str(tmp_path / "crt"), str(tmp_path / "key"))
    with pytest.raises(etcd.EtcdError, match=str(tmp_path / "ca")):
        etcd.Etcd(["https://127.0.0.1:1"], tls)
    with pytest.raises(etcd.EtcdError, match="TLS"):
        etcd.Etcd(["https://127.0.0.1:1"]).read("/x/")
    with pytest.raises(etcd.EtcdError, match="no endpoint"):
        etcd.Etcd([])


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def stored(**keys: tuple[str, int]) -> Answer:
    """An answer to a read: name -> value and the lease it is bound to."""
    kvs = [
        {"key": coded(f"/censuschat/lab/{name}"), "value": coded(value), "mod_revision": "9", "lease": str(lease)}
        for name, (value, lease) in keys.items()
    ]
    return 200, json.dumps({"header": {}, "kvs": kvs, "count": str(len(kvs))})


def test_one_read_shows_everything_below_the_environment(member: Callable[..., Member]) -> None:
    one = member(stored(epoch=('{"epoch":3,"region":"east"}', 0), lease=('{"epoch":3,"region":"east"}', 77)))
    view = LeaseStore(etcd.Etcd([one.url]), "lab").observe()
    assert view.epoch == EpochRecord(3, "east")
    assert view.lease == LeaseRecord(3, "east", 77)
    assert view.epoch_revision == 9
    path, body = one.asked[0]
    assert path == "/v3/kv/range"
    assert base64.b64decode(body["key"]) == b"/censuschat/lab/"
    assert base64.b64decode(body["range_end"]) == b"/censuschat/lab0"
    # Not serializable: a serializable read may be answered from the past.
    assert "serializable" not in body


def test_a_lease_key_without_a_lease_would_never_end_and_is_refused() -> None:
    pair = etcd.KeyValue("/censuschat/lab/lease", '{"epoch":3,"region":"east"}', 9, 0)
    with pytest.raises(LeaseError, match="never end"):
        view_of([pair], "/censuschat/lab/")


@pytest.mark.parametrize("name", ["", "La b", "../x", "a/b"])
def test_an_environment_is_a_name(name: str) -> None:
    with pytest.raises(LeaseError, match="no name for an environment"):
        LeaseStore(etcd.Etcd(["http://127.0.0.1:1"]), name)


def test_a_taking_whose_answer_was_lost_is_looked_up(member: Callable[..., Member]) -> None:
    """The transaction is carried out, but its answer never arrives: the taker finds its own lease."""
    done: list[str] = []

    def answer(path: str, _body: dict[str, Any]) -> Answer:
        if path == "/v3/lease/grant":
            return 200, '{"ID":"88","TTL":"15"}'
        if path == "/v3/kv/txn":
            done.append(path)
            return 504, '{"error":"etcdserver: request timed out","code":4}'
        if path == "/v3/kv/range":
            return stored(epoch=('{"epoch":1,"region":"east"}', 0), lease=('{"epoch":1,"region":"east"}', 88))
        raise AssertionError(path)

    one = member(answer)
    store = LeaseStore(etcd.Etcd([one.url]), "lab")
    lease = store.take(view_of([], store.prefix), "east", ttl_s=15, wall=0, by="test")
    assert (lease.lease_id, len(done)) == (88, 1)


def test_a_taking_that_lost_gives_its_lease_back(member: Callable[..., Member]) -> None:
    def answer(path: str, _body: dict[str, Any]) -> Answer:
        if path == "/v3/kv/range":
            return stored(epoch=('{"epoch":1,"region":"west"}', 0), lease=('{"epoch":1,"region":"west"}', 99))
        return 200, {"/v3/lease/grant": '{"ID":"88","TTL":"15"}'}.get(path, "{}")

    one = member(answer)
    store = LeaseStore(etcd.Etcd([one.url]), "lab")
    with pytest.raises(LeaseError, match="west holds it with epoch 1"):
        store.take(view_of([], store.prefix), "east", ttl_s=15, wall=0, by="test")
    assert one.asked[-1] == ("/v3/lease/revoke", {"ID": "88"})


def test_a_taking_compares_what_was_seen(member: Callable[..., Member]) -> None:
    one = member(lambda path, _body: (200, '{"ID":"88","TTL":"15"}') if "grant" in path else OK)
    store = LeaseStore(etcd.Etcd([one.url]), "lab")
    view = view_of([etcd.KeyValue(store.key("epoch"), '{"epoch":6,"region":"east"}', 41, 0)], store.prefix)
    assert store.take(view, "west", ttl_s=15, wall=1.5, by="test", quiet_revision=40).epoch == 7
    compare = one.asked[-1][1]["compare"]
    gates, after = store.key("gates/east/"), store.key("gates/east0")
    assert {
        "key": coded(gates), "range_end": coded(after), "target": "MOD", "result": "LESS", "mod_revision": "41"
    } in compare  # fmt: skip
    assert {"key": coded(store.key("epoch")), "target": "MOD", "result": "EQUAL", "mod_revision": "41"} in compare
    assert {"key": coded(store.key("lease")), "target": "VERSION", "result": "EQUAL", "version": "0"} in compare
    puts = [s["request_put"] for s in one.asked[-1][1]["success"] if "request_put" in s]
    assert [put["lease"] for put in puts] == ["0", "88"]
    assert json.loads(base64.b64decode(puts[0]["value"]))["epoch"] == 7
