"""The lab itself, while it is up: who reaches whom, that nothing leaves it, cuts, restarts.

us-west-2 is cut for a few seconds, less than a standby or the write lease minds; the witness is restarted.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import machine, nodes, report
from lab.fabric import UPLINK, space_of
from lab.paths import PREFIX, REPO, STATE
from lab.topology import Node, Topology
from tests.integration.packets import AT_ONCE_S, connect, overheard

ELSEWHERE = "203.0.113.1"
"""An address kept for documentation (RFC 5737): nobody's, and outside the lab."""


def run(*command: str, check: bool = True, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd=REPO, timeout=120)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def lab(*arguments: str) -> str:
    return run(sys.executable, "-m", "lab", *arguments)


def on(node: Node, script: str, check: bool = True) -> str:
    """Runs a shell script on a node, as its operator over ssh."""
    return run(*nodes.ssh(node, "sh", "-s"), check=check, stdin=script)


def reaches(where: str, node: Node) -> bool:
    return connect(where, node.address, 22)[0] == "connected"


def one(topology: Topology, region: str, role: str) -> Node:
    return next(node for node in topology.nodes if node.site == region and node.role == role)


def test_every_node_lets_its_operator_in_with_the_pinned_key(running_lab: Topology) -> None:
    for node in running_lab.nodes:
        assert on(node, "hostname; id -un; sudo -n id -u").split() == [node.name, "ops", "0"]


def test_another_host_key_is_refused(running_lab: Topology, tmp_path: Path) -> None:
    first, second = running_lab.nodes[0], running_lab.nodes[1]
    pinned = (STATE / "ssh" / "known_hosts").read_text().splitlines()
    key = next(line.split()[1:] for line in pinned if f",{second.name} " in line)
    wrong = tmp_path / "known_hosts"
    wrong.write_text(f"{first.address} {' '.join(key)}\n")
    pinning = f"UserKnownHostsFile={STATE}/ssh/known_hosts"
    command = [f"UserKnownHostsFile={wrong}" if word == pinning else word for word in nodes.ssh(first, "true")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr


def test_no_namespace_of_the_lab_has_a_default_route(running_lab: Topology) -> None:
    names = [n.name for n in running_lab.nodes] + [c.name for c in running_lab.clients] + ["fabric"]
    for name in names:
        routes = json.loads(run("ip", "-j", "-n", space_of(name), "route", "show", "table", "all"))
        assert [route for route in routes if route["dst"] in ("default", "0.0.0.0/0")] == []


def test_a_packet_to_elsewhere_is_refused_at_once_and_leaves_nothing_on_the_machines_links(
    running_lab: Topology,
) -> None:
    node = one(running_lab, "witness", "witness")
    router = running_lab.site(node.site).router
    inside = space_of(node.name)
    unreachable = {"101", "113"}  # ENETUNREACH, EHOSTUNREACH
    elsewhere = socket.inet_aton(ELSEWHERE)
    with overheard(elsewhere, node.address.packed) as heard:
        outcome, seconds = connect(inside, ELSEWHERE, 80)
        assert outcome in unreachable and seconds < AT_ONCE_S
        for gateway in (router, running_lab.operator.address):
            # Also when somebody on the node plants a default route, through the router or straight to the machine.
            run("ip", "-n", inside, "route", "add", "default", "via", str(gateway), "onlink", "dev", "eth0")
            try:
                outcome, seconds = connect(inside, ELSEWHERE, 80)
            finally:
                run("ip", "-n", inside, "route", "del", "default")
            if gateway == router:
                assert outcome in unreachable and seconds < AT_ONCE_S
            else:
                assert outcome != "connected"
        # The ear hears: a connection of the machine to the node is among what it heard.
        with socket.create_connection((str(node.address), 22), timeout=AT_ONCE_S):
            pass
    assert any(link == UPLINK and packet[16:20] == node.address.packed for link, packet in heard)
    assert [link for link, packet in heard if elsewhere in (packet[12:16], packet[16:20])] == []


def test_of_the_machine_nodes_reach_the_package_cache_only(running_lab: Topology) -> None:
    operator = running_lab.operator
    with socket.create_server((str(operator.address), 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(listener.getsockname(), timeout=1):
            pass  # it does accept
        for node in (one(running_lab, "us-east-1", "app"), one(running_lab, "witness", "witness")):
            outcome, seconds = connect(space_of(node.name), operator.address, port)
            assert outcome == "113" and seconds < AT_ONCE_S
            assert connect(space_of(node.name), operator.address, operator.packages_port)[0] == "connected"


def test_packages_come_through_the_cache_and_it_serves_nothing_else(running_lab: Topology) -> None:
    node = one(running_lab, "witness", "witness")
    cache = f"http://{running_lab.operator.address}:{running_lab.operator.packages_port}"
    sources = on(node, "cat /etc/apt/sources.list; ls /etc/apt/sources.list.d")
    assert {line.split()[1].rpartition("/debian")[0] for line in sources.splitlines() if line.startswith("deb ")} == {
        cache
    }
    said = on(
        node, "sudo apt-get -qq update && cd /tmp && apt-get download hello && dpkg-deb --field hello_*.deb Package"
    )
    assert said.splitlines()[-1] == "hello"
    fetch = (
        "python3 - <<'E'\nimport urllib.request, urllib.error\n"
        f"opener = urllib.request.build_opener(urllib.request.ProxyHandler({{'http': '{cache}'}}))\n"
        f"try: print(opener.open('http://{ELSEWHERE}/debian/', timeout=5).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\nE"
    )
    assert on(node, fetch) == "403"
    # Not even as a tunnel.
    with socket.create_connection((str(running_lab.operator.address), running_lab.operator.packages_port)) as proxy:
        proxy.settimeout(5)
        proxy.sendall(f"CONNECT {ELSEWHERE}:443 HTTP/1.1\r\nHost: {ELSEWHERE}:443\r\n\r\n".encode())
        assert b" 200 " not in proxy.recv(200).splitlines()[0]


ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""
# Sends each line it is given and prints what comes back, or "silence" after a second.
TALK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
connection.settimeout(1)
print("open", flush=True)
for line in sys.stdin:
    connection.sendall(line.encode())
    try:
        print(connection.recv(100).decode().strip(), flush=True)
    except TimeoutError:
        print("silence", flush=True)
"""


def start(where: str, program: str, *arguments: str) -> subprocess.Popen[str]:
    command = ("ip", "netns", "exec", where, "/usr/bin/python3", "-c", program, *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def say(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin and process.stdout
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_cut_is_both_ways_at_once_also_for_open_sessions_and_only_around_the_region(running_lab: Topology) -> None:
    region = "us-west-2"
    app, db = one(running_lab, region, "app"), one(running_lab, region, "db")
    other, witness = one(running_lab, "us-east-1", "app"), one(running_lab, "witness", "witness")
    inside, outside = space_of(f"client-{region}"), space_of("client-us-east-1")
    address = next(str(client.address) for client in running_lab.clients if client.site == region)
    server = start(inside, ECHO, address)
    assert server.stdout
    client = start(outside, TALK, address, server.stdout.readline().strip())
    assert client.stdout and client.stdout.readline().strip() == "open"
    try:
        assert say(client, "before") == "before"
        lab("cut", region)
        try:
            assert say(client, "during") == "silence"
            for source, target in ((app, other), (other, app), (db, witness), (witness, db)):
                outcome = connect(space_of(source.name), target.address, 22, 0.4)[0]
                assert outcome == "TimeoutError", f"{source.name} -> {target.name}: {outcome}"
            # The operator is outside as well.
            with pytest.raises(TimeoutError):
                socket.create_connection((str(app.address), 22), timeout=0.4)
            # Inside the region, and between the others, all goes on.
            assert reaches(space_of(app.name), db) and reaches(inside, app)
            assert reaches(outside, other) and reaches(space_of(other.name), witness)
            state = json.loads(lab("status", "--json"))
            assert state["cut"] == [region] and state["up"]
        finally:
            lab("heal", region)
        assert reaches(space_of(other.name), app) and reaches(space_of(db.name), witness)
        # The session was not reset: what was sent during the cut arrives after it.
        assert client.stdin and client.stdout
        deadline = time.monotonic() + 20
        arrived = ""
        while "during" not in arrived and time.monotonic() < deadline:
            arrived = say(client, "after")
        assert "during" in arrived
    finally:
        for process in (client, server):
            process.kill()
            process.communicate()
    events = [json.loads(line) for line in (STATE / "log" / "events.jsonl").read_text().splitlines()][-2:]
    assert [(event["event"], event["region"]) for event in events] == [("cut", region), ("heal", region)]
    assert 0 < events[1]["t"] - events[0]["t"] < 60 and abs(time.monotonic() - events[1]["t"]) < 60


def test_a_restart_is_a_reboot_that_keeps_address_route_and_host_key(running_lab: Topology) -> None:
    node = one(running_lab, "witness", "witness")
    look = "ip -4 -o addr show eth0; ip route; cat /etc/ssh/ssh_host_ed25519_key.pub; hostname; cat /etc/hosts"
    marker = "/run/lab-test-restart"
    before = on(node, f"sudo touch {marker}; {look}")
    assert "10.77.0.0/16 via" in before
    lab("restart", node.name)
    assert on(node, look) == before
    assert on(node, f"test -e {marker} && echo kept || echo gone") == "gone"
    others = report.observe(REPO / "inventories" / "lab", running_lab)
    assert report.missing(others) == []


def test_a_node_cannot_change_the_machines_kernel_clock_or_modules(running_lab: Topology) -> None:
    node = one(running_lab, "us-east-1", "app")
    before = Path("/proc/sys/vm/swappiness").read_text()
    assert "Read-only file system" in on(node, "sudo sh -c 'echo 1 > /proc/sys/vm/swappiness' 2>&1", check=False)
    assert Path("/proc/sys/vm/swappiness").read_text() == before
    bounding = int(on(node, "awk '/^CapBnd/ {print $2}' /proc/self/status"), 16)
    assert not bounding & (1 << 25), "CAP_SYS_TIME"
    assert not bounding & (1 << 16), "CAP_SYS_MODULE"
    # Its own network's settings are its own.
    assert (
        on(node, "sudo sysctl -n -w net.ipv4.tcp_fin_timeout=61; sudo sysctl -qw net.ipv4.tcp_fin_timeout=60") == "61"
    )


def test_a_kubernetes_node_has_what_a_kubelet_needs(running_lab: Topology) -> None:
    node = next(node for node in running_lab.nodes if node.kubernetes)
    look = (
        "findmnt -no PROPAGATION /; findmnt -no OPTIONS /opt/kubernetes | cut -d, -f1; "
        "touch /opt/kubernetes/x 2>&1 | grep -o 'Read-only file system'; ls -d /opt/kubernetes/v*/bin/kubelet | wc -l; "
        "ls /usr/lib/cni/host-local; df --output=fstype /var/lib/containerd /var/lib/kubelet /var/lib/etcd | tail -n 3"
    )
    propagation, options, refused, kubelets, plugin, *filesystems = on(node, f"sudo sh -s <<'E'\n{look}\nE").split("\n")
    assert (propagation, options, refused) == ("shared", "ro", "Read-only file system")
    assert int(kubelets) >= 1
    assert plugin == "/usr/lib/cni/host-local"
    assert "overlay" not in filesystems and len(filesystems) == 3
    routes = json.loads(run("ip", "-j", "-n", space_of(node.name), "route", "show"))
    site = running_lab.site(node.site)
    assert (str(site.services), str(site.router)) in {(route["dst"], route.get("gateway")) for route in routes}


def test_a_nodes_packet_filter_is_its_own_and_lets_elements_expire(running_lab: Topology) -> None:
    first, second = running_lab.nodes[:2]
    make = (
        "sudo nft add table inet lab_probe\n"
        "sudo nft add set inet lab_probe armed '{ type mark; flags timeout; }'\n"
        "sudo nft add element inet lab_probe armed '{ 7 timeout 1s }'\n"
        "sudo nft list set inet lab_probe armed\n"
    )
    try:
        assert "expires" in on(first, make)
        assert "lab_probe" not in on(second, "sudo nft list tables")
        time.sleep(1.2)
        assert "expires" not in on(first, "sudo nft list set inet lab_probe armed")
    finally:
        on(first, "sudo nft delete table inet lab_probe")


#: The option of `up` that makes a lab, by its number of nodes.
PROFILE = {7: ("--small",), 13: (), 16: ("--ha",)}


def containers() -> list[tuple[str, str, int]]:
    listed = json.loads(run("podman", "ps", "--all", "--filter", "label=censuschat.lab=true", "--format", "json"))
    return sorted((item["Names"][0], item["Id"], item["StartedAt"]) for item in listed)


def test_a_second_up_changes_nothing(running_lab: Topology) -> None:
    pids = {
        name: pid for name, pid in json.loads(lab("status", "--json"))["services"].items() if name in report.SERVICES
    }
    before = containers()
    assert [name for name, _, _ in before] == sorted(PREFIX + node.name for node in running_lab.nodes)
    lab("up", *PROFILE[len(running_lab.nodes)])
    assert containers() == before
    after = json.loads(lab("status", "--json"))["services"]
    assert {name: after[name] for name in pids} == pids


def test_the_kernel_settings_and_the_values_to_put_back_are_kept(running_lab: Topology) -> None:
    assert [setting.name for setting in machine.SETTINGS if not setting.met(machine.current(setting))] == []
    remembered = machine.remembered()
    changed = [setting for setting in machine.SETTINGS if setting.name in remembered]
    assert [setting.name for setting in changed if setting.met(remembered[setting.name])] == []
    assert STATE.stat().st_mode & 0o777 == 0o700


def test_the_labs_services_listen_on_its_own_addresses_only(running_lab: Topology) -> None:
    listening: dict[int, set[str]] = {}
    for line in run("ss", "-Hltn").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        listening.setdefault(int(port), set()).add(address)
    assert listening[running_lab.operator.packages_port] == {str(running_lab.operator.address)}
    assert listening[15000] == {"127.0.0.1"}
    assert listening[15353] == {"127.0.0.1"}
    links = [link["ifname"] for link in json.loads(run("ip", "-j", "link", "show"))]
    assert links.count(UPLINK) == 1
