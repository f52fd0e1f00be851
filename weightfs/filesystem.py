"""What every filesystem call means: names, attributes, listings, opens. Knows nothing of FUSE.

Runs on one trio thread. A section without await is atomic towards every other call; blocking work goes to threads
through `Asking`, except what the source can answer from the kernel's caches without waiting (`cached_only`).

The namespace is the source's, and three names that answer look-ups but are never listed:

    <folder>/.tensors/<set>/<tensor>    <folder>/.npy/<set>/<tensor>.npy    /.weightfs/{status.json,metrics}
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from weightfs.asking import Asking
from weightfs.beliefs import Beliefs
from weightfs.entries import Attributes, DirectoryEntry, Opened
from weightfs.errors import (
    IsADirectoryEntryError,
    NoAttributeError,
    NotADirectoryEntryError,
    NotASymlinkError,
    NotFoundError,
    ReadOnlyError,
    StaleError,
    UnsupportedError,
)
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE, Kind
from weightfs.index.store import IndexStore
from weightfs.library import Library
from weightfs.listings import Listings
from weightfs.notifier import Notifier
from weightfs.open_files import OpenFiles
from weightfs.readables import LiveText, WholeFile
from weightfs.source.base import Sight, Source, SourceStat, WouldBlockError
from weightfs.source.local import LocalSource
from weightfs.tree import Node, Tree
from weightfs.views import ACCESS_LISTS, Views
from weightfs.virtual import Virtual
from weightfs.walk import ListAhead
from weightfs.watch import Batch, Watcher

_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})
"""What a path gives that was one to a file when it was looked up; the last two: a folder in it became a symlink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemConfig:
    """Settings of one filesystem.

    Attributes:
        deadline_s: a call that the source has not answered by then fails.
        threads: how many calls may wait for the source at once.
    """

    deadline_s: float = 30.0
    threads: int = 16


class Filesystem:
    """A read-only tree with views.

    Args:
        source: where the bytes come from.
        index: remembers numbers and layouts.
        handles: shared with the channel, which adds and discards handles.
        texts: content of the files in `.weightfs/`, by name; called in any thread.

    Attributes:
        wanted: told of each file that is opened and each link that is followed: its path, and the thread that asks.
        opens: how often a file was opened.
    """

    def __init__(
        self,
        source: Source,
        index: IndexStore,
        handles: HandleTable,
        texts: Mapping[bytes, Callable[[], bytes]],
        config: FilesystemConfig,
    ) -> None:
        self._source = source
        self._handles = handles
        self._index = index
        self._tree = Tree(index, source.lstat(b"").inode_key)
        self._asking = Asking(source, deadline_s=config.deadline_s, threads=config.threads)
        self._open_files = OpenFiles(source, handles)
        self.library = Library(source, index)
        self._views = Views(source, self._asking, self.library, self._tree, self._open_files)
        self._virtual = Virtual(self._asking, self._tree, self._views, texts)
        self._walk = ListAhead(source)
        self._listings = Listings(self._asking, self._tree, self._views, self._virtual, self._walk)
        self._beliefs: Beliefs | None = None
        self.wanted: Callable[[bytes, int], None] = lambda path, thread: None
        self.opens = 0

    # Changes

    def watch(self, source: LocalSource, watcher: Watcher, notifier: Notifier, *, short_s: float) -> Beliefs:
        """From now on let the kernel believe what is watched; `source` is the filesystem's own."""
        self._beliefs = Beliefs(source, self._tree, self._index, watcher, notifier, short_s=short_s)
        self._walk.lister = self._beliefs.list_folder
        self._listings.beliefs = self._beliefs
        return self._beliefs

    def source_changed(self, batch: Batch) -> None:
        """Work on what a watcher tells."""
        assert self._beliefs is not None
        touched = self._beliefs.apply(batch)
        paths = set[bytes]()
        for folder, names in touched.items():
            self._walk.drop(folder)
            self.library.forget_recent(folder)
            paths.update(os.path.join(folder, name) for name in names)
        for inode in self._handles:
            if self._tree.node_if_known(inode) is not None:
                continue
            if (found := self.library.view(inode)) and found[0].path in paths:
                self._beliefs.view_changed(inode)

    async def _examine(self, folder: Node, name: bytes) -> tuple[SourceStat, Sight | None]:
        """An entry of a source folder, empty name: the folder itself.

        Raises:
            StaleError: another folder has taken its place.
        """
        path = self._tree.path(folder)
        if self._beliefs is None:
            return await self._asking.lstat(os.path.join(path, name) if name else path), None
        sight = await self._asking.ask(self._beliefs.examine, path, name)
        if sight.folder not in (None, folder.key):
            raise StaleError("its folder is another one now", path=os.fsdecode(path))
        return sight.entry, sight

    def _believed(self, sight: Sight | None, folder: Node, node: Node, name: bytes, found: Attributes) -> Attributes:
        """Attributes as they are to be answered; nothing may be waited for between this and the answer."""
        if self._beliefs is None or sight is None:
            return found
        found.name_s, found.own_s = self._beliefs.answer(sight, folder).timeouts(name, node, found)
        return found

    # Names

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """The entry `name` of a folder.

        Raises:
            NotFoundError, StaleError, NotADirectoryEntryError, DeadlineError, OSError.
        """
        folder = self._tree.node(parent)
        if folder.kind is Kind.SOURCE:
            return await self._lookup_source(folder, name)
        if folder.kind is Kind.VIEW_SET:
            return await self._views.lookup(folder, name)
        return await self._virtual.lookup(folder, name)

    async def _lookup_source(self, folder: Node, name: bytes) -> Attributes:
        path = os.path.join(self._tree.path(folder), name)
        try:
            entry, sight = await self._examine(folder, name)
        except FileNotFoundError:
            node = self._virtual.beside(folder, name)
            if node is None:
                raise NotFoundError(os.fsdecode(path)) from None
            self._tree.count_lookup(node)
            return await self._virtual.attributes(node)
        node = self._tree.see(Kind.SOURCE, folder.inode, name, entry.inode_key)
        self._tree.count_lookup(node)
        found = await self._asking.attributes(node.inode, path, entry)
        return self._believed(sight, folder, node, name, found)

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel gives back that many look-ups of a number."""
        dropped = self._tree.forget(inode, lookups)
        if dropped is not None and self._beliefs is not None:
            self._beliefs.forgotten(dropped)

    def drop(self, inodes: Iterable[int]) -> None:
        """Forget numbers that the index has dropped: their names are gone."""
        self._tree.drop(inodes)

    def shed(self) -> None:
        """Forget numbers that the kernel does not hold; the index has them."""
        self._tree.shed()

    # Attributes

    async def getattr(self, inode: int) -> Attributes:
        """What an inode is now.

        Raises:
            StaleError: its content or name is gone.
        """
        node = self._tree.node_if_known(inode)
        if node is None:
            return await self._views.attributes(inode)
        if node.kind is not Kind.SOURCE:
            return await self._virtual.attributes(node)
        path = self._tree.path(node)
        # The root has no folder above it here: it is examined by itself.
        folder, name = (node, b"") if inode == ROOT_INODE else (self._tree.node(node.parent), node.name)
        sight = None
        try:
            entry, sight = await self._examine(folder, name)
        except (FileNotFoundError, StaleError):
            entry = None
        if entry is None or (entry.inode_key != node.key and inode != ROOT_INODE):
            # Its name is gone or means another file now; whoever has it open still may ask.
            entry, sight = self._open_files.stat(inode), None
        if entry is None:
            raise StaleError("its name is gone", path=os.fsdecode(path))
        found = await self._asking.attributes(inode, path, entry)
        if sight is not None and inode == ROOT_INODE and self._beliefs is not None:
            found.own_s = self._beliefs.own_timeout(sight, node)
            return found
        return self._believed(sight, folder, node, name, found)

    async def readlink(self, inode: int, thread: int = 0) -> bytes:
        """The target of a symlink.

        Raises:
            NotASymlinkError: it is none.
            ForbiddenError: it leads out of the source.
        """
        node = self._tree.node_if_known(inode)
        if node is None or node.kind is not Kind.SOURCE:
            raise NotASymlinkError("is no symlink")
        path = self._tree.path(node)
        self.wanted(path, thread)  # the link has the name a loader knows; in some layouts its target has a digest
        try:
            return await self._asking.wait(self._source.readlink, path)
        except OSError as e:
            if e.errno == errno.EINVAL:
                entry = await self._asking.lstat(path)
                if entry.inode_key == node.key and not entry.is_symlink:
                    raise NotASymlinkError("is no symlink", path=os.fsdecode(path)) from None
            if e.errno == errno.EINVAL or e.errno in _GONE:
                raise StaleError("its name means something else now", path=os.fsdecode(path)) from None
            raise

    # Listings

    async def readdir(self, inode: int, after: int) -> Iterator[DirectoryEntry]:
        """The entries behind a cookie (0: all), in the order of their cookies, without `.` and `..`.

        Raises:
            NotADirectoryEntryError, StaleError, DeadlineError, OSError.
        """
        node = self._tree.node_if_known(inode)
        if node is None:
            self._views.find(inode)
            raise NotADirectoryEntryError("is no folder")
        if after == 0 or inode not in self._listings:
            await self._listings.make(node)
        return self._listings.behind(node, after)

    def listing_end(self, inode: int) -> int | None:
        """The cookie of the last entry of a folder's listing, if that is at hand and not empty."""
        return self._listings.end(inode)

    def listed(self, entry: DirectoryEntry) -> None:
        """The kernel took an entry of a listing, and with it counts a look-up."""
        if (node := self._tree.node_if_known(entry.attributes.inode)) is not None:
            self._tree.count_lookup(node)

    # Opening

    async def open(self, inode: int, flags: int, thread: int = 0) -> Opened:
        """Open a file; its handle is in the table already, and this attaches what serves it.

        Raises:
            ReadOnlyError: anything but reading was asked.
            StaleError: the name means another file now: the kernel looks it up again.
            UnsupportedError: a FIFO, socket or device.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_TRUNC | os.O_APPEND):
            raise ReadOnlyError("weights are only read")
        node = self._tree.node_if_known(inode)
        self.opens += 1
        if node is None:
            return await self._views.open(inode)
        make = self._virtual.text(node)
        if make is not None:
            self._handles.attach(inode, lambda: (LiveText(make), None))
            return Opened(keep_cache=False, direct=True)
        if node.kind is not Kind.SOURCE:
            raise IsADirectoryEntryError("is a folder")
        path = self._tree.path(node)
        fd, entry = await self._open_source(node, path)
        if entry.inode_key != node.key:
            os.close(fd)
            raise StaleError("its name means another file now", path=os.fsdecode(path))
        if self._beliefs is not None and not self._beliefs.is_believed(inode, entry):
            os.close(fd)
            raise StaleError("it has changed unseen", path=os.fsdecode(path))
        promise = entry.size, entry.mtime_ns
        if not self._open_files.serve(inode, fd, lambda: (WholeFile(self._source, path, fd, promise), fd)):
            self._open_files.renew(inode, promise)
        self.wanted(path, thread)
        return Opened(keep_cache=self._open_files.is_cached(inode, entry.identity))

    async def reopen(self, inode: int) -> None:
        """Attach what serves an inode that the kernel has open and this process has not: a predecessor opened it.

        Raises:
            StaleError: what it was is gone.
        """
        opened = self._handles.get(inode)
        if opened is None or opened.kept is None:
            await self.open(inode, os.O_RDONLY)
            return
        fd, promise = os.dup(opened.kept[0]), opened.kept[1]
        try:
            node = self._tree.node_if_known(inode)
            path = self._tree.path(node) if node is not None else None
            if path is None:
                self._views.reopen(inode, fd)
        except StaleError:
            os.close(fd)
            raise
        if path is not None:
            self._open_files.serve(inode, fd, lambda: (WholeFile(self._source, path, fd, promise), fd))

    async def _open_source(self, node: Node, path: bytes) -> tuple[int, SourceStat]:
        """Open a file by name; a name that means something else by now makes the kernel look it up again."""
        try:
            try:
                return self._source.open(path, cached_only=True)
            except WouldBlockError:
                return await self._asking.open(path)
        except UnsupportedError:
            entry = await self._asking.lstat(path)
            if entry.inode_key == node.key and not entry.is_file:  # else it was another one for a moment
                raise
            raise StaleError("its name means something else now", path=os.fsdecode(path)) from None
        except OSError as e:
            if e.errno in _GONE:
                raise StaleError("its name is gone", path=os.fsdecode(path)) from None
            raise

    def changed_files(self) -> list[str]:
        """Open files that were written to in place since they were opened. Callable from any thread."""
        return self._open_files.changed()

    # The rest

    async def getxattr(self, inode: int, name: bytes) -> bytes:
        """One extended attribute: the source's own, or `user.weightfs.*` of a view."""
        node = self._tree.node_if_known(inode)
        if node is not None:
            if node.kind is Kind.STATE or (node.kind is not Kind.SOURCE and name not in ACCESS_LISTS):
                raise NoAttributeError(os.fsdecode(name))
            if node.kind is Kind.VIEW_SET:
                return await self._views.set_access_list(node, name)
            while node.kind is not Kind.SOURCE:
                node = self._tree.node(node.parent)
            return await self._asking.wait(self._source.getxattr, self._tree.path(node), name)
        return await self._views.getxattr(inode, name)

    async def listxattr(self, inode: int) -> list[bytes]:
        """Names of the extended attributes."""
        node = self._tree.node_if_known(inode)
        if node is not None:
            if node.kind is not Kind.SOURCE:
                return []
            return await self._asking.wait(self._source.listxattr, self._tree.path(node))
        return self._views.listxattr(inode)

    async def statfs(self) -> os.statvfs_result:
        """Space and limits of the filesystem underneath."""
        return await self._asking.wait(self._source.statvfs)
