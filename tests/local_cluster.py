"""A Kubernetes API of real programs on loopback: etcd and kube-apiserver, with the parts a test asks for.

    with LocalCluster() as cluster:                 # about 5 s
        cluster.kubectl("get", "namespaces")
        run_something(kubeconfig=cluster.kubeconfig)

    with LocalCluster(controller_manager=True, scheduler=True, nodes=3) as cluster:
        ...                                         # pods "run" on three nodes that kwok simulates

Programs come from `lab.programs`. Everything lives in one temporary directory and on free ports, and is ended by pid.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab import programs
from lab.programs.catalogue import catalogue

ADMIN_TOKEN = "trial-admin"
"""The token of the user that may do everything; `token(name)` is that of a user who may do nothing yet."""
_DAY = datetime.timedelta(days=1)
_SIGNS = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)

_KWOK = """\
kind: Stage
apiVersion: kwok.x-k8s.io/v1alpha1
metadata: {name: node-initialize}
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
      - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      conditions:
        - {type: Ready, status: "True", reason: KubeletReady, message: simulated, lastHeartbeatTime: {{ $now | Quote }}, lastTransitionTime: {{ $now | Quote }}}
      addresses: [{type: InternalIP, address: 127.0.0.1}]
      allocatable: {cpu: "32", memory: 256Gi, pods: "110"}
      capacity: {cpu: "32", memory: 256Gi, pods: "110"}
---
kind: Stage
apiVersion: kwok.x-k8s.io/v1alpha1
metadata: {name: pod-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
      - {key: .status.podIP, operator: DoesNotExist}
      - {key: '.metadata.labels["trial/stays-unready"]', operator: DoesNotExist}
  next:
    statusTemplate: |
      {{ $now := Now }}
      conditions:
        - {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: Ready, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: ContainersReady, status: "True", lastTransitionTime: {{ $now | Quote }}}
      containerStatuses:
        {{ range .spec.containers }}
        - {image: {{ .image | Quote }}, name: {{ .name | Quote }}, ready: true, restartCount: 0, started: true, state: {running: {startedAt: {{ $now | Quote }}}}}
        {{ end }}
      phase: Running
      hostIP: 127.0.0.1
      podIP: 127.0.0.2
      startTime: {{ $now | Quote }}
---
kind: Stage
apiVersion: kwok.x-k8s.io/v1alpha1
metadata: {name: pod-complete}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
      - {key: .status.phase, operator: In, values: [Running]}
      - {key: '.metadata.ownerReferences.[].kind', operator: In, values: [Job]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      containerStatuses:
        {{ range .spec.containers }}
        - {image: {{ .image | Quote }}, name: {{ .name | Quote }}, ready: false, restartCount: 0, started: false, state: {terminated: {exitCode: 0, reason: Completed, startedAt: {{ $now | Quote }}, finishedAt: {{ $now | Quote }}}}}
        {{ end }}
      phase: Succeeded
---
kind: Stage
apiVersion: kwok.x-k8s.io/v1alpha1
metadata: {name: pod-delete}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: Exists}
      - {key: '.metadata.labels["trial/never-ends"]', operator: DoesNotExist}
  next:
    finalizers: {empty: true}
    delete: true
"""  # noqa: E501 - one condition a line


class ClusterError(RuntimeError):
    """A program did not come up; the message has the end of its log."""


class Authority:
    """A certificate authority that lives as long as the cluster."""

    def __init__(self, name: str = "trial-ca") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            self._builder(self.name, self.key, _now() - _DAY, _now() + 10 * _DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(_SIGNS, critical=True)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def issue(
        self,
        name: str,
        *,
        groups: Sequence[str] = (),
        addresses: Sequence[str] = (),
        not_after: datetime.datetime | None = None,
    ) -> tuple[bytes, bytes]:
        """Certificate and key, PEM. `groups` become the user's groups, `addresses` the names of a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, g) for g in groups]
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
        end = not_after or _now() + 2 * _DAY
        builder = self._builder(x509.Name(subject), key, min(_now(), end) - _DAY, end).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        if addresses:
            names = [x509.IPAddress(ipaddress.ip_address(a)) for a in addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), _pem(key)

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        start: datetime.datetime,
        end: datetime.datetime,
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )


class LocalCluster:
    """See the module. `minor` is a version of lab/programs; `api_flags` are added to kube-apiserver's.

    nodes: how many nodes kwok simulates, named node-0 and on; with controller_manager and scheduler their pods become
    Running and Ready by themselves. A pod labelled trial/stays-unready never does, and one labelled
    trial/never-ends is not taken away when it is deleted.
    """

    def __init__(
        self,
        *,
        minor: str | None = None,
        controller_manager: bool = False,
        scheduler: bool = False,
        nodes: int = 0,
        api_flags: Sequence[str] = (),
    ) -> None:
        self.minor = minor
        self.controller_manager, self.scheduler, self.nodes = controller_manager, scheduler, nodes
        self.api_flags = tuple(api_flags)
        self.authority = Authority()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    directory: Path
    bin: Path
    url: str

    # ---- life ----

    def __enter__(self) -> Self:
        self.bin = programs_of(self.minor)
        self.directory = Path(tempfile.mkdtemp(prefix="local-cluster-"))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every program and removes the directory."""
        for name in reversed(list(self._processes)):
            self._end(name)
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop_api(self, *, kill: bool = False) -> None:
        """Ends kube-apiserver; `kill`: in the middle of its requests."""
        self._end("kube-apiserver", kill=kill)

    def start_api(self) -> None:
        """Starts kube-apiserver (again) on the same port; returns when it is ready."""
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--secure-port={self._port}",
            "--bind-address=127.0.0.1",
            # No endpoints for the Service `kubernetes`: they must not be loopback addresses.
            "--endpoint-reconciler-type=none",
            "--advertise-address=127.0.0.1",
            f"--tls-cert-file={self.directory}/server.crt",
            f"--tls-private-key-file={self.directory}/server.key",
            f"--client-ca-file={self.directory}/ca.crt",
            f"--token-auth-file={self.directory}/tokens.csv",
            f"--service-account-key-file={self.directory}/sa.key",
            f"--service-account-signing-key-file={self.directory}/sa.key",
            "--service-account-issuer=https://local-cluster.test",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=Node,RBAC",
            "--disable-admission-plugins=ServiceAccount",
            *self.api_flags,
        )
        self._await_ready("kube-apiserver", f"{self.url}/readyz", 60)

    # ---- what tests use ----

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig of the user who may do everything."""
        return self.directory / "admin.kubeconfig"

    def user_kubeconfig(self, name: str) -> Path:
        """A kubeconfig of user `trial-user`, who may do nothing until a role binding says so; `name` is the file's."""
        return self.write_kubeconfig(name, {"token": "trial-user"})

    def write_kubeconfig(self, name: str, user: dict[str, Any], *, server: str = "", namespace: str = "") -> Path:
        """A kubeconfig with these credentials."""
        path = self.directory / f"{name}.kubeconfig"
        context = {"cluster": "trial", "user": "trial", **({"namespace": namespace} if namespace else {})}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "trial",
                    "cluster": {
                        "server": server or self.url,
                        "certificate-authority": str(self.directory / "ca.crt"),
                    },
                }
            ],
            "users": [{"name": "trial", "user": user}],
            "contexts": [{"name": "trial", "context": context}],
            "current-context": "trial",
        }
        path.write_text(yaml.safe_dump(document))
        path.chmod(0o600)
        return path

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Standard output of kubectl as the user who may do everything; raises ClusterError when it fails."""
        done = subprocess.run(
            [str(self.bin / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            text=True,
            capture_output=True,
        )
        if check and done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def pid(self, program: str) -> int:
        return self._processes[program].pid

    def add_nodes(self, count: int, first: int = 0) -> None:
        """Node objects for kwok, node-FIRST and on; returns when they are Ready."""
        documents = [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": f"node-{index}",
                    "annotations": {"kwok.x-k8s.io/node": "fake"},
                    "labels": {"kubernetes.io/hostname": f"node-{index}", "type": "kwok"},
                },
            }
            for index in range(first, first + count)
        ]
        self.kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(documents))
        self.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "node", "--all")

    # ---- parts ----

    def _start(self) -> None:
        self._etcd_port, peer, self._port = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self._write_files()
        self._run(
            "etcd",
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{self._etcd_port}",
            f"--advertise-client-urls=http://127.0.0.1:{self._etcd_port}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            # The data lives as long as the test: a power cut cannot lose anything that matters.
            "--unsafe-no-fsync",
            "--log-level=error",
        )
        self._await_ready("etcd", f"http://127.0.0.1:{self._etcd_port}/health", 30)
        self.start_api()
        if self.controller_manager:
            self._run(
                "kube-controller-manager",
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                f"--service-account-private-key-file={self.directory}/sa.key",
                "--use-service-account-credentials=false",
                f"--secure-port={free_port()}",
                "--bind-address=127.0.0.1",
                f"--cert-dir={self.directory}",
            )
        if self.scheduler:
            self._run(
                "kube-scheduler",
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                f"--secure-port={free_port()}",
                "--bind-address=127.0.0.1",
            )
        if self.nodes:
            (self.directory / "kwok.yaml").write_text(_KWOK)
            self._run(
                "kwok",
                f"--kubeconfig={self.kubeconfig}",
                f"--config={self.directory}/kwok.yaml",
                "--manage-all-nodes=true",
                # Heartbeats: without them a node counts as lost after 40 s, and its pods as not ready for good.
                "--node-lease-duration-seconds=40",
            )
            self.add_nodes(self.nodes)

    def _write_files(self) -> None:
        certificate, key = self.authority.issue("kube-apiserver", addresses=["127.0.0.1", "10.96.0.1"])
        for name, content in {
            "ca.crt": self.authority.pem(),
            "server.crt": certificate,
            "server.key": key,
            "sa.key": _pem(ec.generate_private_key(ec.SECP256R1())),
            "tokens.csv": f'{ADMIN_TOKEN},admin,1,"system:masters"\ntrial-user,trial-user,2,""\n'.encode(),
        }.items():
            (self.directory / name).write_bytes(content)
        self.write_kubeconfig("admin", {"token": ADMIN_TOKEN})

    def _run(self, program: str, *arguments: str) -> None:
        with (self.directory / f"{program}.log").open("ab") as log:
            self._processes[program] = subprocess.Popen(
                # Ends with this process, also when that is killed (the kernel means the thread that starts it).
                ["setpriv", "--pdeathsig", "KILL", str(self.bin / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={"PATH": os.environ["PATH"], "HOME": str(self.directory)},
            )

    def _end(self, program: str, *, kill: bool = False) -> None:
        process = self._processes.pop(program, None)
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _await_ready(self, program: str, url: str, patience: float) -> None:
        deadline, refused = time.monotonic() + patience, ""
        context = ssl.create_default_context(cadata=self.authority.pem().decode()) if url.startswith("https") else None
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
        while time.monotonic() < deadline:
            if self._processes[program].poll() is not None:
                break
            try:
                with urllib.request.urlopen(request, timeout=2, context=context) as answer:
                    if answer.status == 200:
                        return
            except OSError as error:
                refused = str(error)
            time.sleep(0.1)
        tail = (self.directory / f"{program}.log").read_text(errors="replace")[-2000:]
        raise ClusterError(f"{program} was not ready after {patience:.0f} s ({refused}): {tail}")


def programs_of(minor: str | None = None) -> Path:
    """The directory of a version's programs, prepared first when they are not there."""
    version = minor or catalogue().default
    try:
        return programs.ready(version) / "bin"
    except programs.Unprepared:
        return programs.prepare(version) / "bin"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
