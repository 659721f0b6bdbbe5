"""Downloads of programs, against a server on loopback that behaves badly in every way seen of real ones."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lab.programs import fetch
from lab.programs.catalogue import Component, Download, ProgramsError
from lab.programs.progress import Job, Step

PROGRAM = bytes(range(256)) * 4096


@dataclass
class Site:
    """What the server has, and what it does at the next requests of a path: `cut`, or a status of its own."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    misdeeds: dict[str, list[str]] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)

    def publish(self, name: str, content: bytes, checksum: str = "") -> None:
        self.files[f"/{name}"] = content
        self.files[f"/{name}.sha256"] = (checksum or hashlib.sha256(content).hexdigest()).encode()


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            wish = self.headers.get("Range", "")
            found.asked.append((self.path, wish))
            misdeed = found.misdeeds[self.path].pop(0) if found.misdeeds.get(self.path) else ""
            if misdeed.isdigit() or self.path not in found.files:
                self.send_error(int(misdeed or 404))
                return
            content = found.files[self.path]
            start = int(wish.removeprefix("bytes=").rstrip("-")) if wish and found.ranges else 0
            if start > len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : start + 1000] if misdeed == "cut" else content[start:])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


def get(site: Site, name: str, target: Path) -> None:
    fetch.checked(f"{site.url}/{name}", f"{site.url}/{name}.sha256", target, Step("test"), pause=0.01)


def test_a_good_file_arrives(site: Site, tmp_path: Path) -> None:
    site.publish("kubectl", PROGRAM)
    get(site, "kubectl", tmp_path / "kubectl")
    assert (tmp_path / "kubectl").read_bytes() == PROGRAM


def test_a_bad_checksum_keeps_nothing(site: Site, tmp_path: Path) -> None:
    site.publish("kubectl", PROGRAM, checksum="0" * 64)
    with pytest.raises(ProgramsError, match="not what its checksum says") as error:
        get(site, "kubectl", tmp_path / "kubectl")
    assert not isinstance(error.value, fetch.Missing), "a wrong file is never a reason to go on in another way"
    assert not (tmp_path / "kubectl").exists()
    assert [path for path, _ in site.asked].count("/kubectl") == 2


def test_a_cut_connection_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.publish("kubectl", PROGRAM)
    site.misdeeds["/kubectl"] = ["cut", "503", "cut"]
    get(site, "kubectl", tmp_path / "kubectl")
    assert (tmp_path / "kubectl").read_bytes() == PROGRAM
    assert [wish for path, wish in site.asked if path == "/kubectl"] == [
        "",
        "bytes=1000-",
        "bytes=1000-",
        "bytes=2000-",
    ]


def test_a_server_without_ranges_starts_again(site: Site, tmp_path: Path) -> None:
    site.publish("kubectl", PROGRAM)
    site.misdeeds["/kubectl"] = ["cut"]
    site.ranges = False
    get(site, "kubectl", tmp_path / "kubectl")
    assert (tmp_path / "kubectl").read_bytes() == PROGRAM


@pytest.mark.parametrize("left", [PROGRAM[:500], b"x" * 500, PROGRAM + b"too long"], ids=["part", "other", "longer"])
def test_what_an_earlier_attempt_left_is_used_or_thrown_away(site: Site, tmp_path: Path, left: bytes) -> None:
    site.publish("kubectl", PROGRAM)
    (tmp_path / "kubectl").write_bytes(left)
    get(site, "kubectl", tmp_path / "kubectl")
    assert (tmp_path / "kubectl").read_bytes() == PROGRAM


def test_what_upstream_does_not_have_may_be_built(site: Site, tmp_path: Path) -> None:
    with pytest.raises(fetch.Missing, match="HTTP 404"):
        get(site, "kubectl", tmp_path / "kubectl")
    assert len(site.asked) == 1, "a 404 is final"


def test_a_site_that_stays_down_is_given_up(site: Site, tmp_path: Path) -> None:
    site.publish("kubectl", PROGRAM)
    site.misdeeds["/kubectl"] = ["503"] * 9
    with pytest.raises(fetch.Missing, match="after 5 attempts: HTTP 503"):
        get(site, "kubectl", tmp_path / "kubectl")


def test_reachable(site: Site) -> None:
    assert fetch.reachable(site.url)
    assert not fetch.reachable("http://127.0.0.1:1/", timeout=0.5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a" * 64, "a" * 64),
        ("b" * 128 + "\n", "b" * 128),
        (f"{'a' * 64}  helm.tar.gz\n", "a" * 64),
        (f"{'c' * 64}  other.tar.gz\n{'a' * 64} *release/helm.tar.gz\n", "a" * 64),
    ],
    ids=["bare", "sha512", "with name", "many"],
)
def test_checksum_formats(text: str, found: str) -> None:
    assert fetch.parse_checksum(text, "helm.tar.gz") == found


@pytest.mark.parametrize("text", ["", "<html>not found</html>", f"{'a' * 64}  other\n", "a" * 40])
def test_no_checksum_no_file(text: str) -> None:
    with pytest.raises(ProgramsError, match=r"do not name helm\.tar\.gz"):
        fetch.parse_checksum(text, "helm.tar.gz")


def packed(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./bin/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def release(site: Site, tmp_path: Path, *programs: str) -> Path:
    download = Download(
        url=f"{site.url}/tools-{{version}}-{{arch}}.tgz",
        checksums=f"{site.url}/{{file}}.sha256",
        member="bin/{program}",
    )
    component = Component(set="main", packages=dict.fromkeys(programs, ""), download=download)
    target = tmp_path / "bin"
    target.mkdir(exist_ok=True)
    job = Job("amd64", tmp_path / "log", Step("test"), 0)
    fetch.release(component, "1.2.3", target, tmp_path / "store", job, pause=0.01)
    return target


def test_programs_come_out_of_one_archive(site: Site, tmp_path: Path) -> None:
    site.publish("tools-1.2.3-amd64.tgz", packed(etcd=b"one", etcdctl=b"two"))
    target = release(site, tmp_path, "etcd", "etcdctl")
    assert (target / "etcd").read_bytes() == b"one"
    assert (target / "etcdctl").stat().st_mode & 0o777 == 0o755
    assert [path for path, _ in site.asked].count("/tools-1.2.3-amd64.tgz") == 1


def test_an_archive_without_the_program_is_named(site: Site, tmp_path: Path) -> None:
    site.publish("tools-1.2.3-amd64.tgz", packed(etcd=b"one"))
    with pytest.raises(ProgramsError, match=r"tools-1\.2\.3-amd64\.tgz has no file bin/etcdutl"):
        release(site, tmp_path, "etcd", "etcdutl")
