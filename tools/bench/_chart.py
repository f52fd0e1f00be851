"""A bar chart as one SVG file: stacked bars in groups, light and dark by the viewer's setting, text that stays text.

Needs nothing but the standard library. Every element has a class, and colours are in one style sheet; a bar's segments
have a `<title>` each, which browsers show.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

COLOURS: Final = (
    ("#6f757d", "#9aa0a9"),
    ("#3f444c", "#c3c8d0"),
    ("#6a4fb3", "#b39dff"),
    ("#0a7f5f", "#4fd1a5"),
    ("#c2510c", "#ff9b5e"),
    ("#9a6a00", "#e3b341"),
    ("#1f6fb2", "#6cb6ff"),
    ("#b0437f", "#f29ac7"),
)
"""Of the stages in their order, in light and in dark: 3:1 or more against the paper in both."""
WIDTH: Final = 1000
_LEFT: Final = 330
_RIGHT: Final = 190
_BAR: Final = 14
_STEP: Final = 19
_GAP: Final = 14
_TICKS: Final = 6
_LEGEND_COLUMNS: Final = 4
_LEGEND_STEP: Final = 20
_STYLE: Final = """
svg { --paper: #fbfaf8; --ink: #1c1b19; --soft: #5d5a54; --line: #dcd8cf; %s }
@media (prefers-color-scheme: dark) { svg { --paper: #14151a; --ink: #ecebe6; --soft: #a5a39c; --line: #31343d; %s } }
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
.paper { fill: var(--paper); }
.title { font-size: 17px; font-weight: 650; }
.soft { fill: var(--soft); font-size: 12px; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; }
.claimed { fill: none; stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
%s
"""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: before it.
        segments: seconds of each stage, from the left; none for one that is claimed only.
        total: where it ends.
        text: behind it.
        low, high: the range of the samples; equal where there is one sample.
    """

    label: str
    segments: Mapping[str, float] = field(default_factory=dict)
    total: float
    text: str
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """Bars of one thing.

    Attributes:
        label: of all of them.
        bars: from the top.
    """

    label: str
    bars: Sequence[Bar]


def svg(title: str, notes: Sequence[str], stages: Mapping[str, str], groups: Sequence[Group]) -> str:
    """The chart.

    Args:
        title: above it, and what a screen reader reads first.
        notes: small lines below the title.
        stages: what the segments' names mean, in the legend's order; `COLOURS` has as many at most.
        groups: from the top.
    """
    most = max((max(bar.total, bar.high) for group in groups for bar in group.bars), default=0.0) or 1.0
    step = _nice(most / _TICKS)
    scale = (WIDTH - _LEFT - _RIGHT) / most
    shown = [name for name in stages if any(bar.segments.get(name) for group in groups for bar in group.bars)]
    legend_rows = -(-len(shown) // _LEGEND_COLUMNS)
    top = 52 + 17 * len(notes) + legend_rows * _LEGEND_STEP
    height = top + sum(len(group.bars) * _STEP + _GAP for group in groups) + 30
    parts = [_head(title, notes, height, stages), *_legend(shown, list(stages), stages, 44 + 17 * len(notes))]
    number = 0
    while number * step <= most:
        x = _LEFT + number * step * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 26}"/>')
        parts.append(f'<text class="soft middle tick" x="{x:.1f}" y="{height - 10}">{number * step:g} s</text>')
        number += 1
    y = float(top)
    for group in groups:
        parts.append(f'<g class="group"><text class="label" x="16" y="{y + 11:.1f}">{html.escape(group.label)}</text>')
        for bar in group.bars:
            parts += _bar(bar, list(stages), stages, y, scale)
            y += _STEP
        parts.append("</g>")
        y += _GAP
    return "\n".join([*parts, "</svg>", ""])


def _head(title: str, notes: Sequence[str], height: float, stages: Mapping[str, str]) -> str:
    light, dark = (" ".join(f"--s{n}: {pair[side]};" for n, pair in enumerate(COLOURS)) for side in (0, 1))
    fills = "\n".join(f".s{number} {{ fill: var(--s{number}); }}" for number in range(len(stages)))
    said = html.escape(title)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-labelledby="t d">',
        f'<title id="t">{said}</title><desc id="d">{html.escape(" ".join(notes))}</desc>',
        f"<style>{_STYLE % (light, dark, fills)}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height:.0f}" rx="8"/>',
        f'<text class="title" x="16" y="30">{said}</text>',
    ]
    for number, note in enumerate(notes):
        lines.append(f'<text class="soft" x="16" y="{49 + 17 * number}">{html.escape(note)}</text>')
    return "\n".join(lines)


def _legend(shown: Sequence[str], names: Sequence[str], stages: Mapping[str, str], y: int) -> list[str]:
    parts = []
    each = (WIDTH - 32) / _LEGEND_COLUMNS
    for number, name in enumerate(shown):
        at = 16 + (number % _LEGEND_COLUMNS) * each
        below = y + (number // _LEGEND_COLUMNS) * _LEGEND_STEP
        parts.append(f'<rect class="s{names.index(name)}" x="{at:.1f}" y="{below}" width="12" height="12" rx="2"/>')
        parts.append(f'<text class="soft legend" x="{at + 18:.1f}" y="{below + 10}">{html.escape(stages[name])}</text>')
    return parts


def _bar(bar: Bar, names: Sequence[str], stages: Mapping[str, str], y: float, scale: float) -> list[str]:
    parts = [f'<text class="soft end state" x="{_LEFT - 8}" y="{y + 11:.1f}">{html.escape(bar.label)}</text>']
    end = _LEFT + bar.total * scale
    if not bar.segments:
        parts.append(
            f'<rect class="claimed" x="{_LEFT}" y="{y + 1:.1f}" width="{max(1.0, bar.total * scale):.1f}" '
            f'height="{_BAR - 2}"/>'
        )
    at = float(_LEFT)
    for name in names:
        if (spent := bar.segments.get(name, 0.0)) > 0:
            said = html.escape(f"{stages[name]}: {spent:.2f} s")
            parts.append(
                f'<rect class="s{names.index(name)}" x="{at:.2f}" y="{y:.1f}" width="{spent * scale:.2f}" '
                f'height="{_BAR}"><title>{said}</title></rect>'
            )
            at += spent * scale
    if bar.high > bar.low:
        low, high, middle = _LEFT + bar.low * scale, _LEFT + bar.high * scale, y + _BAR / 2
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
        end = max(end, high)
    parts.append(f'<text class="value" x="{end + 6:.1f}" y="{y + 11.5:.1f}">{html.escape(bar.text)}</text>')
    return parts


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 1.0
    while power > step:
        power /= 10
    while power * 10 <= step:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)
