"""`weightfs snapshot`: the subcommands, gathered here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import typer

from weightfs.cli.lazily import LazyGroup


class _Commands(LazyGroup):
    COMMANDS: ClassVar[Mapping[str, str]] = {
        "create": "weightfs.cli.snapshotting:create",
        "restore": "weightfs.cli.snapshotting:restore",
        "run": "weightfs.cli.snapshot_run:run",
        "recover": "weightfs.cli.snapshotting:recover",
        "list": "weightfs.cli.snapshot_store:list_snapshots",
        "show": "weightfs.cli.snapshot_store:show",
        "verify": "weightfs.cli.snapshot_store:verify",
        "rm": "weightfs.cli.snapshot_store:rm",
        "prune": "weightfs.cli.snapshot_store:prune",
        "rotate": "weightfs.cli.snapshot_rotate:rotate",
    }
    WITH_REST: ClassVar[frozenset[str]] = frozenset({"create", "run"})


snapshot = typer.Typer(
    name="snapshot",
    help="Snapshot a warmed process with its GPU state, and bring it back.",
    cls=_Commands,
    no_args_is_help=True,
)
