"""Which bytes of which weight file a tensor of a model may have come from: by its name, to be proven by its bytes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from weightfs.errors import UsageError
from weightfs.formats import WeightLayout
from weightfs.model import file_layout, folder_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Bytes `[offset, offset + nbytes)` of a file.

    Attributes:
        path: absolute, as it was given: a mount stays a mount.
        rank: of the file among all, so that sorting by (rank, offset) keeps the files' order.
        offset: from the start of the file.
        nbytes: of the tensor.
    """

    path: str
    rank: int
    offset: int
    nbytes: int


class Stamp(NamedTuple):
    """What tells whether a file of this machine is still the one it was."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Of the file at a path."""
        found = os.stat(path)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class Origins:
    """The tensors of some weight files, by name.

    Args:
        paths: weight files, or folders of them.

    Raises:
        WeightfsError: there is no weight file, or a header does not describe its file.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._named: dict[str, Origin] = {}
        self._ending: dict[str, list[str]] = {}
        self.stamps: dict[str, Stamp] = {}
        ranks: dict[str, int] = {}
        for folder, layout in _layouts(paths):
            for tensor in layout.tensors:
                path = os.path.join(folder, tensor.file)
                if path not in ranks:
                    ranks[path] = len(ranks)
                    self.stamps[path] = Stamp.of(path)
                if tensor.name in self._named:
                    continue  # of another set of the same folder
                origin = Origin(path=path, rank=ranks[path], offset=tensor.offset, nbytes=tensor.nbytes)
                self._named[tensor.name] = origin
                for ending in _endings(tensor.name):
                    self._ending.setdefault(ending, []).append(tensor.name)

    def __iter__(self) -> Iterator[Origin]:
        """All, in the order of the files."""
        return iter(self._named.values())

    def find(self, names: Sequence[str], nbytes: int) -> Origin | None:
        """The tensor of that many bytes with one of the names, or with the name that shares the longest ending.

        Models and files often differ by a prefix. An ending counts from two components on, or when it is all of either
        name; None where two tensors share it.
        """
        for name in names:
            if (found := self._named.get(name)) and found.nbytes == nbytes:
                return found
        for name in names:
            for ending in _endings(name):
                shared = [one for one in self._ending.get(ending, ()) if self._named[one].nbytes == nbytes]
                shared = [one for one in shared if "." in ending or ending in (one, name)]
                if shared:
                    return self._named[shared[0]] if len(shared) == 1 else None
        return None


def paths_of(modules: Iterable[object]) -> list[str]:
    """Where transformers loaded the modules from: a folder, or one in the cache of huggingface_hub.

    Raises:
        UsageError: a module does not say, or says a name that is not there.
    """
    found = []
    for module in modules:
        name = getattr(module, "name_or_path", None)
        if not isinstance(name, str) or not (path := _local(name)):
            raise UsageError(
                f"a {type(module).__name__} does not say which files its weights came from",
                mend="name the folder: released(model, weights=FOLDER)",
            )
        found.append(path)
    return found


def _local(name: str) -> str | None:
    if not name or os.path.exists(name):
        return os.path.abspath(name) if name else None
    if "huggingface_hub" not in sys.modules:
        return None
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return str(hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # its own errors are of these kinds
        return None


def _layouts(paths: Iterable[str]) -> Iterator[tuple[str, WeightLayout]]:
    for path in paths:
        if os.path.isdir(path):
            for layout in folder_layouts(path).values():
                yield os.path.abspath(path), layout
        else:
            yield os.path.dirname(os.path.abspath(path)), file_layout(path)


def _endings(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while True:
        yield name
        _, dot, name = name.partition(".")
        if not dot:
            return
