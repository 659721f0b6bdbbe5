"""Start and stop the lab's clients, ask the service which of their writes it holds, and print the figures."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import yaml

from lab.background import Background
from lab.cli import EXIT_FAILED, Refusal
from lab.paths import PREFIX, STATE
from lab.resolve import Names, UnresolvedError
from lab.topology import Topology
from runbooks import ledger

DATABASE = "censuschat"
"""The application's database and its role, as the role `postgresql` names both by default."""
READBACK_S = 60.0
"""Seconds for which the service is asked for one client's rows before giving up."""


@dataclass(frozen=True)
class Prober:
    """One client: its name, the side it stands on, and how its process is started (without its first number)."""

    name: str
    side: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Service:
    """Where the service is: its name, and the port on each address that the name leads to."""

    name: str
    port: int


def outside(service: Service) -> list[Prober]:
    """The two clients outside both regions."""
    base = (sys.executable, "-m", "lab.prober", "outside", "--service", service.name, "--port", str(service.port))
    return [Prober(f"outside-{mode}", ledger.OUTSIDE, (*base, "--mode", mode)) for mode in ("fresh", "kept")]


def inside(topology: Topology, region: str, state: Path = STATE) -> list[Prober]:
    """The two clients inside a region: a session through its balancers and one straight to its database nodes.

    The second knows all database nodes and looks for the one that accepts writes, as libpq does by itself.
    """
    networks = json.dumps({site.name: str(site.network) for site in topology.sites})
    secret = (state / "secrets" / "postgresql_app").read_text(encoding="utf-8").split()[0]
    common = (
        f"dbname={DATABASE} user={DATABASE} sslmode=verify-ca sslrootcert={state}/pki/ca.crt "
        f"connect_timeout=2 application_name=censuschat-prober"
    )
    probers = []
    for kind, role, port, more in (
        ("session", "app", 6432, ""),
        ("direct", "db", 5432, " target_session_attrs=read-write"),
    ):
        hosts = ",".join(str(n.address) for n in topology.nodes if n.site == region and n.role == role)
        name = f"inside-{region}-{kind}"
        command = (
            *("ip", "netns", "exec", f"{PREFIX}client-{region}", sys.executable, "-m", "lab.prober", "session"),
            *("--side", region, "--regions", networks),
            *("--conninfo", f"host={hosts} port={port} {common}{more}"),
        )
        probers.append(Prober(name, region, command, {"PGPASSWORD": secret}))
    return probers


def ledgers(state: Path = STATE) -> list[Path]:
    """The ledgers of the present clients; those of earlier ones are in ``archive/`` beside them."""
    return sorted((state / "ledgers").glob("*.jsonl"))


def next_number(name: str, state: Path = STATE) -> int:
    """A first number that no attempt of this client, old ledgers included, has used.

    One number is left out: the attempt under way when a client was killed has no record.
    """
    files = [*(state / "ledgers").glob(f"**/{name}.jsonl")]
    used = [r.n for file in files for r in ledger.read(file) if r.n is not None]
    return max(used, default=-1) + 2


def archive(state: Path = STATE) -> None:
    """Put the ledgers of clients that have ended aside, so that the next ones begin with empty ledgers."""
    old = ledgers(state)
    if old:
        place = state / "ledgers" / "archive" / time.strftime("%Y%m%dT%H%M%S")
        place.mkdir(parents=True, exist_ok=True)
        for file in old:
            file.rename(place / file.name)


def process(name: str, state: Path = STATE) -> Background:
    """The background process of a client."""
    return Background(f"probe-{name}", state)


def running(state: Path = STATE) -> list[str]:
    """Names of the clients that run."""
    names = sorted(p.stem.removeprefix("probe-") for p in (state / "pids").glob("probe-*.json"))
    return [name for name in names if process(name, state).pid() is not None]


def start_all(probers: Iterable[Prober], *, rate: float, keep: bool, state: Path = STATE) -> list[str]:
    """Start the clients that do not run; returns their names. Old ledgers are archived first when no client runs.

    Raises BackgroundError or LedgerError when a client could not be started.
    """
    if not running(state) and not keep:
        archive(state)
    started = []
    for prober in probers:
        file = state / "ledgers" / f"{prober.name}.jsonl"
        number = next_number(prober.name, state)
        command = (
            *prober.command,
            *("--client", prober.name, "--ledger", str(file), "--first", str(number), "--rate", str(rate)),
        )
        if process(prober.name, state).start(command, env=dict(prober.env)):
            started.append(prober.name)
    return started


def stop_all(state: Path = STATE) -> list[str]:
    """End all clients; returns the names of those that ran."""
    return [name for name in running(state) if process(name, state).stop()]


class ReadbackError(Exception):
    """The service did not say which rows it holds; says for which client, and what the last answer was."""


def read_back(
    client: str, service: Service, names: Names, *, patience_s: float = READBACK_S
) -> tuple[float, list[int], str]:
    """Ask the service for all rows of a client: when it was asked (CLOCK_MONOTONIC), the numbers, the address asked.

    Raises ReadbackError after ``patience_s``.
    """
    deadline, turn, last = time.monotonic() + patience_s, 0, "never asked"
    while time.monotonic() < deadline:
        try:
            addresses = names.addresses(service.name)
            address = addresses[turn % len(addresses)]
            connection = http.client.HTTPConnection(address, service.port, timeout=5)
            asked = time.monotonic()
            try:
                connection.request("GET", f"/rows?client={quote(client)}")
                response = connection.getresponse()
                body = response.read()
            finally:
                connection.close()
            if response.status == 200:
                return asked, [int(n) for n in json.loads(body)["n"]], address
            last = f"{address}: HTTP {response.status} {body.decode(errors='replace').strip()}"
        except (UnresolvedError, OSError, http.client.HTTPException, ValueError, KeyError) as error:
            last = repr(error)
        turn += 1
        time.sleep(0.2)
    raise ReadbackError(f"the service did not give the rows of {client} in {patience_s:.0f} s; the last answer: {last}")


def readback_all(service: Service, state: Path = STATE, names: Names | None = None) -> dict[str, int]:
    """Write a readback into every ledger; returns how many rows of each client exist."""
    result = {}
    for file in ledgers(state):
        records = ledger.read(file)
        if not records:
            continue
        first = records[0]
        asked, found, address = read_back(first.client, service, names or Names())
        with ledger.LedgerWriter(file, first.client, first.side) as writer:
            writer.write("readback", found=found, address=address, t=asked)
        result[first.client] = len(found)
    return result


def service_of(inventory: Path) -> Service:
    """The service, from the environment's inventory."""
    with (inventory / "group_vars" / "all" / "main.yml").open(encoding="utf-8") as stream:
        variables = yaml.safe_load(stream)
    return Service(str(variables["service_name"]), int(variables["service_port"]))


def start(arguments: argparse.Namespace) -> int:
    """`lab probe start`."""
    from lab import verbs

    inventory, topology = verbs.current()
    regions = [site.name for site in topology.sites if any(c.site == site.name for c in topology.clients)]
    for region in arguments.inside:
        if region not in regions:
            raise Refusal(f"{region!r} has no clients inside; there are: {', '.join(regions)}")
    wanted = [] if arguments.inside and not arguments.all else outside(service_of(inventory))
    for region in regions if arguments.all else arguments.inside:
        wanted += inside(topology, region)
    started = start_all(wanted, rate=arguments.rate, keep=arguments.keep)
    print(f"started {', '.join(started)}" if started else "all of them run already")
    time.sleep(0.5)
    dead = [name for name in started if process(name).pid() is None]
    for name in dead:
        print(f"error: {name} ended at once: {process(name).tail(3)}", file=sys.stderr)
    return EXIT_FAILED if dead else 0


def stop(_arguments: argparse.Namespace) -> int:
    """`lab probe stop`."""
    stopped = stop_all()
    print(f"stopped {', '.join(stopped)}" if stopped else "no client runs")
    return 0


def readback(_arguments: argparse.Namespace) -> int:
    """`lab probe readback`."""
    from lab import verbs

    inventory, _ = verbs.current()
    try:
        result = readback_all(service_of(inventory))
    except (ReadbackError, ledger.LedgerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    for name, count in result.items():
        print(f"{name}: {count} rows exist")
    return 0


def figures(arguments: argparse.Namespace) -> int:
    """`lab probe figures`: what the ledgers say, for people or as JSON."""
    try:
        result = ledger.measure(ledger.read_all(ledgers()), start=arguments.start, end=arguments.end)
    except ledger.LedgerError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print("\n".join(lines(result)))
    return 0


def lines(result: ledger.Figures) -> Sequence[str]:
    """The figures for people; "not measured" is not 0."""

    def shown(value: float | None, unit: str = "") -> str:
        return (
            "not measured" if value is None else f"{value:.3f}{unit}" if isinstance(value, float) else f"{value}{unit}"
        )

    text = [
        f"recovery time        {shown(result.rto_s, ' s')}   (worst outside client)",
        f"recovery point       {shown(result.rpo_s, ' s')}",
        f"lost acknowledged    {shown(result.lost_acknowledged)}",
        f"two writers          {result.two_writers_ms} ms",
        f"database without a writer  {shown(result.database_gap_s, ' s')}",
        f"acknowledged {result.acks}, failed {result.fails}",
    ]
    for writer in result.writers:
        held = writer.last_t - writer.first_t
        text.append(f"  writer {writer.region} timeline {writer.timeline}: {writer.acks} in {held:.1f} s")
    for name, client in result.clients.items():
        text.append(
            f"  client {name}: {client.acks} acknowledged, {client.fails} failed, "
            f"recovery {shown(client.rto_s, ' s')}, lost {shown(client.lost)}"
        )
    for name in result.stuck_clients:
        text.append(f"  client {name} was served before the change of region and never after it")
    for name in result.unread_clients:
        text.append(f"  client {name} has acknowledgements that no readback was asked for: lab probe readback")
    return text
