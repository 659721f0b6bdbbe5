# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The planner of the firewall: nftables tables, on disk and loaded, and whether they let this run in again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import shown

MAIN = "/etc/nftables.conf"
DIRECTORY = "/etc/nftables.conf.d"
INCLUDE = f'include "{DIRECTORY}/*.nft"'
HEADER = "# Managed by censuschat.infra.node_harden; local changes are overwritten.\n"
SERVICE = "nftables.service"
SERVICE_DROP_IN = "/etc/systemd/system/nftables.service.d/censuschat.conf"


@dataclasses.dataclass(frozen=True)
class Firewall:
    """A table of the family inet with its chains; the ports stand in for @TCP_PORTS@ and @UDP_PORTS@."""

    table: str
    ruleset: str
    tcp_ports: tuple[str, ...] = ()
    udp_ports: tuple[str, ...] = ()

    @staticmethod
    def of(data: Mapping[str, Any]) -> Firewall:
        return Firewall(
            table=data["table"],
            ruleset=data["ruleset"],
            tcp_ports=tuple(str(port) for port in data.get("tcp_ports") or ()),
            udp_ports=tuple(str(port) for port in data.get("udp_ports") or ()),
        )

    @property
    def path(self) -> str:
        return f"{DIRECTORY}/{self.table}.nft"


@dataclasses.dataclass(frozen=True)
class FirewallSeen:
    """Files, the loaded table in its comparable form ("" when there is none), and what we had loaded.

    `kept` is the form that the kernel gave the table right after our last load of the text whose hash is `kept_hash`.
    """

    file: str | None = None
    main: str | None = None
    loaded: str = ""
    kept: str = ""
    kept_hash: str = ""
    service: UnitState = dataclasses.field(default_factory=lambda: UnitState(SERVICE))
    drop_in: str | None = None


def text_of(want: Firewall) -> str:
    """The file: it replaces the table as one transaction, also when it is already loaded."""
    lines = []
    for line in want.ruleset.rstrip().splitlines():
        ports = {"@TCP_PORTS@": want.tcp_ports, "@UDP_PORTS@": want.udp_ports}
        if any(name in line and not values for name, values in ports.items()):
            continue
        for name, values in ports.items():
            line = line.replace(name, ", ".join(values))  # noqa: PLW2901
        lines.append(f"  {line.rstrip()}\n" if line.strip() else "\n")
    name = f"table inet {want.table}"
    return f"{HEADER}{name}\ndelete {name}\n{name} {{\n{''.join(lines)}}}\n"


def comparable(answer: str) -> str:
    """`nft -j list table` without handles, counters and what a set has learned by itself, as one text."""
    try:
        items = json.loads(answer)["nftables"]
    except (ValueError, KeyError, TypeError):
        return ""
    return json.dumps([_plain(item) for item in items if "metainfo" not in item], sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        flags = value.get("flags") or []
        learned = "elem" in value and ("dynamic" in flags or "timeout" in flags)
        drop = {"handle", "index", *(["elem"] if learned else [])}
        return {k: ("counter" if k == "counter" else _plain(v)) for k, v in value.items() if k not in drop}
    return value


def main_text(now: str | None) -> str:
    """/etc/nftables.conf reading our directory; Debian's own example, which accepts all, gives way."""
    text = now or ""
    if INCLUDE in text.splitlines():
        return text
    if not _without_rules(text):
        return f"{text.rstrip()}\n{INCLUDE}\n"
    return f"#!/usr/sbin/nft -f\n{HEADER}{INCLUDE}\n"


def _without_rules(text: str) -> bool:
    """Whether the file holds no rule: empty, or the example chains of Debian's package."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    harmless = re.compile(
        r"flush ruleset|table inet filter \{|chain (input|forward|output) \{|\}"
        r"|type filter hook [a-z]+ priority (filter|0);( policy accept;)?"
    )
    return all(harmless.fullmatch(line) for line in lines)


def flushes(text: str) -> bool:
    """Whether loading this file would drop the tables of others (kube-proxy, a container runtime)."""
    return any(line.split() == ["flush", "ruleset"] for line in text.splitlines())


def service_text(names: Sequence[str]) -> str:
    """The drop-in of nftables.service: its stop takes our tables away, where Debian's own takes away those of all."""
    stops = "".join(f"ExecStop=-/usr/sbin/nft delete table inet {name}\n" for name in sorted(names))
    return f"{HEADER}[Service]\nExecStop=\n{stops}"


def plan(want: Firewall, seen: FirewallSeen, names: Sequence[str] = ()) -> list[Action]:
    """The files to write, the table to load, the service that loads it at boot; `names` are all tables of the node."""
    text = text_of(want)
    actions = []
    if seen.file != text:
        actions.append(Action("firewall_file", want.path, "content", text, shown(seen.file), text))
    main = main_text(seen.main)
    if seen.main != main:
        actions.append(Action("firewall_file", MAIN, f"reads {DIRECTORY}", main, shown(seen.main), main))
    drop_in = service_text(names or [want.table])
    if seen.drop_in != drop_in:
        actions.append(
            Action(
                "firewall_file", SERVICE_DROP_IN, "stop leaves others' tables", drop_in, shown(seen.drop_in), drop_in
            )
        )
    if not seen.loaded:
        actions.append(Action("firewall", f"table inet {want.table}", "is not loaded", want, "not loaded\n", text))
    elif seen.kept_hash != text_hash(text) or seen.loaded != seen.kept:
        why = "is loaded with other rules" if seen.kept_hash == text_hash(text) else "its rules change"
        actions.append(Action("firewall", f"table inet {want.table}", why, want, f"{why}\n", text))
    if seen.service.file_state != "enabled":
        now = seen.service.file_state or "not installed"
        actions.append(Action("firewall_boot", SERVICE, f"enable: is {now}", "enable", f"{now}\n", "enabled\n"))
    if not seen.service.running and not flushes(main):
        # With Debian's example gone its start loads our file and nothing else.
        actions.append(Action("firewall_boot", SERVICE, f"start: is {seen.service.active}", "start", after="active\n"))
    return actions


def text_hash(text: str) -> str:
    """The text by which a kept form of the loaded table is known again."""
    return hashlib.sha256(text.encode()).hexdigest()


def refused(text: str, port: int) -> str:
    """Why a ruleset would cut the present connection to TCP `port`; "" when it accepts it or lets the rest in."""
    if not port or not _drops_input(text):
        return ""
    for line in text.splitlines():
        match = re.search(r"tcp dport (\{[^}]*\}|\S+).*\baccept\b", line.split("#", 1)[0])
        if match and _has_port(match.group(1), port):
            return ""
    return (
        f"the firewall does not accept new connections to TCP port {port}, through which this run came, nothing was "
        "changed: add the port to the control's tcp_ports"
    )


def _drops_input(text: str) -> bool:
    """Whether a chain on input drops what no rule speaks of; a rule that drops some packets is for the live proof."""
    return any(
        re.search(r"hook input", chain) and re.search(r"policy drop|^\s*(counter\s+)?(drop|reject)\b", chain, re.M)
        for chain in re.split(r"^\s*chain ", text, flags=re.M)[1:]
    )


def _has_port(expression: str, port: int) -> bool:
    names = {"ssh": 22}
    for word in re.split(r"[{},\s]+", expression):
        low, _dash, high = word.partition("-")
        ends = [names.get(end, int(end) if end.isdigit() else -1) for end in (low, high or low)]
        if ends[0] <= port <= ends[1] and ends[0] > 0:
            return True
    return False
