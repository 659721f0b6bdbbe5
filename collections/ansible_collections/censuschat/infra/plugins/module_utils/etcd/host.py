# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hands of etcd_member: systemd, the members' health, and the turn to restart. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ansible_collections.censuschat.infra.plugins.module_utils.etcd.member import Observed, Step, may_restart
from ansible_collections.censuschat.infra.plugins.module_utils.lease.etcd import (
    Etcd,
    EtcdError,
    Tls,
    absent,
    put,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import Commands

# The turn is lost by itself when the run that took it dies; longer than a start that replays a large log.
_TURN_S = 60
_TURN_KEY = "/censuschat-etcd/restart"
_HEALTH_TIMEOUT_S = 2.0


class MemberError(Exception):
    """A failure the user can act on."""


class Host:
    """One member on this node. `members` maps names to client URLs; `tls` is (ca, certificate, key)."""

    def __init__(
        self, unit: str, name: str, members: Mapping[str, str], tls: tuple[str, str, str], commands: Commands
    ) -> None:
        self.unit = unit
        self.name = name
        self.members = members
        self.tls = tls
        self.commands = commands

    def observe(self, restart_on: Sequence[str]) -> Observed:
        """The unit and, only when a restart is at stake, the other members."""
        shown = self.commands.run(
            ["systemctl", "show", "--property=ActiveState,ActiveEnterTimestampMonotonic", self.unit]
        )
        values = dict(line.split("=", 1) for line in shown.out.splitlines() if "=" in line)
        active = values.get("ActiveState") == "active"
        # From systemd's monotonic stamp: exact to the microsecond, and a stepped clock moves both sides alike.
        age = time.monotonic() - int(values.get("ActiveEnterTimestampMonotonic") or 0) / 1e6
        since = time.time() - age
        stale = tuple(p for p in restart_on if _changed_at(p) > since)
        if not active or not stale:
            return Observed(active=active, stale=stale)
        return Observed(active=active, stale=stale, serving=self.serving())

    def serving(self) -> frozenset[str]:
        """Names of the members whose health check passes; the check reads through the quorum."""
        return frozenset(name for name, url in self.members.items() if self._healthy(url))

    def _healthy(self, url: str) -> bool:
        try:
            context = ssl.create_default_context(cafile=self.tls[0])
            context.load_cert_chain(self.tls[1], self.tls[2])
            host = urllib.parse.urlsplit(url)
            connection = http.client.HTTPSConnection(
                host.hostname or "", host.port or 2379, timeout=_HEALTH_TIMEOUT_S, context=context
            )
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                answer = connection.getresponse()
                return str(json.load(answer).get("health")) == "true"
        except (OSError, ValueError, http.client.HTTPException):
            return False

    def apply(self, step: Step, deadline: float) -> None:
        """Carry the step out; `deadline` is on the monotonic clock."""
        if step is Step.START:
            self.commands.must(["systemctl", "start", self.unit], "starting the member")
        elif step is Step.RESTART:
            self.commands.must(["systemctl", "restart", self.unit], "restarting the member")
        elif step is Step.RESTART_IN_TURN:
            with self._turn(deadline):
                self._wait_allowed(deadline)
                self.commands.must(["systemctl", "restart", self.unit], "restarting the member")
                self.wait_serving(deadline)

    def wait_serving(self, deadline: float) -> frozenset[str]:
        """Wait until this member serves; the members that do then."""
        while not self._healthy(self.members[self.name]):
            if time.monotonic() > deadline:
                others = sorted(self.serving())
                raise MemberError(
                    f"does not serve at {self.members[self.name]}; of the others "
                    f"{', '.join(others) if others else 'none'} serve. "
                    f"Look at `journalctl -u {self.unit}` here; a cluster of {len(self.members)} needs "
                    f"{len(self.members) // 2 + 1} members"
                )
            time.sleep(0.2)
        return self.serving()

    def _wait_allowed(self, deadline: float) -> None:
        while why := may_restart(self.name, list(self.members), self.serving()):
            if time.monotonic() > deadline:
                raise MemberError(f"not restarted, the cluster would lose its quorum: {why}. Repair that member first")
            time.sleep(0.5)

    @contextlib.contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        client = Etcd(list(self.members.values()), Tls(*self.tls), request_timeout_s=3.0, budget_s=10.0)
        try:
            lease = client.grant(_TURN_S)
            while not client.transaction([absent(_TURN_KEY)], [put(_TURN_KEY, self.name, lease)]):
                if time.monotonic() > deadline:
                    raise MemberError(f"its turn to restart did not come: another member holds {_TURN_KEY}")
                client.keep_alive(lease)
                time.sleep(0.3)
            try:
                yield
            finally:
                client.revoke(lease)
        except EtcdError as error:
            raise MemberError(f"the turn to restart could not be taken or given back: {error}") from error
        finally:
            client.close()


def _changed_at(path: str) -> float:
    """When the file was last changed (ctime, unix seconds); 0 when there is none."""
    try:
        return Path(path).stat().st_ctime
    except FileNotFoundError:
        return 0.0
