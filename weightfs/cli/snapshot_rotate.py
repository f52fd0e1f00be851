"""`snapshot rotate`: another key for what is encrypted. `checkpoint` is imported where it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from weightfs.cli.options import Json
from weightfs.cli.output import emit, fail_for, reporting, say
from weightfs.cli.snapshot_keys import KeyCommand, KeyEnv, KeyFile, one_key
from weightfs.cli.snapshot_store import DEFAULT_STORE, StoreFolder
from weightfs.errors import UsageError


def rotate(
    key_file: KeyFile = None,
    key_env: KeyEnv = None,
    key_command: KeyCommand = None,
    new_key_file: Annotated[str | None, typer.Option(help="File with the 32 raw bytes of the new key.")] = None,
    new_key_env: Annotated[str | None, typer.Option(help="Variable that holds the new key.")] = None,
    new_key_command: Annotated[str | None, typer.Option(help="Command that prints the new key.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Have another key open what is encrypted, and the one it has until now nothing. No memory is written anew.

    Restores may go on meanwhile; while a snapshot is made the exit code is 75. Interrupted, give the same two keys
    again. Whoever has a copy of the store from before and the old key can still read that copy.

    Example: weightfs snapshot rotate --key-file /etc/weightfs.key --new-key-file /etc/weightfs.key.new
    """
    with reporting(as_json=as_json):
        old = one_key(key_file, key_env, key_command)
        new = one_key(new_key_file, new_key_env, new_key_command, prefix="new-")
        if old == new:
            raise UsageError("both keys are the same")
        from checkpoint.rotation import rotate as rotated
        from checkpoint.store import Store

        done = rotated(Store(store), old, new)
        if as_json:
            emit(
                {
                    "key": new.id.hex(),
                    "snapshots": done.objects,
                    "packs": done.packs,
                    "failed": [str(error) for error in done.faults.values()],
                }
            )
        else:
            say(f"{done.objects} snapshots and {done.packs} packs have the key {new.id.hex()}")
        fail_for(list(done.faults.values()))
