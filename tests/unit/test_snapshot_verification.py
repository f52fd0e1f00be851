"""What is verified in two threads is counted once, all of it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from checkpoint.verification import Verification


def test_both_parts_count_whichever_ends_first() -> None:
    """The images that are read meanwhile come to their end while the others are still read."""
    has_begun, has_ended = threading.Event(), threading.Event()
    sizes = {"pages-1.img": 1000, "core-1.img": 10, "mm-1.img": 1}

    def verify(names: Collection[str], stopping: threading.Event | None = None) -> int:
        if stopping is None:
            has_begun.set()
            assert has_ended.wait(20)
        else:
            assert has_begun.wait(20)
        return sum(sizes[name] for name in names)

    files = [SimpleNamespace(name=name) for name in sizes]
    snapshot: Any = SimpleNamespace(manifest=SimpleNamespace(files=files), verify=verify)
    with Verification(snapshot, ["pages-1.img"]) as verification:
        read = threading.Thread(target=verification.others)
        read.start()
        verification._thread.join()
        has_ended.set()
        read.join()
        assert verification.finish().nbytes == 1011
