"""The network agent's table in the kernel, with real packets between network namespaces.

Every case of the unit tests' table is asked here too: a connection that passes is refused by the other end, where
nobody listens; one that a policy stops is answered with "host unreachable" by the node.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lab.network_policy import model, table
from lab.network_policy.rules import NodeRules, PodRules, closed, compile_node
from tests.policy_cases import CASES, WORLD, Question, address_of, cluster, questions

NODE_ADDRESS = str(WORLD["nodes"]["n1"]["address"])
GATEWAY = "10.78.0.1"
#: How long a packet may take that is not answered, in seconds.
PATIENCE_S = 0.4


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Place:
    """A node's namespace with a link to each pod's, as the CNI plugin ptp makes them, and one outside."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        tag = f"censusnet{os.getpid() % 100000}"
        self.node = f"{tag}-node"
        self.spaces = {end: f"{tag}-{end.replace('/', '-')}" for end in WORLD["pods"]}
        self.outside = f"{tag}-outside"
        # Answers to refused packets are limited in their number otherwise, here to one in a second.
        quick = ("net.ipv4.icmp_ratelimit=0", "net.ipv4.icmp_msgs_per_sec=100000", "net.ipv4.icmp_msgs_burst=100000")
        for name in (self.node, self.outside, *self.spaces.values()):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
            subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qew", *quick], check=True, capture_output=True)
        self.inside("sysctl", "-qw", "net.ipv4.ip_forward=1")
        for number, (end, space) in enumerate(self.spaces.items()):
            link, address = f"veth{number}", address_of(end)
            ip("-n", self.node, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", self.node, "address", "add", f"{GATEWAY}/32", "dev", link)
            ip("-n", self.node, "link", "set", link, "up")
            ip("-n", self.node, "route", "add", address, "dev", link)
            ip("-n", space, "address", "add", f"{address}/32", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "route", "add", GATEWAY, "dev", "eth0")
            ip("-n", space, "route", "add", "default", "via", GATEWAY)
        ip("-n", self.node, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.outside)
        ip("-n", self.node, "address", "add", f"{NODE_ADDRESS}/16", "dev", "eth0")
        ip("-n", self.node, "link", "set", "eth0", "up")
        for address in WORLD["outside"]:
            ip("-n", self.outside, "address", "add", f"{address}/16", "dev", "eth0")
        ip("-n", self.outside, "link", "set", "eth0", "up")
        ip("-n", self.outside, "route", "add", "default", "via", NODE_ADDRESS)

    def inside(self, *argv: str, text: str = "") -> str:
        return table.run(("ip", "netns", "exec", self.node, *argv), text)

    def load(self, rules: NodeRules) -> str:
        text = table.render(rules)
        table.load(text, lambda argv, said: self.inside(*argv, text=said))
        return table.mark_of(text)

    def loaded(self) -> str:
        return table.loaded(lambda argv, said: self.inside(*argv, text=said))

    def space(self, end: str) -> str:
        return self.node if end == "node" else self.spaces.get(end, self.outside)

    def socket(self, end: str, kind: int, protocol: int = 0, family: int = socket.AF_INET) -> socket.socket:
        """A socket belongs to the namespace its thread was in when it was made."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.space(end)}", os.O_RDONLY)
        try:
            os.setns(there, os.CLONE_NEWNET)
            made = socket.socket(family, kind, protocol)
        finally:
            os.setns(own, os.CLONE_NEWNET)
            os.close(own)
            os.close(there)
        made.settimeout(PATIENCE_S)
        if "." in end:
            made.bind((end, 0))
        return made

    def ask(self, source: str, address: str, protocol: str, port: int) -> str:
        """What becomes of a packet that opens a connection: "passed", "denied" or "silence"."""
        if protocol == "SCTP":
            return self._ask_sctp(source, address, port)
        with self.socket(source, socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM) as made:
            try:
                made.connect((address, port))
                made.send(b"?")
                made.recv(1)
            except TimeoutError:
                return "silence"
            except OSError as error:
                return {errno.ECONNREFUSED: "passed", errno.EHOSTUNREACH: "denied"}[error.errno or 0]
            return "passed"

    def _ask_sctp(self, source: str, address: str, port: int) -> str:
        """The kernel may lack SCTP itself: its first packet by hand, listened for at the other end."""
        target = next(end for end in WORLD["pods"] if address_of(end) == address)
        with (
            self.socket(target, socket.SOCK_RAW, socket.IPPROTO_SCTP) as ear,
            self.socket(source, socket.SOCK_RAW, socket.IPPROTO_SCTP) as mouth,
        ):
            mouth.sendto(sctp_init(40000 + os.getpid() % 20000, port), (address, 0))
            try:
                ear.recv(2000)
            except TimeoutError:
                return "denied"
            return "passed"


def sctp_init(source: int, port: int) -> bytes:
    """An SCTP packet with an INIT chunk and its CRC-32C, which connection tracking checks."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)
    remainder = 0xFFFFFFFF
    for byte in struct.pack("!HHII", source, port, 0, 0) + chunk:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    return struct.pack("!HHI", source, port, 0) + struct.pack("<I", remainder ^ 0xFFFFFFFF) + chunk


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        yield Place(stack)


def on_one_node(known: model.Cluster) -> NodeRules:
    """All pods are on the one node there is: it judges both ends of a connection."""
    return compile_node(known._replace(pods=[pod._replace(node="n1") for pod in known.pods]), "n1")


def free() -> NodeRules:
    """Rules that know every pod and isolate none."""
    return on_one_node(cluster({"name": "free", "policies": []}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_kernel_judges_as_the_api_documents(place: Place, case: dict[str, Any]) -> None:
    mark = place.load(on_one_node(cluster(case)))
    assert place.loaded() == mark
    wrong: list[tuple[Question, str]] = []
    for asked in questions(case):
        became = place.ask(asked.source, address_of(asked.target), asked.protocol, asked.port)
        if became != ("passed" if asked.allowed else "denied"):
            wrong.append((asked, became))
    assert not wrong


def test_the_closed_table_lets_only_the_node_ask_its_pods(place: Place) -> None:
    place.load(closed(WORLD["pod_cidr"]))
    web = address_of("shop/web")
    assert place.ask("shop/web", address_of("shop/db"), "TCP", 5432) == "silence"
    assert place.ask("shop/web", NODE_ADDRESS, "TCP", 6432) == "silence"
    assert place.ask("shop/web", "10.77.1.21", "UDP", 53) == "silence"
    assert place.ask("10.77.1.21", web, "TCP", 8080) == "silence"
    assert place.ask("node", web, "TCP", 8080) == "passed"


def test_the_node_reaches_an_isolated_pod(place: Place) -> None:
    place.load(NodeRules(WORLD["pod_cidr"], (address_of("shop/web"),), (PodRules(address_of("shop/web"), (), ()),)))
    assert place.ask("node", address_of("shop/web"), "TCP", 8080) == "passed"
    assert place.ask("node", address_of("shop/web"), "UDP", 53) == "passed"


def test_the_nodes_own_addresses_are_a_destination_like_others(place: Place) -> None:
    to_node = {"ipBlock": {"cidr": f"{NODE_ADDRESS}/32"}}
    spec = {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [to_node], "ports": [{"port": 6432}]}]}
    place.load(on_one_node(cluster({"name": "to the node", "policies": [{"namespace": "shop", "spec": spec}]})))
    assert place.ask("shop/web", NODE_ADDRESS, "TCP", 6432) == "passed"
    assert place.ask("shop/web", NODE_ADDRESS, "TCP", 22) == "denied"
    assert place.ask("shop/web", GATEWAY, "TCP", 22) == "denied"
    assert place.ask("bank/web", NODE_ADDRESS, "TCP", 22) == "passed"


def test_a_pod_that_nobody_knows_yet_meets_silence(place: Place) -> None:
    rules = free()
    place.load(rules._replace(known=tuple(a for a in rules.known if a != address_of("shop/web"))))
    assert place.ask("shop/web", address_of("shop/db"), "TCP", 5432) == "silence"
    assert place.ask("shop/web", NODE_ADDRESS, "TCP", 6432) == "silence"
    assert place.ask("shop/db", address_of("shop/web"), "TCP", 8080) == "silence"
    assert place.ask("node", address_of("shop/web"), "TCP", 8080) == "passed"


def test_another_pods_address_is_of_no_use(place: Place) -> None:
    place.load(free())
    stolen = address_of("bank/ledger")
    ip("-n", place.space("shop/web"), "address", "add", f"{stolen}/32", "dev", "eth0")
    try:
        with place.socket("shop/web", socket.SOCK_DGRAM) as thief, place.socket("shop/db", socket.SOCK_DGRAM) as ear:
            ear.bind((address_of("shop/db"), 9999))
            thief.bind((stolen, 0))
            thief.sendto(b"stolen", (address_of("shop/db"), 9999))
            with pytest.raises(TimeoutError):
                ear.recv(100)
    finally:
        ip("-n", place.space("shop/web"), "address", "del", f"{stolen}/32", "dev", "eth0")


def test_ipv6_is_no_way_round(place: Place) -> None:
    for space, link, address in ((place.node, "veth0", "fe80::1"), (place.space("shop/web"), "eth0", "fe80::2")):
        ip("-n", space, "address", "add", f"{address}/64", "dev", link, "nodad")
    index = int(
        json.loads(table.run(("ip", "-n", place.space("shop/web"), "-j", "link", "show", "eth0")))[0]["ifindex"]
    )

    def ask() -> str:
        with place.socket("shop/web", socket.SOCK_DGRAM, family=socket.AF_INET6) as made:
            made.connect(("fe80::1", 9, 0, index))
            made.send(b"?")
            try:
                made.recv(1)
            except TimeoutError:
                return "silence"
            except ConnectionRefusedError:
                pass
            return "passed"

    place.load(free())
    # The way is there when the table is not.
    place.inside("nft", "delete", "table", *table.NAME.split())
    assert ask() == "passed"
    place.load(free())
    assert ask() == "silence"


def echo_at(place: Place, end: str, port: int) -> tuple[socket.socket, list[str]]:
    """A server that echoes, and the addresses it was called from."""
    listener = place.socket(end, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.settimeout(None)
    listener.bind(("0.0.0.0", port))
    listener.listen()
    callers: list[str] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                session, caller = listener.accept()
                callers.append(caller[0])
                threading.Thread(target=echo, args=(session,), daemon=True).start()

    def echo(session: socket.socket) -> None:
        with contextlib.suppress(OSError), session:
            while said := session.recv(100):
                session.sendall(said)

    threading.Thread(target=serve, daemon=True).start()
    return listener, callers


def say(session: socket.socket) -> bytes:
    session.sendall(b"hello")
    return session.recv(100)


def test_a_policy_that_comes_later_ends_the_connection_it_forbids_and_no_other(place: Place) -> None:
    place.load(free())
    listener, _ = echo_at(place, "shop/db", 5432)
    where = (address_of("shop/db"), 5432)
    with (
        listener,
        place.socket("shop/web", socket.SOCK_STREAM) as mine,
        place.socket("bank/web", socket.SOCK_STREAM) as theirs,
    ):
        mine.connect(where)
        theirs.connect(where)
        assert say(mine) == say(theirs) == b"hello"
        spec: dict[str, Any] = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}
        place.load(on_one_node(cluster({"name": "own", "policies": [{"namespace": "shop", "spec": spec}]})))
        assert say(mine) == b"hello"
        with pytest.raises(ConnectionResetError):
            say(theirs)


def test_who_calls_is_seen_inside_and_hidden_outside(place: Place) -> None:
    place.load(free())
    for end, address, seen in (
        ("shop/db", address_of("shop/db"), address_of("shop/web")),
        ("node", NODE_ADDRESS, address_of("shop/web")),
        ("outside", "10.77.1.21", NODE_ADDRESS),
    ):
        listener, callers = echo_at(place, end, 7070)
        with listener, place.socket("shop/web", socket.SOCK_STREAM) as session:
            session.connect((address, 7070))
            assert say(session) == b"hello"
            assert callers == [seen], end


def test_a_service_is_judged_by_the_pod_that_answers(place: Place) -> None:
    spec: dict[str, Any] = {
        "podSelector": {},
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "api"}}}]}],
    }
    place.load(on_one_node(cluster({"name": "service", "policies": [{"namespace": "shop", "spec": spec}]})))
    to = {"10.79.0.1": address_of("shop/api"), "10.79.0.2": address_of("shop/db")}
    lines = [f"ip daddr {service} dnat to {pod}" for service, pod in to.items()]
    chain = "\n".join(["type nat hook prerouting priority dstnat", *lines])
    place.inside("nft", "-f", "-", text=f"table ip services {{\nchain pre {{\n{chain}\n}}\n}}\n")
    try:
        assert place.ask("shop/web", "10.79.0.1", "TCP", 80) == "passed"
        assert place.ask("shop/web", "10.79.0.2", "TCP", 80) == "denied"
    finally:
        place.inside("nft", "delete", "table", "ip", "services")


def test_a_table_that_cannot_be_loaded_leaves_the_old_one(place: Place) -> None:
    mark = place.load(free())
    with pytest.raises(table.CommandError, match="nft"):
        place.load(NodeRules("not a range"))
    assert place.loaded() == mark
