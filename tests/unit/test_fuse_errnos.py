"""One errno for every error, and nothing but FUSEError out of a handler."""

from __future__ import annotations

import errno
import logging
import os
import types
from collections.abc import Iterator
from typing import Any, cast

import pyfuse3
import pytest
import trio

import weightfs.index.store  # noqa: F401 - its errors count too
from weightfs import errors, fuse
from weightfs.entries import Attributes, DirectoryEntry, Opened
from weightfs.filesystem import Filesystem
from weightfs.fuse import ERRNOS, FuseOperations, errno_of


def tree(kind: type[errors.WeightfsError]) -> Iterator[type[errors.WeightfsError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


EVERY = sorted(
    # Those of snapshots are never met by a call of the filesystem.
    {kind for kind in tree(errors.WeightfsError) if not kind.__module__.startswith("checkpoint.")},
    key=lambda kind: kind.__name__,
)


def example(kind: type[errors.WeightfsError]) -> errors.WeightfsError:
    if issubclass(kind, errors.FormatError):
        return kind("reason", "message", offset=0)
    return kind("message")


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_has_an_errno(kind: type[errors.WeightfsError]) -> None:
    if kind.__module__ == errors.__name__:
        assert kind in ERRNOS, "the table is for all of the tree in errors.py"
    number = errno_of(example(kind))
    assert number in errno.errorcode
    assert number == next(ERRNOS[parent] for parent in kind.__mro__ if parent in ERRNOS)


def test_the_table_holds_nothing_else() -> None:
    assert set(ERRNOS) == {kind for kind in EVERY if kind.__module__ == errors.__name__}


def test_the_table_is_what_the_tree_in_errors_says() -> None:
    named = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if words and words[0].endswith("Error"):
            number = next((word for word in words[1:] if word in errno.errorcode.values()), None)
            if number is not None:
                named[words[0]] = getattr(errno, number)
    assert len(named) > 10
    assert {name: ERRNOS[getattr(errors, name)] for name in named} == named


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.EACCES, errno.EREMOTEIO])
def test_the_sources_errno_is_passed_on(number: int) -> None:
    assert errno_of(OSError(number, os.strerror(number))) == number


@pytest.mark.parametrize("error", [ValueError("x"), OSError(), OSError("no number"), KeyError("k"), MemoryError()])
def test_what_nobody_expected_is_eio(error: Exception) -> None:
    assert errno_of(error) == errno.EIO


def test_what_nobody_expected_is_logged_and_a_missing_file_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        errno_of(errors.NotFoundError("no"))
        errno_of(FileNotFoundError(2, "no"))
        assert not caplog.records
        errno_of(ValueError("a bug"))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


# The guard

ATTRIBUTES = Attributes(
    inode=7, mode=0o100444, nlink=1, uid=1, gid=2, rdev=0, size=5, blocks=8, block_bytes=4096,
    atime_ns=1, mtime_ns=2, ctime_ns=3,
)  # fmt: skip


class Fake:
    """A filesystem that answers, fails or waits."""

    def __init__(self, error: BaseException | None = None, *, waits: bool = False) -> None:
        self.error = error
        self.waits = waits
        self.forgotten: list[tuple[int, int]] = []
        self.taken: list[bytes] = []
        self.keep = False

    async def _answer(self, answer: Any) -> Any:
        if self.waits:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error
        return answer

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        return cast(Attributes, await self._answer(ATTRIBUTES))

    async def getattr(self, inode: int) -> Attributes:
        return cast(Attributes, await self._answer(ATTRIBUTES))

    async def readlink(self, inode: int, thread: int) -> bytes:
        return cast(bytes, await self._answer(b"target"))

    async def open(self, inode: int, flags: int, thread: int) -> Opened:
        return cast(Opened, await self._answer(Opened(keep_cache=self.keep, direct=not self.keep)))

    async def readdir(self, inode: int, after: int) -> list[DirectoryEntry]:
        return cast(
            list[DirectoryEntry], await self._answer([DirectoryEntry(b"%d" % n, ATTRIBUTES, n) for n in (1, 2, 3)])
        )

    async def statfs(self) -> os.statvfs_result:
        return cast(os.statvfs_result, await self._answer(os.statvfs("/")))

    async def getxattr(self, inode: int, name: bytes) -> bytes:
        return cast(bytes, await self._answer(b"value"))

    async def listxattr(self, inode: int) -> list[bytes]:
        return cast(list[bytes], await self._answer([b"user.x", b"trusted.x"]))

    def forget(self, inode: int, lookups: int) -> None:
        self.forgotten.append((inode, lookups))

    def listed(self, entry: DirectoryEntry) -> None:
        self.taken.append(entry.name)


CONTEXT = cast(pyfuse3.RequestContext, types.SimpleNamespace(pid=1))
HANDLERS: dict[str, tuple[Any, ...]] = {
    "lookup": (1, b"name", CONTEXT),
    "getattr": (7, CONTEXT),
    "readlink": (7, CONTEXT),
    "open": (7, os.O_RDONLY, CONTEXT),
    "readdir": (7, 0, None),
    "statfs": (CONTEXT,),
    "getxattr": (7, b"user.x", CONTEXT),
    "listxattr": (7, CONTEXT),
}


def operations(fake: Fake) -> FuseOperations:
    made = FuseOperations(timeout_s=2.5)
    made.attach(cast(Filesystem, fake))
    return made


def call(fake: Fake, name: str) -> Any:
    async def main() -> Any:
        return await getattr(operations(fake), name)(*HANDLERS[name])

    return trio.run(main)


def test_every_handler_that_can_fail_is_tried_here() -> None:
    own = {name for name, value in vars(FuseOperations).items() if callable(value) and not name.startswith("_")}
    assert own == {*HANDLERS, "forget", "access", "attach"}


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.StaleError("x"), errno.ESTALE),
        (FileNotFoundError(2, "x"), errno.ENOENT),
        (ZeroDivisionError("a bug"), errno.EIO),
        (ExceptionGroup("two", [ValueError(), OSError(2, "x")]), errno.EIO),
        (pyfuse3.FUSEError(errno.EXDEV), errno.EXDEV),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_everything_becomes_a_fuse_error(name: str, error: Exception, number: int) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        call(Fake(error), name)
    assert caught.value.errno == number


@pytest.mark.parametrize("name", HANDLERS)
def test_cancelled_passes(name: str) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await getattr(operations(Fake(waits=True)), name)(*HANDLERS[name])
            raise AssertionError("it was swallowed")
        assert scope.cancelled_caught

    trio.run(main)


def test_attributes_are_passed_whole() -> None:
    entry = call(Fake(), "getattr")
    assert (entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid) == (7, 0o100444, 1, 1, 2)
    assert (entry.st_size, entry.st_blocks, entry.st_blksize) == (5, 8, 4096)
    assert (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns) == (1, 2, 3)
    assert entry.attr_timeout == entry.entry_timeout == 2.5
    assert call(Fake(), "lookup").st_ino == 7


@pytest.mark.parametrize("keep", [True, False])
def test_opens_are_passed_whole(keep: bool) -> None:
    fake = Fake()
    fake.keep = keep
    info = call(fake, "open")
    assert (info.keep_cache, info.direct_io) == (keep, not keep)


def test_the_rest_is_passed_whole() -> None:
    assert call(Fake(), "readlink") == b"target"
    assert call(Fake(), "getxattr") == b"value"
    assert call(Fake(), "listxattr") == [b"user.x"]
    said, real = call(Fake(), "statfs"), os.statvfs("/")
    assert (said.f_blocks, said.f_frsize, said.f_namemax) == (real.f_blocks, real.f_frsize, real.f_namemax)


@pytest.mark.parametrize("room", [0, 2, 3])
def test_a_listing_ends_where_the_kernel_has_no_more_room(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[tuple[bytes, int]] = []

    def reply(_: object, name: bytes, entry: object, cookie: int) -> bool:
        offered.append((name, cookie))
        return len(offered) <= room

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    fake = Fake()
    call(fake, "readdir")
    assert fake.taken == [b"1", b"2", b"3"][:room], "only what it took counts as a look-up"
    assert offered == [(b"%d" % n, n) for n in (1, 2, 3)][: room + 1]


def test_forget_and_access() -> None:
    fake = Fake()

    async def main() -> None:
        await operations(fake).forget([(7, 1), (8, 3)])
        assert await operations(fake).access(7, 4, CONTEXT)

    trio.run(main)
    assert fake.forgotten == [(7, 1), (8, 3)]


def test_what_the_kernel_is_told_to_do_itself() -> None:
    assert not FuseOperations.supports_dot_lookup
    assert not FuseOperations.enable_writeback_cache
    assert FuseOperations.enable_acl
    assert fuse.FuseOperations.__mro__[1] is pyfuse3.Operations
