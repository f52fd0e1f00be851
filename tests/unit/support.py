"""What several unit tests share: settled files, children that may die, sources that answer oddly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from weightfs.source.base import SourceStat, WouldBlockError
from weightfs.source.local import LocalSource

T = TypeVar("T")


def python(code: str, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run code in a child: it may crash, be killed or lower its own limits."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def within(timeout_s: float, function: Callable[[], T]) -> T:
    """The function's result; a failure, not a hang, when it does not come."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as e:  # noqa: BLE001 - handed on below
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert not thread.is_alive(), f"no answer within {timeout_s} s"
    if errors:
        raise errors[0]
    return results[0]


def open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


class OddSource(LocalSource):
    """A folder that waits, cuts or fails where a test says so.

    Attributes:
        immediate: whether `cached_only` calls may be answered.
        gate: what calls that may wait wait for.
        waiting: released once for each call that has begun to wait.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.immediate = True
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)
        self.calls: list[str] = []

    def _may_wait(self, call: str, cached_only: bool = False) -> None:
        self.calls.append(call)
        if cached_only:
            if not self.immediate:
                raise WouldBlockError
            return
        self.waiting.release()
        assert self.gate.wait(30), "the test never opened the gate"

    def lstat(self, path: bytes, *, cached_only: bool = False) -> SourceStat:
        self._may_wait("lstat", cached_only)
        return super().lstat(path, cached_only=cached_only)

    def names(self, path: bytes) -> list[bytes]:
        self._may_wait("names")
        return super().names(path)

    def entries(self, path: bytes) -> list[tuple[bytes, SourceStat]]:
        self._may_wait("entries")
        return super().entries(path)

    def open(self, path: bytes, *, cached_only: bool = False) -> tuple[int, SourceStat]:
        self._may_wait("open", cached_only)
        return super().open(path, cached_only=cached_only)

    def statvfs(self) -> os.statvfs_result:
        self._may_wait("statvfs")
        return super().statvfs()


class Later:
    """A clock that runs ahead of the machine's, so that files made just now have long been settled."""

    def __init__(self, ahead_s: float = 3600) -> None:
        self.ahead_ns = int(ahead_s * 1e9)
        self.passed_s = 0.0

    def time_ns(self) -> int:
        return time.time_ns() + self.ahead_ns

    def monotonic(self) -> float:
        return time.monotonic() + self.passed_s
