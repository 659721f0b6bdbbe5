"""What the lab asks of the machine, and how its limits are raised and put back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab import images, machine, nodes, packages, processes, report, topology
from lab.paths import IMAGES, REPO

LAB = topology.load(REPO / "inventories" / "lab")
SMALL = topology.load(REPO / "inventories" / "lab-small")
FIT = machine.Facts(
    root=True,
    debian="12",
    missing=(),
    memory_mib=16000,
    disk_gib=50,
    routes=("192.0.2.0/24",),
    hybrid_cgroups=False,
)


def test_a_fit_machine_has_no_problems() -> None:
    assert machine.problems(FIT, LAB) == []


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (replace(FIT, root=False), "needs root"),
        (replace(FIT, debian=""), "needs Debian 12 or later"),
        (replace(FIT, memory_mib=1500), "there are 1500; free some, or take `lab up --small`"),
        (replace(FIT, disk_gib=2), "GiB of free disk, there are 2"),
        (replace(FIT, routes=("10.0.0.0/8",)), "has a route to 10.0.0.0/8"),
        (replace(FIT, routes=("10.77.5.0/24",)), "has a route to 10.77.5.0/24"),
        (replace(FIT, routes=("0.0.0.0/1", "10.77.5.1/32")), "has a route to 10.77.5.1/32"),
    ],
)
def test_each_problem_is_one_sentence_of_its_own(facts: machine.Facts, reason: str) -> None:
    found = machine.problems(facts, LAB)
    assert len(found) == 1
    assert reason in found[0]


def test_a_small_lab_asks_for_less_memory_and_one_of_three_control_planes_for_more() -> None:
    enough = replace(FIT, memory_mib=machine.memory(LAB))
    assert not machine.problems(enough, LAB)
    assert not machine.problems(replace(enough, memory_mib=machine.memory(SMALL)), SMALL)
    assert machine.problems(replace(enough, memory_mib=machine.memory(SMALL)), LAB)
    assert machine.problems(enough, topology.load(REPO / "inventories" / "lab-ha"))


def test_a_lab_that_is_there_already_is_not_asked_for_its_memory_again() -> None:
    assert machine.problems(replace(FIT, memory_mib=500, disk_gib=1), LAB, resuming=True) == []
    assert machine.problems(replace(FIT, root=False), LAB, resuming=True)


LEAST = machine.Setting("fs.inotify.max_user_instances", 1024, least=True)
EXACT = machine.Setting("kernel.panic", 10)


@pytest.mark.parametrize(
    ("setting", "current", "remembered", "expected"),
    [
        (LEAST, 128, None, machine.Limit(set_to=1024, remember=128)),
        (LEAST, 1024, 128, machine.Limit()),
        (LEAST, 4096, None, machine.Limit()),
        # Set back by somebody while the lab was up: raised again, and the first value stays the one to put back.
        (LEAST, 128, 64, machine.Limit(set_to=1024)),
        # A kubelet takes this value only, a higher one as little as a lower.
        (EXACT, 10, None, machine.Limit()),
        (EXACT, 60, None, machine.Limit(set_to=10, remember=60)),
        (EXACT, 0, None, machine.Limit(set_to=10, remember=0)),
    ],
)
def test_changing_a_setting(
    setting: machine.Setting, current: int, remembered: int | None, expected: machine.Limit
) -> None:
    assert machine.plan_raise(setting, current, remembered) == expected


@pytest.mark.parametrize(
    ("setting", "current", "remembered", "expected"),
    [
        (LEAST, 1024, 128, machine.Limit(set_to=128, forget=True)),
        (LEAST, 1024, None, machine.Limit()),
        (EXACT, 10, 0, machine.Limit(set_to=0, forget=True)),
        # Somebody else set it since: theirs stays.
        (LEAST, 8192, 128, machine.Limit(forget=True)),
    ],
)
def test_putting_a_setting_back(
    setting: machine.Setting, current: int, remembered: int | None, expected: machine.Limit
) -> None:
    assert machine.plan_restore(setting, current, remembered) == expected


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """A kernel of files: the two settings, as a machine has them before the lab."""
    files = {LEAST.name: tmp_path / "inotify", EXACT.name: tmp_path / "panic"}
    files[LEAST.name].write_text("128\n")
    files[EXACT.name].write_text("1\n")
    monkeypatch.setattr(machine, "_setting_file", lambda setting: files[setting.name])
    return files


def plans(plan: Callable[..., machine.Limit], state: Path) -> dict[machine.Setting, machine.Limit]:
    found = machine.remembered(state)
    return {setting: plan(setting, machine.current(setting), found.get(setting.name)) for setting in (LEAST, EXACT)}


def test_settings_are_changed_and_each_put_back_to_what_it_was(kernel: dict[str, Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    for _ in range(2):
        machine.apply_limits(plans(machine.plan_raise, state), state)
        assert [file.read_text() for file in kernel.values()] == ["1024", "10"]
        assert machine.remembered(state) == {LEAST.name: 128, EXACT.name: 1}
    machine.apply_limits(plans(machine.plan_restore, state), state)
    assert [file.read_text() for file in kernel.values()] == ["128", "1"]
    assert list(state.iterdir()) == []


def test_a_setting_that_cannot_be_set_is_named_and_what_was_set_is_remembered(
    kernel: dict[str, Path], tmp_path: Path
) -> None:
    kernel[EXACT.name] = tmp_path
    with pytest.raises(RuntimeError, match=r"kernel\.panic of the machine cannot be set to 10: Is a directory"):
        machine.apply_limits({EXACT: machine.Limit(10, 1), LEAST: machine.Limit(1024, 128)}, tmp_path)
    assert machine.remembered(tmp_path) == {EXACT.name: 1, LEAST.name: 128}


def test_a_module_that_the_kernel_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MODULES", {"here": "/proc/self", "gone": "/proc/none", "nosuchfs": "nosuchfs"})
    assert machine.missing_modules() == ("gone", "nosuchfs")


@pytest.mark.parametrize(
    ("targets", "dump", "listed", "expected"),
    [
        (
            "bookworm|http://mirror.test/debian/\nbookworm-updates|http://mirror.test/debian/\n"
            "bookworm-security|http://mirror.test/debian-security/\n",
            "",
            "",
            images.Mirror("http://mirror.test/debian", "http://mirror.test/debian-security"),
        ),
        (
            "nodistro|https://packages.test/node_20.x/\ntrixie|https://m.test/mirrors/debian/\n",
            'Acquire::http::Proxy "http://proxy.test:3128/";',
            "",
            images.Mirror("https://m.test/mirrors/debian", "", "http://proxy.test:3128"),
        ),
        (
            "bookworm|mirror+file:/etc/apt/mirrors/debian.list/\n",
            'Acquire::http::Proxy "DIRECT";',
            "https://m.test/debian\n",
            images.Mirror("https://m.test/debian"),
        ),
    ],
    ids=["plain", "other archives and a proxy", "mirror+file"],
)
def test_the_mirror_is_apts_own(targets: str, dump: str, listed: str, expected: images.Mirror) -> None:
    assert images.parse_mirror(targets, dump, listed) == expected


def test_without_a_mirror_the_reason_is_said() -> None:
    with pytest.raises(images.ImageError, match="no Debian mirror over http"):
        images.parse_mirror("bookworm|cdrom:[Debian]/\n", "")


RECIPE = images.Recipe("http://10.77.0.2:3142", True, "amd64")


def test_images_are_named_by_their_recipe() -> None:
    same = images.Recipe("http://10.77.0.2:3142", True, "amd64")
    assert RECIPE.image("db") == same.image("db")
    other = replace(RECIPE, security=False)
    # A role's image stands on the base: another base is another role image.
    assert all(RECIPE.image(role) != other.image(role) for role in ("base", "app", "db", "witness"))


def test_only_what_is_missing_is_made_and_the_base_first() -> None:
    roles = ["app", "db"]
    everything = [RECIPE.image(role) for role in ("base", "app", "db")]
    assert images.missing(RECIPE, everything, roles) == []
    assert images.missing(RECIPE, [], roles) == ["base", "app", "db"]
    assert images.missing(RECIPE, [RECIPE.image("base"), RECIPE.image("app")], roles) == ["db"]
    # The roles' images have all of the base in them: it is not needed for itself.
    assert images.missing(RECIPE, everything[1:], roles) == []


def test_images_of_older_recipes_go_unless_a_container_uses_them() -> None:
    old = [f"{IMAGES}/{name}:0" for name in ("base", "app", "db")]
    present = [*old, RECIPE.image("base"), RECIPE.image("db")]
    assert images.superseded(RECIPE, present, [old[2]]) == [old[1], old[0]]


def test_nodes_get_their_packages_from_the_cache_only() -> None:
    text = images.sources("http://10.77.0.2:3142", True)
    assert all("http://10.77.0.2:3142/debian" in line for line in text.splitlines())
    assert len(text.splitlines()) == 3
    settings = packages.settings(LAB.operator, images.Mirror("http://mirror.test/debian", proxy="http://proxy.test:1"))
    assert "ForceManaged: 1" in settings.splitlines()
    assert "BindAddress: 10.77.0.2" in settings.splitlines()
    assert [line for line in settings.splitlines() if "mirror.test" in line] == [
        "Remap-debian: /debian ; http://mirror.test/debian"
    ]
    assert "Proxy: http://proxy.test:1" in settings.splitlines()


@pytest.mark.parametrize(("hybrid", "mode"), [(True, "false"), (False, "always")])
def test_how_a_node_starts(hybrid: bool, mode: str) -> None:
    node = LAB.node("use1-app1")
    how = nodes.container(node, "image:1", hybrid, 20000)
    assert how["systemd"] == mode
    assert how["network"] == ["ns:/run/netns/censuslab-use1-app1"]
    assert how["label"] == {"censuschat.lab": "true"}
    paths = [volume.split(":")[1] for volume in how["volume"]]
    # A kubelet runs here.
    assert {"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/etcd", "/opt/kubernetes"} < set(paths)
    assert how["volume"][0].endswith(":ro")


def test_a_kubernetes_node_gets_the_programs_read_only_and_others_do_not() -> None:
    def programs(name: str) -> list[str]:
        made = nodes.container(LAB.node(name), "image:1", True, 20000)["volume"]
        return [volume for volume in made if "/opt/kubernetes" in volume]

    assert programs("use1-app2") == [f"{nodes.programs()}:/opt/kubernetes:ro"]
    assert programs("use1-db1") == programs("witness1") == []


def test_known_hosts_pins_every_node_by_address_and_name() -> None:
    keys = {node.name: f"ssh-ed25519 KEY{node.name} comment" for node in LAB.nodes}
    lines = nodes.known_hosts(LAB, keys).splitlines()
    assert len(lines) == len(LAB.nodes)
    assert "10.77.1.21,use1-db1 ssh-ed25519 KEYuse1-db1" in lines


def test_a_file_is_written_only_when_it_differs(tmp_path: Path) -> None:
    file = tmp_path / "a"
    assert nodes.write(file, "one") == [str(file)]
    before = file.stat().st_mtime_ns
    assert nodes.write(file, "one") == []
    assert file.stat().st_mtime_ns == before
    assert nodes.write(file, "two") == [str(file)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_only_services_that_are_not_alive_are_started() -> None:
    wanted = [processes.Service(name, ("x",), ("127.0.0.1", 1)) for name in ("packages", "aws", "dns")]
    assert [service.name for service in processes.plan(wanted, ["aws", "prober"])] == ["packages", "dns"]


def state(*changes: tuple[str, dict[str, object]]) -> report.LabState:
    by_name = dict(changes)
    listed = tuple(
        replace(
            report.NodeState(n.name, n.site, n.zone, n.role, str(n.address), "running", True, False),
            **by_name.get(n.name, {}),  # type: ignore[arg-type]
        )
        for n in SMALL.nodes
    )
    return report.LabState("inventories/lab-small", listed, {"packages": 1, "aws": 2, "dns": 3}, (), True, 0.3)


def test_what_makes_a_lab_not_up() -> None:
    assert report.missing(state()) == []
    stopped = state(("use1-db1", {"container": "exited", "ssh": False}), ("usw2-db1", {"ssh": False}))
    assert report.missing(stopped) == ["use1-db1", "usw2-db1"]
    assert report.missing(state(("use1-db1", {"ssh": False, "cut": True}))) == []
    assert report.missing(replace(state(), services={"aws": 2}, network=False)) == ["packages", "dns", "network"]


def member(ready: str, **spec: bool) -> dict[str, object]:
    return {
        "status": {"conditions": [{"type": "DiskPressure", "status": "False"}, {"type": "Ready", "status": ready}]},
        "spec": spec,
    }


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (None, "API silent"),
        ({}, "not a member"),
        ({"a": {}}, "NotReady"),
        ({"a": member("True")}, "Ready"),
        ({"a": member("Unknown")}, "NotReady"),
        ({"a": member("True", unschedulable=True)}, "Ready, cordoned"),
    ],
)
def test_what_a_cluster_says_of_a_node(cluster: dict[str, object] | None, expected: str) -> None:
    assert report.standing("a", cluster) == expected


def test_an_api_that_does_not_answer_is_said_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "v1.2.3" / "bin" / "kubectl"
    program.parent.mkdir(parents=True)
    # As kubectl does: an empty list on stdout all the same.
    program.write_text("""#!/bin/sh\necho 'Unable to connect to the server' >&2; echo '{"items": []}'; exit 1\n""")
    program.chmod(0o755)
    monkeypatch.setattr(nodes, "programs", lambda: tmp_path)
    assert report.members("us-east-1") is None
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert report.members("us-east-1", patience=0) is None
    program.write_text("""#!/bin/sh\necho '{"items": [{"metadata": {"name": "a"}}]}'\n""")
    assert report.members("us-east-1") == {"a": {"metadata": {"name": "a"}}}


def test_the_clusters_are_shown_when_there_are_any() -> None:
    assert "cluster" not in report.as_table(state())
    text = report.as_table(state(("use1-app1", {"cluster": "Ready"}), ("usw2-app1", {"cluster": "API silent"})))
    assert "cluster" in text and "Ready" in text and "API silent" in text
    # What runs on the nodes does not make the lab less up.
    assert text.endswith("the lab is up")


def test_status_says_the_same_to_programs_and_people() -> None:
    cut = replace(state(("witness1", {"ssh": False, "cut": True})), cut=("witness",))
    assert json.loads(report.as_json(cut))["cut"] == ["witness"]
    text = report.as_table(cut)
    assert "witness CUT OFF" in text
    assert text.endswith("the lab is up; cut off: witness")
