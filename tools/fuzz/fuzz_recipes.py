"""Fuzzes the recipes of snapshots with atheris: any bytes give recipes that can be coded again, or a CorruptError.

    python tools/fuzz/fuzz_recipes.py [libFuzzer options, such as -max_total_time=60]

The seeds are made in a temporary folder.
"""

from __future__ import annotations

import os
import sys
import tempfile

import atheris

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

with atheris.instrument_imports(include=["checkpoint.extents"]):
    from checkpoint.errors import CorruptError
    from checkpoint.extents import ID_BYTES, ChunkBytes, Extent, Recipe, WeightBytes, Zero, decode, encode

WEIGHTS = (1 << 40, 70_000, 5)


def fuzz(data: bytes) -> None:
    try:
        recipes = decode(data, "recipes", weights=WEIGHTS)
    except CorruptError:
        return
    if decode(encode(recipes), "recipes", weights=WEIGHTS) != recipes:
        raise AssertionError("coded again it is something else")
    for recipe in recipes.values():
        for extent in recipe.extents:
            if extent.nbytes < 1:
                raise AssertionError("an extent of no bytes")
            if isinstance(extent, WeightBytes) and not (
                0 <= extent.offset <= extent.offset + extent.nbytes <= WEIGHTS[extent.file]
            ):
                raise AssertionError("a weight file has no such bytes")
            if isinstance(extent, ChunkBytes) and (len(extent.id) != ID_BYTES or extent.at < 0):
                raise AssertionError("no chunk has such bytes")


def seeds() -> list[bytes]:
    one, other = b"1" * ID_BYTES, b"2" * ID_BYTES
    pages: list[Extent] = [
        Zero(4096),
        WeightBytes(0, 999, 1 << 20),
        ChunkBytes(one, 5000),
        WeightBytes(1, 7, 4096),
        Zero(3),
    ]
    return [
        encode({}),
        encode({"core-1.img": Recipe([ChunkBytes(one, 700)]), "pages-1.img": Recipe(pages)}),
        encode({"pages-1.img": Recipe([*pages, ChunkBytes(other, 9, 8), *pages, ChunkBytes(one, 1, 300)])}),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds()):
            with open(os.path.join(corpus, str(number)), "wb") as file:
                file.write(seed)
        atheris.Setup([*sys.argv, corpus], fuzz)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
