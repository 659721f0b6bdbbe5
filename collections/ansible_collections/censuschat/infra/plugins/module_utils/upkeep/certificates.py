# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Certificates of a kubeadm node: how long they last, renewal before it is too late, and who must be restarted for it.

kubeadm renews what it issued, from the authorities on the control plane's disk, so this works with a dead API too. A
component holds an old certificate when a file of its is newer than its process, which an interrupted run leaves to be
seen by the next one. Authorities are never renewed here, only watched. The kubelet rotates its own certificates; when
its client certificate has expired it cannot any more, and a control plane issues it a new one.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import datetime
import email.utils
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import static_pods
from .common import Metric, UpkeepError, alone, config_of, must, publish, reported, run, write_whole
from .static_pods import APISERVER, COMPONENTS, ETCD, PKI

CONFIG = "/etc/censuschat/kubernetes-certificates.json"
KUBERNETES = Path("/etc/kubernetes")
KUBELET_PKI = Path("/var/lib/kubelet/pki")
LEAF, AUTHORITY, KUBELET = "leaf", "authority", "kubelet"
DAY_S = 86400.0
# What kubeadm issues on a control plane: its name for `kubeadm certs renew`, its file, and who reads it.
ISSUED: tuple[tuple[str, Path, tuple[str, ...]], ...] = (
    ("admin.conf", KUBERNETES / "admin.conf", ()),
    ("super-admin.conf", KUBERNETES / "super-admin.conf", ()),
    ("controller-manager.conf", KUBERNETES / "controller-manager.conf", ("kube-controller-manager",)),
    ("scheduler.conf", KUBERNETES / "scheduler.conf", ("kube-scheduler",)),
    ("apiserver", PKI / "apiserver.crt", (APISERVER,)),
    ("apiserver-kubelet-client", PKI / "apiserver-kubelet-client.crt", (APISERVER,)),
    ("apiserver-etcd-client", PKI / "apiserver-etcd-client.crt", (APISERVER,)),
    ("front-proxy-client", PKI / "front-proxy-client.crt", (APISERVER,)),
    ("etcd-server", PKI / "etcd/server.crt", (ETCD,)),
    ("etcd-peer", PKI / "etcd/peer.crt", (ETCD,)),
    ("etcd-healthcheck-client", PKI / "etcd/healthcheck-client.crt", ()),
)
WATCHED: tuple[tuple[str, Path, str], ...] = (
    ("ca", PKI / "ca.crt", AUTHORITY),
    ("etcd-ca", PKI / "etcd/ca.crt", AUTHORITY),
    ("front-proxy-ca", PKI / "front-proxy-ca.crt", AUTHORITY),
    ("kubelet-client", KUBELET_PKI / "kubelet-client-current.pem", KUBELET),
    ("kubelet-serving", KUBELET_PKI / "kubelet-server-current.pem", KUBELET),
)
_EMBEDDED = re.compile(r"^\s*client-certificate-data:\s*(\S+)\s*$", re.MULTILINE)
_EMBEDDED_KEY = re.compile(r"^\s*client-key-data:\s*(\S+)\s*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """One certificate. not_after and changed in unix seconds; holders are the components that read it.

    changed is the file's mtime: an owner or mode set right makes no new certificate.
    """

    name: str
    kind: str
    not_after: float
    changed: float = 0.0
    holders: tuple[str, ...] = ()

    def days(self, now: float) -> float:
        """Days left, negative when expired."""
        return (self.not_after - now) / DAY_S


@dataclasses.dataclass(frozen=True)
class Policy:
    """Days left at which kubeadm's certificates are renewed, and at which those of others are a failure."""

    renew_days: float
    authority_days: float
    kubelet_days: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """renew: kubeadm's names. restart: components in order. reissue_kubelet: its client certificate has expired.

    expired: components whose own certificate is no longer valid, so a restart takes nothing away.
    alarms: what needs a person.
    """

    renew: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    reissue_kubelet: bool = False
    expired: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.renew or self.restart or self.reissue_kubelet)


def plan(
    certificates: Sequence[Certificate],
    started: Mapping[str, float],
    policy: Policy,
    now: float,
    *,
    also: Sequence[str] = (),
    can_sign: bool = True,
) -> Plan:
    """What is due. started: start of each running component (unix seconds). also: names to renew whatever is left.

    can_sign: the authority's key is on this node, so it is a control plane.
    """
    names = {c.name for c in certificates if c.kind == LEAF}
    unknown = sorted(set(also) - names)
    if unknown:
        raise UpkeepError(
            f"{', '.join(unknown)} is not a certificate that kubeadm renews here: {', '.join(sorted(names))}"
        )
    renew = [c for c in certificates if c.kind == LEAF and (c.days(now) < policy.renew_days or c.name in also)]
    stale = {h for c in certificates for h in c.holders if h in started and c.changed > started[h]}
    restart = stale | {h for c in renew for h in c.holders}
    expired = {h for c in certificates if c.days(now) <= 0 for h in c.holders}
    alarms, reissue = [], False
    for c in certificates:
        left = c.days(now)
        if c.kind == AUTHORITY and left < policy.authority_days:
            alarms.append(
                f"the authority {c.name} lasts {left:.0f} days more and is not renewed by itself: plan its replacement "
                "(Kubernetes documentation, manual rotation of CA certificates)"
            )
        elif c.kind == KUBELET and left < policy.kubelet_days:
            if c.name == "kubelet-client" and left <= 0 and can_sign:
                reissue = True
            else:
                alarms.append(_kubelet_alarm(c, left))
    return Plan(
        renew=tuple(c.name for c in renew),
        restart=tuple(c for c in COMPONENTS if c in restart),
        reissue_kubelet=reissue,
        expired=tuple(c for c in COMPONENTS if c in expired),
        alarms=tuple(alarms),
    )


def _kubelet_alarm(certificate: Certificate, left: float) -> str:
    what = "expired" if left <= 0 else f"lasts {left:.0f} days more and was not rotated by the kubelet"
    remedy = "`kubectl get csr` shows whether its request waits for approval"
    if certificate.name == "kubelet-client" and left <= 0:
        remedy = "take the node out with playbooks/cluster_remove.yml, and in again with playbooks/cluster.yml"
    return f"{certificate.name} {what}: {remedy}"


# ---- looking ----


def expiry_of(path: Path) -> float:
    """When the certificate in a PEM file or a kubeconfig expires, in unix seconds; UpkeepError when it holds none."""
    argv = ["openssl", "x509", "-noout", "-enddate"]
    if path.suffix == ".conf":
        done = run(argv, stdin=embedded(path, _EMBEDDED), timeout_s=10.0)
    else:
        done = run([*argv, "-in", str(path)], timeout_s=10.0)
    if done.code != 0 or not done.out.startswith("notAfter="):
        raise UpkeepError(f"{path} holds no certificate that openssl can read: {done.said}")
    return not_after(done.out)


def not_after(line: str) -> float:
    """Unix seconds of openssl's `notAfter=Nov 21 14:30:56 2026 GMT`."""
    month, day, clock, year, _zone = line.strip().removeprefix("notAfter=").split()
    return email.utils.parsedate_to_datetime(f"{day} {month} {year} {clock} +0000").timestamp()


def embedded(path: Path, pattern: re.Pattern[str]) -> str:
    """The certificate or key inside a kubeconfig as PEM text."""
    match = pattern.search(path.read_text(encoding="utf-8"))
    try:
        return base64.b64decode(match[1], validate=True).decode("ascii") if match else ""
    except (binascii.Error, UnicodeDecodeError):
        return ""


def observe() -> tuple[list[Certificate], dict[str, float]]:
    """The certificates of this node, and when its components were started."""
    found: list[Certificate] = []
    for name, path, holders in ISSUED:
        if path.is_file():
            found.append(Certificate(name, LEAF, expiry_of(path), path.stat().st_mtime, holders))
    for name, path, kind in WATCHED:
        if path.exists():
            found.append(Certificate(name, kind, expiry_of(path)))
    if not found:
        raise UpkeepError(f"no certificates in {PKI} and {KUBELET_PKI}: this node is not in a cluster")
    processes = {component: static_pods.find(component) for component in COMPONENTS}
    return found, {component: process.started for component, process in processes.items() if process}


# ---- acting ----


@dataclasses.dataclass(frozen=True)
class Config:
    """The job as the role configures it. others: addresses of the cluster's other control planes."""

    node: str
    policy: Policy
    kubeadm_config: str
    others: tuple[str, ...]
    api_port: int
    wait_s: float
    metrics: str

    @staticmethod
    def of(data: Mapping[str, Any]) -> Config:
        """Read the configuration file's content."""
        return Config(
            node=data["node"],
            policy=Policy(float(data["renew_days"]), float(data["authority_days"]), float(data["kubelet_days"])),
            kubeadm_config=data["kubeadm_config"],
            others=tuple(data["others"]),
            api_port=int(data["api_port"]),
            wait_s=float(data["wait_s"]),
            metrics=data["metrics"],
        )


def can_sign() -> bool:
    """Whether the cluster's authority can sign here."""
    return (PKI / "ca.key").is_file()


def apply(wanted: Plan, config: Config) -> list[str]:
    """Carry a plan out; what was done, in words. UpkeepError leaves the rest to the next run."""
    done = []
    for name in wanted.renew:
        argv = ["kubeadm", "certs", "renew", name]
        if Path(config.kubeadm_config).is_file():
            # Without it kubeadm asks the API server, which may be what has expired.
            argv += ["--config", config.kubeadm_config]
        must(argv, f"{name} was not renewed")
        done.append(f"renewed {name}")
    if wanted.reissue_kubelet:
        reissue_kubelet(config)
        done.append("gave the kubelet a new client certificate")
    with contextlib.ExitStack() as stack:
        # What has expired serves nobody, and its control planes need each other to serve again.
        if config.others and set(wanted.restart) - set(wanted.expired) and not {ETCD, APISERVER} & set(wanted.expired):
            stack.enter_context(static_pods.turn(3 * config.wait_s))
        for component in wanted.restart:
            if component not in wanted.expired:
                _refuse_second_outage(component, config)
            static_pods.restart(component, config.wait_s)
            _wait_serving(component, config)
            done.append(f"restarted {component}")
    return done


def _refuse_second_outage(component: str, config: Config) -> None:
    """The others have to serve before this node's part goes away for a moment."""
    if component == ETCD:
        local = "https://127.0.0.1:2379"
        others = [url for m in static_pods.members(local) for url in m.client_urls[:1] if m.name != config.node]
        ill = sorted(url for url, well in static_pods.healthy(others).items() if not well)
        if ill:
            raise UpkeepError(f"etcd is not restarted here while {', '.join(ill)} does not serve: repair it first")
    elif component == APISERVER:
        for address in config.others:
            why = static_pods.api_ready(address, config.api_port)
            if why:
                raise UpkeepError(f"{component} is not restarted here while the one at {address} is not ready: {why}")


def _wait_serving(component: str, config: Config) -> None:
    """Wait until the restarted component serves; those that nobody asks only have to run."""
    if component == APISERVER:
        static_pods.wait_api(config.node, config.wait_s, config.api_port)
    elif component == ETCD and not static_pods.wait_for(
        lambda: all(static_pods.healthy(["https://127.0.0.1:2379"]).values()), config.wait_s
    ):
        raise UpkeepError(
            f"etcd runs with its new certificate and has no quorum after {config.wait_s:.0f} s: renew "
            "on the other control planes too"
        )


def reissue_kubelet(config: Config) -> None:
    """Sign a client certificate for this node's kubelet, for a day: it then rotates it by itself."""
    argv = ["kubeadm", "kubeconfig", "user", "--client-name", f"system:node:{config.node}", "--org", "system:nodes"]
    argv += ["--validity-period", "24h", "--config", config.kubeadm_config]
    with tempfile.TemporaryDirectory() as directory:
        text = must(argv, "no new certificate could be signed for the kubelet").out
        path = Path(directory) / "kubelet.conf"
        write_whole(path, text)
        pem = embedded(path, _EMBEDDED) + embedded(path, _EMBEDDED_KEY)
    final = KUBELET_PKI / f"kubelet-client-{time.strftime('%Y-%m-%d-%H-%M-%S', time.gmtime())}.pem"
    write_whole(final, pem)
    fresh = KUBELET_PKI / ".kubelet-client-current.pem.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(final)
    fresh.replace(KUBELET_PKI / "kubelet-client-current.pem")
    must(["systemctl", "restart", "kubelet.service"], "the kubelet was not restarted with its new certificate")


def job(config: Config) -> str:
    """One run of the timer: renew what is due, restart who holds old files, publish the days left, complain aloud."""
    failure = ""
    done: list[str] = []
    with alone(Path("/run/censuschat-kubernetes-certificates.lock"), "the renewal of certificates"):
        certificates, started = observe()
        wanted = plan(certificates, started, config.policy, time.time(), can_sign=can_sign())
        try:
            done = apply(wanted, config)
            certificates, started = observe()
            failure = "; ".join(_unmet(certificates, started, config.policy))
        except UpkeepError as error:
            failure = str(error)
        publish(config.metrics, metrics_of(certificates, time.time(), config.node, not failure))
    if failure:
        raise UpkeepError(failure)
    shortest = min(certificates, key=lambda c: c.not_after)
    return f"{'; '.join(done) or 'nothing due'}; {shortest.name} lasts {shortest.days(time.time()):.0f} days"


def _unmet(certificates: Sequence[Certificate], started: Mapping[str, float], policy: Policy) -> list[str]:
    left = plan(certificates, started, policy, time.time(), can_sign=can_sign())
    unmet = [*left.alarms]
    if left.renew:
        unmet.append(
            f"{', '.join(left.renew)} were renewed and still last less than {policy.renew_days:.0f} days: "
            "certificateValidityPeriod of the cluster is shorter than the threshold"
        )
    return unmet


def metrics_of(certificates: Sequence[Certificate], now: float, node: str, success: bool) -> list[Metric]:
    """Days left of each certificate, and whether the last run did all it should."""
    name = "censuschat_kubernetes_certificate_"
    return [
        Metric(
            f"{name}last_run_success",
            "Whether the last run of the renewal job did all it should.",
            success,
            {"node": node},
        ),
        Metric(f"{name}last_run_timestamp_seconds", "When the renewal job last ran.", now, {"node": node}),
        *(
            Metric(
                f"{name}days_left",
                "Days until the certificate expires; negative when it has.",
                round(c.days(now), 3),
                {"node": node, "certificate": c.name, "kind": c.kind},
            )
            for c in certificates
        ),
    ]


def describe(certificates: Sequence[Certificate], now: float) -> list[dict[str, Any]]:
    """For people and for results: name, kind, when it expires, days left."""
    return [
        {
            "name": c.name,
            "kind": c.kind,
            "not_after": datetime.datetime.fromtimestamp(c.not_after, datetime.UTC).isoformat(),
            "days_left": round(c.days(now), 2),
        }
        for c in certificates
    ]


def main(arguments: Sequence[str]) -> int:
    """`censuschat-kubernetes-certificates`: exit code 0 when all last long enough and none is held old, else 1."""
    os.umask(0o077)
    path = arguments[0] if arguments else CONFIG
    return reported(lambda: job(Config.of(config_of(path))), name="kubernetes-certificates")
