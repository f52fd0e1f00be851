"""What every filesystem call means: names, attributes, listings, opens. Knows nothing of FUSE.

Runs on one trio thread. A section without await is atomic towards every other call; blocking work goes to threads
through `_wait`, except what the source can answer from the kernel's caches without waiting (`cached_only`).

The namespace is the source's, and three names that answer look-ups but are never listed:

    <folder>/.tensors/<set>/<tensor>    <folder>/.npy/<set>/<tensor>.npy    /.weightfs/{status.json,metrics}
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import logging
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

import msgspec
import trio

from weightfs.beliefs import Answer, Beliefs
from weightfs.errors import (
    DeadlineError,
    ForbiddenError,
    IsADirectoryEntryError,
    NoAttributeError,
    NotADirectoryEntryError,
    NotASymlinkError,
    NotFoundError,
    ReadOnlyError,
    StaleError,
    UnsupportedError,
)
from weightfs.formats import npy_header
from weightfs.handles import HandleTable, Readable
from weightfs.index.schema import ROOT_INODE, Kind
from weightfs.index.store import IndexStore
from weightfs.library import Library, ParsedFile, ViewSet
from weightfs.notifier import Notifier
from weightfs.readables import Extent, LiveText, WholeFile
from weightfs.rights import ACCESS_LIST, Rights, rights_of
from weightfs.source.base import Sight, Source, SourceStat, WouldBlockError
from weightfs.source.local import LocalSource
from weightfs.tree import Node, Tree
from weightfs.walk import ListAhead, Rows
from weightfs.watch import Batch, Watcher

log = logging.getLogger(__name__)

TENSORS: Final = b".tensors"
NPY: Final = b".npy"
STATE: Final = b".weightfs"
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})
"""What a path gives that was one to a file when it was looked up; the last two: a folder in it became a symlink."""
_ACCESS_LISTS: Final = frozenset({b"system.posix_acl_access", b"system.posix_acl_default"})
_XATTR: Final = b"user.weightfs."
_READABLE_BITS: Final = 0o444
_FOLDER_BITS: Final = 0o555
_MAX_LISTINGS: Final = 64
_MAX_ROWS: Final = 20_000
"""Of all listings held, about 0.5 KB each; the newest is held whatever it has."""
_DIRECTORY_BYTES: Final = 4096
_FIRST_COOKIE: Final = 16

P = ParamSpec("P")
T = TypeVar("T")


class Attributes(msgspec.Struct):
    """One inode as stat(2) shows it; times in nanoseconds since 1970, `blocks` in units of 512 bytes.

    Attributes:
        name_s, own_s: for how long its name, and the rest, may be believed without asking; None is as configured.
    """

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    block_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    name_s: float | None = None
    own_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """How the kernel is to treat a file just opened.

    Attributes:
        keep_cache: what the kernel has cached of it is still true.
        direct: its size means nothing; every read must come to us.
    """

    keep_cache: bool
    direct: bool = False


class DirectoryEntry(msgspec.Struct, frozen=True):
    """One row of a listing; `cookie` depends on the name alone, so a listing can go on after a restart."""

    name: bytes
    attributes: Attributes
    cookie: int


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
        self._texts = texts
        self._config = config
        self._limiter = trio.CapacityLimiter(config.threads)
        self.library = Library(source, index)
        self._tree = Tree(index, source.lstat(b"").inode_key)
        self._walk = ListAhead(source)
        self._listings: OrderedDict[int, list[DirectoryEntry]] = OrderedDict()
        self._cached_identity: OrderedDict[int, bytes] = OrderedDict()
        self._sights: dict[int, Sight] = {}  # of the listings
        self._index = index
        self._beliefs: Beliefs | None = None
        self.opens = 0

    # Changes

    def watch(self, source: LocalSource, watcher: Watcher, notifier: Notifier, *, short_s: float) -> Beliefs:
        """From now on let the kernel believe what is watched; `source` is the filesystem's own."""
        self._beliefs = Beliefs(source, self._tree, self._index, watcher, notifier, short_s=short_s)
        self._walk.lister = self._beliefs.list_folder
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
            if self._source_node(inode) is None and (found := self.library.view(inode)) and found[0].path in paths:
                self._beliefs.view_changed(inode)

    async def _examine(self, folder: Node, name: bytes) -> tuple[SourceStat, Sight | None]:
        """An entry of a source folder, empty name: the folder itself.

        Raises:
            StaleError: another folder has taken its place.
        """
        path = self._tree.path(folder)
        if self._beliefs is None:
            return await self._lstat(os.path.join(path, name) if name else path), None
        sight = await self._ask(self._beliefs.examine, path, name)
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
        folder = self._node(parent)
        if folder.kind is Kind.SOURCE:
            return await self._lookup_source(folder, name)
        if folder.kind is Kind.VIEW_ROOT:
            if await self._view_set(folder, name) is None:
                raise NotFoundError(os.fsdecode(name))
            node = self._tree.see_virtual(Kind.VIEW_SET, parent, name)
            self._tree.count_lookup(node)
            return await self._folder_attributes(node)
        if folder.kind is Kind.VIEW_SET:
            return await self._lookup_tensor(folder, name)
        if name not in self._texts or folder.name != STATE:
            raise NotFoundError(os.fsdecode(name))
        node = self._tree.see_virtual(Kind.STATE, parent, name)
        self._tree.count_lookup(node)
        return await self._folder_attributes(node)

    async def _lookup_source(self, folder: Node, name: bytes) -> Attributes:
        path = os.path.join(self._tree.path(folder), name)
        try:
            entry, sight = await self._examine(folder, name)
        except FileNotFoundError:
            node = self._virtual(folder, name)
            if node is None:
                raise NotFoundError(os.fsdecode(path)) from None
            self._tree.count_lookup(node)
            return await self._folder_attributes(node)
        node = self._tree.see(Kind.SOURCE, folder.inode, name, entry.inode_key)
        self._tree.count_lookup(node)
        found = await self._source_attributes(node.inode, path, entry)
        return self._believed(sight, folder, node, name, found)

    def _virtual(self, folder: Node, name: bytes) -> Node | None:
        if name in (TENSORS, NPY):
            return self._tree.see_virtual(Kind.VIEW_ROOT, folder.inode, name)
        if name == STATE and folder.inode == ROOT_INODE:
            return self._tree.see_virtual(Kind.STATE, folder.inode, name)
        return None

    async def _lookup_tensor(self, folder: Node, name: bytes) -> Attributes:
        root = self._node(folder.parent)
        for newest in (False, True):
            views = await self._view_set(root, folder.name, newest=newest)
            place = _entries(views, root.name).get(name)
            if place is None:
                continue  # a set remembered from a moment ago may lack it
            try:
                return await self._view_attributes(_view_number(place, root.name))
            except StaleError:
                if newest:
                    raise
        raise NotFoundError(os.fsdecode(name))

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
        node = self._source_node(inode)
        if node is None:
            return await self._view_attributes(inode)
        if node.kind is not Kind.SOURCE:
            return await self._folder_attributes(node)
        path = self._tree.path(node)
        # The root has no folder above it here: it is examined by itself.
        folder, name = (node, b"") if inode == ROOT_INODE else (self._node(node.parent), node.name)
        sight = None
        try:
            entry, sight = await self._examine(folder, name)
        except (FileNotFoundError, StaleError):
            entry = None
        if entry is None or (entry.inode_key != node.key and inode != ROOT_INODE):
            # Its name is gone or means another file now; whoever has it open still may ask.
            entry, sight = self._open_stat(inode), None
        if entry is None:
            raise StaleError("its name is gone", path=os.fsdecode(path))
        found = await self._source_attributes(inode, path, entry)
        if sight is not None and inode == ROOT_INODE and self._beliefs is not None:
            found.own_s = self._beliefs.own_timeout(sight, node)
            return found
        return self._believed(sight, folder, node, name, found)

    def _open_stat(self, inode: int) -> SourceStat | None:
        opened = self._handles.get(inode)
        if opened is None:
            return None
        readable = opened.readable
        fd = opened.kept[0] if opened.kept else readable.fd if readable is not None else None
        return self._source.fstat(fd) if fd is not None else None

    async def _source_attributes(self, inode: int, path: bytes, entry: SourceStat) -> Attributes:
        size = entry.size
        if entry.is_symlink:
            # The size of what readlink will say; its own where that says nothing.
            with contextlib.suppress(OSError, ForbiddenError):
                size = len(await self._wait(self._source.readlink, path))
        return Attributes(
            inode=inode,
            mode=entry.mode,
            nlink=entry.nlink,
            uid=entry.uid,
            gid=entry.gid,
            rdev=entry.rdev,
            size=size,
            blocks=entry.blocks,
            block_bytes=entry.block_bytes,
            atime_ns=entry.atime_ns,
            mtime_ns=entry.mtime_ns,
            ctime_ns=entry.ctime_ns,
        )

    async def _folder_attributes(self, node: Node) -> Attributes:
        """Of a virtual entry: owner and permissions are those of its source folder, or of a set's files."""
        is_text = node.kind is Kind.STATE and node.name != STATE
        owner = self._node(node.parent)
        while owner.kind is not Kind.SOURCE:
            owner = self._node(owner.parent)
        folder = self._tree.path(owner)
        entry = await self._lstat(folder)
        mtime_ns = entry.mtime_ns
        if node.kind in (Kind.VIEW_ROOT, Kind.VIEW_SET):
            # The kernel keeps a listing for as long as the mtime stays: it must tell of changed files as well.
            name = os.fsdecode(node.name) if node.kind is Kind.VIEW_SET else None
            mtime_ns = await self._wait(self.library.last_change_ns, folder, name)
        uid, gid, size = entry.uid, entry.gid, _DIRECTORY_BYTES
        if is_text:
            mode, size = stat.S_IFREG | _READABLE_BITS, len(self._texts[node.name]())
        elif node.kind is Kind.VIEW_ROOT:
            mode = stat.S_IFDIR | (entry.mode & _FOLDER_BITS)
        else:
            mode = stat.S_IFDIR | _FOLDER_BITS
            if node.kind is Kind.VIEW_SET and (rights := await self._wait(self._set_rights, folder, node.name)):
                mode, uid, gid = stat.S_IFDIR | rights.mode, rights.uid, rights.gid
        return Attributes(
            inode=node.inode,
            mode=mode,
            nlink=1 if is_text else 2,
            uid=uid,
            gid=gid,
            rdev=0,
            size=size,
            blocks=0,
            block_bytes=entry.block_bytes,
            atime_ns=mtime_ns,
            mtime_ns=mtime_ns,
            ctime_ns=mtime_ns,
        )

    def _set_rights(self, folder: bytes, name: bytes) -> Rights | None:
        files = self.library.sets(self._source.names(folder)).get(os.fsdecode(name), ())
        return rights_of(self._source, folder, map(os.fsencode, files))

    async def _view_attributes(self, inode: int) -> Attributes:
        parsed, position, npy = await self._view(inode)
        try:
            entry = await self._current(parsed)
        except StaleError:
            # A folder above may have another name; whoever has it open still may ask.
            opened = self._open_stat(inode)
            if opened is None or opened.identity != parsed.identity:
                raise
            entry = opened
        return _tensor_attributes(inode, parsed, position, npy, entry)

    async def _current(self, parsed: ParsedFile) -> SourceStat:
        """The file of a view, provided that it still is what was parsed."""
        try:
            entry = await self._lstat(parsed.path)
        except FileNotFoundError:
            raise StaleError("its file is gone", path=os.fsdecode(parsed.path)) from None
        if entry.identity != parsed.identity:
            raise StaleError("its file has changed", path=os.fsdecode(parsed.path))
        return entry

    async def readlink(self, inode: int) -> bytes:
        """The target of a symlink.

        Raises:
            NotASymlinkError: it is none.
            ForbiddenError: it leads out of the source.
        """
        node = self._source_node(inode)
        if node is None or node.kind is not Kind.SOURCE:
            raise NotASymlinkError("is no symlink")
        path = self._tree.path(node)
        try:
            return await self._wait(self._source.readlink, path)
        except OSError as e:
            if e.errno == errno.EINVAL:
                entry = await self._lstat(path)
                if entry.inode_key == node.key and not entry.is_symlink:
                    raise NotASymlinkError("is no symlink", path=os.fsdecode(path)) from None
            if e.errno == errno.EINVAL or e.errno in _GONE:
                raise StaleError("its name means something else now", path=os.fsdecode(path)) from None
            raise

    # Listings

    def _is_cached(self, inode: int, identity: bytes) -> bool:
        """Whether what the kernel cached of an inode, at its last open, was of this identity; notes it."""
        same = self._cached_identity.get(inode) == identity
        self._cached_identity[inode] = identity
        self._cached_identity.move_to_end(inode)
        if len(self._cached_identity) > 1 << 16:
            self._cached_identity.popitem(last=False)
        return same

    async def readdir(self, inode: int, after: int) -> Iterator[DirectoryEntry]:
        """The entries behind a cookie (0: all), in the order of their cookies, without `.` and `..`.

        Raises:
            NotADirectoryEntryError, StaleError, DeadlineError, OSError.
        """
        node = self._source_node(inode)
        if node is None:
            await self._view(inode)
            raise NotADirectoryEntryError("is no folder")
        if after == 0 or inode not in self._listings:
            self._listings[inode] = await self._list(node)
            self._listings.move_to_end(inode)
            rows = sum(map(len, self._listings.values()))
            while len(self._listings) > 1 and (len(self._listings) > _MAX_LISTINGS or rows > _MAX_ROWS):
                oldest, gone = self._listings.popitem(last=False)
                self._sights.pop(oldest, None)
                rows -= len(gone)
        entries = self._listings[inode]
        rest = itertools.islice(entries, bisect.bisect_right(entries, after, key=_cookie_of), None)
        sight = self._sights.get(inode)
        if self._beliefs is None or sight is None:
            return rest
        # Now, not when it was made: a listing may go on long after.
        return self._believed_entries(self._beliefs.answer(sight, node), rest)

    def _believed_entries(self, answer: Answer, entries: Iterator[DirectoryEntry]) -> Iterator[DirectoryEntry]:
        """As `_believed`, for whoever takes the entries without waiting in between."""
        for entry in entries:
            found = entry.attributes
            if (node := self._source_node(found.inode)) is not None:
                found.name_s, found.own_s = answer.timeouts(entry.name, node, found)
            yield entry

    def listing_end(self, inode: int) -> int | None:
        """The cookie of the last entry of a folder's listing, if that is at hand and not empty."""
        entries = self._listings.get(inode)
        return entries[-1].cookie if entries else None

    def listed(self, entry: DirectoryEntry) -> None:
        """The kernel took an entry of a listing, and with it counts a look-up."""
        if (node := self._source_node(entry.attributes.inode)) is not None:
            self._tree.count_lookup(node)

    async def _list(self, node: Node) -> list[DirectoryEntry]:
        rows: list[tuple[bytes, Attributes]] = []
        if node.kind is Kind.SOURCE:
            folder = self._tree.path(node)
            found, sight = await self._source_rows(node, folder)
            if sight is not None:
                self._sights[node.inode] = sight
            children = self._tree.see_all(node.inode, [(name, entry.inode_key) for name, entry in found])
            for child, (name, entry) in zip(children, found, strict=True):
                path = os.path.join(folder, name) if entry.is_symlink else b""
                rows.append((name, await self._source_attributes(child.inode, path, entry)))
        elif node.kind is Kind.VIEW_ROOT:
            folder = self._tree.path(self._node(node.parent))
            for set_name in await self._wait(self._set_names, folder, node.name):
                child = self._tree.see_virtual(Kind.VIEW_SET, node.inode, os.fsencode(set_name))
                rows.append((child.name, await self._folder_attributes(child)))
        elif node.kind is Kind.VIEW_SET:
            root = self._node(node.parent)
            views = await self._view_set(root, node.name, newest=True)
            if views is not None:
                rows = await self._list_tensors(views, root.name)
        else:
            for name in self._texts:
                child = self._tree.see_virtual(Kind.STATE, node.inode, name)
                rows.append((name, await self._folder_attributes(child)))
        entries = [DirectoryEntry(name, attributes, _cookie(name)) for name, attributes in rows]
        return sorted(entries, key=_cookie_of)

    async def _source_rows(self, node: Node, folder: bytes) -> tuple[Rows, Sight | None]:
        listed = self._walk.take(folder, (await self._lstat(folder)).identity)
        if listed is None:
            ahead = self._walk.plan(folder, self._following(node))
            fresh, ready_later = await self._wait(self._walk.read, folder, ahead)
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
        behind = itertools.islice(siblings, bisect.bisect_right(siblings, _cookie(node.name), key=_cookie_of), None)
        parent = self._tree.path(self._node(node.parent))
        folders = (os.path.join(parent, entry.name) for entry in behind if stat.S_ISDIR(entry.attributes.mode))
        return list(itertools.islice(folders, self._walk.window))

    def _set_names(self, folder: bytes, root: bytes) -> list[str]:
        return [
            name
            for name in self.library.sets(self._source.names(folder))
            if _entries(self.library.view_set(folder, name), root)
        ]

    async def _list_tensors(self, views: ViewSet, root: bytes) -> list[tuple[bytes, Attributes]]:
        rows = []
        stats: dict[bytes, SourceStat] = {}
        for name, (parsed, position) in _entries(views, root).items():
            if parsed.path not in stats:
                stats[parsed.path] = await self._current(parsed)
            number = _view_number((parsed, position), root)
            rows.append((name, _tensor_attributes(number, parsed, position, root == NPY, stats[parsed.path])))
        return rows

    # Opening

    async def open(self, inode: int, flags: int) -> Opened:
        """Open a file; its handle is in the table already, and this attaches what serves it.

        Raises:
            ReadOnlyError: anything but reading was asked.
            StaleError: the name means another file now: the kernel looks it up again.
            UnsupportedError: a FIFO, socket or device.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_TRUNC | os.O_APPEND):
            raise ReadOnlyError("weights are only read")
        node = self._source_node(inode)
        self.opens += 1
        if node is None:
            return await self._open_view(inode)
        if node.kind is Kind.STATE and node.name in self._texts and node.name != STATE:
            make = self._texts[node.name]
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
        self._serve(inode, fd, lambda: (WholeFile(self._source, path, fd, promise), fd))
        return Opened(keep_cache=self._is_cached(inode, entry.identity))

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
        node = self._source_node(inode)
        if node is None:
            found = await self._view(inode)
            self._serve(inode, fd, lambda: (self._extent(fd, *found), None))
        else:
            path = self._tree.path(node)
            self._serve(inode, fd, lambda: (WholeFile(self._source, path, fd, promise), fd))

    async def _open_source(self, node: Node, path: bytes) -> tuple[int, SourceStat]:
        """Open a file by name; a name that means something else by now makes the kernel look it up again."""
        try:
            try:
                return self._source.open(path, cached_only=True)
            except WouldBlockError:
                return await self._wait_for_descriptor(path)
        except UnsupportedError:
            entry = await self._lstat(path)
            if entry.inode_key == node.key and not entry.is_file:  # else it was another one for a moment
                raise
            raise StaleError("its name means something else now", path=os.fsdecode(path)) from None
        except OSError as e:
            if e.errno in _GONE:
                raise StaleError("its name is gone", path=os.fsdecode(path)) from None
            raise

    async def _open_view(self, inode: int) -> Opened:
        parsed, position, npy = await self._view(inode)
        await self._current(parsed)
        fd, entry = await self._wait_for_descriptor(parsed.path)
        if entry.identity != parsed.identity:
            os.close(fd)
            raise StaleError("its file has changed", path=os.fsdecode(parsed.path))
        self._serve(inode, fd, lambda: (self._extent(fd, parsed, position, npy), None))
        return Opened(keep_cache=True)

    def _extent(self, fd: int, parsed: ParsedFile, position: int, npy: bool) -> Extent:
        _, _, _, offset, nbytes, *_ = parsed.record.tensors[position]
        prefix = _npy_prefix(parsed, position) if npy else b""
        return Extent(self._source, fd, parsed.identity, prefix, offset, nbytes)

    def _serve(self, inode: int, fd: int, make: Callable[[], tuple[Readable, int | None]]) -> None:
        made = []

        def once() -> tuple[Readable, int | None]:
            made.append(True)
            return make()

        self._handles.attach(inode, once)
        if not made:  # open already, or given up meanwhile
            os.close(fd)

    def changed_files(self) -> list[str]:
        """Open files that were written to in place since they were opened. Callable from any thread."""
        found = set()
        for inode in self._handles:
            entry = self._handles.get(inode)
            file = entry.readable if entry is not None else None
            if not isinstance(file, WholeFile):
                continue
            with contextlib.suppress(OSError):  # closed meanwhile
                if file.has_changed() and self._handles.get(inode) is entry:  # else its descriptor may be another's
                    found.add(os.fsdecode(file.path))
        return sorted(found)

    # The rest

    async def getxattr(self, inode: int, name: bytes) -> bytes:
        """One extended attribute: the source's own, or `user.weightfs.*` of a view."""
        node = self._source_node(inode)
        if node is not None:
            if node.kind is Kind.STATE or (node.kind is not Kind.SOURCE and name not in _ACCESS_LISTS):
                raise NoAttributeError(os.fsdecode(name))
            if node.kind is Kind.VIEW_SET:
                return await self._set_access_list(node, name)
            while node.kind is not Kind.SOURCE:
                node = self._node(node.parent)
            return await self._wait(self._source.getxattr, self._tree.path(node), name)
        parsed, position, _ = await self._view(inode)
        if name in _ACCESS_LISTS:
            # A view opens to whom its file opens: mode bits alone would let in whom the list shuts out.
            return await self._wait(self._source.getxattr, parsed.path, name)
        attributes = _view_xattrs(parsed, position)
        if name not in attributes:
            raise NoAttributeError(os.fsdecode(name))
        return attributes[name]

    async def _set_access_list(self, node: Node, name: bytes) -> bytes:
        folder = self._tree.path(self._node(self._node(node.parent).parent))
        rights = await self._wait(self._set_rights, folder, node.name)
        if name != ACCESS_LIST or rights is None or rights.access_list is None:
            raise NoAttributeError(os.fsdecode(name))
        return rights.access_list

    async def listxattr(self, inode: int) -> list[bytes]:
        """Names of the extended attributes."""
        node = self._source_node(inode)
        if node is not None:
            if node.kind is not Kind.SOURCE:
                return []
            return await self._wait(self._source.listxattr, self._tree.path(node))
        parsed, position, _ = await self._view(inode)
        return list(_view_xattrs(parsed, position))

    async def statfs(self) -> os.statvfs_result:
        """Space and limits of the filesystem underneath."""
        return await self._wait(self._source.statvfs)

    # Helpers

    def _node(self, inode: int) -> Node:
        return self._tree.node(inode)

    def _source_node(self, inode: int) -> Node | None:
        """The node of a number, or None when it is (or may be) a view's."""
        try:
            return self._tree.node(inode)
        except StaleError:
            return None

    async def _view(self, inode: int) -> tuple[ParsedFile, int, bool]:
        found = self.library.view(inode)
        if found is None:
            raise StaleError(f"inode {inode:#x} is not known")
        return found

    async def _view_set(self, root: Node, name: bytes, *, newest: bool = False) -> ViewSet | None:
        folder, text = self._tree.path(self._node(root.parent)), os.fsdecode(name)
        if not newest and (remembered := self.library.recent_view_set(folder, text)) is not None:
            return remembered
        return await self._wait(self.library.view_set, folder, text)

    async def _lstat(self, path: bytes) -> SourceStat:
        return await self._ask(self._source.lstat, path)

    async def _ask(self, ask: Callable[..., T], path: bytes, *more: bytes) -> T:
        """Call with `cached_only`, and where that would wait without it in a thread."""
        try:
            try:
                return ask(path, *more, cached_only=True)
            except WouldBlockError:
                return await self._wait(ask, path, *more)
        except NotADirectoryError:  # a folder above has become a file
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.EXDEV):
                raise StaleError("a folder above it was replaced", path=os.fsdecode(path)) from None
            raise

    async def _wait_for_descriptor(self, path: bytes) -> tuple[int, SourceStat]:
        """`_wait` for an open: a descriptor that comes after the deadline is closed by the thread that got it."""
        lock = threading.Lock()
        late = [False]
        got: list[int] = []

        def open_file() -> tuple[int, SourceStat]:
            fd, entry = self._source.open(path)
            with lock:
                got.append(fd)
                if late[0]:
                    os.close(fd)
            return fd, entry

        try:
            return await self._wait(open_file)
        except (DeadlineError, trio.Cancelled):
            with lock:
                late[0] = True
                for fd in got:
                    os.close(fd)
            raise

    async def _wait(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call in a thread; a source that does not answer costs that thread, not the caller."""
        with trio.move_on_after(self._config.deadline_s):
            return await trio.to_thread.run_sync(
                lambda: function(*args, **kwargs), limiter=self._limiter, abandon_on_cancel=True
            )
        raise DeadlineError(f"the source did not answer within {self._config.deadline_s:g} s")


def _entries(views: ViewSet | None, root: bytes) -> Mapping[bytes, tuple[ParsedFile, int]]:
    if views is None:
        return {}
    return views.npy if root == NPY else views.raw


def _view_number(place: tuple[ParsedFile, int], root: bytes) -> int:
    parsed, position = place
    return parsed.record.base + 2 * position + (root == NPY)


def _npy_prefix(parsed: ParsedFile, position: int) -> bytes:
    _, dtype, shape, *_ = parsed.record.tensors[position]
    header = npy_header(dtype, shape, "big" if parsed.record.big_endian else "little")
    if header is None:
        raise StaleError(f"NumPy has no {dtype}")
    return header


def _tensor_attributes(inode: int, parsed: ParsedFile, position: int, npy: bool, entry: SourceStat) -> Attributes:
    size = parsed.record.tensors[position][4] + (len(_npy_prefix(parsed, position)) if npy else 0)
    return Attributes(
        inode=inode,
        mode=stat.S_IFREG | (entry.mode & _READABLE_BITS),
        nlink=1,
        uid=entry.uid,
        gid=entry.gid,
        rdev=0,
        size=size,
        blocks=-(-size // 512),
        block_bytes=entry.block_bytes,
        atime_ns=entry.atime_ns,
        mtime_ns=entry.mtime_ns,
        ctime_ns=entry.ctime_ns,
    )


def _view_xattrs(parsed: ParsedFile, position: int) -> dict[bytes, bytes]:
    _, dtype, shape, offset, nbytes, layer, _ = parsed.record.tensors[position]
    values = {
        "dtype": dtype,
        "shape": ",".join(map(str, shape)),
        "layer": "" if layer is None else str(layer),
        "offset": str(offset),
        "nbytes": str(nbytes),
        "file": parsed.name,
    }
    return {_XATTR + key.encode(): os.fsencode(value) for key, value in values.items()}


def _cookie_of(entry: DirectoryEntry) -> int:
    return entry.cookie


def _cookie(name: bytes) -> int:
    """63 bits that depend on the name alone: two of 100,000 names agree once in a billion folders."""
    digest = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
    return max(digest, _FIRST_COOKIE)
