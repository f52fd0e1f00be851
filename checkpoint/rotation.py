"""Another master key for a store: its packs, and the recipes of every snapshot that is encrypted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

from checkpoint import guarded
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Rotated
from checkpoint.chunks.rotating import Change
from checkpoint.chunks.sealing import key_id_of
from checkpoint.contents import Vault, read_recipes
from checkpoint.errors import CheckpointError, CorruptError, SnapshotNameError
from checkpoint.snapshots import RECIPES
from checkpoint.store import Store

_IN_USE_S: Final = 30.0
_NO_KEY: Final = bytes(8)


def rotate(store: Store, old: MasterKey, new: MasterKey) -> Rotated:
    """Have another key open all that is encrypted; at each moment one of the two does. It may be done again.

    Restores go on meanwhile: what they need of the key they read at their beginning. Manifests are not looked at, so
    snapshots that a newer weightfs wrote, or whose manifest is damaged, have the new key as well.

    Args:
        store: of the snapshots.
        old: the key it has, or had before this was interrupted.
        new: the one it is to have.

    Raises:
        CorruptError: it has neither key.
        RetryError: a snapshot is made or removed.
        CheckpointError: nothing is encrypted there, or something can't be read or written.
    """
    packs = Vault(store.path, old).packs
    if not os.path.isdir(packs.folder.path):
        raise CheckpointError("holds nothing that is encrypted", path=store.path, mend="name the store with --store")

    def every_object(change: Change) -> tuple[int, dict[str, CheckpointError]]:
        count = 0
        faults: dict[str, CheckpointError] = {}
        for name in filter(lambda each: os.path.isdir(os.path.join(store.path, each)), store.names()):
            with contextlib.suppress(SnapshotNameError):  # it was removed meanwhile, or can't be a snapshot
                try:
                    with store.lock(name, shared=True, timeout_s=_IN_USE_S):
                        count += _changed(store, name, change, packs.folder.draft)
                except CorruptError as e:
                    faults[e.path or name] = e
        return count, faults

    return packs.rotate(new, every_object)


def _changed(store: Store, name: str, change: Change, draft: Callable[[bytes], str]) -> bool:
    """Change the recipes of a snapshot that is locked, where they are encrypted; gives whether they are."""
    folder = os.path.join(store.path, name)
    path = os.path.join(folder, RECIPES)
    if not os.path.lexists(path):
        return False
    content = read_recipes(path)
    if key_id_of(content) == _NO_KEY:
        return False
    changed = change(content, path)
    if changed != content:
        written = draft(changed)
        try:
            os.rename(written, path)
            with guarded.opened(folder, guarded.FOLDER, folder) as fd:
                os.fsync(fd)
        except OSError as e:
            raise guarded.unwritable(path, e) from e
    return True
