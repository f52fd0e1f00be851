"""Has the kernel read what a restore will need, from its first moment on: chunks, and the weights that recipes name.

Weights on a weightfs mount are read ahead in the folder that the mount shows: through the mount a hint would fill a
cache of its own that nobody reads. Nothing here is needed; whatever fails is left out.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from checkpoint import in_use
from checkpoint.errors import CheckpointError
from checkpoint.extents import Recipe, WeightBytes
from checkpoint.manifest import Weight

if TYPE_CHECKING:
    from checkpoint.contents import Contents, Vault

_STEP_BYTES: Final = 16 << 20


def read_ahead(contents: Contents, vault: Vault, weights: Sequence[Weight]) -> threading.Thread:
    """Begin; gives the thread that does it, which nobody needs to wait for.

    Args:
        contents: of the snapshot.
        vault: has the chunks.
        weights: of the manifest.
    """

    def ahead() -> None:
        with contextlib.suppress(CheckpointError, OSError):
            vault.packs.prefetch(list(contents.chunks()))
        sources = {one.mountpoint: one.source for one in in_use.mounts_seen(os.getpid())}
        for number, runs in weight_runs(contents.recipes).items():
            with contextlib.suppress(OSError):
                _hint(_backing(weights[number], sources), runs)

    thread = threading.Thread(target=ahead, name="read-ahead", daemon=True)
    thread.start()
    return thread


def weight_runs(recipes: Mapping[str, Recipe]) -> dict[int, list[tuple[int, int]]]:
    """Start and end of the parts of each weight file, by its number, ascending and merged."""
    parts: dict[int, list[tuple[int, int]]] = {}
    for recipe in recipes.values():
        for one in recipe.extents:
            if isinstance(one, WeightBytes):
                parts.setdefault(one.file, []).append((one.offset, one.offset + one.nbytes))
    return {number: list(_merged(sorted(runs))) for number, runs in parts.items()}


def _merged(runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    start, end = runs[0]
    for low, high in runs[1:]:
        if low > end:
            yield start, end
            start, end = low, high
        end = max(end, high)
    yield start, end


def _backing(weight: Weight, sources: Mapping[str, str]) -> str:
    if weight.mountpoint is None:
        return weight.path
    return os.path.join(sources.get(weight.mountpoint, weight.mountpoint), weight.path)


def _hint(path: str, runs: Sequence[tuple[int, int]]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for start, end in runs:
            for low in range(start, end, _STEP_BYTES):
                os.posix_fadvise(fd, low, min(_STEP_BYTES, end - low), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
