"""The prepared programs are the versions that the catalogue says, need no library, and are what their checksums say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab import programs
from lab.programs.catalogue import catalogue

#: Program -> (what prints its version, the component whose version it is).
ASKED = {
    "kube-apiserver": ("--version", "kubernetes"),
    "kube-controller-manager": ("--version", "kubernetes"),
    "kube-scheduler": ("--version", "kubernetes"),
    "kube-proxy": ("--version", "kubernetes"),
    "kubelet": ("--version", "kubernetes"),
    "kubeadm": ("version", "kubernetes"),
    "kubectl": ("version --client", "kubernetes"),
    "etcd": ("--version", "etcd"),
    "etcdctl": ("version", "etcd"),
    "etcdutl": ("version", "etcd"),
    "containerd": ("--version", "containerd"),
    "containerd-shim-runc-v2": ("-v", "containerd"),
    "ctr": ("--version", "containerd"),
    "coredns": ("-version", "coredns"),
    "kwok": ("--version", "kwok"),
    "pause": ("-v", "pause"),
}


@pytest.fixture(scope="module")
def place() -> Path:
    return programs.ready(catalogue().default)


@pytest.mark.parametrize("program", ASKED)
def test_a_program_says_its_version_and_needs_no_library(place: Path, program: str) -> None:
    arguments, component = ASKED[program]
    said = subprocess.run((place / "bin" / program, *arguments.split()), capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert programs.versions(catalogue().default)[component] in said.stdout
    linked = subprocess.run(("ldd", place / "bin" / program), capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in linked.stdout + linked.stderr


def test_every_program_is_asked(place: Path) -> None:
    main = {
        name for component in catalogue().components.values() if component.set == "main" for name in component.packages
    }
    assert main | {"pause"} == set(ASKED)


def test_nothing_was_damaged_since_it_was_made(place: Path) -> None:
    said = subprocess.run(
        ("sha256sum", "--check", "--quiet", "SHA256SUMS"), cwd=place, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout
