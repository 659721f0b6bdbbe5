"""A prepared node: its name, the others' names, time zone, packages, accounts, and when it updates itself."""

from __future__ import annotations

from testinfra.host import Host


def test_the_node_has_its_name(host: Host) -> None:
    name = host.check_output("hostname")
    assert name in ("base-12", "base-13")
    assert host.file("/etc/hostname").content_string.strip() == name


def test_the_nodes_know_each_other_and_what_the_inventory_adds(host: Host) -> None:
    assert host.addr("base-13").ipv4_addresses == ["10.77.9.14"]
    assert host.addr("hardening-12").ipv4_addresses == ["10.77.9.11"]
    assert host.addr("packages.lab.test").ipv4_addresses == ["10.77.0.2"]


def test_the_time_zone_is_the_inventorys(host: Host) -> None:
    assert host.file("/etc/localtime").linked_to.endswith("/zoneinfo/Europe/Berlin")
    assert host.check_output("date +%Z") in ("CET", "CEST")


def test_the_packages_are_there_and_held(host: Host) -> None:
    for name in ("ca-certificates", "iproute2", "less", "procps"):
        assert host.package(name).is_installed, name
    assert host.check_output("apt-mark showhold").split() == ["less"]


def test_accounts_are_the_inventorys(host: Host) -> None:
    ada = host.user("ada")
    assert (ada.uid, ada.shell) == (2001, "/bin/bash")
    assert "auditors" in ada.groups
    assert not host.user("eve").exists
    keys = host.file("/home/ada/.ssh/authorized_keys")
    assert (keys.user, keys.mode) == ("ada", 0o600)
    assert keys.content_string.startswith("ssh-ed25519 ")
    assert "(ALL" in host.check_output("sudo -l -U ada")


def test_the_operator_of_the_run_keeps_his_key(host: Host) -> None:
    assert host.file("/home/ops/.ssh/authorized_keys").content_string.strip()


def test_the_node_updates_itself_in_its_window(host: Host) -> None:
    settings = host.check_output("apt-config dump")
    assert 'APT::Periodic::Unattended-Upgrade "1";' in settings
    assert '"postgresql-";' in settings
    calendar = host.check_output("systemctl show -P TimersCalendar apt-daily-upgrade.timer")
    assert "Sun *-*-* 02:00:00 America/New_York" in calendar
    assert host.service("apt-daily-upgrade.timer").is_enabled
