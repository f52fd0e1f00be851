"""Tensors as files: their numbers, attributes, listings, opens. A view promises the content that was parsed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Final

from weightfs.asking import Asking
from weightfs.entries import NPY, READABLE_BITS, Attributes, Opened
from weightfs.errors import NoAttributeError, NotFoundError, StaleError
from weightfs.formats import npy_header
from weightfs.library import Library, ParsedFile, ViewSet
from weightfs.open_files import OpenFiles
from weightfs.readables import Extent
from weightfs.rights import ACCESS_LIST, Rights, rights_of
from weightfs.source.base import Source, SourceStat
from weightfs.tree import Node, Tree

ACCESS_LISTS: Final = frozenset({ACCESS_LIST, b"system.posix_acl_default"})
_XATTR: Final = b"user.weightfs."


class Views:
    """The views of one mount. Runs on one trio thread, except `set_names` and `set_rights`, which wait for the source.

    Attributes:
        library: knows which file a tensor lies in, and where.
    """

    def __init__(self, source: Source, asking: Asking, library: Library, tree: Tree, open_files: OpenFiles) -> None:
        self.library = library
        self._source = source
        self._asking = asking
        self._tree = tree
        self._open_files = open_files

    # Sets

    async def set_of(self, root: Node, name: bytes, *, newest: bool = False) -> ViewSet | None:
        """A set of a `.tensors` or `.npy`, maybe as it was a moment ago; None where there is none of that name.

        Raises:
            DeadlineError, OSError.
        """
        folder, text = self._tree.path(self._tree.node(root.parent)), os.fsdecode(name)
        if not newest and (remembered := self.library.recent_view_set(folder, text)) is not None:
            return remembered
        return await self._asking.wait(self.library.view_set, folder, text)

    def set_names(self, folder: bytes, root: bytes) -> list[str]:
        """The sets of a source folder that have an entry in its `root`. May wait for the source."""
        return [
            name
            for name in self.library.sets(self._source.names(folder))
            if _entries(self.library.view_set(folder, name), root)
        ]

    def set_rights(self, folder: bytes, name: bytes) -> Rights | None:
        """What the folder of a set asks for, see `rights_of`. May wait for the source."""
        files = self.library.sets(self._source.names(folder)).get(os.fsdecode(name), ())
        return rights_of(self._source, folder, map(os.fsencode, files))

    async def set_access_list(self, node: Node, name: bytes) -> bytes:
        """An ACL of a set's folder.

        Raises:
            NoAttributeError: it has none.
            DeadlineError, OSError.
        """
        folder = self._tree.path(self._tree.node(self._tree.node(node.parent).parent))
        rights = await self._asking.wait(self.set_rights, folder, node.name)
        if name != ACCESS_LIST or rights is None or rights.access_list is None:
            raise NoAttributeError(os.fsdecode(name))
        return rights.access_list

    async def rows(self, node: Node) -> list[tuple[bytes, Attributes]]:
        """The tensors of a set's folder, by name.

        Raises:
            StaleError, DeadlineError, OSError.
        """
        root = self._tree.node(node.parent)
        views = await self.set_of(root, node.name, newest=True)
        rows = []
        stats: dict[bytes, SourceStat] = {}
        for name, (parsed, position) in _entries(views, root.name).items():
            if parsed.path not in stats:
                stats[parsed.path] = await self._current(parsed)
            number = _number((parsed, position), root.name)
            rows.append((name, _attributes(number, parsed, position, root.name == NPY, stats[parsed.path])))
        return rows

    # Tensors

    def find(self, inode: int) -> tuple[ParsedFile, int, bool]:
        """Whose tensor a number stands for: (file, position in its layout, whether it is the `.npy` form).

        Raises:
            StaleError: no view has this number.
        """
        found = self.library.view(inode)
        if found is None:
            raise StaleError(f"inode {inode:#x} is not known")
        return found

    async def lookup(self, folder: Node, name: bytes) -> Attributes:
        """The tensor `name` of a set's folder.

        Raises:
            NotFoundError, StaleError, DeadlineError, OSError.
        """
        root = self._tree.node(folder.parent)
        for newest in (False, True):
            views = await self.set_of(root, folder.name, newest=newest)
            place = _entries(views, root.name).get(name)
            if place is None:
                continue  # a set remembered from a moment ago may lack it
            try:
                return await self.attributes(_number(place, root.name))
            except StaleError:
                if newest:
                    raise
        raise NotFoundError(os.fsdecode(name))

    async def attributes(self, inode: int) -> Attributes:
        """What a view's number shows.

        Raises:
            StaleError: its file is gone or has changed.
            DeadlineError, OSError.
        """
        parsed, position, npy = self.find(inode)
        try:
            entry = await self._current(parsed)
        except StaleError:
            # A folder above may have another name; whoever has it open still may ask.
            opened = self._open_files.stat(inode)
            if opened is None or opened.identity != parsed.identity:
                raise
            entry = opened
        return _attributes(inode, parsed, position, npy, entry)

    async def _current(self, parsed: ParsedFile) -> SourceStat:
        """The file of a view, provided that it still is what was parsed."""
        try:
            entry = await self._asking.lstat(parsed.path)
        except FileNotFoundError:
            raise StaleError("its file is gone", path=os.fsdecode(parsed.path)) from None
        if entry.identity != parsed.identity:
            raise StaleError("its file has changed", path=os.fsdecode(parsed.path))
        return entry

    async def open(self, inode: int) -> Opened:
        """Open a view; its handle is in the table already, and this attaches what serves it.

        Raises:
            StaleError: its file is gone or has changed.
            DeadlineError, OSError.
        """
        parsed, position, npy = self.find(inode)
        await self._current(parsed)
        fd, entry = await self._asking.open(parsed.path)
        if entry.identity != parsed.identity:
            os.close(fd)
            raise StaleError("its file has changed", path=os.fsdecode(parsed.path))
        self._open_files.serve(inode, fd, lambda: (self._extent(fd, parsed, position, npy), None))
        return Opened(keep_cache=True)

    def reopen(self, inode: int, fd: int) -> None:
        """Attach what serves a view that a predecessor opened; `fd` is its file, and is taken over.

        Raises:
            StaleError: what it was is not known; `fd` is left alone.
        """
        found = self.find(inode)
        self._open_files.serve(inode, fd, lambda: (self._extent(fd, *found), None))

    def _extent(self, fd: int, parsed: ParsedFile, position: int, npy: bool) -> Extent:
        _, _, _, offset, nbytes, *_ = parsed.record.tensors[position]
        prefix = _npy_prefix(parsed, position) if npy else b""
        return Extent(self._source, fd, parsed.identity, prefix, offset, nbytes)

    async def getxattr(self, inode: int, name: bytes) -> bytes:
        """One of `user.weightfs.*`, or an ACL of the view's file.

        Raises:
            NoAttributeError, StaleError, DeadlineError, OSError.
        """
        parsed, position, _ = self.find(inode)
        if name in ACCESS_LISTS:
            # A view opens to whom its file opens: mode bits alone would let in whom the list shuts out.
            return await self._asking.wait(self._source.getxattr, parsed.path, name)
        attributes = _xattrs(parsed, position)
        if name not in attributes:
            raise NoAttributeError(os.fsdecode(name))
        return attributes[name]

    def listxattr(self, inode: int) -> list[bytes]:
        """Names of the extended attributes.

        Raises:
            StaleError: no view has this number.
        """
        parsed, position, _ = self.find(inode)
        return list(_xattrs(parsed, position))


def _entries(views: ViewSet | None, root: bytes) -> Mapping[bytes, tuple[ParsedFile, int]]:
    if views is None:
        return {}
    return views.npy if root == NPY else views.raw


def _number(place: tuple[ParsedFile, int], root: bytes) -> int:
    parsed, position = place
    return parsed.record.base + 2 * position + (root == NPY)


def _npy_prefix(parsed: ParsedFile, position: int) -> bytes:
    _, dtype, shape, *_ = parsed.record.tensors[position]
    header = npy_header(dtype, shape, "big" if parsed.record.big_endian else "little")
    if header is None:
        raise StaleError(f"NumPy has no {dtype}")
    return header


def _attributes(inode: int, parsed: ParsedFile, position: int, npy: bool, entry: SourceStat) -> Attributes:
    size = parsed.record.tensors[position][4] + (len(_npy_prefix(parsed, position)) if npy else 0)
    return Attributes(
        inode=inode,
        mode=stat.S_IFREG | (entry.mode & READABLE_BITS),
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


def _xattrs(parsed: ParsedFile, position: int) -> dict[bytes, bytes]:
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
