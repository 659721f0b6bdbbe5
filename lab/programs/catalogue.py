"""The catalogue of programs and images (versions.yml, catalogue.yml), and the parts that a version is made of.

A part is what is made in one go: the programs of one component, or one image. Its key is the hash of all that decides
what is in it, so a changed recipe or Go module file is a new part and an unchanged one costs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab.images import SUITE

PLACE = Path(__file__).resolve().parent
MODULES = PLACE / "modules"
PAUSE = PLACE / "pause.c"
SETS = ("main", "all")


class ProgramsError(RuntimeError):
    """Programs could not be made; the message says which, why and what to do."""


class Unknown(ProgramsError):
    """A version or set that the catalogue does not have."""


class Unprepared(ProgramsError):
    """The programs of a version are not in the cache, or the machine lacks what making them takes."""


@dataclass(frozen=True)
class Download:
    """Where upstream publishes programs: `member` is the path in an archive, empty when `url` is the program."""

    url: str
    checksums: str
    member: str = ""


@dataclass(frozen=True)
class Component:
    """Programs that are built from one Go module of ours."""

    set: str
    packages: Mapping[str, str]
    requires: tuple[str, ...] = ()
    staging: str = ""
    tags: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    download: Download | None = None


@dataclass(frozen=True)
class Image:
    """An image: programs of components over files of Debian packages."""

    set: str
    name: str
    entrypoint: tuple[str, ...]
    user: str
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    directory: str = ""
    packages: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """All that the two files say."""

    default: str
    versions: Mapping[str, Mapping[str, str]]
    components: Mapping[str, Component]
    images: Mapping[str, Image]


@dataclass(frozen=True)
class Part:
    """What is made in one go: `component` or `image` is set, or neither for the pause program."""

    name: str
    version: str
    key: str
    files: tuple[str, ...]
    needs: tuple[str, ...] = ()
    component: Component | None = None
    image: Image | None = None

    @property
    def directory(self) -> str:
        return f"{self.name.replace('/', '-')}-{self.version}-{self.key}"


def parse(data: Mapping[str, Any]) -> Catalogue:
    """The catalogue as read from YAML; a field it does not know is a TypeError."""

    def component(raw: Mapping[str, Any]) -> Component:
        download = raw.get("download")
        return Component(
            **{
                **raw,
                "requires": tuple(raw.get("requires", ())),
                "download": Download(**download) if download else None,
            }
        )

    def image(raw: Mapping[str, Any]) -> Image:
        return Image(
            **{
                **raw,
                **{name: tuple(raw.get(name, ())) for name in ("entrypoint", "packages", "needs")},
                "programs": {name: tuple(programs) for name, programs in raw.get("programs", {}).items()},
            }
        )

    return Catalogue(
        default=data["default"],
        versions=data["versions"],
        components={name: component(raw) for name, raw in data["components"].items()},
        images={name: image(raw) for name, raw in data["images"].items()},
    )


@functools.cache
def catalogue() -> Catalogue:
    """The project's catalogue."""
    files = [PLACE / "versions.yml", PLACE / "catalogue.yml"]
    return parse({name: value for file in files for name, value in yaml.safe_load(file.read_text("utf-8")).items()})


def find(version: str, book: Catalogue) -> str:
    """The minor that `version` means: 1.35, v1.35, 1.35.4 and v1.35.4 are the same. Raises Unknown."""
    plain = version.removeprefix("v")
    for minor, exact in book.versions.items():
        if plain in (minor, exact["kubernetes"]):
            return minor
    known = ", ".join(f"{minor} ({exact['kubernetes']})" for minor, exact in book.versions.items())
    raise Unknown(f"'{version}' is not a Kubernetes version that lab/programs/versions.yml has; it has: {known}")


def versions(minor: str, book: Catalogue | None = None) -> Mapping[str, str]:
    """The exact version of each component for a Kubernetes minor, without `v`. Raises Unknown."""
    book = book or catalogue()
    return book.versions[find(minor, book)]


def image_names(minor: str, book: Catalogue | None = None) -> dict[str, str]:
    """The full name of each image by its name in the catalogue."""
    book = book or catalogue()
    exact = versions(minor, book)
    return {name: image.name.format(**exact) for name, image in book.images.items()}


def module(name: str, version: str) -> Path:
    """The directory with the Go module files of a component."""
    return MODULES / f"{name}-{version}"


def _key(*decisive: object) -> str:
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=dict).encode()).hexdigest()[:12]


def parts(minor: str, only: str, architecture: str, book: Catalogue | None = None) -> tuple[Part, ...]:
    """The parts of a version in the order in which they are made; an image's `needs` name those it is made of."""
    book = book or catalogue()
    minor = find(minor, book)
    if only not in SETS:
        raise Unknown(f"'{only}' is not a set of programs; there are: {', '.join(SETS)}")
    exact = book.versions[minor]
    made: dict[str, Part] = {}
    for name, component in book.components.items():
        if component.set not in ("main", only):
            continue
        place = module(name, exact[name])
        if not (place / "go.sum").is_file():
            raise ProgramsError(f"{place} has no Go module files; write them with: scripts/run lab programs --update")
        sums = [(place / file).read_text(encoding="utf-8") for file in ("go.mod", "go.sum")]
        key = _key(architecture, exact[name], component.packages, component.tags, component.variables, sums)
        made[name] = Part(name, exact[name], key, tuple(f"bin/{p}" for p in component.packages), component=component)
    pause = PAUSE.read_text(encoding="utf-8")
    made["pause"] = Part("pause", exact["pause"], _key(architecture, exact["pause"], pause), ("bin/pause",))
    for name, image in book.images.items():
        if image.set not in ("main", only):
            continue
        needs = tuple(image.programs)
        key = _key(
            IMAGE_LAYOUT, SUITE, architecture, image.name.format(**exact), asdict(image), [made[n].key for n in needs]
        )
        version = image.name.format(**exact).rpartition(":")[2].removeprefix("v")
        files = (f"images/{name}.tar",)
        made[f"image/{name}"] = Part(f"image/{name}", version, key, files, needs, image=image)
    return tuple(made.values())


#: Part of each image's key: raise it when lab/programs/images.py makes images differently.
IMAGE_LAYOUT = 2
