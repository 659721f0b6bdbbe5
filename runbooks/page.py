"""The pages: the report of a run as one self-contained file, and the console's."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbooks import ledger, story
from runbooks.progress import seconds

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def asset(name: str) -> str:
    """The style or the script, which is the same for every page."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def policy(*, console: bool) -> str:
    """The content security policy: the page's own style and nothing else; the console's also its own script."""
    style = base64.b64encode(hashlib.sha256(asset("style.css").encode()).digest()).decode()
    rules = ["default-src 'none'", f"style-src 'sha256-{style}'", "base-uri 'none'"]
    if console:
        return "; ".join([*rules, "script-src 'self'", "connect-src 'self'", "form-action 'self'"])
    return "; ".join([*rules, "form-action 'none'"])


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        seconds=seconds,
        figure=figure,
        clock=lambda t: time.strftime("%H:%M:%S", time.localtime(t)),
        moment=lambda t: time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(t)),
        iso=lambda t: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(t)),
        hashed=story.hashed,
        plain=plain,
    )
    return environment


def plain(value: Any) -> str:
    """A value of a record for people: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def figure(check: Mapping[str, Any]) -> str:
    """A measured figure for people: a tenth of a second is precise enough, a count is a count."""
    value, unit = check["measured"], check["unit"]
    if value is None:
        return "not measured"
    text = f"{value:.1f}" if unit == "s" else f"{value:g}"
    return f"{text} {unit}".strip()


def report(data: Mapping[str, Any], *, console: Mapping[str, Any] | None = None) -> str:
    """The page of one run. console: what the console adds around it; None for a file of its own."""
    style, rules = asset("style.css"), policy(console=console is not None)
    running = data["shown_state"] == "running"
    steps = [{**step, "did": changes(step, running)} for step in data["steps"]]
    template = _templates().get_template("report.html.j2")
    return template.render(
        r=data, steps=steps, chart=chart(data), style=_markup(style), policy=rules, console=console, running=running
    )


def home(data: Mapping[str, Any]) -> str:
    """The console's page of all runs."""
    template = _templates().get_template("home.html.j2")
    return template.render(h=data, style=_markup(asset("style.css")), policy=policy(console=True))


def message(title: str, text: str, command: str = "", *, link: str = "", forward: str = "") -> str:
    """A page that says one thing: forward goes on to a path by itself, link offers it, command is what to run next."""
    return (
        _templates()
        .get_template("message.html.j2")
        .render(
            title=title,
            text=text,
            next=command,
            link=link,
            forward=forward,
            style=_markup(asset("style.css")),
            policy=policy(console=True),
        )
    )


def _markup(text: str) -> Any:
    import markupsafe

    return markupsafe.Markup(text)  # noqa: S704 - the style is a file of this package


def changes(step: Mapping[str, Any], running: bool) -> list[dict[str, Any]]:
    """What a step did: one entry for all hosts where a task came to the same end. Without records of effects, what
    the step's own outcome names."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for effect in step["effects"]:
        if effect["open"]:
            came = "under way" if running and not step["ended"] else "unknown"
        else:
            came = "failed" if effect["failed"] else "changed" if effect["changed"] else ""
        if came:
            groups.setdefault((effect["task"], came, effect["diff"]), []).append(effect["host"])
    if not step["effects"]:
        groups = {(c["task"], "changed", ""): [str(h) for h in c["hosts"]] for c in step["changed"]}
    return [
        {"task": task, "came": came, "diff": diff, "hosts": sorted(set(filter(None, hosts)))}
        for (task, came, diff), hosts in groups.items()
    ]


# -- the timeline


def chart(data: Mapping[str, Any]) -> dict[str, Any]:
    """The timeline as percentages of its whole width: a lane a step with a bar an attempt, and marks."""
    clock = _wall_of_ledger(data)
    begin = min([data["asked"], *clock.values()])
    # What came after the run (somebody acknowledged it in the morning) is no part of its time.
    end = max([data["ended"] or _heard(data), data["started"], *clock.values()])
    span = max(end - begin, 0.001)

    def at(moment: float) -> float:
        return float(round(min(100.0, max(0.0, 100 * (moment - begin) / span)), 3))

    def bar(start: float, stop: float, kind: str, title: str, wait: float = 0.0) -> dict[str, Any]:
        left = at(start)
        width = max(at(stop) - left, 0.3)
        share = min(1.0, wait / max(stop - start, 0.001))
        left = min(left, 100 - width)
        return {"left": left, "width": round(width, 3), "wait": round(width * share, 3), "kind": kind, "title": title}

    checked = data["started"] - data["asked"]
    lanes: list[dict[str, Any]] = [
        {
            "name": "checks",
            "took": checked,
            "bars": [bar(data["asked"], data["started"], "ok", "checked before anything was touched")],
        }
    ]
    for step in data["steps"]:
        bars = []
        for number, attempt in enumerate(step["tries"], 1):
            outcome = attempt["outcome"] or ("died" if data["shown_state"] != "running" else "running")
            stop = attempt["ended"] or _died(data, attempt["started"], end)
            what = "undo" if attempt["undo"] else f"attempt {number}"
            kind = "undo" if attempt["undo"] and outcome == "ok" else KINDS.get(outcome, "bad")
            bars.append(bar(attempt["started"], stop, kind, f"{what}: {outcome}", attempt["wait_s"]))
        lanes.append({"name": step["id"], "took": step["elapsed_s"], "bars": bars})
    names = {"outage": "last write before", "back": "first write after"}
    marks = [{"at": at(t), "title": names[name], "wall": t, "name": name} for name, t in clock.items()]
    marks += [
        {"at": at(h["at"]), "title": "resumed", "wall": h["at"], "name": "resumed"}
        for h in data["holders"]
        if h["how"] == "resumed"
    ]
    return {
        "lanes": lanes,
        "marks": marks,
        "kinds": {bar["kind"] for lane in lanes for bar in lane["bars"]},
        "waits": any(bar["wait"] for lane in lanes for bar in lane["bars"]),
        "begin": begin,
        "end": end,
        "span_s": span,
        "ticks": _ticks(span),
    }


KINDS = {"ok": "ok", "running": "running", "interrupted": "warn", "died": "died"}


def _heard(data: Mapping[str, Any]) -> float:
    """Until when a run without an end was heard of."""
    if data["shown_state"] == "running":
        return float(data["made"])
    own = ("run_started", "run_resumed", "step_started", "step_finished", "undo_started", "undo_finished")
    return float(max((e["at"] for e in data["timeline"] if e["kind"] in own), default=data["started"]))


def _died(data: Mapping[str, Any], started: float, end: float) -> float:
    """When an attempt without an end was heard of last: at the last record before the run was taken up again."""
    resumed = [h["at"] for h in data["holders"] if h["how"] == "resumed" and h["at"] > started]
    if not resumed:
        return end
    heard = [e["at"] for e in data["timeline"] if started <= e["at"] < min(resumed)]
    return max(heard, default=started)


def _ticks(span: float) -> list[dict[str, Any]]:
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200)
    step = next((s for s in steps if span / s <= 6), 86400 * (1 + int(span / 86400 / 6)))
    return [{"at": round(100 * s / span, 3), "text": f"+{_tick(s)}"} for s in range(0, int(span) + 1, step)]


def _tick(at: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if at >= size and at % size == 0:
            return f"{at // size} {unit}"
    return f"{at} s"


def _wall_of_ledger(data: Mapping[str, Any]) -> dict[str, float]:
    """The clients' outage and return in unix seconds: the worst outside client's."""
    switches = [s for s in (data["ledgers"] or {}).get("switches", []) if s["side"] == ledger.OUTSIDE]
    if not switches:
        return {}
    worst = max(switches, key=lambda s: s["gap_s"])
    return {"outage": worst["last_before_wall"], "back": worst["first_after_wall"]}
