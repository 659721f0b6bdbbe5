"""The cases of tests/unit/data/network_policy.yml, as values: what the rules and the kernel are both asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lab.network_policy import model

DATA: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "unit/data/network_policy.yml").read_text("utf-8"))
WORLD: dict[str, Any] = DATA["world"]
CASES: list[dict[str, Any]] = DATA["cases"]
_LINE = re.compile(r"(\S+) -> (\S+) (TCP|UDP|SCTP) (\d+)")


class Question(NamedTuple):
    """Whether a packet that opens a connection passes."""

    source: str
    target: str
    protocol: str
    port: int
    allowed: bool


def address_of(end: str) -> str:
    """The address of a pod, or the address itself."""
    return str(WORLD["pods"][end]["address"]) if "/" in end else end


def questions(case: dict[str, Any]) -> list[Question]:
    asked = []
    for kind in ("allowed", "denied"):
        for line in case.get(kind, ()):
            match = _LINE.fullmatch(line)
            assert match, f"{case['name']}: {line} is not FROM -> TO PROTOCOL PORT"
            asked.append(Question(match[1], match[2], match[3], int(match[4]), kind == "allowed"))
    assert asked, f"{case['name']} asks nothing"
    return asked


def policy_object(case: dict[str, Any], number: int) -> dict[str, Any]:
    policy = case["policies"][number]
    return {"metadata": {"namespace": policy["namespace"], "name": f"policy-{number}"}, "spec": policy["spec"]}


def cluster(case: dict[str, Any]) -> model.Cluster:
    """The case's cluster: the world with its policies, each read as the API gives it."""
    name_label = "kubernetes.io/metadata.name"
    return model.Cluster(
        WORLD["pod_cidr"],
        {name: model.Node(name, said["address"], said["pod_cidr"]) for name, said in WORLD["nodes"].items()},
        {name: {name_label: name, **labels} for name, labels in WORLD["namespaces"].items()},
        [
            model.Pod(
                namespace=name.partition("/")[0],
                name=name.partition("/")[2],
                uid=name,
                node=said["node"],
                addresses=(said["address"],),
                labels=said.get("labels", {}),
                ports=tuple((port, protocol, number) for port, protocol, number in said.get("ports", ())),
            )
            for name, said in WORLD["pods"].items()
        ],
        [model.policy_of(policy_object(case, number)) for number in range(len(case["policies"]))],
    )
