"""Listings of folders: made once, held while the kernel reads them piece by piece, ordered by cookie."""

from __future__ import annotations

import bisect
import itertools
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from weightfs.asking import Asking
from weightfs.beliefs import Answer, Beliefs
from weightfs.entries import Attributes, DirectoryEntry, cookie, cookie_of
from weightfs.errors import StaleError
from weightfs.index.schema import Kind
from weightfs.source.base import Sight
from weightfs.tree import Node, Tree
from weightfs.views import Views
from weightfs.virtual import Virtual
from weightfs.walk import ListAhead, Rows

_MAX_LISTINGS: Final = 64
_MAX_ROWS: Final = 20_000
"""Of all listings held, about 0.5 KB each; the newest is held whatever it has."""


class Listings:
    """The listings of one mount that are at hand. Runs on one trio thread.

    Attributes:
        beliefs: says for how long names may be believed; None where nobody watches.
    """

    def __init__(self, asking: Asking, tree: Tree, views: Views, virtual: Virtual, walk: ListAhead) -> None:
        self.beliefs: Beliefs | None = None
        self._asking = asking
        self._tree = tree
        self._views = views
        self._virtual = virtual
        self._walk = walk
        self._listings: OrderedDict[int, list[DirectoryEntry]] = OrderedDict()
        self._sights: dict[int, Sight] = {}  # of the listings

    def __len__(self) -> int:
        return len(self._listings)

    def __contains__(self, inode: int) -> bool:
        return inode in self._listings

    async def make(self, node: Node) -> None:
        """List a folder, and hold that instead of what is held of it.

        Raises:
            NotADirectoryError, StaleError, DeadlineError, OSError.
        """
        self._listings[node.inode] = await self._list(node)
        self._listings.move_to_end(node.inode)
        rows = sum(map(len, self._listings.values()))
        while len(self._listings) > 1 and (len(self._listings) > _MAX_LISTINGS or rows > _MAX_ROWS):
            oldest, gone = self._listings.popitem(last=False)
            self._sights.pop(oldest, None)
            rows -= len(gone)

    def behind(self, node: Node, after: int) -> Iterator[DirectoryEntry]:
        """The entries behind a cookie (0: all) of a folder that is held, for whoever takes them without waiting."""
        entries = self._listings[node.inode]
        rest = itertools.islice(entries, bisect.bisect_right(entries, after, key=cookie_of), None)
        sight = self._sights.get(node.inode)
        if self.beliefs is None or sight is None:
            return rest
        # Now, not when it was made: a listing may go on long after.
        return self._believed(self.beliefs.answer(sight, node), rest)

    def _believed(self, answer: Answer, entries: Iterator[DirectoryEntry]) -> Iterator[DirectoryEntry]:
        for entry in entries:
            found = entry.attributes
            if (node := self._tree.node_if_known(found.inode)) is not None:
                found.name_s, found.own_s = answer.timeouts(entry.name, node, found)
            yield entry

    def end(self, inode: int) -> int | None:
        """The cookie of the last entry of a folder's listing, if that is at hand and not empty."""
        entries = self._listings.get(inode)
        return entries[-1].cookie if entries else None

    async def _list(self, node: Node) -> list[DirectoryEntry]:
        if node.kind is Kind.SOURCE:
            rows = await self._source_rows(node)
        elif node.kind is Kind.VIEW_SET:
            rows = await self._views.rows(node)
        else:
            rows = await self._virtual.rows(node)
        entries = [DirectoryEntry(name, attributes, cookie(name)) for name, attributes in rows]
        return sorted(entries, key=cookie_of)

    async def _source_rows(self, node: Node) -> list[tuple[bytes, Attributes]]:
        folder = self._tree.path(node)
        found, sight = await self._read(node, folder)
        if sight is not None:
            self._sights[node.inode] = sight
        children = self._tree.see_all(node.inode, [(name, entry.inode_key) for name, entry in found])
        rows = []
        for child, (name, entry) in zip(children, found, strict=True):
            path = os.path.join(folder, name) if entry.is_symlink else b""
            rows.append((name, await self._asking.attributes(child.inode, path, entry)))
        return rows

    async def _read(self, node: Node, folder: bytes) -> tuple[Rows, Sight | None]:
        listed = self._walk.take(folder, (await self._asking.lstat(folder)).identity)
        if listed is None:
            ahead = self._walk.plan(folder, self._following(node))
            fresh, ready_later = await self._asking.wait(self._walk.read, folder, ahead)
            self._walk.keep(ready_later)
            listed = fresh
        if listed.sight is not None and listed.sight.folder not in (None, node.key):
            raise StaleError("another folder is there now", path=os.fsdecode(folder))
        return listed.rows, listed.sight

    def _following(self, node: Node) -> list[bytes]:
        """The folders behind this one in its parent's listing, if that is at hand."""
        siblings = self._listings.get(node.parent)
        if not siblings:
            return []
        self._listings.move_to_end(node.parent)
        behind = itertools.islice(siblings, bisect.bisect_right(siblings, cookie(node.name), key=cookie_of), None)
        parent = self._tree.path(self._tree.node(node.parent))
        folders = (os.path.join(parent, entry.name) for entry in behind if stat.S_ISDIR(entry.attributes.mode))
        return list(itertools.islice(folders, self._walk.window))
