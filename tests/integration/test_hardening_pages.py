"""The evidence of a real node's hardening, and its page in a real browser: accessible, escaped, also on a phone."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence import files
from ansible_collections.censuschat.infra.plugins.plugin_utils.evidence.report import Run, Seen, begin, end
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, expect, sync_playwright

from lab.paths import REPO
from lab.topology import Topology
from tests.browser import DESKTOP, FLAGS, PHONE
from tests.integration.trial import NODE, play

HOSTILE = '</code><script>document.title="owned"</script><img src=x onerror="document.title=1">'
DOMAINS = ("sysctl", "sshd", "permissions", "kernel_modules")


def run(day: int) -> Run:
    moment = f"2027-03-{day:02d}T05:00:00Z"
    return Run(f"202703{day:02d}T050000Z-{day}", moment, moment, f"process-{day}")


def result(number: int, result_: str, detail: str, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{DOMAINS[number % 4]}_{number}",
        "title": f"Keep the thing number {number} of the node as the profile wants it",
        "domain": DOMAINS[number % 4],
        "severity": ("high", "medium", "low")[number % 3],
        "references": [f"CIS Debian 12 {number}.1", "ANSSI BP-028 R5"],
        "result": result_,
        "detail": detail,
        **more,
    }


def made(directory: Path) -> Path:
    """An environment that had some days: all states of nodes, all results, all trends, and hostile text."""
    long = "/etc/" + "a_directory_with_a_very_long_name_and_no_space/" * 6
    diff = [{"what": long, "before": "net.ipv4.conf.all.rp_filter = 0", "after": "net.ipv4.conf.all.rp_filter = 2"}]
    report: dict[str, Any] | None = None
    for day in range(1, 8):
        found = []
        for name in ("use1-app1", "use1-app2", "use1-db1", "usw2-db1"):
            controls = [result(n, "pass", "") for n in range(40)]
            controls[3] = result(3, "excluded", "this is the bastion, others jump through it")
            controls[4] = result(4, "not_applicable", "in a container the kernel is the machine's")
            if day % 2 == 0:
                controls[5] = result(5, "changed", "was 0", diff=diff)
            if day > 5 and name.startswith("use1"):
                controls[6] = result(6, "failed", f"{long} is world-writable", diff=diff)
                controls[7] = result(7, "failed", HOSTILE) | {"title": HOSTILE}
            found.append(
                Seen(name, "reported", result={"controls": controls, "mode": "apply", "profile": "cis_level1"})
            )
        if day == 7:
            found[1:3] = [
                Seen("use1-app2", "unreachable", f"ssh: connect to host {HOSTILE} port 22: No route to host"),
                Seen("use1-db1", "no_report", "failed before its hardening: the dpkg lock is held by apt-get (4711)"),
            ]
        expected = [f"use1-app{n}" for n in (1, 2, 3)] + ["use1-db1", "usw2-db1"]
        report, differs = end(report, run(day), found, expected, "lab")
        files.apply(str(directory), files.plan(report, files.kept(str(directory)), 50, entry=differs))
    report = begin(report, run(8), ["use1-app3"], "lab")
    files.apply(str(directory), files.plan(report, (), 50, entry=False))
    return directory / files.PAGE


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_accessible_and_not_wider_than_the_screen(page_file: Path, browser: Browser, size: dict[str, Any]) -> None:
    with closing(browser.new_context(**size)) as context:
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(each => Number(each.tagName[1]))")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
        assert asked == [page_file.as_uri()]


def test_hostile_text_stays_text_and_the_policy_holds(page_file: Path, browser: Browser) -> None:
    with closing(browser.new_context(**DESKTOP)) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.wait_for_timeout(100)
        assert page.title().startswith("Hardening of lab")
        assert page.locator("script, img").count() == 0
        expect(page.get_by_text('document.title="owned"').first).to_be_attached()
        assert page.evaluate("getComputedStyle(document.querySelector('.verdict')).borderLeftStyle") == "solid"
        page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; "
            "document.body.append(s); }"
        )
        assert page.title() != "1"


def test_by_keyboard_and_on_paper(page_file: Path, browser: Browser) -> None:
    with closing(browser.new_context(**DESKTOP)) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
        expect(page.get_by_text("Skip to the report")).to_be_in_viewport()
        page.get_by_text("sshd: 10").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_text("On how many nodes each control of sshd holds")).to_be_visible()
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        expect(page.get_by_role("navigation")).to_be_hidden()
        expect(page.get_by_text("On how many nodes each control of sysctl holds")).to_be_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_report_is_what_the_node_said(running_lab: Topology, tmp_path: Path) -> None:
    place = tmp_path / "evidence"
    options = ("-e", f"hardening_evidence_directory={place}", "-e", "hardening_audit_only=true")
    planned = play(REPO / "playbooks/harden.yml", *options, "--check")
    assert planned.code == 0, planned.text[-3000:]
    assert not place.exists(), "check mode wrote"
    first = play(REPO / "playbooks/harden.yml", *options)
    assert first.code == 0, first.text[-3000:]
    report = json.loads((place / "report.json").read_text())
    nodes = {node["name"]: node for node in report["nodes"]}
    assert nodes[NODE]["state"] == "reported"
    assert {c["id"]: c["result"] for c in nodes[NODE]["controls"]} == first.controls()
    # The others of the inventory are not in this run, and are there.
    assert {node["state"] for name, node in nodes.items() if name != NODE} <= {"never"}
    assert f'hardening_node_reported{{environment="lab",node="{NODE}"}} 1' in (place / "hardening.prom").read_text()
    second = play(REPO / "playbooks/harden.yml", *options)
    assert (second.code, second.changed) == (0, 0)
    again = json.loads((place / "report.json").read_text())
    assert (again["runs"], again["since"]) == (2, report["since"])
