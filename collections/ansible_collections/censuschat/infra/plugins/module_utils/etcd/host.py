# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hands of etcd_member: systemd, the members' health, and the turn to restart. Standard library only."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import shutil
import ssl
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ansible_collections.censuschat.infra.plugins.module_utils.etcd.member import (
    Observed,
    Step,
    may_rejoin,
    may_restart,
)
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


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the member's parts are. `peer_url` is its address for the other members."""

    unit: str
    config: str
    data: str
    peer_url: str

    @property
    def run_config(self) -> Path:
        """The configuration of a single start, and beside it the environment that points the unit to it."""
        return Path("/run") / f"{self.unit.removesuffix('.service')}.yml"

    @property
    def run_environment(self) -> Path:
        return self.run_config.with_suffix(".env")


class Host:
    """One member on this node. `members` maps names to client URLs; `tls` is (ca, certificate, key)."""

    def __init__(self, files: Files, name: str, members: Mapping[str, str], tls: tuple[str, str, str]) -> None:
        self.files = files
        self.unit = files.unit
        self.name = name
        self.members = members
        self.tls = tls
        self.commands = Commands()

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
            empty = not active and not (Path(self.files.data) / "member").exists()
            return Observed(active=active, empty=empty, stale=stale)
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

    def apply(self, step: Step, observed: Observed, deadline: float) -> str:
        """Carry the step out; `deadline` is on the monotonic clock. What had to be done beyond the plan."""
        if step is Step.START:
            started = self.commands.run(["systemctl", "start", self.unit])
            if started.code == 0:
                return ""
            if not may_rejoin(self.name, list(self.members), observed, self.serving()):
                raise MemberError(f"does not start: {started.tail(4)}. Look at `journalctl -u {self.unit}` here")
            self._rejoin(deadline)
            return "the others knew a member of this name that had data; it took a new place in the cluster"
        if step is Step.RESTART:
            self.commands.must(["systemctl", "restart", self.unit], "restarting the member")
        elif step is Step.RESTART_IN_TURN:
            with self._turn(deadline):
                self._wait_allowed(deadline)
                self.commands.must(["systemctl", "restart", self.unit], "restarting the member")
                self.wait_serving(deadline)
        return ""

    def _rejoin(self, deadline: float) -> None:
        """Take a new place in a cluster that has a quorum without this member."""
        others = [url for name, url in self.members.items() if name != self.name]
        client = Etcd(others, Tls(*self.tls), request_timeout_s=3.0, budget_s=10.0)
        self.commands.must(["systemctl", "stop", self.unit], "stopping the member that cannot start")
        try:
            known = client.call("/v3/cluster/member/list", {}).get("members") or []
            for member in known:
                if member.get("name") == self.name or self.files.peer_url in (member.get("peerURLs") or []):
                    client.call("/v3/cluster/member/remove", {"ID": member["ID"]})
            client.call("/v3/cluster/member/add", {"peerURLs": [self.files.peer_url]})
        except EtcdError as error:
            raise MemberError(f"cannot take a new place in the cluster: {error}") from error
        finally:
            client.close()
        # It had no data; what is there now is what the failed start left.
        for left in Path(self.files.data).iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        config = Path(self.files.config).read_text(encoding="utf-8")
        self.files.run_config.write_text(
            config.replace("initial-cluster-state: new", "initial-cluster-state: existing"), encoding="utf-8"
        )
        self.files.run_environment.write_text(f"CONFIG={self.files.run_config}\n", encoding="utf-8")
        try:
            self.commands.must(["systemctl", "start", self.unit], "starting the member in its new place")
            self.wait_serving(deadline)
        finally:
            # The member's own data say from now on which cluster it belongs to.
            self.files.run_environment.unlink()
            self.files.run_config.unlink()

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
