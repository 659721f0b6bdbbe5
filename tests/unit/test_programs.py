"""The programs of Kubernetes: the catalogue, what is missing, and a cache that a killed command never spoils."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from lab import cli, programs
from lab.paths import REPO
from lab.programs import catalogue, fetch, golang, images, progress, store
from lab.programs.catalogue import Image, Part, ProgramsError, Unprepared

BOOK = catalogue.catalogue()
#: What `kubeadm config images list` of the version prints; `lab programs` asks the real one.
KUBEADM = {
    "1.35": "kube-apiserver:v1.35.4 kube-controller-manager:v1.35.4 kube-scheduler:v1.35.4 kube-proxy:v1.35.4 "
    "coredns/coredns:v1.13.1 pause:3.10.1 etcd:3.6.6-0",
    "1.36": "kube-apiserver:v1.36.3 kube-controller-manager:v1.36.3 kube-scheduler:v1.36.3 kube-proxy:v1.36.3 "
    "coredns/coredns:v1.14.2 pause:3.10.2 etcd:3.6.8-0",
}


@pytest.fixture(autouse=True)
def without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as they are: the machine that runs unit tests need not have the program."""

    def copy(layer: Path, target: Path) -> None:
        shutil.copyfile(layer, target)

    monkeypatch.setattr(images, "compress", copy)


# The catalogue


@pytest.mark.parametrize("version", ["1.35", "v1.35", "1.35.4", "v1.35.4"])
def test_a_version_has_several_names(version: str) -> None:
    assert programs.versions(version)["kubernetes"] == "1.35.4"


@pytest.mark.parametrize("minor", BOOK.versions)
def test_images_have_the_names_that_kubeadm_asks_for(minor: str) -> None:
    wanted = {f"registry.k8s.io/{name}" for name in KUBEADM[minor].split()}
    assert wanted <= set(catalogue.image_names(minor).values())


@pytest.mark.parametrize(
    ("name", "version"), sorted({(name, exact[name]) for exact in BOOK.versions.values() for name in BOOK.components})
)
def test_every_component_has_pinned_and_summed_module_files(name: str, version: str) -> None:
    place, component = catalogue.module(name, version), BOOK.components[name]
    lines = {line.strip().removeprefix("require ") for line in (place / "go.mod").read_text().splitlines()}
    sums = (place / "go.sum").read_text()
    tools = (place / "tools.go").read_text()
    for required in component.requires:
        assert f"{required} v{version}" in lines
        assert f"{required} v{version} h1:" in sums
    for package in component.packages.values():
        assert f'_ "{package}"' in tools


def test_no_module_files_are_left_over() -> None:
    wanted = {f"{name}-{exact[name]}" for exact in BOOK.versions.values() for name in BOOK.components}
    assert {path.name for path in catalogue.MODULES.iterdir()} == wanted


def test_all_has_more_than_main_and_both_have_what_images_are_made_of() -> None:
    main, everything = (catalogue.parts("1.35", only, "amd64") for only in catalogue.SETS)
    assert {part.name for part in everything} - {part.name for part in main} == {
        "helm",
        "metrics-server",
        "image/metrics-server",
        "image/kwok",
    }
    for chosen in (main, everything):
        seen: set[str] = set()
        for part in chosen:
            assert set(part.needs) <= seen, f"{part.name} is made before what it is made of"
            seen.add(part.name)


def test_versions_share_the_parts_that_are_the_same() -> None:
    one, other = (
        {part.name: part.key for part in catalogue.parts(minor, "all", "amd64")} for minor in ("1.35", "1.36")
    )
    assert {name for name in one if one[name] == other[name]} == {
        "containerd",
        "helm",
        "kwok",
        "metrics-server",
        "image/python",
        "image/metrics-server",
        "image/kwok",
    }
    arm = {part.name: part.key for part in catalogue.parts("1.35", "all", "arm64")}
    assert not [name for name in one if one[name] == arm[name]]


# What is missing

PROGRAMS = Part("etcd", "3.6.6", "k1", ("bin/etcd",))
IMAGE = Part("image/etcd", "3.6.6-0", "k2", ("images/etcd.tar",), needs=("etcd",))
OTHER = Part("helm", "4.3.1", "k3", ("bin/helm",))
WANTED = (PROGRAMS, IMAGE, OTHER)


@pytest.mark.parametrize(
    ("made", "present", "missing"),
    [
        (None, set(), ["etcd", "image/etcd", "helm"]),
        ({"etcd": "k1", "image/etcd": "k2", "helm": "k3"}, set(), []),
        ({"etcd": "k1", "image/etcd": "k2"}, set(), ["helm"]),
        ({"etcd": "k1", "image/etcd": "old", "helm": "k3"}, set(), ["etcd", "image/etcd"]),
        ({"etcd": "k1", "image/etcd": "old", "helm": "k3"}, {"etcd-3.6.6-k1"}, ["image/etcd"]),
        (None, {"etcd-3.6.6-k1", "helm-4.3.1-old"}, ["image/etcd", "helm"]),
        (None, {"etcd-3.6.6-k1", "image-etcd-3.6.6-0-k2", "helm-4.3.1-k3"}, []),
    ],
    ids=["nothing", "all", "one more", "image changed", "its programs kept", "parts kept", "only to assemble"],
)
def test_only_what_is_missing_is_made(made: dict[str, str] | None, present: set[str], missing: list[str]) -> None:
    assert [part.name for part in store.missing(WANTED, made, frozenset(present))] == missing


@pytest.mark.parametrize(
    ("has", "packages"),
    [
        (set(), ("zstd", "mmdebstrap", "gcc", "libc6-dev")),
        ({"cc", "zstd"}, ("mmdebstrap",)),
        ({"mmdebstrap", "gcc", "zstd"}, ()),
    ],
    ids=["nothing", "compiler", "all"],
)
def test_packages_that_making_takes(has: set[str], packages: tuple[str, ...]) -> None:
    assert store.tools(catalogue.parts("1.35", "main", "amd64"), has.__contains__) == packages


# How a program is got


def test_go_builds_with_our_module_files_only(tmp_path: Path) -> None:
    component = BOOK.components["etcd"]
    first, second = golang.commands("go", component, "3.6.6", tmp_path)
    assert first[-2:] == ("go.etcd.io/etcd/etcdctl/v3", "go.etcd.io/etcd/etcdutl/v3")
    assert second[-3:] == ("-o", f"{tmp_path}/etcd", "go.etcd.io/etcd/server/v3")
    assert {"-mod=readonly", "-trimpath"} <= set(first)
    assert "-X k8s.io/component-base/version.gitMinor=35" in golang.linker(BOOK.components["kubernetes"], "1.35.4")


def test_a_build_does_not_see_the_users_go_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"GOFLAGS": "-mod=mod", "GOEXPERIMENT": "x", "GOTOOLCHAIN": "auto", "CGO_LDFLAGS": "-x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOPROXY", "off")
    monkeypatch.setenv("CENSUSCHAT_CACHE", str(tmp_path))
    found = golang.environment("arm64")
    assert found["GOPROXY"] == "off", "where modules come from is the user's"
    assert found["GOFLAGS"] == "-modcacherw"
    assert found["GOTOOLCHAIN"] == "local"
    assert found["GOARCH"] == "arm64"
    assert not found.keys() & {"GOEXPERIMENT", "CGO_LDFLAGS"}
    assert {found["GOCACHE"], found["GOMODCACHE"]} == {f"{tmp_path}/go/build", f"{tmp_path}/go/mod"}


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `go` that writes a word into each program, and hangs at the module named in `hang`."""
    place = tmp_path / "fake"
    place.mkdir()
    script = place / "go"
    script.write_text(
        f"""#!{sys.executable}
import os, pathlib, sys, time
if sys.argv[1] == "env":
    print((pathlib.Path(__file__).parent / "version").read_text())
    sys.exit()
here = pathlib.Path(__file__).parent
out = sys.argv[sys.argv.index("-o") + 1]
for package in sys.argv[sys.argv.index("-o") + 2:]:
    target = out + package.removesuffix("/v3").rpartition("/")[2] if out.endswith("/") else out
    print(package, file=sys.stderr)
    pathlib.Path(target).write_text("half")
    with (here / "built").open("a") as file:
        file.write(package + "\\n")
    if (here / "hang").exists() and (here / "hang").read_text() in os.getcwd():
        (here / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    if (here / "fail").exists() and (here / "fail").read_text() in os.getcwd():
        print("main.go:1: it does not compile", file=sys.stderr)
        sys.exit(1)
    pathlib.Path(target).write_text("program " + package)
"""
    )
    script.chmod(0o755)
    (place / "version").write_text("go1.99.0")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("CENSUSCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "reachable", lambda: False)
    monkeypatch.setattr(store, "verify", lambda *_: None)
    monkeypatch.setattr(store, "provide", lambda *_: None)
    monkeypatch.setattr(images, "compile_pause", lambda _s, _v, target: target.write_text("pause"))

    def debian(packages: tuple[str, ...], work: Path, job: progress.Job) -> Path:
        for name in ("usr/sbin/xtables-nft-multi", "usr/sbin/nft", "usr/sbin/conntrack", "usr/bin/python3"):
            (work / "root" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "root" / name).write_text("Debian")
        libraries = work / "root/usr/lib/any"
        for name in ("libm.so.6", "libpq.so.5", "xtables/libxt_comment.so", "../../../etc/ld.so.cache"):
            (libraries / name).parent.mkdir(parents=True, exist_ok=True)
            (libraries / name).write_text("Debian")
        return work / "root"

    monkeypatch.setattr(images, "debian", debian)
    return place


def built(go: Path) -> list[str]:
    file = go / "built"
    return file.read_text().split() if file.exists() else []


def test_prepared_once_and_then_found(go: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = programs.prepare("1.35")
    assert place == programs.ready("1.35")
    assert place.name == "v1.35.4"
    assert (place / "bin/etcd").read_text() == "program go.etcd.io/etcd/server/v3"
    said = subprocess.run(("sha256sum", "--check", "--quiet", "SHA256SUMS"), cwd=place, check=False)
    assert said.returncode == 0
    listed = {line.split()[1] for line in (place / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(place).as_posix() for path in place.rglob("*/*") if path.is_file()}
    assert listed == there
    count = len(built(go))
    capsys.readouterr()
    programs.prepare("1.35")
    assert len(built(go)) == count
    assert capsys.readouterr().out == f"programs: Kubernetes 1.35.4 is cached in {place}\n"


def test_all_after_main_adds_and_disturbs_nothing(go: Path) -> None:
    place = programs.prepare("1.35")
    with pytest.raises(Unprepared, match=r"missing: helm, .*run: scripts/run lab programs .*1\.35 --only all"):
        programs.ready("1.35", "all")
    before = {path: path.stat().st_ino for path in place.glob("bin/*")}
    count = len(built(go))
    programs.prepare("1.35", "all")
    assert programs.ready("1.35", "all") == place
    assert [package.rpartition("/")[2] for package in built(go)[count:]] == ["helm", "metrics-server"]
    assert {path: path.stat().st_ino for path in before} == before
    assert "bin/helm" in (place / "SHA256SUMS").read_text()


def test_a_second_version_builds_only_what_differs(go: Path) -> None:
    programs.prepare("1.35")
    count = len(built(go))
    programs.prepare("1.36")
    assert not [package for package in built(go)[count:] if "containerd" in package or "kwok" in package]
    assert programs.ready("1.35") != programs.ready("1.36")


def test_a_damaged_file_is_seen_and_made_again(go: Path) -> None:
    place = programs.prepare("1.35")
    os.truncate(place / "bin/kubelet", 3)
    with pytest.raises(Unprepared, match=r"\(missing: kubernetes\)"):
        programs.ready("1.35")
    programs.prepare("1.35")
    assert (programs.ready("1.35") / "bin/kubelet").read_text().startswith("program")


def test_a_removed_file_comes_back_without_a_build(go: Path) -> None:
    place = programs.prepare("1.35")
    (place / "bin/kubelet").unlink()
    count = len(built(go))
    programs.prepare("1.35")
    assert len(built(go)) == count
    assert (programs.ready("1.35") / "bin/kubelet").exists()


def test_a_build_that_fails_says_where_and_keeps_what_was_made(go: Path) -> None:
    (go / "fail").write_text("etcd-3.6.6")
    with pytest.raises(ProgramsError, match=r"etcd 3\.6\.6 failed \(exit 1\): main\.go:1: it does not compile; all"):
        programs.prepare("1.35")
    with pytest.raises(Unprepared):
        programs.ready("1.35")
    (go / "fail").unlink()
    count = len(built(go))
    programs.prepare("1.35")
    assert not [package for package in built(go)[count:] if "k8s.io/kubernetes" in package]
    programs.ready("1.35")


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_an_interrupted_build_is_never_taken_as_complete(go: Path, tmp_path: Path, number: signal.Signals) -> None:
    (go / "hang").write_text("kubernetes-1.35.4")
    command = (sys.executable, "-m", "lab", "programs", "--from", "source")
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 30
        while not (go / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.stdout is not None
        if number == signal.SIGKILL:
            process.wait(30)
            # The build goes on without its parent; here it hangs for ever.
            os.kill(int((go / "pid").read_text()), signal.SIGKILL)
        said = process.stdout.read().decode()
    assert (process.returncode == cli.EXIT_INTERRUPTED) == (number == signal.SIGTERM), said
    assert number == signal.SIGKILL or ended(int((go / "pid").read_text())), "the build must not go on"
    assert not (tmp_path / "cache/kubernetes/v1.35.4").exists()
    with pytest.raises(Unprepared):
        programs.ready("1.35")
    (go / "hang").unlink()
    count = len(built(go))
    programs.prepare("1.35")
    assert not [package for package in built(go)[count:] if "containerd" in package], "what was complete is kept"
    assert (programs.ready("1.35") / "bin/kube-apiserver").read_text().startswith("program")
    assert not list((tmp_path / "cache/programs/work").iterdir())


def test_without_go_and_without_internet_one_sentence_says_what_to_install(
    go: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golang, "find_go", lambda: "")
    assert cli.main(["programs"]) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: containerd, kubernetes, etcd, coredns, kwok cannot be built: upstream's download")
    assert "install Go 1.26" in said
    assert said.count("\n") == 1


def test_an_old_go_is_refused_before_anything_is_built(go: Path) -> None:
    (go / "version").write_text("go1.19.8")
    with pytest.raises(Unprepared, match=r"Go 1\.26\.\d or later is needed, \S+ is go1\.19\.8"):
        programs.prepare("1.35")
    assert built(go) == []


def test_a_full_disk_is_seen_before_a_build_fills_it(go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DISK", 1 << 40)
    with pytest.raises(
        Unprepared, match=r"building containerd, .* takes up to .* GiB of disk for a while, .* has \d+;"
    ):
        programs.prepare("1.35")
    assert built(go) == []


def test_online_what_upstream_publishes_is_downloaded_and_the_rest_built(
    go: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = catalogue.parts("1.35", "all", "amd64")
    monkeypatch.setattr(fetch, "reachable", lambda: True)
    ways = store.choose(todo, "auto")
    assert {name for name, way in ways.items() if way == "source"} == {"kwok", "metrics-server"}
    assert set(store.choose(todo, "source").values()) == {"source"}


def test_what_upstream_lacks_is_built_but_a_wrong_file_is_not_worked_around(
    go: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise fetch.Missing("it cannot be had: HTTP 404")

    monkeypatch.setattr(fetch, "release", absent)
    programs.prepare("1.35", source="download")

    def wrong(*_: object) -> None:
        raise ProgramsError("it is not what its checksum says")

    monkeypatch.setattr(fetch, "release", wrong)
    with pytest.raises(ProgramsError, match="checksum"):
        programs.prepare("1.36", source="download")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--kubernetes", "1.99"],
            "'1.99' is not a Kubernetes version that lab/programs/versions.yml has; it has: 1.35",
        ),
        (["--only", "some"], "'some' is not a set of programs; there are: main, all"),
        (["--from", "thin-air"], "'thin-air' is not a way to get programs; there are: auto, source, download"),
    ],
    ids=["version", "set", "way"],
)
def test_bad_input(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["programs", *arguments]) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith(f"error: {reason}")
    assert said.count("\n") == 1


# Images

TINY = Image(set="main", name="example.test/tiny:1", entrypoint=("/run",), user="65532:65532")


def make(tmp_path: Path, name: str, program: bytes) -> Path:
    (tmp_path / name).mkdir()
    source = tmp_path / name / "source"
    source.write_bytes(program)
    job = progress.Job("amd64", tmp_path / "log", progress.Step("test"), 0)
    return images.make(TINY, TINY.name, {"run": source}, tmp_path / name, job)


def test_an_image_is_the_same_when_its_files_are(tmp_path: Path) -> None:
    one, same, other = (make(tmp_path, *what) for what in (("a", b"x"), ("b", b"x"), ("c", b"y")))
    assert one.read_bytes() == same.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_an_archive_holds_what_a_container_engine_reads(tmp_path: Path) -> None:
    with tarfile.open(make(tmp_path, "a", b"x")) as tar:
        contents = {entry.name: tar.extractfile(entry) for entry in tar}
        read = {name: file.read() for name, file in contents.items() if file}
    manifest = json.loads(read["manifest.json"])[0]
    assert manifest["RepoTags"] == ["example.test/tiny:1"]
    settings = json.loads(read[manifest["Config"]])
    layer = read[manifest["Layers"][0]]
    assert settings["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    assert settings["config"]["User"] == "65532:65532"


def test_an_image_that_lacks_a_library_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/any").mkdir(parents=True)
    (tmp_path / "usr/lib/any/libc.so.6").touch()
    assert images.missing(tmp_path, ("usr/lib/*/libc.so.6", "usr/lib/*/libm.so.6")) == ["usr/lib/*/libm.so.6"]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (125, "2 min 05 s")])
def test_elapsed(seconds: float, words: str) -> None:
    assert progress.elapsed(seconds) == words


def test_a_long_step_gives_signs_of_life() -> None:
    said: list[str] = []
    with progress.step("kubernetes 1.35.4", said.append, interval=0.05) as current:
        current.detail = "12 packages compiled"
        time.sleep(0.3)
    assert said[0] == "    ... kubernetes 1.35.4 (12 packages compiled): 0 s"
    assert len(said) > 2
