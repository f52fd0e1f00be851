"""The `weightfs` command: one function a subcommand, gathered here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import typer

from weightfs.cli import snapshot
from weightfs.cli.lazily import LazyGroup


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


def main() -> None:
    """Run it."""
    app()
