"""A snapshot of which nothing is believed but what was found to be authentic, ready to be laid out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from checkpoint.digests import Identity
from checkpoint.errors import CorruptError
from checkpoint.keeping import IMAGES
from checkpoint.laying import Laid, LaidPlain
from checkpoint.preflight_memory import available
from checkpoint.snapshots import Snapshot

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey
    from checkpoint.chunks.openers import Openers


class Readable:
    """A snapshot that is about to be restored; what it needs begins to be read ahead.

    Args:
        snapshot: as the store has it.
        state: the folder for what outlives a command.
        master: the key it is encrypted with; None where it must not be encrypted.

    Raises:
        CorruptError: it is not what was written, the key is another, or there was a newer one before.
        CheckpointError: it can't be read.
    """

    def __init__(self, snapshot: Snapshot, state: str, master: MasterKey | None) -> None:
        self._snapshot = snapshot
        self._master = master
        self._openers: Openers | None = None
        if self.is_plain:
            snapshot.require_not_encrypted(master)
            return
        from checkpoint.ahead import read_ahead
        from checkpoint.chunks.openers import Openers
        from checkpoint.contents import Vault
        from checkpoint.generations import Generations

        self._vault = Vault(os.path.dirname(snapshot.folder), master)
        self._contents = self._vault.open(snapshot)
        generations = Generations(state, self._vault.packs.digest_key)
        generations.require_newest(snapshot.manifest.name, self._contents.generation, snapshot.folder)
        generations.note(snapshot.manifest.name, self._contents.generation)
        self._openers = Openers(self._vault.packs)
        self._openers.begin()  # before there are threads
        read_ahead(self._contents, self._vault, snapshot.manifest.weights)

    def close(self) -> None:
        """End what it began; a second call does nothing."""
        if self._openers is not None:
            self._openers.close()

    @property
    def is_plain(self) -> bool:
        """Whether CRIU's images are there as they are."""
        return self._snapshot.manifest.content == "plain"

    @contextlib.contextmanager
    def laid_out(self, work: str, weights: Mapping[str, Identity]) -> Iterator[Laid]:
        """The images, for CRIU to read.

        Args:
            work: an existing folder.
            weights: what `check_weights` gave.

        Raises:
            MisfitError: what is encrypted could be swapped.
            CorruptError: something is not what was written.
            CheckpointError: it can't be read or written.
        """
        if self._openers is None:
            yield LaidPlain(self._snapshot.images)
            return
        from checkpoint.laying import LaidOut
        from checkpoint.pages import Sources
        from checkpoint.scratch import Scratch

        if len(weights) != len(self._snapshot.manifest.weights):
            raise CorruptError("names a weight file twice", path=self._snapshot.folder, mend="make the snapshot anew")
        threads = len(os.sched_getaffinity(0))
        must_not_swap = self._master is not None
        with (
            Scratch(os.path.join(work, IMAGES), nbytes=available().nbytes, must_not_swap=must_not_swap) as scratch,
            Sources(weights, self._openers) as sources,
        ):
            yield LaidOut(self._contents, sources, scratch, threads=threads)
