"""Evidence: no change of a journal goes unseen, and an untouched one is never accused."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from runbooks import chain as chains
from runbooks import cli, evidence, keys
from runbooks.anchors import FileAnchor, Head
from runbooks.chain import GENESIS, Link
from runbooks.evidence import Broken, Chain, Seen, Verdict
from runbooks.journal import Journal, remember

START: dict[str, Any] = {
    "runbook": "paint",
    "environment": "unit",
    "inventory": "/i",
    "parameters": {"colour": "red"},
    "steps": ["look", "paint"],
}


@dataclass
class Kept:
    """A journal of about 40 records of three runs, with its anchor, as it was written."""

    file: Path
    anchor: Path
    links: list[Link]
    trusted: dict[str, str]

    def broken(self, links: Sequence[Link]) -> bool:
        """Without the anchor."""
        return next(chains.check(links, self.trusted, "unit"), None) is not None

    def judge(self, links: Sequence[Link], *, anchored: bool = True) -> Verdict:
        seen = evidence.look([FileAnchor(self.anchor)], "unit") if anchored else []
        return evidence.judge(Chain("unit", "test", links), self.trusted, seen)


def write(place: Path, anchor: Path, run: str, steps: int, fence: int) -> None:
    journal = Journal(place, "unit", anchors=[{"file": str(anchor)}])
    journal.record("plan_made", f"plan:{run}", None, {"hash": run})
    journal.begin(run, {**START, "plan": run}, fence=fence)
    for step in range(steps):
        journal.append("step_started", "look", {"budget_s": 1.5})
        journal.append("effect_intended", "look", {"task": f"task {step}"})
        journal.append("step_finished", "look", {"outcome": "ok", "elapsed_s": 0.5, "outputs": {"näme": "väl"}})
    journal.finish("succeeded")
    journal.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    place = tmp_path_factory.mktemp("kept")
    anchor = place / "anchor.jsonl"
    for number, run in enumerate(("r1", "r2", "r3"), 1):
        write(place, anchor, run, 3 if number < 2 else 4, number)
    links = evidence.read(place / "journal.sqlite", "unit").links
    trusted = {keys.public(keys.journal_key()): "here"}
    with pytest.MonkeyPatch.context() as patch:
        # The same answers; thousands of journals that differ in one record need not be checked 40 times over.
        patch.setattr(keys, "verify", functools.cache(keys.verify))
        yield Kept(place / "journal.sqlite", anchor, list(links), trusted)


def other_values(value: Any) -> Iterator[Any]:
    """Values that differ from it, by as little as possible and by much."""
    if isinstance(value, str):
        for at in {0, len(value) // 2, len(value) - 1, len(value) - 2, len(value) - 3} if value else set():
            if at >= 0:
                yield value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]
        yield value + " "
        yield value + "\x00"
        yield value[:-1] if value else "x"
        yield value.swapcase() if value.swapcase() != value else value + "A"
        yield None
    elif isinstance(value, float):
        yield from (math.nextafter(value, math.inf), value + 1, -value, str(value), None)
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value, float(value), str(value), None)
    else:
        yield from ("", "x", 0, 1)


def test_untouched_journal_holds(kept: Kept) -> None:
    assert len(kept.links) >= 40
    verdict = kept.judge(kept.links)
    assert verdict.faults == []
    assert (verdict.anchored, verdict.keys) == (len(kept.links), ["here"])
    # Also while it grows: no prefix of it is broken when no anchor says that there was more.
    for end in range(len(kept.links) + 1):
        assert kept.judge(kept.links[:end], anchored=False).faults == []


def test_every_edit_of_every_field_of_every_record_is_seen(kept: Kept) -> None:
    tried = 0
    for at, link in enumerate(kept.links):
        for field in fields(Link):
            for value in other_values(getattr(link, field.name)):
                changed = replace(link, **{field.name: value})
                journal = [*kept.links[:at], changed, *kept.links[at + 1 :]]
                assert kept.broken(journal), (link.seq, field.name, value)
                tried += 1
    assert tried > 40 * len(fields(Link)) * 4


def test_every_edit_that_hashes_anew_is_seen(kept: Kept) -> None:
    """Whoever can compute the hashes, of this record alone or of all that follow, but has no trusted key."""
    thief = Ed25519PrivateKey.generate()
    for at, link in enumerate(kept.links):
        edited = replace(link, data=json.dumps({"says": "nothing happened"}))
        hashed = replace(edited, hash=edited.digest())
        assert kept.broken([*kept.links[:at], hashed, *kept.links[at + 1 :]])
        for key, public in ((thief, keys.public(thief)), (thief, link.key)):
            anew, prev = [], link.prev
            for following in [edited, *kept.links[at + 1 :]]:
                signed = replace(following, prev=prev).signed(key, public)
                anew.append(signed)
                prev = signed.hash
            verdict = kept.judge([*kept.links[:at], *anew], anchored=False)
            assert verdict.faults[0].seq == link.seq
            assert "trusted" in verdict.faults[0].what or "signature" in verdict.faults[0].what


def test_every_deletion_is_seen(kept: Kept) -> None:
    for at, link in enumerate(kept.links):
        rest = [*kept.links[:at], *kept.links[at + 1 :]]
        verdict = kept.judge(rest)
        assert not verdict.ok, link.seq
        assert f"record {link.seq}" in verdict.sentence()
        closed = [replace(each, seq=seq) for seq, each in enumerate(rest, 1)]
        assert not kept.judge(closed).ok, link.seq
    for first, last in itertools.combinations(range(1, len(kept.links)), 2):
        assert kept.broken([*kept.links[:first], *kept.links[last:]]), (first, last)


def test_every_swap_is_seen(kept: Kept) -> None:
    for one, two in itertools.combinations(range(len(kept.links)), 2):
        swapped = list(kept.links)
        swapped[one], swapped[two] = swapped[two], swapped[one]
        assert kept.broken(swapped), (one, two)
        named = [replace(link, seq=seq) for seq, link in enumerate(swapped, 1)]
        assert kept.broken(named), (one, two)


def test_every_insertion_is_seen(kept: Kept) -> None:
    thief = Ed25519PrivateKey.generate()
    for at in range(len(kept.links) + 1):
        before = kept.links[at - 1].hash if at else GENESIS
        forged = replace(kept.links[0], seq=at + 1, id="forged", prev=before).signed(thief, keys.public(thief))
        for new in [forged, *kept.links]:
            longer = [*kept.links[:at], new, *kept.links[at:]]
            assert kept.broken(longer), (at, new.seq)
            named = [replace(link, seq=seq) for seq, link in enumerate(longer, 1)]
            assert kept.broken(named), (at, new.seq)


def test_every_truncation_is_seen_by_the_anchor(kept: Kept) -> None:
    for end in range(len(kept.links)):
        verdict = kept.judge(kept.links[:end])
        assert not verdict.ok, end
        assert "the end was cut off" in verdict.sentence()


def test_fork_is_seen_by_the_anchor_although_a_trusted_key_wrote_both_branches(kept: Kept) -> None:
    """Restored from a backup and written on: each branch is a flawless chain."""
    key = keys.journal_key()
    for at in range(1, len(kept.links)):
        branch, prev = list(kept.links[:at]), kept.links[at - 1].hash
        for link in kept.links[at:]:
            branch.append(replace(link, prev=prev, wall=link.wall + 60).signed(key, keys.public(key)))
            prev = branch[-1].hash
        assert kept.judge(branch, anchored=False).ok
        assert not kept.judge(branch).ok, at
        # Also when the newest entry is of the new branch.
        seen = [Seen("a", (Head.of(branch[-1]), *(Head.of(link) for link in reversed(kept.links[at:-1]))))]
        if at < len(kept.links) - 1:
            assert not evidence.judge(Chain("unit", "test", branch), kept.trusted, seen).ok, at
    two = sorted([*kept.links, replace(kept.links[9], id="b").signed(key, keys.public(key))], key=lambda link: link.seq)
    assert "the chain forks" in kept.judge(two, anchored=False).sentence()


def test_record_of_who_had_lost_the_lock_is_seen(kept: Kept) -> None:
    key, last = keys.journal_key(), kept.links[-1]
    late = replace(last, seq=last.seq + 1, id="late", prev=last.hash, fence=2).signed(key, keys.public(key))
    assert "had lost the lock" in kept.judge([*kept.links, late]).sentence()


def test_anchor_that_was_tampered_with_or_is_gone_is_seen(kept: Kept, tmp_path: Path) -> None:
    lines = kept.anchor.read_text(encoding="utf-8").splitlines()
    entry = json.loads(lines[-1])
    thief = Ed25519PrivateKey.generate()
    forged = {**entry, "seq": 999, "hash": "0" * 64, "key": keys.public(thief)}
    for text in ("not json", "{}", json.dumps(forged), json.dumps({**entry, "hash": "0" * 64})):
        file = tmp_path / "anchor"
        file.write_text("\n".join([*lines, text]), encoding="utf-8")
        seen = evidence.look([FileAnchor(file)], "unit")
        assert not evidence.judge(Chain("unit", "test", kept.links), kept.trusted, seen).ok, text
    seen = evidence.look([FileAnchor(tmp_path / "gone")], "unit")
    assert "cannot be read" in evidence.judge(Chain("unit", "test", kept.links), kept.trusted, seen).sentence()


# -- the command, on files


def verify(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["evidence", "verify", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that this machine knows, with three runs and an anchor."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    anchor = tmp_path / "anchor.jsonl"
    for number, run in enumerate(("20270101-paint-aaaa", "20270102-paint-bbbb", "20270103-paint-cccc"), 1):
        write(tmp_path, anchor, run, 2, number)
    remember("unit", tmp_path, None, [{"file": str(anchor)}])
    return tmp_path


ATTACKS = {
    "edit": ("UPDATE journal SET data = replace(data, '0.5', '9.5') WHERE seq = 5", "record 5: it was edited"),
    "delete": ("DELETE FROM journal WHERE seq = 5", "record 5 is missing"),
    "insert": (
        "INSERT INTO journal SELECT environment, 28, 'x', run, wall, mono, kind, step, fence, door, data, prev, hash, "
        "key, signature FROM journal WHERE seq = 27",
        "record 28: it was edited",
    ),
    "truncate": ("DELETE FROM journal WHERE seq > 20", "the end was cut off"),
    "all": ("DELETE FROM journal", "the records end at 0: the end was cut off"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_command_says_which_record_and_what(place: Path, capsys: pytest.CaptureFixture[str], attack: str) -> None:
    assert verify(capsys=capsys)[0] == 0
    statement, says = ATTACKS[attack]
    with sqlite3.connect(place / "journal.sqlite") as db:
        for trigger in ("journal_no_update", "journal_no_delete"):
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute(statement)
    code, said = verify(capsys=capsys)
    assert code == 1
    assert says in said
    assert said.count("\n") == 1
    assert " next: " in said
    code, said = verify("--json", capsys=capsys)
    assert code == 1
    assert json.loads(said)["ok"] is False


def test_command_looks_at_one_run_with_the_chain_around_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = verify("bbbb", capsys=capsys)
    assert code == 0
    assert "run 20270102-paint-bbbb and the 27 records" in said
    assert "anchored up to record 27" in said
    assert verify("nowhere", capsys=capsys)[0] == 2
    with sqlite3.connect(place / "journal.sqlite") as db:
        db.execute("DROP TRIGGER journal_no_update")
        db.execute("UPDATE journal SET wall = 1.0 WHERE run = '20270101-paint-aaaa'")
    assert verify("bbbb", capsys=capsys)[0] == 1


def test_keys_that_are_trusted_decide(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = str(place / "journal.sqlite")
    file = tmp_path / "keys.yml"
    file.write_text(f"here: {keys.public(keys.journal_key())}\n", encoding="utf-8")
    assert verify("--journal", journal, "--keys", str(file), capsys=capsys)[0] == 0
    file.write_text(f"other: {keys.public(Ed25519PrivateKey.generate())}\n", encoding="utf-8")
    code, said = verify("--journal", journal, "--keys", str(file), capsys=capsys)
    assert code == 1
    assert "record 1: it is signed by ed25519:" in said
    assert "not a trusted key" in said
    file.write_text("other: no key\n", encoding="utf-8")
    assert verify("--journal", journal, "--keys", str(file), capsys=capsys)[0] == 2


def test_reading_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "journal.sqlite").read_bytes()
    assert verify("--journal", str(place / "journal.sqlite"), capsys=capsys)[0] == 0
    assert (place / "journal.sqlite").read_bytes() == before
    missing = place / "none.sqlite"
    assert verify("--journal", str(missing), capsys=capsys)[0] == 2
    assert not missing.exists()


def test_journal_that_is_being_written_and_anchored_is_not_accused(tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"

    def write_more() -> None:
        for number in range(2, 9):
            write(tmp_path, anchor, f"r{number}", 3, number)

    write(tmp_path, anchor, "r0", 1, 1)
    trusted = evidence.by_public(evidence.own_keys())
    writer = threading.Thread(target=write_more)
    writer.start()
    looked = 0
    while writer.is_alive():
        verdict = evidence.verify(tmp_path / "journal.sqlite", "unit", trusted, [FileAnchor(anchor)])
        assert verdict.faults == []
        looked += 1
    writer.join()
    assert looked > 2


def test_copy_that_nobody_can_write_to_is_read(place: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        copy = directory / "copy.sqlite"
        copy.write_bytes((place / "journal.sqlite").read_bytes())
        copy.chmod(0o444)
        directory.chmod(0o555)
        trusted = evidence.by_public(evidence.own_keys())
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.seteuid(65534)
            writable = os.access(copy, os.W_OK, effective_ids=True)
            os._exit(0 if evidence.verify(copy, "unit", trusted).ok and not writable else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert [file.name for file in directory.iterdir()] == ["copy.sqlite"]


def test_verification_needs_no_ansible(place: Path) -> None:
    code = (
        "import sys; from runbooks import cli\n"
        "assert cli.main(['evidence', 'verify']) == 0\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('ansible', 'boto3', 'psycopg')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the file for another machine


def exported(place: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    file, trusted = place / "evidence.jsonl", place / "trusted.yml"
    assert cli.main(["evidence", "export", "bbbb", str(file)]) == 0
    trusted.write_text(f"here: {keys.public(keys.journal_key())}\n", encoding="utf-8")
    capsys.readouterr()
    return file, trusted


def test_exported_run_proves_itself_on_another_machine(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, trusted = exported(place, capsys)
    kinds = [json.loads(line).get("kind") for line in file.read_text(encoding="utf-8").splitlines()[1:-1]]
    assert kinds[:2] == ["plan_made", "run_started"]
    assert kinds[-1] == "run_finished"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    (place / "journal.sqlite").unlink()
    code, said = verify("--export", str(file), "--keys", str(trusted), capsys=capsys)
    assert code == 0, said
    assert "anchored up to record 18" in said
    code, said = verify("--export", str(file), capsys=capsys)
    assert code == 1
    assert "not a trusted key" in said


def test_no_change_of_an_exported_file_goes_unseen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trusted = exported(place, capsys)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    changes = [whole[:end] for end in (0, len(whole) - 1, *itertools.accumulate(map(len, lines[:-1])))]
    changes += [b"".join(lines[:at] + lines[at + 1 :]) for at in range(len(lines))]
    changes += [b"".join([*lines[:at], lines[at], *lines[at:]]) for at in range(len(lines))]
    for one, two in itertools.combinations(range(len(lines)), 2):
        swapped = list(lines)
        swapped[one], swapped[two] = swapped[two], swapped[one]
        changes.append(b"".join(swapped))
    changes += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 31)]
    known = evidence.by_public(evidence.keys_in(trusted))
    for changed in changes:
        file.write_bytes(changed)
        try:
            chain, sealed_by = evidence.read_export(file)
        except Broken:
            continue
        assert not evidence.judge(chain, known, sealed_by=sealed_by).ok, changed
    file.write_bytes(whole.replace(b"0.5", b"9.5", 1))
    code, said = verify("--export", str(file), "--keys", str(trusted), capsys=capsys)
    assert code == 1
    assert "its seal does not hold" in said
    file.write_bytes(whole)
    assert verify("--export", str(file), "--keys", str(trusted), capsys=capsys)[0] == 0


# -- the layout before the chain


OLD = """
CREATE TABLE journal (seq INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, wall REAL NOT NULL, mono REAL NOT NULL,
    kind TEXT NOT NULL, step TEXT, data TEXT NOT NULL);
CREATE INDEX journal_run ON journal (run, seq);
CREATE TRIGGER journal_keeps BEFORE UPDATE ON journal BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER journal_holds BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


def test_older_records_stay_as_history_that_the_chain_vouches_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "journal.sqlite"
    begun = {**START, "who": "ann", "host": "h", "boot": "b"}
    with sqlite3.connect(file) as db:
        db.executescript(OLD)
        for kind, data in (("run_started", begun), ("run_finished", {"state": "failed", "reason": "no paint"})):
            db.execute(
                "INSERT INTO journal (run, wall, mono, kind, step, data) VALUES ('old', 5.5, 1.5, ?, NULL, ?)",
                (kind, json.dumps(data)),
            )
    journal = Journal(tmp_path, "unit")
    assert (journal.runs(), journal.state("old").state, journal.state("old").started) == (["old"], "failed", 5.5)
    journal.take_over("old", {}, fence=1)
    journal.finish("succeeded")
    assert [record.seq for record in journal.records("old")] == [-1, 0, 2, 3]
    assert (journal.state("old").state, journal.state("old").resumed) == ("succeeded", 1)
    journal.close()
    again = Journal(tmp_path, "unit")
    assert [link.kind for link in again.links()] == ["note", "run_resumed", "run_finished"]
    again.close()
    code, said = verify("old", "--journal", str(file), capsys=capsys)
    assert code == 0
    assert "older than the chain" in said
    with sqlite3.connect(file) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute("UPDATE journal_before SET wall = 6.0")
    for statement in (
        "UPDATE journal_before SET wall = 6.0 WHERE seq = 1",
        "DELETE FROM journal_before WHERE seq = 2",
        "DROP TABLE journal_before",
    ):
        with sqlite3.connect(file) as db:
            for trigger in ("journal_keeps", "journal_holds"):
                db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
            db.execute(statement)
        assert verify("old", "--journal", str(file), capsys=capsys)[0] == 1, statement


def test_types_of_all_fields_are_known() -> None:
    assert set(chains.TYPES) == {field.name for field in fields(Link)}
