"""First pages of tensors are read together, and nothing else is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from prefetch.glances import MOST, glance
from prefetch.plan import PAGE_BYTES
from prefetch.residency import drop, resident_bytes
from weightfs.formats.layout import Role, TensorExtent

MIB = 1 << 20
SOON_S = 10.0


def tensor(offset: int, nbytes: int = MIB, file: str = "f") -> TensorExtent:
    return TensorExtent(f"model.layers.{offset}.a", "U8", (nbytes,), file, offset, nbytes, 0, Role.BLOCK)


def test_first_pages_come_into_memory_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(8 * MIB))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        drop(file.fileno())
        starts = [MIB + 8, 3 * MIB, 5 * MIB + PAGE_BYTES]
        assert glance([tensor(one) for one in starts], {"f": file.fileno()}) == len(starts)
        ends = time.monotonic() + SOON_S
        while resident_bytes(file.fileno(), 0, 8 * MIB) < len(starts) * PAGE_BYTES:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert resident_bytes(file.fileno(), 0, 8 * MIB) == len(starts) * PAGE_BYTES
        assert all(resident_bytes(file.fileno(), one, 1) for one in starts)


def test_a_page_is_asked_for_once_and_never_too_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, nbytes, advice: asked.append((fd, offset)))
    assert glance([tensor(8, 8), tensor(16, 8), tensor(24, 0), tensor(0, 8, "g")], {"f": 3, "g": 4}) == 2
    assert asked == [(3, 0), (4, 0)]
    assert glance([tensor(at * MIB) for at in range(2 * MOST)], {"f": 3}) == MOST


def test_a_file_that_cannot_be_read_is_passed_over() -> None:
    assert glance([tensor(0)], {"f": -1}) == 1
