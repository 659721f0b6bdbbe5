# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the figures of a platform mean together: where two of them cannot both be reached, and which one binds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ansible_collections.censuschat.infra.plugins.module_utils.platform_objects.model import (
    SYSTEM,
    Amount,
    Namespace,
    Platform,
    Service,
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """`about` names the figures, `binds` the one that decides, `text` says it in a sentence."""

    about: str
    binds: str
    text: str


def findings(platform: Platform) -> list[Finding]:
    """All of them, computed from the platform's figures."""
    found: list[Finding] = []
    for namespace in platform.namespaces:
        inside = [s for s in platform.services if s.namespace == namespace.name]
        if namespace.quota and inside:
            found += _namespace(platform, namespace, namespace.quota, inside)
    found += _stages(platform)
    found += _cluster(platform)
    found += _rest(platform)
    return found


def fits(quota: Amount, one: Amount) -> int:
    """How many pods of that size the quota admits."""
    return min(quota.cpu // one.cpu, quota.memory // one.memory)


def total(platform: Platform, services: list[Service], count: str) -> Amount:
    """The limits of all pods together, at their `minimum` or `maximum` count."""
    amount = Amount(0, 0)
    for service in services:
        amount = amount.plus(platform.limits(service).times(getattr(service, count)))
    return amount


def _count(pods: int) -> str:
    return f"{pods} pod{'s' if pods != 1 else ''}"


def _namespace(platform: Platform, namespace: Namespace, quota: Amount, inside: list[Service]) -> Iterator[Finding]:
    least, most = total(platform, inside, "minimum"), total(platform, inside, "maximum")
    fewest = sum(s.minimum for s in inside)
    if not most.within(quota):
        free = Amount(quota.cpu - least.cpu, quota.memory - least.memory)
        reach = ", ".join(
            f"{s.name} {min(s.maximum, s.minimum + fits(free, platform.limits(s)))} of {s.maximum}" for s in inside
        )
        yield Finding(
            f"{namespace.name}: quota and the most replicas",
            "the quota",
            f"{_count(sum(s.maximum for s in inside))} would be limited to {most}; the quota is {quota}. With all "
            f"others at their fewest a service reaches: {reach}.",
        )
    top = platform.ranges[namespace.kind].high.times(fewest)
    if not top.within(quota):
        yield Finding(
            f"{namespace.name}: quota and the range of kind {namespace.kind}",
            "the quota",
            f"The fewest replicas, {_count(fewest)}, with the most that one may have would be limited to {top}; the "
            f"quota is {quota}. The services' limits are set so that they come to {least}, which leaves "
            f"{Amount(quota.cpu - least.cpu, quota.memory - least.memory)} to scale and to roll out with.",
        )


def _stages(platform: Platform) -> Iterator[Finding]:
    """Whether what the first stage runs at least would fit the quotas of the others."""
    for namespace in platform.namespaces:
        if namespace.quota is None or namespace.stage in (SYSTEM, platform.stages[0]):
            continue
        homes = {n.name for n in platform.namespaces if n.stage == platform.stages[0] and n.tier == namespace.tier}
        model = [s for s in platform.services if s.namespace in homes]
        least = total(platform, model, "minimum")
        if not least.within(namespace.quota):
            yield Finding(
                f"{namespace.name}: quota and the fewest replicas",
                "the quota",
                f"The {_count(sum(s.minimum for s in model))} that {platform.stages[0]} has at least are limited to "
                f"{least}; the quota is {namespace.quota}. The stage has replica counts of its own.",
            )


def _cluster(platform: Platform) -> Iterator[Finding]:
    nodes = platform.nodes
    all_quotas = Amount(0, 0)
    for namespace in platform.namespaces:
        if namespace.stage != SYSTEM and namespace.quota:
            all_quotas = all_quotas.plus(namespace.quota)
    one = Amount(nodes.cpu, nodes.memory)
    needed = max(math.ceil(all_quotas.cpu / one.cpu), math.ceil(all_quotas.memory / one.memory))
    stages = ", ".join(platform.stages)
    if needed < nodes.maximum:
        yield Finding(
            f"quotas of {stages} and the nodes' maximum",
            "the quotas",
            f"All quotas together are {all_quotas}: {needed} nodes of {one} hold them. Beyond those and the system's "
            f"own pods the autoscaler has no reason to go on to {nodes.maximum}.",
        )
    for kind, allowed in platform.ranges.items():
        if allowed.high.cpu >= one.cpu or allowed.high.memory >= one.memory:
            yield Finding(
                f"range of kind {kind} and the size of a node",
                "the node",
                f"A pod may have up to {allowed.high}, a node has {one} and keeps some for itself: no node of that "
                "size holds the largest pod.",
            )
    yield Finding(
        "share of spot nodes",
        "the share",
        f"{nodes.spot_percent} % is drawn once as a saving and once as a share of the nodes; it is taken as the share: "
        f"{nodes.spot} of {nodes.maximum} nodes. {nodes.minimum} on-demand nodes are the floor, {nodes.on_demand} more "
        "may be added.",
    )


def _rest(platform: Platform) -> Iterator[Finding]:
    for kind in platform.ranges:
        if not any(n.kind == kind for n in platform.namespaces):
            yield Finding(
                f"range of kind {kind}",
                "nothing",
                f"No namespace is drawn for pods of kind {kind}. "
                f"Name one with `kind: {kind}` in kubernetes_platform_namespaces where such pods are to run.",
            )
    for stage, name in platform.homeless:
        yield Finding(
            f"{name} in {stage}", "the namespaces", f"No namespace for {name} is drawn in {stage}: not deployed."
        )
    for service in platform.services:
        scaling = service.scaling
        if not scaling or service.minimum == service.maximum:
            continue
        steps = math.ceil((service.maximum - service.minimum) / scaling.up.pods)
        down = math.ceil((service.maximum - service.minimum) / scaling.down.pods)
        yield Finding(
            f"{service.namespace}/{service.name}: rates",
            "the rates",
            f"From {service.minimum} to {service.maximum} pods takes {steps * scaling.up.every_s} s at least, back "
            f"{down * scaling.down.every_s} s.",
        )
        if scaling.triggers and not platform.on("keda"):
            names = ", ".join(trigger.name for trigger in scaling.triggers)
            yield Finding(
                f"{service.namespace}/{service.name}: custom metrics",
                "CPU and memory",
                f"{names} needs KEDA, which is switched off.",
            )
    if platform.missing_blocks:
        yield Finding(
            "addresses outside the cluster",
            "default deny",
            f"kubernetes_platform_blocks names no addresses for {', '.join(platform.missing_blocks)}: what leads there "
            "stays closed.",
        )


def page(platform: Platform) -> str:
    """The findings as a page of Markdown."""
    lines = [
        "# What the platform's figures mean together",
        "",
        "The figures of the specification are kept as they are drawn. Where two of them cannot both be reached, this",
        "page says which one binds. It is computed from the role's data; a test compares it with what they say today.",
        "",
        "| Figures | Binds | |",
        "|---|---|---|",
        *(f"| {finding.about} | {finding.binds} | {finding.text} |" for finding in findings(platform)),
    ]
    return "\n".join(lines) + "\n"
