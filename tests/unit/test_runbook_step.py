"""What a step's events come to: progress, outputs, changes, and failures in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from runbooks.step import Events, message


def event(kind: str, host: str = "a", **more: Any) -> dict[str, Any]:
    return {"event": kind, "event_data": {"host": host, "task": "Do it", **more}}


@pytest.mark.parametrize(
    ("res", "text"),
    [
        ({"msg": "no space"}, "no space"),
        ({"msg": "non-zero return code", "stderr": "disk full\n"}, "non-zero return code\ndisk full"),
        ({"msg": "MODULE FAILURE", "module_stdout": "Traceback: x"}, "MODULE FAILURE\nTraceback: x"),
        ({"msg": "x disk full", "stderr": "disk full"}, "x disk full"),
        ({"censored": "the output has been hidden"}, "the details are secret (no_log)"),
        (
            {"msg": "items", "results": [{"item": 1}, {"item": 2, "failed": True, "msg": "bad"}]},
            "2: bad",
        ),
        ({"rc": 3}, '{"rc": 3}'),
    ],
)
def test_message(res: dict[str, Any], text: str) -> None:
    assert message(res) == text


def test_hosts_that_say_the_same_say_it_together() -> None:
    events = Events()
    for host in ("a", "b"):
        events.take(event("runner_on_failed", host, res={"msg": "no leader"}))
    events.take(event("runner_on_unreachable", "c", res={"msg": "timed out"}))
    assert events.result("failed").failures == [
        {"host": "a, b", "task": "Do it", "message": "no leader"},
        {"host": "c", "task": "Do it", "message": "timed out"},
    ]


def test_failures_that_the_playbook_dealt_with_are_none() -> None:
    events = Events()
    events.take(event("runner_on_failed", res={"msg": "x"}, ignore_errors=True))
    events.take(event("runner_on_failed", res={"msg": "rescued"}))
    assert events.result("ok").failures == []


def test_outputs_and_changes() -> None:
    events = Events()
    events.take(event("runner_on_ok", "b", res={"changed": True}))
    events.take(event("runner_on_ok", "a", res={"changed": True}))
    events.take(event("runner_on_ok", "c", res={"changed": False}))
    events.take({"event": "playbook_on_stats", "event_data": {"artifact_data": {"epoch": 3, "says": "done"}}})
    result = events.result("ok")
    assert (result.outputs, result.says) == ({"epoch": 3}, "done")
    assert result.changed == [{"task": "Do it", "hosts": ["a", "b"]}]


def test_playbook_that_cannot_be_read_is_explained_by_ansible() -> None:
    events = Events()
    events.take({"event": "verbose", "stdout": "[ERROR]: couldn't resolve module"})
    assert events.result("failed").failures == [{"host": "", "task": "", "message": "[ERROR]: couldn't resolve module"}]


def test_activity_names_the_task_and_who_is_at_it() -> None:
    events = Events()
    events.take(event("playbook_on_task_start"))
    for host in ("a", "b", "c"):
        events.take(event("runner_on_start", host))
    assert str(events.activity) == "Do it (a, b +1)"
    events.take(event("runner_on_ok", "a", res={}))
    assert str(events.activity) == "Do it (b, c)"
