# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a platform is made of, typed, and how it is read from data with every refusal before anything is touched.

CPU is in millicores, memory in bytes, times in seconds, shares in percent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.reader import (
    PlatformError,
    Problems,
    Reader,
    cpu,
    cpu_text,
    memory,
    memory_text,
    merge,
)

SYSTEM = "system"
POD_SECURITY = ("restricted", "baseline", "privileged")
SWITCHES = ("keda", "vpa", "karpenter", "cluster_autoscaler", "mesh")
_FILE = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
_ENV = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_SECRET_KEY = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")


@dataclasses.dataclass(frozen=True)
class Amount:
    cpu: int
    memory: int

    def times(self, count: int) -> Amount:
        return Amount(self.cpu * count, self.memory * count)

    def plus(self, other: Amount) -> Amount:
        return Amount(self.cpu + other.cpu, self.memory + other.memory)

    def within(self, other: Amount) -> bool:
        return self.cpu <= other.cpu and self.memory <= other.memory

    def quantities(self) -> dict[str, str]:
        return {"cpu": cpu_text(self.cpu), "memory": memory_text(self.memory)}

    def __str__(self) -> str:
        return f"{cpu_text(self.cpu)} CPU and {memory_text(self.memory)}"


@dataclasses.dataclass(frozen=True)
class Range:
    """What one pod of a kind may have."""

    low: Amount
    high: Amount


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Traffic with addresses outside the cluster. No ports means all of them."""

    cidrs: tuple[str, ...]
    ports: tuple[int, ...]
    protocol: str


@dataclasses.dataclass(frozen=True)
class Namespace:
    """`stage` is the environment it belongs to, `system` for those every cluster has."""

    name: str
    stage: str
    tier: str
    kind: str
    pod_security: str
    quota: Amount | None
    pods: int | None
    isolated: bool
    internal: bool
    ingress: tuple[Blocks, ...]
    egress: tuple[Blocks, ...]
    labels: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class End:
    """One end of a path: a whole namespace, or the pods of one service in it."""

    namespace: str
    service: str = ""


@dataclasses.dataclass(frozen=True)
class Path:
    """Who may open connections to whom. No ports means all of them."""

    source: End
    target: End
    ports: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rate:
    pods: int
    every_s: int


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A custom metric. `per_pod`: the query's value is shared by the pods; otherwise it is compared as it is."""

    name: str
    query: str
    target: str
    per_pod: bool


@dataclasses.dataclass(frozen=True)
class Scaling:
    cpu: int
    memory: int
    up: Rate
    down: Rate
    triggers: tuple[Trigger, ...]


@dataclasses.dataclass(frozen=True)
class Probe:
    path: str
    port: int
    period_s: int
    timeout_s: int
    failures: int


@dataclasses.dataclass(frozen=True)
class Vertical:
    """`mode` is the VPA's update mode. A resource without a range is left to the service's own request."""

    mode: str
    cpu: tuple[int, int] | None
    memory: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Service:
    """One service in one namespace."""

    name: str
    namespace: str
    stage: str
    kind: str
    image: str
    pull_policy: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    port: int
    node_port: int | None
    clients: tuple[str, ...]
    minimum: int
    maximum: int
    standby: int
    scaling: Scaling | None
    vertical: Vertical | None
    requests: Amount
    limits: Amount
    env: tuple[tuple[str, str], ...]
    fields: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]
    files_path: str
    secrets: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    secret_name: str
    secrets_path: str
    run_as_user: int
    writable: tuple[str, ...]
    probes: tuple[tuple[str, Probe], ...]
    grace_s: int
    egress: tuple[Blocks, ...]
    priority: str
    spot: bool
    surge: int
    unavailable: int
    labels: tuple[tuple[str, str], ...]

    def replicas(self, active: bool) -> int:
        """How many pods the region starts with: the standby's while another region serves."""
        return self.minimum if active else self.standby


@dataclasses.dataclass(frozen=True)
class Priority:
    name: str
    value: int
    preempts: bool
    description: str


@dataclasses.dataclass(frozen=True)
class Access:
    """Groups of people, as the API server's authenticator names them, and the emergency account."""

    viewers: tuple[str, ...]
    operators: tuple[str, ...]
    on_call: tuple[str, ...]
    namespace: str
    max_s: int


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The limits of node autoscaling and what a node is."""

    minimum: int
    maximum: int
    spot_percent: int
    pending_s: int
    utilization_percent: int
    idle_s: int
    cpu: int
    memory: int
    instance_types: tuple[str, ...]
    zones: tuple[str, ...]
    system_disk: str
    data_disk: str
    on_demand_group: str
    spot_group: str
    node_class: Mapping[str, Any]

    @property
    def spot(self) -> int:
        """Nodes that may be spot instances when the cluster is at its largest."""
        return self.maximum * self.spot_percent // 100

    @property
    def on_demand(self) -> int:
        """On-demand nodes beyond the floor when the cluster is at its largest."""
        return self.maximum - self.minimum - self.spot


@dataclasses.dataclass(frozen=True)
class Platform:
    stages: tuple[str, ...]
    ranges: Mapping[str, Range]
    namespaces: tuple[Namespace, ...]
    paths: tuple[Path, ...]
    services: tuple[Service, ...]
    priorities: tuple[Priority, ...]
    sidecar: Amount
    access: Access
    nodes: Nodes
    switches: Mapping[str, bool]
    active: bool
    zone_spread: str
    prometheus: str
    dns_blocks: tuple[str, ...]
    missing_blocks: tuple[str, ...]
    homeless: tuple[tuple[str, str], ...]

    def namespace(self, name: str) -> Namespace | None:
        return next((n for n in self.namespaces if n.name == name), None)

    def on(self, switch: str) -> bool:
        return self.switches[switch]

    def limits(self, service: Service) -> Amount:
        """What one pod of the service may use, its sidecar included."""
        return service.limits.plus(self.sidecar)


def read(catalogue: Mapping[str, Any], site: Mapping[str, Any]) -> Platform:
    """The platform that the catalogue and the site's own data describe together.

    Raises PlatformError naming every problem.
    """
    problems = Problems()
    with Reader(problems, "platform", merge(catalogue, site)) as top:
        platform = _Parser(top).platform()
    problems.settle()
    _check(platform, problems)
    problems.settle()
    return platform


class _Parser:
    def __init__(self, top: Reader) -> None:
        self._top = top
        with top.reader("switches") as switches:
            self._switches = {name: switches.flag(name, False) for name in SWITCHES}
        with top.reader("blocks") as blocks:
            self._blocks = {name: blocks.blocks(name) for name in top.mapping("blocks")}
        self._missing: dict[str, None] = {}
        self._homeless: list[tuple[str, str]] = []

    def platform(self) -> Platform:
        top = self._top
        ranges = {name: _range(reader) for name, reader in top.entries("ranges")}
        chosen = top.names("stages_here")
        stages = dict(top.entries("stages"))
        for stage in chosen:
            if stage not in stages:
                top.problem("stages_here", f"{stage} is not a stage; known are {', '.join(stages)}")
        namespaces = tuple(
            namespace
            for name, reader in top.entries("namespaces")
            if (namespace := self._namespace(name, reader, ranges, tuple(stages)))
            and namespace.stage in (SYSTEM, *chosen)
        )
        services = self._services({name: stages[name] for name in chosen if name in stages}, namespaces)
        for reader in stages.values():
            with reader:
                reader.mapping("services")
        return Platform(
            stages=chosen,
            ranges=ranges,
            namespaces=namespaces,
            paths=self._paths(namespaces, services),
            services=services,
            sidecar=self._sidecar(),
            priorities=tuple(_priority(name, reader) for name, reader in top.entries("priorities")),
            access=_access(top.reader("access")),
            nodes=_nodes(top.reader("nodes")),
            switches=self._switches,
            active=top.flag("region_active", True),
            zone_spread=top.text("zone_spread", "DoNotSchedule", one_of=("DoNotSchedule", "ScheduleAnyway")),
            prometheus=top.text("prometheus_url"),
            dns_blocks=self._blocks.get("dns", ()),
            missing_blocks=tuple(self._missing),
            homeless=tuple(self._homeless),
        )

    def _sidecar(self) -> Amount:
        """What the mesh adds to each pod: nothing while it is off."""
        with self._top.reader("sidecar") as reader:
            amount = Amount(reader.amount("cpu", cpu), reader.amount("memory", memory))
            return amount if self._switches["mesh"] else Amount(0, 0)

    def _wanted(self, reader: Reader) -> bool:
        """Whether the switch that the entry needs is on."""
        needs = reader.text("needs", one_of=SWITCHES)
        return not needs or self._switches[needs]

    def _traffic(self, reader: Reader, key: str) -> tuple[Blocks, ...]:
        found = []
        for item in reader.items(key):
            with item:
                cidrs = list(item.blocks("cidrs"))
                name = item.text("block")
                if name and name not in self._blocks:
                    item.problem("block", f"{name} is not among the blocks {', '.join(self._blocks)}")
                elif name:
                    cidrs += self._blocks[name]
                    if not self._blocks[name]:
                        self._missing[name] = None
                elif not cidrs:
                    item.problem("", "names neither cidrs nor a block")
                ports = _ports(item, "ports")
                protocol = item.text("protocol", "TCP", one_of=("TCP", "UDP", "SCTP"))
                # Without addresses the rule opens nothing; an empty list of peers would open it to everybody.
                if cidrs:
                    found.append(Blocks(tuple(cidrs), ports, protocol))
        return tuple(found)

    def _namespace(
        self, name: str, data: Reader, ranges: Mapping[str, Range], stages: tuple[str, ...]
    ) -> Namespace | None:
        with data as reader:
            wanted = self._wanted(reader)
            kind = reader.text("kind")
            if kind and kind not in ranges:
                reader.problem("kind", f"{kind} is not a kind of pod; known are {', '.join(ranges)}")
            security = reader.text("pod_security", "restricted", one_of=POD_SECURITY)
            if not reader.text("reason") and security != "restricted":
                reader.problem("reason", f"is missing; say why the namespace must be {security}")
            quota = None
            pods = None
            if reader.has("quota"):
                with reader.reader("quota") as limits:
                    if limits.has("pods"):
                        pods = limits.number("pods")
                    if limits.has("cpu") or limits.has("memory"):
                        quota = Amount(limits.amount("cpu", cpu), limits.amount("memory", memory))
            namespace = Namespace(
                name=name,
                stage=reader.text("stage", required=True, one_of=(SYSTEM, *stages)),
                tier=reader.text("tier"),
                kind=kind,
                pod_security=security,
                quota=quota,
                pods=pods,
                isolated=reader.flag("isolated", True),
                internal=reader.flag("internal", False),
                ingress=self._traffic(reader, "ingress"),
                egress=self._traffic(reader, "egress"),
                labels=_pairs(reader, "labels"),
            )
            return namespace if wanted else None

    def _paths(self, namespaces: tuple[Namespace, ...], services: tuple[Service, ...]) -> tuple[Path, ...]:
        here = {n.name for n in namespaces}
        known = set(self._top.mapping("namespaces"))
        found: dict[Path, None] = {}
        for item in self._top.items("paths"):
            with item:
                wanted = self._wanted(item)
                ends = [item.text(key, required=True) for key in ("from", "to")]
                ports = _ports(item, "ports")
                for end in ends:
                    if end and end not in known:
                        item.problem("", f"{end} is not a namespace of the platform")
                if wanted and all(end in here for end in ends):
                    found[Path(End(ends[0]), End(ends[1]), ports)] = None
        names = set(self._top.mapping("services"))
        for item in self._top.items("calls"):
            with item:
                wanted = self._wanted(item)
                source, outer = item.text("from"), item.text("from_namespace")
                target, inner = item.text("to"), item.text("to_namespace")
                ports = _ports(item, "ports")
                if bool(source) == bool(outer) or bool(target) == bool(inner):
                    item.problem("", "needs one of from and from_namespace, and one of to and to_namespace")
                    continue
                for key, value, among in (
                    ("from", source, names),
                    ("to", target, names),
                    ("from_namespace", outer, known),
                    ("to_namespace", inner, known),
                ):
                    if value and value not in among:
                        item.problem(key, f"{value} is not among {', '.join(sorted(among))}")
                if not wanted or (outer and outer not in here) or (inner and inner not in here):
                    continue
                for path in _calls(source, outer, target, inner, services):
                    found[dataclasses.replace(path, ports=ports or path.ports)] = None
        return tuple(found)

    def _services(self, stages: Mapping[str, Reader], namespaces: tuple[Namespace, ...]) -> tuple[Service, ...]:
        top = self._top
        catalogue = top.mapping("services")
        names = top.names("service_names", catalogue)
        for name in names:
            if name not in catalogue:
                top.problem("service_names", f"{name} is not a service; known are {', '.join(catalogue)}")
        pattern = top.text("image")
        found = []
        # Also the services that are not chosen are read: a mistake in them should not wait for the day they are.
        for stage, reader in [*stages.items(), *([] if stages else [("", None)])]:
            own = reader.mapping("services") if reader else {}
            for name in own:
                if name not in catalogue:
                    top.problems.add(f"platform.stages.{stage}.services", f"{name} is not a service")
            merged = Reader(top.problems, "platform", {"services": merge(catalogue, own)})
            for name, data in merged.entries("services"):
                with data as entry:
                    wanted = entry.flag("enabled", True) and name in names and bool(stage)
                    tier = entry.text("tier", required=True)
                    home = next((n for n in namespaces if n.stage == stage and n.tier == tier), None)
                    service = self._service(name, entry, stage, home, pattern if wanted and home else "unused")
                    if wanted and home:
                        found.append(service)
                    elif wanted:
                        self._homeless.append((stage, name))
        return tuple(found)

    def _service(self, name: str, reader: Reader, stage: str, home: Namespace | None, pattern: str) -> Service:
        kind = reader.text("kind", required=True)
        image = reader.text("image", pattern.replace("{service}", name))
        if not image:
            reader.problem("image", "is missing; name it here or give kubernetes_platform_image with {service} in it")
        if home is not None and kind and kind != home.kind:
            reader.problem("kind", f"is {kind}, but {home.name} holds pods of kind {home.kind}")
        port = reader.number("port", low=1, high=65535)
        with reader.reader("replicas") as replicas:
            minimum = replicas.number("min", low=1)
            maximum = replicas.number("max", minimum)
            standby = replicas.number("standby", minimum, low=1)
        if minimum > maximum:
            reader.problem("replicas", f"min {minimum} is more than max {maximum}")
        if standby > maximum:
            reader.problem("replicas", f"standby {standby} is more than max {maximum}")
        with reader.reader("resources") as resources:
            amounts = {}
            for key in ("requests", "limits"):
                with resources.reader(key) as amount:
                    amounts[key] = Amount(amount.amount("cpu", cpu), amount.amount("memory", memory))
        secrets = _pairs(reader, "secrets", _SECRET_KEY)
        secret_name = reader.name("secret_name")
        if secrets and secret_name:
            reader.problem("secret_name", "and secrets exclude each other: the Secret is either yours or the role's")
        node_port = reader.number("node_port", low=1, high=65535) if reader.has("node_port") else None
        clients = reader.blocks("clients")
        block = reader.text("clients_block")
        if block and block not in self._blocks:
            reader.problem("clients_block", f"{block} is not among the blocks {', '.join(self._blocks)}")
        clients += self._blocks.get(block, ())
        if node_port is not None and not clients:
            reader.problem("clients", "is missing: name the address blocks that may use the node_port")
        texts, fields = _environment(reader)
        writable = reader.texts("writable", ("/tmp",))  # noqa: S108  # a path inside a container of its own
        autoscale = reader.flag("autoscale", True)
        scaling = _scaling(reader)
        with reader.reader("rollout") as rollout:
            surge, unavailable = rollout.number("surge", 1), rollout.number("unavailable", 0)
            if surge == unavailable == 0:
                rollout.problem("", "surge and unavailable are both 0: no pod could ever be replaced")
        return Service(
            name=name,
            namespace=home.name if home else "",
            stage=stage,
            kind=kind,
            image=image,
            pull_policy=reader.text("pull_policy", "IfNotPresent", one_of=("IfNotPresent", "Always", "Never")),
            command=reader.texts("command"),
            args=reader.texts("args"),
            port=port,
            node_port=node_port,
            clients=clients,
            minimum=minimum,
            maximum=maximum,
            standby=standby,
            scaling=scaling if autoscale else None,
            vertical=_vertical(reader),
            requests=amounts["requests"],
            limits=amounts["limits"],
            env=texts,
            fields=fields,
            files=_pairs(reader, "files", _FILE),
            files_path=reader.text("files_path", "/etc/censuschat"),
            secrets=secrets,
            secret_name=secret_name,
            secrets_path=reader.text("secrets_path", "/run/secrets/censuschat"),
            run_as_user=reader.number("run_as_user", 65532, low=1),
            writable=writable,
            probes=_probes(reader, port),
            grace_s=reader.number("grace_s", 30),
            egress=self._traffic(reader, "egress"),
            priority=reader.text("priority"),
            spot=reader.flag("spot", False),
            surge=surge,
            unavailable=unavailable,
            labels=_pairs(reader, "labels"),
        )


def _calls(source: str, outer: str, target: str, inner: str, services: tuple[Service, ...]) -> list[Path]:
    """The paths of one drawn call, in each stage that has the services."""
    if source and target:
        return [
            Path(End(a.namespace, a.name), End(b.namespace, b.name), (b.port,))
            for a in services
            if a.name == source
            for b in services
            if b.name == target and b.stage == a.stage
        ]
    if target:
        return [Path(End(outer), End(b.namespace, b.name), (b.port,)) for b in services if b.name == target]
    return [Path(End(a.namespace, a.name), End(inner)) for a in services if a.name == source]


def _pairs(reader: Reader, key: str, pattern: re.Pattern[str] | None = None) -> tuple[tuple[str, str], ...]:
    found = []
    for name, value in reader.mapping(key).items():
        if pattern and not pattern.match(name):
            reader.problem(key, f"{name!r} is not a name that can be used here")
        if value is None:
            continue
        if not isinstance(value, str | int | float | bool):
            reader.problem(key, f"{name} must be a text, not {type(value).__name__}")
            continue
        found.append((name, ("true" if value else "false") if isinstance(value, bool) else str(value)))
    return tuple(found)


def _environment(reader: Reader) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Plain variables, and those that Kubernetes fills in: ``{field: status.hostIP}``."""
    texts: dict[str, Any] = {}
    fields: dict[str, str] = {}
    for name, value in reader.mapping("env").items():
        if not _ENV.match(name):
            reader.problem("env", f"{name!r} is not a variable's name")
        elif isinstance(value, Mapping):
            with Reader(reader.problems, f"{reader.where}.env.{name}", value) as item:
                fields[name] = item.text("field", required=True)
        else:
            texts[name] = value
    plain = Reader(reader.problems, reader.where, {"env": texts})
    return _pairs(plain, "env"), tuple(fields.items())


def _ports(reader: Reader, key: str) -> tuple[int, ...]:
    found = []
    for text in reader.texts(key):
        if not text.isdigit() or not 1 <= int(text) <= 65535:
            reader.problem(key, f"{text!r} is not a port")
        else:
            found.append(int(text))
    return tuple(found)


def _range(data: Reader) -> Range:
    with data as reader:
        ends: list[Amount] = []
        bounds: dict[str, list[int]] = {}
        for key, convert in (("cpu", cpu), ("memory", memory)):
            texts = reader.texts(key)
            try:
                bounds[key] = [convert(text) for text in texts]
            except ValueError as error:
                reader.problem(key, str(error))
                bounds[key] = [0, 0]
                continue
            if len(texts) != 2 or bounds[key][0] > bounds[key][1]:
                reader.problem(key, "must be two amounts, the smaller one first")
                bounds[key] = [0, 0]
        ends = [Amount(bounds["cpu"][end], bounds["memory"][end]) for end in (0, 1)]
        return Range(ends[0], ends[1])


def _rate(data: Reader) -> Rate:
    with data as reader:
        # The API refuses policies over periods longer than half an hour.
        return Rate(reader.number("pods", low=1), reader.number("every_s", low=1, high=1800))


def _scaling(reader: Reader) -> Scaling | None:
    if not reader.has("scaling"):
        return None
    with reader.reader("scaling") as scaling:
        triggers = []
        for item in scaling.items("triggers"):
            with item:
                triggers.append(
                    Trigger(
                        name=item.name("name", required=True),
                        query=item.text("query", required=True),
                        target=item.text("target", required=True),
                        per_pod=item.flag("per_pod", True),
                    )
                )
        return Scaling(
            cpu=scaling.number("cpu", low=1, high=100),
            memory=scaling.number("memory", low=1, high=100),
            up=_rate(scaling.reader("up")),
            down=_rate(scaling.reader("down")),
            triggers=tuple(triggers),
        )


def _vertical(reader: Reader) -> Vertical | None:
    if not reader.has("vertical"):
        return None
    with reader.reader("vertical") as vertical:
        bounds: dict[str, tuple[int, int] | None] = {}
        for key, convert in (("cpu", cpu), ("memory", memory)):
            texts = vertical.texts(key)
            bounds[key] = None
            if not texts:
                continue
            try:
                low, high = (convert(text) for text in texts)
            except ValueError as error:
                vertical.problem(key, f"must be two amounts: {error}")
                continue
            bounds[key] = (low, high)
        mode = vertical.text("mode", "InPlaceOrRecreate", one_of=("InPlaceOrRecreate", "Initial", "Off"))
        return Vertical(mode, bounds["cpu"], bounds["memory"])


def _probes(reader: Reader, port: int) -> tuple[tuple[str, Probe], ...]:
    found = []
    with reader.reader("probes") as probes:
        for kind in ("startup", "readiness", "liveness"):
            if not probes.has(kind):
                if kind != "startup":
                    probes.problem(kind, "is missing: a pod that cannot serve would go unnoticed")
                continue
            with probes.reader(kind) as probe:
                found.append(
                    (
                        kind,
                        Probe(
                            path=probe.text("path", required=True),
                            port=probe.number("port", port, low=1, high=65535),
                            period_s=probe.number("period_s", 10, low=1),
                            timeout_s=probe.number("timeout_s", 1, low=1),
                            failures=probe.number("failures", 3, low=1),
                        ),
                    )
                )
    return tuple(found)


def _priority(name: str, data: Reader) -> Priority:
    with data as reader:
        return Priority(
            name=name,
            value=reader.number("value", high=1_000_000_000),
            preempts=reader.flag("preempts", True),
            description=reader.text("description", required=True),
        )


def _access(data: Reader) -> Access:
    with data as reader:
        return Access(
            viewers=reader.texts("viewers"),
            operators=reader.texts("operators"),
            on_call=reader.texts("on_call"),
            namespace=reader.name("namespace", required=True),
            # The API server issues no token for less than ten minutes.
            max_s=reader.number("max_s", low=600, high=86400),
        )


def _nodes(data: Reader) -> Nodes:
    with data as reader:
        nodes = Nodes(
            minimum=reader.number("min", low=1),
            maximum=reader.number("max", low=1),
            spot_percent=reader.number("spot_percent", high=100),
            pending_s=reader.number("pending_s"),
            utilization_percent=reader.number("utilization_percent", low=1, high=99),
            idle_s=reader.number("idle_s"),
            cpu=reader.amount("cpu", cpu),
            memory=reader.amount("memory", memory),
            instance_types=reader.texts("instance_types"),
            zones=reader.texts("zones"),
            system_disk=reader.text("system_disk", required=True),
            data_disk=reader.text("data_disk", required=True),
            on_demand_group=reader.text("on_demand_group", required=True),
            spot_group=reader.text("spot_group", required=True),
            node_class=reader.mapping("node_class"),
        )
        if nodes.minimum > nodes.maximum:
            reader.problem("", f"min {nodes.minimum} is more than max {nodes.maximum}")
        elif nodes.on_demand < 0:
            reader.problem("", f"min {nodes.minimum} and {nodes.spot} spot nodes are more than max {nodes.maximum}")
        return nodes


def _check(platform: Platform, problems: Problems) -> None:
    """What can only be said of the whole."""
    ports: dict[int, str] = {}
    priorities = {priority.name for priority in platform.priorities}
    for service in platform.services:
        where = f"platform.services.{service.name} in {service.namespace}"
        if service.node_port is not None:
            other = ports.setdefault(service.node_port, f"{service.namespace}/{service.name}")
            if other != f"{service.namespace}/{service.name}":
                problems.add(where, f"node_port {service.node_port} is taken by {other}")
            if not 30000 <= service.node_port <= 32767:
                problems.add(where, f"node_port {service.node_port} is outside 30000-32767")
        if service.priority and service.priority not in priorities:
            problems.add(where, f"priority {service.priority} is not among {', '.join(sorted(priorities))}")
        names = [path.replace("/", "__") for path in dict(service.files)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.add(where, f"two of its files would both be kept as {name}")
        _check_resources(where, service, platform.ranges[service.kind], platform.sidecar, problems)
        if platform.on("vpa") and service.vertical and service.vertical.mode != "Off" and service.scaling:
            problems.add(
                where,
                "scales on CPU and memory horizontally, so its VPA must be Off: both would act on the same measurement",
            )
    if platform.on("karpenter"):
        for key in ("role", "cluster_tag", "ami_alias"):
            if not platform.nodes.node_class.get(key):
                problems.add(f"platform.nodes.node_class.{key}", "is missing; Karpenter cannot start nodes without it")
    if platform.on("keda") and not platform.prometheus and any(s.scaling for s in platform.services):
        problems.add("platform.prometheus_url", "is missing; KEDA reads the custom metrics there")
    if platform.access.namespace not in {n.name for n in platform.namespaces}:
        problems.add("platform.access.namespace", f"{platform.access.namespace} is not a namespace of the platform")
    for namespace in platform.namespaces:
        inside = [s for s in platform.services if s.namespace == namespace.name]
        if namespace.quota is None or not inside:
            continue
        least = Amount(0, 0)
        for service in inside:
            least = least.plus(platform.limits(service).times(service.replicas(platform.active)))
        if not least.within(namespace.quota):
            problems.add(
                f"platform.namespaces.{namespace.name}.quota",
                f"is {namespace.quota}, but the fewest replicas of {', '.join(s.name for s in inside)} "
                f"are limited to {least} together: they could never all start",
            )


def _check_resources(where: str, service: Service, allowed: Range, sidecar: Amount, problems: Problems) -> None:
    drawn = f"the range of kind {service.kind}, {allowed.low} to {allowed.high}"
    for key in ("cpu", "memory"):
        low, high = getattr(allowed.low, key), getattr(allowed.high, key)
        request, limit = getattr(service.requests, key), getattr(service.limits, key)
        if request > limit:
            problems.add(where, f"requests more {key} than its limit")
        if not low <= request <= high:
            problems.add(where, f"its request of {key} is outside {drawn}")
        if not low <= limit <= high:
            problems.add(where, f"its limit of {key} is outside {drawn}")
        elif limit + getattr(sidecar, key) > high:
            problems.add(where, f"its limit of {key} and that of the mesh's sidecar together are outside {drawn}")
        vertical = getattr(service.vertical, key) if service.vertical else None
        if vertical and not low <= vertical[0] <= vertical[1] <= limit:
            problems.add(where, f"its VPA may set {key} outside {drawn}, or above the limit")


__all__ = ["PlatformError", "read"]
