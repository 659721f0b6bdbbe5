"""Refuses before anything is touched: do the places that the runbook needs answer, and do they let us in?

It looks only at what the definition names. A fail-over does not ask the region that was lost.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from runbooks.definition import Reach
from runbooks.environment import Environment, Node, ssh_options
from runbooks.errors import Problem, one_line

CONNECT_S = 5
"""Seconds that a node has for the TCP connection; the ssh handshake and the login may take as long again."""
GRACE_S = 0.3
"""Seconds that late hosts have once there are enough."""
PUBLIC_AWS = "https://route53.amazonaws.com"

Fault = Literal["unreachable", "key", "host key"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one node said; fault is None when it let us in."""

    node: Node
    fault: Fault | None = None
    detail: str = ""


def check(
    environment: Environment,
    reach: Iterable[Reach],
    variables: Mapping[str, Any],
    *,
    patient: bool = True,
    part: bool = False,
) -> list[str]:
    """Ask everything the runbook needs; the hosts that may be missing and are.

    patient: wait for every host. Otherwise only until there are enough of each, and a moment longer: whoever is late
    counts as missing. part: the inventory holds a part of the environment's hosts, and others may have a whole group.
    Raises Problem when something that is needed does not answer.
    """
    asked = [
        (item, environment.nodes(environment.template(item.hosts, **variables), none=part))
        for item in reach
        if item.hosts
    ]
    asked = [(item, group) for item, group in asked if group]
    wanted = [(item, group) for item, group in asked if item.port is None]
    ports = [(item, item.port, group) for item, group in asked if item.port is not None]
    urls = [(item, environment.template(item.url, **variables) or PUBLIC_AWS) for item in reach if item.url]
    nodes = list({node.name: node for _, group in wanted for node in group}.values())
    _keys_exist(environment, nodes)

    def enough(answers: Mapping[str, Answer]) -> bool:
        good = {name for name, answer in answers.items() if answer.fault is None}
        return not patient and all(
            sum(n.name in good for n in group) >= _needed(item, len(group)) for item, group in wanted
        )

    with ThreadPoolExecutor(max_workers=max(1, len(urls) + sum(len(group) for _, _, group in ports))) as pool:
        servers = [(item, url, pool.submit(_server, str(url))) for item, url in urls]
        listeners = [
            (item, port, [(node, pool.submit(_server, f"tcp://{node.address}:{port}")) for node in group])
            for item, port, group in ports
        ]
        answers = _ask(nodes, enough)
    for item, url, server in servers:
        error = server.result()
        if error:
            raise Problem(
                f"{url} does not answer ({error}), which is needed {item.why}",
                code="server-silent",
                next_command=environment.help(item.help, f"curl -sv {url}"),
            )
    for item, port, listening in listeners:
        faults = [(node, fault) for node, asked_for in listening if (fault := asked_for.result())]
        if len(listening) - len(faults) < _needed(item, len(listening)):
            raise Problem(
                f"Port {port} of {len(faults)} of the {len(listening)} nodes needed {item.why} does not answer "
                f"({', '.join(node.name for node, _ in faults[:3])}: {faults[0][1]})",
                code="port-silent",
                next_command=environment.help(item.help, f"nc -vz {faults[0][0].address} {port}"),
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
                code="ssh-key-missing",
                next_command=environment.help("unreachable", f"ansible all -i {environment.path} -m ping"),
            )


def _needed(item: Reach, hosts: int) -> int:
    need = {"all": hosts, "majority": hosts // 2 + 1}.get(str(item.need)) or int(item.need)
    return min(need, hosts)


def _enough(environment: Environment, item: Reach, answers: Sequence[Answer]) -> None:
    if sum(a.fault is None for a in answers) >= _needed(item, len(answers)):
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
            code="ssh-key-refused",
            next_command=environment.help("ssh_key", ping),
        )
    if worst.fault == "host key":
        raise Problem(
            f"The host key of {of} ({examples}) is not the one known of it: the node was rebuilt, or it is not the "
            f"node ({worst.detail})",
            code="ssh-host-key",
            next_command=environment.help("ssh_key", ping),
        )
    raise Problem(
        f"Environment {environment.name} is unreachable: {of} do not answer over ssh ({examples}: {worst.detail})",
        code="environment-unreachable",
        next_command=environment.help("unreachable", ping),
    )


def _ask(nodes: Sequence[Node], enough: Callable[[Mapping[str, Answer]], bool]) -> dict[str, Answer]:
    """Log in everywhere at once and do nothing, until all have answered or ``enough`` says so.

    The connections stay open for the steps when Ansible's options say so (ControlPersist).
    """
    answers = {node.name: Answer(node) for node in nodes if node.local}
    options = ssh_options() if len(answers) < len(nodes) else []
    with contextlib.ExitStack() as stack:
        logins = {node.name: stack.enter_context(_Login(node, options)) for node in nodes if not node.local}
        deadline, late = time.monotonic() + 2 * CONNECT_S, None
        while len(answers) < len(nodes) and time.monotonic() < (late or deadline):
            for name, login in logins.items():
                if name not in answers and login.process.poll() is not None:
                    answers[name] = login.answer()
            if late is None and enough(answers):
                late = time.monotonic() + GRACE_S
            time.sleep(0.01)
        for name, login in logins.items():
            if name not in answers:
                answers[name] = Answer(login.node, "unreachable", f"no login within {2 * CONNECT_S} s")
    return answers


class _Login:
    """One ssh on its way; ended when it is not waited for any longer."""

    def __init__(self, node: Node, options: Sequence[str]) -> None:
        self.node = node
        user = ["-o", f"User={node.user}"] if node.user else []
        key = ["-o", f"IdentityFile={node.key}", "-o", "IdentitiesOnly=yes"] if node.key else []
        command = [
            *("ssh", "-n", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "LogLevel=ERROR"),
            *("-o", f"Port={node.port}", *user, *key, *node.ssh_args, *options, node.address, "true"),
        ]
        # A file and not a pipe: the connection that stays open in the background would hold a pipe open.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._stderr)
        except OSError as error:
            self._stderr.close()
            raise Problem(
                f"ssh cannot be started ({error})", code="ssh-unstartable", next_command="command -v ssh"
            ) from error

    def answer(self) -> Answer:
        if self.process.returncode == 0:
            return Answer(self.node)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        detail = one_line(said.splitlines()[-1] if said else f"exit {self.process.returncode}")
        if "Permission denied" in said or "Too many authentication failures" in said:
            return Answer(self.node, "key", detail)
        if "Host key verification failed" in said or "HOST IDENTIFICATION HAS CHANGED" in said:
            return Answer(self.node, "host key", detail)
        return Answer(self.node, "unreachable", detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._stderr.close()


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
