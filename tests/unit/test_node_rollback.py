"""What a run replaces is kept and comes back: the planner on data, the files in a directory of the test's own."""

from __future__ import annotations

import grp
import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node import keep, rollback_host, rollback_plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.keep import Keeper, Stands
from ansible_collections.censuschat.infra.plugins.module_utils.node.rollback_plan import Now
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError

CASES = Path(__file__).parent / "cases/rollback"
OWNER = pwd.getpwuid(os.getuid()).pw_name
GROUP = grp.getgrgid(os.getgid()).gr_name


def stands(data: Any) -> Stands:
    """`absent`, `directory`, a file by its content's name, or all of it; a case does not care about digests."""
    if isinstance(data, dict):
        return Stands.of(data)
    if data in ("absent", "directory"):
        return Stands(data)
    return Stands("file", "root", "root", "0644", digest=str(data))


def line(data: dict[str, Any]) -> dict[str, Any]:
    converted = {
        key: stands(v).wire() if key in ("before", "after") and "path" in data else v for key, v in data.items()
    }
    return {"run": "1", **(data if data["kind"] == "mount" else converted)}


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda p: p.stem)
def test_plan(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    now = case["now"]
    seen = Now(
        paths={p: stands(s) for p, s in now.get("paths", {}).items()},
        kernel=now.get("kernel", {}),
        units={n: UnitState(n, "loaded", **u) for n, u in now.get("units", {}).items()},
        mounts={p: frozenset(o) for p, o in now.get("mounts", {}).items()},
        installed=frozenset(now.get("installed", [])),
        audit_locked=now.get("audit_locked", False),
    )
    rollback = rollback_plan.plan([line(entry) for entry in case["journal"]], seen, force=case.get("force", False))
    assert [[a.kind, a.target, a.detail] for a in rollback.actions] == case["actions"]
    assert [text.split(" ")[0] for text in rollback.refused] == case.get("refused", [])
    assert list(rollback.left) == case.get("left", [])


def write(root: Path, path: str, text: str, mode: int = 0o644) -> Path:
    real = root / path.lstrip("/")
    real.parent.mkdir(parents=True, exist_ok=True)
    real.write_text(text)
    real.chmod(mode)
    return real


def put_back(root: Path, to: str) -> tuple[list[str], list[str]]:
    """Roll the files below `root` back; returns what was refused and what was restored."""
    lines = rollback_host.read(to, keep.runs(str(root)), str(root))
    now = Now(paths=rollback_host.look_at([e["path"] for e in lines if e["kind"] == "path"], str(root)))
    rollback = rollback_plan.plan(lines, now)
    if not rollback.refused:
        for action in rollback.actions:
            rollback_host.restore(action.payload, str(root))
    return list(rollback.refused), [a.target for a in rollback.actions]


def test_bytes_mode_links_and_directories_come_back(tmp_path: Path) -> None:
    root = tmp_path
    file = write(root, "/etc/login.defs", "UMASK 022\n", 0o640)
    (root / "etc/old").symlink_to("login.defs")
    tree = write(root, "/etc/cron.deny.d/users", "all\n").parent
    keeper = Keeper("run-1", root=str(root))
    paths = ("/etc/login.defs", "/etc/old", "/etc/pwquality.d/50.conf")
    keeper.before([*(Action("file", p, "") for p in paths), Action("absent", "/etc/cron.deny.d", "")])
    file.write_bytes(b"UMASK 027\n\xff")
    file.chmod(0o600)
    (root / "etc/old").unlink()
    write(root, "/etc/old", "no link any more\n")
    new = write(root, "/etc/pwquality.d/50.conf", "minlen = 14\n")
    (tree / "users").unlink()
    tree.rmdir()
    keeper.after()

    refused, restored = put_back(root, "run-1")
    assert refused == []
    assert set(restored) == {*paths, "/etc/pwquality.d", "/etc/cron.deny.d"}
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("UMASK 022\n", 0o640)
    assert str((root / "etc/old").readlink()) == "login.defs"
    assert not new.parent.exists(), "the directory that the run had made stayed"
    assert (tree / "users").read_text() == "all\n"
    assert put_back(root, "run-1") == ([], []), "a second rollback found something to do"


def test_only_owner_and_mode_come_back_where_only_they_were_changed(tmp_path: Path) -> None:
    """A log goes on being written; its bytes are neither kept nor put back."""
    log = write(tmp_path, "/var/log/dpkg.log", "first\n", 0o644)
    keeper = Keeper("run-1", root=str(tmp_path))
    keeper.before([Action("permission", "/var/log/dpkg.log", "")])
    log.chmod(0o640)
    keeper.after()
    log.write_text("first\nsecond\n")
    assert "first" not in (tmp_path / keep.DIRECTORY.lstrip("/") / "run-1" / keep.JOURNAL).read_text()
    assert put_back(tmp_path, "run-1") == ([], ["/var/log/dpkg.log"])
    assert (log.read_text(), log.stat().st_mode & 0o777) == ("first\nsecond\n", 0o644)
    log.unlink()
    assert put_back(tmp_path, "run-1") == ([], []), "a log that was rotated away is nobody's to make"


def test_mode_of_one_run_and_bytes_of_the_next_both_come_back(tmp_path: Path) -> None:
    file = write(tmp_path, "/etc/crontab", "old\n", 0o644)
    for number, mode, text in (("1", 0o600, ""), ("2", 0o400, "new\n")):
        keeper = Keeper(f"run-{number}", root=str(tmp_path))
        keeper.before([Action("file" if text else "permission", "/etc/crontab", "")])
        file.chmod(0o600)
        file.write_text(text or file.read_text())
        file.chmod(mode)
        keeper.after()
    assert put_back(tmp_path, "run-1") == ([], ["/etc/crontab"])
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("old\n", 0o644)


def test_what_something_else_changed_since_is_refused_and_stays(tmp_path: Path) -> None:
    file = write(tmp_path, "/etc/issue", "Debian\n")
    keeper = Keeper("run-1", root=str(tmp_path))
    keeper.before([Action("file", "/etc/issue", "")])
    file.write_text("Authorized users only.\n")
    keeper.after()
    file.write_text("somebody's own\n")
    refused, _restored = put_back(tmp_path, "run-1")
    assert len(refused) == 1 and refused[0].startswith("/etc/issue was changed by something else since")
    assert file.read_text() == "somebody's own\n"


def test_several_runs_are_undone_to_before_the_one_that_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "/etc/issue", "0")
    for number in ("1", "2", "3"):
        keeper = Keeper(f"run-{number}", root=str(tmp_path))
        keeper.before([Action("file", "/etc/issue", "")])
        file.write_text(number)
        keeper.after()
    assert put_back(tmp_path, "run-3")[1] == ["/etc/issue"]
    assert file.read_text() == "2"
    assert put_back(tmp_path, "run-2")[1] == ["/etc/issue"]
    assert file.read_text() == "1"
    with pytest.raises(
        NodeError, match=r"run 'run-9' is not kept on this node; the last ones are: run-1, run-2, run-3"
    ):
        rollback_host.read("run-9", keep.runs(str(tmp_path)), str(tmp_path))


def test_an_interrupted_run_is_put_back(tmp_path: Path) -> None:
    """The node went down after the change and before the run could tell what it had made."""
    file = write(tmp_path, "/etc/issue", "Debian\n")
    Keeper("run-1", root=str(tmp_path)).before([Action("file", "/etc/issue", "")])
    file.write_text("half of")
    journal = tmp_path / keep.DIRECTORY.lstrip("/") / "run-1" / keep.JOURNAL
    with journal.open("a") as handle:
        handle.write('{"kind": "aft')
    assert put_back(tmp_path, "run-1")[1] == ["/etc/issue"]
    assert file.read_text() == "Debian\n"


def test_what_is_kept_is_for_its_owner_alone_and_large_files_stand_beside(tmp_path: Path) -> None:
    write(tmp_path, "/etc/shadow", "root:secret:1::::::\n", 0o640)
    large = write(tmp_path, "/var/lib/large", "x" * (keep.INLINE_BYTES + 1))
    keeper = Keeper("run-1", root=str(tmp_path))
    keeper.before([Action("file", "/etc/shadow", ""), Action("file", "/var/lib/large", "")])
    directory = tmp_path / keep.DIRECTORY.lstrip("/") / "run-1"
    assert directory.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in directory.iterdir())
    assert sorted(p.suffix for p in directory.iterdir()) == [".bytes", ".jsonl"]
    large.write_text("small")
    keeper.after()
    put_back(tmp_path, "run-1")
    assert large.read_text() == "x" * (keep.INLINE_BYTES + 1)
    shown = rollback_plan.text_of(keep.look("/etc/shadow", root=str(tmp_path), keep_in=str(directory)), "/etc/shadow")
    assert shown == f"file {OWNER}:{GROUP} 0640\n"


def test_a_disk_that_is_full_stops_the_run_before_anything_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "/etc/issue", "Debian\n")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError) as caught:
        Keeper("run-1", root=str(tmp_path)).before([Action("file", "/etc/issue", "")])
    assert str(caught.value) == (
        f"what this run would replace cannot be kept in {keep.DIRECTORY}, so nothing was changed: "
        f"No space left on device in {keep.DIRECTORY}: free some space there (`df -h {keep.DIRECTORY}`), then run again"
    )


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    directory = tmp_path / keep.DIRECTORY.lstrip("/") / "run-1"
    directory.mkdir(parents=True)
    (directory / keep.JOURNAL).write_text("nonsense\n{}\n")
    with pytest.raises(NodeError, match=r"the journal of run run-1 in .* is damaged"):
        keep.journal("run-1", str(tmp_path))


def test_reload_of_sshd_is_no_state_of_a_service(tmp_path: Path) -> None:
    """It comes with sshd's files; where a socket starts sshd there is no service to bring back."""
    keeper = Keeper("run-1", root=str(tmp_path))
    keeper.before([Action("sshd_reload", "ssh.service", "its configuration changes")])
    assert not keeper.used


def test_ids_sort_by_age() -> None:
    first, second = keep.new_id(), keep.new_id()
    assert first < second


def test_journal_is_lines_of_json_in_the_order_of_the_changes(tmp_path: Path) -> None:
    write(tmp_path, "/etc/a", "a")
    keeper = Keeper("run-1", root=str(tmp_path))
    unit = UnitState("rsync.service", "loaded", "inactive", "disabled")
    sysctl = Action("sysctl", "net.ipv4.tcp_syncookies", "0 -> 1", "1", "net.ipv4.tcp_syncookies = 0\n")
    keeper.before(
        [Action("file", "/etc/a", ""), sysctl, sysctl, Action("service", "rsync.service", "mask: x", "mask")],
        {"rsync.service": unit},
    )
    text = (tmp_path / keep.DIRECTORY.lstrip("/") / "run-1" / keep.JOURNAL).read_text()
    lines = [json.loads(one) for one in text.splitlines()]
    assert [entry["kind"] for entry in lines] == ["path", "kernel", "unit"]
    assert lines[1] == {"kind": "kernel", "key": "net.ipv4.tcp_syncookies", "before": "0"}
    assert lines[2]["before"] == {"file_state": "disabled", "running": False}
