"""Bars of text show what went on beside what."""

from __future__ import annotations

from typing import Any

from weightfs.cli.spans import bars


def span(name: str, start_s: float, end_s: float, *, beside: bool = False) -> dict[str, Any]:
    return {"name": name, "start_s": start_s, "end_s": end_s, "beside": beside}


def test_bars_are_where_and_as_long_as_they_were() -> None:
    lines = bars(
        [
            span("cuda restore", 0.5, 1.0),
            span("filling", 0.25, 0.75, beside=True),
            span("open", 0.0, 0.25),
            span("too short to be seen", 0.5, 0.501),
        ],
        width=8,
    )
    assert lines == [
        "##         0.000   0.250 s  open",
        "  ====     0.250   0.500 s  filling",
        "    ####   0.500   0.500 s  cuda restore",
    ]


def test_nothing_and_what_took_no_time() -> None:
    assert bars([]) == []
    assert bars([span("at once", 0.0, 0.0)]) == []
    assert bars([span("last", 1.0, 1.001), span("first", 0.0, 1.0)], width=4)[0].startswith("####")


def test_names_can_do_nothing_to_a_terminal() -> None:
    assert "\x1b" not in bars([span("\x1b[2J", 0.0, 1.0)])[0]
