"""What the roles of the nodes outside the clusters write, as Ansible renders it: structure, limits and refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError
from ansible_collections.censuschat.infra.plugins.module_utils.node import sshd_plan

from tests.unit.test_kubernetes_rendering import rendered, valued

SITE: dict[str, Any] = {
    "name": "civicq",
    "names": ["civicq.example.com", "www.civicq.example.com"],
    "certificate": "/etc/censuschat/edge/civicq.crt",
    "certificate_key": "/etc/censuschat/edge/civicq.key",
    "locations": [
        {"path": "/", "root": "/srv/civicq", "fallback": "/index.html", "expires": "1h"},
        {"path": "/api/", "upstream": "api", "cache_minutes": 5, "hide_errors": True},
        {"path": "/ws/", "upstream": "api", "websocket": True, "rate": ""},
        {"path": "= /api/login", "upstream": "tls", "rate": "login", "burst": 3},
    ],
}
EDGE: dict[str, Any] = {
    "ansible_managed": "managed",
    "nginx_edge_resolvers": ["10.0.0.2"],
    "nginx_edge_sites": [SITE],
    "nginx_edge_upstreams": {
        "api": {"servers": ["10.0.10.11:8000", "10.0.11.11:8000"], "sticky": True},
        "tls": {"servers": ["10.0.10.12:8443"], "tls": {"ca": "/etc/ca.crt", "name": "backend"}},
    },
}
Block = list[tuple[list[str], Any]]


def nginx(text: str) -> Block:
    """An nginx configuration as (words, block or None) entries; AssertionError where braces or ends are missing."""
    words: list[str] = []
    stack: list[Block] = [[]]
    word, quote = "", ""
    comment = False
    for character in text:
        if comment:
            comment = character != "\n"
        elif quote:
            word += character
            if character == quote and not word.endswith(f"\\{quote}"):
                quote = ""
        elif character in "\"'" and not word:
            quote = word = character
        elif character == "#" and not word:
            comment = True
        elif character in "{};" and not (character == "{" and word.endswith("$")):
            words += [word] if word else []
            word = ""
            if character == ";":
                assert words, "an empty directive"
                stack[-1].append((words, None))
            elif character == "{":
                block: Block = []
                stack[-1].append((words, block))
                stack.append(block)
            else:
                assert not words, f"{words} has no end"
                stack.pop()
            words = []
        elif character.isspace():
            words += [word] if word else []
            word = ""
        else:
            word += character
    assert len(stack) == 1
    assert not words
    return stack[0]


def blocks(block: Block, *names: str) -> list[Block]:
    """The blocks reached through `names`, each the first words of a directive."""
    found = [block]
    for name in names:
        found = [inner for b in found for words, inner in b if inner is not None and " ".join(words) == name]
    return found


def values(block: Block, name: str) -> list[str]:
    return [" ".join(words[1:]) for words, inner in block if words[0] == name and inner is None]


def edge(**given: Any) -> Block:
    return nginx(rendered("nginx_edge", "nginx.conf.j2", **(EDGE | given)))


def site(**given: Any) -> Block:
    """The site's server with TLS."""
    servers = blocks(edge(**given), "http", "server")
    return next(s for s in servers if values(s, "ssl_certificate"))


def test_edge_holds_the_specified_limits() -> None:
    whole = edge()
    assert values(blocks(whole, "events")[0], "worker_connections") == ["4096"]
    assert int(values(whole, "worker_rlimit_nofile")[0]) > 2 * 4096
    http = blocks(whole, "http")[0]
    assert values(http, "ssl_protocols") == ["TLSv1.2 TLSv1.3"]
    assert values(http, "ssl_stapling") == ["on"]
    assert values(http, "server_tokens") == ["off"]
    assert values(http, "limit_req_zone") == [
        "$binary_remote_addr zone=rate_general:10m rate=20r/s",
        "$binary_remote_addr zone=rate_login:10m rate=10r/m",
    ]
    assert values(http, "gzip") == ["on"]
    # A network of proxies is believed only when it is named.
    assert values(http, "set_real_ip_from") == []


def test_strangers_get_no_handshake_and_sites_no_clear_text() -> None:
    servers = blocks(edge(), "http", "server")
    default = [s for s in servers if any("default_server" in v for v in values(s, "listen"))]
    assert [values(s, "ssl_reject_handshake") for s in default] == [[], ["on"]]
    clear = next(s for s in servers if values(s, "listen") == ["80"])
    assert values(blocks(clear, "location /")[0], "return") == ["308 https://$host$request_uri"]
    assert len(blocks(clear)[0]) == 3


def test_site_has_its_certificate_and_every_header() -> None:
    server = site()
    assert values(server, "ssl_certificate") == ["/etc/censuschat/edge/civicq.crt"]
    headers = dict(value.split(" ", 1) for value in values(server, "add_header"))
    assert set(headers) == {"X-Request-ID", *valued("nginx_edge", "nginx_edge_headers")}
    assert all(text.endswith(" always") for text in headers.values())
    # A header in a location would take all those of its site away.
    assert not any(values(b, "add_header") for _words, b in server if b is not None)


def test_headers_of_a_site_win() -> None:
    own = {**SITE, "headers": {"Content-Security-Policy": "default-src 'none'"}}
    headers = dict(value.split(" ", 1) for value in values(site(nginx_edge_sites=[own]), "add_header"))
    assert headers["Content-Security-Policy"] == "\"default-src 'none'\" always"


def test_websockets_pass_where_they_are_wanted_only() -> None:
    server = site()
    socket, api = blocks(server, "location /ws/")[0], blocks(server, "location /api/")[0]
    assert "Upgrade $http_upgrade" in values(socket, "proxy_set_header")
    assert values(socket, "proxy_read_timeout") == ["3600s"]
    assert values(socket, "limit_req") == []
    assert not any(value.startswith("Upgrade") for value in values(api, "proxy_set_header"))
    assert values(api, "proxy_read_timeout") == ["60s"]
    assert values(api, "limit_req") == ["zone=rate_general burst=40 nodelay"]
    assert values(api, "proxy_cache_valid") == ["200 301 302 5m"]
    assert values(api, "error_page") == ["500 502 503 504 =503 @unavailable"]
    assert len(blocks(server, "location @unavailable")) == 1


def test_upstream_by_tls_is_verified() -> None:
    login = blocks(site(), "location = /api/login")[0]
    assert values(login, "proxy_pass") == ["https://tls"]
    assert values(login, "proxy_ssl_verify") == ["on"]
    assert values(login, "proxy_ssl_name") == ["backend"]
    assert values(login, "limit_req") == ["zone=rate_login burst=3 nodelay"]


@pytest.mark.parametrize(("proxies", "said"), [([], "$remote_addr"), (["10.0.0.0/16"], "$proxy_add_x_forwarded_for")])
def test_client_is_what_trusted_proxies_say(proxies: list[str], said: str) -> None:
    api = blocks(site(nginx_edge_trusted_proxies=proxies), "location /api/")[0]
    assert f"X-Forwarded-For {said}" in values(api, "proxy_set_header")


def test_newer_nginx_gets_http2_as_a_directive() -> None:
    server = site(nginx_edge_http2_directive=True)
    assert values(server, "http2") == ["on"]
    assert values(server, "listen") == ["443 ssl"]


def test_edge_without_a_site_listens_on_no_tls_port() -> None:
    servers = blocks(edge(nginx_edge_sites=[], nginx_edge_resolvers=[]), "http", "server")
    assert [values(s, "listen") for s in servers] == [["80 default_server"], ["127.0.0.1:8089"]]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"nginx_edge_resolvers": []}, "OCSP stapling needs nginx_edge_resolvers"),
        ({"nginx_edge_sites": [{**SITE, "names": ["a;b"]}]}, "would end the directive"),
        (
            {"nginx_edge_sites": [{**SITE, "locations": [{"path": "/", "upstream": "nobody"}]}]},
            "needs a root, or an upstream that is in nginx_edge_upstreams",
        ),
        (
            {"nginx_edge_sites": [{**SITE, "locations": [{"path": "/", "root": "/srv", "rate": "none"}]}]},
            "wants the rate none, which nginx_edge_rates does not have",
        ),
    ],
)
def test_edge_that_cannot_be_is_refused_on_the_controller(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AnsibleError, match=sentence):
        edge(**given)


def test_edge_listens_on_both_kinds_of_addresses_when_told() -> None:
    assert values(site(nginx_edge_ipv6=True), "listen") == ["443 ssl http2", "[::]:443 ssl http2"]


MASTER = """
import os, signal, sys, time
def worker():
    if os.fork() == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        time.sleep(30)
        os._exit(0)
signal.signal(signal.SIGHUP, lambda *_: worker() if sys.argv[1] == "takes" else None)
worker()
print(os.getpid(), flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(("behaviour", "code"), [("takes", 0), ("keeps", 1)])
def test_reload_fails_when_nginx_keeps_its_old_workers(tmp_path: Path, behaviour: str, code: int) -> None:
    script = rendered("nginx_edge", "nginx-reload.sh.j2", ansible_managed="managed")
    for old, new in (
        ("/usr/sbin/nginx -t -q", "true"),
        ("/run/nginx.pid", f"{tmp_path}/pid"),
        ("/var/log/nginx", str(tmp_path)),
        ("-lt 100", "-lt 5"),
    ):
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "error.log").write_text("bind() failed\n")
    argv = [sys.executable, "-c", MASTER, behaviour]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as master:
        try:
            assert master.stdout is not None
            (tmp_path / "pid").write_text(master.stdout.readline())
            done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=20)
        finally:
            os.killpg(master.pid, signal.SIGKILL)
    assert done.returncode == code, done.stderr
    assert ("bind() failed" in done.stderr) is bool(code)


JUMPER = {"name": "ada", "keys": ["ssh-ed25519 AAAAC3Nz ada@laptop"], "from": ["10.0.0.0/8", "192.0.2.7"]}
BASTION: dict[str, Any] = {
    "ansible_managed": "managed",
    "ansible_user": "ops",
    "inventory_hostname": "bastion1",
    "groups": {"nodes": ["bastion1", "db1", "db2"]},
    "hostvars": {"bastion1": {"ansible_host": "10.0.0.1"}, "db1": {"ansible_host": "10.0.0.2"}, "db2": {}},
    "bastion_users": [JUMPER, {"name": "eve", "keys": [], "state": "absent"}],
}


def bastion(expression: str, **given: Any) -> Any:
    return valued("bastion", expression, **(BASTION | given))


def bastion_files(**given: Any) -> dict[str, dict[str, Any]]:
    return {file["path"]: file for file in bastion("bastion_files", **given)}


def test_jumpers_open_connections_to_the_nodes_and_nothing_else() -> None:
    rules = bastion("bastion_rules")
    assert rules["MaxSessions"] == 0
    assert rules["PermitTTY"] is False
    assert rules["AllowTcpForwarding"] == "local"
    assert rules["PermitListen"] == "none"
    assert rules["PermitOpen"] == ["db1:22", "10.0.0.2:22", "db2:22"]
    assert rules["AuthorizedKeysFile"] == "/etc/ssh/censuschat-bastion/%u"
    # What sshd would take as "no restriction" is never what an empty inventory gives.
    assert bastion("bastion_rules", groups={})["PermitOpen"] == "none"


def test_jumpers_rules_are_what_sshd_config_takes() -> None:
    text = sshd_plan.render({}, [sshd_plan.Match("Group jumpers", bastion("bastion_rules"))])
    assert "    PermitOpen db1:22 10.0.0.2:22 db2:22\n" in text
    assert "    DisableForwarding no\n" in text


def test_jumper_has_a_key_that_forwards_only_and_who_left_has_none() -> None:
    files = bastion_files()
    keys = {path: file["content"] for path, file in files.items() if path.startswith("/etc/ssh/")}
    line = 'restrict,port-forwarding,from="10.0.0.0/8,192.0.2.7" ssh-ed25519 AAAAC3Nz ada@laptop\n'
    assert keys == {"/etc/ssh/censuschat-bastion/ada": line}
    accounts = bastion("bastion_accounts")
    assert accounts[0]["groups"] == ["jumpers"]
    assert accounts[1] == {"name": "eve", "state": "absent"}


@pytest.mark.parametrize(
    ("user", "sentence"),
    [
        ({**JUMPER, "name": "ops"}, "ops cannot be a jumper"),
        ({**JUMPER, "name": "root"}, "root cannot be a jumper"),
        ({**JUMPER, "keys": ['command="sh" ssh-ed25519 AAAAC3Nz']}, "is not one public key on one line"),
        ({**JUMPER, "keys": ["ssh-ed25519 AAAA x\nssh-ed25519 BBBB y"]}, "is not one public key on one line"),
    ],
)
def test_jumper_that_cannot_be_is_refused_on_the_controller(user: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AnsibleError, match=sentence):
        bastion_files(bastion_users=[user])


def nft(**given: Any) -> list[str]:
    """The lines of the table's chains; braces balanced."""
    text = bastion_files(**given)["/etc/nftables.conf.d/censuschat_bastion.nft"]["content"]
    assert text.count("{") == text.count("}")
    return [line.strip() for line in text.splitlines()]


def test_table_counts_newcomers_and_logs_jumps() -> None:
    lines = nft(bastion_trusted=["10.0.0.0/24", "fd00::/8"])
    assert 'iif != "lo" tcp dport { 22 } ct state new jump newcomers' in lines
    assert lines.index("ip saddr 10.0.0.0/24 accept") < lines.index("ip6 saddr fd00::/8 accept")
    assert any(line.startswith("add @knocking4 { ip saddr limit rate over 20/minute") for line in lines)
    assert "meta skuid { ada } ct state new jump jumps" in lines
    assert 'meta l4proto tcp log prefix "censuschat-bastion jump: " flags skuid accept' in lines
    assert "reject" not in lines


def test_jumpers_stay_in_the_targets_networks_when_they_are_named() -> None:
    lines = nft(bastion_target_networks=["10.0.0.0/16"])
    accepted = 'ip daddr 10.0.0.0/16 meta l4proto tcp log prefix "censuschat-bastion jump: " flags skuid accept'
    assert lines.index(accepted) < lines.index("reject")


def test_table_without_jumpers_says_nothing_of_them() -> None:
    assert not any("skuid" in line for line in nft(bastion_users=[]))


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJhc2VkYXNlZGFzZWRhc2VkYXNlZGFzZWRh"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIG90aGVyb3RoZXJvdGhlcm90aGVyb3Ro"
BASE: dict[str, Any] = {
    "ansible_managed": "managed",
    "ansible_user": "ops",
    "inventory_hostname": "db1",
    "groups": {},
    "hostvars": {},
}


def base(expression: str, **given: Any) -> Any:
    return valued("base", expression, **(BASE | given))


def base_files(**given: Any) -> dict[str, dict[str, Any]]:
    return {file["path"]: file for file in base("base_files", **given)}


def test_base_without_wishes_is_name_neighbours_and_time_zone() -> None:
    assert set(base_files()) == {"/etc/hosts", "/etc/timezone"}
    assert base("base_all_packages") == ["ca-certificates", "iproute2", "procps"]
    for nothing in ("base_services", "base_accounts", "base_directories", "base_all_groups"):
        assert base(nothing) == [], nothing
    # What an earlier run was asked for goes again; what belongs to the distribution stays.
    absent = base("base_absent")
    assert "/etc/apt/apt.conf.d/00censuschat-proxy" in absent
    assert not {"/etc/default/locale", "/etc/locale.gen", "/etc/apt/sources.list"} & set(absent)


def test_accounts_have_their_keys_in_a_directory_of_their_own() -> None:
    users = [
        {"name": "ada", "uid": 2001, "groups": ["ops"], "keys": [KEY, OTHER], "sudo": "passwordless"},
        {"name": "bob", "keys": [], "home": "/srv/bob", "sudo": "password"},
        {"name": "carol"},
        {"name": "eve", "state": "absent", "keys": [KEY], "sudo": "password"},
    ]
    files = base_files(base_users=users)
    assert files["/home/ada/.ssh/authorized_keys"]["content"] == f"{KEY}\n{OTHER}\n"
    assert files["/home/ada/.ssh/authorized_keys"]["mode"] == "0600"
    assert files["/srv/bob/.ssh/authorized_keys"]["content"] == ""
    assert not any("carol" in path or "eve" in path for path in files)
    sudoers = files["/etc/sudoers.d/50-censuschat-base"]
    assert sudoers["content"] == "# managed\nada ALL=(ALL:ALL) NOPASSWD: ALL\nbob ALL=(ALL:ALL) ALL\n"
    assert sudoers["validate"] == "/usr/sbin/visudo -cf %s"
    directories = {d["path"]: d for d in base("base_directories", base_users=users)}
    assert directories["/home/ada/.ssh"]["mode"] == "0700"
    accounts = base("base_accounts", base_users=users)
    assert accounts[0]["uid"] == 2001
    assert accounts[-1] == {"name": "eve", "state": "absent"}
    assert "sudo" in base("base_all_packages", base_users=users)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"base_users": [{"name": "ops", "keys": [OTHER]}], "base_login_key": KEY}, "are to hold base_login_key"),
        ({"base_users": [{"name": "ops", "keys": [OTHER]}]}, "are to hold base_login_key"),
        ({"base_users": [{"name": "ops", "state": "absent"}]}, "ops cannot be absent"),
    ],
)
def test_base_does_not_lock_its_own_run_out(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AnsibleError, match=sentence):
        base("base_accounts", **given)


def test_login_of_the_run_may_have_its_keys_given_with_its_own_among_them() -> None:
    given = {"base_users": [{"name": "ops", "keys": [OTHER, f"{KEY} controller"]}], "base_login_key": f"{KEY} mine"}
    assert base("base_accounts", **given)[0]["name"] == "ops"


def test_apt_sources_are_deb822_with_their_key() -> None:
    key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmDMEZ\n-----END PGP PUBLIC KEY BLOCK-----\n"
    sources = [
        {"name": "debian", "uris": ["https://mirror.example.com/debian"], "suites": ["bookworm", "bookworm-updates"]},
        {
            "name": "kubernetes",
            "uris": ["https://k.example.com/deb/"],
            "suites": ["/"],
            "components": [],
            "signed_by": key,
        },
    ]
    given = {"base_apt_sources": sources, "base_apt_sources_only": True}
    text = base_files(**given)["/etc/apt/sources.list.d/censuschat.sources"]["content"]
    first, second = (dict(Deb822(stanza)) for stanza in text.split("\n\n")[1:])
    assert first == {
        "Types": "deb",
        "URIs": "https://mirror.example.com/debian",
        "Suites": "bookworm bookworm-updates",
        "Components": "main",
        "Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg",
    }
    assert "Components" not in second
    assert second["Signed-By"].splitlines() == ["", *(line or "." for line in key.strip().splitlines())]
    assert "/etc/apt/sources.list" in base("base_absent", **given)
    assert {"path": "/etc/apt/sources.list.d", "exclusive": True} in base("base_directories", **given)
    with pytest.raises(AnsibleError, match="without base_apt_sources would leave the node without any package"):
        base("base_directories", base_apt_sources_only=True)


class Deb822(dict[str, str]):
    """A stanza of a deb822 file; AssertionError for a line that belongs to no field."""

    def __init__(self, text: str) -> None:
        super().__init__()
        name = ""
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            if line.startswith(" "):
                assert name, line
                self[name] += f"\n{line[1:]}"
            else:
                name, colon, value = line.partition(":")
                assert colon, line
                self[name] = value.strip()


def test_updates_keep_to_their_window_and_leave_what_is_blocked() -> None:
    given = {
        "base_updates": True,
        "base_updates_window": "Sun *-*-* 02:00 America/New_York",
        "base_updates_blocked": ["postgresql-", "runc$"],
        "base_updates_origins": ["origin=Debian,codename=${distro_codename}-security"],
    }
    files = base_files(**given)
    text = files["/etc/apt/apt.conf.d/53censuschat-base"]["content"]
    assert 'Unattended-Upgrade::Package-Blacklist {\n    "postgresql-";\n    "runc$";\n};\n' in text
    assert "#clear Unattended-Upgrade::Origins-Pattern;" in text
    assert 'Automatic-Reboot "false";' in text
    timer = files["/etc/systemd/system/apt-daily-upgrade.timer.d/censuschat.conf"]["content"]
    assert "OnCalendar=\nOnCalendar=Sun *-*-* 02:00 America/New_York\n" in timer
    assert base("base_services", **given)[0]["name"] == "apt-daily-upgrade.timer"
    assert "unattended-upgrades" in base("base_all_packages", **given)


@pytest.mark.parametrize(
    ("service", "path", "line"),
    [
        ("systemd-timesyncd", "/etc/systemd/timesyncd.conf.d/50-censuschat-base.conf", "NTP=10.0.0.2 10.0.0.3"),
        ("chrony", "/etc/chrony/chrony.conf", "server 10.0.0.3 iburst"),
    ],
)
def test_time_comes_from_the_servers_that_are_named(service: str, path: str, line: str) -> None:
    given = {"base_time_servers": ["10.0.0.2", "10.0.0.3"], "base_time_service": service}
    assert line in base_files(**given)[path]["content"].splitlines()
    assert base("base_services", **given) == [
        {"name": f"{service}.service", "enabled": True, "state": "started", "restart_on": [path]}
    ]
    assert service in base("base_all_packages", **given)


def test_proxy_locale_and_pins() -> None:
    files = base_files(
        base_apt_proxy={"http": "http://10.0.0.9:3142", "direct": ["mirror.example.com"]},
        base_locale="de_DE.UTF-8",
        base_locales=["de_DE.UTF-8", "en_US.ISO-8859-1"],
        base_apt_pins=[{"packages": ["kubelet", "kubeadm"], "pin": "version 1.36.*", "priority": 1001}],
    )
    assert 'Acquire::http::Proxy "http://10.0.0.9:3142";' in files["/etc/apt/apt.conf.d/00censuschat-proxy"]["content"]
    assert files["/etc/locale.gen"]["content"] == "# managed\nde_DE.UTF-8 UTF-8\nen_US.ISO-8859-1 ISO-8859-1\n"
    assert files["/etc/default/locale"]["content"] == "# managed\nLANG=de_DE.UTF-8\n"
    pins = "Package: kubelet kubeadm\nPin: version 1.36.*\nPin-Priority: 1001\n"
    assert pins in files["/etc/apt/preferences.d/50-censuschat"]["content"]


NODE: dict[str, Any] = {"ansible_managed": "managed", "ansible_host": "10.0.0.5"}


def exporter(template: str, **given: Any) -> str:
    return rendered("node_exporter", template, **(NODE | given))


def test_exporter_listens_on_the_nodes_address_only() -> None:
    line = exporter("default.j2", node_exporter_collectors_off=["mdadm"]).splitlines()[1]
    assert line.startswith('ARGS="--web.listen-address=10.0.0.5:9100 --web.config.file=')
    assert line.endswith(' --collector.systemd --no-collector.mdadm"')
    assert "=[fd00::5]:9100 " in exporter("default.j2", node_exporter_addresses=["fd00::5"])


def test_exporter_serves_whom_its_authority_knows() -> None:
    assert yaml.safe_load(exporter("web.yml.j2")) == {}
    tls = {"node_exporter_certificate": "/c.crt", "node_exporter_key": "/c.key"}
    assert yaml.safe_load(exporter("web.yml.j2", **tls))["tls_server_config"] == {
        "cert_file": "/c.crt",
        "key_file": "/c.key",
        "min_version": "TLS12",
    }
    server = yaml.safe_load(exporter("web.yml.j2", **tls, node_exporter_client_ca="/ca.crt"))["tls_server_config"]
    assert (server["client_auth_type"], server["client_ca_file"]) == ("RequireAndVerifyClientCert", "/ca.crt")


@pytest.mark.parametrize(
    ("template", "given", "sentence"),
    [
        ("default.j2", {"node_exporter_arguments": ["--x=a b"]}, "holds a blank"),
        ("default.j2", {"node_exporter_collectors": ['a"b']}, "a quote"),
        ("web.yml.j2", {"node_exporter_client_ca": "/ca.crt"}, "needs node_exporter_certificate"),
    ],
)
def test_exporter_that_cannot_be_is_refused(template: str, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AnsibleError, match=sentence):
        exporter(template, **given)


def shipper(**given: Any) -> dict[str, Any]:
    wanted = {"log_shipper_hosts": ["logstash1:5044"], **NODE, **given}
    found: dict[str, Any] = yaml.safe_load(
        str(valued("log_shipper", "log_shipper_configuration | to_nice_yaml", **wanted))
    )
    return found


def test_shipper_sends_journal_and_files_over_verified_tls() -> None:
    files = [{"name": "nginx", "paths": ["/var/log/nginx/access.log"], "json": True}, {"name": "app", "paths": ["/a"]}]
    own = {"log_shipper_ca": "/ca.crt", "log_shipper_certificate": "/c.crt", "log_shipper_key": "/c.key"}
    found = shipper(log_shipper_files=files, log_shipper_fields={"environment": "lab"}, **own)
    journal, nginx_log, app_log = found["filebeat.inputs"]
    assert journal == {"type": "journald", "id": "journal", "seek": "tail"}
    assert nginx_log["parsers"][0]["ndjson"]["target"] == ""
    assert "parsers" not in app_log
    assert app_log["fields"] == {"log_type": "app"}
    output = found["output.logstash"]
    assert output["hosts"] == ["logstash1:5044"]
    assert output["ssl"] == {
        "enabled": True,
        "supported_protocols": ["TLSv1.2", "TLSv1.3"],
        "verification_mode": "full",
        "certificate_authorities": ["/ca.crt"],
        "certificate": "/c.crt",
        "key": "/c.key",
    }
    assert found["fields"] == {"environment": "lab"}
    assert found["queue.disk"] == {"max_size": "1GB"}


def test_settings_of_the_site_are_merged_over_the_shippers() -> None:
    found = shipper(log_shipper_settings={"queue.disk": {"path": "/srv/spool"}}, log_shipper_tls=False)
    assert found["queue.disk"] == {"max_size": "1GB", "path": "/srv/spool"}
    assert found["output.logstash"]["ssl"] == {"enabled": False}


def test_shipper_without_a_log_is_refused() -> None:
    with pytest.raises(AnsibleError, match="names a log to ship"):
        shipper(log_shipper_journal=False)
