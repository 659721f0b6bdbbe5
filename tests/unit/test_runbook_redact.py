"""What of a task's result is shown and kept, and what of it never is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runbooks.redact import HIDDEN, LINES, WIDTH, Shown, cut, differences, redact

CANARY = "canary-4711"
PEM = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        f"password: {CANARY}",
        f"requirepass: x\nmasterauth_password={CANARY}",
        f'{{"db_password": "{CANARY}", "port": 5432}}',
        f"AWS_SECRET_ACCESS_KEY='{CANARY}'",
        f"api-key = {CANARY}",
        f"authToken: {CANARY}",
        f"key: |\n{PEM}\nnext",
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}",
        f"postgresql://app:{CANARY}@db1:5432/census",
    ],
)
def test_a_secret_is_known_by_its_name_or_its_form(text: str) -> None:
    assert CANARY not in redact(text)
    assert HIDDEN in redact(text)


def test_a_secret_parameters_value_is_hidden_wherever_it_stands() -> None:
    assert redact(f"motd = welcome {CANARY}!", [CANARY]) == f"motd = welcome {HIDDEN}!"
    assert redact("a = 1", ["1"]) == "a = 1", "too short to be looked for"


@pytest.mark.parametrize(
    "text",
    ["epoch: 3\nlast_region: west", "tokens: 7", "password: null", "port = 5432 # no secret"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ({"changed": True}, []),
        ({"censored": "no_log", "changed": True, "diff": {"before": "", "after": CANARY}}, [("", HIDDEN, HIDDEN)]),
        ({"diff": {"before": "a\nb\n", "after": "a\nc\n", "after_header": "/etc/x"}}, [("/etc/x", "b", "c")]),
        ({"diff": {"before": "same", "after": "same"}}, []),
        ({"diff": [{"before": "", "after": "x"}, {"before": "y", "after": "y"}]}, [("", "", "x")]),
        ({"diff": {"prepared": "+ one\n"}}, [("", "", "+ one")]),
        (
            {"diff": {"before": {"TTL": 5, "Value": 1}, "after": {"ttl": 5, "value": 2}}},
            [("", ' "value": 1', ' "value": 2')],
        ),
        (
            {
                "results": [
                    {"changed": True, "_ansible_item_label": "one", "diff": {"before": "", "after": "x"}},
                    {"changed": False, "diff": {"before": "", "after": "never"}},
                    {"changed": True, "_ansible_no_log": True, "diff": {"before": "", "after": CANARY}},
                ]
            },
            [("one", "", "x")],
        ),
    ],
    ids=["no diff", "no_log", "lines", "nothing", "a list", "prepared", "two spellings", "items"],
)
def test_a_difference_is_its_lines(result: dict[str, Any], shown: list[tuple[str, str, str]]) -> None:
    found = differences(result)
    assert [(s.what, s.before, s.after) for s in found] == shown
    assert CANARY not in json.dumps([s.after for s in found])


def test_what_is_cut_still_has_its_own_digest() -> None:
    long = [f"line {n}" for n in range(LINES + 5)]
    text = cut([*long, "x" * 500])
    assert text.splitlines()[-1] == "… 6 lines more"
    assert max(map(len, cut(["x" * 500]).splitlines())) == WIDTH

    def one(last: str) -> Shown:
        return differences({"diff": {"before": "", "after": "\n".join([*long, last])}})[0]

    assert one("a").after == one("b").after
    assert one("a").digest != one("b").digest
