"""The page `weightfs timeline --html` writes: one file, no script, nothing loaded from elsewhere. Pure.

Whatever comes from a document (names of models, files, layers) is a stranger's text: it passes `_text` or it is not on
the page. Bars are placed in percent of the plot's width, so that text keeps its size on a phone.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weightfs.cli.output import human_bytes, printable

_ROW: Final = 18
_BAR: Final = 12
_AREA: Final = (1000, 160)
_TICKS: Final = 4
_SHORTEST: Final = 0.35
"""Percent of the width: what is shorter would not be seen."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a layer's bytes came, in seconds since the trigger; None: not at all, or not yet.

    Attributes:
        label: as the plan has it.
        nbytes: of the whole layer.
        before_bytes: in memory when first looked at.
        first_s: the last look at which nothing new was there.
        last_s: the first look at which as much was there as ever was.
        whole: whether that is all of it.
    """

    label: str
    nbytes: int
    before_bytes: int
    first_s: float | None
    last_s: float | None
    whole: bool


def series(load: Mapping[str, Any]) -> list[tuple[float, list[int]]]:
    """The samples of a load as (seconds, resident bytes of each layer)."""
    now = [0] * len(load["layers"])
    found = []
    for sample in load["samples"]:
        for number, nbytes in sample["changed"]:
            now[number] = nbytes
        found.append((float(sample["at_s"]), list(now)))
    return found


def arrivals(load: Mapping[str, Any]) -> list[Arrival]:
    """When each layer's first and last bytes came, as near as the samples tell."""
    samples = series(load)
    found = []
    for number, layer in enumerate(load["layers"]):
        before = samples[0][1][number] if samples else 0
        most = max((resident[number] for _, resident in samples), default=0)
        first_s = last_s = None
        if most > before:
            rising = next(at for at, (_, resident) in enumerate(samples) if resident[number] > before)
            first_s = samples[rising - 1][0]
            last_s = next(at_s for at_s, resident in samples if resident[number] == most)
        found.append(Arrival(layer["label"], layer["bytes"], before, first_s, last_s, most >= layer["bytes"]))
    return found


def start_ready_s(load: Mapping[str, Any]) -> float | None:
    """Seconds until the first two layers of the plan (embedding and first block) were in memory; None: never."""
    for at_s, resident in series(load):
        if all(now >= layer["bytes"] for now, layer in zip(resident[:2], load["layers"][:2], strict=True)):
            return at_s
    return None


def page(document: Mapping[str, Any], mountpoint: str) -> str:
    """The page for a timeline's document, the newest load first."""
    loads = list(reversed(document["loads"]))
    style = importlib.resources.files("weightfs.cli").joinpath("pages", "waterfall.css").read_text("utf-8")
    count = {0: "Nothing was loaded yet", 1: "One load"}.get(len(loads), f"{len(loads)} loads, the newest first")
    sections = "\n".join(_load(number, load) for number, load in enumerate(loads))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Loads on {_text(mountpoint)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>Loads on {_text(mountpoint)}</h1><p>{count}. Times count from the trigger.</p></header>\n"
        f"{sections}\n</main>\n</body>\n</html>\n"
    )


def _load(number: int, load: Mapping[str, Any]) -> str:
    samples, layers = series(load), arrivals(load)
    span_s = _span(load, samples)
    outcome = load["outcome"] or "goes on"
    return (
        f'<section class="load" id="load-{number}" aria-labelledby="name-{number}">\n'
        f'<h2 id="name-{number}">{_text(load["model"])}</h2>\n'
        f"<p>{_moment(load['started'])}, triggered by {_text(load['trigger'])}: {_text(outcome)}</p>\n"
        f"{_facts(load, samples)}\n{_plots(number, load, samples, span_s)}\n{_tables(load, layers)}\n</section>"
    )


def _plots(number: int, load: Mapping[str, Any], samples: Sequence[tuple[float, list[int]]], span_s: float) -> str:
    if not samples:
        return "<p>Nobody looked at what was in memory.</p>"
    return (
        f"<h3>When each part came</h3>\n{_waterfall(number, load, arrivals(load), span_s)}\n"
        f"<h3>Bytes in memory</h3>\n{_area(number, load, samples, span_s)}"
    )


def _span(load: Mapping[str, Any], samples: Sequence[tuple[float, list[int]]]) -> float:
    """Seconds that the plot is wide: until the last thing that happened."""
    moments: list[float] = [at_s for at_s, _ in samples] + [one["at_s"] for one in load["opens"]]
    moments += [load[key] for key in ("submitted_s", "finished_s") if load[key] is not None]
    if wait := load["first_demand_wait"]:
        moments.append(wait["at_s"] + wait["waited_s"])
    return max([0.001, *moments])


# Figures


def _facts(load: Mapping[str, Any], samples: Sequence[tuple[float, list[int]]]) -> str:
    size = sum(layer["bytes"] for layer in load["layers"])
    wait, ended_s = load["first_demand_wait"], load["finished_s"]
    facts = [
        ("Weights", human_bytes(size)),
        ("First read submitted", _seconds(load["submitted_s"])),
        ("First two parts ready", _seconds(start_ready_s(load))),
        ("Ended", _seconds(ended_s)),
        ("Rate", _rate(samples, ended_s)),
        ("First demand wait", f"{_seconds(wait['waited_s'])} at {_seconds(wait['at_s'])}" if wait else None),
    ]
    rows = [
        f"<div><dt>{name}</dt>" + (f"<dd>{value}</dd>" if value else '<dd class="none">not observed</dd>') + "</div>"
        for name, value in facts
    ]
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _rate(samples: Sequence[tuple[float, list[int]]], ended_s: float | None) -> str | None:
    if not samples or not ended_s:
        return None
    came = sum(samples[-1][1]) - sum(samples[0][1])
    per_s = came / ended_s / 1e6
    return None if came <= 0 else f"{per_s / 1000:.2f} GB/s" if per_s >= 1000 else f"{per_s:.3g} MB/s"


def _seconds(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


# Plots


def _waterfall(number: int, load: Mapping[str, Any], layers: Sequence[Arrival], span_s: float) -> str:
    names = ["opens", "first read"] + (["waited"] if load["first_demand_wait"] else [])
    labels = "".join(f"<li>{name}</li>" for name in names)
    labels += "".join(f'<li title="{_text(one.label)}">{_text(one.label)}</li>' for one in layers)
    shapes = [_event(0, one["at_s"], span_s, f"{one['file']} opened") for one in load["opens"]]
    if load["submitted_s"] is not None:
        shapes.append(_event(1, load["submitted_s"], span_s, "first read submitted"))
    if wait := load["first_demand_wait"]:
        shapes.append(_bar(2, wait["at_s"], wait["at_s"] + wait["waited_s"], span_s, "wait", 0, "a reader waited"))
    for row, one in enumerate(layers):
        shapes.append(_layer(row + len(names), row / max(1, len(layers) - 1), one, span_s))
    what = f"{len(layers)} parts over {_seconds(span_s)}, in the order they were to be read; the tables below say it."
    return _plot(
        f"waterfall-{number}",
        "waterfall",
        labels,
        (len(names) + len(layers)) * _ROW,
        ("When each part came into memory", what),
        _grid() + "".join(shapes),
        span_s,
    )


def _layer(row: int, at: float, one: Arrival, span_s: float) -> str:
    if one.first_s is None or one.last_s is None:
        if not one.before_bytes:
            return ""
        told = f"{one.label}: {human_bytes(one.before_bytes)} were in memory before"
        return _bar(row, 0, 0, span_s, "layer before", at, told)
    told = f"{one.label}: {human_bytes(one.nbytes)}, {_seconds(one.first_s)} to {_seconds(one.last_s)}"
    return _bar(row, one.first_s, one.last_s, span_s, "layer", at, told)


def _bar(row: int, first_s: float, last_s: float, span_s: float, kind: str, at: float, told: str) -> str:
    left = min(max(0.0, first_s) / span_s * 100, 100 - _SHORTEST)
    width = min(max(_SHORTEST, (last_s - first_s) / span_s * 100), 100 - left)
    return (
        f'<rect class="{kind}" style="--at:{at:.3f}" x="{left:.3f}%" width="{width:.3f}%" '
        f'y="{row * _ROW + (_ROW - _BAR) // 2}" height="{_BAR}" rx="2"><title>{_text(told)}</title></rect>'
    )


def _event(row: int, at_s: float, span_s: float, told: str) -> str:
    left = min(max(0.0, at_s) / span_s * 100, 100.0)
    told = f"{told} at {_seconds(max(0.0, at_s))}"
    return (
        f'<circle class="event" cx="{left:.3f}%" cy="{row * _ROW + _ROW // 2}" r="3.5">'
        f"<title>{_text(told)}</title></circle>"
    )


def _area(number: int, load: Mapping[str, Any], samples: Sequence[tuple[float, list[int]]], span_s: float) -> str:
    width, height = _AREA
    size = max(1, sum(layer["bytes"] for layer in load["layers"]))
    floor = [0] * len(samples)
    shapes = []
    for row, layer in enumerate(load["layers"]):
        roof = [low + resident[row] for low, (_, resident) in zip(floor, samples, strict=True)]
        if any(resident[row] for _, resident in samples):
            edge = [(at_s, now) for (at_s, _), now in zip(samples, roof, strict=True)]
            back = [(at_s, now) for (at_s, _), now in zip(samples, floor, strict=True)]
            points = " ".join(
                f"{at_s / span_s * width:.1f},{height - now / size * height:.1f}" for at_s, now in edge + back[::-1]
            )
            at = row / max(1, len(load["layers"]) - 1)
            shapes.append(
                f'<polygon class="layer" style="--at:{at:.3f}" points="{points}"><title>{_text(layer["label"])}</title>'
                "</polygon>"
            )
        floor = roof
    most = max(floor, default=0)
    drawing = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" height="{height}">{"".join(shapes)}</svg>'
    )
    labels = f"<li>{human_bytes(size)}</li>"
    what = f"{human_bytes(most)} of {human_bytes(size)} at most, over {_seconds(span_s)}."
    return _plot(
        f"area-{number}", "area", labels, height, ("Bytes in memory over time", what), _grid() + drawing, span_s
    )


def _plot(name: str, kind: str, labels: str, height: int, told: tuple[str, str], shapes: str, span_s: float) -> str:
    ticks = "".join(
        f'<span style="left:{tick * 100 / _TICKS:g}%">{_seconds(span_s * tick / _TICKS) if tick else "0"}</span>'
        for tick in range(_TICKS + 1)
    )
    return (
        f'<div class="chart {kind}"><ol aria-hidden="true">{labels}</ol><div class="plot">'
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" height="{height}">'
        f'<title id="{name}-title">{told[0]}</title><desc id="{name}-desc">{told[1]}</desc>{shapes}'
        f'<line class="edge" x1="0" x2="100%" y1="{height - 0.5}" y2="{height - 0.5}"/></svg>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div></div></div>'
    )


def _grid() -> str:
    places = [tick * 100 / _TICKS for tick in range(_TICKS)]
    return "".join(f'<line class="grid" x1="{x:g}%" x2="{x:g}%" y1="0" y2="100%"/>' for x in places)


# Tables


def _tables(load: Mapping[str, Any], layers: Sequence[Arrival]) -> str:
    parts = "".join(
        f"<tr><td>{_text(one.label)}</td><td>{human_bytes(one.nbytes)}</td><td>{human_bytes(one.before_bytes)}</td>"
        f"<td>{_seconds(one.first_s) or '-'}</td><td>{_seconds(one.last_s) or '-'}</td>"
        f"<td>{'yes' if one.whole else 'no'}</td></tr>"
        for one in layers
    )
    opens = "".join(f"<tr><td>{_text(one['file'])}</td><td>{_seconds(one['at_s'])}</td></tr>" for one in load["opens"])
    left_out = f"<p>{load['opens_left_out']} more are left out.</p>" if load["opens_left_out"] else ""
    return (
        f"<details><summary>Parts as a table</summary><table><thead><tr><th>part</th><th>size</th><th>before</th>"
        f"<th>first byte</th><th>last byte</th><th>whole</th></tr></thead><tbody>{parts}</tbody></table></details>"
        f"<details><summary>Opens as a table</summary><table><thead><tr><th>file</th><th>at</th></tr></thead>"
        f"<tbody>{opens}</tbody></table>{left_out}</details>"
    )


def _moment(started: str) -> str:
    """ISO 8601 in UTC, as people read it."""
    return f'<time datetime="{_text(started)}">{_text(started[:19].replace("T", " "))} UTC</time>'


def _text(value: object) -> str:
    """Text from outside, as it may stand in an element or in a quoted attribute; always valid UTF-8."""
    return html.escape(printable(str(value)), quote=True)
