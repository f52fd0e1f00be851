"""`snapshot run`: what systemd, a container or an autoscaler starts in place of the command itself."""

from __future__ import annotations

import functools
import sys
from typing import Annotated

import typer

from weightfs import systemd
from weightfs.cli.output import printable, reporting
from weightfs.cli.snapshot_keys import Keys, keyed
from weightfs.cli.snapshot_store import DEFAULT_STORE, StoreFolder
from weightfs.cli.snapshotting import (
    Name,
    ReadyFile,
    ReadyTimeout,
    ReadyUrl,
    Timeout,
    tools,
)
from weightfs.errors import UsageError


@keyed
def run(
    context: typer.Context,
    name: Name,
    create: Annotated[bool, typer.Option("--create", help="Without a snapshot, make one once it is warm.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="With --create, also for one that can't be used.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit when the snapshot can't be restored.")] = False,
    ready_url: ReadyUrl = None,
    ready_file: ReadyFile = None,
    ready_timeout: ReadyTimeout = 600.0,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare the images' digests.")] = False,
    timeout: Timeout = 120.0,
    store: StoreFolder = DEFAULT_STORE,
    *,
    keys: Keys,
) -> None:
    """Run COMMAND from its snapshot if that fits, else start it; in the foreground, with its signals and exit status.

    Example: weightfs snapshot run llama --no-encrypt --create --ready-url http://127.0.0.1:8000/health -- llama-server
    """
    with reporting(as_json=False):
        keys.require_choice()
        command = list(context.args)
        if not command:
            raise UsageError("name the command (-- COMMAND...)")
        if replace and not create:
            raise UsageError("--replace goes with --create")
        from checkpoint import running
        from checkpoint.readiness import Readiness
        from checkpoint.store import Store

        options = running.RunOptions(
            command=command,
            ready=Readiness(url=ready_url, file=ready_file),
            ready_timeout_s=ready_timeout,
            timeout_s=timeout,
            create=create,
            replace=replace,
            strict=strict,
            verify=not no_verify,
            master=functools.cache(keys.master),
        )
        around = running.Surroundings(
            store=lambda: Store(store),
            tools=lambda: tools(store, name),
            say=_say,
            ready=lambda: systemd.notify("READY=1"),
        )
        status = running.run(name, options, around)
    sys.exit(status)


def _say(text: str) -> None:
    sys.stderr.write(printable(f"weightfs: {text}") + "\n")
    sys.stderr.flush()
