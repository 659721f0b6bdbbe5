"""An edge: TLS as it should be, the sites' headers, a page, a health check; strangers get nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

# On the node, which has Python and no curl.
CLIENT = """
import json, socket, ssl, sys
name, port, highest, alpn, path = sys.argv[1:6]
context = ssl.create_default_context(cafile="/etc/censuschat/pki/ca.crt")
context.check_hostname = False  # The certificate is the node's, and has the node's names.
if highest == "1.1":
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
if alpn:
    context.set_alpn_protocols([alpn])
try:
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as plain:
        with context.wrap_socket(plain, server_hostname=name) as tls:
            said = {"version": tls.version(), "alpn": tls.selected_alpn_protocol()}
            if alpn != "h2":
                tls.sendall(f"GET {path} HTTP/1.1\\r\\nHost: {name}\\r\\nConnection: close\\r\\n\\r\\n".encode())
                answer = b""
                while chunk := tls.recv(65536):
                    answer += chunk
                head, _, body = answer.decode().partition("\\r\\n\\r\\n")
                first, *rest = head.split("\\r\\n")
                said["status"] = int(first.split()[1])
                said["headers"] = {k.lower(): v for k, v in (line.split(": ", 1) for line in rest)}
                said["body"] = body
    print(json.dumps(said))
except (ssl.SSLError, ConnectionError) as error:
    print(json.dumps({"refused": str(error)}))
"""


def ask(
    host: Host, name: str = "trial.example.com", highest: str = "", alpn: str = "", path: str = "/"
) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        host.check_output("python3 -c %s %s 443 %s %s %s", CLIENT, name, highest or "-", alpn, path)
    )
    return answer


def test_nginx_runs_with_a_configuration_that_it_accepts(host: Host) -> None:
    assert host.service("nginx.service").is_running
    assert host.service("nginx.service").is_enabled
    assert host.run("nginx -t -q").rc == 0
    assert host.check_output("systemctl show -P ReloadResult nginx.service") == "success"


def test_the_page_is_served_with_its_headers(host: Host) -> None:
    answer = ask(host)
    assert (answer["status"], "the page" in answer["body"]) == (200, True)
    assert answer["version"] in ("TLSv1.2", "TLSv1.3")
    headers = answer["headers"]
    assert headers["strict-transport-security"].startswith("max-age=31536000")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "nginx/" not in headers.get("server", "")


def test_http_2_is_spoken(host: Host) -> None:
    assert ask(host, alpn="h2")["alpn"] == "h2"


def test_old_tls_is_refused(host: Host) -> None:
    assert "refused" in ask(host, highest="1.1")


def test_a_name_that_is_no_sites_gets_no_handshake(host: Host) -> None:
    assert "refused" in ask(host, name="stranger.example.com")


def test_an_upstream_that_is_away_is_said_as_such(host: Host) -> None:
    assert ask(host, path="/api/x")["status"] in (502, 504)


@pytest.mark.parametrize("path", ["/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"])
def test_nothing_outside_the_sites_files_is_served(host: Host, path: str) -> None:
    assert ask(host, path=path)["status"] in (400, 404)
