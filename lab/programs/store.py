"""The cache of programs: what is there, what is missing, and making that, safe against being killed at any moment.

<cache>/programs/parts/NAME-VERSION-KEY/   a part: one component's programs or one image; its name appears when
                                           it is complete
<cache>/kubernetes/vX.Y.Z/                 bin/, images/, SHA256SUMS of one version: hard links to the parts;
                                           its name appears when it is complete
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.machine import architecture, install
from lab.paths import cache
from lab.programs import fetch, golang, images
from lab.programs.catalogue import (
    MODULES,
    PAUSE,
    Part,
    ProgramsError,
    Unknown,
    Unprepared,
    catalogue,
    find,
    image_names,
    parts,
    versions,
)
from lab.programs.progress import Job, Say, elapsed, say, step

SOURCES = ("auto", "source", "download")
#: What a part and a version say of themselves.
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
#: Free disk in GiB for a build from nothing: Go caches take most of it until the end.
DISK = 10


@dataclass(frozen=True)
class Place:
    """Where things are kept."""

    root: Path

    @property
    def parts(self) -> Path:
        return self.root / "programs" / "parts"

    @property
    def work(self) -> Path:
        return self.root / "programs" / "work"

    @property
    def downloads(self) -> Path:
        return self.root / "programs" / "downloads"

    @property
    def logs(self) -> Path:
        return self.root / "programs" / "log"

    @property
    def lock(self) -> Path:
        return self.root / "programs" / ".lock"

    def version(self, kubernetes: str) -> Path:
        return self.root / "kubernetes" / f"v{kubernetes}"


def missing(wanted: Sequence[Part], made: Mapping[str, str] | None, present: frozenset[str]) -> list[Part]:
    """The parts still to be made, in order.

    `made`: part -> key of what the version's directory has (None: there is no such directory); `present`: the
    directories of complete parts. What the version has need not exist as a part too, unless an image that is to be
    made is made of it.
    """
    have = made or {}
    lacking = {part.name for part in wanted if have.get(part.name) != part.key and part.directory not in present}
    needed = {need for part in wanted if part.name in lacking for need in part.needs}
    return [part for part in wanted if part.name in lacking or (part.name in needed and part.directory not in present)]


def state(directory: Path) -> dict[str, str] | None:
    """Part -> key of what a version's directory has, none where a file is gone; None when there is no directory."""
    try:
        data = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        found = {}
        for name, part in data.items():
            if all((directory / file).stat().st_size == size for file, size in part["sizes"].items()):
                found[name] = str(part["key"])
        return found
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def complete(place: Place) -> frozenset[str]:
    """The directories of the parts that are complete."""
    return frozenset(path.name for path in place.parts.glob("*") if _intact(path))


def _intact(part: Path) -> bool:
    """Whether a part's files have the sizes that it says: its files are the versions' too, by hard links."""
    try:
        sizes = json.loads((part / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        return all((part / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def ready(minor: str, only: str = "main") -> Path:
    """The directory of a version: bin/, images/, SHA256SUMS. Raises Unknown, or Unprepared when it is not complete."""
    exact = versions(minor)
    directory = Place(cache()).version(exact["kubernetes"])
    have = state(directory) or {}
    lacking = [part.name for part in parts(minor, only, architecture()) if have.get(part.name) != part.key]
    if lacking:
        wish = "" if only == "main" else f" --only {only}"
        raise Unprepared(
            f"the programs of Kubernetes {exact['kubernetes']} are not prepared (missing: {', '.join(lacking)}); "
            f"run: scripts/run lab programs --kubernetes {find(minor, catalogue())}{wish}"
        )
    return directory


def prepare(minor: str, only: str = "main", source: str = "auto", tell: Say = say) -> Path:
    """Makes what is missing of a version and gives its directory. Raises Unknown, Unprepared or ProgramsError."""
    if source not in SOURCES:
        raise Unknown(f"'{source}' is not a way to get programs; there are: {', '.join(SOURCES)}")
    arch, place, exact = architecture(), Place(cache()), versions(minor)
    wanted = parts(minor, only, arch)
    directory = place.version(exact["kubernetes"])
    title = f"Kubernetes {exact['kubernetes']}"
    if not missing(wanted, state(directory), frozenset()):
        tell(f"programs: {title} is cached in {directory}")
        return directory
    started = time.monotonic()
    with locked(place.lock, tell) as lock:
        clear(place)
        todo = missing(wanted, state(directory), complete(place))
        if todo:
            ways = choose(todo, source)
            room(place, [part for part in todo if ways.get(part.name) == "source"])
            provide(todo, place.logs / "packages.log", tell)
            tell(f"programs: {title}, {len(todo)} of {len(wanted)} parts to make in {place.root}")
            maker = Maker(place, arch, tell, lock, exact, ways, {part.name: part for part in wanted})
            for number, part in enumerate(todo, 1):
                maker.make(part, f"[{number}/{len(todo)}]")
        assemble(place, directory, wanted)
        verify(directory, minor, only)
        prune(place, arch)
        golang.forget()
    tell(f"programs: {title} is ready in {directory} ({elapsed(time.monotonic() - started)})")
    return directory


def choose(todo: Sequence[Part], source: str) -> dict[str, str]:
    """Part -> `download` or `source`, for the components among `todo`. Raises Unprepared when there is no way."""
    components = {part.name: part for part in todo if part.component}
    if not components:
        return {}
    online = source == "download" or (source == "auto" and fetch.reachable())
    ways = {
        name: "download" if online and part.component and part.component.download else "source"
        for name, part in components.items()
    }
    built = {name: components[name].version for name, way in ways.items() if way == "source"}
    if built and (problem := golang.go_problem(golang.find_go(), built)):
        why = "upstream's download site cannot be reached and " if source == "auto" and not online else ""
        raise Unprepared(f"{', '.join(built)} cannot be built: {why}{problem}")
    return ways


def room(place: Place, built: Sequence[Part]) -> None:
    """Raises Unprepared when a build would fill the disk."""
    free = shutil.disk_usage(place.root).free >> 30
    if built and free < DISK:
        raise Unprepared(
            f"building {', '.join(part.name for part in built)} takes up to {DISK} GiB of disk for a while, "
            f"{place.root} has {free}; free some, or set CENSUSCHAT_CACHE to a directory elsewhere"
        )


def tools(todo: Sequence[Part], present: Callable[[str], bool]) -> tuple[str, ...]:
    """The Debian packages with what making these parts takes and this machine lacks."""
    needed = []
    if any(part.image for part in todo) and not present("zstd"):
        needed.append("zstd")
    if any(part.image and part.image.packages for part in todo) and not present("mmdebstrap"):
        needed.append("mmdebstrap")
    if any(not part.image and not part.component for part in todo) and not (present("cc") or present("gcc")):
        needed += ["gcc", "libc6-dev"]
    return tuple(needed)


def provide(todo: Sequence[Part], log: Path, tell: Say) -> None:
    """Installs what `tools` says, as the lab does with its programs. Raises Unprepared."""
    packages = tools(todo, lambda program: shutil.which(program) is not None)
    if not packages:
        return
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unprepared(f"making the images needs {', '.join(packages)}; install them with: {command}")
    tell(f"programs: installing {', '.join(packages)}")
    try:
        install(packages, log)
    except RuntimeError as error:
        raise Unprepared(str(error)) from None


@contextlib.contextmanager
def locked(file: Path, tell: Say, patience: float = 20.0) -> Iterator[int]:
    """Waits for whoever else makes programs, also for a build whose parent was killed; gives the file descriptor."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="ascii") as opened:
        waited = 0.0
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited % patience == 0:
                    tell(f"programs: another command is making programs; waited {elapsed(waited)}")
                time.sleep(1)
                waited += 1
        yield opened.fileno()


def clear(place: Place) -> None:
    """Removes what a killed command left; only with the lock held."""
    for directory in (place.work, *place.root.glob("kubernetes/.new-*")):
        if directory.exists():
            shutil.rmtree(directory)
    for directory in (place.parts, place.work, place.logs, place.root / "kubernetes"):
        directory.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Maker:
    """Makes parts, one at a time."""

    place: Place
    arch: str
    tell: Say
    lock: int
    exact: Mapping[str, str]
    ways: Mapping[str, str]
    wanted: Mapping[str, Part]

    def make(self, part: Part, count: str) -> None:
        """Makes a part in a directory of its own and gives it its name when it is complete."""
        work = self.place.work / part.directory
        files = work / "part"
        for file in part.files:
            (files / file).parent.mkdir(parents=True, exist_ok=True)
        log = self.place.logs / f"{part.directory}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        how = {"download": "downloading", "source": "building from source"}.get(self.ways.get(part.name, ""), "making")
        self.tell(f"{count} {part.name} {part.version}: {how}")
        with step(f"{part.name} {part.version}", self.tell) as current:
            how = self._fill(part, files, work, Job(self.arch, log, current, self.lock))
        manifest = {file: (files / file).stat().st_size for file in part.files}
        (files / MANIFEST).write_text(json.dumps({"key": part.key, "sizes": manifest, "sums": sums(files, part.files)}))
        flush(files)
        target = self.place.parts / part.directory
        if target.exists():
            shutil.rmtree(target)
        files.rename(target)
        shutil.rmtree(work)
        size = sum(manifest.values()) >> 20
        self.tell(f"{count} {part.name} {part.version}: {how}, {size} MiB, {elapsed(time.monotonic() - started)}")

    def _fill(self, part: Part, files: Path, work: Path, job: Job) -> str:
        """Puts the part's files into `files`; gives how, in a word."""
        if part.image:
            sources = {
                program: self.place.parts / self.wanted[need].directory / "bin" / program
                for need in part.needs
                for program in part.image.programs[need]
            }
            name = part.image.name.format(**self.exact)
            made = images.make(part.image, name, sources, work, job)
            made.rename(files / part.files[0])
            return "made"
        if not part.component:
            images.compile_pause(PAUSE, part.version, files / part.files[0])
            return "built"
        target = files / "bin"
        if self.ways[part.name] == "download":
            try:
                store = self.place.downloads / part.directory
                fetch.release(part.component, part.version, target, store, job)
                shutil.rmtree(store)
                return "downloaded, checksums right"
            except fetch.Missing as error:
                problem = golang.go_problem(golang.find_go(), {part.name: part.version})
                if problem:
                    raise ProgramsError(f"{error}; and it cannot be built: {problem}") from None
                self.tell(f"    {error}; building it from source")
        golang.build(part.name, part.version, part.component, target, job)
        return "built"


def sums(directory: Path, files: Sequence[str]) -> dict[str, str]:
    """The sha256 of each file."""
    found = {}
    for name in files:
        with (directory / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def flush(directory: Path) -> None:
    """Has the disk hold the contents before a name says they are complete."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def assemble(place: Place, directory: Path, wanted: Sequence[Part]) -> None:
    """Brings a version's directory up to date from the parts.

    A new one appears whole, by one rename. One that is there is extended file by file, each by a rename, and its
    manifest last: programs that run from it are not disturbed.
    """
    have = state(directory)
    old = json.loads((directory / MANIFEST).read_text(encoding="utf-8")) if have is not None else {}
    fresh = have is None
    new = directory.with_name(f".new-{directory.name}")
    new.mkdir()
    entries = {name: entry for name, entry in old.items() if name in (have or {})}
    for part in wanted:
        if (have or {}).get(part.name) == part.key:
            continue
        source = place.parts / part.directory
        entries[part.name] = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        for file in part.files:
            link = new / file
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.hardlink_to(source / file)
            except OSError:
                shutil.copy2(source / file, link)
    lines = sorted(f"{digest}  {name}" for entry in entries.values() for name, digest in entry["sums"].items())
    (new / SUMS).write_text("\n".join(sorted(lines, key=lambda line: line.split()[1])) + "\n", encoding="ascii")
    (new / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")
    if fresh:
        if directory.exists():
            shutil.rmtree(directory)
        new.rename(directory)
        return
    for path in sorted(new.rglob("*"), key=lambda item: item.name == MANIFEST):
        if path.is_file():
            target = directory / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    shutil.rmtree(new)


def verify(directory: Path, minor: str, only: str) -> None:
    """Asks the kubeadm of the version which images it wants; raises ProgramsError when the catalogue's differ."""
    exact, names = versions(minor), image_names(minor)
    ours = {names[part.name.removeprefix("image/")] for part in parts(minor, only, architecture()) if part.image}
    command = (directory / "bin/kubeadm", "config", "images", "list", "--kubernetes-version", f"v{exact['kubernetes']}")
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lacking = sorted(set(said.stdout.split()) - ours)
    if said.returncode != 0 or not said.stdout or lacking:
        raise ProgramsError(
            f"kubeadm {exact['kubernetes']} wants images that lab/programs/ does not make: "
            f"{', '.join(lacking) or said.stderr.strip()[-200:]}"
        )


def prune(place: Place, arch: str) -> None:
    """Removes parts that no version of the catalogue is made of any more."""
    keep = {part.directory for minor in catalogue().versions for part in parts(minor, "all", arch)}
    for path in place.parts.iterdir():
        if path.name not in keep:
            shutil.rmtree(path)


def update(tell: Say = say) -> None:
    """Writes the Go module files of all components and versions of the catalogue anew."""
    place, book = Place(cache()), catalogue()
    wanted = {
        (name, exact[name]): component
        for exact in book.versions.values()
        for name, component in book.components.items()
    }
    with locked(place.lock, tell) as lock:
        clear(place)
        for (name, version), component in wanted.items():
            tell(f"module files of {name} {version}")
            with step(f"module files of {name} {version}", tell) as current:
                log = place.logs / f"update-{name}-{version}.log"
                golang.update(name, version, component, Job(architecture(), log, current, lock))
        golang.forget()
        for path in MODULES.iterdir():
            if path.name not in {f"{name}-{version}" for name, version in wanted}:
                shutil.rmtree(path)
