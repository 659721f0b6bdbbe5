"""A prepared node: its name, the others' names, its time zone and packages."""

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


def test_the_packages_are_there(host: Host) -> None:
    for name in ("ca-certificates", "iproute2", "less", "procps"):
        assert host.package(name).is_installed, name
