"""Windows and blackouts against the clocks of New York, both daylight-saving Sundays included."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from runbooks.cli import main
from runbooks.windows import Calendar, Invalid, parse, span

NEW_YORK = "America/New_York"
SUNDAYS = [{"days": ["sun"], "from": "02:00", "to": "04:00", "timezone": NEW_YORK}]
WEEKDAYS = [{"days": ["weekdays"], "from": "02:00", "to": "04:00", "timezone": NEW_YORK}]


def utc(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def window(begin: str, end: str, days: Any = "daily") -> list[dict[str, Any]]:
    return [{"days": days, "from": begin, "to": end, "timezone": NEW_YORK}]


def first(calendar: Calendar, after: str, count: int = 1) -> list[tuple[str, str]]:
    return [
        (begin.strftime("%Y-%m-%d %H:%M"), end.strftime("%Y-%m-%d %H:%M"))
        for begin, end in calendar.openings(utc(after), count)
    ]


@pytest.mark.parametrize(
    ("windows", "after", "begin", "end"),
    [
        pytest.param(SUNDAYS, "2027-03-01", "2027-03-07 07:00", "2027-03-07 09:00", id="a Sunday of winter: 2 h"),
        pytest.param(SUNDAYS, "2027-03-08", "2027-03-14 07:00", "2027-03-14 08:00", id="02:00 is skipped: 1 h"),
        pytest.param(SUNDAYS, "2027-03-15", "2027-03-21 06:00", "2027-03-21 08:00", id="a Sunday of summer: 2 h"),
        pytest.param(SUNDAYS, "2027-11-01", "2027-11-07 07:00", "2027-11-07 09:00", id="01:00 comes twice: 2 h"),
        pytest.param(
            window("02:30", "04:00"), "2027-03-14", "2027-03-14 07:00", "2027-03-14 08:00", id="from is skipped"
        ),
        pytest.param(
            window("01:30", "02:30"), "2027-03-14", "2027-03-14 06:30", "2027-03-14 07:00", id="to is skipped"
        ),
        pytest.param(
            window("02:10", "02:50"), "2027-03-14", "2027-03-15 06:10", "2027-03-15 06:50", id="all is skipped"
        ),
        pytest.param(
            window("01:30", "02:30"), "2027-11-07 04:30", "2027-11-07 06:30", "2027-11-07 07:30", id="from is twice"
        ),
        pytest.param(
            window("00:30", "01:30"), "2027-11-07 04:00", "2027-11-07 04:30", "2027-11-07 05:30", id="to is twice"
        ),
        pytest.param(
            window("01:10", "01:50"), "2027-11-07 05:00", "2027-11-07 06:10", "2027-11-07 06:50", id="all is twice"
        ),
        pytest.param(
            window("00:30", "03:00"), "2027-11-07 04:00", "2027-11-07 04:30", "2027-11-07 08:00", id="spans the hour"
        ),
        pytest.param(
            window("23:00", "01:00", ["sat"]), "2027-01-01", "2027-01-03 04:00", "2027-01-03 06:00", id="over midnight"
        ),
        pytest.param(
            window("23:00", "03:00", ["sat"]),
            "2027-03-13",
            "2027-03-14 04:00",
            "2027-03-14 07:00",
            id="over midnight and the switch: 3 of 4 h",
        ),
        pytest.param(
            window("00:00", "24:00", ["sun"]), "2027-03-13", "2027-03-14 05:00", "2027-03-15 04:00", id="23 h day"
        ),
        pytest.param(
            window("00:00", "24:00", ["sun"]), "2027-11-06", "2027-11-07 04:00", "2027-11-08 05:00", id="25 h day"
        ),
        pytest.param(WEEKDAYS, "2026-11-27 12:00", "2026-11-30 07:00", "2026-11-30 09:00", id="Friday, then Monday"),
    ],
)
def test_an_opening_is_what_the_clock_on_the_wall_shows(
    windows: list[dict[str, Any]], after: str, begin: str, end: str
) -> None:
    assert first(parse(windows, None), after) == [(begin, end)]


def test_windows_that_touch_are_one_and_zones_may_differ() -> None:
    calendar = parse(
        [*window("02:00", "03:00", ["sun"]), {"days": "sun", "from": "03:00", "to": "04:00"}], None, NEW_YORK
    )
    assert first(calendar, "2027-01-01") == [("2027-01-03 07:00", "2027-01-03 09:00")]
    assert calendar.fits(utc("2027-01-03 07:59"), 3600).open
    mixed = parse([*SUNDAYS, {"days": "sun", "from": "09:00", "to": "10:00", "timezone": "Europe/Berlin"}], None)
    assert first(mixed, "2027-01-01", 2)[0] == ("2027-01-03 07:00", "2027-01-03 09:00"), "09:00 in Berlin is 08:00 UTC"


BLACKOUTS = [
    {"from": dt.date(2026, 12, 20), "to": dt.date(2027, 1, 4), "why": "holidays"},
    {"from": "2027-01-10T03:00", "to": "2027-01-10T03:30", "why": "audit"},
]


def test_blackouts_cut_openings_and_their_last_day_belongs_to_them() -> None:
    calendar = parse(SUNDAYS, BLACKOUTS)
    assert first(calendar, "2026-12-18", 3) == [
        ("2027-01-10 07:00", "2027-01-10 08:00"),
        ("2027-01-10 08:30", "2027-01-10 09:00"),
        ("2027-01-17 07:00", "2027-01-17 09:00"),
    ]
    assert not parse(None, BLACKOUTS, NEW_YORK).fits(utc("2027-01-05 04:59"), 1).open, "the 4th ends in New York"
    assert parse(None, BLACKOUTS, NEW_YORK).fits(utc("2027-01-05 05:00"), 1).open


@pytest.mark.parametrize(
    ("calendar", "now", "seconds", "open_", "why", "next_open"),
    [
        (parse(None, None), "2027-01-01", 1e9, True, "any time", None),
        (parse("any", None), "2027-01-01", 1e9, True, "any time", None),
        (parse(SUNDAYS, None), "2027-01-03 07:00", 7200, True, "open until Sun 2027-01-03 04:00 EST", None),
        (
            parse(SUNDAYS, None),
            "2027-01-03 07:00:01",
            7200,
            False,
            "2 h are needed and 119 min are left until Sun 2027-01-03 04:00 EST; it fits from Sun 2027-01-10 02:00 EST",
            "2027-01-10 07:00",
        ),
        (
            parse(SUNDAYS, None),
            "2027-03-14 06:59",
            60,
            False,
            "no window is open at Sun 2027-03-14 01:59 EST; it fits from Sun 2027-03-14 03:00 EDT",
            "2027-03-14 07:00",
        ),
        (parse(SUNDAYS, None), "2027-03-14 07:00", 3600, True, "open until Sun 2027-03-14 04:00 EDT", None),
        (
            parse(SUNDAYS, None),
            "2027-03-14 07:00",
            3601,
            False,
            "60 min are needed and 60 min are left until Sun 2027-03-14 04:00 EDT; it fits from "
            "Sun 2027-03-21 02:00 EDT",
            "2027-03-21 06:00",
        ),
        (
            parse(SUNDAYS, None),
            "2027-01-02",
            7201,
            False,
            "no window is open at Fri 2027-01-01 19:00 EST; no opening of the next 400 days is long enough "
            "(the longest has 2 h)",
            None,
        ),
        (parse(SUNDAYS, None), "2027-01-03 09:00", 0, False, "no window is open at Sun 2027-01-03 04:00 EST", ""),
        (
            parse(None, BLACKOUTS, NEW_YORK),
            "2026-12-31",
            60,
            False,
            "a blackout until Tue 2027-01-05 00:00 EST (holidays); it fits from Tue 2027-01-05 00:00 EST",
            "2027-01-05 05:00",
        ),
        (
            parse(None, BLACKOUTS, NEW_YORK),
            "2026-12-20 04:30",
            3600,
            False,
            "60 min are needed and 30 min are left until Sun 2026-12-20 00:00 EST",
            "",
        ),
    ],
)
def test_work_fits_when_it_ends_inside(  # noqa: PLR0917 - the table's columns
    calendar: Calendar,
    now: str,
    seconds: float,
    open_: bool,
    why: str,
    next_open: str | None,
) -> None:
    verdict = calendar.fits(utc(now), seconds)
    assert verdict.open is open_
    assert verdict.why.startswith(why)
    if next_open != "":
        assert verdict.next_open == (utc(next_open) if next_open else None)
    if verdict.next_open:
        assert calendar.fits(verdict.next_open, seconds).open


def test_every_sunday_of_2027_has_two_hours_but_one() -> None:
    openings = parse(SUNDAYS, None).openings(utc("2027-01-01"), 52)
    lengths = {begin.date().isoformat(): (end - begin).total_seconds() / 3600 for begin, end in openings}
    assert len(lengths) == 52
    assert {day: hours for day, hours in lengths.items() if hours != 2} == {"2027-03-14": 1}


@pytest.mark.parametrize(
    ("windows", "blackouts", "zone", "said"),
    [
        ("never", None, None, "runbook_windows is 'never', not a list of windows or any"),
        ([], None, None, "empty list, which would never open"),
        (["sun"], None, None, "runbook_windows[0] is 'sun', not a mapping"),
        ([{"days": ["sun"], "from": "02:00"}], None, NEW_YORK, "runbook_windows[0] lacks to"),
        ([{**SUNDAYS[0], "zone": "x"}], None, None, "runbook_windows[0] has an unknown zone"),
        ([{**SUNDAYS[0], "days": []}], None, None, "runbook_windows[0].days is [], not a list of days"),
        ([{**SUNDAYS[0], "days": ["so"]}], None, None, "runbook_windows[0].days has 'so'; days are mon, tue"),
        ([{**SUNDAYS[0], "from": 1320}], None, None, "put the time in quotation marks"),
        ([{**SUNDAYS[0], "from": "2 AM"}], None, None, "'2 AM', not a time of day as 02:00"),
        ([{**SUNDAYS[0], "to": "24:01"}], None, None, "'24:01', not a time of day"),
        ([{**SUNDAYS[0], "to": "03:60"}], None, None, "'03:60', not a time of day"),
        ([{**SUNDAYS[0], "to": "02:00"}], None, None, "begins and ends at 02:00; a whole day is 00:00 to 24:00"),
        ([{**SUNDAYS[0], "from": "24:00"}], None, None, "the beginning of a day is 00:00"),
        ([{**SUNDAYS[0], "timezone": "EST"}], None, None, "'EST', an abbreviation; name a place"),
        ([{**SUNDAYS[0], "timezone": "America/Gotham"}], None, None, "which is no time zone"),
        ([{**SUNDAYS[0], "timezone": "../../etc/passwd"}], None, None, "which is no time zone"),
        ([{"days": ["sun"], "from": "02:00", "to": "04:00"}], None, None, "has no timezone"),
        (None, "xmas", None, "runbook_blackouts is 'xmas', not a list"),
        (None, [{"from": "2026-12-24", "to": "2026-12-26"}], None, "runbook_blackouts[0] lacks why"),
        (None, [{"from": "Xmas", "to": "2026-12-26", "why": "x"}], None, "runbook_blackouts[0].from is 'Xmas'"),
        (None, [{"from": 7, "to": "2026-12-26", "why": "x"}], None, "runbook_blackouts[0].from is 7"),
        (None, [{"from": "2026-12-27", "to": "2026-12-26", "why": "x"}], None, "ends before it begins"),
        (None, None, "PST", "runbook_timezone is 'PST', an abbreviation"),
    ],
)
def test_bad_data_is_one_sentence(windows: Any, blackouts: Any, zone: Any, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(windows, blackouts, zone)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lengths_are_told_for_people() -> None:
    assert [span(s) for s in (0, 119, 120, 7199, 7200, 9000)] == [
        "0 s",
        "119 s",
        "2 min",
        "119 min",
        "2 h",
        "2 h 30 min",
    ]


INVENTORIES = Path(__file__).parents[2] / "inventories"


@pytest.mark.parametrize(
    ("environment", "at", "fits", "next_open"),
    [
        ("development", "2027-03-14T12:00", True, None),
        ("staging", "2027-03-13T02:30", False, "2027-03-15T06:00:00+00:00"),
        ("staging", "2027-03-12T02:30", True, None),
        ("production", "2027-03-14T03:30", True, None),
        ("production", "2027-03-14T03:59", False, "2027-03-21T06:00:00+00:00"),
        ("production", "2027-11-07T02:00", True, None),
    ],
)
def test_the_command_tells_of_each_environment(
    capsys: pytest.CaptureFixture[str], environment: str, at: str, fits: bool, next_open: str | None
) -> None:
    words = ["windows", "fail-back", "-i", str(INVENTORIES / environment), "--at", at]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["environment"], told["zone"]) == (environment, NEW_YORK)
    assert (told["runbook"]["fits"], told["runbook"]["next_open"]) == (fits, next_open)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"fail-back: {'fits' if fits else 'does not fit'}" in shown
    assert main(["windows", "fail-over", *words[2:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runbook"]["fits"], "a disaster keeps no hours"


def test_a_faulty_inventory_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts.yml").write_text(
        "all: {hosts: {one: }, vars: {environment_name: x, runbook_timezone: UTC, "
        "runbook_windows: [{days: [sun], from: 22:00, to: '24:00'}]}}"
    )
    assert main(["windows", "-i", str(tmp_path / "hosts.yml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "runbook_windows[0].from is 1320; put the time in quotation marks" in said
    assert said.count("\n") == 1
