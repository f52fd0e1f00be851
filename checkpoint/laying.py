"""Lays out the files that CRIU reads at a restore: those of a plain snapshot are there, others are made of recipes.

Page images are sparse: what the page server fills in is never written there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Protocol

from checkpoint import pages
from checkpoint.errors import CheckpointError
from checkpoint.pages import PageImage, RecipePages, Sources
from checkpoint.scratch import Scratch

if TYPE_CHECKING:
    from checkpoint.contents import Contents

_PAGES: Final = "pages-"
_PIECE_BYTES: Final = 2 << 20

Ranges = Sequence[tuple[int, int]]
"""Offset and end of each, in any order."""


class Laid(Protocol):
    """A folder of images.

    Attributes:
        images: its path.
        inherited: descriptors that CRIU needs to reach it.
    """

    images: str
    inherited: tuple[int, ...]

    def opened(self, paths: Sequence[str]) -> dict[str, PageImage]:
        """Page images of the folder, by path."""

    def complete(self, lazy: Mapping[str, Ranges]) -> None:
        """Have all be there that CRIU reads itself: everything but `lazy`, by path.

        Raises:
            CorruptError: something is not what was written.
            CheckpointError: it can't be written.
        """


class LaidPlain:
    """The images of a plain snapshot.

    Args:
        images: their folder.
    """

    def __init__(self, images: str) -> None:
        self.images = images
        self.inherited: tuple[int, ...] = ()

    def opened(self, paths: Sequence[str]) -> dict[str, PageImage]:
        """See `Laid`."""
        return pages.whole(paths)

    def complete(self, lazy: Mapping[str, Ranges]) -> None:
        """See `Laid`: it is."""


class LaidOut:
    """Images that are made of recipes. All that is no page image is there at once.

    Args:
        contents: the recipes.
        sources: what they refer to.
        scratch: an empty folder.
        threads: that write.

    Raises:
        CorruptError: something is not what was written.
        CheckpointError: it can't be written.
    """

    def __init__(self, contents: Contents, sources: Sources, scratch: Scratch, *, threads: int) -> None:
        self.images = scratch.path
        self.inherited: tuple[int, ...] = (scratch.fd,)
        self._threads = threads
        self._pages = {
            os.path.join(scratch.path, name): RecipePages(os.path.join(scratch.path, name), recipe, sources)
            for name, recipe in contents.recipes.items()
        }
        self._sizes = {path: contents.recipes[os.path.basename(path)].nbytes for path in self._pages}
        self._write(
            (path, start, end)
            for path, nbytes in self._sizes.items()
            if not _is_pages(path)
            for start, end in _pieces(0, nbytes)
        )

    def opened(self, paths: Sequence[str]) -> dict[str, PageImage]:
        """See `Laid`."""
        return {path: self._pages[path] for path in paths}

    def complete(self, lazy: Mapping[str, Ranges]) -> None:
        """See `Laid`."""
        self._write(
            (path, start, end)
            for path, nbytes in self._sizes.items()
            if _is_pages(path)
            for low, high in _between(lazy.get(path, ()), nbytes)
            for start, end in _pieces(low, high)
        )

    def _write(self, parts: Iterator[tuple[str, int, int]]) -> None:
        fds: dict[str, int] = {}
        try:
            for path, nbytes in self._sizes.items():
                fds[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.truncate(fds[path], nbytes)

            def write(part: tuple[str, int, int]) -> None:
                path, start, end = part
                is_zero, nbytes = self._pages[path].zeros(start, end - start)
                if is_zero and nbytes == end - start:
                    return
                content = memoryview(bytearray(end - start))
                self._pages[path].read(content, start)
                while content:
                    count = os.pwrite(fds[path], content, start)
                    content, start = content[count:], start + count

            with ThreadPoolExecutor(self._threads) as pool:
                for _ in pool.map(write, parts):
                    pass
        except OSError as e:
            raise CheckpointError(
                f"images can't be laid out: {os.strerror(e.errno or 0)}", path=self.images, mend="free some memory"
            ) from e
        finally:
            for fd in fds.values():
                os.close(fd)


def _is_pages(path: str) -> bool:
    return os.path.basename(path).startswith(_PAGES)


def _between(ranges: Ranges, nbytes: int) -> Iterator[tuple[int, int]]:
    """What is in none of the ranges."""
    reached = 0
    for start, end in sorted(ranges):
        if reached < start:
            yield reached, start
        reached = max(reached, end)
    if reached < nbytes:
        yield reached, nbytes


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    for low in range(start, end, _PIECE_BYTES):
        yield low, min(low + _PIECE_BYTES, end)
