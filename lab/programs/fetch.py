"""Release binaries from upstream's sites, each checked against the checksum that is published beside it."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from lab.programs.catalogue import Component, ProgramsError
from lab.programs.progress import Job, Step

#: Asked whether upstream can be reached at all.
PROBE = "https://dl.k8s.io/release/stable.txt"
#: Seconds: to find out whether there is an internet, and without a byte while downloading.
PROBE_TIMEOUT = 3.0
TIMEOUT = 30.0
#: Attempts at one file, each going on where the one before stopped; seconds before the second, doubled each time.
ATTEMPTS = 5
PAUSE = 1.0
CHUNK = 1 << 20


class Missing(ProgramsError):
    """Upstream does not have the file, or could not be reached: it may be built instead."""


def reachable(url: str = PROBE, timeout: float = PROBE_TIMEOUT) -> bool:
    """Whether upstream's download site answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):  # noqa: S310
            return True
    except (OSError, http.client.HTTPException):
        return False


def parse_checksum(text: str, file: str) -> str:
    """The checksum of `file` from a bare digest or from lines of DIGEST and name; raises ProgramsError."""
    digest = r"[0-9a-f]{64}|[0-9a-f]{128}"
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0]) == 1 and re.fullmatch(digest, lines[0][0]):
        return lines[0][0]
    for words in lines:
        if len(words) == 2 and re.fullmatch(digest, words[0]) and words[1].lstrip("*").rpartition("/")[2] == file:
            return words[0]
    raise ProgramsError(f"upstream's checksums do not name {file}")


def digest_of(path: Path, like: str) -> str:
    """The file's checksum, by the algorithm that a checksum of this length is of."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512" if len(like) == 128 else "sha256").hexdigest()


def transfer(url: str, target: Path, timeout: float, seen: Callable[[int], None]) -> None:
    """One attempt: goes on after what `target` has; raises OSError when the connection ends early."""
    have = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        got = 0
        with target.open("ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                got += len(chunk)
                seen(have + got)
    if length is not None and got < int(length):
        raise OSError(f"the connection ended after {got} of {length} bytes")


def download(
    url: str,
    target: Path,
    seen: Callable[[int], None] = lambda _: None,
    *,
    attempts: int = ATTEMPTS,
    pause: float = PAUSE,
    timeout: float = TIMEOUT,
) -> None:
    """Downloads into `target`, resuming; raises Missing when upstream says no or after the last attempt."""
    for attempt in range(1, attempts + 1):
        try:
            transfer(url, target, timeout, seen)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:
                # What is there is longer than the file: of no use.
                target.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise Missing(f"{url} cannot be had: HTTP {error.code}") from None
            reason = f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if attempt < attempts:
            time.sleep(pause * 2 ** (attempt - 1))
    raise Missing(f"{url} cannot be had after {attempts} attempts: {reason}")


def checked(url: str, checksums: str, target: Path, step: Step, *, pause: float = PAUSE) -> None:
    """Downloads a file and compares its checksum; one that differs is fetched once more from its beginning.

    Raises Missing, or ProgramsError when the file is not what its checksum says.
    """
    file = url.rpartition("/")[2]
    sums = target.with_name(target.name + ".checksums")
    sums.unlink(missing_ok=True)
    download(checksums, sums, pause=pause)
    expected = parse_checksum(sums.read_text(encoding="ascii", errors="replace"), file)

    def seen(size: int) -> None:
        step.detail = f"{file}: {size >> 20} MiB"

    for last in (False, True):
        download(url, target, seen, pause=pause)
        found = digest_of(target, expected)
        if found == expected:
            return
        target.unlink()
        if last:
            raise ProgramsError(
                f"{url} is not what its checksum says (expected {expected[:16]}..., got {found[:16]}...); "
                "nothing of it was kept. Try again later, or build it: --from source"
            )


def release(component: Component, version: str, target: Path, store: Path, job: Job, *, pause: float = PAUSE) -> None:
    """Puts a component's published programs into `target`; `store` keeps what was fetched until all is checked."""
    place = component.download
    if place is None:
        raise Missing("upstream publishes no such program with checksums")
    store.mkdir(parents=True, exist_ok=True)
    for program in component.packages:
        values: Mapping[str, str] = {"version": version, "arch": job.architecture, "program": program}
        url = place.url.format(**values)
        fetched = store / url.rpartition("/")[2]
        if not fetched.with_name(fetched.name + ".ok").exists():
            checksums = place.checksums.format(**values, file=fetched.name)
            checked(url, checksums, fetched, job.step, pause=pause)
            fetched.with_name(fetched.name + ".ok").touch()
        if place.member:
            extract(fetched, place.member.format(**values), target / program)
        else:
            shutil.copyfile(fetched, target / program)
        (target / program).chmod(0o755)


def extract(archive: Path, member: str, target: Path) -> None:
    """One file out of a tar archive; raises ProgramsError when it is not in it."""
    with tarfile.open(archive) as packed:
        names = {name.removeprefix("./"): name for name in packed.getnames()}
        source = packed.extractfile(names[member]) if member in names else None
        if source is None:
            raise ProgramsError(f"{archive.name} has no file {member}")
        with source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
