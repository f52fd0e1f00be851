"""Adds, prunes, mends or changes the key of a store's chunks again and again, killed one system call later each time.

Run as `python -m tests.helpers.dying_chunks FOLDER ACTION`, as `tests.helpers.dying`. The chunks in `FOLDER/NUMBER` are
those of `OLD`, of which `KEPT` are needed.
"""

from __future__ import annotations

import random
from pathlib import Path

from checkpoint.chunks import pack, writing
from checkpoint.chunks.packs import Packs
from tests.helpers.dying import MASTER, NEW_MASTER, die_at, each_dies

CHOOSE = random.Random(1)
OLD = [CHOOSE.randbytes(3000) for _ in range(12)]
KEPT = OLD[::4]
NEW = [CHOOSE.randbytes(3000) for _ in range(6)]
PACK_BYTES = 18_500
"""Three chunks each, of which one is needed."""


def fill(path: str) -> None:
    """Make a store as they are worked on."""
    with Packs(path, MASTER).begin(threads=0) as writer:
        for content in OLD:
            writer.add(memoryview(content))
        writer.commit()


def act(path: str, action: str, number: int) -> None:
    """What dies, or does not; raises nothing."""
    count = die_at(number)
    packs = Packs(path, MASTER)
    if action == "add":
        with packs.begin(threads=2) as writer:
            for content in NEW:
                writer.add(memoryview(content))
            writer.commit()
    elif action == "prune":
        packs.prune(lambda: [pack.digest(packs.digest_key, content) for content in KEPT])
    elif action == "rebuild":
        for index in Path(path).glob("*.index"):
            index.write_bytes(b"damaged")
        packs.rebuild()
    else:
        packs.rotate(NEW_MASTER)
    assert count[0] == number


if __name__ == "__main__":
    setattr(writing, "PACK_BYTES", PACK_BYTES)  # noqa: B010  # it is Final
    each_dies(act)
