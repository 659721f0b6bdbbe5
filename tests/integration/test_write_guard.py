"""The write lease on the running lab, from the view of a client whose session stays open."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import topology
from lab.paths import REPO, STATE
from tests.nodes import LIBFAKETIME, call, entered, faked_clock, guard_settings, on, signal_guards

INVENTORY = os.environ.get("CENSUSCHAT_INVENTORY", "inventories/lab")
LAB = topology.load(REPO / INVENTORY)
FIGURES = yaml.safe_load((REPO / INVENTORY / "group_vars/all/write_guard.yml").read_text())
TTL_S, RENEW_S = FIGURES["write_guard_ttl_s"], FIGURES["write_guard_renew_s"]
CLOSE_AFTER_S, KERNEL_AFTER_S = FIGURES["write_guard_close_after_s"], FIGURES["write_guard_kernel_after_s"]
# What a loaded machine may add to a moment that a process of the test sees, in seconds.
SLACK_S = 1.0
PORT = 5432

# Commits on one connection that stays open, and says when (CLOCK_MONOTONIC, one clock for all of the lab's machine)
# each commit was acknowledged, and when and why there were no more.
SESSION = """
import json, sys, time, psycopg
address, password = sys.argv[1], sys.stdin.readline().strip()
session = psycopg.connect(host=address, dbname="censuschat", user="censuschat", password=password, connect_timeout=5,
                          sslmode="verify-full", sslrootcert="/etc/censuschat/pki/ca.crt")
print(json.dumps({"pid": session.info.backend_pid}), flush=True)
try:
    while True:
        # A transaction id is a write of its own: a standby refuses to give one.
        session.execute("select pg_current_xact_id()")
        session.commit()
        print(json.dumps({"ack": time.monotonic()}), flush=True)
        time.sleep(0.05)
except psycopg.Error as error:
    print(json.dumps({"end": time.monotonic(), "error": str(error).strip()}), flush=True)
"""


def status(node: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(on(node, "censuschat-guard status"))
    return found


def address(node: str) -> str:
    return str(LAB.node(node).address)


def eventually(what: str, holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition of the running system; the message says what never came."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def store_keys(prefix: str = "") -> dict[str, Any]:
    """What the lease store says, asked at the witness site."""
    witness = next(n for n in LAB.nodes if n.role == "witness")
    environment = yaml.safe_load((REPO / INVENTORY / "group_vars/all/main.yml").read_text())["environment_name"]
    pki = "/etc/censuschat/pki"
    text = on(
        witness.name,
        f"ETCDCTL_API=3 etcdctl --endpoints https://{witness.address}:12379 --cacert {pki}/ca.crt --cert {pki}/node.crt"
        f" --key {pki}/node.key get --prefix /censuschat/{environment}/{prefix}",
    )
    lines = text.splitlines()
    return {key.split("/", 3)[3]: json.loads(value) for key, value in zip(lines[::2], lines[1::2], strict=True)}


def can_connect(source: str, target: str) -> str:
    """What a TCP connection from one node to PostgreSQL of another meets: open, refused or silence."""
    program = (
        "import socket\n"
        "try:\n"
        f"    socket.create_connection(({target!r}, {PORT}), 3).close(); print('open')\n"
        "except ConnectionRefusedError: print('refused')\n"
        "except OSError as error: print(error)\n"
    )
    return call(*entered(source, "python3", "-"), text=program).stdout.strip()


@dataclasses.dataclass
class Region:
    name: str

    @property
    def db(self) -> list[str]:
        return [n.name for n in LAB.nodes if n.site == self.name and n.role == "db"]

    @property
    def app(self) -> str:
        return next(n.name for n in LAB.nodes if n.site == self.name and n.role == "app")

    def primary(self) -> str:
        found = [node for node in self.db if status(node)["patroni_role"] in ("master", "primary")]
        assert len(found) == 1, f"primaries of {self.name}: {found}"
        return found[0]

    def serves(self) -> bool:
        """Every gate is open and one node is primary."""
        seen = [status(node) for node in self.db]
        return all(s["kernel_gate"] == "open" for s in seen) and any(
            s["patroni_role"] in ("master", "primary") for s in seen
        )


def regions() -> tuple[Region, Region]:
    """The region that holds the lease, and the other."""
    holder = store_keys("lease")["lease"]["region"]
    names = [s.name for s in LAB.sites if any(n.site == s.name and n.role == "db" for n in LAB.nodes)]
    assert holder in names
    return Region(holder), Region(next(name for name in names if name != holder))


@pytest.fixture(scope="module", autouse=True)
def _lab(running_lab: object) -> None:
    """These tests are on the lab that is up."""


@pytest.fixture
def writing() -> Iterator[Region]:
    """The region that writes; after the test it must be able to write again by itself, without anybody's help."""
    holder, _ = regions()
    eventually(f"{holder.name} serves before the test", holder.serves)
    yield holder
    eventually(f"{holder.name} serves again after the test", holder.serves, 90)


@pytest.fixture
def standing_by(writing: Region) -> Region:
    return regions()[1]


class Session:
    """A client in the region with a connection that stays open."""

    def __init__(self, client: str, node: str) -> None:
        self.process = subprocess.Popen(
            entered(client, "python3", "-u", "-c", SESSION, address(node)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        password = (STATE / "secrets/postgresql_app").read_text().split()[0]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(password + "\n")
        self.process.stdin.flush()
        first = self.process.stdout.readline()
        assert '"pid"' in first, first
        os.set_blocking(self.process.stdout.fileno(), False)
        self.acks: list[float] = []
        self.end: dict[str, Any] = {}
        self._rest = ""

    def read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(BlockingIOError, TypeError):
            self._rest += os.read(self.process.stdout.fileno(), 1 << 20).decode()
        *lines, self._rest = self._rest.split("\n")
        for line in lines:
            record = json.loads(line)
            if "ack" in record:
                self.acks.append(record["ack"])
            else:
                self.end = record

    def is_writing(self) -> bool:
        self.read()
        return bool(self.acks) and time.monotonic() - self.acks[-1] < 1.5

    def wait_for_end(self, seconds: float) -> float:
        """When the last acknowledgement came, after the session has ended."""
        end = time.monotonic() + seconds
        while not self.end:
            assert time.monotonic() < end, f"the session still goes on after {seconds} s"
            time.sleep(0.05)
            self.read()
        return self.acks[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def session(writing: Region) -> Iterator[Session]:
    one = Session(writing.app, writing.primary())
    eventually("a session that writes", one.is_writing)
    yield one
    one.close()


# ---- what is closed and what passes while all is well ----


def test_the_standby_regions_database_is_closed_to_everybody_but_its_peers(
    writing: Region, standing_by: Region
) -> None:
    for node in standing_by.db:
        assert status(node)["kernel_gate"] == "closed"
        assert can_connect(standing_by.app, address(node)) == "refused"
        assert can_connect(writing.app, address(node)) == "refused"
        assert can_connect(node, "127.0.0.1") == "refused"
        assert can_connect(writing.db[0], address(node)) == "open"


def test_the_writing_regions_database_is_open_and_every_node_is_registered(writing: Region) -> None:
    keys = store_keys()
    assert keys["lease"] == {"epoch": keys["epoch"]["epoch"], "region": writing.name}
    for node in writing.db:
        record = keys[f"gates/{writing.name}/{node}"]
        assert (record["node"], record["epoch"]) == (node, keys["epoch"]["epoch"])
        assert record["kernel_after_s"] == KERNEL_AFTER_S
        assert can_connect(writing.app, address(node)) == "open"
        assert on(node, "censuschat-guard check").startswith(f"gate open, holder {writing.name}")


def test_the_gate_comes_before_the_database_at_boot_and_without_it_there_is_none(standing_by: Region) -> None:
    for node in standing_by.db:
        properties = on(node, "systemctl show -p Requires -p After patroni.service")
        for line in properties.splitlines():
            assert "censuschat-gate.service" in line
        assert on(node, "systemctl is-enabled censuschat-gate.service censuschat-guard.service").split() == [
            "enabled",
            "enabled",
        ]


# ---- how the right to write is lost ----


@contextlib.contextmanager
def store_out_of_reach(region: Region) -> Iterator[float]:
    """The region's database nodes reach no member of the lease store. Gives the moment."""
    table = "table inet censuschat_test"
    rules = "\n".join(
        (
            f"{table} {{",
            "chain output { type filter hook output priority 0; policy accept; tcp dport 12379 drop; }",
            "}",
        )
    )
    try:
        for node in region.db:
            on(node, "nft -f -", text=rules)
        yield time.monotonic()
    finally:
        for node in region.db:
            on(node, f"nft delete {table} 2>/dev/null || true")


def lease_is_there() -> bool:
    return "lease" in store_keys("lease")


def is_closed(region: Region) -> bool:
    """No node of the region takes a connection of its application; asked of the kernel too."""
    return all(
        can_connect(region.app, address(node)) == "refused" and status(node)["kernel_gate"] == "closed"
        for node in region.db
    )


def test_a_region_that_loses_the_store_closes_in_time_and_takes_its_lease_back(
    writing: Region, session: Session
) -> None:
    epoch = store_keys("epoch")["epoch"]["epoch"]
    with store_out_of_reach(writing) as lost_at:
        last = session.wait_for_end(CLOSE_AFTER_S + SLACK_S + 2)
        assert CLOSE_AFTER_S - RENEW_S - SLACK_S < last - lost_at < CLOSE_AFTER_S + SLACK_S
        eventually("all gates are closed", lambda: is_closed(writing), RENEW_S + SLACK_S)
        assert lease_is_there(), "the lease ended before the last gate was closed"
        eventually("the lease ends", lambda: not lease_is_there(), 2 * TTL_S)
        eventually("the database is demoted", lambda: all(status(n)["follows"] is True for n in writing.db), 2 * TTL_S)
    eventually("the region serves again", writing.serves, 60)
    assert store_keys("epoch")["epoch"]["epoch"] == epoch + 1
    again = Session(writing.app, writing.primary())
    try:
        eventually("a new session writes", again.is_writing)
    finally:
        again.close()


def test_frozen_guards_leave_it_to_the_kernel_which_closes_before_the_lease_ends(
    writing: Region, session: Session
) -> None:
    # Without systemd's watchdog, which would replace a frozen guard long before.
    with guard_settings(writing.db, "WatchdogSec=0"):
        eventually("all gates are open", writing.serves)
        assert session.is_writing(), f"a restart of the guard ended a session: {session.end}"
        frozen_at = signal_guards(writing.db, "STOP")
        try:
            last = session.wait_for_end(KERNEL_AFTER_S + SLACK_S + 2)
            assert last - frozen_at > KERNEL_AFTER_S - RENEW_S - SLACK_S
            assert last - frozen_at < KERNEL_AFTER_S + SLACK_S
            # The guards of the other nodes were frozen a little later.
            eventually("all gates are closed", lambda: is_closed(writing), RENEW_S + SLACK_S)
            assert lease_is_there(), "the lease ended before the last gate was closed"
        finally:
            signal_guards(writing.db, "CONT")


def test_a_frozen_guard_is_replaced_and_its_clients_notice_nothing(writing: Region, session: Session) -> None:
    node = writing.primary()
    show = "systemctl show -p MainPID --value censuschat-guard.service"
    before = on(node, show)
    signal_guards([node], "STOP")
    eventually("a new guard", lambda: on(node, show) not in (before, "0\n"), CLOSE_AFTER_S + 10)
    end = time.monotonic() + KERNEL_AFTER_S + SLACK_S
    while time.monotonic() < end:
        time.sleep(0.3)
        assert session.is_writing(), session.end


def test_stopped_guards_leave_it_to_the_kernel(writing: Region, session: Session) -> None:
    try:
        stopped_at = time.monotonic()
        for node in writing.db:
            on(node, "systemctl stop censuschat-guard.service")
        last = session.wait_for_end(KERNEL_AFTER_S + SLACK_S + 5)
        assert last - stopped_at < KERNEL_AFTER_S + SLACK_S + 2
        eventually("all gates are closed", lambda: is_closed(writing), RENEW_S + SLACK_S)
        assert lease_is_there(), "the lease ended before the last gate was closed"
    finally:
        for node in writing.db:
            on(node, "systemctl start censuschat-guard.service")


def test_a_wall_clock_that_jumps_changes_nothing(writing: Region, session: Session) -> None:
    clock = "/run/censuschat-test-clock"

    def set_clocks(offset: str) -> None:
        for node in writing.db:
            on(node, f"echo '{offset}' > {clock}")

    set_clocks("+0")
    try:
        with guard_settings(writing.db, *faked_clock(clock)):
            eventually("all gates are open", writing.serves)
            for offset in ("+1h", "-50m", "+0"):
                set_clocks(offset)
                maps = on(writing.primary(), "cat /proc/$(systemctl show -p MainPID --value censuschat-guard)/maps")
                assert "libfaketime" in maps
                end = time.monotonic() + CLOSE_AFTER_S + RENEW_S
                while time.monotonic() < end:
                    time.sleep(0.3)
                    assert session.is_writing(), f"with a clock at {offset}: {session.end}"
            with store_out_of_reach(writing) as lost_at:
                time.sleep(1)
                set_clocks("-50m")
                last = session.wait_for_end(CLOSE_AFTER_S + SLACK_S + 2)
                assert CLOSE_AFTER_S - RENEW_S - SLACK_S < last - lost_at < CLOSE_AFTER_S + SLACK_S
                assert lease_is_there(), "the lease ended before the gate was closed"
    finally:
        for node in writing.db:
            on(node, f"rm -f {clock}")


def test_a_guard_whose_every_clock_is_slow_is_overruled_by_the_kernel(writing: Region, session: Session) -> None:
    """To this guard a second lasts two: by its own clocks it would keep the gate open for twice close_after."""
    slow = (f"Environment=LD_PRELOAD={LIBFAKETIME}", "Environment='FAKETIME=+0 x0.5'", "WatchdogSec=0")
    with guard_settings(writing.db, *slow):
        eventually("all gates are open", writing.serves)
        assert session.is_writing(), session.end
        with store_out_of_reach(writing) as lost_at:
            last = session.wait_for_end(KERNEL_AFTER_S + SLACK_S + 2)
            assert last - lost_at < KERNEL_AFTER_S + SLACK_S
            assert lease_is_there(), "the lease ended before the gate was closed"


def test_a_flushed_ruleset_is_put_back_within_a_turn(writing: Region, standing_by: Region) -> None:
    for node in (standing_by.db[0], writing.db[-1]):
        on(node, "nft flush ruleset")
        eventually(
            f"the gate of {node} is back",
            lambda n=node: "censuschat_guard" in on(n, "nft list tables"),  # type: ignore[misc]
            RENEW_S + SLACK_S + 2,
        )
    assert can_connect(standing_by.app, address(standing_by.db[0])) == "refused"


# ---- giving it away ----


def write_lease(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the module as a playbook would, on the witness; its result."""
    witness = next(n for n in LAB.nodes if n.role == "witness").name
    environment = {
        **os.environ,
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
    }
    play = [
        {
            "hosts": witness,
            "gather_facts": False,
            "tasks": [
                {
                    "censuschat.infra.write_lease": {
                        "environment_name": "{{ write_guard_environment }}",
                        "endpoints": "{{ write_guard_endpoints }}",
                        **dict(argument.split("=", 1) for argument in arguments),
                    },
                    "become": True,
                    "register": "result",
                    "ignore_errors": True,
                },
                {
                    "ansible.builtin.copy": {
                        "content": "{{ result | to_json }}",
                        "dest": str(tmp_path / "result.json"),
                    },
                    "delegate_to": "localhost",
                },
            ],
        }
    ]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", INVENTORY, str(tmp_path / "play.yml")]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (tmp_path / "result.json").exists(), done.stdout + done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    return result


def test_the_module_shows_the_lease_and_leaves_what_is_right(writing: Region, tmp_path: Path) -> None:
    seen = write_lease(tmp_path)
    assert (seen["holder"], seen["changed"], seen["gates"]) == (writing.name, False, writing.db)
    for state in ("held", "handed_over"):
        assert write_lease(tmp_path, f"state={state}", f"region={writing.name}")["changed"] is False
    assert store_keys("epoch")["epoch"]["epoch"] == seen["epoch"]


def test_the_module_refuses_to_push_a_living_region_aside(
    writing: Region, standing_by: Region, session: Session, tmp_path: Path
) -> None:
    refused = write_lease(tmp_path, "state=held", f"region={standing_by.name}")
    assert refused["failed"] is True
    for words in (writing.name, "keeps renewing", "state=handed_over"):
        assert words in refused["msg"]
    assert session.is_writing()


def test_a_hand_over_there_and_back_loses_no_acknowledged_write(
    writing: Region, standing_by: Region, tmp_path: Path
) -> None:
    for giver, taker in ((writing, standing_by), (standing_by, writing)):
        client = f"hand-over-{time.time_ns()}"
        session = Session(giver.app, giver.primary())
        insert = f"insert into rows (client, n, region) values ('{client}', 1, '{giver.name}')"
        psql = "runuser -u postgres -- psql -XAtq -d censuschat"
        on(giver.primary(), f'{psql} -c "{insert}"')
        try:
            moved = write_lease(tmp_path, "state=handed_over", f"region={taker.name}")
            assert (moved.get("holder"), moved.get("method")) == (taker.name, "handed_over"), moved
            last = session.wait_for_end(1)
        finally:
            session.close()
        eventually(f"{taker.name} serves", taker.serves)
        later = Session(taker.app, taker.primary())
        try:
            eventually("the taker's session writes", later.is_writing)
            assert later.acks[0] > last
        finally:
            later.close()
        assert on(taker.primary(), f"{psql} -c \"select count(*) from rows where client = '{client}'\"") == "1\n"
        on(taker.primary(), f"{psql} -c \"delete from rows where client = '{client}'\"")
        assert is_closed(giver)
