"""Folders listed ahead of a walk: what `find`, `ls -R`, rsync and a loader's glob ask for next.

A trip to a worker thread costs more than listing a small folder (135 us against 40 on an idle two-core machine, most
of it waking the thread). A walk visits a folder's children in the order of its listing, so after two in a row the
next ones are listed in the same trip: 2, 4, ... up to 32 of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from weightfs.source.base import Sight, Source, SourceStat

Rows = list[tuple[bytes, SourceStat]]

_MOST_FOLDERS: Final = 32
_FRESH_S: Final = 0.1  # what a walk takes for a few dozen folders; attributes grow old by as much
_MOST_ROWS: Final = 4096  # held at once, all folders together


class Listed(NamedTuple):
    """A folder's entries, its identity before they were read, and how it was examined where that may be believed."""

    identity: bytes
    rows: Rows
    sight: Sight | None = None


def list_folder(source: Source, path: bytes) -> Listed:
    """List a folder that nobody watches.

    Raises:
        OSError: it can't be listed.
    """
    # Examined first: a folder that changes while it is listed is then not the one listed.
    identity = source.lstat(path).identity
    return Listed(identity, source.entries(path))


class ListAhead:
    """Listings made before they were asked for. Runs on one thread, except `read`, which may wait for the source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.lister: Callable[[bytes], Listed] | None = None
        """Lists a folder instead of the source, in a worker thread."""
        self._ready: dict[bytes, Listed] = {}
        self._read_at = 0.0
        self._expected: bytes | None = None
        self._window = 0

    def drop(self, path: bytes) -> None:
        """A folder has changed."""
        self._ready.pop(path, None)

    def take(self, path: bytes, identity: bytes) -> Listed | None:
        """What was listed ahead for a folder, if it still is the folder that was listed then."""
        found = self._ready.pop(path, None)
        is_fresh = time.monotonic() - self._read_at < _FRESH_S
        return found if found is not None and is_fresh and found.identity == identity else None

    def plan(self, path: bytes, following: Sequence[bytes]) -> Sequence[bytes]:
        """Which of the folders `following` this one in its parent's listing to read with it.

        `following` must have one more than `window` asks for, if there are as many.
        """
        self._window = min(max(2 * self._window, 1), _MOST_FOLDERS) if path == self._expected else 0
        ahead = following[: self._window]
        rest = following[len(ahead) :]
        self._expected = rest[0] if rest else None
        self._ready.clear()  # what a walk passed over
        return ahead

    @property
    def window(self) -> int:
        """How many following folders `plan` wants to see."""
        return _MOST_FOLDERS + 1

    def read(self, path: bytes, ahead: Sequence[bytes]) -> tuple[Listed, dict[bytes, Listed]]:
        """List a folder, and those `ahead` as far as they can be listed.

        Raises:
            OSError: the folder itself can't be listed.
        """
        listed = self.lister(path) if self.lister is not None else Listed(b"", self._source.entries(path))
        ready: dict[bytes, Listed] = {}
        count = 0
        for other in ahead:
            try:
                ready[other] = self.lister(other) if self.lister is not None else list_folder(self._source, other)
            except OSError:
                continue  # whoever asks for it will be told
            count += len(ready[other].rows)
            if count > _MOST_ROWS:
                break
        return listed, ready

    def keep(self, ready: dict[bytes, Listed]) -> None:
        """Hold what `read` listed ahead until it is asked for or the walk turns elsewhere."""
        self._ready.update(ready)
        self._read_at = time.monotonic()
