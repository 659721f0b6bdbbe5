"""The lab's AWS keeps what it was asked to change, and not what it was only asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lab.aws_trail import Trail, changes


@pytest.mark.parametrize(
    ("method", "target", "body", "expected"),
    [
        ("POST", "", "<ChangeResourceRecordSetsRequest/>", True),
        ("GET", "", "", False),
        ("HEAD", "", "", False),
        ("PUT", "", "object", True),
        ("POST", "DynamoDB_20120810.GetItem", "{}", False),
        ("POST", "DynamoDB_20120810.PutItem", "{}", True),
        ("POST", "", "Version=2010-05-15&Action=DescribeStacks", False),
        ("POST", "", "Action=Publish&Message=x", True),
    ],
)
def test_only_changes_are_kept(method: str, target: str, body: str, expected: bool) -> None:
    assert changes(method, target, body) is expected


def test_a_change_is_on_disk_before_it_acts_and_reaches_the_application_whole(tmp_path: Path) -> None:
    file = tmp_path / "log" / "aws.jsonl"
    got = []

    def application(environ: dict[str, Any], _start: Callable[..., Any]) -> Iterable[bytes]:
        got.append((environ["wsgi.input"].read(), file.read_text()))
        return [b"done"]

    body = b"<Change/>"
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/2013-04-01/hostedzone/Z/rrset/",
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_AUTHORIZATION": "AWS4 canary",
        "wsgi.input": io.BytesIO(body),
    }
    assert list(Trail(application, file)(environ, lambda *_: None)) == [b"done"]
    assert got[0][0] == body
    line = json.loads(got[0][1])
    assert (line["path"], line["body"]) == ("/2013-04-01/hostedzone/Z/rrset/", "<Change/>")
    assert "canary" not in got[0][1]
