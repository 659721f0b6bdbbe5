"""A node that is watched: its figures at its own address, its logs' shipper with the configuration that it judged."""

from __future__ import annotations

from testinfra.host import Host

ASK = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())
except urllib.error.URLError as error:
    print(f"refused: {error}")
"""


def figures(host: Host, address: str) -> str:
    return str(host.check_output("python3 -c %s %s", ASK, f"http://{address}:9100/metrics"))


def own_address(host: Host) -> str:
    return str(host.check_output("hostname -I")).split()[0]


def test_the_figures_are_shown_at_the_nodes_own_address_only(host: Host) -> None:
    assert host.service("prometheus-node-exporter.service").is_enabled
    shown = figures(host, own_address(host))
    assert f'nodename="{host.check_output("uname -n")}"' in shown
    assert "node_systemd_unit_state" in shown
    assert figures(host, "127.0.0.1").startswith("refused: ")


def test_figures_from_files_are_shown_too(host: Host) -> None:
    path = "/var/lib/prometheus/node-exporter/molecule.prom"
    try:
        host.run_expect([0], f"echo 'molecule_trial 42' > {path}")
        assert "molecule_trial 42" in figures(host, own_address(host)).splitlines()
    finally:
        host.run_expect([0], f"rm {path}")


def test_the_shipper_is_the_archives_version_and_held(host: Host) -> None:
    assert host.package("filebeat").version == "9.2.1"
    assert "filebeat" in host.check_output("apt-mark showhold").splitlines()


def test_the_shipper_runs_with_its_configuration(host: Host) -> None:
    assert host.service("filebeat.service").is_running
    assert host.service("filebeat.service").is_enabled
    conf = host.file("/etc/filebeat/filebeat.yml")
    assert (conf.user, conf.mode) == ("root", 0o600)
    for part in ("logstash.example.com:5044", "/var/log/nginx/access.log", "TLSv1.2", "environment: molecule"):
        assert part in conf.content_string, part
