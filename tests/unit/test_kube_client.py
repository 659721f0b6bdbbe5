"""The client against a server of a few lines: retries, their end, credentials that expire, pages, kubeconfigs."""

from __future__ import annotations

import base64
import json
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.kube import kubeconfig
from ansible_collections.censuschat.infra.plugins.module_utils.kube.client import ApiError, Client, Unreachable
from ansible_collections.censuschat.infra.plugins.module_utils.kube.kubeconfig import Access, Credential
from ansible_collections.censuschat.infra.plugins.module_utils.kube.model import KubeError

Answer = tuple[int, dict[str, str], Any]


class Server:
    """Answers what `script` says, one entry a request (the last again and again); None drops the connection."""

    def __init__(self) -> None:
        self.script: list[Answer | None] = [(200, {}, {})]
        self.seen: list[tuple[str, str, str]] = []
        self.connections = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with lock:
                    outer.connections += 1

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    outer.seen.append((self.command, self.path, self.headers.get("Authorization", "")))
                    said = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if said is None:
                    self.close_connection = True
                    return
                status, headers, body = said
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PATCH = do_POST = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def client(self, patience: float = 5.0, **access: Any) -> Client:
        return Client(Access(server=self.url, where="test", user="me", **access), patience=patience)


@pytest.fixture(name="server")
def running_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def refusal(status: int, reason: str = "", message: str = "") -> Answer:
    return status, {}, {"kind": "Status", "reason": reason, "message": message}


@pytest.mark.parametrize(
    "hiccup",
    [
        refusal(429, "TooManyRequests"),
        refusal(503, "ServiceUnavailable"),
        refusal(504, "Timeout"),
        refusal(500, "InternalError", "failed calling webhook"),
        refusal(500, "", "etcdserver: leader changed"),
        (502, {}, b"<html>bad gateway</html>"),
        None,
    ],
)
def test_a_hiccup_is_tried_again(server: Server, hiccup: Answer | None) -> None:
    server.script = [hiccup, hiccup, (200, {}, {"ok": 1})]
    assert server.client().request("PATCH", "/x", body={}) == {"ok": 1}
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    "final",
    [
        refusal(400, "BadRequest"),
        refusal(403, "Forbidden"),
        refusal(404, "NotFound"),
        refusal(409, "Conflict"),
        refusal(422, "Invalid"),
        refusal(500, "", "failed to create typed patch object: .spec.x: field not declared in schema"),
    ],
)
def test_a_refusal_is_final(server: Server, final: Answer) -> None:
    server.script = [final]
    with pytest.raises(ApiError) as caught:
        server.client().request("PATCH", "/x", body={})
    assert caught.value.status == final[0]
    assert len(server.seen) == 1


def test_retry_after_is_honoured(server: Server) -> None:
    server.script = [(429, {"Retry-After": "1"}, {}), (200, {}, {})]
    begun = time.monotonic()
    server.client().request("GET", "/x")
    assert time.monotonic() - begun >= 1.0


def test_an_eviction_is_asked_for_once(server: Server) -> None:
    server.script = [refusal(429, "TooManyRequests", "Cannot evict pod")]
    with pytest.raises(ApiError):
        server.client().request("POST", "/x", body={}, retry=False)
    assert len(server.seen) == 1


def test_patience_ends(server: Server) -> None:
    server.script = [refusal(503)]
    begun = time.monotonic()
    with pytest.raises(ApiError):
        server.client(patience=0.5).request("GET", "/x")
    assert time.monotonic() - begun < 2.0
    assert len(server.seen) > 1


def test_nobody_there_is_said_with_the_address() -> None:
    closed = Server()
    closed.http.shutdown()
    closed.http.server_close()
    with pytest.raises(Unreachable, match=r"test: http://127\.0\.0\.1:\d+ cannot be reached .* nothing listens"):
        closed.client(patience=0.2).request("GET", "/x")


def test_connections_are_kept(server: Server) -> None:
    client = server.client()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: client.request("GET", f"/{number}"), range(60)))
    assert len(server.seen) == 60
    assert server.connections <= 4


def test_pages_are_followed_and_an_expired_one_starts_again(server: Server) -> None:
    server.script = [
        (200, {}, {"metadata": {"continue": "t"}, "items": [{"n": 1}]}),
        refusal(410, "Expired"),
        (200, {}, {"metadata": {"continue": "t"}, "items": [{"n": 1}]}),
        (200, {}, {"metadata": {}, "items": [{"n": 2}]}),
    ]
    assert [i["n"] for page in server.client().pages("/x") for i in page] == [1, 1, 2]
    assert [path for _method, path, _who in server.seen][-1] == "/x?limit=500&continue=t"


def test_what_is_no_api_is_said(server: Server) -> None:
    server.script = [(200, {}, b"<html>welcome</html>")]
    with pytest.raises(KubeError, match="it is no Kubernetes API"):
        server.client().request("GET", "/api")


# ---- credentials ----


def program(tmp_path: Path, expires: str) -> dict[str, Any]:
    """A credential program that counts its calls and gives token-1, token-2 and on."""
    script = tmp_path / "credential"
    script.write_text(
        "#!/bin/sh\n"
        f"echo call >> {tmp_path}/calls\n"
        f"number=$(wc -l < {tmp_path}/calls)\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":'
        f'{{"token":"token-%s"{expires}}}}}\' "$number"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {"apiVersion": "client.authentication.k8s.io/v1", "command": str(script), "interactiveMode": "Never"}


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().splitlines())


def test_a_program_is_asked_once_while_its_token_holds(server: Server, tmp_path: Path) -> None:
    client = server.client(program=program(tmp_path, ',"expirationTimestamp":"2999-01-01T00:00:00Z"'))
    for _time in range(3):
        client.request("GET", "/x")
    assert calls(tmp_path) == 1
    assert {who for _method, _path, who in server.seen} == {"Bearer token-1"}


def test_a_program_is_asked_again_when_its_token_has_expired(server: Server, tmp_path: Path) -> None:
    client = server.client(program=program(tmp_path, ',"expirationTimestamp":"2020-01-01T00:00:00Z"'))
    client.request("GET", "/x")
    client.request("GET", "/x")
    assert [who for _method, _path, who in server.seen] == ["Bearer token-1", "Bearer token-2"]


def test_a_refused_token_is_renewed_once(server: Server, tmp_path: Path) -> None:
    server.script = [refusal(401, "Unauthorized"), (200, {}, {"ok": 1})]
    client = server.client(program=program(tmp_path, ""))
    assert client.request("GET", "/x") == {"ok": 1}
    assert [who for _method, _path, who in server.seen] == ["Bearer token-1", "Bearer token-2"]
    server.script = [refusal(401, "Unauthorized", "Unauthorized")]
    with pytest.raises(KubeError, match="does not accept the credentials of user 'me'"):
        client.request("GET", "/x")
    assert calls(tmp_path) == 3


def test_a_program_that_fails_says_so_without_its_output(tmp_path: Path) -> None:
    script = tmp_path / "credential"
    script.write_text("#!/bin/sh\necho secret-token\necho login first >&2\nexit 3\n")
    script.chmod(0o700)
    access = Access(
        server="https://x",
        where="kubeconfig k",
        user="me",
        program={"apiVersion": "client.authentication.k8s.io/v1", "command": str(script), "installHint": "Install it."},
    )
    with pytest.raises(KubeError) as caught:
        access.credential()
    assert str(caught.value) == (
        f"kubeconfig k: the credential program '{script}' of user 'me' failed with exit code 3: login first Install it."
    )


def test_credentials_are_not_shown() -> None:
    assert "hush" not in repr(Credential(token="hush", key=b"hush", basic="hush"))


# ---- kubeconfig ----


def config(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443/"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
        "current-context": "one",
    }
    return {**document, **changes}


def written(tmp_path: Path, document: Any) -> str:
    path = tmp_path / "kubeconfig"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def test_a_kubeconfig_is_read(tmp_path: Path) -> None:
    access = kubeconfig.load(written(tmp_path, config()))
    assert (access.server, access.namespace, access.credential().token) == ("https://10.0.0.1:6443", "shop", "t")


def test_relative_files_are_beside_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    (tmp_path / "ca.pem").write_text("pem")
    document = config(
        users=[{"name": "u", "user": {"tokenFile": "token"}}],
        clusters=[{"name": "c", "cluster": {"server": "https://x", "certificate-authority": "ca.pem"}}],
    )
    access = kubeconfig.load(written(tmp_path, document))
    assert access.credential().token == "from-file"
    assert access.ca == b"pem"


CERTIFICATE_ONLY = {"client-certificate-data": base64.b64encode(b"pem").decode()}


@pytest.mark.parametrize(
    ("document", "context", "said"),
    [
        ("a: [", "", "is not YAML: line"),
        ("just text", "", "is not a kubeconfig: it has no clusters"),
        (config(), "two", "has no context 'two'; it has: one"),
        (config(**{"current-context": ""}), "", "has no current-context; give context, one of: one"),
        (config(clusters=[{"name": "d", "cluster": {}}]), "", "has no cluster 'c'; it has: d"),
        (config(users=[]), "", "has no user 'u'; it has: none"),
        (config(clusters=[{"name": "c", "cluster": {"server": "10.0.0.1"}}]), "", "has no server address"),
        (
            config(users=[{"name": "u", "user": CERTIFICATE_ONLY}]),
            "",
            "has only one of client-certificate and client-key",
        ),
        (config(users=[{"name": "u", "user": {"client-key": "none.pem"}}]), "", "none.pem cannot be read"),
    ],
)
def test_a_wrong_kubeconfig_is_named_with_the_field(tmp_path: Path, document: Any, context: str, said: str) -> None:
    path = written(tmp_path, document)
    with pytest.raises(KubeError) as caught:
        kubeconfig.load(path, context)
    assert said in str(caught.value)
    assert path in str(caught.value)


def test_where_a_kubeconfig_is_looked_for(tmp_path: Path) -> None:
    path = written(tmp_path, config())
    assert kubeconfig.load(environ={"KUBECONFIG": f"{tmp_path}/none:{path}"}).server == "https://10.0.0.1:6443"
    with pytest.raises(KubeError, match="there is no such file"):
        kubeconfig.load(environ={"KUBECONFIG": f"{tmp_path}/none"})
    with pytest.raises(KubeError, match="no kubeconfig: give kubeconfig"):
        kubeconfig.load(environ={"HOME": str(tmp_path)})
