"""Disposable nodes: what their inventory says, how each release of Debian is started, and how a block of them ends."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lab import cli, images, nodes, topology, trial, verbs
from lab.cli import Refusal
from lab.trial import Trial, TrialError

WANTED = (Trial("ours1", ("ours",)), Trial("peer1", ("peer",)), Trial("new1", ("ours",), "trixie"))


def test_the_inventory_is_a_lab_of_plain_nodes_on_its_own_network(tmp_path: Path) -> None:
    lab = trial.write_inventory(tmp_path, WANTED)
    assert [(n.name, n.role, n.suite, str(n.address)) for n in lab.nodes] == [
        ("new1", "plain", "trixie", "10.77.9.13"),
        ("ours1", "plain", "bookworm", "10.77.9.11"),
        ("peer1", "plain", "bookworm", "10.77.9.12"),
    ]
    groups = yaml.safe_load((tmp_path / "hosts.yml").read_text())["all"]["children"]
    assert list(groups["ours"]["hosts"]) == ["ours1", "new1"]
    values = yaml.safe_load((tmp_path / "group_vars/all/main.yml").read_text())
    assert values["ansible_user"] == "ops"
    assert str(lab.operator.address) == "10.77.0.2"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ((Trial("a-name-much-too-long"),), "more than 15 characters"),
        (tuple(Trial(f"n{index}") for index in range(300)), "300 nodes are more than 10.77.9.0/24 has addresses for"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(tmp_path: Path, wanted: tuple[Trial, ...], reason: str) -> None:
    with pytest.raises(TrialError, match=reason):
        trial.write_inventory(tmp_path, wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_release_that_is_not_built_and_a_role_of_another_release_are_refused(tmp_path: Path) -> None:
    with pytest.raises(topology.TopologyError, match="lab_suite is 'sid'; there are: bookworm, trixie"):
        trial.write_inventory(tmp_path, [Trial("n1", suite="sid")])
    hosts, values = trial.describe([Trial("n1", ("db",), "trixie")])
    with pytest.raises(topology.TopologyError, match="group db, whose image is bookworm's"):
        topology.parse(hosts, values["lab_networks"])


@pytest.mark.parametrize(
    ("hybrid", "suite", "arguments"),
    [
        (True, "bookworm", []),
        (True, "trixie", ["SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]),
        (False, "trixie", []),
    ],
)
def test_how_each_release_is_started(tmp_path: Path, hybrid: bool, suite: str, arguments: list[str]) -> None:
    node = trial.write_inventory(tmp_path, [Trial("n1", suite=suite)]).nodes[0]
    assert nodes.container(node, "image:1", hybrid, 20000)["command"] == ["/sbin/init", *arguments]


def test_a_plain_node_has_volumes_only_where_a_kubelet_runs(tmp_path: Path) -> None:
    node = trial.write_inventory(tmp_path, [Trial("n1")]).nodes[0]
    assert nodes.volumes(node) == ()
    assert "/var/lib/kubelet" in nodes.volumes(replace(node, kubernetes="worker"))


RECIPE = images.Recipe("http://10.77.0.2:3142", True, "amd64")
LATER = replace(RECIPE, suite="trixie")


def test_plain_nodes_are_the_base_of_their_release() -> None:
    assert RECIPE.image("plain") == RECIPE.image("base") != LATER.image("plain")
    assert images.missing(LATER, [], ["plain"]) == ["base"]
    assert images.missing(LATER, [LATER.image("base")], ["plain"]) == []
    assert all("trixie" in line for line in LATER.base_files()["etc/apt/sources.list"][1].splitlines())


def test_the_images_and_tars_of_a_release_outlive_the_other_ones() -> None:
    assert images.superseded(RECIPE, [LATER.image("base"), RECIPE.image("app")], []) == []
    assert images.superseded(LATER, [RECIPE.image("base")], []) == []
    assert (RECIPE.tar().count("-"), LATER.tar().startswith("base-trixie-")) == (1, True)


def test_the_first_base_of_a_release_leaves_the_others_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, old = tmp_path / RECIPE.tar(), tmp_path / "base-trixie-0123456789ab.tar"
    for file in (kept, old):
        file.touch()

    def packed(command: tuple[str, ...], **_options: object) -> object:
        if "-cf" in command:
            Path(command[command.index("-cf") + 1]).touch()
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr("lab.images.subprocess.run", packed)
    assert images.build_base(LATER, tmp_path / LATER.tar(), tmp_path / "log")
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == sorted([RECIPE.tar(), LATER.tar()])


@pytest.fixture(name="said")
def verbs_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    said: list[tuple[str, ...]] = []
    monkeypatch.setenv("CENSUSCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(verbs, "need_root", lambda: None)
    monkeypatch.setattr(verbs, "recorded", lambda: None)
    monkeypatch.setattr(trial, "lab", lambda *arguments: said.append(arguments))
    return said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_nodes_are_removed_after_a_signal(said: list[tuple[str, ...]], tmp_path: Path, number: int) -> None:
    # Tests that a shell started in the background have SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises((KeyboardInterrupt, SystemExit)), trial.running([Trial("n1")], "test"):
        os.kill(os.getpid(), number)
    inventory = str(tmp_path / "trial" / "test")
    assert said == [("up", "--inventory", inventory), ("down", "--inventory", inventory)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_removal_is_not_disturbed_by_a_second_interrupt(
    said: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*arguments: str) -> None:
        if arguments[0] == "down":
            os.kill(os.getpid(), signal.SIGINT)
        said.append(arguments)

    monkeypatch.setattr(trial, "lab", down)
    with trial.running([Trial("n1")], "test"):
        pass
    assert [arguments[0] for arguments in said] == ["up", "down"]


def test_another_lab_is_not_taken_down(said: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "recorded", lambda: Path("inventories/lab"))
    with pytest.raises(Refusal, match="a lab made from inventories/lab is there"), trial.running([Trial("n1")], "test"):
        pass
    assert said == []


@pytest.mark.parametrize(("there", "code"), [("other", "left alone"), ("mine", "removed"), (None, "removed")])
def test_only_the_lab_of_the_inventory_that_is_named_is_taken_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: str | None, code: str
) -> None:
    monkeypatch.setattr(verbs, "need_root", lambda: None)
    monkeypatch.setattr(verbs, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(verbs, "recorded", lambda: tmp_path / there if there else None)

    def play(*_arguments: object, **_options: object) -> int:
        print("removed")
        return 0

    monkeypatch.setattr(verbs, "play", play)
    options = cli.parser().parse_args(["down", "--inventory", str(tmp_path / "mine")])
    assert verbs.down(options) == 0
    assert capsys.readouterr().out.startswith(code)
