"""The chain: what makes a journal evidence. Pure, except for the time that a signature takes.

Each record of an environment carries its position, the hash of the record before it, a hash of all that it says itself,
and a signature of that hash by whoever wrote it. So nothing can be edited, taken out, put in or moved without a key;
only the end can be cut off unseen, which is what anchors (``runbooks.anchors``) are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from runbooks import keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

GENESIS = "0" * 64
"""What the first record has for the hash of the one before it."""
# Names what is signed, so that no other signature of the same key can be passed off as one of a record.
DOMAIN = b"censuschat-infra journal 1\n"


@dataclass(frozen=True, slots=True)
class Link:
    """One record as it is stored. data is JSON text: what is hashed is what is stored, to the byte."""

    environment: str
    seq: int
    id: str
    run: str
    wall: float
    mono: float
    kind: str
    step: str | None
    fence: int | None
    door: str | None
    data: str
    prev: str
    hash: str = ""
    key: str = ""
    signature: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a decoded JSON object. Raises ValueError when it is not a record."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"not a record: {', '.join(sorted(names ^ set(values)))}")
        return cls(**values)

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COLUMNS}

    def digest(self) -> str:
        """The hash that belongs to what the record says."""
        said = {name: getattr(self, name) for name in SAID}
        return hashlib.sha256(f"{self.prev}\n{CANONICAL.encode(said)}".encode()).hexdigest()

    def signed(self, key: Ed25519PrivateKey, public: str) -> Self:
        """With its hash and its signature."""
        named = replace(self, key=public)
        digest = named.digest()
        return replace(named, hash=digest, signature=keys.sign(key, DOMAIN + digest.encode()))

    def authentic(self) -> bool:
        """Whether the signature is that key's of that hash."""
        return signed_by(self.key, self.hash, self.signature)


TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("environment", "id", "run", "kind", "data", "prev", "hash", "key", "signature"), (str,)),
    **dict.fromkeys(("step", "door"), (str, type(None))),
    **dict.fromkeys(("wall", "mono"), (float,)),
    "seq": (int,),
    "fence": (int, type(None)),
}
COLUMNS = tuple(field.name for field in fields(Link))
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr)
SAID = tuple(name for name in COLUMNS if name not in ("prev", "hash", "signature"))


def signed_by(key: str, digest: str, signature: str) -> bool:
    """Whether this key signed a record with this hash."""
    texts = (key, digest, signature)
    return all(isinstance(text, str) for text in texts) and keys.verify(key, DOMAIN + digest.encode(), signature)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and at which record (seq and run; None when it is about none that is there)."""

    what: str
    seq: int | None = None
    run: str | None = None

    def __str__(self) -> str:
        return f"record {self.seq}: {self.what}" if self.seq is not None else self.what


def check(
    links: Iterable[Link], trusted: Mapping[str, str], environment: str, start: tuple[int, str] = (1, GENESIS)
) -> Iterator[Fault]:
    """The faults of a chain, in its order. trusted: public key -> name. start: position and prev of its first record.

    An intact chain has none. One edit makes few: what follows an edited record is judged by the hash it has stored.
    """
    expected, prev = start
    ids: dict[str, int] = {}
    fences: dict[str, int] = {}
    for link in links:
        strange = [name for name, kinds in TYPES.items() if type(getattr(link, name)) not in kinds]
        if strange:
            yield Fault(f"record {expected} was edited: its {' and '.join(strange)} cannot be what a writer wrote")
            prev, expected = link.hash, expected + 1
            continue
        yield from _alone(link, trusted, environment)
        if link.seq != expected:
            yield Fault(_misplaced(link.seq, expected), link.seq, link.run)
        if link.prev != prev:
            what = "it does not follow the record before it, which was exchanged, moved or taken out"
            yield Fault(what, link.seq, link.run)
        if link.id in ids:
            yield Fault(f"it repeats record {ids[link.id]}", link.seq, link.run)
        if link.fence is not None:
            newest = fences.setdefault(link.run, link.fence)
            if link.fence < newest:
                yield Fault("its writer had lost the lock of its run", link.seq, link.run)
            fences[link.run] = max(link.fence, newest)
        ids[link.id] = link.seq
        prev, expected = link.hash, link.seq + 1


def _alone(link: Link, trusted: Mapping[str, str], environment: str) -> Iterator[Fault]:
    if link.environment != environment:
        yield Fault(f"it belongs to environment {link.environment}, not to {environment}", link.seq, link.run)
    if link.digest() != link.hash:
        yield Fault("it was edited: its hash is not that of what it says", link.seq, link.run)
    if not link.authentic():
        yield Fault("its signature is not of its hash by its key", link.seq, link.run)
    elif link.key not in trusted:
        yield Fault(f"it is signed by {link.key}, which is not a trusted key", link.seq, link.run)


def _misplaced(seq: int, expected: int) -> str:
    if seq < expected:
        return (
            f"there are two records at position {seq}: the chain forks" if seq == expected - 1 else "it is out of order"
        )
    missing = f"record {expected} is" if seq == expected + 1 else f"records {expected} to {seq - 1} are"
    return f"{missing} missing before it"
