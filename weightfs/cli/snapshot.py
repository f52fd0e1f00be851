"""`weightfs snapshot`: the subcommands, gathered here."""

from __future__ import annotations

import typer

from weightfs.cli import snapshot_run, snapshot_store, snapshotting

snapshot = typer.Typer(
    name="snapshot",
    help="Snapshot a warmed process with its GPU state, and bring it back.",
    no_args_is_help=True,
)
snapshot.command(context_settings=snapshotting.REST)(snapshotting.create)
snapshot.command()(snapshotting.restore)
snapshot.command(context_settings=snapshotting.REST)(snapshot_run.run)
snapshot.command()(snapshotting.recover)
snapshot.command("list")(snapshot_store.list_snapshots)
snapshot.command()(snapshot_store.show)
snapshot.command()(snapshot_store.verify)
snapshot.command()(snapshot_store.rm)
snapshot.command()(snapshot_store.prune)
