"""The hardening's evidence: what it says of each node and control, its trend, and what it never says."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence import documents, files
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence.redact import HIDDEN, LONGEST, cleaned, redact
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence.report import (
    TRENDS,
    EvidenceError,
    Run,
    Seen,
    begin,
    end,
    seen,
    unix,
)

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CANARY = "xyzzy-canary-4711"
HOSTILE = '</code><script>document.title="owned"</script><img src=x onerror=alert(1)>"\' & \x1b[31m\u202e\x00'


def at(minute: int, process: str = "") -> Run:
    moment = f"2027-03-14T05:{minute:02d}:00Z"
    return Run(f"20270314T05{minute:02d}00Z-{process or minute}", moment, moment, process)


def control(identifier: str, result: str = "pass", detail: str = "", **more: Any) -> dict[str, Any]:
    about = {"title": f"The {identifier}", "domain": "sysctl", "severity": "high", "references": [f"CIS {identifier}"]}
    return {"id": identifier, **about, "result": result, "detail": detail, **more}


def reported(node: str, *results: str | dict[str, Any], **more: Any) -> Seen:
    """A node's report: "c1" passes, "c1=failed" fails."""
    controls = []
    for each in results:
        if isinstance(each, str):
            identifier, _, result = each.partition("=")
            detail = "" if result in ("", "pass") else f"because of {identifier}"
            controls.append(control(identifier, result or "pass", detail))
        else:
            controls.append(each)
    return Seen(node, "reported", result={"controls": controls, "mode": "apply", "profile": "cis_level1", **more})


def ended(old: Any, run: Run, *found: Seen, expected: tuple[str, ...] = ("n1", "n2"), **more: Any) -> tuple[Any, bool]:
    return end(old, run, found, expected, "lab", **more)


def node(report: Any, name: str) -> Any:
    return next(each for each in report["nodes"] if each["name"] == name)


def entry(report: Any, identifier: str) -> Any:
    return next(each for each in report["controls"] if each["id"] == identifier)


def without_times(report: Any) -> Any:
    """The report without what every look moves on."""
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "T", json.dumps(report))
    plain = json.loads(re.sub(r"2027\d{4}T\d{6}Z-\w+", "RUN", text))
    for each in (plain, *plain["history"]):
        each.pop("runs", None)
    return plain


# -- what came of a node


@pytest.mark.parametrize(
    ("report", "failure", "removed", "state", "why"),
    [
        ({"controls": []}, None, False, "reported", ""),
        ({"controls": [], "failed": True, "msg": "2 controls do not hold"}, None, True, "reported", ""),
        ({"unreachable": True, "msg": "no route"}, None, True, "unreachable", "no route"),
        ({"failed": True, "msg": "dpkg is locked by 4711"}, {"msg": "x"}, True, "no_report", "dpkg is locked by 4711"),
        (None, {"msg": "no python3"}, True, "no_report", "failed before its hardening: Prepare: no python3"),
        (None, {"unreachable": True, "msg": "gone"}, True, "unreachable", "gone"),
        (None, None, True, "unreachable", "it did not answer before its hardening"),
        ({"begun": True, "changed": False}, None, True, "unreachable", "it did not answer before its hardening"),
        ({"begun": True}, {"msg": "no python3"}, True, "no_report", "failed before its hardening: Prepare: no python3"),
        ({"controls": [{"id": "a"}]}, None, False, "no_report", "its report has controls without id or result"),
        (None, None, False, "no_report", "the run did not come to its hardening"),
        ({"skipped": True}, None, False, "no_report", "its hardening was skipped by a condition"),
        ({"censored": "hidden", "changed": False}, None, False, "no_report", "its report is hidden by no_log"),
    ],
)
def test_each_node_is_something(report: Any, failure: Any, removed: bool, state: str, why: str) -> None:
    found = seen("n1", report, failure, removed, "Prepare")
    assert found.state == state
    assert found.why.startswith(why)
    assert bool(found.why) == (state != "reported")


def test_node_without_report_is_told_and_its_old_results_count_nowhere() -> None:
    first, _ = ended(None, at(0), reported("n1", "c1"), reported("n2", "c1", "c2=failed"))
    assert first["verdict"] == {"level": "bad", "text": "1 control does not hold, on 1 of 2 nodes."}
    second, differs = ended(first, at(1), reported("n1", "c1"), Seen("n2", "unreachable", "no route"))
    assert differs
    assert second["verdict"] == {"level": "bad", "text": "1 node gave no report."}
    lost = node(second, "n2")
    assert (lost["state"], lost["why"], lost["observed"]) == ("unreachable", "no route", at(0).at)
    assert lost["counts"]["failed"] == 1
    assert second["totals"]["results"] == {"pass": 1, "failed": 0, "excluded": 0, "not_applicable": 0}
    assert entry(second, "c2")["failed_on"] == []
    metrics = documents.metrics(second)
    assert 'hardening_node_reported{environment="lab",node="n2"} 0' in metrics
    assert 'hardening_control_failed{environment="lab",node="n2"' not in metrics
    assert "no route" in documents.html(second)
    assert any("unreachable: no route" in line for line in documents.summary(second))
    # Back again with the same results: nothing is new on it.
    third, differs = ended(second, at(2), reported("n1", "c1"), reported("n2", "c1", "c2=failed"))
    assert differs
    assert node(third, "n2")["trend"] == node(first, "n2")["trend"]


def test_limited_run_keeps_the_other_nodes_and_says_that_they_are_of_before() -> None:
    first, _ = ended(None, at(0), reported("n1", "c1"), reported("n2", "c1"))
    assert first["verdict"] == {"level": "good", "text": "All controls hold on all 2 nodes."}
    second, differs = ended(first, at(1), reported("n1", "c1"), expected=("n1", "n2", "n3"))
    assert differs, "there is a node that never reported"
    assert [(n["name"], n["state"], n["observed"]) for n in second["nodes"]] == [
        ("n1", "reported", at(1).at),
        ("n2", "earlier", at(0).at),
        ("n3", "never", None),
    ]
    assert second["verdict"] == {"level": "warn", "text": "All controls hold; 2 nodes were not in the last run."}
    assert second["totals"]["results"]["pass"] == 2
    _, again = ended(second, at(2), reported("n2", "c1"), expected=("n1", "n2", "n3"))
    assert not again
    gone, differs = ended(second, at(2), reported("n1", "c1"), expected=("n1",))
    assert differs
    assert [n["name"] for n in gone["nodes"]] == ["n1"]


def test_nothing_judged_is_not_good() -> None:
    report, _ = ended(None, at(0), reported("n1", "c1=not_applicable"), expected=("n1",))
    assert report["verdict"]["level"] == "warn"


# -- trend


def test_trend_of_a_node() -> None:
    before = reported("n1", "a", "b", "c=failed", "d=failed", "e", "f", "g=excluded", expected=("n1",))
    after = reported("n1", "a", "b=failed", "c", "d=excluded", "e=not_applicable", "g", "h=failed", "i")
    first, _ = ended(None, at(0), before, expected=("n1",))
    assert node(first, "n1")["trend"] == {
        "at": None,
        "against": None,
        **{name: [] for name in TRENDS},
        "unchanged": 7,
    }
    second, differs = ended(first, at(1), after, expected=("n1",))
    assert differs
    expected = {
        "at": at(1).at,
        "against": at(0).at,
        "newly_failed": ["b", "h"],
        "newly_passing": ["c"],
        "left_out": ["d", "e"],
        "added": ["g", "i"],
        "removed": ["f"],
        "unchanged": 1,
    }
    assert node(second, "n1")["trend"] == expected
    assert entry(second, "b")["trend"] == {"newly_failed": ["n1"], "newly_passing": [], "left_out": []}
    metrics = documents.metrics(second)
    assert 'hardening_controls_differing{environment="lab",node="n1",trend="newly_failed"} 2' in metrics
    # The next look finds the same: what failed on Monday is still new on Tuesday, with Monday's date.
    third, differs = ended(second, at(2), after, expected=("n1",))
    assert not differs
    assert node(third, "n1")["trend"] == expected
    assert (third["since"], third["observed"], third["runs"]) == (at(1).at, at(2).at, 2)


def test_second_run_with_the_same_results_moves_times_on_and_nothing_else(tmp_path: Path) -> None:
    found = reported("n1", "a", "b=failed"), reported("n2", "a", control("b", "excluded", "the bastion forwards"))
    first, differs = ended(None, at(0), *found)
    assert differs
    second, differs = ended(first, at(9), *found)
    assert not differs
    assert without_times(second) == without_times(first)
    assert first["history"][0]["until"] == at(0).at
    assert [(h["at"], h["until"], h["runs"]) for h in second["history"]] == [(at(0).at, at(9).at, 2)]
    assert set(files.plan(second, ["x.json"], 5, entry=differs).write) == {
        "index.html",
        "hardening.prom",
        "report.json",
    }


def test_what_an_apply_changed_passes_and_is_told_as_repaired() -> None:
    broken = control("b", "changed", "it was 1", diff=[{"what": "/etc/b", "before": "b=1", "after": "b=0"}])
    first, _ = ended(None, at(0), reported("n1", "a", broken, run="R1"), expected=("n1",))
    found = node(first, "n1")["controls"][1]
    assert (found["result"], found["repaired"]["at"], found["repaired"]["detail"]) == ("pass", at(0).at, "it was 1")
    assert node(first, "n1")["applied"] == "R1"
    assert first["history"][0]["repaired"] == 1
    # The second run of a converged node differs in nothing.
    second, differs = ended(first, at(1), reported("n1", "a", "b", run=""), expected=("n1",))
    assert not differs
    assert without_times(second) == without_times(first)
    # Drift that is repaired is a state of its own, though the control holds before and after.
    third, differs = ended(second, at(2), reported("n1", "a", broken, run="R3"), expected=("n1",))
    assert differs
    assert [h["repaired"] for h in third["history"]] == [1, 1]
    assert 'hardening_control_repaired_timestamp_seconds{environment="lab",node="n1",control="b"} 1805000520' in (
        documents.metrics(third)
    )
    page = documents.html(third)
    assert "1 repaired" in page
    assert "<del>b=1</del><ins>b=0</ins>" in page
    fourth, _ = ended(third, at(3), reported("n1", "a", "b=failed"), expected=("n1",))
    assert "repaired" not in node(fourth, "n1")["controls"][1]


def test_batches_of_one_run_are_one_run() -> None:
    one, two = at(1, "p"), at(2, "p")
    old, _ = ended(None, at(0, "o"), reported("n1", "a"), reported("n2", "a"))
    begun = begin(old, one, ["n1", "n2"], "lab")
    first, differs = ended(begun, at(1, "p"), reported("n1", control("a", "changed", "was off")))
    assert differs
    assert (first["begun"], node(first, "n2")["state"]) == ({}, "earlier")
    again = begin(first, two, ["n1", "n2"], "lab")
    assert list(again["begun"]) == [one.id]
    second, _ = ended(again, two, reported("n1", control("a", "changed", "was off")), reported("n2", "a=failed"))
    assert [h["run"] for h in second["history"]] == [at(0, "o").id, one.id]
    assert (second["history"][-1]["repaired"], second["history"][-1]["failed"]) == (1, 1)
    assert second["run"]["began"] == one.began
    assert node(second, "n1")["controls"][0]["repaired"]["at"] == at(1).at


def test_run_that_ended_without_a_result_is_told_for_its_nodes() -> None:
    first, _ = ended(None, at(0), reported("n1", "a"), reported("n2", "a"))
    begun = begin(first, at(1, "p"), ["n2"], "lab")
    assert node(begun, "n2")["state"] == "reported"
    assert "A run that began has left no result yet" in documents.html(begun)
    assert any("has left no result yet" in line for line in documents.summary(begun))
    start = re.search(r"run_start_timestamp_seconds\S* (\d+)\n", documents.metrics(begun))
    stop = re.search(r"run_end_timestamp_seconds\S* (\d+)\n", documents.metrics(begun))
    assert start
    assert stop
    assert int(start[1]) - int(stop[1]) == 60
    # Another run begins while that one may go on; then its process is no more.
    still = begin(begun, at(2, "q"), ["n1"], "lab")
    assert len(still["begun"]) == 2
    second, differs = ended(still, at(2, "q"), reported("n1", "a"), over=[at(1, "p").id])
    assert differs
    assert (second["begun"], node(second, "n2")["state"]) == ({}, "no_report")
    assert at(1).began in node(second, "n2")["why"]
    assert [h["ended"] for h in second["history"]] == [True, False, True]
    assert "ended without a result" in documents.html(second)


def test_history_is_bounded(tmp_path: Path) -> None:
    report: Any = None
    for minute in range(7):
        result = "failed" if minute % 2 else "pass"
        report, differs = ended(report, at(minute), reported("n1", f"a={result}"), expected=("n1",), keep=3)
        files.apply(str(tmp_path), files.plan(report, files.kept(str(tmp_path)), 3, entry=differs))
    assert [h["at"] for h in report["history"]] == [at(m).at for m in range(4, 7)]
    assert files.kept(str(tmp_path)) == tuple(f"{at(m).id}.json" for m in range(4, 7))
    old = json.loads((tmp_path / "history" / f"{at(5).id}.json").read_text())
    assert node(old, "n1")["controls"] == [{"id": "a", "result": "failed", "detail": "because of a"}]
    for minute in range(7, 30):
        report = begin(report, at(minute, f"p{minute}"), ["n1"], "lab", over=list(report["begun"]), keep=4)
    assert len(report["history"]) == 4


# -- documents


@pytest.fixture(scope="module")
def hostile() -> Any:
    """Every text of a report is somebody else's, and tries."""
    diff = [{"what": HOSTILE, "before": HOSTILE, "after": HOSTILE}]
    controls = [
        control("c1", "failed", HOSTILE, diff=diff) | {"title": HOSTILE, "references": [HOSTILE], "domain": HOSTILE},
        control("c2", "excluded", HOSTILE),
        control("c3", "changed", HOSTILE, diff=diff),
        control("c4", "not_applicable", HOSTILE),
    ]
    first, _ = ended(None, at(0), reported("n1", "c1"), Seen("n2", "unreachable", HOSTILE))
    report = begin(first, at(1, "p"), ["n1", HOSTILE], "lab")
    return ended(report, at(2, "q"), reported("n1", *controls, profile=HOSTILE), Seen("n2", "no_report", HOSTILE))[0]


def page_of(report: Any) -> ElementTree.Element:
    return ElementTree.fromstring(documents.html(report))


def test_page_is_well_formed_and_hostile_text_stays_text(hostile: Any) -> None:
    page = page_of(hostile)
    tags = {element.tag for element in page.iter()}
    assert not tags & {"script", "img", "iframe", "link", "form", "object"}
    assert not [name for element in page.iter() for name in element.attrib if name.startswith("on") or name == "style"]
    text = "".join(page.itertext())
    assert 'document.title="owned"' in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text + "".join(documents.summary(hostile)))
    targets = {element.attrib["id"] for element in page.iter() if "id" in element.attrib}
    links = [element.attrib["href"] for element in page.iter("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert [link for link in links if not link.startswith("#")] == ["report.json", "hardening.prom"]


def test_page_can_be_read_without_seeing_it(hostile: Any) -> None:
    page = page_of(hostile)
    assert page.attrib["lang"] == "en"
    assert all(header.attrib.get("scope") for header in page.iter("th"))
    assert all(table.find("caption") is not None for table in page.iter("table"))
    ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    levels = [int(element.tag[1]) for element in page.iter() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    labelled = [section.attrib["aria-labelledby"] for section in page.iter("section")]
    assert set(labelled) <= set(ids)
    # The policy lets this style in and nothing else.
    policy = next(m for m in page.iter("meta") if m.attrib.get("http-equiv")).attrib["content"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_page_says_reasons_trend_and_each_control(hostile: Any) -> None:
    found = (
        reported("n1", "a", "b=failed", control("c", "excluded", "others jump through the bastion")),
        reported("n2", "a=failed", "b", control("c", "not_applicable", "the container's kernel is the machine's")),
    )
    before, _ = ended(None, at(0), reported("n1", "a", "b", "c"), reported("n2", "a=failed", "b", "c"))
    report, _ = ended(before, at(1), *found)
    text = " ".join("".join(page_of(report).itertext()).split())
    assert "2 controls do not hold, on 2 of 2 nodes." in text
    assert "newly failed The b b" in text
    assert "no longer held The c c" in text
    assert "others jump through the bastion on n1" in text
    assert "the container's kernel is the machine's on n2" in text
    assert "n1 new: because of b" in text
    assert "Holds on n2" in text
    assert "no report" in "".join(page_of(hostile).itertext())


def test_page_tells_the_same_change_of_many_nodes_once() -> None:
    names = tuple(f"n{i}" for i in range(9))
    first, _ = ended(None, at(0), *[reported(name, "a", "b") for name in names], expected=names)
    assert documents.changes(first) == []
    broken = control("b", "changed", "it was 1")
    found = [reported(name, "a=failed", "b" if name == "n3" else broken) for name in names]
    second, _ = ended(first, at(1), *found, expected=names)
    assert [(c["nodes"], len(c["repaired"])) for c in documents.changes(second)] == [
        (["n3"], 0),
        ([name for name in names if name != "n3"], 1),
    ]


def test_style_is_the_runbooks() -> None:
    """The collection comes without the runbooks' package, so it has the palette twice."""
    palette = re.compile(r"--[\w-]+: #\w+")
    own, other = (
        palette.findall(path.read_text())
        for path in (Path(documents.__file__).parent / "page.css", ROOT / "runbooks/templates/style.css")
    )
    assert own == other


def lint(text: str) -> dict[str, list[dict[str, str]]]:
    """Samples by metric, after the text format's rules and Prometheus' naming conventions (promtool check metrics)."""
    found: dict[str, list[dict[str, str]]] = {}
    kind: dict[str, str] = {}
    current = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if match := re.fullmatch(r"# HELP (\w+) (\S.*)", line):
            assert match[1] not in found, "a metric's samples stand together"
            current = match[1]
            found[current] = []
        elif match := re.fullmatch(r"# TYPE (\w+) (\w+)", line):
            assert match[1] == current
            kind[current] = match[2]
        else:
            match = re.fullmatch(r"(\w+)\{(.*)\} (-?\d+(?:\.\d+)?)", line)
            assert match, line
            assert match[1] == current
            labels = dict(re.findall(r'(\w+)="((?:[^"\\\n]|\\["\\n])*)"', match[2]))
            assert ",".join(f'{k}="{v}"' for k, v in labels.items()) == match[2]
            assert not set(labels) & {"instance", "job", "le", "quantile"}
            assert labels not in found[current], "each series once"
            found[current].append(labels)
    assert set(kind.values()) == {"gauge"}
    for name in found:
        assert re.fullmatch(r"hardening(_[a-z]+)+", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info", "_gauge"))
        assert not re.search(r"_(ms|milliseconds|minutes|hours|days|percent)(_|$)", name)
        assert ("timestamp" in name) == name.endswith("_timestamp_seconds")
    return found


def test_metrics(hostile: Any) -> None:
    assert 'environment="lab"' in documents.metrics(hostile)
    lint(documents.metrics(hostile))
    report, _ = end(None, at(0), [reported('n"1\\', "a", "b=failed")], ['n"1\\', "n2"], "lab\n2")
    found = lint(documents.metrics(report))
    assert found["hardening_node_reported"] == [
        {"environment": "lab\\n2", "node": 'n\\"1\\\\'},
        {"environment": "lab\\n2", "node": "n2"},
    ]
    assert [labels["control"] for labels in found["hardening_control_failed"]] == ["a", "b"]
    assert len(found["hardening_controls"]) == 4
    lint(documents.metrics(begin(None, at(0, "p"), ["n1"], "lab")))


def test_empty_report_has_its_page() -> None:
    report = begin(None, at(0, "p"), ["n1"], "lab")
    assert "No run has ended yet" in "".join(page_of(report).itertext())
    assert report["verdict"] == {"level": "warn", "text": "No node has reported yet."}
    assert documents.summary(report)[0] == "lab: No node has reported yet."


def test_summary_names_what_fails_and_stops() -> None:
    report, _ = ended(None, at(0), reported("n1", *[f"c{i}=failed" for i in range(30)]), expected=("n1",))
    lines = documents.summary(report, most=5)
    assert sum("FAILED" in line for line in lines) == 5
    assert lines[-1].strip() == "and 25 more, in the page"


# -- secrets


@pytest.mark.parametrize(
    "text",
    [
        f"password={CANARY}",
        f"DB_PASSWORD: '{CANARY} and more'",
        f'"api_key": "{CANARY}"',
        f"requirepass {CANARY}",
        f"postgresql://app:{CANARY}@db/census",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n-----END OPENSSH PRIVATE KEY-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}",
        f"Authorization: Bearer {CANARY}",
        "root:$y$j9T$xyzzycanary4711xyzzycanary4711$abcdefghijkl/xyz.:19000:0:99999:7:::",
        "root:$6$xyzzycanary4711$abcdefghijkl/xyz.:19000:0:99999:7:::",
        "password_pbkdf2 root grub.pbkdf2.sha512.10000.xyzzycanary4711",
        "AKIAXYZZYCANARY4711A",
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    shown = redact(text, [CANARY] if text.startswith("requirepass") else [])
    assert HIDDEN in shown
    assert "canary" not in shown.lower()


@pytest.mark.parametrize(
    "text",
    [
        "PasswordAuthentication: yes, not no",
        "PermitEmptyPasswords=no",
        "PASS_MAX_DAYS 99999, not 365",
        "/etc/pam.d/common-password: password required pam_unix.so",
        "passwordauthentication yes",
        "net.ipv4.conf.all.rp_filter = 0",
    ],
)
def test_what_is_a_setting_is_not(text: str) -> None:
    assert redact(text) == text


def test_canary_is_in_no_document(tmp_path: Path) -> None:
    loose = f"the file says {CANARY} somewhere"
    diff = [{"what": loose, "before": f"password={CANARY}", "after": loose}]
    controls = [
        control("c1", "failed", loose, diff=diff) | {"title": loose, "references": [loose]},
        control("c2", "excluded", loose),
        control("c3", "changed", f"secret: {CANARY}", diff=diff),
        control("c4", "not_applicable", loose),
    ]
    report, differs = ended(
        None, at(0), reported("n1", *controls, profile=loose), Seen("n2", "no_report", loose), secrets=[CANARY]
    )
    files.apply(str(tmp_path), files.plan(report, (), 5, entry=differs, copy=str(tmp_path / "x.prom")))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5
    for path in written:
        assert CANARY not in path.read_text()
    assert CANARY not in "".join(documents.summary(report))
    assert HIDDEN in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "piece", ["x", "a.", "passw", "token ", "a://", "secret: '", "-----BEGIN ", "$6$", "eyJ", "\n"]
)
def test_long_texts_are_cut_in_time(piece: str) -> None:
    began = time.process_time()
    assert len(cleaned(piece * (200_000 // len(piece)))) <= LONGEST
    assert time.process_time() - began < 2


def test_differences_are_cut() -> None:
    diff = [{"what": "f", "before": "line\n" * 500, "after": ""}] * 40
    report, _ = ended(None, at(0), reported("n1", control("a", "failed", "x", diff=diff)), expected=("n1",))
    kept = node(report, "n1")["controls"][0]["diff"]
    assert len(kept) == 12
    assert kept[0]["before"].count("\n") <= 24


# -- the directory


def test_files_are_whole_private_and_the_metrics_are_for_all(tmp_path: Path) -> None:
    place, copy = tmp_path / "evidence", tmp_path / "textfile.prom"
    report, _ = ended(None, at(0), reported("n1", "a"))
    with files.locked(str(place)):
        files.apply(str(place), files.plan(report, (), 5, entry=True, copy=str(copy)))
    modes = {path.name: path.stat().st_mode & 0o777 for path in [place, copy, *place.iterdir()]}
    assert modes == {
        "evidence": 0o700,
        "textfile.prom": 0o644,
        ".lock": 0o600,
        "history": 0o700,
        "index.html": 0o600,
        "report.json": 0o600,
        "hardening.prom": 0o644,
    }
    assert files.read(str(place)) == report
    assert copy.read_text() == (place / "hardening.prom").read_text()


@pytest.mark.parametrize("content", ["{", "[]", "", '{"schema": 1}', '{"schema": 1, "begun": 3, "nodes": [{}]}'])
def test_report_that_is_none_is_refused_and_left(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(EvidenceError, match="Put it away"):
        files.read(str(tmp_path))
    assert (tmp_path / "report.json").read_text() == content


def test_report_of_another_environment_or_schema_is_refused() -> None:
    report, _ = ended(None, at(0), reported("n1", "a"))
    with pytest.raises(EvidenceError, match="of the environment 'lab', not of 'production'"):
        end(report, at(1), [], [], "production")
    with pytest.raises(EvidenceError, match="schema"):
        begin({**report, "schema": 99}, at(1), [], "lab")
    with pytest.raises(EvidenceError, match="'broken'"):
        ended(report, at(1), reported("n1", "a=broken"))


def test_full_disk_leaves_the_old_report_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = ended(None, at(0), reported("n1", "a"))
    files.apply(str(tmp_path), files.plan(first, (), 5, entry=True))
    second, _ = ended(first, at(1), reported("n1", "a=failed"))
    planned = files.plan(second, files.kept(str(tmp_path)), 5, entry=True)

    def full(path: Path, text: str, mode: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(EvidenceError, match=r"cannot be written: No space left on device; see df -h"):
        files.apply(str(tmp_path), planned)
    assert files.read(str(tmp_path)) == first


def test_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvidenceError, match="cannot be written"), files.locked(str(tmp_path / "file/evidence")):
        raise AssertionError("held")


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def other() -> None:
        with files.locked(str(tmp_path)):
            order.append("second")

    with files.locked(str(tmp_path)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_lock_that_is_never_given_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT_S", 0.2)
    with (
        files.locked(str(tmp_path)),
        pytest.raises(EvidenceError, match="already running here"),
        files.locked(str(tmp_path)),
    ):
        raise AssertionError("held twice")


def test_process_is_over_when_it_is(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = files.process(child.pid)
    began = at(0).at
    begun = {
        "here": {"began": began, "process": name},
        "elsewhere": {"began": began, "process": f"elsewhere/boot/{child.pid}/1"},
    }
    assert name
    assert files.over(begun, unix(began) + 80_000) == []
    child.communicate(b"\n")
    assert files.over(begun, unix(began) + 80_000) == ["here"]
    assert files.over(begun, unix(began) + 90_000) == ["here", "elsewhere"]
    assert files.process(child.pid) == ""


def test_run_whose_end_nobody_could_tell_is_not_noted() -> None:
    assert begin(None, at(0), ["n1"], "lab")["begun"] == {}


def test_directory_when_nobody_says() -> None:
    assert files.default_directory("lab", {"XDG_STATE_HOME": "/s", "HOME": "/h"}) == "/s/censuschat-infra/lab/hardening"
    assert files.default_directory("lab", {"HOME": "/h"}) == "/h/.local/state/censuschat-infra/lab/hardening"


# -- with Ansible

TASKS = """
- hosts: nodes
  gather_facts: false
  module_defaults:
    censuschat.infra.hardening_evidence:
      environment_name: unit
      directory: "{{ place }}/evidence"
      metrics: "{{ place }}/textfile.prom"
  tasks:
    - name: Begin
      censuschat.infra.hardening_evidence:
        state: begun
      run_once: true
      register: hardening_report
    - block:
        - name: Prepare
          ansible.builtin.command: "{{ prepare | default('true') }}"
          check_mode: false
        - name: Report
          ansible.builtin.set_fact:
            hardening_report: "{{ {'controls': controls, 'mode': 'apply', 'profile': 'baseline', 'run': ''} }}"
        - name: Hold
          ansible.builtin.fail:
            msg: controls do not hold
          when: controls | selectattr('result', 'equalto', 'failed') | list | length > 0
      rescue:
        - name: Stay failed
          ansible.builtin.fail:
            msg: see above
      always:
        - name: Keep
          censuschat.infra.hardening_evidence:
            expected: "{{ groups['nodes'] }}"
          run_once: true
"""


def ansible(playbook: Path, *options: str) -> dict[str, Any]:
    """What the JSON callback says of a run."""
    done = subprocess.run(
        [BIN / "ansible-playbook", playbook, *options],
        cwd=ROOT,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "{" in done.stdout, done.stderr
    data: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]
    return data


@pytest.fixture
def harden(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a play as playbooks/harden.yml is, with reports that the inventory gives; returns the callback's data."""
    passing = [control("a", "pass"), control("b", "excluded", "others jump through it")]
    failing = [control("a", "failed", f"the file says {CANARY}"), control("b", "pass")]
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "controls": passing}
    far = {"ansible_host": "127.0.0.1", "ansible_port": 9}
    hosts = {"lost": far, "broken": {**local, "prepare": "false"}, "bad": {**local, "controls": failing}, "good": local}
    inventory = {"all": {"children": {"nodes": {"hosts": hosts}}, "vars": {"place": str(tmp_path)}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    (tmp_path / "password").write_text("of the vault")
    vaulted = VaultLib([("default", VaultSecret(b"of the vault"))]).encrypt(CANARY).decode()
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars/all.yml").write_text("spoken: !vault |\n" + textwrap.indent(vaulted, "  "))
    (tmp_path / "play.yml").write_text(TASKS)

    unlocked = ("--vault-password-file", str(tmp_path / "password"))
    return functools.partial(ansible, tmp_path / "play.yml", "-i", str(tmp_path / "hosts.yml"), *unlocked)


def kept(data: dict[str, Any]) -> dict[str, Any]:
    """The result of the task that keeps the evidence."""
    [task] = [t for play in data["plays"] for t in play["tasks"] if t["task"]["name"] == "Keep"]
    [result] = task["hosts"].values()
    return dict(result)


def test_play(harden: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    place = tmp_path / "evidence"
    planned = kept(harden("--check"))
    assert not place.exists(), "check mode wrote"
    assert planned["changed"]
    assert {Path(p).name for p in planned["would_write"]} >= {"index.html", "report.json", "textfile.prom"}
    assert any("good" in line for line in planned["summary"])

    first = harden()
    assert kept(first)["changed"]
    assert {name: (s["failures"], s["unreachable"]) for name, s in first["stats"].items()} == {
        "lost": (0, 1),
        "broken": (1, 0),
        "bad": (1, 0),
        "good": (0, 0),
    }
    report = files.read(str(place))
    assert report
    assert {n["name"]: n["state"] for n in report["nodes"]} == {
        "bad": "reported",
        "broken": "no_report",
        "good": "reported",
        "lost": "unreachable",
    }
    assert "Prepare" in node(report, "broken")["why"]
    assert report["begun"] == {}
    assert CANARY not in "".join(path.read_text() for path in place.rglob("*") if path.is_file())
    assert CANARY not in json.dumps(kept(first))
    lint((tmp_path / "textfile.prom").read_text())

    second = kept(harden())
    assert not second["changed"]
    again = files.read(str(place))
    assert again
    assert (again["runs"], again["since"]) == (2, report["since"])

    # Nothing is reached, so no task comes to the end: the page says that the run left nothing, the next run for whom.
    harden("-l", "lost")
    assert "has left no result yet" in (place / "index.html").read_text()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    limited = kept(harden("-l", "good", "--check"))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert any("lost" in line and "ended without a result" in line for line in limited["summary"])


def test_bad_input(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"environment_name": "../lab"}, "is no name"),
        ({"keep": 1}, "a trend needs 2 at least"),
        ({"metrics": "/somewhere/hardening.txt"}, "end in .prom only"),
        ({"state": "shown"}, "there is none in"),
        ({"state": "absent"}, "value of state must be one of"),
    ]
    given = {"environment_name": "unit", "directory": str(tmp_path / "none")}
    tasks = [{"censuschat.infra.hardening_evidence": given | case, "ignore_errors": True} for case, _ in cases]
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    data = ansible(tmp_path / "play.yml", "-i", "localhost,")
    said = [task["hosts"]["localhost"]["msg"] for task in data["plays"][0]["tasks"]]
    for (_, sentence), message in zip(cases, said, strict=True):
        assert sentence in message
    assert not (tmp_path / "none").exists()
