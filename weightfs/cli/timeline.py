"""`timeline`: what happened while models were loaded, as text, as JSON or as a page."""

from __future__ import annotations

import os
from typing import Annotated, Any, Final

import typer

from weightfs.cli import waterfall
from weightfs.cli.mounting import find
from weightfs.cli.options import Json
from weightfs.cli.output import emit, human_bytes, printable, reporting, say
from weightfs.cli.placing import control_socket
from weightfs.control import ask
from weightfs.errors import WeightfsError

_ANSWER_S: Final = 10.0
_BAR: Final = 40


def timeline(
    mountpoint: Annotated[str, typer.Argument(help="A mount.")],
    html: Annotated[str | None, typer.Option(help="Write a page with waterfalls there.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Show how the last models came into memory: what began it, which part came when.

    Example: weightfs timeline /models --html loads.html
    """
    with reporting(as_json=as_json):
        here = find(mountpoint)
        document = ask(control_socket(here), {"command": "timeline"}, _ANSWER_S)
        if html is not None:
            _write(html, waterfall.page(document, here.mountpoint))
        if as_json:
            emit({"loads": document["loads"]})
        elif html is not None:
            say(f"{printable(html)}: {len(document['loads'])} loads")
        else:
            for load in document["loads"]:
                _show(load)


def _write(path: str, text: str) -> None:
    """Raises WeightfsError: it can't be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise WeightfsError(f"can't be written: {os.strerror(e.errno or 0)}", path=path) from e


def _show(load: dict[str, Any]) -> None:
    size = human_bytes(sum(layer["bytes"] for layer in load["layers"]))
    ended = "" if load["finished_s"] is None else f" after {load['finished_s']:.2f} s"
    say(
        f"{printable(load['model'])}: {size}, {load['started']}, by {printable(load['trigger'])}: "
        f"{printable(load['outcome'] or 'goes on')}{ended}"
    )
    layers = waterfall.arrivals(load)
    span_s = max((one.last_s for one in layers if one.last_s is not None), default=0.0) or 1.0
    for one in layers:
        if one.first_s is None or one.last_s is None:
            bar, told = "", f"{human_bytes(one.before_bytes)} were there"
        else:
            left = min(_BAR - 1, int(one.first_s / span_s * _BAR))
            bar = " " * left + "█" * max(1, round(one.last_s / span_s * _BAR) - left)
            told = f"{one.first_s:.2f} to {one.last_s:.2f} s"
        say(f"  {printable(one.label):>16} {bar:<{_BAR}} {told}")
