"""The figures of `scripts/bench hardening`: from what Ansible, the kernel, OpenSCAP and Lynis print to ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import trial
from lab.paths import REPO
from tests.benchmarks import hardening
from tests.benchmarks import hardening_figures as figures
from tests.benchmarks.hardening_figures import FiguresError, Floor, Lynis, Run, Score, Work

# --- Ansible ---


def task(name: str, start: str, end: str, **hosts: dict[str, Any]) -> dict[str, Any]:
    times = {"start": f"2026-11-21T20:00:{start}Z", "end": f"2026-11-21T20:00:{end}Z"}
    return {"task": {"name": name, "duration": times}, "hosts": hosts}


def said(*tasks: dict[str, Any], **stats: tuple[int, int, int]) -> str:
    numbers = {h: {"changed": c, "failures": f, "unreachable": u} for h, (c, f, u) in stats.items()}
    return json.dumps({"plays": [{"tasks": list(tasks)}], "stats": numbers})


def test_a_play_is_counted_over_all_nodes_with_the_items_of_its_loops() -> None:
    loop = {"results": [{"changed": True}, {"changed": False}, {"skipped": True}]}
    text = said(
        task("one", "01.000000", "01.500000", n1={"changed": True}, n2={"skipped": True}),
        task("loop", "02.000000", "05.250000", n1=loop, n2={"results": []}),
        task("for nobody", "06.000000", "06.000000"),
        n1=(2, 0, 0),
        n2=(1, 0, 0),
    )
    work = figures.read_play(f"[WARNING]: something\n{text}\ntrailing")
    assert (work.tasks, work.results, work.skipped, work.changed) == (2, 6, 1, 3)
    assert work.seconds == (("one", 0.5), ("loop", 3.25))
    assert work.in_tasks == 3.75
    assert figures.slowest(work, 1) == [("loop", 3.25)]
    assert work.failures == ()


def test_failures_are_named_and_those_that_the_play_ignores_are_not_failures() -> None:
    broken = task(
        "set", "01.000000", "02.000000",
        n1={"failed": True, "results": [{"failed": True, "msg": "key\n is  wrong"}, {"msg": "fine"}]},
        n2={"unreachable": True, "msg": "no route"},
    )  # fmt: skip
    assert figures.read_play(said(broken, n1=(0, 1, 0), n2=(0, 0, 1))).failures == (
        "n1: set: key is wrong",
        "n2: set: no route",
    )
    assert figures.read_play(said(broken, n1=(0, 0, 0), n2=(0, 0, 0))).failures == ()


def test_a_task_without_an_end_takes_no_time() -> None:
    started = {"task": {"name": "x", "duration": {"start": "2026-11-21T20:00:00Z"}}, "hosts": {"n1": {}}}
    assert figures.read_play(said(started, n1=(0, 0, 0))).seconds == (("x", 0.0),)


@pytest.mark.parametrize("text", ["", "ERROR! the role was not found", '{"plays": []}', '{"unfinished": '])
def test_a_run_that_says_no_result_is_an_error_with_its_words(text: str) -> None:
    with pytest.raises(FiguresError, match="printed no result"):
        figures.read_play(text)


# --- The node and the wire ---

ID = "cb00f10722756da8671e03832f3bcfaccec23a3a6230e70102ae0508ec6a4031"
HYBRID = f"""9:name=systemd:/libpod_parent/libpod-{ID}/init.scope
4:memory:/libpod_parent/libpod-{ID}/init.scope
2:cpuacct:/libpod_parent/libpod-{ID}
1:cpu:/libpod_parent/libpod-{ID}
0::/libpod_parent/libpod-{ID}/init.scope
"""
HYBRID_MOUNTS = """tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup /sys/fs/cgroup/cpuacct cgroup rw,relatime,cpuacct 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
"""
JOINED = f"3:cpu,cpuacct:/machine.slice/libpod-{ID}.scope/init.scope\n0::/\n"
JOINED_MOUNTS = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
UNIFIED = f"0::/machine.slice/libpod-{ID}.scope/container/init.scope\n"
UNIFIED_MOUNTS = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate 0 0\n"


@pytest.mark.parametrize(
    ("cgroups", "mounts", "file"),
    [
        (HYBRID, HYBRID_MOUNTS, f"/sys/fs/cgroup/cpuacct/libpod_parent/libpod-{ID}/cpuacct.usage"),
        (JOINED, JOINED_MOUNTS, f"/sys/fs/cgroup/cpu,cpuacct/machine.slice/libpod-{ID}.scope/cpuacct.usage"),
        (UNIFIED, UNIFIED_MOUNTS, f"/sys/fs/cgroup/machine.slice/libpod-{ID}.scope/cpu.stat"),
    ],
)
def test_a_nodes_processor_time_is_its_whole_containers(cgroups: str, mounts: str, file: str) -> None:
    assert str(figures.cpu_meter(cgroups, mounts, ID).file) == file


@pytest.mark.parametrize(
    ("cgroups", "mounts"), [(HYBRID, "proc /proc proc rw 0 0\n"), ("0::/other\n", UNIFIED_MOUNTS), ("", UNIFIED_MOUNTS)]
)
def test_a_container_without_a_meter_is_an_error(cgroups: str, mounts: str) -> None:
    with pytest.raises(FiguresError, match="no control group of container cb00f1072275 counts"):
        figures.cpu_meter(cgroups, mounts, ID)


def test_both_meters_give_seconds() -> None:
    assert figures.CpuMeter(Path("/x/cpuacct.usage")).seconds("2500000000\n") == 2.5
    meter = figures.CpuMeter(Path("/x/cpu.stat"))
    assert meter.seconds("usage_usec 1250000\nuser_usec 1\n") == 1.25
    with pytest.raises(FiguresError, match="has no usage_usec"):
        meter.seconds("nr_periods 0\n")


def test_the_router_counts_ssh_apart_from_the_rest_for_each_node_and_refuses_nothing() -> None:
    text = figures.meter_rules({"peer1": "10.77.9.12", "ours1": "10.77.9.11"})
    rules = [line.split() for line in text.splitlines() if " counter name " in line]
    assert len(rules) == 8
    assert {rule[-1] for rule in rules} == {"accept"}
    ours = [" ".join(rule) for rule in rules if "10.77.9.11" in rule]
    assert ours == [
        "ip daddr 10.77.9.11 tcp dport 22 counter name ssh_ours1 accept",
        "ip saddr 10.77.9.11 tcp sport 22 counter name ssh_ours1 accept",
        "ip daddr 10.77.9.11 counter name other_ours1 accept",
        "ip saddr 10.77.9.11 counter name other_ours1 accept",
    ]
    listed = {"nftables": [{"metainfo": {"version": "1"}}, {"counter": {"name": "ssh_ours1", "bytes": 1234}}]}
    assert figures.read_meter(json.dumps(listed)) == {"ssh_ours1": 1234}


# --- Ratios ---


def test_a_share_of_nothing_is_an_error() -> None:
    assert figures.ratio(8.6, 86) == pytest.approx(0.1)
    with pytest.raises(FiguresError, match="the peer's figure is 0"):
        figures.ratio(1, 0)


def test_the_cost_of_one_more_node_is_the_slope_over_all_counts() -> None:
    assert figures.extra_node({1: 86.0, 4: 159.0, 10: 437.0}) == pytest.approx(1682 / 42)
    assert figures.extra_node({1: 3.0, 11: 5.0}) == pytest.approx(0.2)
    assert figures.extra_node({4: 159.0}) is None


def test_the_floor_is_an_empty_play_and_a_round_trip() -> None:
    assert Floor(empty_s=0.5, round_trip_s=0.2, module_s=0.9).seconds == pytest.approx(0.7)


# --- Scores ---

PROGRESS = """WARNING: This content points out to the remote resources.
xccdf_org.ssgproject.content_rule_package_aide_installed:fail
xccdf_org.ssgproject.content_rule_partition_for_tmp:fail
xccdf_org.ssgproject.content_rule_file_owner_etc_passwd:pass
xccdf_org.ssgproject.content_rule_grub2_password:notapplicable
xccdf_org.ssgproject.content_rule_not_in_profile:notselected
xccdf_org.ssgproject.content_rule_ensure_x:notchecked
xccdf_org.ssgproject.content_rule_broken:error
"""


def test_openscaps_results_are_counted_and_those_that_do_not_apply_are_left_out() -> None:
    score = figures.read_oscap(PROGRESS)
    assert (score.passed, score.failed) == (1, ("package_aide_installed", "partition_for_tmp"))
    assert score.other == {"error": 1, "notchecked": 1}


@pytest.mark.parametrize("text", ["", "OpenSCAP Error: No such module\n"])
def test_a_scan_without_results_is_an_error_and_not_a_perfect_score(text: str) -> None:
    with pytest.raises(FiguresError, match="oscap printed no results"):
        figures.read_oscap(text)


LYNIS = """# Lynis Report
lynis_version=3.0.8
suggestion[]=SSH-7408|Consider hardening SSH configuration|AllowTcpForwarding (set YES to NO)|-|
suggestion[]=SSH-7408|Consider hardening SSH configuration|MaxAuthTries (set 6 to 3)|-|
warning[]=PKGS-7392|Found one or more vulnerable packages.|-|-|
hardening_index=75
finish=true
"""


def test_lynis_report_gives_its_index_and_the_tests_that_ask_for_more() -> None:
    assert figures.read_lynis(LYNIS) == Lynis(75, "3.0.8", ("PKGS-7392", "SSH-7408"))
    with pytest.raises(FiguresError, match="has no hardening_index"):
        figures.read_lynis("lynis_version=3.0.8\n")


CONTROLS: list[dict[str, Any]] = [
    {"id": "mounts_tmp", "holds": {"container": "its mounts\n are the engine's"}},
    {"id": "kernel_x", "applies_to": ["vm"]},
    {"id": "aide", "applies_to": ["vm", "container"]},
]
SCANNER = {
    "rules": {
        "partition_for_tmp": ["mounts_tmp"],
        "sysctl_x": ["aide", "kernel_x"],
        "package_aide_installed": ["aide"],
    },
    "without_control": [{"reason": "a container\n has no boot loader", "rules": ["grub2_password", "grub2_uefi"]}],
}


def test_each_rule_that_still_fails_has_a_reason_or_someone_who_should_hold_it() -> None:
    known = figures.reasons(CONTROLS, SCANNER)
    rules = ("grub2_password", "new_rule", "package_aide_installed", "partition_for_tmp", "sysctl_x")
    assert figures.remaining(rules, known) == [
        "grub2_password: a container has no boot loader",
        "new_rule: no control answers it",
        "package_aide_installed: aide should hold it",
        "partition_for_tmp: its mounts are the engine's (mounts_tmp)",
        "sysctl_x: held on machines of their own only: the kernel is not the container's (aide, kernel_x)",
    ]


def test_without_a_scanners_file_nothing_is_known_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert figures.reasons(CONTROLS, figures.read_scanner(tmp_path / "none.yml")) == {}
    (tmp_path / "x.yml").write_text("- a\n")
    with pytest.raises(FiguresError, match=r"x\.yml is not a mapping"):
        figures.read_scanner(tmp_path / "x.yml")


def test_a_catalogue_file_that_is_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("a: 1\n")
    with pytest.raises(FiguresError, match=r"x\.yml is not a list of controls"):
        figures.read_catalogue(tmp_path)


def test_the_score_table_has_a_row_for_each_profile_that_was_scanned() -> None:
    scores = {"stock": {"standard": Score(21, ("a",) * 16)}, "ours": {"standard": Score(30, ("a",) * 4)}}
    rows = figures.score_rows(scores, {"stock": Lynis(59), "ours": Lynis(86)})
    assert rows == [
        ["passed / failed rules", "stock", "ours"],
        ["standard", "21 / 16", "30 / 4"],
        ["Lynis index", "59", "86"],
    ]
    text = figures.table(rows).splitlines()
    assert len({len(line) for line in text}) == 1


# --- Targets ---


def test_targets_that_are_met_are_not_spoken_of() -> None:
    scores = {"peer": {"cis_level1_server": Score(270, ("a",) * 56)}, "ours": {"cis_level1_server": Score(310, ("a",))}}
    shares = {(1, "first"): 0.10, (1, "second"): 0.05}
    assert figures.missed(shares, {"first": 0.05}, scores, {"ours": Lynis(85), "peer": Lynis(75)}) == []


def test_each_missed_target_is_a_sentence() -> None:
    many = Score(270, tuple("abcdefghijk"))
    scores = {"peer": {"cis_level1_server": many}, "ours": {"cis_level1_server": many}}
    shares = {(10, "first"): 0.101, (10, "second"): 0.051}
    assert figures.missed(shares, {"second": 0.06}, scores, {"ours": Lynis(84)}) == [
        "nodes=10 run=first: 0.101 of the peer's time, target 0.10",
        "nodes=10 run=second: 0.051 of the peer's time, target 0.05",
        "one more node, run=second: 0.060 of the peer's time, target 0.05",
        "cis_level1_server: 11 rules fail, after the peer 11",
        "cis_level1_server: 11 rules fail, target 10",
        "Lynis: index 84, target 85 (in a container; --machine takes it with a kernel of its own)",
    ]


@pytest.mark.parametrize(("index", "found"), [(84, ["Lynis: index 84, target 85"]), (85, [])])
def test_lynis_on_a_machine_counts_before_that_in_a_container(index: int, found: list[str]) -> None:
    assert figures.missed({}, {}, {}, {"ours": Lynis(80), "machine": Lynis(index)}) == found


# --- The peer ---


@pytest.fixture(name="peer")
def a_peer(tmp_path: Path) -> Path:
    home = tmp_path / "peer/ansible_collections/devsec/hardening"
    for role in figures.PEER_ROLES:
        (home / "roles" / role / "tasks").mkdir(parents=True)
        (home / "roles" / role / "tasks/main.yml").write_text("---\n")
    (home / "galaxy.yml").write_text("version: 10.6.0\n")
    defaults, variables = home / "roles/os_hardening/defaults", home / "roles/os_hardening/vars"
    defaults.mkdir()
    variables.mkdir()
    (defaults / "main.yml").write_text("sysctl_config: {net.ipv4.ip_forward: 0, vm.mmap_rnd_bits: 32}\n")
    (variables / "Debian.yml").write_text("sysctl_custom_config: {kernel.unprivileged_bpf_disabled: 1}\n")
    return tmp_path / "peer"


@pytest.fixture(name="untouched")
def no_nodes(peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a peer in it, where making nodes is an error."""

    def touched(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the machine was touched")

    monkeypatch.setattr(trial, "running", touched)
    monkeypatch.setenv("CENSUSCHAT_CACHE", str(tmp_path / "cache"))
    assert peer == tmp_path / "peer"
    return tmp_path


def test_a_peer_that_is_whole_is_taken_with_what_a_container_refuses_left_out(peer: Path) -> None:
    assert figures.peer_problem(peer) == ""
    assert figures.peer_version(peer) == "10.6.0"
    options = hardening.parser().parse_args(["--peer", str(peer), "--peer-vars", '{"os_cron_enabled": false}'])
    plays, variables = hardening.play("peer", options)
    assert plays[0]["roles"] == ["devsec.hardening.os_hardening", "devsec.hardening.ssh_hardening"]
    assert variables == {
        "os_auditd_enabled": False,
        "sysctl_unsupported_entries": ["kernel.unprivileged_bpf_disabled", "vm.mmap_rnd_bits"],
        "ssh_host_key_files": ["/etc/ssh/ssh_host_ed25519_key"],
        "os_cron_enabled": False,
    }
    ours, chosen = hardening.play("ours", options)
    assert (ours[0]["roles"], chosen) == (["censuschat.infra.hardening"], {"hardening_profile": "cis_level2"})


def test_an_installed_peers_version_is_in_its_manifest(peer: Path) -> None:
    home = peer / "ansible_collections/devsec/hardening"
    (home / "MANIFEST.json").write_text('{"collection_info": {"version": "10.7.0"}}')
    assert figures.peer_version(peer) == "10.7.0"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peer", "{tmp}/nowhere"], "nowhere is not a directory; PATH is a directory that holds"),
        (["--peer", "{tmp}"], "has no ansible_collections/devsec/hardening; PATH is a directory that holds"),
        (["--peer", "{tmp}/peer", "--forks", "0"], "--forks 0 is not a number of nodes"),
        (["--peer", "{tmp}/peer", "--content", "{tmp}/none.xml"], "none.xml is not a file"),
        (["--peer", "{tmp}/peer", "--json", "{tmp}/none/x.json"], "its directory is not there"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_touched(
    untouched: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert hardening.main([argument.format(tmp=untouched) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and sentence in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not (untouched / "cache").exists()


def test_a_peer_without_one_of_its_roles_is_named(peer: Path) -> None:
    (peer / "ansible_collections/devsec/hardening/roles/ssh_hardening/tasks/main.yml").unlink()
    assert "has no role ssh_hardening (an unfinished clone?)" in figures.peer_problem(peer)


@pytest.mark.parametrize("text", ["0", "1,x", "", "1,101"])
def test_numbers_of_nodes_that_cannot_be_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hardening.parser().parse_args(["--peer", "x", "--nodes", text])
    assert ended.value.code == 2
    assert "--nodes" in capsys.readouterr().err


def test_numbers_of_nodes_are_taken_once_and_rising() -> None:
    assert hardening.parser().parse_args(["--peer", "x", "--nodes", "10,1,4,4"]).nodes == [1, 4, 10]


# --- What is printed ---


def run(wall: float, tasks: int = 2) -> Run:
    work = Work(tasks, tasks * 3, 1, 1, (), (("Harden", wall * 0.6), ("Report", wall * 0.1)))
    return Run(wall, work, 50_000, 1_000_000, {"n1": wall / 4}, wall / 2)


@pytest.fixture(name="results")
def some_results(monkeypatch: pytest.MonkeyPatch) -> hardening.Results:
    monkeypatch.setattr(hardening, "known_rules", lambda *_scanner: {})
    results = hardening.Results({"benchmark": "hardening"})
    for count in (1, 4):
        for which, ours, peer in (("first", 6.0 + count, 86.0 * count), ("second", 2.0 + count / 10, 72.0 * count)):
            results.runs[count, "ours", which] = run(ours)
            results.runs[count, "peer", which] = run(peer, 183)
        results.floors[count] = Floor(0.5, 0.2, 0.9)
    results.scores = {state: {"cis_level1_server": Score(n, ("x",) * (330 - n))} for state, n in
                      (("stock", 218), ("peer", 270), ("ours", 325))}  # fmt: skip
    results.lynis = {"stock": Lynis(59), "peer": Lynis(75), "ours": Lynis(86, "3.0.8", ("SSH-7408",))}
    return results


def test_the_lines_that_programs_read(results: hardening.Results) -> None:
    first = hardening.compared(1, "first", results).splitlines()
    assert first[0] == "bench hardening: nodes=1 run=first ours_s=7.00 peer_s=86.00 ratio=0.081"
    assert any(line.split()[:3] == ["ssh", "kB", "a"] and line.split()[-2:] == ["50", "50"] for line in first)
    floor = hardening.rest(4, results).splitlines()
    assert floor[0].startswith("bench hardening: floor nodes=4 floor_s=0.70 empty_play_s=0.50")
    assert "Harden: 6.00; Report: 1.00" in floor[1]
    last = hardening.summary(results).splitlines()
    assert last[0] == "bench hardening: extra_node run=first ours_s=1.00 peer_s=86.00 ratio=0.012"
    assert last[-1] == "bench hardening: targets_missed=0"


def test_the_file_has_all_that_was_measured_and_what_was_missed(results: hardening.Results) -> None:
    results.lynis["ours"] = Lynis(80, "3.0.8", ("SSH-7408",))
    data = json.loads(json.dumps(results.to_dict()))
    assert len(data["runs"]) == 8
    assert data["runs"][0]["task_s"] == [["Harden", 4.2], ["Report", 0.7]]
    assert data["ratios"][0] == {"nodes": 1, "run": "first", "ratio": 0.0814}
    assert data["scores"]["ours"]["cis_level1_server"]["passed"] == 325
    assert data["remaining"]["cis_level1_server"] == ["x: no control answers it"] * 5
    assert data["remaining"]["lynis"] == ["SSH-7408: no control answers it"]
    assert data["lynis"]["stock"] == {"index": 59, "version": "", "suggested": []}
    assert [text.partition(" (")[0] for text in data["missed"]] == ["Lynis: index 80, target 85"]


def test_what_was_measured_before_a_failure_can_be_written(results: hardening.Results) -> None:
    begun = hardening.Results({"benchmark": "hardening"}, {(1, "ours", "first"): run(7.0)})
    assert begun.to_dict()["ratios"] == []
    assert begun.to_dict()["extra_node_s"] == {}
    del results.runs[4, "peer", "second"]
    assert list(results.ratios()) == [(1, "first"), (1, "second"), (4, "first")]


def test_the_settings_of_both_sides_are_the_same_and_take_the_peer_first(peer: Path) -> None:
    text = hardening.ANSIBLE_CFG.format(collections=f"{peer}:{REPO}/collections", forks=10, directory="/tmp/bh-x")
    assert "pipelining = true" in text
    assert "control_path = %(directory)s/%%C" in text
    plays, _variables = hardening.play("peer", hardening.parser().parse_args(["--peer", str(peer)]))
    assert yaml.safe_load(yaml.safe_dump(plays)) == plays


def test_the_catalogue_speaks_of_both_scanners_rules() -> None:
    for scanner in ("openscap_debian12", "lynis"):
        known = hardening.known_rules(scanner)
        assert known, scanner
        assert all(why.controls or why.reason for why in known.values()), scanner


def test_each_side_has_equal_nodes_and_one_of_its_own_to_warm_the_cache(
    peer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[trial.Trial] = []

    def stop(nodes: list[trial.Trial], _name: str) -> None:
        wanted.extend(nodes)
        raise trial.TrialError("far enough")

    monkeypatch.setattr(trial, "running", stop)
    options = hardening.parser().parse_args(["--peer", str(peer)])
    with pytest.raises(trial.TrialError), hardening.fresh(2, True, True, options):
        pass
    assert [node.name for node in wanted] == ["ours1", "ours2", "peer1", "peer2", "stock1", "warm-ours", "warm-peer"]
    assert {node.suite for node in wanted} == {"bookworm"}
    plays, _variables = hardening.play("ours", options)
    assert hardening.aimed(plays, "warm_ours")[0] == {**plays[0], "hosts": "warm_ours"}
    assert plays[0]["hosts"] == "ours"
