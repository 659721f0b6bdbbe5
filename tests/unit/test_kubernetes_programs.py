"""Programs from a site's mirror: what is fetched, and that nothing unproven ever appears."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.censuschat.infra.plugins.module_utils.kubernetes.programs import (
    Found,
    chosen,
    parse_sums,
    plan,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError
from ansible_collections.censuschat.infra.plugins.modules.kubernetes_programs import Directory

A, B = "a" * 64, "b" * 64


def test_the_table_is_read() -> None:
    assert parse_sums(f"{A}  bin/kubelet\n{B} *./images/pause.tar\n\n") == {"bin/kubelet": A, "images/pause.tar": B}


@pytest.mark.parametrize("line", ["<html>", f"{A}  /etc/passwd", f"{A}  bin/../../etc/passwd", f"{A[:-1]}  bin/x"])
def test_a_line_that_is_no_checksum_below_the_directory_is_refused(line: str) -> None:
    with pytest.raises(NodeError, match="SHA256SUMS has a line"):
        parse_sums(f"{B}  bin/ok\n{line}\n")


def test_patterns_choose_files_and_one_that_names_none_is_refused() -> None:
    sums = {"bin/kubelet": A, "bin/kubeadm": A, "images/pause.tar": B}
    assert chosen(["bin/*", "images/pause.tar"], sums) == ["bin/kubeadm", "bin/kubelet", "images/pause.tar"]
    with pytest.raises(NodeError, match=r"no file images/etcd\.tar"):
        chosen(["images/etcd.tar"], sums)


def test_only_what_is_missing_or_different_is_fetched() -> None:
    sums = {"bin/a": A, "bin/b": A, "bin/c": A}
    found = {"bin/a": Found(1, 1, A), "bin/b": Found(1, 1, B)}
    assert plan(sorted(sums), sums, found) == [("bin/b", "not what its checksum says"), ("bin/c", "not there")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing of it belongs in the test's output."""


@pytest.fixture(name="mirror")
def mirror_of_a_site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory with two programs, served on loopback: its path and its URL."""
    place = tmp_path / "mirror"
    (place / "bin").mkdir(parents=True)
    for name in ("kubelet", "kubeadm"):
        (place / "bin" / name).write_text(f"program {name}\n" * 1000)
    sums = (f"{hashlib.sha256(p.read_bytes()).hexdigest()}  bin/{p.name}\n" for p in sorted((place / "bin").iterdir()))
    (place / "SHA256SUMS").write_text("".join(sums))
    handler = functools.partial(Quiet, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield place, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def checksum(place: Path) -> str:
    return hashlib.sha256((place / "SHA256SUMS").read_bytes()).hexdigest()


def test_files_are_fetched_proven_and_not_read_again(mirror: tuple[Path, str], tmp_path: Path) -> None:
    place, url = mirror
    directory = Directory(str(tmp_path / "copy"), url, retries=0)
    text, sums = directory.sums(checksum(place))
    for name in sums:
        directory.fetch(name, sums[name])
    directory.prove(text, sorted(sums))
    assert plan(sorted(sums), sums, directory.observe(sorted(sums))) == []
    assert (tmp_path / "copy/bin/kubelet").stat().st_mode & 0o777 == 0o755
    # Its own copy of the table serves while the mirror is away, and a file that changed is seen.
    away = Directory(str(tmp_path / "copy"), "http://127.0.0.1:9", retries=0)
    assert away.sums(checksum(place))[1] == sums
    (tmp_path / "copy/bin/kubelet").write_text("something else")
    assert plan(sorted(sums), sums, away.observe(sorted(sums))) == [("bin/kubelet", "not what its checksum says")]


def test_a_mirror_with_another_table_is_refused(mirror: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="nothing was taken from it"):
        Directory(str(tmp_path / "copy"), mirror[1], retries=0).sums(A)


def test_a_file_that_is_not_its_checksum_never_appears(mirror: tuple[Path, str], tmp_path: Path) -> None:
    place, url = mirror
    directory = Directory(str(tmp_path / "copy"), url, retries=0)
    sums = directory.sums(checksum(place))[1]
    (place / "bin/kubelet").write_text("another program")
    with pytest.raises(NodeError, match=r"bin/kubelet cannot be fetched: it has the checksum"):
        directory.fetch("bin/kubelet", sums["bin/kubelet"])
    assert list((tmp_path / "copy/bin").iterdir()) == []


def test_a_file_that_the_mirror_lacks_is_named(mirror: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"bin/etcd cannot be fetched: .*404"):
        Directory(str(tmp_path / "copy"), mirror[1], retries=0).fetch("bin/etcd", A)
