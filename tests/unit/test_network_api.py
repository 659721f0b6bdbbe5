"""The network agent's copy of the API's objects: lists in pages, watches from where it was, lists anew when it must."""

from __future__ import annotations

import http.client
import io
import json
import os
import select
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from lab.network_policy import agent, api, table
from lab.network_policy.rules import closed


def thing(name: str, value: int, version: str = "1") -> dict[str, Any]:
    return {"metadata": {"namespace": "shop", "name": name, "resourceVersion": version}, "value": value}


def event(kind: str, said: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": said}).encode() + b"\n"


class Server:
    """Answers in the order given, and keeps what it was asked."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def connect(self, timeout_s: float) -> Server:
        return self

    def close(self) -> None:
        pass

    def get(self, connection: Server, path: str, **query: object) -> io.BytesIO:
        self.asked.append(query)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)


def page(*items: dict[str, Any], version: str, more: str = "") -> bytes:
    return json.dumps({"metadata": {"resourceVersion": version, "continue": more}, "items": items}).encode()


def copy_of(server: Server) -> tuple[api.Copy[int], list[int]]:
    changes: list[int] = []
    made: api.Copy[int] = api.Copy(
        cast(api.Access, server), "/things", lambda said: int(said["value"]), lambda: changes.append(1)
    )
    return made, changes


def test_nothing_is_known_before_the_whole_list_is() -> None:
    made, changes = copy_of(Server(page(thing("a", 1), version="5", more="token"), OSError("cut off")))
    with pytest.raises(OSError, match="cut off"):
        made.list()
    assert made.snapshot() is None
    assert not changes


def test_a_list_comes_in_pages_and_counts_as_one_change() -> None:
    server = Server(page(thing("a", 1), version="5", more="token"), page(thing("b", 2), version="5"))
    made, changes = copy_of(server)
    made.list()
    assert made.snapshot() == [1, 2]
    assert len(changes) == 1
    assert server.asked == [{"limit": 50}, {"limit": 50, "continue": "token"}]


def test_a_list_replaces_what_was_deleted_meanwhile() -> None:
    made, _ = copy_of(Server(page(thing("a", 1), version="5"), page(thing("b", 2), version="9")))
    made.list()
    made.list()
    assert made.snapshot() == [2]


def test_a_watch_goes_on_from_the_last_version_heard_of() -> None:
    first = (
        event("ADDED", thing("b", 2, "6"))
        + event("MODIFIED", thing("a", 7, "7"))
        + event("DELETED", thing("b", 2, "8"))
    )
    bookmark = event("BOOKMARK", {"metadata": {"resourceVersion": "40"}})
    server = Server(page(thing("a", 1), version="5"), first + bookmark, b"")
    made, changes = copy_of(server)
    made.list()
    made.watch()
    assert made.snapshot() == [7]
    assert len(changes) == 4
    made.watch()
    assert [query.get("resourceVersion") for query in server.asked] == [None, "5", "40"]
    assert server.asked[1]["allowWatchBookmarks"] == "true"


def test_an_event_that_changes_nothing_for_us_is_no_change() -> None:
    made, changes = copy_of(Server(page(thing("a", 1), version="5"), event("MODIFIED", thing("a", 1, "6"))))
    made.list()
    made.watch()
    assert len(changes) == 1


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"code": 410, "message": "too old resource version"}, api.Gone),
        ({"code": 500, "message": "etcd is away"}, api.Refused),
    ],
)
def test_an_error_in_a_watch_is_told_from_a_change(said: dict[str, Any], error: type[Exception]) -> None:
    made, changes = copy_of(Server(page(thing("a", 1), version="5"), event("ERROR", said)))
    made.list()
    with pytest.raises(error):
        made.watch()
    assert made.snapshot() == [1]
    assert len(changes) == 1


class End(Exception):
    """Ends the endless loop of a test."""


def test_it_lists_anew_only_after_410_and_keeps_what_it_knows_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = event("ERROR", {"code": 410, "message": "too old"})
    server = Server(
        OSError("refused"),  # the first list
        page(thing("a", 1), version="5"),
        OSError("reset"),  # a watch
        http.client.IncompleteRead(b""),
        gone,
        page(thing("b", 2), version="9"),
        End(),
    )
    made, _ = copy_of(server)
    pauses: list[float] = []
    seen: list[list[int] | None] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        seen.append(made.snapshot())

    monkeypatch.setattr("lab.network_policy.api.time.sleep", sleep)
    with pytest.raises(End):
        made.run()
    assert [query.get("resourceVersion", "list") for query in server.asked] == [
        "list",
        "list",
        "5",
        "5",
        "5",
        "list",
        "9",
    ]
    assert seen == [None, [1], [1], [1]]
    assert all(0 < pause <= 1.5 * api.LONGEST_PAUSE_S for pause in pauses)
    assert pauses[-1] > pauses[0] / 3


# --- the agent's beginning -----------------------------------------------------------------------------------------


def config(directory: Path) -> agent.Config:
    values = {name: str(directory / name) for name in agent.Config._fields}
    path = directory / "network.json"
    path.write_text(json.dumps({**values, "pod_cidr": "10.78.0.0/17", "run_directory": str(directory)}))
    return agent.Config.read(str(path))


def test_a_boot_begins_closed_and_goes_on_with_its_last_table(tmp_path: Path) -> None:
    own = config(tmp_path)
    assert agent.standing(own) == own.closed == table.render(closed("10.78.0.0/17"))
    own.saved.write_text("the last one")
    assert agent.standing(own) == "the last one"


def heard(watch: agent.Watch) -> bool:
    """Whether something was told, which is then taken as told."""
    ready, _, _ = select.select([watch.descriptor], [], [], 0.2)
    return bool(ready and os.read(watch.descriptor, 65536))


def test_a_directory_is_watched_also_after_it_was_removed(tmp_path: Path) -> None:
    directory = tmp_path / "cni" / "results"
    watch = agent.Watch(str(directory))
    try:
        assert not heard(watch)
        (directory / "one").write_text("address")
        assert heard(watch)
        watch.renew()
        assert not heard(watch)
        shutil.rmtree(directory)
        assert heard(watch)
        watch.renew()
        (directory / "two").write_text("address")
        assert heard(watch)
        (directory / "two").unlink()
        assert heard(watch)
    finally:
        os.close(watch.descriptor)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage"),
        (["walk", "x"], 2, "usage"),
        (["run", "/nowhere"], 1, "No such file"),
        (["load", "/dev/null"], 1, "Expecting value"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(arguments) == code
    assert said in capsys.readouterr().err


def test_a_policy_that_cannot_be_read_isolates_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = {
        "metadata": {"namespace": "shop", "name": "new"},
        "spec": {"ingress": [{"from": [{"serviceAccount": "x"}]}]},
    }
    closing = agent._policy(said)
    assert (closing.ingress, closing.egress, closing.selector.expressions) == ((), (), ())
    assert "policy new of namespace shop isolates the whole namespace" in capsys.readouterr().err


def test_files_are_written_whole_and_for_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "net.d" / "10-censuschat.conflist"
    agent._write(path, "one")
    before = path.stat().st_mtime_ns
    agent._write(path, "one")
    assert (path.read_text(), path.stat().st_mode & 0o777, path.stat().st_mtime_ns) == ("one", 0o600, before)
    agent._write(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
