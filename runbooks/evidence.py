"""Evidence: whether a journal is what its writers wrote, and a file that proves it of one run on another machine.

Reads only, and needs neither Ansible nor the environment: the journal (or an exported file), the public keys that are
trusted, and the anchors.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from runbooks import database, errors, keys
from runbooks.anchors import Anchor, Head, Unanchored
from runbooks.chain import GENESIS, Fault, Link, check
from runbooks.errors import Problem
from runbooks.journal import BEFORE, history, read_links

FORMAT = "censuschat-infra evidence 1"
DOMAIN = b"censuschat-infra evidence 1\n"
SHOWN = 3


class Broken(Problem):
    """The evidence does not hold."""

    exit_code: ClassVar[int] = errors.FAILED


@dataclass(slots=True)
class Verdict:
    """What became of one chain's examination. anchored: the newest position that an anchor confirms, None without one.

    keys: the names of the keys that signed it. head: the hash of its last record. older: the run is older than the
    chain, which vouches for its records as they were when the chain began.
    """

    environment: str
    source: str
    run: str | None
    records: int
    head: str
    anchored: int | None
    anchors: list[str]
    keys: list[str]
    older: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def sentence(self) -> str:
        """The verdict for people."""
        about = f"run {self.run} and the" if self.run else "the"
        where = f"{about} {self.records} records of environment {self.environment} in {self.source}"
        if not self.ok:
            shown = "; ".join(str(fault) for fault in self.faults[:SHOWN])
            more = f"; and {len(self.faults) - SHOWN} more" if len(self.faults) > SHOWN else ""
            return f"Evidence is broken for {where}: {shown}{more}"
        older = "; the run is older than the chain, which vouches for it since it began" if self.older else ""
        if self.anchored is None:
            return f"Evidence holds for {where}{older}; without an anchor a cut at the end would not be seen"
        return f"Evidence holds for {where}{older}; anchored up to record {self.anchored}"

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "says": self.sentence()}


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain as it was found, whole or (from an exported file) a part of it. faults: of how it is kept."""

    environment: str
    source: str
    links: Sequence[Link]
    whole: bool = True
    faults: tuple[Fault, ...] = ()
    heads: tuple[Head, ...] = ()
    run: str | None = None
    older: frozenset[str] = frozenset()
    """The runs whose records are older than the chain."""

    def find(self, name: str) -> str | None:
        """The run of this name, or the latest one that the name is a part of."""
        runs = [*sorted(self.older), *(link.run for link in self.links if isinstance(link.run, str))]
        return name if name in runs else next((run for run in reversed(runs) if name in run), None)


# -- reading


def environments(location: Path | str) -> list[str]:
    """The environments that a journal holds chains of. Raises Problem."""
    db = database.connect(location, read_only=True)
    try:
        if not _is_chained(db):
            return []
        return [str(row[0]) for row in db.read("SELECT DISTINCT environment FROM journal ORDER BY environment")]
    finally:
        db.close()


def read(location: Path | str, environment: str) -> Chain:
    """An environment's chain; nothing is written. Raises Problem when the journal cannot be opened.

    Anchors are read (``look``) before their chain, which may grow meanwhile.
    """
    db = database.connect(location, read_only=True)
    try:
        links = read_links(db, environment) if _is_chained(db) else []
        sqlite = isinstance(db, database.SQLite)
        if not sqlite or not db.read("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", BEFORE):
            return _chain(environment, db.shown, links, None, frozenset())
        runs = frozenset(row[0] for row in db.read(f"SELECT run FROM {BEFORE}"))  # noqa: S608 - a name of ours
        return _chain(environment, db.shown, links, history(db.read), runs)
    finally:
        db.close()


@dataclass(frozen=True, slots=True)
class Seen:
    """What an anchor holds of an environment, the newest first; what cannot be read as the sentence that says so."""

    shown: str
    found: tuple[Head | str, ...]


def look(anchors: Iterable[Anchor], environment: str, low: int = 1, high: int | None = None) -> list[Seen]:
    """Read the anchors' entries of positions from low to high."""
    seen = []
    for anchor in anchors:
        try:
            seen.append(Seen(anchor.shown, tuple(anchor.heads(environment, low, high))))
        except Unanchored as error:
            seen.append(Seen(anchor.shown, (f"an anchor cannot be read: {error}",)))
    return seen


def _is_chained(db: database.Database) -> bool:
    """Whether the journal has the layout with the chain; before it there was a table of the same name without."""
    if not isinstance(db, database.SQLite):
        return bool(db.read("SELECT to_regclass('runbooks.journal') IS NOT NULL")[0][0])
    return any(row[1] == "hash" for row in db.read("PRAGMA table_info(journal)"))


def _chain(
    environment: str, source: str, links: list[Link], older: dict[str, Any] | None, runs: frozenset[str]
) -> Chain:
    """With the first record's word on the records that are older than the chain."""
    said = _data(links[0]).get("before") if links and links[0].kind == "note" else None
    faults: tuple[Fault, ...] = ()
    if links and said != older:
        faults = (Fault("the records from before the chain are not those that it vouches for", 1, ""),)
    return Chain(environment, source, links, faults=faults, older=runs)


def _data(link: Link) -> dict[str, Any]:
    """What a record says; nothing when that cannot be read (which its hash then tells)."""
    try:
        data = json.loads(link.data)
    except (ValueError, TypeError):
        return {}
    return data if isinstance(data, dict) else {}


def read_export(file: Path) -> tuple[Chain, str]:
    """The part of a chain that a file holds, and the key that sealed it. Raises Problem, Broken."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise Problem(
            f"The evidence {file} cannot be read ({error.strerror})",
            code="evidence-unreadable",
            next_command=f"ls -l {file}",
        ) from error
    lines = raw.splitlines(keepends=True)
    try:
        header, seal = json.loads(lines[0]), json.loads(lines[-1])["seal"]
        links = [Link.of(json.loads(line)) for line in lines[1:-1]]
        heads = tuple(Head.parse(json.dumps(head)) for head in header["anchors"])
        environment, run, sealed_by, signature = header["environment"], header["run"], seal["key"], seal["signature"]
        known = header["format"] == FORMAT and isinstance(environment, str) and isinstance(run, str)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        known = False
    if not known:
        raise Broken(
            f"{file} is no evidence, or its beginning or end is missing",
            code="evidence-format",
            next_command="runbook evidence export RUN FILE",
        )
    faults: list[Fault] = []
    digest = hashlib.sha256(b"".join(lines[:-1])).hexdigest()
    if lines[-1] != _seal_line(digest, sealed_by, signature) or not _sealed(sealed_by, digest, signature):
        faults.append(Fault("the file was changed after it was exported: its seal does not hold"))
    if not any(link.run == run for link in links):
        faults.append(Fault(f"it holds no record of run {run}"))
    chain = Chain(environment, str(file), links, whole=False, faults=tuple(faults), heads=heads, run=run)
    return chain, str(sealed_by)


def _seal_line(digest: str, key: str, signature: str) -> bytes:
    return json.dumps({"seal": {"sha256": digest, "key": key, "signature": signature}}).encode() + b"\n"


def _sealed(key: Any, digest: str, signature: Any) -> bool:
    texts = isinstance(key, str) and isinstance(signature, str)
    return texts and keys.verify(key, DOMAIN + digest.encode(), signature)


# -- judging


def judge(
    chain: Chain,
    trusted: Mapping[str, str],
    seen: Iterable[Seen] = (),
    *,
    run: str | None = None,
    sealed_by: str | None = None,
) -> Verdict:
    """Examine a chain. trusted: public key -> name. run: one that must have records. sealed_by: an export's key."""
    faults = list(chain.faults)
    links = chain.links
    start = (1, GENESIS)
    if not chain.whole and links:
        start = (links[0].seq, GENESIS if links[0].seq == 1 else links[0].prev)
    faults += check(links, trusted, chain.environment, start)
    if sealed_by is not None and sealed_by not in trusted:
        faults.append(Fault(f"it was exported by {sealed_by}, which is not a trusted key"))
    run = run or chain.run
    older = run in chain.older
    if run is not None and not older and not any(link.run == run for link in links):
        faults.append(Fault(f"there is no record of run {run}"))
    at = {link.seq: link.hash for link in links if isinstance(link.seq, int)}
    confirmed: list[int] = []
    seen = [*([Seen("in the file itself", chain.heads)] if chain.heads else []), *seen]
    for anchor in seen:
        for found in anchor.found:
            if isinstance(found, str):
                faults.append(Fault(found))
            elif wrong := _against(found, at, trusted, anchor.shown):
                faults.append(wrong)
                break  # Older entries would say the same.
            else:
                confirmed.append(found.seq)
    signers = sorted({trusted[link.key] for link in links if isinstance(link.key, str) and link.key in trusted})
    return Verdict(
        environment=chain.environment,
        source=chain.source,
        run=run,
        records=len(links),
        head=links[-1].hash if links else GENESIS,
        anchored=max(confirmed, default=None),
        anchors=[anchor.shown for anchor in seen],
        keys=signers,
        older=older,
        faults=faults,
    )


def _against(head: Head, at: Mapping[int, str], trusted: Mapping[str, str], where: str) -> Fault | None:
    """What an anchor's entry says against a chain, of which at has each position's hash."""
    if at.get(head.seq) == head.hash:
        return None
    if head.key not in trusted or not head.authentic():
        return Fault(f"anchor {where} holds an entry of record {head.seq} that no trusted key signed")
    if head.seq in at:
        return Fault(f"anchor {where} saw another record here: the chain was written anew or forks", head.seq)
    last = max(at, default=0)
    if head.seq < last:
        return Fault(f"anchor {where} saw record {head.seq}, which is missing")
    return Fault(f"anchor {where} saw record {head.seq}, and the records end at {last}: the end was cut off")


def verify(
    location: Path | str,
    environment: str,
    trusted: Mapping[str, str],
    anchors: Iterable[Anchor] = (),
    *,
    run: str | None = None,
) -> Verdict:
    """Judge an environment's chain. trusted: public key -> name. run: its name or a part of it; the verdict's run is
    None when there is none. Raises Problem when the journal cannot be opened."""
    seen = look(anchors, environment)
    chain = read(location, environment)
    return judge(chain, trusted, seen, run=chain.find(run) if run else None)


def by_public(named: Mapping[str, str]) -> dict[str, str]:
    return {public: name for name, public in named.items()}


def own_keys() -> dict[str, str]:
    """The key that this machine writes with, when it has one: trusted where nothing else is said."""
    return {keys.JOURNAL: keys.public(keys.load(keys.JOURNAL))} if keys.path(keys.JOURNAL).exists() else {}


def keys_in(file: Path) -> dict[str, str]:
    """The trusted keys that a file names: name -> public key, in YAML or JSON. Raises Problem."""
    import yaml

    try:
        named = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Problem(
            f"The keys {file} cannot be read ({type(error).__name__})", code="keys-file", next_command=f"ls -l {file}"
        ) from error
    if not isinstance(named, dict) or not named or not all(keys.valid_public(str(key)) for key in named.values()):
        raise Problem(
            f"{file} must hold lines NAME: {keys.PREFIX}BASE64",
            code="keys-file",
            next_command=f"cat {file}",
        )
    return {str(name): str(public) for name, public in named.items()}


# -- the file for another machine


def export(chain: Chain, run: str, file: Path, trusted: Mapping[str, str], seen: Iterable[Seen] = ()) -> int:
    """Write the part of a chain from a run's plan or start to its last record; how many records.

    Records of other runs in between are part of it, for without them nothing would prove that none of this run is
    missing. It is sealed with this machine's key: whoever exports vouches that the end is the end. Raises Problem.
    """
    own = {run, *(f"plan:{plan}" for plan in _plans(chain.links, run))}
    seqs = [link.seq for link in chain.links if link.run in own]
    if not any(link.run == run for link in chain.links):
        raise Problem(
            f"The chain of environment {chain.environment} holds no record of run {run}",
            code="evidence-missing",
            next_command="runbook runs",
        )
    low, high = min(seqs), max(seqs)
    part = [link for link in chain.links if low <= link.seq <= high]
    heads = [head for each in seen for head in each.found if isinstance(head, Head) and low <= head.seq <= high]
    signers = sorted({link.key for link in part})
    header = {
        "format": FORMAT,
        "environment": chain.environment,
        "run": run,
        "made": time.time(),
        "keys": {trusted.get(key, f"unknown-{number}"): key for number, key in enumerate(signers)},
        "anchors": [asdict(head) for head in heads],
    }
    body = b"".join(json.dumps(each).encode() + b"\n" for each in (header, *(link.document() for link in part)))
    key, digest = keys.journal_key(), hashlib.sha256(body).hexdigest()
    seal = _seal_line(digest, keys.public(key), keys.sign(key, DOMAIN + digest.encode()))
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(body + seal)
    except OSError as error:
        raise Problem(
            f"The evidence {file} cannot be written ({error.strerror})",
            code="evidence-unwritable",
            next_command=f"ls -ld {file.parent}",
        ) from error
    return len(part)


def _plans(links: Iterable[Link], run: str) -> set[str]:
    """The plans that a run names: what was approved belongs to its evidence."""
    plans = set()
    for link in links:
        if link.run == run and link.kind in ("run_started", "run_resumed"):
            plan = _data(link).get("plan")
            if isinstance(plan, str):
                plans.add(plan)
    return plans
