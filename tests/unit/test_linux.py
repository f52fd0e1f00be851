"""What libc wraps for us, or does not."""

from __future__ import annotations

import fcntl
import os
import resource
import time

import pytest

from weightfs import linux

SELECT_COUNTS = 1024
"""FD_SETSIZE: descriptors that select(2) can name."""


@pytest.fixture
def high_pipe() -> tuple[int, int]:
    """A pipe whose outlet has a number that select(2) can't name."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= SELECT_COUNTS:
        pytest.skip("this machine lacks a hard limit of open files above 1,024")
    linux.raise_file_limit()
    low, inlet = os.pipe()
    outlet = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, SELECT_COUNTS)
    os.close(low)
    return outlet, inlet


def test_a_high_descriptor_is_waited_for(high_pipe: tuple[int, int]) -> None:
    outlet, inlet = high_pipe
    assert outlet >= SELECT_COUNTS
    started = time.monotonic()
    assert not linux.is_readable(outlet, 0)
    assert not linux.is_readable(outlet, 0.02)
    assert time.monotonic() - started >= 0.02
    os.write(inlet, b"here")
    assert linux.is_readable(outlet)
    assert os.read(outlet, 9) == b"here"
    os.close(inlet)
    assert linux.is_readable(outlet), "a closed end is read as one"
    os.close(outlet)
