"""A source and its mount as a plain model in memory, and how to choose from it."""

from __future__ import annotations

import mmap
import os
import random
import stat
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

NAMES: Final = [f"n{number}" for number in range(12)]
MOST_BYTES: Final = 200_000


@dataclass(eq=False)
class Node:
    """An inode: a file (`content`), a folder (`children`) or a symlink (`target`); `views` are (offset, bytes)."""

    kind: int
    content: bytearray = field(default_factory=bytearray)
    children: dict[str, Node] = field(default_factory=dict)
    target: str = ""
    mode: int = 0o644
    nlink: int = 1
    xattr: bytes | None = None
    views: dict[str, tuple[int, int]] = field(default_factory=dict)
    version: int = 0
    changed_at: float = 0.0
    number: int | None = None
    mappings: int = 0

    def change(self) -> None:
        """Something in it or of it is not as it was: ctime tells."""
        self.version += 1
        self.changed_at = time.monotonic()


@dataclass(eq=False)
class Kept:
    """A handle, a mapping or an open view."""

    node: Node
    fd: int
    mapped: mmap.mmap | None = None
    snapshot: bytes | None = None
    version: int = 0


Place = tuple[str, Node, str, Node]
"""Path from the root, folder, name, node."""


class Model:
    """What the source holds, and what is held open of the mount.

    Attributes:
        latencies: seconds of each operation, by name; with what the model and the source take, and patience.
        stale: how often ESTALE was the answer where a promise allows it.
    """

    def __init__(self, source: str, mountpoint: str, *, patience_s: float, cuts_are_stale: bool) -> None:
        """Begin with an empty folder.

        Args:
            source: that folder; another one beside it, `<source>.aside`, is for files that will be renamed into it.
            mountpoint: where it shows.
            patience_s: how long the mount may show what was.
            cuts_are_stale: whether reading behind a cut answers ESTALE (the portable engine).
        """
        self._source = source
        self._mountpoint = mountpoint
        self._patience_s = patience_s
        self._cuts_are_stale = cuts_are_stale
        self._aside = source + ".aside"
        os.makedirs(self._aside, exist_ok=True)
        self._root = Node(stat.S_IFDIR, mode=stat.S_IMODE(os.stat(source).st_mode))
        self._kept: list[Kept] = []
        self._numbers: dict[int, Node] = {}  # every one that was ever seen
        self.latencies: dict[str, array[float]] = {}
        self.stale = 0

    def _all(self, folder: Node | None = None, path: str = "") -> Iterator[Place]:
        folder = folder or self._root
        for name, node in folder.children.items():
            place = os.path.join(path, name)
            yield place, folder, name, node
            if node.kind == stat.S_IFDIR:
                yield from self._all(node, place)

    def _one(self, chosen: random.Random, *kinds: int, weights: bool | None = None) -> Place | None:
        fitting = [
            place
            for place in self._all()
            if (not kinds or place[3].kind in kinds) and (weights is None or bool(place[3].views) == weights)
        ]
        return chosen.choice(fitting) if fitting else None

    def _folder(self, chosen: random.Random) -> tuple[str, Node]:
        folders = [("", self._root)]
        folders += [(path, node) for path, _, _, node in self._all() if node.kind == stat.S_IFDIR]
        return chosen.choice(folders)

    def _free(self, chosen: random.Random, suffix: str = "") -> tuple[str, Node, str] | None:
        path, folder = self._folder(chosen)
        name = chosen.choice(NAMES) + suffix
        return None if name in folder.children else (os.path.join(path, name), folder, name)

    def _bare(self, path: str) -> str:
        return os.path.join(self._source, path) if path else self._source

    def _shown(self, path: str) -> str:
        return os.path.join(self._mountpoint, path) if path else self._mountpoint
