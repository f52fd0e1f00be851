"""`warm`, `evict`, `residency`: what is in memory, asked of the daemon whose mount a path lies on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from weightfs import mounts
from weightfs.cli.options import Json
from weightfs.cli.output import emit, fail, human_bytes, printable, reporting, say
from weightfs.cli.placing import control_socket, is_below
from weightfs.control import ask
from weightfs.errors import WeightfsError
from weightfs.sizes import parse_layers

_ANSWER_S: Final = 35.0
_LOOK_S: Final = 0.1
_BAR: Final = 30

Paths = Annotated[list[str], typer.Argument(help="Weight files or folders on a mount.", metavar="PATH...")]


def warm(
    paths: Paths,
    layers: Annotated[str | None, typer.Option(help="Only these layers, as 0-3 or embedding,0-3.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once reading has begun.")] = False,
    as_json: Json = False,
) -> None:
    """Bring models into memory in the order a loader needs them.

    Example: weightfs warm /models/llama
    """
    with reporting(as_json=as_json):
        wanted = None if layers is None else sorted(parse_layers(layers))
        begun: dict[str, dict[str, dict[str, Any]]] = {}
        for path in paths:
            socket, below = _place(path)
            models = _ask(socket, {"command": "warm", "path": below, "layers": wanted}, path)
            begun.setdefault(socket, {}).update({one["model"]: one for one in models})
        started = time.monotonic()
        if not no_wait:
            for socket, models_of in begun.items():
                _watch(socket, models_of)
        seconds = time.monotonic() - started
        done = [one for models_of in begun.values() for one in models_of.values()]
        if as_json:
            emit({"models": done, "seconds": round(seconds, 3)})
        else:
            for one in done:
                what = one["failure"] or ("is being read" if one["active"] else f"{seconds:.1f} s")
                size, read, found = (human_bytes(one[key]) for key in ("bytes", "filled_bytes", "found_bytes"))
                say(f"{printable(one['model'])}: {size}, {read} read, {found} were there: {printable(what)}")
        if failed := next((one for one in done if one["failure"]), None):
            error = WeightfsError(f"is not wholly in memory: {failed['failure']}", path=failed["model"])
            fail(error, as_json=False)  # the one document on stdout is that of the models


def evict(paths: Paths, as_json: Json = False) -> None:
    """Drop models from memory; what a process has mapped, or the kernel has yet to write, stays.

    Example: weightfs evict /models/llama
    """
    with reporting(as_json=as_json):
        found = []
        for path in paths:
            socket, below = _place(path)
            found += _ask(socket, {"command": "evict", "path": below}, path)
        if as_json:
            emit({"models": found})
            return
        for one in found:
            gone, left = human_bytes(one["evicted_bytes"]), human_bytes(one["resident_bytes"])
            why = " (mapped, or not on the disk yet: sync)" if one["resident_bytes"] else ""
            say(f"{printable(one['model'])}: {gone} dropped, {left} stay{why}")


def residency(
    path: Annotated[str, typer.Argument(help="A weight file or folder on a mount.")], as_json: Json = False
) -> None:
    """Show how much of each layer is in memory.

    Example: weightfs residency /models/llama --json
    """
    with reporting(as_json=as_json):
        socket, below = _place(path)
        models = _ask(socket, {"command": "residency", "path": below}, path)
        if as_json:
            whole = {key: sum(one[key] for one in models) for key in ("bytes", "resident_bytes")}
            layers = models[0]["layers"] if len(models) == 1 else []
            emit({**whole, "layers": layers, "models": models})
            return
        for one in models:
            say(f"{printable(one['model'])}: {human_bytes(one['resident_bytes'])} of {human_bytes(one['bytes'])}")
            for layer in one["layers"]:
                part = layer["resident_bytes"] / layer["bytes"] if layer["bytes"] else 1.0
                bar = "█" * round(part * _BAR)
                say(f"  {printable(layer['layer']):>16} {bar:·<{_BAR}} {part:4.0%} of {human_bytes(layer['bytes'])}")


def _place(path: str) -> tuple[str, str]:
    """The control socket of the mount that a path lies on, and the path below the mountpoint.

    Raises:
        WeightfsError: it lies on none, or that can't be asked.
    """
    # Not realpath of the whole: a link that a loader follows has the name it knows.
    above, last = os.path.split(os.path.abspath(path))
    full = os.path.join(os.path.realpath(above), last)
    for here in sorted(mounts.mounted(), key=lambda one: -len(one.mountpoint)):
        if is_below(full, here.mountpoint):
            return control_socket(here), os.path.relpath(full, here.mountpoint) if full != here.mountpoint else ""
    raise WeightfsError("lies on no weightfs mount", path=path, mend="weightfs status shows the mounts there are")


def _ask(socket: str, request: dict[str, Any], path: str) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = ask(socket, request, _ANSWER_S)["models"]
    if not models and not os.path.lexists(path):
        raise WeightfsError("there is no such file or folder", path=path, mend="name one on the mount")
    if not models:
        raise WeightfsError("holds no weights whose headers are good", path=path, mend="weightfs verify tells more")
    return models


def _watch(socket: str, models: dict[str, dict[str, Any]]) -> None:
    """Wait until nothing of it is being read; a terminal sees how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=sum(one["bytes"] for one in models.values()))
        for current in _until_done(socket, list(models)):
            models.update({one["model"]: one for one in current})
            done = sum(one["filled_bytes"] + one["found_bytes"] for one in models.values())
            progress.update(task, completed=done)


def _until_done(socket: str, names: list[str]) -> Iterator[list[dict[str, Any]]]:
    while True:
        current: list[dict[str, Any]] = ask(socket, {"command": "progress", "models": names}, _ANSWER_S)["models"]
        yield current
        if not any(one["active"] for one in current):
            return
        time.sleep(_LOOK_S)
