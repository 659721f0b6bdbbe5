"""Programs built from their Go modules, with module files of ours that pin and sum all they are made of."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.paths import cache
from lab.programs.catalogue import Component, ProgramsError, Unprepared, module
from lab.programs.progress import Job

#: Go's own installation directory, often not on root's PATH.
USUAL = Path("/usr/local/go/bin/go")
#: No symbol table, no debug information: half the size. Not compiled in the first place: a fifth less CPU time.
LINK = "-s -w"
COMPILE = "all=-dwarf=false"


def find_go() -> str:
    """Path of the go command; empty when there is none."""
    return shutil.which("go") or (str(USUAL) if USUAL.is_file() else "")


def numbers(version: str) -> tuple[int, ...]:
    """`go1.26.8` or `1.26` as numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def wanted(name: str, version: str) -> str:
    """The Go version that a component's module files ask for."""
    found = re.search(r"^go (\S+)$", (module(name, version) / "go.mod").read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else "1.24"


def go_problem(go: str, names: Mapping[str, str]) -> str:
    """Why these components (name -> version) cannot be built with `go`; empty when they can."""
    need = max((wanted(name, version) for name, version in names.items()), key=numbers, default="1.24")
    if not go:
        return f"there is no Go on this machine; install Go {need} or later (to /usr/local/go, or anywhere on PATH)"
    said = subprocess.run(
        (go, "env", "GOVERSION"), capture_output=True, text=True, check=False, env=environment("amd64"), cwd="/"
    ).stdout.strip()
    if numbers(said) < numbers(need):
        return f"Go {need} or later is needed, {go} is {said or 'of an unknown version'}; install a newer one"
    return ""


def environment(architecture: str) -> dict[str, str]:
    """The environment of a build: nothing of the user's Go settings but where modules come from.

    Both caches of Go lie in the project's cache, so that removing it removes all that a build left.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"GO(?!PROXY|SUMDB|NOSUMDB|NOPROXY|PRIVATE|INSECURE|AUTH|VCS)|CGO_", name)
    }
    return {
        **inherited,
        "GOCACHE": str(cache() / "go" / "build"),
        "GOMODCACHE": str(cache() / "go" / "mod"),
        "GOPATH": str(cache() / "go" / "path"),
        # Set, not empty: an empty value would give way to the user's `go env -w`.
        "GOFLAGS": "-modcacherw",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GO111MODULE": "on",
        "GOOS": "linux",
        "GOARCH": architecture,
        "CGO_ENABLED": "0",
    }


def linker(component: Component, version: str) -> str:
    """The linker's flags: sizes down, versions in."""
    major, minor = version.split(".")[:2]
    values = (
        f"-X {name}={value.format(version=version, major=major, minor=minor)}"
        for name, value in component.variables.items()
    )
    return " ".join((LINK, *values))


def commands(go: str, component: Component, version: str, target: Path) -> list[tuple[str, ...]]:
    """The go commands that put a component's programs into `target`.

    One command builds all packages whose program is named after the package (they link while others compile); one
    whose program has another name gets a command of its own.
    """
    common: tuple[str, ...] = (
        go,
        "build",
        "-v",
        "-mod=readonly",
        "-trimpath",
        "-buildvcs=false",
        "-gcflags",
        COMPILE,
        "-ldflags",
        linker(component, version),
    )
    if component.tags:
        common = (*common, "-tags", component.tags)
    together, apart = [], []
    for program, package in component.packages.items():
        last = re.sub(r"/v\d+$", "", package).rpartition("/")[2]
        if last == program:
            together.append(package)
        else:
            apart.append((*common, "-o", str(target / program), package))
    return ([(*common, "-o", f"{target}/", *together)] if together else []) + apart


def run(command: Sequence[str], directory: Path, job: Job) -> None:
    """Runs a go command, counting the packages it names; raises ProgramsError with its last words."""
    compiled = 0
    words: list[str] = []
    with (
        job.log.open("a", encoding="utf-8") as output,
        subprocess.Popen(
            command,
            cwd=directory,
            env=environment(job.architecture),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(job.lock,),
            start_new_session=True,
        ) as process,
    ):
        assert process.stderr is not None
        try:
            for line in process.stderr:
                output.write(line)
                if line.startswith("go: downloading "):
                    job.step.detail = f"fetching {line.split()[2]}"
                elif re.fullmatch(r"[\w./~-]+\n", line):
                    compiled += 1
                    job.step.detail = f"{compiled} packages compiled"
                else:
                    words = [*words[-2:], line.strip()]
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise ProgramsError(
            f"{job.step.what} failed (exit {process.returncode}): {' | '.join(words) or 'no word'}; "
            f"all of it is in {job.log}"
        )


def build(name: str, version: str, component: Component, target: Path, job: Job) -> None:
    """Builds the programs of a component into `target`."""
    (cache() / "go").mkdir(parents=True, exist_ok=True)
    for command in commands(find_go(), component, version, target):
        run(command, module(name, version), job)
    for program in component.packages:
        (target / program).chmod(0o755)


def forget() -> None:
    """Removes both caches of Go: several gigabytes that only an unfinished preparation has a use for."""
    shutil.rmtree(cache() / "go", ignore_errors=True)


TOOLS = """//go:build tools

// Package tools names the commands that are built here, so that go.mod and go.sum cover all they need.
package tools

import (
{imports})
"""


def update(name: str, version: str, component: Component, job: Job) -> None:
    """Writes the module files of a component anew: `go mod tidy` resolves, go.sum pins."""
    go = find_go()
    if not go:
        raise Unprepared("module files are written with Go, and there is none on this machine; install Go")
    place = module(name, version)
    place.mkdir(parents=True, exist_ok=True)
    imports = "".join(f'\t_ "{package}"\n' for package in sorted(component.packages.values()))
    (place / "tools.go").write_text(TOOLS.format(imports=imports), encoding="utf-8")
    (place / "go.sum").unlink(missing_ok=True)
    (place / "go.mod").write_text(f"module censuschat.test/lab/{name}-{version}\n\ngo 1.24.0\n", encoding="utf-8")
    edits = [f"-require={required}@v{version}" for required in component.requires]
    if component.staging:
        edits += staged(go, component.staging, version)
    for command in ((go, "mod", "edit", *edits), (go, "mod", "tidy")):
        run(command, place, job)


def staged(go: str, origin: str, version: str) -> list[str]:
    """`-replace` flags for the modules that `origin` develops in its own tree: those it requires at exactly v0.0.0."""
    said = subprocess.run(
        (go, "mod", "download", "-json", f"{origin}@v{version}"),
        capture_output=True,
        text=True,
        check=False,
        env=environment("amd64"),
        cwd="/",
    )
    if said.returncode != 0:
        raise ProgramsError(f"{origin} v{version} cannot be fetched: {(said.stdout + said.stderr).strip()[-300:]}")
    text = Path(json.loads(said.stdout)["GoMod"]).read_text(encoding="utf-8")
    published = "v0." + version.partition(".")[2]
    return [
        f"-replace={name}={name}@{published}"
        for name in sorted(set(re.findall(r"^\s+(k8s\.io/\S+) v0\.0\.0$", text, re.M)))
    ]
