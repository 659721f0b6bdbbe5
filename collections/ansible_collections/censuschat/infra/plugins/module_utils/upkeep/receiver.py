# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The other end: takes snapshots over ssh and checks that they keep coming.

Each sender has an account here whose key can run this program only. It takes: a name never taken before, the
announced size, the announced SHA-256. It gives nothing back and deletes by count alone, so a node that was broken into
can neither read nor destroy the copies that were made before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .common import Metric, UpkeepError, alone, config_of, free_bytes, publish, reported, say, sha256_of, sync_directory
from .snapshots import NAME, expired, taken_at

SENDERS = Path("/etc/censuschat/etcd-copies.d")
METRICS = "/etc/censuschat/etcd-copies.json"
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sender:
    """A node that sends here. max_bytes bounds one copy; max_age_s is when the newest copy is too old."""

    name: str
    cluster: str
    directory: Path
    keep: int
    max_bytes: int
    max_age_s: int

    @staticmethod
    def of(data: Mapping[str, Any]) -> Sender:
        return Sender(
            name=data["name"],
            cluster=data["cluster"],
            directory=Path(data["directory"]),
            keep=int(data["keep"]),
            max_bytes=int(data["max_bytes"]),
            max_age_s=int(data["max_age_s"]),
        )


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a sender announces."""

    name: str
    bytes: int
    sha256: str


def offer_of(wish: str, sender: Sender) -> Offer:
    """What ssh says the sender asked for; UpkeepError unless it is the one thing it may ask."""
    words = shlex.split(wish)
    if len(words) != 4 or words[0] != "take":
        raise UpkeepError("this account takes snapshots and does nothing else: take NAME BYTES SHA256")
    name, size, sha256 = words[1:]
    if not NAME.match(name) or not name.startswith(f"{sender.cluster}_{sender.name}_"):
        raise UpkeepError(f"{name!r} is not the name of a snapshot of {sender.cluster}'s member {sender.name}")
    if not _SHA256.match(sha256) or not size.isdigit():
        raise UpkeepError("a snapshot is announced with its bytes and its SHA-256 in hexadecimal")
    if int(size) > sender.max_bytes:
        raise UpkeepError(f"{name} has {size} bytes, and one copy may have {sender.max_bytes}")
    return Offer(name, int(size), sha256)


def take(sender: Sender, offer: Offer, stream: BinaryIO) -> str:
    """Take the offered snapshot from `stream`; the same one twice is fine, another one of its name is refused."""
    final = sender.directory / offer.name
    with alone(sender.directory / ".lock", "a copy"):
        if final.exists():
            if sha256_of(final) != offer.sha256:
                raise UpkeepError(f"{offer.name} is already here with other content, and stays")
            return f"taken {offer.sha256} (it was here)"
        free = free_bytes(sender.directory)
        if free < 2 * offer.bytes:
            raise UpkeepError(f"{free >> 20} MiB free is too little to take {offer.bytes >> 20} MiB")
        partial = sender.directory / ".partial"
        try:
            _store(partial, offer, stream)
            partial.replace(final)
            sync_directory(sender.directory)
        finally:
            partial.unlink(missing_ok=True)
        for old in expired([p.name for p in sender.directory.glob("*.db")], sender.keep):
            (sender.directory / old).unlink()
    return f"taken {offer.sha256}"


def _store(partial: Path, offer: Offer, stream: BinaryIO) -> None:
    digest, left = hashlib.sha256(), offer.bytes
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        while left:
            piece = stream.read(min(_PIECE, left))
            if not piece:
                raise UpkeepError(f"{offer.name} ended {left} bytes early")
            digest.update(piece)
            handle.write(piece)
            left -= len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    if digest.hexdigest() != offer.sha256:
        raise UpkeepError(f"{offer.name} arrived with another SHA-256 than announced")


def judge(senders: Mapping[Sender, Sequence[str]], now: float) -> tuple[list[Metric], list[str]]:
    """Metrics and complaints from the names of the copies each sender has here. Pure."""
    metrics, complaints = [], []
    for sender, names in senders.items():
        mine = [name for name in names if NAME.match(name)]
        newest = max(map(taken_at, mine), default=0.0)
        about = {"cluster": sender.cluster, "member": sender.name}
        name = "censuschat_etcd_copy_"
        metrics += [
            Metric(f"{name}timestamp_seconds", "When the newest snapshot received here was taken.", newest, about),
            Metric(f"{name}max_age_seconds", "Age at which the newest copy is too old.", sender.max_age_s, about),
            Metric(f"{name}count", "Snapshots received and kept here.", len(mine), about),
        ]
        if not mine:
            complaints.append(f"{sender.name} of {sender.cluster} never sent a snapshot")
        elif now - newest > sender.max_age_s:
            hours = (now - newest) / 3600
            complaints.append(
                f"the newest snapshot of {sender.cluster} from {sender.name} is {hours:.1f} h old, more than "
                f"{sender.max_age_s / 3600:.1f} h: look at `systemctl status censuschat-etcd-snapshot` there"
            )
    return metrics, complaints


def check(directory: Path = SENDERS, settings: str = METRICS) -> str:
    """Judge all senders; UpkeepError names those whose copies are missing or too old."""
    senders = {}
    for path in sorted(directory.glob("*.json")):
        sender = Sender.of(config_of(str(path)))
        senders[sender] = [entry.name for entry in sender.directory.glob("*.db")]
    metrics, complaints = judge(senders, time.time())
    publish(config_of(settings)["metrics"], metrics)
    if complaints:
        raise UpkeepError("; ".join(complaints))
    return f"the copies of {len(senders)} senders are fresh"


def main(arguments: Sequence[str]) -> int:
    """`censuschat-etcd-copies check`, or `take SENDER` as the forced command of that sender's key."""
    if list(arguments) == ["check"]:
        return reported(check, name="etcd-copies")
    try:
        sender = Sender.of(config_of(str(SENDERS / f"{arguments[1]}.json")))
        offer = offer_of(os.environ.get("SSH_ORIGINAL_COMMAND", ""), sender)
        say(take(sender, offer, sys.stdin.buffer))
    except (UpkeepError, IndexError, ValueError) as error:
        sys.stderr.write(f"refused: {error}\n")
        return 1
    return 0
