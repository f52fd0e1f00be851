"""Where CRIU dumps to, and what becomes of its images: kept as they are, or taken into the store's chunks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from checkpoint.drafts import Draft
from checkpoint.manifest import Manifest
from checkpoint.preflight_memory import available
from checkpoint.snapshots import Snapshot

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey
    from checkpoint.chunks.packs import PackWriter
    from checkpoint.contents import Vault
    from checkpoint.ingestion import Ingested
    from checkpoint.scratch import Scratch

IMAGES = "images"
"""Name of the link to the folder that CRIU dumps to or restores from, in the work folder."""


class Keeping(Protocol):
    """A folder for CRIU, and what comes after.

    Attributes:
        images: the folder, empty.
        inherited: descriptors that CRIU needs to reach it.
    """

    images: str
    inherited: tuple[int, ...]

    def take_in(self, weights: Sequence[str], *, needed: int) -> None:
        """Have what CRIU wrote be on the disk, but for the manifest and what goes with it.

        Args:
            weights: paths of the weight files, in the order of `Manifest.weights`.
            needed: so many of the first stay in the manifest; others only if memory has parts of them.
        """

    def commit(self, said: Manifest) -> Snapshot:
        """Give the snapshot its name; errors are those of `Draft.commit`."""


class Plain:
    """CRIU writes into the draft, and the draft digests it.

    Args:
        draft: of the snapshot.
    """

    def __init__(self, draft: Draft) -> None:
        self.images = draft.images
        self.inherited: tuple[int, ...] = ()
        self._draft = draft

    def take_in(self, weights: Sequence[str], *, needed: int) -> None:
        """See `Keeping`: the draft does it."""

    def commit(self, said: Manifest) -> Snapshot:
        """See `Keeping`."""
        return self._draft.commit(said)


class Chunked:
    """CRIU writes into memory; the store takes recipes and chunks.

    Args:
        draft: of the snapshot.
        vault: takes the recipes.
        writer: takes the chunks.
        scratch: the folder.
        state: for generations.
    """

    def __init__(self, draft: Draft, vault: Vault, writer: PackWriter, scratch: Scratch, state: str) -> None:
        self.images = scratch.path
        self.inherited: tuple[int, ...] = (scratch.fd,)
        self._draft = draft
        self._vault = vault
        self._writer = writer
        self._state = state
        self._taken: Ingested | None = None

    def take_in(self, weights: Sequence[str], *, needed: int) -> None:
        """See `Keeping`."""
        from checkpoint.ingestion import take_in  # NumPy, which takes a while, and not before it is needed

        threads = len(os.sched_getaffinity(0))
        self._taken = take_in(self.images, weights, self._writer, needed=needed, threads=threads)

    def commit(self, said: Manifest) -> Snapshot:
        """See `Keeping`."""
        from checkpoint.contents import Contents
        from checkpoint.generations import Generations

        taken = self._taken
        assert taken is not None
        generations = Generations(self._state, self._vault.packs.digest_key)
        contents = Contents(generation=generations.next(said.name), recipes=taken.recipes)
        complete = msgspec.structs.replace(
            said,
            content="recipes",
            is_encrypted=self._vault.master is not None,
            weights=[said.weights[number] for number in taken.weights],
            files=taken.files,
            bytes_logical=sum(file.nbytes for file in taken.files),
            bytes_by_kind=taken.bytes_by_kind,
            bytes_added=taken.bytes_added,
        )
        made = self._draft.commit(
            complete, sealed=lambda content: self._vault.seal(said.name, said.id, content, contents)
        )
        generations.note(said.name, contents.generation)
        return made


def require_key(store: str, *, plain: bool, master: MasterKey | None) -> None:
    """Refuse a key before a process is started, or dumped, for nothing.

    Args:
        store: its folder, which may not be there.
        plain: CRIU's images are kept as they are.
        master: the key to encrypt with; None where nothing is encrypted.

    Raises:
        CorruptError: it is not that of the store's chunks.
        CheckpointError: that can't be told.
    """
    if not plain:
        from checkpoint.contents import Vault

        Vault(store, master).require_fit()


@contextlib.contextmanager
def keeping_in(draft: Draft, work: str, state: str, *, plain: bool, master: MasterKey | None) -> Iterator[Keeping]:
    """Begin to keep a snapshot's images. Until the context ends no chunk of the store is pruned.

    Args:
        draft: of the snapshot.
        work: an existing folder.
        state: the folder for what outlives a command.
        plain: CRIU's images are kept as they are.
        master: the key to encrypt with; None where nothing is encrypted.

    Raises:
        MisfitError: what is to be encrypted could be swapped.
        CorruptError: the key is not that of the store's chunks.
        RetryError: chunks are being pruned.
        CheckpointError: the store can't be written.
    """
    if plain:
        yield Plain(draft)
        return
    from checkpoint.contents import Vault
    from checkpoint.scratch import Scratch

    vault = Vault(os.path.dirname(draft.folder), master)
    with (
        vault.packs.begin(threads=0) as writer,  # those that take images in compress: more would wait for each other
        Scratch(os.path.join(work, IMAGES), nbytes=available().nbytes, must_not_swap=master is not None) as scratch,
    ):
        yield Chunked(draft, vault, writer, scratch, state)
