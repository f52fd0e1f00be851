"""The `weightfs` command: one function a subcommand, gathered here."""

from __future__ import annotations

import typer

from weightfs.cli import demo, inspecting, mounting, recording, setup, snapshot, timeline, warming

app = typer.Typer(
    name="weightfs",
    help="A read-only filesystem for model weights, at the speed of the bare file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(mounting.mount)
app.command()(mounting.umount)
app.command()(mounting.status)
app.command()(warming.warm)
app.command()(warming.evict)
app.command()(warming.residency)
app.command()(inspecting.ls)
app.command()(recording.record)
app.command()(inspecting.verify)
app.command()(inspecting.doctor)
app.command()(timeline.timeline)
app.command()(setup.setup)
app.command()(demo.demo)
app.add_typer(snapshot.snapshot)


def main() -> None:
    """Run it."""
    app()
