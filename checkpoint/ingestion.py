"""Takes the files that CRIU wrote into a store: recipes, and the chunks they need.

Importing this takes the time that NumPy takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from checkpoint import weightfinding
from checkpoint.chunks.packs import PackWriter
from checkpoint.errors import CheckpointError
from checkpoint.extents import ChunkBytes, Recipe, WeightBytes, Zero
from checkpoint.ingest import ingest
from checkpoint.manifest import ImageFile, is_image_name

_KINDS: Final = {Zero: "zeros", WeightBytes: "weights", ChunkBytes: "chunks"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """What was taken in; its chunks are on the disk.

    Attributes:
        recipes: by the name of the file, in order.
        weights: which of the weight files stay in the manifest, ascending; recipes count these alone.
        bytes_added: by how much the packs are larger.
    """

    recipes: dict[str, Recipe]
    weights: tuple[int, ...]
    bytes_added: int

    @property
    def files(self) -> list[ImageFile]:
        """For the manifest."""
        return [ImageFile(name=name, nbytes=recipe.nbytes) for name, recipe in self.recipes.items()]

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """How many bytes are zeros, weights and chunks."""
        found = dict.fromkeys(_KINDS.values(), 0)
        for recipe in self.recipes.values():
            for extent in recipe.extents:
                kind = (
                    "zeros" if isinstance(extent, Zero) else "weights" if isinstance(extent, WeightBytes) else "chunks"
                )
                found[kind] += extent.nbytes
        return found


def take_in(images: str, weights: Sequence[str], writer: PackWriter, *, needed: int, threads: int) -> Ingested:
    """Take in every file of a folder, and commit the chunks.

    Args:
        images: the folder; nothing changes it any more.
        weights: paths of the weight files, in the order of `Manifest.weights`. Whether they have changed since they
            were digested is for the caller to see, afterwards.
        writer: takes the chunks.
        needed: so many of the first weight files stay, and those of the others that files have parts of.
        threads: to use, 1 or more.

    Raises:
        CheckpointError: something can't be read or written, or CRIU left something that is no plain file.
        RetryError: a weight file became shorter.
    """
    recipes = {}
    with weightfinding.opened(weights) as files:
        anchors = weightfinding.Anchors(files, threads=threads)
        for name, path in _files(images):
            recipes[name] = ingest(path, anchors, writer.add, threads=threads)
    used = {one.file for recipe in recipes.values() for one in recipe.extents if isinstance(one, WeightBytes)}
    kept = tuple(sorted(used | set(range(needed))))
    numbers = {old: new for new, old in enumerate(kept)}
    return Ingested(
        recipes={name: _renumbered(recipe, numbers) for name, recipe in recipes.items()},
        weights=kept,
        bytes_added=writer.commit().stored_nbytes,
    )


def _renumbered(recipe: Recipe, numbers: Mapping[int, int]) -> Recipe:
    return Recipe(
        [replace(one, file=numbers[one.file]) if isinstance(one, WeightBytes) else one for one in recipe.extents]
    )


def _files(images: str) -> list[tuple[str, str]]:
    found = []
    with os.scandir(images) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False) or not is_image_name(entry.name):
                raise CheckpointError("can't be part of a snapshot: it is no plain file", path=entry.path)
            found.append((entry.name, entry.path))
    return sorted(found)
