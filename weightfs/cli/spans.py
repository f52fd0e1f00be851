"""What went on when, as bars of text, one below the other. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from weightfs.cli.output import printable

_BAR: Final = "#"
_BESIDE: Final = "="
_LEAST_SHARE: Final = 0.005
"""What took less of the whole would not be seen, and has no line."""


def bars(spans: Sequence[Mapping[str, Any]], *, width: int = 60) -> list[str]:
    """A line for each span, in the order in which they began: its bar, when it began, how long it took, its name.

    Args:
        spans: with `name`, `start_s`, `end_s`, and `beside`: those are drawn with another sign.
        width: characters for the whole time.
    """
    whole_s = max((one["end_s"] for one in spans), default=0.0)
    lines = []
    for one in sorted(spans, key=lambda span: float(span["start_s"])):
        took_s = one["end_s"] - one["start_s"]
        if took_s < _LEAST_SHARE * whole_s or took_s <= 0:
            continue
        start = min(width - 1, round(one["start_s"] / whole_s * width))
        length = max(1, round(one["end_s"] / whole_s * width) - start)
        bar = " " * start + (_BESIDE if one["beside"] else _BAR) * length
        lines.append(f"{bar:<{width}} {one['start_s']:7.3f} {took_s:7.3f} s  {printable(one['name'])}")
    return lines
