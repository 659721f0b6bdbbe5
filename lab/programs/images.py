"""Images as archives that `ctr -n k8s.io images import` and `podman load` read, without a container engine.

An image has one layer and is the same byte by byte when its files are: names sorted, no owners, no times.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lab.images import SUITE, find_mirror
from lab.programs.catalogue import Image, ProgramsError
from lab.programs.progress import Job

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What a base with Debian packages does not need: documentation (licences stay), translations, the package manager.
EXCLUDED = (
    "usr/share/locale/*",
    "usr/share/man/*",
    "usr/share/doc/*/changelog*",
    "usr/share/doc/*/NEWS*",
    "usr/share/doc/*/README*",
    "usr/share/doc/*/examples/*",
    "usr/share/lintian/*",
    "usr/share/info/*",
    "usr/lib/*/gconv/*",
    "usr/lib/python3*/test/*",
    "usr/lib/python3*/pydoc_data/*",
    "usr/bin/dpkg*",
    "usr/bin/tar",
    "usr/share/dpkg/*",
    "usr/share/perl5/*",
    "usr/share/bash-completion/*",
    "var/cache/*",
    "var/lib/apt/*",
    "var/lib/dpkg/*",
    "var/log/*",
    "etc/apt/*",
    "etc/dpkg/*",
    "etc/cron*",
    "etc/logrotate.d/*",
    "dev/*",
    "proc/*",
    "run/*",
    "sys/*",
    "tmp/*",
)
#: Files of every image: the users that its `user` and file owners may be, and a name service that needs no libraries.
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n"
    "nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\nnonroot:x:65532:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
#: Directories of every image: path -> (mode, uid).
DIRECTORIES = {"tmp": (0o1777, 0), "home/nonroot": (0o755, 65532), "etc": (0o755, 0)}


def debian(packages: Sequence[str], work: Path, job: Job) -> Path:
    """A directory with the files of Debian packages and of all they depend on, from the mirror of the machine's apt."""
    mirror = find_mirror()
    lines = [f"deb {mirror.archive} {SUITE} main"]
    if mirror.security:
        lines.append(f"deb {mirror.security} {SUITE}-security main")
    root = work / "root"
    job.step.detail = f"Debian packages {', '.join(packages)}"
    command = [
        "mmdebstrap",
        "--variant=extract",
        "--format=directory",
        f"--architectures={job.architecture}",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        f"--include={','.join(packages)}",
        *([f'--aptopt=Acquire::http::Proxy "{mirror.proxy}"'] if mirror.proxy else []),
        SUITE,
        str(root),
        *lines,
    ]
    if os.geteuid() == 0:
        command.insert(1, "--mode=root")
    with job.log.open("a", encoding="utf-8") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
        if done.returncode != 0:
            tail = " | ".join(job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
            raise ProgramsError(f"mmdebstrap of {', '.join(packages)} failed: {tail}; all of it is in {job.log}")
        trim(root)
        finish: list[tuple[str, ...]] = []
        if (root / "usr/sbin/ldconfig").exists():
            # Nothing ran the maintainer scripts that make its cache.
            finish.append(("chroot", str(root), "/usr/sbin/ldconfig"))
        if (root / "usr/bin/python3").exists():
            # In a container that may not write, each start would compile all modules again. By hash: no times are kept.
            places = ("/usr/lib/python3", *(f"/usr/lib/{p.name}" for p in (root / "usr/lib").glob("python3.*")))
            compiler = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
            finish.append(("chroot", str(root), "/usr/bin/python3", "-I", *compiler, *places))
        for run in finish:
            done = subprocess.run(run, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
            if done.returncode != 0:
                raise ProgramsError(f"`{' '.join(run)}` failed (exit {done.returncode}); what it said is in {job.log}")
    shutil.rmtree(root / "var/cache/ldconfig", ignore_errors=True)
    return root


def trim(root: Path) -> None:
    """Removes what is EXCLUDED."""
    for path, name in walk(root):
        if (not path.is_dir() or path.is_symlink()) and any(fnmatch(name, pattern) for pattern in EXCLUDED):
            path.unlink()
    for path, _ in sorted(walk(root), key=lambda item: item[1], reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def walk(root: Path) -> Iterator[tuple[Path, str]]:
    """All below `root` with the relative name, sorted by it; a link is not followed."""
    for path in sorted(root.rglob("*")):
        yield path, path.relative_to(root).as_posix()


def missing(root: Path, needs: Sequence[str]) -> list[str]:
    """What the image needs and a directory lacks; a need may have wildcards."""
    return [need for need in needs if not any(root.glob(need))]


def compile_pause(source: Path, version: str, target: Path) -> None:
    """The pause program: static, a few hundred kilobytes."""
    compiler = shutil.which("cc") or "gcc"
    command = (compiler, "-static", "-Os", "-s", "-Wall", "-Werror", f'-DVERSION="{version}"', "-o", target, source)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProgramsError(f"the pause program does not compile: {done.stderr.strip()[-300:]}")


def fill(image: Image, root: Path, programs: Mapping[str, Path]) -> None:
    """Adds to `root` what every image has, the links and the programs (name -> file)."""
    for directory in DIRECTORIES:
        (root / directory).mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (root / name).write_text(text, encoding="ascii")
    for name, aim in image.links.items():
        link = root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(aim)
    for name, source in programs.items():
        target = root / image.directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755)


def pack(root: Path, target: Path) -> None:
    """The layer: a tar that depends on names, contents and modes only."""
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for path, name in walk(root):
            entry = tar.gettarinfo(path, name)
            mode, owner = DIRECTORIES.get(name, (entry.mode, 0))
            entry.mode, entry.uid, entry.gid, entry.mtime, entry.uname, entry.gname = mode, owner, owner, 0, "", ""
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            elif entry.isdir() or entry.issym():
                tar.addfile(entry)
            elif entry.islnk():
                # A second name of a file: packed as the file itself, which keeps the layer independent of the order.
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
                with path.open("rb") as file:
                    tar.addfile(entry, file)


def compress(layer: Path, target: Path) -> None:
    """A layer as archives hold it. Measured on a node: half the time of an import, a third of the disk it takes."""
    command = ("zstd", "-3", "--quiet", "--force", "-o", str(target), str(layer))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProgramsError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-200:]}")


def configuration(image: Image, architecture: str, layer: str) -> bytes:
    """The image's configuration as the archive holds it; `layer`: the layer's sha256."""
    data = {
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Env": [f"PATH={PATH}"],
            "Entrypoint": list(image.entrypoint),
            "User": image.user,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "lab programs"}],
    }
    return json.dumps(data, sort_keys=True).encode()


def archive(image: Image, name: str, architecture: str, layer: Path, target: Path) -> None:
    """Writes the archive of an image with one layer under its full name."""
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = configuration(image, architecture, digest)
    identity = hashlib.sha256(settings).hexdigest()
    packed = layer.with_name(layer.name + ".zst")
    compress(layer, packed)
    manifest = json.dumps([{"Config": f"{identity}.json", "RepoTags": [name], "Layers": [f"{digest}.tar"]}]).encode()
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(entry_name: str, content: io.BufferedIOBase, size: int) -> None:
            entry = tarfile.TarInfo(entry_name)
            entry.size, entry.mode = size, 0o644
            tar.addfile(entry, content)

        add("manifest.json", io.BytesIO(manifest), len(manifest))
        add(f"{identity}.json", io.BytesIO(settings), len(settings))
        with packed.open("rb") as file:
            add(f"{digest}.tar", file, packed.stat().st_size)
    packed.unlink()


def make(image: Image, name: str, programs: Mapping[str, Path], work: Path, job: Job) -> Path:
    """Makes an image in the directory `work`; gives the archive's path. Raises ProgramsError."""
    root = work / "root"
    if image.packages:
        debian(image.packages, work, job)
    else:
        root.mkdir()
    if lacking := missing(root, image.needs):
        raise ProgramsError(f"the image {name} would lack {', '.join(lacking)}; see `packages` in the catalogue")
    fill(image, root, programs)
    layer, target = work / "layer.tar", work / (re.sub(r"[^\w.-]", "-", name) + ".tar")
    pack(root, layer)
    archive(image, name, job.architecture, layer, target)
    layer.unlink()
    shutil.rmtree(root)
    return target
