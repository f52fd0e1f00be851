"""The `weightfs` command: one function a subcommand, gathered here."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

import typer

from weightfs.cli import snapshot
from weightfs.cli.lazily import LazyGroup
from weightfs.cli.output import say

_GARBAGE: Final = 50_000
"""Objects that are made before it is looked for."""


class _Commands(LazyGroup):
    COMMANDS: ClassVar[Mapping[str, str]] = {
        "mount": "weightfs.cli.mounting:mount",
        "umount": "weightfs.cli.mounting:umount",
        "status": "weightfs.cli.mounting:status",
        "warm": "weightfs.cli.warming:warm",
        "evict": "weightfs.cli.warming:evict",
        "residency": "weightfs.cli.warming:residency",
        "ls": "weightfs.cli.inspecting:ls",
        "record": "weightfs.cli.recording:record",
        "verify": "weightfs.cli.inspecting:verify",
        "doctor": "weightfs.cli.inspecting:doctor",
        "timeline": "weightfs.cli.timeline:timeline",
        "setup": "weightfs.cli.setup:setup",
        "demo": "weightfs.cli.demo:demo",
    }


app = typer.Typer(
    name="weightfs",
    help="A read-only filesystem for model weights, at the speed of the bare file.",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(snapshot.snapshot)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"weightfs {version('weightfs')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run it, and end.

    What a command imports makes objects by the ten thousand and hardly any garbage: looking for it takes the processor
    20 ms, and so does an interpreter that takes its modules down.
    """
    gc.set_threshold(_GARBAGE)
    try:
        app()
    except SystemExit as e:
        if not isinstance(e.code, int | None) or threading.active_count() > 1:
            raise
        atexit._run_exitfuncs()
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except OSError:  # as said by the interpreter when it ends
            raise e from None
        os._exit((e.code or 0) & 0xFF)
