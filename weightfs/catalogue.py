"""Models of a source, found by a path in them and opened as a whole: what prefetch reads. Runs in worker threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from weightfs.errors import EntryError, FormatError, ShortReadError
from weightfs.formats import format_of, merge_shards
from weightfs.formats.layout import WeightLayout
from weightfs.library import Library
from weightfs.source.base import Source, SourceStat

_INDEX: Final = ".index.json"
_USUAL: Final = ("model", "diffusion_pytorch_model", "pytorch_model", "consolidated", "adapter_model")
"""Sets that a folder's configuration speaks of, where it holds several."""


@dataclass(slots=True)
class OpenModel:
    """One set of weights with its files open.

    Attributes:
        folder: path from the root of the source.
        name: of the set.
        layout: of all its files.
        fds: a descriptor of each file, by its name in the folder; the caller's to close.
        sizes: of each file in bytes.
        keys: (device, inode) of each file, as it is called below the mount and as it is on it.
    """

    folder: bytes
    name: str
    layout: WeightLayout
    fds: dict[str, int]
    sizes: dict[str, int]
    keys: set[tuple[int, int]]

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


class Catalogue:
    """The models of one source.

    Args:
        source: where they lie.
        library: parses headers.
        shown_as: (device, inode) that a file has on the mount, if it was ever seen there. Callable from any thread.
    """

    def __init__(
        self, source: Source, library: Library, shown_as: Callable[[SourceStat], tuple[int, int] | None]
    ) -> None:
        self._source = source
        self._shown_as = shown_as
        self._library = library

    def names(self, path: bytes) -> list[tuple[bytes, str]]:
        """The models that `path` speaks of, each as (folder, set).

        A weight file speaks of its set; an index or a configuration of the one set of its folder, or the usual one of
        several; a folder of all its sets, and of those in the folders below it.

        Raises:
            OSError: the source failed.
        """
        folder, name = os.path.split(path)
        text = os.fsdecode(name)
        real = self._source.follow(path)
        if real is None:
            return []
        if self._source.lstat(real).is_directory:
            return self._below(path)
        sets = self._library.sets(self._source.names(folder))
        if format_of(text):
            return [(folder, one) for one, files in sets.items() if text in files]
        if len(sets) > 1:
            stem = next((text.removesuffix(f".{kind}{_INDEX}") for kind in ("safetensors", "gguf")
                         if text.endswith(f".{kind}{_INDEX}")), None)  # fmt: skip
            sets = {one: sets[one] for one in ([stem] if stem else _USUAL) if one in sets}
        return [(folder, one) for one in list(sets)[:1]]

    def _below(self, folder: bytes) -> list[tuple[bytes, str]]:
        found = []
        for name, entry in sorted(self._source.entries(folder)):
            if entry.is_directory:
                found += self._below(os.path.join(folder, name))
        return [(folder, one) for one in self._library.sets(self._source.names(folder))] + found

    def open(self, folder: bytes, name: str) -> OpenModel | None:
        """One model, or None when there is no such set, or a header of it has a fault.

        Raises:
            OSError: the source failed.
        """
        files = self._library.sets(self._source.names(folder)).get(name, ())
        found = OpenModel(folder, name, WeightLayout("", (), ()), {}, {}, set())
        layouts = []
        try:
            for file in files:
                path = self._source.follow(os.path.join(folder, os.fsencode(file)))
                if path is None:
                    continue
                fd, entry = self._source.open(path)
                found.fds[file], found.sizes[file] = fd, entry.size
                status = os.fstat(fd)
                found.keys.add((status.st_dev, status.st_ino))
                if (shown := self._shown_as(entry)) is not None:
                    found.keys.add(shown)
                parsed = self._library.parsed(path, entry, file)
                if not parsed.record.fault:
                    layouts.append(parsed.record.layout(file))
            if not layouts:
                found.close()
                return None
            found.layout = merge_shards(layouts, None)
        except (FormatError, EntryError, ShortReadError):
            found.close()
            return None
        except BaseException:
            found.close()
            raise
        return found
