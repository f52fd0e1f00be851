"""Compares the images of a snapshot with their digests; the large ones while the restore goes on.

What CRIU reads is verified before CRIU sees it. The images of processes' own memory, which are nearly all of a
snapshot, a page server copies without looking into them: they are verified meanwhile, and before the process is let go
or its GPU memory is touched. So a damaged image is never run, and its restore takes no longer than a sound one's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Self

import msgspec

from checkpoint.snapshots import Snapshot


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared.

    Attributes:
        nbytes: of images.
        seconds: that it took, the two parts after one another; most of it went by while something else was done.
    """

    nbytes: int
    seconds: float


class Verification:
    """One restore's verification, a context manager: inside it a thread reads `later`; left early, it stops.

    Args:
        snapshot: whose images.
        later: names of images that are read meanwhile.
    """

    def __init__(self, snapshot: Snapshot, later: Collection[str]) -> None:
        self._snapshot = snapshot
        self._later = later
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._parts: list[tuple[int, float]] = []  # bytes and seconds
        self._thread = threading.Thread(target=self._read, name="verification", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def others(self) -> None:
        """Read all images that are not read meanwhile.

        Raises:
            CorruptError: one is not what was written.
        """
        started = time.monotonic()
        names = {file.name for file in self._snapshot.manifest.files}.difference(self._later)
        nbytes = self._snapshot.verify(names)
        self._parts.append((nbytes, time.monotonic() - started))

    def check(self) -> None:
        """Raise what was found so far.

        Raises:
            CorruptError: an image is not what was written.
        """
        if self._failure is not None:
            raise self._failure

    def finish(self) -> Verified:
        """Wait until all is read.

        Raises:
            CorruptError: an image is not what was written.
        """
        self._thread.join()
        self.check()
        return Verified(nbytes=sum(one for one, _ in self._parts), seconds=sum(one for _, one in self._parts))

    def _read(self) -> None:
        started = time.monotonic()
        try:
            nbytes = self._snapshot.verify(self._later, self._stopping)
        except Exception as e:  # noqa: BLE001 - raised where it is asked for
            self._failure = e
            return
        self._parts.append((nbytes, time.monotonic() - started))
