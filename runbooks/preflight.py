"""Refuses before anything is touched: do the places that the runbook needs answer, and do they let us in?

It looks only at what the definition names. A fail-over does not ask the region that was lost.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from runbooks.definition import Reach
from runbooks.environment import Environment, Node, ssh_options
from runbooks.errors import Problem, one_line

CONNECT_S = 5
"""Seconds that a node has for the TCP connection; the ssh handshake and the login may take as long again."""
PUBLIC_AWS = "https://route53.amazonaws.com"

Fault = Literal["unreachable", "key", "host key"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one node said; fault is None when it let us in."""

    node: Node
    fault: Fault | None = None
    detail: str = ""


def check(environment: Environment, reach: Iterable[Reach], variables: Mapping[str, Any]) -> list[str]:
    """Ask everything the runbook needs; the hosts that may be missing and are.

    Raises Problem when something that is needed does not answer.
    """
    wanted = [(item, environment.nodes(environment.template(item.hosts, **variables))) for item in reach if item.hosts]
    urls = [(item, environment.template(item.url, **variables) or PUBLIC_AWS) for item in reach if item.url]
    nodes = list({node.name: node for _, group in wanted for node in group}.values())
    _keys_exist(environment, nodes)
    options = ssh_options()
    with ThreadPoolExecutor(max_workers=max(1, len(nodes) + len(urls))) as pool:
        servers = [(item, url, pool.submit(_server, str(url))) for item, url in urls]
        answers = {a.node.name: a for a in pool.map(lambda node: _ask(node, options), nodes)}
    for item, url, server in servers:
        error = server.result()
        if error:
            raise Problem(
                f"{url} does not answer ({error}), which is needed {item.why}",
                next_command=environment.help("aws", f"curl -sv {url}"),
            )
    for item, group in wanted:
        _enough(environment, item, [answers[node.name] for node in group])
    return sorted(name for name, answer in answers.items() if answer.fault)


def _keys_exist(environment: Environment, nodes: Sequence[Node]) -> None:
    for node in nodes:
        if not node.local and node.key is not None and not node.key.is_file():
            raise Problem(
                f"The ssh key {node.key} that the inventory {environment.path} names does not exist: "
                f"environment {environment.name} is not up on this machine",
                next_command=environment.help("unreachable", f"ansible all -i {environment.path} -m ping"),
            )


def _enough(environment: Environment, item: Reach, answers: Sequence[Answer]) -> None:
    good = sum(a.fault is None for a in answers)
    need = {"all": len(answers), "majority": len(answers) // 2 + 1}.get(str(item.need)) or int(item.need)
    if good >= min(need, len(answers)):
        return
    bad = [a for a in answers if a.fault]
    of = f"{len(bad)} of the {len(answers)} nodes needed {item.why}"
    examples = ", ".join(a.node.name for a in bad[:3]) + (" ..." if len(bad) > 3 else "")
    worst = bad[0]
    ping = f"ansible {worst.node.name} -i {environment.path} -m ping"
    if worst.fault == "key":
        raise Problem(
            f"The ssh key {worst.node.key} is refused by {of} ({examples}): it is not, or no longer, the key of "
            f"environment {environment.name} ({worst.detail})",
            next_command=environment.help("ssh_key", ping),
        )
    if worst.fault == "host key":
        raise Problem(
            f"The host key of {of} ({examples}) is not the one known of it: the node was rebuilt, or it is not the "
            f"node ({worst.detail})",
            next_command=environment.help("ssh_key", ping),
        )
    raise Problem(
        f"Environment {environment.name} is unreachable: {of} do not answer over ssh ({examples}: {worst.detail})",
        next_command=environment.help("unreachable", ping),
    )


def _ask(node: Node, options: Sequence[str]) -> Answer:
    """Log in and do nothing. The connection stays open for the steps when Ansible's options say so (ControlPersist)."""
    if node.local:
        return Answer(node)
    user = ["-o", f"User={node.user}"] if node.user else []
    key = ["-o", f"IdentityFile={node.key}", "-o", "IdentitiesOnly=yes"] if node.key else []
    command = [
        "ssh",
        "-n",
        "-T",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT_S}",
        "-o",
        "LogLevel=ERROR",
        "-o",
        f"Port={node.port}",
        *user,
        *key,
        *node.ssh_args,
        *options,
        node.address,
        "true",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * CONNECT_S, check=False)
    except subprocess.TimeoutExpired:
        return Answer(node, "unreachable", f"no login within {2 * CONNECT_S} s")
    except OSError as error:
        raise Problem(f"ssh cannot be started ({error})", next_command="command -v ssh") from error
    if done.returncode == 0:
        return Answer(node)
    detail = one_line(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    if "Permission denied" in done.stderr or "Too many authentication failures" in done.stderr:
        return Answer(node, "key", detail)
    if "Host key verification failed" in done.stderr or "HOST IDENTIFICATION HAS CHANGED" in done.stderr:
        return Answer(node, "host key", detail)
    return Answer(node, "unreachable", detail)


def _server(url: str) -> str:
    """Why the server of a URL does not accept a connection; empty when it does."""
    import socket

    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S):
            return ""
    except OSError as error:
        return error.strerror or str(error)
