"""Entries that exist only on the mount: `.tensors`, `.npy` and the sets in them, `.weightfs` and its texts."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from typing import Final

from weightfs.asking import Asking
from weightfs.entries import NPY, READABLE_BITS, STATE, TENSORS, Attributes
from weightfs.errors import NotFoundError
from weightfs.index.schema import ROOT_INODE, Kind
from weightfs.tree import Node, Tree
from weightfs.views import Views

_FOLDER_BITS: Final = 0o555
_DIRECTORY_BYTES: Final = 4096
_TEXT_BYTES: Final = 256 << 10
"""What a live text says is its size. Readers that go by it ask for all of a text at once, whatever its length is by
then; a text that is read in two parts would lack its end if another daemon took over in between."""


class Virtual:
    """The virtual entries of one mount. Runs on one trio thread.

    Args:
        texts: content of the files in `.weightfs/`, by name; called in any thread.
    """

    def __init__(self, asking: Asking, tree: Tree, views: Views, texts: Mapping[bytes, Callable[[], bytes]]) -> None:
        self._asking = asking
        self._tree = tree
        self._views = views
        self._texts = texts

    def beside(self, folder: Node, name: bytes) -> Node | None:
        """The virtual entry `name` of a source folder that has no such entry itself."""
        if name in (TENSORS, NPY):
            return self._tree.see_virtual(Kind.VIEW_ROOT, folder.inode, name)
        if name == STATE and folder.inode == ROOT_INODE:
            return self._tree.see_virtual(Kind.STATE, folder.inode, name)
        return None

    async def lookup(self, folder: Node, name: bytes) -> Attributes:
        """The entry `name` of a virtual folder whose entries are virtual, too.

        Raises:
            NotFoundError, StaleError, DeadlineError, OSError.
        """
        if folder.kind is Kind.VIEW_ROOT:
            if await self._views.set_of(folder, name) is None:
                raise NotFoundError(os.fsdecode(name))
            node = self._tree.see_virtual(Kind.VIEW_SET, folder.inode, name)
        elif name in self._texts and folder.name == STATE:
            node = self._tree.see_virtual(Kind.STATE, folder.inode, name)
        else:
            raise NotFoundError(os.fsdecode(name))
        self._tree.count_lookup(node)
        return await self.attributes(node)

    async def rows(self, node: Node) -> list[tuple[bytes, Attributes]]:
        """The entries of a virtual folder whose entries are virtual, too, by name.

        Raises:
            StaleError, DeadlineError, OSError.
        """
        if node.kind is Kind.VIEW_ROOT:
            folder = self._tree.path(self._tree.node(node.parent))
            kind = Kind.VIEW_SET
            names = list(map(os.fsencode, await self._asking.wait(self._views.set_names, folder, node.name)))
        else:
            kind, names = Kind.STATE, list(self._texts)
        children = (self._tree.see_virtual(kind, node.inode, name) for name in names)
        return [(child.name, await self.attributes(child)) for child in children]

    async def attributes(self, node: Node) -> Attributes:
        """Of a virtual entry: owner and permissions are those of its source folder, or of a set's files.

        Raises:
            StaleError, DeadlineError, OSError.
        """
        is_text = node.kind is Kind.STATE and node.name != STATE
        owner = self._tree.node(node.parent)
        while owner.kind is not Kind.SOURCE:
            owner = self._tree.node(owner.parent)
        folder = self._tree.path(owner)
        entry = await self._asking.lstat(folder)
        mtime_ns = entry.mtime_ns
        if node.kind in (Kind.VIEW_ROOT, Kind.VIEW_SET):
            # The kernel keeps a listing for as long as the mtime stays: it must tell of changed files as well.
            name = os.fsdecode(node.name) if node.kind is Kind.VIEW_SET else None
            mtime_ns = await self._asking.wait(self._views.library.last_change_ns, folder, name)
        uid, gid, size = entry.uid, entry.gid, _DIRECTORY_BYTES
        if is_text:
            mode, size = stat.S_IFREG | READABLE_BITS, _TEXT_BYTES
        elif node.kind is Kind.VIEW_ROOT:
            mode = stat.S_IFDIR | (entry.mode & _FOLDER_BITS)
        else:
            mode = stat.S_IFDIR | _FOLDER_BITS
            if node.kind is Kind.VIEW_SET and (
                rights := await self._asking.wait(self._views.set_rights, folder, node.name)
            ):
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

    def text(self, node: Node) -> Callable[[], bytes] | None:
        """What makes the content of a file in `.weightfs/`; None for anything else."""
        is_text = node.kind is Kind.STATE and node.name in self._texts and node.name != STATE
        return self._texts[node.name] if is_text else None
