"""A memory control group of our own, with a limit."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.memory import MemoryGroup, memory_group


@contextlib.contextmanager
def limited_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group that limits memory; empty, and gone with the block. Skips where none can be made."""
    lacks = "this machine lacks a memory control group that may be written"
    own = memory_group()
    if own is not None and own.version == 1:
        top, parent, setting = own.top, own.path, "memory.limit_in_bytes"
    else:
        # Version 2: a group with processes has none with controllers below it, so it goes below the topmost.
        top = parent = "/sys/fs/cgroup"
        setting = "memory.max"
        with contextlib.suppress(OSError):
            if "memory" not in Path(top, "cgroup.subtree_control").read_text().split():
                pytest.skip(lacks)
    place = os.path.join(parent, f"weightfs-test-{os.getpid()}")
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip(lacks)
    try:
        Path(place, setting).write_text(str(limit_bytes))
        yield MemoryGroup(path=place, top=top, version=1 if own is not None and own.version == 1 else 2)
    finally:
        ends = time.monotonic() + 10
        while Path(place, "cgroup.procs").read_text() and time.monotonic() < ends:
            time.sleep(0.02)  # its last process is ending
        os.rmdir(place)
