# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where the API is and as whom to speak to it: kubeconfig files, exec credentials, the service account of a pod.

Read here and not by the `kubernetes` package because importing that costs 0.8 s, and Ansible starts a process a task.
Forms: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/ and client-authentication.v1.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import datetime
import json
import os
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.kube.documents import YamlProblem, load_yaml
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXEC_API = "client.authentication.k8s.io"
EXEC_TIMEOUT_S = 60
"""How long a credential program may take."""


@dataclasses.dataclass(frozen=True)
class Credential:
    """What proves who we are; certificate and key are PEM. expires: None when it is not known to."""

    token: str = dataclasses.field(default="", repr=False)
    certificate: bytes = b""
    key: bytes = dataclasses.field(default=b"", repr=False)
    basic: str = dataclasses.field(default="", repr=False)
    expires: datetime.datetime | None = None

    def headers(self) -> dict[str, str]:
        if self.token:
            return {"Authorization": f"Bearer {self.token}"}
        return {"Authorization": f"Basic {self.basic}"} if self.basic else {}


@dataclasses.dataclass
class Access:
    """One cluster as one user. `where` names the file and the context in messages."""

    server: str
    where: str
    user: str = ""
    namespace: str = ""
    ca: bytes = b""
    insecure: bool = False
    tls_server_name: str = ""
    proxy: str = ""
    fixed: Credential = dataclasses.field(default_factory=Credential)
    token_file: str = ""
    program: Mapping[str, Any] | None = None
    program_cwd: str = ""
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _held: Credential | None = None

    def credential(self, *, refused: Credential | None = None) -> Credential:
        """A credential that has not expired. `refused`: the API did not take this one; get another."""
        with self._lock:
            if self._held is None or self._held is refused or _expired(self._held):
                self._held = self._fresh()
            return self._held

    @property
    def renewable(self) -> bool:
        """Whether asking again may give another credential."""
        return self.program is not None or bool(self.token_file)

    def _fresh(self) -> Credential:
        if self.program is not None:
            return run_program(self.program, self)
        if self.token_file:
            try:
                token = Path(self.token_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise KubeError(f"{self.where}: the token file {self.token_file} cannot be read: {error}") from error
            # A token in a file is rotated under us: read it again within the minute that client-go does, too.
            soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
            return Credential(token=token, expires=soon)
        return self.fixed

    def tls(self, credential: Credential) -> ssl.SSLContext:
        """The TLS context of a credential. Raises KubeError when the authority or certificate is not one."""
        context = ssl.create_default_context()
        # Go's rules, as kubectl's: authorities without key identifiers exist in clusters that kubectl accepts.
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_verify_locations(cadata=self.ca.decode("ascii"))
            except (ssl.SSLError, UnicodeDecodeError) as error:
                raise KubeError(f"{self.where}: certificate-authority is not a PEM certificate: {error}") from error
        if credential.certificate:
            with _as_file(credential.certificate + b"\n" + credential.key) as path:
                try:
                    context.load_cert_chain(path)
                except (ssl.SSLError, OSError) as error:
                    raise KubeError(
                        f"{self.where}: client certificate and key of user {self.user!r} are not a pair in PEM: {error}"
                    ) from error
        return context


def load(path: str = "", context: str = "", environ: Mapping[str, str] | None = None) -> Access:
    """The access that a kubeconfig gives; raises KubeError.

    path: empty for $KUBECONFIG (its first file that exists), then the service account of the pod we run in, then
    ~/.kube/config. context: empty for the file's current one.
    """
    if path:
        return from_file(Path(path).expanduser(), context)
    environ = os.environ if environ is None else environ
    for name in (environ.get("KUBECONFIG") or "").split(os.pathsep):
        if name and Path(name).expanduser().exists():
            return from_file(Path(name).expanduser(), context)
    if environ.get("KUBECONFIG"):
        raise KubeError(f"KUBECONFIG={environ['KUBECONFIG']}: there is no such file")
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if host and (SERVICE_ACCOUNT / "token").exists() and not context:
        return in_cluster(host, environ.get("KUBERNETES_SERVICE_PORT", "443"))
    home = Path(environ.get("HOME") or "~").expanduser() / ".kube" / "config"
    if home.exists():
        return from_file(home, context)
    raise KubeError("no kubeconfig: give kubeconfig, or set KUBECONFIG; ~/.kube/config does not exist either")


def in_cluster(host: str, port: str) -> Access:
    """The service account of the pod this runs in."""
    namespace = SERVICE_ACCOUNT / "namespace"
    return Access(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        where="the pod's service account",
        user="the pod's service account",
        namespace=namespace.read_text(encoding="utf-8").strip() if namespace.exists() else "",
        ca=(SERVICE_ACCOUNT / "ca.crt").read_bytes(),
        token_file=str(SERVICE_ACCOUNT / "token"),
    )


def from_file(path: Path, context: str = "") -> Access:
    """The access of one context of a kubeconfig file; raises KubeError, which names file and field."""
    try:
        documents = load_yaml(path.read_bytes())
    except OSError as error:
        raise KubeError(f"kubeconfig {path} cannot be read: {error.strerror}") from error
    except YamlProblem as problem:
        raise KubeError(f"kubeconfig {path} is not YAML: {problem}") from problem
    document = documents[0] if documents else None
    if not isinstance(document, dict) or not document.get("clusters"):
        raise KubeError(f"{path} is not a kubeconfig: it has no clusters")
    name = context or document.get("current-context") or ""
    if not name:
        raise KubeError(f"kubeconfig {path} has no current-context; give context, one of: {_names(document)}")
    about = _named(document, "contexts", name, path)
    where = f"kubeconfig {path}, context {name}"
    cluster = _named(document, "clusters", str(about.get("cluster", "")), path)
    user_name = str(about.get("user", ""))
    user = _named(document, "users", user_name, path) if user_name else {}
    server = str(cluster.get("server") or "")
    if not server.startswith(("https://", "http://")):
        raise KubeError(f"{where}: cluster {about.get('cluster')!r} has no server address (https://...): {server!r}")
    folder = path.parent
    certificate = _material(user, "client-certificate", folder, where)
    key = _material(user, "client-key", folder, where)
    if bool(certificate) != bool(key):
        raise KubeError(f"{where}: user {user_name!r} has only one of client-certificate and client-key")
    token_file = str(user.get("tokenFile") or "")
    fixed = Credential(token=str(user.get("token") or ""), certificate=certificate, key=key)
    if user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}"
        fixed = dataclasses.replace(fixed, basic=base64.b64encode(pair.encode()).decode())
    return Access(
        server=server.rstrip("/"),
        where=where,
        user=user_name,
        namespace=str(about.get("namespace") or ""),
        ca=_material(cluster, "certificate-authority", folder, where),
        insecure=bool(cluster.get("insecure-skip-tls-verify")),
        tls_server_name=str(cluster.get("tls-server-name") or ""),
        proxy=str(cluster.get("proxy-url") or ""),
        fixed=fixed,
        token_file=str(folder / token_file) if token_file and not fixed.token else "",
        program=user.get("exec"),
        program_cwd=str(folder),
    )


def run_program(program: Mapping[str, Any], access: Access) -> Credential:
    """The credential that an exec plugin prints; raises KubeError. Its output is never part of a message."""
    version = str(program.get("apiVersion") or "")
    if version.partition("/")[0] != EXEC_API:
        raise KubeError(f"{access.where}: exec of user {access.user!r}: apiVersion {version!r} is not {EXEC_API}/...")
    command = str(program.get("command") or "")
    if os.sep in command and not os.path.isabs(command):
        command = os.path.join(access.program_cwd, command)
    spec: dict[str, Any] = {"interactive": False}
    if program.get("provideClusterInfo"):
        spec["cluster"] = {
            "server": access.server,
            "certificate-authority-data": base64.b64encode(access.ca).decode(),
            "insecure-skip-tls-verify": access.insecure,
        }
    environment = {
        **os.environ,
        **{str(e["name"]): str(e["value"]) for e in program.get("env") or []},
        "KUBERNETES_EXEC_INFO": json.dumps({"apiVersion": version, "kind": "ExecCredential", "spec": spec}),
    }
    hint = f" {program['installHint']}" if program.get("installHint") else ""
    said = f"{access.where}: the credential program {command!r} of user {access.user!r}"
    try:
        # pylint: disable-next=ansible-bad-function  # A secret comes out of it, which run_command would log.
        done = subprocess.run(
            [command, *(str(a) for a in program.get("args") or [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=EXEC_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise KubeError(f"{said} is not there.{hint}") from error
    except OSError as error:
        raise KubeError(f"{said} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise KubeError(f"{said} gave no answer within {EXEC_TIMEOUT_S} s") from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise KubeError(f"{said} failed with exit code {done.returncode}: {last[0][:300]}{hint}")
    try:
        status = json.loads(done.stdout)["status"]
        expires = status.get("expirationTimestamp")
        credential = Credential(
            token=str(status.get("token") or ""),
            certificate=str(status.get("clientCertificateData") or "").encode(),
            key=str(status.get("clientKeyData") or "").encode(),
            expires=datetime.datetime.fromisoformat(expires) if expires else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KubeError(f"{said} did not print an ExecCredential with a status") from error
    if not credential.token and not credential.certificate:
        raise KubeError(f"{said} gave neither a token nor a certificate")
    return credential


def _expired(credential: Credential) -> bool:
    if credential.expires is None:
        return False
    expires = credential.expires
    if expires.tzinfo is None:
        expires = expires.replace(tzinfo=datetime.UTC)
    return expires <= datetime.datetime.now(datetime.UTC)


def _named(document: Mapping[str, Any], section: str, name: str, path: Path) -> dict[str, Any]:
    for entry in document.get(section) or []:
        if isinstance(entry, dict) and entry.get("name") == name:
            found = entry.get(section.rstrip("s")) or {}
            if isinstance(found, dict):
                return found
    known = ", ".join(str(e.get("name")) for e in document.get(section) or [] if isinstance(e, dict)) or "none"
    raise KubeError(f"kubeconfig {path} has no {section.rstrip('s')} {name!r}; it has: {known}")


def _names(document: Mapping[str, Any]) -> str:
    return ", ".join(str(c.get("name")) for c in document.get("contexts") or [] if isinstance(c, dict)) or "none"


def _material(section: Mapping[str, Any], name: str, folder: Path, where: str) -> bytes:
    data = section.get(f"{name}-data")
    if data:
        try:
            return base64.b64decode(str(data), validate=False)
        except (binascii.Error, ValueError) as error:
            raise KubeError(f"{where}: {name}-data is not base64") from error
    file = section.get(name)
    if not file:
        return b""
    try:
        return (folder / str(file)).read_bytes()
    except OSError as error:
        raise KubeError(f"{where}: {name} {folder / str(file)} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path that OpenSSL can open; in memory where the system can, since keys do not belong on disks."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("credential")
        try:
            os.write(descriptor, content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.NamedTemporaryFile() as handle:
            handle.write(content)
            handle.flush()
            yield handle.name
