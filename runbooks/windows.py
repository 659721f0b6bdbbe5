"""When an environment may be worked on: weekly windows, less blackouts. Pure; all instants are aware datetimes.

A window is what the clock on the wall shows in its zone, so its length in real time follows the daylight-saving switch:

- A time that the clock skips (02:00 to 03:00 in March) is the moment of the switch.
- Of a time that comes twice (01:00 to 02:00 in November) a window begins at the second and ends at the first; one
  that lies wholly inside it is the second. So the repeated hour never makes a window longer than its times say, unless
  the window spans it.
"""

from __future__ import annotations

import datetime as dt
import functools
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runbooks.errors import Problem

if TYPE_CHECKING:
    from runbooks.definition import Definition
    from runbooks.environment import Environment

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
NAMES = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
GROUPS = {"weekdays": DAYS[:5], "weekend": DAYS[5:], "daily": DAYS}
HORIZON = dt.timedelta(days=400)
"""How far ahead an opening is looked for: a yearly window and the whole blackout before it."""
DAY = 24 * 60
"""Minutes."""
Interval = tuple[dt.datetime, dt.datetime]


class Invalid(ValueError):
    """Window data that cannot be understood; says what and where."""


@dataclass(frozen=True, slots=True)
class Window:
    """A weekly window. days: 0 is Monday, of its beginning. begin, end: minutes of that day; end may be in the next."""

    days: frozenset[int]
    begin: int
    end: int
    zone: zoneinfo.ZoneInfo

    def on(self, day: dt.date) -> Interval | None:
        """The window that begins on a day, in UTC; None when there is none, or the clock skips all of it."""
        if day.weekday() not in self.days:
            return None
        begin = _instant(day, self.begin, self.zone, second=True)
        end = _instant(day, self.end, self.zone, second=False)
        if end <= begin:
            end = _instant(day, self.end, self.zone, second=True)
        return (begin, end) if begin < end else None

    def __str__(self) -> str:
        days = ", ".join(NAMES[d] for d in sorted(self.days))
        return f"{days} {_clock(self.begin)} to {_clock(self.end)} {self.zone.key}"


@dataclass(frozen=True, slots=True)
class Blackout:
    """A time in which nothing is begun, and why. begin, end: UTC."""

    begin: dt.datetime
    end: dt.datetime
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether work of some length may begin, why not, and when it next may (UTC; None: not within HORIZON).

    closes: the end of the present opening (UTC), None when it has none or there is none.
    """

    open: bool
    why: str
    next_open: dt.datetime | None = None
    closes: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class Calendar:
    """windows: None means any time. zone: the one that people read times in."""

    windows: tuple[Window, ...] | None
    blackouts: tuple[Blackout, ...]
    zone: zoneinfo.ZoneInfo

    def openings(self, after: dt.datetime, count: int, until: dt.datetime | None = None) -> list[Interval]:
        """The next openings that have not ended, in UTC, oldest first; one that never ends ends at the horizon."""
        after = after.astimezone(dt.UTC)
        horizon = min(until or after + HORIZON, after + HORIZON)
        found = [i for i in self._free(after, horizon) if i[1] > after]
        return found[:count]

    def _free(self, after: dt.datetime, horizon: dt.datetime) -> Iterator[Interval]:
        for begin, end in _merged(self._windows(after, horizon)):
            low = begin
            for blackout in sorted(self.blackouts, key=lambda b: b.begin):
                if blackout.end <= low or blackout.begin >= end:
                    continue
                if blackout.begin > low:
                    yield low, blackout.begin
                low = max(low, blackout.end)
            if low < end:
                yield low, end

    def _windows(self, after: dt.datetime, horizon: dt.datetime) -> list[Interval]:
        if self.windows is None:
            return [(after, horizon)]
        found = []
        for window in self.windows:
            day = after.astimezone(window.zone).date() - dt.timedelta(days=2)
            while day <= horizon.astimezone(window.zone).date():
                interval = window.on(day)
                if interval is not None and interval[0] < horizon:
                    found.append(interval)
                day += dt.timedelta(days=1)
        return found

    def fits(self, now: dt.datetime, seconds: float) -> Verdict:
        """Whether work of so many seconds may begin now and ends inside."""
        now = now.astimezone(dt.UTC)
        if self.windows is None and not self.blackouts:
            return Verdict(True, "any time")
        length = dt.timedelta(seconds=seconds)
        openings = self.openings(now, len(DAYS) * DAY)
        present = next((i for i in openings if i[0] <= now < i[1]), None)
        unending = now + HORIZON
        if present is not None and now + length <= present[1]:
            closes = None if present[1] >= unending else present[1]
            return Verdict(True, f"open until {self.show(closes)}" if closes else "any time", None, closes)
        later = next((begin for begin, end in openings if begin > now and end - begin >= length), None)
        return Verdict(False, self._why(now, seconds, present, openings, later), later, present[1] if present else None)

    def _why(
        self,
        now: dt.datetime,
        seconds: float,
        present: Interval | None,
        openings: Sequence[Interval],
        later: dt.datetime | None,
    ) -> str:
        blackout = next((b for b in self.blackouts if b.begin <= now < b.end), None)
        if present is not None:
            left = (present[1] - now).total_seconds()
            why = f"{span(seconds)} are needed and {span(left)} are left until {self.show(present[1])}"
        elif blackout is not None:
            why = f"a blackout until {self.show(blackout.end)} ({blackout.why})"
        else:
            why = f"no window is open at {self.show(now)}"
        if later is not None:
            return f"{why}; it fits from {self.show(later)}"
        longest = max(((end - begin).total_seconds() for begin, end in openings), default=0.0)
        return f"{why}; no opening of the next {HORIZON.days} days is long enough (the longest has {span(longest)})"

    def show(self, instant: dt.datetime) -> str:
        """In the calendar's zone, with the weekday and the zone's abbreviation of that moment."""
        return instant.astimezone(self.zone).strftime("%a %Y-%m-%d %H:%M %Z")


def span(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _instant(day: dt.date, minutes: int, zone: zoneinfo.ZoneInfo, *, second: bool) -> dt.datetime:
    """When the clock shows that time; see the module's words for a time that it skips or shows twice."""
    wall = dt.datetime.combine(day, dt.time()) + dt.timedelta(minutes=minutes)
    early = wall.replace(tzinfo=zone, fold=0)
    late = wall.replace(tzinfo=zone, fold=1)
    low, high = late.astimezone(dt.UTC), early.astimezone(dt.UTC)
    if low >= high:
        # As on every other day, or (low later than high) a time that comes twice.
        return low if second else high
    # Skipped: what fold=1 names is before the switch and what fold=0 names after it.
    offset = low.astimezone(zone).utcoffset()
    while high - low > dt.timedelta(seconds=1):
        middle = low + (high - low) // 2
        middle = middle.replace(microsecond=0)
        if middle.astimezone(zone).utcoffset() == offset:
            low = middle
        else:
            high = middle
    return high


def _merged(intervals: Sequence[Interval]) -> Iterator[Interval]:
    """Windows that touch or overlap are one."""
    current: Interval | None = None
    for begin, end in sorted(intervals):
        if current is None:
            current = begin, end
        elif begin <= current[1]:
            current = current[0], max(current[1], end)
        else:
            yield current
            current = begin, end
    if current is not None:
        yield current


# -- out of the inventory


def parse(windows: Any, blackouts: Any, zone: Any = None) -> Calendar:
    """The calendar that the inventory's variables say. Raises Invalid with the first fault.

    windows (runbook_windows): absent, "any", or a list. blackouts (runbook_blackouts): absent or a list.
    zone (runbook_timezone): for entries that name none, and for showing times; else that of the first window, or UTC.
    """
    given = None if zone is None else _zone(zone, "runbook_timezone")
    found: tuple[Window, ...] | None = None
    if windows not in (None, "any"):
        if not isinstance(windows, Sequence) or isinstance(windows, str):
            raise Invalid(f"runbook_windows is {windows!r}, not a list of windows or any")
        if not windows:
            raise Invalid("runbook_windows is an empty list, which would never open; write any for any time")
        found = tuple(_window(w, f"runbook_windows[{n}]", given) for n, w in enumerate(windows))
    shown = given or (found[0].zone if found else zoneinfo.ZoneInfo("UTC"))
    if blackouts is not None and (not isinstance(blackouts, Sequence) or isinstance(blackouts, str)):
        raise Invalid(f"runbook_blackouts is {blackouts!r}, not a list")
    dark = tuple(_blackout(b, f"runbook_blackouts[{n}]", shown) for n, b in enumerate(blackouts or ()))
    return Calendar(found, dark, shown)


def _window(data: Any, where: str, zone: zoneinfo.ZoneInfo | None) -> Window:
    _keys(data, where, {"days", "from", "to"}, {"timezone"})
    days = data["days"]
    words = [days] if isinstance(days, str) else days
    if not isinstance(words, Sequence) or not words:
        raise Invalid(f"{where}.days is {days!r}, not a list of days")
    named: set[int] = set()
    for word in words:
        text = str(word).lower()
        group = GROUPS.get(text) or ((text[:3],) if text in DAYS or text in [n.lower() for n in NAMES] else ())
        if not group:
            raise Invalid(f"{where}.days has {word!r}; days are {', '.join(DAYS)}, {', '.join(GROUPS)}")
        named |= {DAYS.index(day) for day in group}
    own = data.get("timezone")
    if own is None and zone is None:
        raise Invalid(f"{where} has no timezone and there is no runbook_timezone; name a place, as America/New_York")
    begin, end = _minutes(data["from"], f"{where}.from"), _minutes(data["to"], f"{where}.to")
    if begin == end:
        raise Invalid(f"{where} begins and ends at {_clock(begin)}; a whole day is 00:00 to 24:00")
    if begin == DAY:
        raise Invalid(f"{where}.from is 24:00; the beginning of a day is 00:00")
    return Window(
        frozenset(named),
        begin,
        end if end > begin else end + DAY,
        zone if own is None and zone is not None else _zone(own, f"{where}.timezone"),
    )


def _keys(data: Any, where: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise Invalid(f"{where} is {data!r}, not a mapping")
    missing, unknown = required - set(data), set(map(str, data)) - required - optional
    if missing or unknown:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has an unknown {', '.join(sorted(unknown))}"
        raise Invalid(f"{where} {what}")


def _minutes(value: Any, where: str) -> int:
    if not isinstance(value, str):
        raise Invalid(f'{where} is {value}; put the time in quotation marks, as in "22:00", else YAML counts it')
    hours, _, minutes = value.partition(":")
    if not (hours.isdecimal() and minutes.isdecimal() and len(minutes) == 2):
        raise Invalid(f"{where} is {value!r}, not a time of day as 02:00")
    total = int(hours) * 60 + int(minutes)
    if int(minutes) > 59 or total > DAY:
        raise Invalid(f"{where} is {value!r}, not a time of day as 02:00")
    return total


def _clock(minutes: int) -> str:
    minutes = minutes if minutes <= DAY else minutes - DAY
    return f"{minutes // 60:02}:{minutes % 60:02}"


@functools.cache
def _known(name: str) -> zoneinfo.ZoneInfo | None:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _zone(name: Any, where: str) -> zoneinfo.ZoneInfo:
    text = str(name)
    # EST is New York in winter for people, and UTC-5 all year for the time zone database.
    if text != "UTC" and "/" not in text:
        raise Invalid(f"{where} is {text!r}, an abbreviation; name a place, as America/New_York, or UTC")
    zone = _known(text)
    if zone is None:
        raise Invalid(f"{where} is {text!r}, which is no time zone; name a place, as America/New_York")
    return zone


def _blackout(data: Any, where: str, zone: zoneinfo.ZoneInfo) -> Blackout:
    _keys(data, where, {"from", "to", "why"}, {"timezone"})
    own = _zone(data["timezone"], f"{where}.timezone") if data.get("timezone") is not None else zone
    begin = _moment(data["from"], f"{where}.from", own, last=False)
    end = _moment(data["to"], f"{where}.to", own, last=True)
    if end <= begin:
        raise Invalid(f"{where} ends before it begins")
    return Blackout(begin, end, str(data["why"]))


def _moment(value: Any, where: str, zone: zoneinfo.ZoneInfo, *, last: bool) -> dt.datetime:
    """A date or a date and time; the last date of a blackout belongs to it. The wider reading of a doubled time."""
    if isinstance(value, str):
        try:
            value = dt.date.fromisoformat(value) if len(value) <= 10 else dt.datetime.fromisoformat(value)
        except ValueError:
            raise Invalid(f"{where} is {value!r}, not a date (2026-12-24) or a time (2026-12-24T18:00)") from None
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None:
            return value.astimezone(dt.UTC)
        minutes = value.hour * 60 + value.minute
        return _instant(value.date(), minutes, zone, second=last) + dt.timedelta(seconds=value.second)
    if isinstance(value, dt.date):
        return _instant(value, DAY if last else 0, zone, second=last)
    raise Invalid(f"{where} is {value!r}, not a date (2026-12-24) or a time (2026-12-24T18:00)")


def load(environment: Environment, definition: Definition | None = None) -> Calendar:
    """The environment's calendar; any time for a runbook that says so (``windows: any``: a disaster keeps no hours).

    Raises Problem when the inventory's data cannot be understood.
    """
    try:
        calendar = parse(
            environment.get("runbook_windows"),
            environment.get("runbook_blackouts"),
            environment.get("runbook_timezone"),
        )
    except Invalid as error:
        raise Problem(
            f"The inventory {environment.path} has a fault in its windows: {error}",
            code="windows-invalid",
            next_command=f"ansible-inventory -i {environment.path} --list",
        ) from None
    if definition is not None and definition.windows == "any":
        return Calendar(None, (), calendar.zone)
    return calendar
