"""pyfuse3's requests to filesystem calls, errors to errnos. Nothing else."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3
import trio

from weightfs import errors
from weightfs.entries import Attributes
from weightfs.filesystem import Filesystem

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ERRNOS: Final[dict[type[errors.WeightfsError], int]] = {
    errors.WeightfsError: errno.EIO,
    errors.UsageError: errno.EINVAL,
    errors.UnfitError: errno.ENOTSUP,
    errors.BusyError: errno.EAGAIN,
    errors.IntegrityError: errno.EIO,
    errors.FormatError: errno.EIO,
    errors.ShortReadError: errno.EIO,
    errors.IndexStoreError: errno.EIO,
    errors.EntryError: errno.EIO,
    errors.NotFoundError: errno.ENOENT,
    errors.NotADirectoryEntryError: errno.ENOTDIR,
    errors.IsADirectoryEntryError: errno.EISDIR,
    errors.NotASymlinkError: errno.EINVAL,
    errors.StaleError: errno.ESTALE,
    errors.ReadOnlyError: errno.EROFS,
    errors.NoAttributeError: errno.ENODATA,
    errors.ForbiddenError: errno.EACCES,
    errors.UnsupportedError: errno.EOPNOTSUPP,
    errors.DeadlineError: errno.EIO,
}
"""The one errno table. A subclass without a row of its own has its parent's."""

_STATVFS: Final = tuple(f"f_{x}" for x in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"))
_FOR_ROOT: Final = b"trusted."
"""Attributes that the kernel gives to CAP_SYS_ADMIN alone (xattr(7))."""
_EXPECTED: Final = (errors.EntryError, OSError)


def errno_of(error: BaseException) -> int:
    """The errno a caller of the mount gets for an exception; what nobody expected is EIO, and is logged."""
    if isinstance(error, errors.WeightfsError):
        number = next(ERRNOS[kind] for kind in type(error).__mro__ if kind in ERRNOS)
    elif isinstance(error, OSError) and error.errno:
        number = error.errno
    else:
        number = errno.EIO
    if not isinstance(error, _EXPECTED):
        log.error("a request failed: %s", error, exc_info=error)
    else:
        log.debug("answered %s: %s", errno.errorcode.get(number, number), error)
    return number


def _answered(
    handler: Callable[Concatenate[FuseOperations, P], Awaitable[T]],
) -> Callable[Concatenate[FuseOperations, P], Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError leave a handler, and trio's Cancelled, a BaseException: else the mount would end."""

    @functools.wraps(handler)
    async def guarded(self: FuseOperations, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as e:  # noqa: BLE001 - see the docstring
            raise pyfuse3.FUSEError(errno_of(e)) from None

    return guarded  # type: ignore[return-value]  # wraps() says the same with names for its arguments


class FuseOperations(pyfuse3.Operations):
    """The adapter. READ, RELEASE, FLUSH and OPENDIR never come here: the channel answers them."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, *, timeout_s: float) -> None:
        """`timeout_s`: how long the kernel may believe names and attributes without asking again."""
        super().__init__()
        self._timeout_s = timeout_s

    def attach(self, filesystem: Filesystem) -> None:
        """What answers; before the first request but INIT."""
        self._filesystem = filesystem

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(attributes.inode)
        entry.generation = 0
        entry.entry_timeout = self._timeout_s if attributes.name_s is None else attributes.name_s
        entry.attr_timeout = self._timeout_s if attributes.own_s is None else attributes.own_s
        entry.st_mode = pyfuse3.ModeT(attributes.mode)
        entry.st_nlink = attributes.nlink
        entry.st_uid = attributes.uid
        entry.st_gid = attributes.gid
        entry.st_rdev = attributes.rdev
        entry.st_size = attributes.size
        entry.st_blksize = attributes.block_bytes
        entry.st_blocks = attributes.blocks
        entry.st_atime_ns = attributes.atime_ns
        entry.st_mtime_ns = attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        return entry

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        return self._entry(await self._filesystem.lookup(parent_inode, name))

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        return self._entry(await self._filesystem.getattr(inode))

    @_answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """READLINK."""
        return await self._filesystem.readlink(inode, ctx.pid)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """FORGET, single or in a batch."""
        for inode, lookups in inode_list:
            self._filesystem.forget(inode, lookups)

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """OPEN; the channel makes the handle."""
        opened = await self._filesystem.open(inode, flags, ctx.pid)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(0), keep_cache=opened.keep_cache, direct_io=opened.direct)

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS; `fh` is the inode number, which the channel put there."""
        for entry in await self._filesystem.readdir(fh, start_id):
            if not pyfuse3.readdir_reply(token, entry.name, self._entry(entry.attributes), entry.cookie):
                return
            self._filesystem.listed(entry)

    @_answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """STATFS."""
        source = await self._filesystem.statfs()
        reply = pyfuse3.StatvfsData()
        for field in _STATVFS:
            setattr(reply, field, getattr(source, field))
        reply.f_namemax = source.f_namemax
        return reply

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """GETXATTR."""
        return await self._filesystem.getxattr(inode, name)

    @_answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """LISTXATTR, without what is for root alone: the kernel guards values by their names, and lists to everyone.

        Who asks is not known where mounts can be idmapped (the kernel then sends no owner along).
        """
        return [name for name in await self._filesystem.listxattr(inode) if not name.startswith(_FOR_ROOT)]

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Never asked: the kernel checks modes itself (`default_permissions`)."""
        await trio.lowlevel.checkpoint()
        return True
