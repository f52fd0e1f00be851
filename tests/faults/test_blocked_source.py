"""The filesystem and its adapter without FUSE: a source that stalls, fails or does what nobody expected."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pyfuse3
import pytest
import trio

from tests.helpers.models import every_dtype, write, write_safetensors
from weightfs import errors
from weightfs.errors import DeadlineError, ReadOnlyError, ShortReadError, StaleError, WeightfsError
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.fuse import ERRNOS, FuseOperations, errno_of
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore
from weightfs.source.base import WouldBlockError
from weightfs.source.local import LocalSource

DEADLINE_S = 1.0
"""Also of requests that nothing holds up, on a machine that others use, too."""


class TroubledSource(LocalSource):
    """A folder that, once `trouble` is set, calls it instead of answering; never answers without waiting."""

    trouble: Callable[[], object] | None = None

    def fail(self) -> None:
        if self.trouble is not None:
            self.trouble()

    def lstat(self, path: bytes, *, cached_only: bool = False) -> Any:
        if cached_only:
            raise WouldBlockError
        self.fail()
        return super().lstat(path)

    def entries(self, path: bytes) -> Any:
        self.fail()
        return super().entries(path)

    def open(self, path: bytes, *, cached_only: bool = False) -> Any:
        if cached_only:
            raise WouldBlockError
        self.fail()
        return super().open(path)

    def readlink(self, path: bytes) -> bytes:
        self.fail()
        return super().readlink(path)

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        self.fail()
        return super().getxattr(path, name)

    def listxattr(self, path: bytes) -> Any:
        self.fail()
        return super().listxattr(path)

    def statvfs(self) -> os.statvfs_result:
        self.fail()
        return super().statvfs()


class Rig:
    """A filesystem over a troubled source, and the numbers of what lies in it."""

    def __init__(self, source: TroubledSource, filesystem: Filesystem, handles: HandleTable) -> None:
        self.source = source
        self.filesystem = filesystem
        self.handles = handles
        self.operations = FuseOperations(timeout_s=1)
        self.operations.attach(filesystem)
        self.numbers: dict[str, int] = {}

    async def look_up_all(self) -> None:
        for name in ("file", "link", "folder", ".tensors"):
            self.numbers[name] = (await self.filesystem.lookup(ROOT_INODE, name.encode())).inode
        views = await self.filesystem.lookup(self.numbers[".tensors"], b"model")
        self.numbers["views"] = views.inode
        self.numbers["tensor"] = (await self.filesystem.lookup(views.inode, b"t.F32")).inode

    def calls(self) -> dict[str, Callable[[], Awaitable[Any]]]:
        """Requests as pyfuse3 makes them, each of which needs the source."""
        numbers, ask, context = self.numbers, self.operations, pyfuse3.RequestContext()
        return {
            "lookup": lambda: ask.lookup(ROOT_INODE, b"file", context),
            "lookup of a view": lambda: ask.lookup(numbers["views"], b"t.F32", context),
            "getattr": lambda: ask.getattr(numbers["file"], context),
            "getattr of a view": lambda: ask.getattr(numbers["tensor"], context),
            "readlink": lambda: ask.readlink(numbers["link"], context),
            "open": lambda: ask.open(numbers["file"], os.O_RDONLY, context),
            "open of a view": lambda: ask.open(numbers["tensor"], os.O_RDONLY, context),
            "statfs": lambda: ask.statfs(context),
            "getxattr": lambda: ask.getxattr(numbers["file"], b"user.x", context),
            "listxattr": lambda: ask.listxattr(numbers["file"], context),
        }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TroubledSource, IndexStore]]:
    root = str(tmp_path_factory.mktemp("source"))
    write(f"{root}/file", b"content")
    os.mkdir(f"{root}/folder")
    os.symlink("file", f"{root}/link")
    write_safetensors(f"{root}/model.safetensors", every_dtype())
    index = IndexStore(str(tmp_path_factory.mktemp("state")), root)
    source = TroubledSource(root)
    yield source, index
    index.close()
    source.close()


@pytest.fixture
def rig(parts: tuple[TroubledSource, IndexStore]) -> Iterator[Rig]:
    source, index = parts
    handles = HandleTable()
    texts: dict[bytes, Callable[[], bytes]] = {b"status.json": lambda: b"{}"}
    filesystem = Filesystem(source, index, handles, texts, FilesystemConfig(deadline_s=DEADLINE_S, threads=4))
    yield Rig(source, filesystem, handles)
    source.trouble = None
    handles.close()


CALLS = [
    "lookup", "lookup of a view", "getattr", "getattr of a view", "readlink", "open", "open of a view", "statfs",
    "getxattr", "listxattr",
]  # fmt: skip


def answer(rig: Rig, call: str, trouble: Callable[[], object]) -> BaseException | None:
    """What leaves the adapter for one request, in trouble."""

    async def main() -> BaseException | None:
        await rig.look_up_all()
        rig.source.trouble = trouble
        with trio.fail_after(20):
            try:
                await rig.calls()[call]()
            except Exception as e:  # noqa: BLE001 - which one is the question
                return e
        return None

    return trio.run(main)


def raising(error: BaseException) -> Callable[[], object]:
    def trouble() -> object:
        raise error

    return trouble


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EIO, "the disk"), errno.EIO),
        (OSError(errno.ENOSPC, "odd"), errno.ENOSPC),
        (PermissionError(errno.EACCES, "not yours"), errno.EACCES),
        (OSError("no number at all"), errno.EIO),
        (StaleError("gone"), errno.ESTALE),
        (ShortReadError("short"), errno.EIO),
        (ValueError("a bug"), errno.EIO),
        (RecursionError("another"), errno.EIO),
        (MemoryError(), errno.EIO),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "names"), errno.EIO),
        (StopIteration(), errno.EIO),
        (AssertionError("that one too"), errno.EIO),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else errno.errorcode[value],
)
def test_only_fuse_errors_leave_a_handler(rig: Rig, call: str, error: Exception, number: int) -> None:
    left = answer(rig, call, raising(error))
    assert isinstance(left, pyfuse3.FUSEError), repr(left)
    assert left.errno == number


@pytest.mark.parametrize("call", CALLS)
def test_stalled_source_answers_at_the_deadline(rig: Rig, call: str) -> None:
    """EIO at the deadline; the thread that waits is left behind, the next request is served when the source is back."""
    go = threading.Event()
    try:
        left = answer(rig, call, lambda: go.wait(30))
    finally:
        go.set()
    assert isinstance(left, pyfuse3.FUSEError)
    assert left.errno == errno.EIO
    rig.source.trouble = None

    async def again() -> None:
        with trio.fail_after(20):
            await rig.calls()[call]()

    if "xattr" not in call:
        trio.run(again)


def test_more_stalled_calls_than_threads(rig: Rig) -> None:
    """Those that never got a thread fail at their deadline as well, and none of the stalled ones stays counted."""
    go = threading.Event()

    async def main() -> list[int]:
        await rig.look_up_all()
        rig.source.trouble = lambda: go.wait(30)
        failed: list[int] = []

        async def one() -> None:
            with pytest.raises(DeadlineError):
                await rig.filesystem.getattr(rig.numbers["file"])
            failed.append(1)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
        assert trio.current_time() - started < 10
        go.set()
        rig.source.trouble = None
        with trio.fail_after(20):
            assert (await rig.filesystem.getattr(rig.numbers["file"])).size == 7
        return failed

    try:
        assert len(trio.run(main)) == 20
    finally:
        go.set()


def test_cancelled_stays_cancelled(rig: Rig) -> None:
    """The guard never swallows trio's own."""
    go = threading.Event()

    async def main() -> bool:
        await rig.look_up_all()
        rig.source.trouble = lambda: go.wait(30)
        with trio.move_on_after(0.05) as scope:
            await rig.calls()["getattr"]()
        return scope.cancelled_caught

    try:
        assert trio.run(main)
    finally:
        go.set()


def subclasses(kind: type[WeightfsError]) -> Iterator[type[WeightfsError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


def test_every_error_has_its_errno() -> None:
    """Those of `weightfs.errors` have a row each; those of other modules have their parent's."""
    for kind in subclasses(WeightfsError):
        error = kind.__new__(kind)
        Exception.__init__(error, "x")
        error.message, error.path, error.mend = "x", None, None
        if isinstance(error, errors.FormatError):
            error.reason, error.offset = "reason", 0
        number = errno_of(error)
        assert number in errno.errorcode
        if kind.__module__ == "weightfs.errors":
            assert kind in ERRNOS
            assert number == ERRNOS[kind]


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
def test_open_for_writing(rig: Rig, flags: int) -> None:
    async def main() -> None:
        await rig.look_up_all()
        for name in ("file", "tensor"):
            with pytest.raises(ReadOnlyError):
                await rig.filesystem.open(rig.numbers[name], flags)

    trio.run(main)
    assert len(rig.handles) == 0


def test_numbers_nobody_gave_out(rig: Rig) -> None:
    """A nodeid of another epoch, or none, is stale: never another file."""

    async def main() -> None:
        await rig.look_up_all()
        known = rig.numbers["file"]
        for number in (0, 2, known + (1 << 32), known - (1 << 32), known ^ (1 << 62), (1 << 64) - 1, known + 60_000):
            with pytest.raises(StaleError):
                await rig.filesystem.getattr(number)
            with pytest.raises(StaleError):
                await rig.filesystem.open(number, os.O_RDONLY)

    trio.run(main)
    assert len(rig.handles) == 0
