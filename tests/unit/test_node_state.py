"""node_state's planner on data: tests/unit/cases/node_state/*.yml holds desired and observed state and the plan."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.censuschat.infra.plugins.module_utils.node import state_host
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_fetch import fetched
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_host import (
    Executor,
    PackageState,
    parse_packages,
    parse_units,
    precedes_packages,
    timestamp,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import (
    Action,
    Desired,
    Observed,
    Package,
    UnitState,
    UserState,
    diff_of,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_plan import plan
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    Completed,
    NodeError,
    PathState,
    link_atomically,
    observe_path,
    write_atomically,
)

CASES = sorted((Path(__file__).parent / "cases/node_state").glob("*.yml"))


def observed(data: dict[str, Any]) -> Observed:
    names = data.get("hostnames", ["", ""])
    return Observed(
        hostnames=(names[0], names[1]),
        leftovers=tuple(data.get("leftovers", [])),
        installed=frozenset(data.get("installed", [])),
        groups=frozenset(data.get("groups", [])),
        users={
            n: UserState(n, frozenset(u["groups"]), u["shell"], u["home"], u.get("uid", 1000))
            for n, u in data.get("users", {}).items()
        },
        versions=data.get("versions", {}),
        held=frozenset(data.get("held", [])),
        entries={directory: tuple(names) for directory, names in data.get("entries", {}).items()},
        paths={p: path_state(p, s) for p, s in data.get("paths", {}).items()},
        units={n: UnitState(n, **u) for n, u in data.get("units", {}).items()},
    )


def path_state(path: str, data: dict[str, Any]) -> PathState:
    return PathState(path, **{**data, "mode": int(data.get("mode", "0"), 8)})


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_plan(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    if "error" in case:
        with pytest.raises(NodeError) as caught:
            plan(Desired.of(case["desired"]), observed(case["observed"]))
        assert case["error"] in str(caught.value)
        return
    actions = plan(Desired.of(case["desired"]), observed(case["observed"]))
    assert [[a.kind, a.target, a.detail] for a in actions] == case["actions"]
    said = json.dumps([diff_of(actions), [a.public() for a in actions]])
    for secret in case.get("nowhere", []):
        assert secret not in said


def test_every_case_is_read() -> None:
    assert len(CASES) >= 30


def test_diff_has_one_entry_an_action() -> None:
    entries = diff_of([Action("package", "etcd", "install", before="absent\n", after="installed\n")])
    assert entries == [
        {
            "before_header": "etcd (package)",
            "after_header": "etcd (package)",
            "before": "absent\n",
            "after": "installed\n",
        }
    ]


def test_units_are_read_in_the_order_asked() -> None:
    text = (
        "Id=ssh.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=no\n"
        "ActiveEnterTimestamp=Sat 2026-11-21 11:13:11.542012 UTC\n"
        "StateChangeTimestamp=Sat 2026-11-21 11:14:00.000000 UTC\n\n"
        "Id=none.service\nLoadState=not-found\nActiveState=inactive\nUnitFileState=\nNeedDaemonReload=yes\n"
        "ActiveEnterTimestamp=\nStateChangeTimestamp=n/a\n"
    )
    units = parse_units(["sshd.service", "none.service"], text)
    assert units["sshd.service"] == UnitState(
        "sshd.service", "loaded", "active", "enabled", False, 1795259591.542012, 1795259640.0
    )
    assert units["none.service"] == UnitState("none.service", "not-found", "inactive", "", True, 0.0, 0.0)


def test_answer_with_too_few_units_is_an_error() -> None:
    with pytest.raises(NodeError, match="answered 1 units where 2"):
        parse_units(["a.service", "b.service"], "Id=a.service\n")


def test_no_timestamp_is_the_beginning_of_time() -> None:
    assert timestamp("n/a") == 0.0


def test_refused_content_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.conf"
    target.write_text("old")
    owner, group = observe_path(str(target)).owner, observe_path(str(target)).group
    with pytest.raises(NodeError, match=r"x\.conf was not replaced: its new content does not pass `grep -q good %s`"):
        write_atomically(str(target), "bad", owner, group, 0o600, validate="grep -q good %s", commands=Commands())
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.conf"]
    write_atomically(str(target), "good", owner, group, 0o600, validate="grep -q good %s", commands=Commands())
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("good", 0o600)


def test_bytes_that_are_not_text_are_kept_apart(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"\xff\xfe")
    seen = observe_path(str(target), read=True)
    assert seen.content is not None
    write_atomically(str(target), seen.content, seen.owner, seen.group, 0o644)
    assert target.read_bytes() == b"\xff\xfe"


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="does not exist; list it under directories"):
        write_atomically(str(tmp_path / "a/b"), "x", "root", "root", 0o644)


def test_link_replaces_a_file(tmp_path: Path) -> None:
    target = tmp_path / "localtime"
    target.write_text("copied zone")
    link_atomically(str(target), "/usr/share/zoneinfo/Etc/UTC")
    assert observe_path(str(target)).target == "/usr/share/zoneinfo/Etc/UTC"


def test_command_that_is_not_there_is_an_error_with_its_name() -> None:
    with pytest.raises(NodeError, match="looking failed: `no-such-program-here` ended with 127"):
        Commands().must(["no-such-program-here"], "looking")


def test_command_that_hangs_ends() -> None:
    assert Commands().run(["sleep", "5"], timeout=0.05).code == 124


def test_package_of_two_architectures_is_known_by_its_plain_name() -> None:
    said = (
        "libc6:amd64\tlibc6\tinstalled\tinstall\t2.36-9\n"
        "libc6:i386\tlibc6\tconfig-files\tdeinstall\t2.36-8\n"
        "kubelet\tkubelet\tinstalled\thold\t1.36.3-1.1\n"
        "nginx\tnginx\tnot-installed\thold\t\n"
    )
    assert parse_packages(["libc6", "libc6:i386", "kubelet", "nginx", "unheard-of"], said) == {
        "libc6": PackageState("2.36-9", False),
        "libc6:i386": PackageState("", False),
        "kubelet": PackageState("1.36.3-1.1", True),
        "nginx": PackageState("", True),
    }


@pytest.mark.parametrize(
    ("action", "first"),
    [
        (Action("file", "/etc/apt/sources.list.d/x.sources", "create"), True),
        (Action("hold", "kubelet", "unhold"), True),
        (Action("hold", "kubelet", "hold"), False),
        (Action("file", "/etc/aptly.conf", "create"), False),
    ],
)
def test_what_apt_reads_comes_before_packages(action: Action, first: bool) -> None:
    assert precedes_packages(action) is first


def archive(path: Path, digest: str) -> Package:
    return Package("shipper", "9.2.1", path.as_uri(), digest)


def test_archive_is_taken_with_its_checksum_only(tmp_path: Path) -> None:
    source, target = tmp_path / "shipper.deb", tmp_path / "fetched"
    target.mkdir()
    source.write_bytes(b"the package")
    right = "sha256:" + hashlib.sha256(b"the package").hexdigest()
    assert Path(fetched(archive(source, right), str(target))).read_bytes() == b"the package"
    longer = "sha512:" + hashlib.sha512(b"the package").hexdigest()
    assert Path(fetched(archive(source, longer), str(target))).read_bytes() == b"the package"
    source.write_bytes(b"another package")
    with pytest.raises(NodeError, match=r"shipper 9\.2\.1 was not installed: .* and not sha256:"):
        fetched(archive(source, right), str(target))


def test_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"package shipper 9\.2\.1 cannot be fetched from .*none\.deb"):
        fetched(archive(tmp_path / "none.deb", "sha256:" + "0" * 64), str(tmp_path))


class Recorded(Commands):
    """Commands that are written down and succeed."""

    def __init__(self) -> None:
        self.argv: list[list[str]] = []

    def run(self, argv: Sequence[str], **options: Any) -> Completed:
        self.argv.append(list(argv))
        return Completed(0, "", "")


def installed_by(desired: dict[str, Any], monkeypatch: pytest.MonkeyPatch, age_s: float = 0.0) -> list[list[str]]:
    """The apt-get commands, without the common options, that a bare host's plan leads to."""
    monkeypatch.setattr(state_host, "_no_starts", contextlib.nullcontext)
    monkeypatch.setattr(state_host, "lists_age_s", lambda: age_s)
    wanted, commands = Desired.of(desired), Recorded()
    executor = Executor(wanted, commands, lambda package, directory: f"/tmp/{package.name}.deb")
    executor.install([a for a in plan(wanted, Observed()) if a.kind == "package"])
    return [argv[argv.index("Dpkg::Options::=--force-confold") + 1 :] for argv in commands.argv]


def test_versions_and_archives_go_to_apt_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {
        "present": ["cron", "kubelet=1.36.3-1.1"],
        "held": ["kubelet"],
        "archives": [{"name": "shipper", "version": "9.2.1", "url": "file:///x.deb", "checksum": "sha256:" + "0" * 64}],
    }
    assert installed_by({"packages": packages}, monkeypatch) == [
        [
            *("install", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"),
            *("cron", "kubelet=1.36.3-1.1", "/tmp/shipper.deb"),
        ]
    ]


def test_plain_packages_change_nothing_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_by({"packages": {"present": ["cron"]}}, monkeypatch, age_s=7200) == [
        ["update"],
        ["install", "--no-install-recommends", "cron"],
    ]


def test_archive_is_refused_where_nothing_fetches_it(tmp_path: Path) -> None:
    wanted = archive(tmp_path / "x.deb", "sha256:" + "0" * 64)
    with pytest.raises(NodeError, match="is not provided for here"):
        Executor(Desired(), Recorded()).install([Action("package", "shipper", "install 9.2.1", wanted)])
