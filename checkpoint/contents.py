"""What is in a snapshot that is not plain: recipes, sealed and bound to it, and chunks in the store's packs.

    STORE/.chunks/              packs of what is encrypted, all with one master key
    STORE/.chunks-open/         packs of what is not
    STORE/NAME/recipes          sealed: generation 8 (little-endian), then the recipes as `extents` codes them

Recipes are bound to the name, the id and the manifest of their snapshot: with another one's they do not open. So a
manifest is authentic where its recipes open.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from checkpoint import extents, guarded
from checkpoint.chunks import objects
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Packs
from checkpoint.chunks.sealing import key_id_of
from checkpoint.errors import CheckpointError, CorruptError
from checkpoint.extents import ChunkBytes, Recipe
from checkpoint.shelf import CHUNKS, CHUNKS_OPEN
from checkpoint.snapshots import Snapshot, digest_of

_MOST_BYTES: Final = 1 << 30
_GENERATION: Final = struct.Struct("<Q")
_ANEW: Final = "make the snapshot anew"


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The recipes of a snapshot, authentic.

    Attributes:
        generation: the later one of two snapshots of a name has the higher one.
        recipes: by the name of the file that CRIU wrote.
    """

    generation: int
    recipes: Mapping[str, Recipe]

    def chunks(self) -> Iterator[bytes]:
        """The ids of all chunks, each once, in the order of their first use."""
        return iter(dict.fromkeys(id_ for recipe in self.recipes.values() for id_ in recipe.chunks()))


class Vault:
    """The chunks of a store that are sealed with one key, and the recipes that refer to them.

    Args:
        store: its folder.
        master: None for what is not encrypted.

    Attributes:
        master: see above.
        packs: the chunks.
    """

    def __init__(self, store: str, master: MasterKey | None) -> None:
        self.master = master
        self.packs = Packs(os.path.join(store, CHUNKS_OPEN if master is None else CHUNKS), master)

    def require_fit(self) -> None:
        """Refuse a key that is not the one of the chunks that are there.

        Raises:
            CorruptError: it is not.
        """
        self.packs.folder.digest_key()

    def seal(self, name: str, id_: str, manifest: bytes, contents: Contents) -> bytes:
        """What is stored as the recipes of a snapshot; some chunks must have been added before.

        Args:
            name, id_: of the snapshot.
            manifest: all that is in its `manifest.json`.
            contents: to be stored.
        """
        content = _GENERATION.pack(contents.generation) + extents.encode(contents.recipes)
        bound = _bound(name, id_, digest_of(manifest))
        return objects.seal(self.master, self.packs.digest_key, content, bound)

    def open(self, snapshot: Snapshot) -> Contents:
        """The recipes of a snapshot that is not plain.

        Raises:
            CorruptError: they are not what was written with this manifest, or the key is another.
            CheckpointError: they can't be read.
        """
        said, path = snapshot.manifest, snapshot.recipes
        content = read_recipes(path)
        bound = _bound(said.name, said.id, snapshot.digest)
        objects.envelope_of(content, self.master, path)  # of all that a wrong key makes fail, what tells so
        plain = objects.open_(self.master, self.packs.digest_key, content, bound, path)
        if len(plain) < _GENERATION.size:
            raise CorruptError("ends too early", path=path, mend=_ANEW)
        recipes = extents.decode(plain[_GENERATION.size :], path, weights=[one.nbytes for one in said.weights])
        if {name: recipe.nbytes for name, recipe in recipes.items()} != {one.name: one.nbytes for one in said.files}:
            raise CorruptError("tells of other files than the manifest", path=path, mend=_ANEW)
        return Contents(generation=_GENERATION.unpack_from(plain)[0], recipes=recipes)

    def verify(self, snapshot: Snapshot) -> None:
        """Read every chunk that a snapshot needs.

        Raises:
            CorruptError: it, or a chunk, is not what was written.
            CheckpointError: something can't be read.
        """
        needed: dict[bytes, int] = {}
        for recipe in self.open(snapshot).recipes.values():
            for extent in recipe.extents:
                if isinstance(extent, ChunkBytes):
                    needed[extent.id] = max(needed.get(extent.id, 0), extent.at + extent.nbytes)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for (id_, nbytes), found in zip(needed.items(), pool.map(self._length, needed), strict=True):
                if found < nbytes:
                    raise CorruptError(f"needs a chunk {id_.hex()} of {nbytes} bytes", path=snapshot.recipes)

    def _length(self, id_: bytes) -> int:
        return len(self.packs.get(id_))


def key_id(snapshot: Snapshot) -> str:
    """The id of the key that a snapshot is encrypted with, as it lies there; empty where it is not.

    Raises:
        CheckpointError: it can't be read.
    """
    found = key_id_of(read_recipes(snapshot.recipes)) if snapshot.manifest.is_encrypted else None
    return found.hex() if found is not None else ""


def live_chunks(vault: Vault, snapshots: Callable[[], Iterable[Snapshot]]) -> Callable[[], set[bytes]]:
    """The ids of all chunks that snapshots need, found when it is called; for `Packs.prune`.

    Args:
        vault: of the chunks.
        snapshots: gives those of the store; one that is removed meanwhile needs nothing.
    """

    def found() -> set[bytes]:
        ids: set[bytes] = set()
        for snapshot in snapshots():
            if snapshot.manifest.content == "plain" or snapshot.manifest.is_encrypted is not (vault.master is not None):
                continue
            try:
                ids.update(vault.open(snapshot).chunks())
            except CheckpointError:
                if os.path.lexists(snapshot.recipes):
                    raise
        return ids

    return found


def _bound(name: str, id_: str, digest: bytes) -> bytes:
    return b"\0".join((b"weightfs recipes", name.encode(), id_.encode(), digest))


def read_recipes(path: str) -> bytes:
    """The recipes of a snapshot as they lie there, sealed.

    Raises:
        CorruptError: they are missing, too large, or others may write them.
        CheckpointError: they can't be read.
    """
    try:
        with guarded.opened(path, guarded.FILE, path) as fd, open(fd, "rb", closefd=False) as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as e:
        raise guarded.unreadable(path, e) from e
    if len(content) > _MOST_BYTES:
        raise CorruptError("is too large for recipes", path=path, mend=_ANEW)
    return content
