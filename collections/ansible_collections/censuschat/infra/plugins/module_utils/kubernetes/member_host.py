# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hands of kubernetes_member: kubeadm, the kubelet, and what both leave on a node. Standard library only."""

from __future__ import annotations

import base64
import contextlib
import glob
import json
import os
import re
import shutil
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.api import Access, Api, ApiError
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.member import Observed, Seen, Step, Wanted
from ansible_collections.censuschat.infra.plugins.module_utils.lease.etcd import Etcd, EtcdError, Tls
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    remove_path,
    write_atomically,
)

KUBERNETES = Path("/etc/kubernetes")
ADMIN = KUBERNETES / "admin.conf"
KUBELET = KUBERNETES / "kubelet.conf"
API_MANIFEST = KUBERNETES / "manifests/kube-apiserver.yaml"
PATCHES = KUBERNETES / "patches"
PENDING = KUBERNETES / "censuschat-pending"
KUBELET_SETTINGS = Path("/var/lib/kubelet/config.yaml")
COREFILE = KUBERNETES / "Corefile"
ETCD_PKI = KUBERNETES / "pki/etcd"
ETCD_DATA = Path("/var/lib/etcd/member")
#: In memory only, and gone after the join.
MATERIAL = Path("/run/censuschat-join")
ANNOTATION = "censuschat.infra/configuration"

#: What a running control plane makes kubeadm's checks before a first start fail for.
_RESUMED = "Port-6443,Port-10259,Port-10257,Port-10250,Port-2379,Port-2380,DirAvailable--var-lib-etcd," + ",".join(
    f"FileAvailable--etc-kubernetes-manifests-{name}.yaml"
    for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd")
)
_SECRET = re.compile(r"\b[a-z0-9]{6}\.[a-z0-9]{16}\b|\b[0-9a-f]{64}\b")


class Host:
    """Kubernetes on this node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commands = Commands()

    def observe(self, deadline: float, *, members: bool = False) -> Observed:
        """Look at the node, and ask the API server about it until `deadline` (monotonic) when it is a member."""
        manifest = _read(API_MANIFEST)
        pending = _read(PENDING).strip()
        joined = KUBELET.exists()
        control_plane = bool(manifest)
        active = self.commands.run(["systemctl", "is-active", "--quiet", "kubelet.service"]).code == 0
        remains = () if joined else self._remains()
        annotation = re.search(rf"{re.escape(ANNOTATION)}: [\"']?([0-9a-f]+)", manifest)
        image = re.search(r"image: \S+/kube-apiserver:v(\S+)", manifest)
        seen, why = self._ask(deadline) if joined and active else (Seen.NOT_ASKED, "")
        return Observed(
            joined=joined,
            control_plane=control_plane,
            pending=pending,
            active=active,
            configuration=annotation.group(1) if annotation else "",
            version=image.group(1) if image else "",
            remains=remains,
            data=str(ETCD_DATA) if not joined and ETCD_DATA.exists() else "",
            seen=seen,
            why=why,
            members=self._members() if members and control_plane else {},
        )

    def _remains(self) -> tuple[str, ...]:
        """What an earlier membership left on a node that has none."""
        left = [str(p) for p in (KUBERNETES / "bootstrap-kubelet.conf", API_MANIFEST) if p.exists()]
        listed = self.commands.run(["/usr/local/bin/ctr", "--namespace", "k8s.io", "containers", "list", "--quiet"])
        if listed.code == 0 and (number := len(listed.out.split())):
            left.append(f"{number} containers")
        return tuple(left)

    def _ask(self, deadline: float) -> tuple[Seen, str]:
        """What the API server says of this node; asked again until the deadline while it does not answer."""
        while True:
            try:
                api = Api(Access.of(str(KUBELET)))
                with contextlib.closing(api):
                    node = api.find(f"/api/v1/nodes/{self.name}")
                return (Seen.REGISTERED if node else Seen.UNKNOWN), ""
            except ApiError as error:
                if error.status == 401 or isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    return Seen.STRANGER, str(error)
                if time.monotonic() > deadline:
                    return Seen.SILENT, str(error)
            time.sleep(0.5)

    def _members(self) -> dict[str, bool]:
        """Names of the etcd members, with whether each serves."""
        client = self._etcd(["https://127.0.0.1:2379"])
        with contextlib.closing(client):
            try:
                known = client.call("/v3/cluster/member/list", {}).get("members") or []
            except EtcdError as error:
                raise NodeError(
                    f"etcd on {self.name} does not name its members: {error}. It is not removed while that is so"
                ) from error
        return {m.get("name") or m["ID"]: self._serves(m.get("clientURLs") or []) for m in known}

    def _serves(self, urls: list[str]) -> bool:
        if not urls:
            return False
        client = self._etcd(urls)
        with contextlib.closing(client):
            try:
                client.call("/v3/kv/range", {"key": base64.b64encode(b"health").decode(), "serializable": False})
            except EtcdError:
                return False
        return True

    def _etcd(self, urls: list[str]) -> Etcd:
        tls = Tls(*(str(ETCD_PKI / n) for n in ("ca.crt", "healthcheck-client.crt", "healthcheck-client.key")))
        return Etcd(urls, tls, request_timeout_s=2.0, budget_s=4.0)

    def forget_etcd_member(self, name: str) -> bool:
        """Take a member out of etcd that has lost its data; whether there was one."""
        client = self._etcd(["https://127.0.0.1:2379"])
        with contextlib.closing(client):
            try:
                for member in client.call("/v3/cluster/member/list", {}).get("members") or []:
                    if member.get("name") == name:
                        client.call("/v3/cluster/member/remove", {"ID": member["ID"]})
                        return True
            except EtcdError as error:
                raise NodeError(f"etcd does not give up its old member {name}: {error}") from error
        return False

    def apply(self, step: Step, wanted: Wanted, how: Mapping[str, Any], timeout_s: float) -> None:
        """Carry the step out; `how` are the module's parameters."""
        if step in (Step.START, Step.RESTART):
            self.commands.must(["systemctl", "restart", "kubelet.service"], "starting the kubelet")
        elif step is Step.FOUND:
            self._found(wanted, how, timeout_s)
        elif step is Step.REJOIN:
            self.reset(timeout_s)
            self._join(wanted, how, timeout_s)
        elif step is Step.JOIN:
            self._join(wanted, how, timeout_s)
        elif step is Step.RECONFIGURE:
            self._reconfigure(wanted, how, timeout_s)
        elif step is Step.RESET:
            self.reset(timeout_s)

    def _found(self, wanted: Wanted, how: Mapping[str, Any], timeout_s: float) -> None:
        resumed = _read(PENDING).strip() == "found"
        self._patch(wanted)
        with _pending("found"):
            command = ["init", "--config", str(how["kubeadm_config"]), "--skip-token-print"]
            # Every phase of a first start can be run again over what it made already.
            self._kubeadm(command + (["--ignore-preflight-errors", _RESUMED] if resumed else []), timeout_s)
            self._name_service()
            self._tighten()

    def _join(self, wanted: Wanted, how: Mapping[str, Any], timeout_s: float) -> None:
        material = how["join"]
        configuration: dict[str, Any] = {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "JoinConfiguration",
            "nodeRegistration": how["registration"],
            # By file, not by token alone: nobody unknown may read the API server's public information here.
            "discovery": {"file": {"kubeConfigPath": str(MATERIAL / "discovery.conf")}},
        }
        if wanted.control_plane:
            self._patch(wanted)
            configuration["patches"] = {"directory": str(PATCHES)}
            configuration["controlPlane"] = {
                "localAPIEndpoint": {"advertiseAddress": how["address"]},
                "certificateKey": material["certificate_key"],
            }
        cluster = {
            "server": f"https://{wanted.endpoint}",
            "certificate-authority-data": base64.b64encode(material["authority"].encode()).decode(),
        }
        discovery = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "cluster", "cluster": cluster}],
            "users": [{"name": "joining", "user": {"token": material["token"]}}],
            "contexts": [{"name": "join", "context": {"cluster": "cluster", "user": "joining"}}],
            "current-context": "join",
        }
        MATERIAL.mkdir(mode=0o700, exist_ok=True)
        try:
            for name, content in (("discovery.conf", discovery), ("join.json", configuration)):
                write_atomically(str(MATERIAL / name), json.dumps(content), "root", "root", 0o600)
            with _pending("join"):
                self._kubeadm(["join", "--config", str(MATERIAL / "join.json")], timeout_s)
                self._tighten()
        finally:
            shutil.rmtree(MATERIAL)

    def _tighten(self) -> None:
        """Leave the kubelet's settings to root alone (CIS 4.1.9); kubeadm lets everybody read them."""
        KUBELET_SETTINGS.chmod(0o600)

    def _reconfigure(self, wanted: Wanted, how: Mapping[str, Any], timeout_s: float) -> None:
        """Components first, one control plane at a time; then what all read from the API."""
        self._patch(wanted)
        config = ["--config", str(how["kubeadm_config"])]
        for name in ("apiserver.crt", "apiserver.key"):
            remove_path(str(KUBERNETES / "pki" / name))
        self._kubeadm(["init", "phase", "certs", "apiserver", *config], timeout_s)
        self._kubeadm(["init", "phase", "control-plane", "all", *config], timeout_s)
        self._wait_running(wanted, time.monotonic() + timeout_s)
        self._kubeadm(["init", "phase", "upload-config", "kubeadm", *config], timeout_s)
        self._kubeadm(["init", "phase", "addon", "kube-proxy", *config], timeout_s)
        self._name_service()

    def _name_service(self) -> None:
        """Give the cluster's DNS its configuration in place of kubeadm's; it reads a new one by itself."""
        with contextlib.closing(Api(Access.of(str(ADMIN)))) as api:
            path = "/api/v1/namespaces/kube-system/configmaps/coredns"
            api.call("PATCH", path, {"data": {"Corefile": _read(COREFILE)}}, "application/merge-patch+json")

    def _wait_running(self, wanted: Wanted, deadline: float) -> None:
        """Wait until the API server of this node runs with the wanted configuration and is ready."""
        path = f"/api/v1/namespaces/kube-system/pods/kube-apiserver-{self.name}"
        said = ""
        while time.monotonic() < deadline:
            try:
                with contextlib.closing(Api(Access.of(str(ADMIN)))) as api:
                    pod = api.find(path) or {}
                current = pod.get("metadata", {}).get("annotations", {}).get(ANNOTATION)
                conditions = {c["type"]: c["status"] for c in pod.get("status", {}).get("conditions") or ()}
                if current == wanted.configuration and conditions.get("Ready") == "True":
                    return
                said = "the kubelet has not started it yet" if current != wanted.configuration else "it is not ready"
            except ApiError as error:
                said = str(error)
            time.sleep(0.5)
        raise NodeError(
            f"the API server of {self.name} does not come back with its new configuration: {said}. "
            f"Its own words are in /var/log/pods/kube-system_kube-apiserver-{self.name}*"
        )

    def _patch(self, wanted: Wanted) -> None:
        """Mark the API server's manifest with the hash of what it was made from."""
        PATCHES.mkdir(mode=0o700, parents=True, exist_ok=True)
        patch = {"metadata": {"annotations": {ANNOTATION: wanted.configuration}}}
        write_atomically(
            str(PATCHES / "kube-apiserver0+strategic.json"), json.dumps(patch) + "\n", "root", "root", 0o600
        )

    def reset(self, timeout_s: float) -> None:
        """Leave the cluster, also etcd, and clear away all that the membership made."""
        self._kubeadm(["reset", "--force", "--cleanup-tmp-dir"], timeout_s)
        for device in ("cni0", "kube-ipvs0"):
            if os.path.exists(f"/sys/class/net/{device}"):
                self.commands.must(["ip", "link", "delete", device], f"removing the interface {device}")
        for family in ("ip", "ip6"):
            tables = self.commands.run(["nft", "list", "tables", family])
            if f"table {family} kube-proxy" in tables.out.splitlines():
                self.commands.must(["nft", "delete", "table", family, "kube-proxy"], "removing kube-proxy's rules")
        for path in ("/var/lib/cni", str(PATCHES), str(PENDING), *glob.glob("/etc/kubernetes/tmp")):
            remove_path(path)
        # What is a mount point itself stays, empty.
        for directory in ("/var/lib/etcd", "/var/lib/kubelet"):
            for left in Path(directory).glob("*"):
                remove_path(str(left))

    def _kubeadm(self, arguments: list[str], timeout_s: float) -> None:
        what = " ".join(a for a in arguments if not a.startswith(("-", "/")))
        done = self.commands.run(["/usr/local/bin/kubeadm", *arguments], timeout=timeout_s)
        if done.code != 0:
            said = [line for line in f"{done.err}\n{done.out}".splitlines() if line.strip()]
            # kubeadm repeats a long hint after the errors; those are what counts.
            errors = [line for line in said if "[ERROR" in line or line.startswith("error") or "failed" in line]
            text = _SECRET.sub("(secret)", "\n".join((errors or said)[:12]))
            raise NodeError(f"`kubeadm {what}` on {self.name} ended with {done.code}: {text}")


@contextlib.contextmanager
def _pending(what: str) -> Iterator[None]:
    """Leaves a note for the next run when this one is interrupted."""
    KUBERNETES.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_atomically(str(PENDING), f"{what}\n", "root", "root", 0o600)
    yield
    remove_path(str(PENDING))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
