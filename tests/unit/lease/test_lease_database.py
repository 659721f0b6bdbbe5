"""What the guard asks of Patroni, its configuration, and the glue of the module write_lease."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.lease.database import (
    CLOSE_BYTES,
    DatabaseError,
    Patroni,
    lsn_number,
)
from ansible_collections.censuschat.infra.plugins.module_utils.lease.gate import CommandError, GateRules, NoAnswer, run
from ansible_collections.censuschat.infra.plugins.module_utils.lease.guard import Config
from ansible_collections.censuschat.infra.plugins.module_utils.lease.holding import Outcome
from ansible_collections.censuschat.infra.plugins.module_utils.lease.model import (
    EpochRecord,
    GateRecord,
    LeaseError,
    LeaseRecord,
    StoreView,
)
from ansible_collections.censuschat.infra.plugins.modules import write_lease

from tests.unit.lease.simulated import configuration

PEER = "192.0.2.21"


class Node:
    """A node's Patroni: `status` is what GET /patroni says, `config` its dynamic configuration."""

    def __init__(self, status: dict[str, Any]) -> None:
        self.status, self.config = status, dict[str, Any]()
        self.code = 200
        node = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self, code: int, body: Any) -> None:
                text = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                if self.path == "/patroni":
                    # Patroni says how PostgreSQL is by the code; the body is there either way.
                    self._answer(node.code, node.status)
                else:
                    self._answer(200, node.config)

            def do_PATCH(self) -> None:
                change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if change.get("refuse"):
                    self._answer(403, {})
                    return
                node.config.update(change)
                self._answer(200, node.config)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def node() -> Iterator[Callable[[dict[str, Any]], Node]]:
    made: list[Node] = []

    def make(status: dict[str, Any]) -> Node:
        made.append(Node(status))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def sender(address: str, state: str = "streaming") -> list[dict[str, str]]:
    return [{"client_addr": address, "state": state}]


def patroni(own: Node, region: list[Node], peers: list[str]) -> Patroni:
    return Patroni(own.url, region=[n.url for n in region], peers=peers, addresses=[PEER], tls=None, timeout_s=0.5)


def test_the_role_and_the_configuration_are_read_also_from_a_stopped_database(
    node: Callable[[dict[str, Any]], Node],
) -> None:
    own = node({"role": "replica", "state": "stopped"})
    own.code, own.config = 503, {"standby_cluster": {"host": "x"}}
    view = patroni(own, [own], []).observe()
    assert (view.role, view.is_primary, view.config) == ("replica", False, {"standby_cluster": {"host": "x"}})


def test_a_change_that_is_refused_is_told(node: Callable[[dict[str, Any]], Node]) -> None:
    own = node({})
    patroni(own, [own], []).patch({"pause": True})
    assert own.config == {"pause": True}
    with pytest.raises(DatabaseError, match="PATCH /config with HTTP 403"):
        patroni(own, [own], []).patch({"refuse": True})


FOLLOWED: list[tuple[str, dict[str, Any], dict[str, Any], int, bool]] = [
    ("directly", {"replication": sender(PEER)}, {}, 0, True),
    ("through a replica", {}, {"replication": sender(PEER)}, 0, True),
    ("only by its own replicas", {"replication": sender("192.0.2.99")}, {}, 0, False),
    ("by one that catches up", {"replication": sender(PEER, "catchup")}, {}, 0, False),
    ("by one that is far behind", {"replication": sender(PEER)}, {}, CLOSE_BYTES, False),
    ("by one that is just near enough", {"replication": sender(PEER)}, {}, CLOSE_BYTES - 1, True),
    ("by nobody", {}, {}, 0, False),
]


@pytest.mark.parametrize(
    ("own", "replica", "behind", "expected"), [c[1:] for c in FOLLOWED], ids=[c[0] for c in FOLLOWED]
)
def test_a_region_is_followed(
    node: Callable[[dict[str, Any]], Node], own: dict[str, Any], replica: dict[str, Any], behind: int, expected: bool
) -> None:
    location = 10 * CLOSE_BYTES
    primary = node({"role": "master", "xlog": {"location": location}, **own})
    second = node({"role": "replica", **replica})
    peer = node({"role": "standby_leader", "xlog": {"received_location": location - behind}})
    assert patroni(primary, [primary, second], ["http://127.0.0.1:1", peer.url]).is_followed(2.0) is expected


def test_a_replica_is_followed_by_nobody_and_no_time_is_no_answer(node: Callable[[dict[str, Any]], Node]) -> None:
    replica = node({"role": "replica", "xlog": {"received_location": 5}, "replication": sender(PEER)})
    assert not patroni(replica, [replica], [replica.url]).is_followed(2.0)
    primary = node({"role": "master", "xlog": {"location": 5}, "replication": sender(PEER)})
    assert not patroni(primary, [primary], [primary.url]).is_followed(0.0)


def test_the_furthest_peer_counts_and_silent_ones_do_not(node: Callable[[dict[str, Any]], Node]) -> None:
    near = node({"xlog": {"received_location": 100, "replayed_location": 90}})
    far = node({"xlog": {"received_location": 0, "replayed_location": 300}})
    none = node({"xlog": None})
    own = patroni(near, [], ["http://127.0.0.1:1", near.url, far.url, none.url])
    assert own.furthest_peer() == (far.url, 300)


@pytest.mark.parametrize(
    ("lsn", "number"), [("0/0", 0), ("0/3000148", 0x3000148), ("1/0", 1 << 32), ("A/FF", (10 << 32) + 255)]
)
def test_log_sequence_numbers(lsn: str, number: int) -> None:
    assert lsn_number(lsn) == number


# ---- programs and rules ----


def test_a_program_that_hangs_is_ended_and_one_that_fails_is_quoted() -> None:
    assert run(("cat",), "x" * 300_000) == "x" * 300_000
    with pytest.raises(NoAnswer, match=r"sleep gave no answer within 0\.1 s"):
        run(("sleep", "9"), timeout_s=0.1)
    with pytest.raises(CommandError, match=r"cat failed with 1: .*No such file"):
        run(("cat", "/nonexistent"))
    with pytest.raises(NoAnswer, match="cannot be run"):
        run(("/nonexistent",))


def test_the_rules_name_each_peer_once_by_its_kind() -> None:
    text = GateRules(5433, ("192.0.2.2", "2001:db8::1", "192.0.2.1", "192.0.2.2")).table()
    assert text.count("ip saddr { 192.0.2.1, 192.0.2.2 } accept") == 1
    assert text.count("ip6 daddr { 2001:db8::1 } accept") == 1
    assert text.count("5433") == 2
    assert "ip6" not in GateRules(5432, ("192.0.2.1",)).table()
    with pytest.raises(ValueError, match="not-an-address"):
        GateRules(5432, ("not-an-address }; drop",)).table()


# ---- the guard's configuration ----


def raw() -> dict[str, Any]:
    return {
        "environment": "lab",
        "node": "n",
        "region": "r",
        "figures": {"ttl_s": 15, "renew_s": 2, "close_after_s": 9, "kernel_after_s": 11},
        "store": {"endpoints": ["http://x"], "request_timeout_s": 0.8, "budget_s": 2.5},
        "gate": {"port": 5432, "peers": ["192.0.2.1"]},
        "patroni": {"url": "u", "region": [], "peers": [], "peer_addresses": [], "standby_cluster": {}},
        "postgres": {},
    }


def test_a_good_configuration_is_taken() -> None:
    assert Config.of(raw()).figures.ttl_s == 15
    assert configuration("east", "e1").region == "east"


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("figures", {"ttl_s": 10, "renew_s": 2, "close_after_s": 9, "kernel_after_s": 11}, "0 < renew"),
        ("figures", {"ttl_s": 15}, "renew_s"),
        ("store", {"endpoints": ["http://x"], "request_timeout_s": 0.8, "budget_s": 8}, "budget"),
        ("gate", {"port": 5432, "peers": ["nowhere"]}, "nowhere"),
        ("postgres", {"password": "x"}, "password"),
        ("region", None, "region"),
    ],
)
def test_a_bad_configuration_is_refused_with_what_is_wrong(part: str, value: Any, says: str) -> None:
    given = raw()
    if value is None:
        del given[part]
    else:
        given[part] = value
    with pytest.raises(LeaseError, match=says):
        Config.of(given, "/etc/x")


def test_a_configuration_that_is_not_there_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match=str(tmp_path / "guard.json")):
        Config.load(tmp_path / "guard.json")


# ---- the module ----


def test_the_module_tells_who_holds_the_lease_and_who_did() -> None:
    before = StoreView(EpochRecord(3, "east"))
    after = StoreView(EpochRecord(4, "west"), LeaseRecord(4, "west", 7), gates=(GateRecord("w1", "west", 4),))
    result = write_lease.result_of(Outcome(True, "d", 1.5, "expired", after, before, ["a"]), "west", False)
    assert {name: result[name] for name in ("holder", "epoch", "previous_region", "previous_epoch", "gates")} == {
        "holder": "west",
        "epoch": 4,
        "previous_region": "east",
        "previous_epoch": 3,
        "gates": ["w1"],
    }
    assert result["diff"] == {
        "before": "epoch: 3\nlast_region: east\n",
        "after": "epoch: 4\nlast_region: west\n",
    }


def test_check_mode_shows_the_holder_to_be_and_the_facts_as_they_are() -> None:
    before = StoreView(EpochRecord(3, "east"))
    result = write_lease.result_of(Outcome(True, "d", view=before, previous=before, actions=["a"]), "west", True)
    assert result["holder"] is None
    assert result["diff"]["after"] == "epoch: 4\nlast_region: west\n"
    held = StoreView(EpochRecord(3, "east"), LeaseRecord(3, "east", 7))
    waits = write_lease.result_of(Outcome(True, "d", view=held, previous=held, actions=["a"]), "west", True)
    assert waits["diff"] == result["diff"], "the plan is the same before and after the lost holder's lease has ended"


def test_check_mode_shows_a_release() -> None:
    held = StoreView(EpochRecord(3, "east"), LeaseRecord(3, "east", 7))
    result = write_lease.result_of(Outcome(True, "d", view=held, previous=held, actions=["a"]), None, True)
    assert result["diff"] == {"before": "holder: east\n", "after": "holder: None\n"}


@pytest.mark.parametrize(("state", "changed"), [("observed", False), ("held", True), ("handed_over", False)])
def test_a_bare_node_is_planned_for_a_new_environment(state: str, changed: bool) -> None:
    assert write_lease.bare_plan(state, "east").changed is changed
