"""The report and the console in a real browser: accessible, escaped, live, by keyboard, on a phone and on paper."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from runbooks import report
from runbooks.journal import Journal, remember
from tests.browser import DESKTOP, FLAGS, PHONE
from tests.local_postgresql import LocalPostgreSQL
from tests.unit.runbook import past
from tests.unit.runbook.place import INVENTORY, ROOT, Place, make_place

EVIL, FULL, DEAD, DONE = "20270314-050000-paint-evil", "20270314-021500-paint-full", "r-dead", "r-done"


@dataclass
class Console:
    """A console process, and the runs that it shows."""

    place: Place
    process: subprocess.Popen[str]
    url: str
    link: str

    def next_link(self) -> str:
        """The link that it shows when one was used."""
        assert self.process.stdout
        self.link = json.loads(self.process.stdout.readline())["enter"]
        return self.link


expect.set_options(timeout=60_000)
"""A machine that is busy with other tests needs longer; nobody waits longer than it takes."""


def serve(place: Place, *words: str) -> Console:
    command = [sys.executable, "-m", "runbooks", "serve", "--port", "0", "--json", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=place.environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = json.loads(process.stdout.readline())
    return Console(place, process, said["url"], said["enter"])


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    directory = tmp_path_factory.mktemp("place")
    place = make_place(directory)
    place.environment["XDG_CONFIG_HOME"] = str(directory / "config")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "RUNBOOK_DEFINITIONS", "RUNBOOK_TEST_PLACE"):
            patch.setenv(name, place.environment[name])
        with closing(Journal(directory / "runs", "unit")) as journal:
            past.full(journal)
            past.hostile(journal)
            past.ended(journal, DONE, "succeeded")
            past.dead(journal, DEAD)
            remember("unit", journal.directory)
            # What `runbook report` writes: the same page as a file.
            for run in (FULL, EVIL, DEAD):
                runbook, _ = report.definition_of("paint")
                environment, _ = report.environment_of(str(INVENTORY))
                report.write(report.build(journal, run, runbook, environment))
        started = serve(place)
        yield started
        started.process.terminate()
        assert started.process.wait(timeout=10) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def session(console: Console, browser: Browser) -> Any:
    """What a browser keeps that was let in."""
    context = browser.new_context()
    page = context.new_page()
    used = console.link
    page.goto(used)
    page.wait_for_url(console.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("Runs")
    state = context.storage_state()
    [cookie] = state["cookies"]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    context.close()
    # The link is used up, for another browser and for this one.
    assert console.next_link() != used
    stranger = browser.new_context().new_page()
    for path in (used, console.url, f"{console.url}runs/{FULL}"):
        answer = stranger.goto(path)
        assert answer
        assert answer.status == 401
    assert "Open the link that the console shows" in stranger.inner_text("body")
    stranger.context.close()
    return state


@pytest.fixture
def context(browser: Browser, session: Any) -> Iterator[BrowserContext]:
    made = browser.new_context(storage_state=session, **DESKTOP)
    made.set_default_timeout(20_000)
    yield made
    made.close()


class Watched:
    """A page and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page, self.wrong = page, list[str]()
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: self.wrong.append(dialog.message))


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_no_accessibility_violations_and_no_sideways_scrolling(
    console: Console, browser: Browser, session: Any, size: dict[str, Any]
) -> None:
    axe = Axe()
    # The narrow one is where things go wrong: there every page is looked at.
    runs = (FULL, DEAD, EVIL) if size is PHONE else (FULL,)
    files = [(console.place.directory / "runs" / run / "report.html").as_uri() for run in (FULL, EVIL)]
    served = ["", "?state=failed&q=nothing", "nowhere", *(f"runs/{run}" for run in runs)]
    with closing(browser.new_context(storage_state=session, **size)) as made:
        watched = Watched(made.new_page())
        page = watched.page
        for address in [*files, *(console.url + path for path in served)]:
            page.goto(address)
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            found = axe.run(page)
            assert found.violations_count == 0, f"{address}: {found.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{address} scrolls sideways"
            levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(each => Number(each.tagName[1]))")
            assert levels[0] == 1
            assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
        assert [w for w in watched.wrong if "404" not in w] == []


def test_hostile_text_stays_text(console: Console, context: BrowserContext) -> None:
    watched = Watched(context.new_page())
    page = watched.page
    for address in (
        (console.place.directory / "runs" / EVIL / "report.html").as_uri(),
        f"{console.url}runs/{EVIL}",
        f"{console.url}?q=%3Cscript%3Edocument.title%3D'owned'%3C/script%3E",
    ):
        page.goto(address)
        page.wait_for_timeout(100)
        assert page.title() != "owned"
        assert page.locator("img").count() == 0
        assert page.locator("script:not([src='/console.js'])").count() == 0
    assert watched.wrong == []


def test_file_asks_for_nothing_beside_it(console: Console, browser: Browser) -> None:
    with closing(browser.new_context(**PHONE)) as made:
        page = made.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        address = (console.place.directory / "runs" / FULL / "report.html").as_uri()
        page.goto(address)
        assert asked == [address]
        # The style is in force under the page's own policy, and a script that got in would not be.
        assert page.evaluate("getComputedStyle(document.querySelector('.verdict')).borderLeftStyle") == "solid"
        page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; "
            "document.body.append(s); }"
        )
        assert page.title() != "1"
        expect(page.get_by_role("img", name="Timeline of the steps")).to_be_visible()
        assert page.evaluate("[...document.querySelectorAll('th')].every(each => each.scope)")


def test_by_keyboard(console: Console, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(console.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the runs"
    expect(page.get_by_text("Skip to the runs")).to_be_in_viewport()
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "() => { const e = document.activeElement, style = getComputedStyle(e); return { "
            "name: e.name || e.textContent.trim(), "
            "ring: style.outlineStyle != 'none' && parseFloat(style.outlineWidth) >= 2 }; }"
        )
        assert focused["ring"], f"{focused['name']} does not show that it is focused"
        seen.append(focused["name"])
        if len(seen) > 12 and "Show" in seen and seen[-1] == "paint":
            break
    # The run that needs somebody first, its command, then the filters, then the history.
    assert seen[:2] == ["paint on unit", "Copy"]
    assert seen.index("q") < seen.index("since") < seen.index("Show") < len(seen) - 1
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/**")
    page.get_by_text("In words").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("look began").first).to_be_visible()


def test_command_to_copy(console: Console, context: BrowserContext) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{console.url}runs/{DEAD}")
    page.get_by_role("button", name="Copy").first.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == f"runbook resume {DEAD}"


def test_on_paper(console: Console, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto((console.place.directory / "runs" / FULL / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.get_by_text("look began").first).to_be_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts(console: Console, browser: Browser, session: Any) -> None:
    with closing(browser.new_context(storage_state=session, java_script_enabled=False, **PHONE)) as made:
        page = made.new_page()
        page.goto(console.url)
        rows = page.locator("#rows tbody tr")
        before = rows.count()
        page.get_by_label("State").select_option("succeeded")
        page.get_by_role("button", name="Show").click()
        expect(rows).to_have_count(1)
        assert before > 1
        rows.get_by_role("link").click()
        expect(page.locator(".verdict").first).to_have_text("Done.")
        expect(page.get_by_role("button", name="Copy")).to_have_count(0)


def test_run_is_seen_while_another_process_carries_it_out(console: Console, context: BrowserContext) -> None:
    """The home page and the run's own follow a real run to its end without being loaded again."""
    # The lock of the run that died is free again once it was given up.
    given_up = console.place.process("abort", DEAD, "--reason", "by the test")
    assert given_up.returncode == 0, given_up.stderr
    home, watched = context.new_page(), Watched(context.new_page())
    home.goto(console.url)
    home.evaluate("window.stays = true")
    running = console.place.start("--slow", "60", "--linger", "60")
    card = home.locator("#running-now")
    expect(card).to_contain_text("1 of 3 steps done; paint for")
    home.screenshot(path=str(console.place.directory / "home.png"), full_page=True)
    page = watched.page
    page.goto(home.url.rstrip("/") + str(card.get_by_role("link").get_attribute("href")))
    page.evaluate("window.stays = true")
    now = page.get_by_role("region", name="Now")
    expect(now).to_contain_text("1 of 3 steps done")
    expect(page.locator("#step-2")).to_contain_text("running")
    ticking = now.locator("[data-since]").first
    first = ticking.inner_text()
    expect(ticking).not_to_have_text(first)
    assert Axe().run(page).violations_count == 0
    page.locator("#events summary").focus()
    (console.place.directory / "dry").touch()
    # Replaced in place: neither the page nor the focus is lost, and the change is announced.
    expect(page.locator("#step-2")).to_contain_text("ok")
    assert page.evaluate("window.stays")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    expect(page.locator("#live-status")).to_contain_text("admire")
    # At its end it is loaded anew.
    (console.place.directory / "left").touch()
    expect(page.locator("body")).to_have_attribute("data-live", "ended")
    expect(page.locator(".verdict").first).to_contain_text("Done")
    expect(page.locator("#evidence ~ p").first).to_contain_text("holds")
    expect(card).not_to_contain_text("Running now")
    expect(home.locator("#rows tbody tr").first).to_contain_text("succeeded")
    assert home.evaluate("window.stays")
    assert running.wait(timeout=30) == 0
    assert watched.wrong == []


def test_console_that_has_ended_is_said(console: Console, context: BrowserContext) -> None:
    another = serve(console.place)
    page = context.new_page()
    page.goto(another.link)
    page.wait_for_url(another.url)
    another.process.terminate()
    assert another.process.wait(timeout=10) == 0
    expect(page.locator("#live-status")).to_contain_text("has not answered since")


def test_journal_in_postgresql_grows_before_the_eyes(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalPostgreSQL())
        for name, value in (
            ("PGPASSFILE", server.passfile),
            ("XDG_CONFIG_HOME", tmp_path),
            ("XDG_STATE_HOME", tmp_path),
        ):
            monkeypatch.setenv(name, str(value))
        place = make_place(tmp_path)
        place.environment["XDG_STATE_HOME"] = str(tmp_path)
        journal = stack.enter_context(closing(Journal(server.url, "unit", tmp_path / "runs")))
        remember("unit", journal.directory, journal.location)
        past.ended(journal, "r1", "failed")
        console = serve(place)
        try:
            with closing(browser.new_context(**PHONE)) as made:
                page = made.new_page()
                page.goto(console.link)
                page.wait_for_url(console.url)
                rows = page.locator("#rows tbody tr")
                expect(page.locator("#faults")).to_be_empty()
                expect(rows).to_have_count(1)
                fence = past.begin(journal, "r2")
                past.do(journal, "look")
                expect(page.locator("#running-now")).to_contain_text("1 of 3 steps done")
                past.finish(journal, fence, "succeeded")
                expect(rows).to_have_count(2)
        finally:
            console.process.terminate()
            assert console.process.wait(timeout=10) == 0
