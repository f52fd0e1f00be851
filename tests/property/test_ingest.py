"""Images put together at random are what their recipes say, and what was put in of weights is found."""

from __future__ import annotations

import os
import tempfile
from typing import Final

import blake3
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.extents import Extent, WeightBytes, Zero
from checkpoint.ingest import MOST_CHUNK_BYTES, ingest
from checkpoint.weightfinding import SHORTEST_BYTES, Anchors, WeightFile

PAGE: Final = 4096
CERTAIN_BYTES: Final = 2 * SHORTEST_BYTES
"""A part of a tensor that is longer is found wherever it begins."""
_rng = np.random.default_rng(1)
WEIGHTS: Final = (_rng.bytes(700_000), _rng.bytes(300_000) + bytes(50_000) + b"\x80\x3f" * 40_000 + _rng.bytes(100_000))
"""Tensors begin at multiples of 8, as headers have it."""
TENSORS: Final = (((8, 99_992), (100_000, 200_008), (300_008, 399_992)), ((0, 430_000), (430_000, 100_000)))
NOISE: Final = _rng.bytes(1 << 20)

pieces = st.one_of(
    st.tuples(st.just("noise"), st.integers(0, 400_000), st.integers(0, 300_000)),
    st.tuples(st.just("zeros"), st.just(0), st.integers(0, 300_000)),
    st.tuples(st.just("first"), st.integers(0, 87_000).map(lambda words: words * 8), st.integers(1, 500_000)),
    st.tuples(st.just("second"), st.integers(0, 66_000).map(lambda words: words * 8), st.integers(1, 500_000)),
)


@settings(max_examples=60, deadline=None)  # threads on a busy machine
@given(laid=st.lists(pieces, max_size=8), threads=st.integers(1, 3), tail=st.integers(0, PAGE))
def test_a_recipe_is_its_image(laid: list[tuple[str, int, int]], threads: int, tail: int) -> None:
    image, planted = bytearray(), 0
    for kind, offset, nbytes in laid:
        if kind in ("first", "second"):
            image += bytes(-len(image) % 16)
            part = WEIGHTS[kind == "second"][offset : offset + nbytes]
            planted += max(0, len(part) // PAGE - 1) * PAGE if kind == "first" and len(part) > CERTAIN_BYTES else 0
        else:
            part = NOISE[offset : offset + nbytes] if kind == "noise" else bytes(nbytes)
        image += part
    image += NOISE[:tail]
    chunks: dict[bytes, bytes] = {}

    def add(content: memoryview) -> bytes:
        found = blake3.blake3(content).digest()
        chunks[found] = bytes(content)
        return found

    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("first", "second", "image")]
        for path, content in zip(paths, (*WEIGHTS, bytes(image)), strict=True):
            with open(path, "wb") as file:
                file.write(content)
        fds = [os.open(path, os.O_RDONLY) for path in paths[:2]]
        try:
            files = [
                WeightFile(path=path, fd=fd, nbytes=len(content), tensors=tensors)
                for path, fd, content, tensors in zip(paths[:2], fds, WEIGHTS, TENSORS, strict=True)
            ]
            recipe = ingest(paths[2], Anchors(files, threads=1), add, threads=threads)
        finally:
            for fd in fds:
                os.close(fd)

    def content_of(extent: Extent) -> bytes:
        if isinstance(extent, Zero):
            return bytes(extent.nbytes)
        if isinstance(extent, WeightBytes):
            return WEIGHTS[extent.file][extent.offset : extent.offset + extent.nbytes]
        return chunks[extent.id]

    assert b"".join(map(content_of, recipe.extents)) == image
    assert all(len(content) <= MOST_CHUNK_BYTES for content in chunks.values())
    found = [extent.nbytes for extent in recipe.extents if isinstance(extent, WeightBytes) and extent.file == 0]
    assert all(nbytes >= SHORTEST_BYTES and nbytes % PAGE == 0 for nbytes in found)
    assert sum(found) >= planted
