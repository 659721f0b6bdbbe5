"""Anchors: where the end of a chain is noted outside the journal, so that nobody can cut it off unseen.

After each step and at a run's end the newest record's position, hash and signature go to each anchor, in the
background; an anchor that does not answer is noted in the journal and never stops a run. What an anchor is worth is
where it is: a file beside the journal proves little, a bucket with object lock in another account much.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from runbooks.chain import Link, signed_by
from runbooks.errors import Problem, one_line

CONNECT_S = 3
READ_S = 5
READERS = 16
CLOSE_S = 8.0
"""How long the end of a run waits for its last anchor."""
S3 = "s3://"


class Unanchored(Exception):
    """An anchor that did not take an entry, or cannot be read: which one, and why."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record of an environment at some moment; all of it is the record's own."""

    environment: str
    seq: int
    hash: str
    wall: float
    key: str
    signature: str

    @classmethod
    def of(cls, link: Link) -> Self:
        return cls(link.environment, link.seq, link.hash, link.wall, link.key, link.signature)

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Raises ValueError when it is something else."""
        try:
            head = cls(**json.loads(text))
        except TypeError as error:
            raise ValueError("not an anchor's entry") from error
        if type(head.seq) is not int or not isinstance(head.environment, str):
            raise ValueError("not an anchor's entry")
        return head

    def line(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def authentic(self) -> bool:
        return signed_by(self.key, self.hash, self.signature)


class Anchor(ABC):
    """One place. ``shown`` names it."""

    shown: str

    @abstractmethod
    def put(self, head: Head) -> None:
        """Note it; it stays. Raises Unanchored."""

    @abstractmethod
    def heads(self, environment: str, low: int = 1, high: int | None = None) -> Iterator[Head | str]:
        """What was noted of an environment at positions from low to high, the newest first.

        What cannot be read comes as the sentence that says so. Raises Unanchored.
        """


class FileAnchor(Anchor):
    """A file that is only ever added to: on another disk, or one that only root can shorten (``chattr +a``)."""

    def __init__(self, path: Path) -> None:
        self.path, self.shown = path, str(path)

    def put(self, head: Head) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, (head.line() + "\n").encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Unanchored(f"{self.path}: {error.strerror}") from error

    def heads(self, environment: str, low: int = 1, high: int | None = None) -> Iterator[Head | str]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise Unanchored(f"{self.path}: {error.strerror}") from error
        found: list[Head] = []
        for number, line in enumerate(lines, 1):
            try:
                head = Head.parse(line)
            except ValueError:
                yield f"line {number} of {self.path} is no entry of an anchor"
                continue
            if head.environment == environment and low <= head.seq and (high is None or head.seq <= high):
                found.append(head)
        yield from sorted(found, key=lambda head: -head.seq)


class S3Anchor(Anchor):
    """A bucket with object lock: each entry is an object of its own, made once, and kept for retain_days."""

    def __init__(self, bucket: str, prefix: str, retain_days: int, mode: str, endpoint: str | None) -> None:
        self.bucket, self.prefix, self.retain_days = bucket, prefix.strip("/"), retain_days
        self.mode, self.endpoint = mode.upper(), endpoint
        self.shown = f"{S3}{bucket}/{self.prefix}".rstrip("/")
        self._made: Any = None

    def _client(self) -> Any:
        if self._made is None:
            import boto3
            from botocore.config import Config

            patience = Config(
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"total_max_attempts": 2},
                max_pool_connections=READERS,
            )
            self._made = boto3.client("s3", endpoint_url=self.endpoint, config=patience)
        return self._made

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise Unanchored(f"{self.shown}: {one_line(str(error))}") from error

    def _under(self, environment: str) -> str:
        return f"{self.prefix}/{environment}/".lstrip("/")

    def put(self, head: Head) -> None:
        from botocore.exceptions import ClientError

        key = f"{self._under(head.environment)}{head.seq:012d}.json"
        with self._told():
            try:
                self._client().put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=head.line().encode(),
                    ContentType="application/json",
                    ChecksumAlgorithm="SHA256",
                    IfNoneMatch="*",
                    ObjectLockMode=self.mode,
                    ObjectLockRetainUntilDate=datetime.now(UTC) + timedelta(days=self.retain_days),
                )
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("PreconditionFailed", "412"):
                    raise
                there = self._client().get_object(Bucket=self.bucket, Key=key)["Body"].read().decode()
                if there != head.line():
                    raise Unanchored(
                        f"{self.shown}: it holds another record {head.seq} already, so the chain forks"
                    ) from None

    def heads(self, environment: str, low: int = 1, high: int | None = None) -> Iterator[Head | str]:
        from concurrent.futures import ThreadPoolExecutor

        under = self._under(environment)
        with self._told(), ThreadPoolExecutor(READERS) as pool:
            # All versions: a delete marker or a later version hides an entry from a plain listing, and not from this.
            pages = self._client().get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=under)
            wanted: list[tuple[int, Mapping[str, Any]]] = []
            for entry in (entry for page in pages for entry in page.get("Versions", [])):
                name = str(entry["Key"]).removeprefix(under).removesuffix(".json")
                if not name.isdigit():
                    yield f"{S3}{self.bucket}/{entry['Key']} is no entry of an anchor"
                elif low <= int(name) and (high is None or int(name) <= high):
                    wanted.append((int(name), entry))
            wanted.sort(key=lambda each: -each[0])
            yield from pool.map(lambda each: self._read(each[1], environment, each[0]), wanted)

    def _read(self, entry: Mapping[str, Any], environment: str, seq: int) -> Head | str:
        body = self._client().get_object(Bucket=self.bucket, Key=entry["Key"], VersionId=entry["VersionId"])["Body"]
        try:
            head = Head.parse(body.read())
        except ValueError:
            head = None
        if head is None or (head.environment, head.seq) != (environment, seq):
            return f"{S3}{self.bucket}/{entry['Key']} is not the entry that its name says"
        return head


def parse(document: Mapping[str, Any]) -> Anchor:
    """An entry of ``runbook_anchors``. Raises Problem when it says neither a file nor a bucket with its days."""
    names, retain = set(document), document.get("retain_days")
    if names == {"file"}:
        return FileAnchor(Path(str(document["file"])).expanduser())
    mode = str(document.get("mode", "compliance"))
    if (
        "s3" in names
        and names <= {"s3", "retain_days", "mode", "endpoint"}
        and isinstance(retain, int)
        and retain > 0
        and mode in ("compliance", "governance")
    ):
        bucket, _, prefix = str(document["s3"]).removeprefix(S3).partition("/")
        return S3Anchor(bucket, prefix, retain, mode, document.get("endpoint"))
    raise Problem(
        "runbook_anchors holds an entry that is neither {file: PATH} nor {s3: BUCKET/PREFIX, retain_days: DAYS} "
        f"(with mode: compliance or governance, and endpoint, if need be); it says {', '.join(sorted(names))}",
        code="anchor-invalid",
        next_command="less runbooks/docs/journal.md",
    )


def named(word: str) -> Anchor:
    """The anchor that the command line names, to read it only: a file, or s3://BUCKET/PREFIX."""
    if word.startswith(S3):
        bucket, _, prefix = word.removeprefix(S3).partition("/")
        return S3Anchor(bucket, prefix, 1, "compliance", None)
    return FileAnchor(Path(word))


class Anchoring:
    """Puts heads to anchors in the background. A head that is waited for too long is replaced by the next one."""

    def __init__(self, anchors: Sequence[Anchor], failed: Callable[[str], None]) -> None:
        """failed: told once an anchor, with the sentence that says what is wrong."""
        self._anchors, self._failed = list(anchors), failed
        self._complained: set[str] = set()
        self._next: Head | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def offer(self, head: Head) -> None:
        """Anchor it soon; returns at once."""
        if not self._anchors:
            return
        with self._wake:
            self._next = head
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="anchors", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._next is not None or self._closing)
                head, self._next = self._next, None
            if head is None:
                return
            for anchor in self._anchors:
                try:
                    anchor.put(head)
                except Unanchored as error:
                    self._complain(anchor.shown, str(error))
                except Exception as error:  # An anchor must never stop a run, whatever its library does.
                    self._complain(anchor.shown, f"{anchor.shown}: {type(error).__name__}: {one_line(str(error))}")

    def _complain(self, shown: str, text: str) -> None:
        if shown not in self._complained:
            self._complained.add(shown)
            self._failed(text)

    def close(self, patience_s: float = CLOSE_S) -> bool:
        """Wait for what is under way; whether all of it is done."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            deadline = time.monotonic() + patience_s
            self._thread.join(max(0.0, deadline - time.monotonic()))
            return not self._thread.is_alive()
        return True
