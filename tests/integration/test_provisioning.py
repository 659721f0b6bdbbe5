"""The roles that provision nodes, on the running lab's witness: check mode, apply, convergence, and what then runs.

Each trial takes away what it brought, so that the node is as before.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import verbs
from lab.paths import STATE
from lab.topology import Topology
from tests.integration.trial import NODE, Play, fresh_login, play, playbook_of, shell
from tests.nodes import call

# Everything that a check mode run could have left behind.
FINGERPRINT = """
find /etc /usr/local /home -xdev -not -path '*/.ansible*' -printf '%p %u %g %m %T@ %l\\n' | sort | sha256sum
dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n' | sha256sum
getent passwd; getent group; apt-mark showhold
"""
CERTIFICATE = "/etc/ssl/edge-trial.crt"
KEY = "/etc/ssl/edge-trial.key"


def role(tmp_path: Path, name: str, variables: dict[str, Any], *options: str) -> Play:
    """Run one role on the node."""
    path = tmp_path / f"{name}.yml"
    path.write_text(
        yaml.safe_dump(
            [{"hosts": NODE, "gather_facts": False, "vars": variables, "roles": [f"censuschat.infra.{name}"]}]
        )
    )
    return play(path, *options)


def targets(outcome: Play, task: str) -> set[tuple[str, str]]:
    return {(action["kind"], action["target"]) for action in outcome.result(task)["actions"]}


def converged(tmp_path: Path, name: str, task: str, variables: dict[str, Any]) -> Play:
    """Check mode on the bare node, apply, apply again, check again; returns the first apply."""
    before = shell(FINGERPRINT)
    planned = role(tmp_path, name, variables, "--check", "--diff")
    assert planned.code == 0, planned.text[-3000:]
    assert shell(FINGERPRINT) == before, "check mode changed the node"
    applied = role(tmp_path, name, variables, "--diff")
    assert applied.code == 0, applied.text[-3000:]
    # A package may bring what was planned (an enabled unit, say); nothing may come unannounced.
    assert targets(applied, task) <= targets(planned, task)
    assert targets(applied, task)
    for options in ((), ("--check",)):
        again = role(tmp_path, name, variables, *options)
        assert (again.code, again.changed) == (0, 0), again.text[-3000:]
    return applied


def address() -> str:
    return str(verbs.current()[1].node(NODE).address)


@pytest.fixture(scope="module", autouse=True)
def left_clean(running_lab: Topology) -> Iterator[None]:
    yield
    shell(
        "systemctl -q disable --now censuschat-bastion-table.service 2>/dev/null; "
        "apt-mark unhold ed filebeat >/dev/null 2>&1; "
        "DEBIAN_FRONTEND=noninteractive apt-get -q -y purge nginx nginx-common prometheus-node-exporter filebeat ed "
        ">/dev/null 2>&1; "
        "for user in ada jumper; do userdel --remove $user 2>/dev/null; done; groupdel jumpers 2>/dev/null; "
        "rm -rf /home/ada /etc/nginx /etc/ssh/censuschat-bastion /etc/ssh/sshd_config.d/00-censuschat-bastion.conf "
        "/etc/systemd/system/censuschat-bastion-table.service /etc/nftables.conf.d/censuschat_bastion.nft "
        "/etc/systemd/system/nginx.service.d /usr/local/lib/censuschat/nginx-reload /var/cache/nginx-edge "
        f"/etc/sudoers.d/50-censuschat-base /etc/apt/preferences.d/50-censuschat {CERTIFICATE} {KEY} /srv/edge-trial "
        "/root/trial-deb /etc/filebeat /etc/prometheus; "
        "systemctl daemon-reload; systemctl reload ssh.service; true"
    )
    assert fresh_login() == ""


def ada(key: str) -> dict[str, Any]:
    return {
        "base_users": [{"name": "ada", "uid": 2345, "groups": ["adm"], "keys": [key], "sudo": "passwordless"}],
        "base_apt_pins": [{"packages": ["ed"], "pin": "release o=Debian", "priority": 700}],
        "base_packages": ["ca-certificates", "iproute2", "procps", "ed"],
        "base_packages_held": ["ed"],
    }


def key_of(tmp_path: Path, name: str) -> tuple[Path, str]:
    """A new key: its file and its public half."""
    path = tmp_path / name
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path))
    return path, path.with_suffix(".pub").read_text().strip()


def ssh(user: str, key: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """An ssh connection to the node that shares nothing with another."""
    options = [f"UserKnownHostsFile={STATE}/ssh/known_hosts", "GlobalKnownHostsFile=/dev/null", "IdentitiesOnly=yes"]
    options += ["ControlPath=none", "BatchMode=yes", "ConnectTimeout=5", "LogLevel=ERROR"]
    flags = [flag for option in options for flag in ("-o", option)]
    return call("ssh", *flags, "-i", str(key), f"{user}@{address()}", *arguments, check=False, text=text, timeout=30)


def test_base_gives_an_account_with_its_key_and_takes_it_away(tmp_path: Path) -> None:
    path, public = key_of(tmp_path, "ada")
    converged(tmp_path, "base", "Bring the node's base to its state", ada(public))
    assert ssh("ada", path, "sudo -n id -u").stdout.strip() == "0"
    assert shell("id -u ada; apt-mark showhold; stat -c '%U %a' /home/ada/.ssh/authorized_keys").splitlines() == [
        "2345",
        "ed",
        "ada 600",
    ]
    assert "700" in shell("apt-cache policy ed")
    gone = {"base_users": [{"name": "ada", "state": "absent"}], "base_packages_unheld": ["ed"]}
    assert role(tmp_path, "base", gone).code == 0
    assert shell("id ada 2>&1 || true; ls /etc/sudoers.d/50-censuschat-base 2>&1 || true").count("no such user") == 1
    assert shell("apt-mark showhold; ls /etc/apt/preferences.d") == ""
    assert ssh("ada", path, "true").returncode != 0
    assert role(tmp_path, "base", gone).changed == 0


def test_base_refuses_to_lock_its_own_run_out(tmp_path: Path) -> None:
    before = shell("sha256sum /home/ops/.ssh/authorized_keys; id ops")
    _path, other = key_of(tmp_path, "other")
    outcome = role(tmp_path, "base", {"base_users": [{"name": "ops", "keys": [other]}]})
    assert outcome.code != 0
    assert "are to hold base_login_key" in outcome.text
    assert shell("sha256sum /home/ops/.ssh/authorized_keys; id ops") == before
    assert fresh_login() == ""


def archive(version: str) -> dict[str, Any]:
    """A stand-in for Filebeat, made on the node: it judges a configuration, and runs."""
    program = "#!/bin/sh\\n[ \\$1 = test ] && { ! grep -q nonsense \\$4; exit; }\\nexec sleep infinity\\n"
    unit = "[Service]\\nExecStart=/usr/bin/filebeat\\n[Install]\\nWantedBy=multi-user.target\\n"
    control = f"Package: filebeat\\nVersion: {version}\\nArchitecture: all\\nMaintainer: trial\\nDescription: trial\\n"
    place = f"/root/trial-deb/{version}"
    digest = shell(
        f"set -e; rm -rf {place}; mkdir -p {place}; cd {place}; mkdir -p x/DEBIAN x/usr/bin x/lib/systemd/system; "
        f'printf "{control}" > x/DEBIAN/control; printf "{unit}" > x/lib/systemd/system/filebeat.service; '
        f'printf "{program}" > x/usr/bin/filebeat; chmod 0755 x/usr/bin/filebeat; '
        "dpkg-deb --root-owner-group --build x filebeat.deb >/dev/null; sha512sum filebeat.deb | cut -d' ' -f1"
    )
    return {
        "log_shipper_version": version,
        "log_shipper_url": f"file:///root/trial-deb/{version}/filebeat.deb",
        "log_shipper_checksum": f"sha512:{digest}",
        "log_shipper_hosts": ["logstash.example.com:5044"],
    }


def test_shipper_comes_from_a_proven_archive_and_stays_at_its_version(tmp_path: Path) -> None:
    task = "Ship the node's logs"
    first, second = archive("1.0"), archive("1.1")
    forged = {**first, "log_shipper_checksum": "sha512:" + "0" * 128}
    refused = role(tmp_path, "log_shipper", forged)
    assert refused.code != 0
    assert "filebeat 1.0 was not installed: what file:///root/trial-deb/1.0/filebeat.deb gave" in refused.text
    assert shell("dpkg-query -W -f '${db:Status-Status}' filebeat 2>/dev/null || true") in ("", "not-installed")
    converged(tmp_path, "log_shipper", task, first)
    facts = "dpkg-query -W -f '${Version}\\n' filebeat; apt-mark showhold; systemctl is-active filebeat; "
    facts += "stat -c %a /etc/filebeat/filebeat.yml"
    assert shell(facts).splitlines() == ["1.0", "filebeat", "active", "600"]

    # What the shipper refuses is not put in place, and it runs on.
    before = shell("sha256sum /etc/filebeat/filebeat.yml; systemctl show -P MainPID filebeat")
    broken = role(tmp_path, "log_shipper", {**first, "log_shipper_fields": {"site": "nonsense"}})
    assert broken.code != 0
    assert "/etc/filebeat/filebeat.yml was not replaced" in broken.text
    assert shell("sha256sum /etc/filebeat/filebeat.yml; systemctl show -P MainPID filebeat") == before

    # Up and back, although it is held.
    for version in (second, first):
        assert role(tmp_path, "log_shipper", version).code == 0
        assert shell("dpkg-query -W -f '${Version}' filebeat; echo; apt-mark showhold").splitlines() == [
            version["log_shipper_version"],
            "filebeat",
        ]


def test_exporter_shows_figures_on_the_nodes_address_only(tmp_path: Path) -> None:
    converged(tmp_path, "node_exporter", "Show the node's figures", {})
    shell("echo 'trial_figure 42' > /var/lib/prometheus/node-exporter/trial.prom")
    fetch = 'python3 -c "import sys,urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())" '
    figures = shell(f"{fetch} http://{address()}:9100/metrics")
    assert "trial_figure 42" in figures.splitlines()
    assert "node_systemd_unit_state" in figures
    assert shell(f"{fetch} http://127.0.0.1:9100/metrics 2>&1 || true").endswith("Connection refused>")


def edge(**given: Any) -> dict[str, Any]:
    site = {
        "name": "trial",
        "names": ["edge.example.com"],
        "certificate": CERTIFICATE,
        "certificate_key": KEY,
        "locations": [{"path": "/", "root": "/srv/edge-trial"}, {"path": "/slow/", "root": "/srv", "rate": "login"}],
    }
    return {"nginx_edge_ocsp_stapling": False, "nginx_edge_sites": [{**site, **given.pop("site", {})}], **given}


def get(path: str, *options: str) -> str:
    """The status line and headers of a request to the edge, by curl's own words where there is none."""
    flags = " ".join(["-sSik", "--resolve", f"edge.example.com:443:{address()}", *options])
    done = call("sh", "-c", f"curl {flags} https://edge.example.com{path}", check=False, timeout=30)
    return done.stdout + done.stderr


def test_edge_serves_with_limits_and_keeps_its_word_on_reloads(tmp_path: Path) -> None:
    task = "Serve the sites"
    shell(
        "set -e; mkdir -p /srv/edge-trial; echo trial > /srv/edge-trial/index.html; "
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=edge.example.com "
        f"-days 7 -keyout {KEY} -out {CERTIFICATE} 2>/dev/null"
    )
    converged(tmp_path, "nginx_edge", task, edge())
    answer = get("/")
    assert answer.startswith("HTTP/2 200")
    for header in ("strict-transport-security: ", "content-security-policy: ", "x-request-id: "):
        assert header in answer
    assert answer.rstrip().endswith("trial")
    assert "alert" in get("/", "--tls-max", "1.1")
    statuses = [get("/slow/none").split()[1] for _ in range(60)]
    assert "429" in statuses
    assert statuses[0] == "404"

    # A configuration that nginx refuses is not put in place.
    before = shell("sha256sum /etc/nginx/nginx.conf; systemctl show -P MainPID nginx")
    broken = role(tmp_path, "nginx_edge", edge(site={"certificate": "/etc/ssl/none.crt"}))
    assert broken.code != 0
    assert "/etc/nginx/nginx.conf was not replaced" in broken.text
    assert shell("sha256sum /etc/nginx/nginx.conf; systemctl show -P MainPID nginx") == before
    assert get("/").startswith("HTTP/2 200")

    # A port that somebody else has: nginx -t accepts it, and the reload keeps the old workers.
    hold = "import socket,time; s=socket.socket(); s.bind(('127.0.0.1',8090)); s.listen(); time.sleep(600)"
    shell(f'systemd-run -q --unit=trial-port python3 -c "{hold}"; sleep 1')
    moved = edge(nginx_edge_status_port=8090)
    try:
        refused = role(tmp_path, "nginx_edge", moved)
        assert refused.code != 0
        assert "nginx took no new configuration" in refused.text
        assert get("/").startswith("HTTP/2 200")
        # The file is older than that reload; the next run tries again all the same.
        planned = role(tmp_path, "nginx_edge", moved, "--check").result(task)
        assert [a["detail"] for a in planned["actions"]] == ["reload: its last reload failed (exit-code)"]
    finally:
        shell("systemctl stop trial-port")
    assert role(tmp_path, "nginx_edge", moved).code == 0
    assert role(tmp_path, "nginx_edge", moved).changed == 0

    # A renewed certificate is taken, without a new process.
    pid = shell(f"touch {CERTIFICATE}; systemctl show -P MainPID nginx")
    renewed = role(tmp_path, "nginx_edge", moved).result(task)
    assert [a["target"] for a in renewed["actions"]] == ["nginx.service"]
    assert shell("systemctl show -P MainPID nginx") == pid


def test_bastion_lets_jumpers_through_and_does_nothing_else_for_them(tmp_path: Path, running_lab: Topology) -> None:
    path, public = key_of(tmp_path, "jumper")
    target = next(str(node.address) for node in running_lab.nodes if node.name != NODE)
    variables: dict[str, Any] = {
        "bastion_users": [{"name": "jumper", "keys": [public]}],
        "bastion_trusted": [str(running_lab.operator.network)],
    }
    before = shell("sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/00-censuschat.conf")
    converged(tmp_path, "bastion", "Have the jumpers, their keys and their limits", variables)
    # The node's own settings are left to its hardening.
    assert shell("sha256sum /etc/ssh/sshd_config /etc/ssh/sshd_config.d/00-censuschat.conf") == before
    assert ssh("jumper", path, "-W", f"{target}:22").stdout.startswith("SSH-2.0-")
    assert ssh("jumper", path, "-W", f"{target}:5432").stdout == ""
    assert ssh("jumper", path, "id").returncode != 0
    assert ssh("jumper", path, "-N", "-o", "ExitOnForwardFailure=yes", "-R", "18022:127.0.0.1:22").returncode != 0
    assert "Accepted publickey for jumper" in shell("journalctl -u ssh.service --since -5min -o cat")
    assert "jump jumps" in shell("nft list table inet censuschat_bastion")
    assert fresh_login("id -un") == "root"

    # The run's own login cannot become a jumper.
    own = role(tmp_path, "bastion", {**variables, "bastion_users": [{"name": "ops", "keys": [public]}]})
    assert own.code != 0
    assert "ops cannot be a jumper" in own.text

    # Whoever is no longer listed has no key; whatever else lies there goes too.
    shell("cp /etc/ssh/censuschat-bastion/jumper /etc/ssh/censuschat-bastion/stranger")
    left = role(tmp_path, "bastion", {**variables, "bastion_users": []})
    assert left.code == 0, left.text[-3000:]
    assert shell("ls -A /etc/ssh/censuschat-bastion") == ""
    assert ssh("jumper", path, "-W", f"{target}:22").returncode != 0

    # What loads the node's tables anew takes this one with it, and has to bring it back.
    assert "nftables.service" in shell("systemctl show -P PartOf censuschat-bastion-table.service")
    shell("nft delete table inet censuschat_bastion; systemctl reload censuschat-bastion-table.service")
    assert "censuschat_bastion" in shell("nft list tables")


def test_sshd_rules_that_catch_the_runs_own_login_are_refused(tmp_path: Path) -> None:
    matches = [{"criteria": "User ops", "settings": {"MaxSessions": 0}}]
    task = {"name": "Shut", "censuschat.infra.sshd_config": {"name": "trial", "matches": matches}}
    result = play(playbook_of(tmp_path, [task])).result("Shut")
    assert result["failed"] is True
    assert "MaxSessions 0 leaves ops without a session" in result["msg"]
    assert shell("ls /etc/ssh/sshd_config.d | grep -c trial || true") == "0"
    assert fresh_login() == ""


def test_bare_host_is_prepared_for_a_cluster(tmp_path: Path) -> None:
    variables = {"kubernetes_prerequisites_packages": ["ed"], "kubernetes_prerequisites_modules": ["overlay"]}
    try:
        converged(tmp_path, "kubernetes_prerequisites", "Have what a bare host lacks as a cluster's node", variables)
        assert shell("systemctl is-active censuschat-no-swap; apt-mark showhold ed").splitlines() == ["active", "ed"]
        assert "containerd.sock" in shell("cat /etc/crictl.yaml")
    finally:
        shell(
            "systemctl -q disable --now censuschat-no-swap 2>/dev/null; apt-mark unhold ed >/dev/null; "
            "rm -f /etc/crictl.yaml /etc/modules-load.d/censuschat-kubernetes.conf "
            "/etc/systemd/system/censuschat-no-swap.service; systemctl daemon-reload"
        )
