"""Indexing behind the serving mount: a process crawls the source, and what it finds is recorded here.

Each start goes over the whole source, and so does each day after; what the index knows already costs a listing and a
look-up. So a crawl that was killed simply goes on at the next one. After a complete crawl, rows of files that are gone
are dropped. `crawl.py` says why it is a process, and what the two tell each other.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

import msgspec
import trio

from weightfs.crawl import Dead, Done, Found, FromCrawl, Listed, Next, NextPage, Page, Read, Start, Wanted, Wire
from weightfs.errors import IndexStoreError
from weightfs.handles import HandleTable
from weightfs.index.store import IndexStore
from weightfs.index.upkeep import Upkeep
from weightfs.source.local import LocalSource

log = logging.getLogger(__name__)

AGAIN_S: Final = 24 * 3600.0
"""From the end of a crawl to the next. Only dropping waits for it: files are found when they are asked for."""
_RETRY_S: Final = 60.0
_TRIES: Final = 3
_END_S: Final = 1.0
_GIVE_WAY_S: Final = 0.005
"""How long to leave the interpreter and the index alone after a message, when requests came in meanwhile."""


class Progress(msgspec.Struct):
    """How far a crawl is, for `status`.

    Attributes:
        folders, files: listed so far; `files` are weight files.
        headers: parsed and recorded, because the index did not have them.
        dropped: rows of the index whose file is gone.
        failed: folders that could not be listed and files that could not be read.
        young: files left out because they are still being written.
        done: whether the crawl has ended; `failure` says why, if not well.
        seconds: it took, or has taken so far.
        crawls: how many have ended well since the mount.
    """

    folders: int = 0
    files: int = 0
    headers: int = 0
    dropped: int = 0
    failed: int = 0
    young: int = 0
    done: bool = False
    failure: str | None = None
    seconds: float = 0.0
    crawls: int = 0


class Names(Protocol):
    """Who remembers numbers in memory; called on the trio thread."""

    def drop(self, inodes: Iterable[int]) -> None:
        """The index has just dropped these numbers."""

    def shed(self) -> None:
        """Forget what the index knows and nobody holds."""


class Indexer:
    """Keeps an index complete and small.

    Args:
        source: a folder of this machine, which the crawl inherits.
        index: what is found is recorded there.
        handles: inodes in it stay in the index.
        names: told what was dropped.
        activity: a number that grows as requests are served: indexing gives way to them.
    """

    def __init__(
        self,
        source: LocalSource,
        index: IndexStore,
        handles: HandleTable,
        names: Names,
        activity: Callable[[], int] = lambda: 0,
    ) -> None:
        self._source = source
        self._upkeep = Upkeep(index, source.lstat(b"").inode_key)
        self._handles = handles
        self._names = names
        self._activity = activity
        self._last_activity = 0
        self._wanted = trio.Event()
        self._progress = Progress()
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._idle = threading.Event()
        self._idle.set()

    def status(self) -> dict[str, Any]:
        """Progress of the crawl that runs, or of the last one. Callable from any thread."""
        progress = msgspec.structs.asdict(self._progress)
        if not progress["done"]:
            progress["seconds"] = round(time.monotonic() - self._started, 3) if self._started else 0.0
        return progress

    def again(self) -> None:
        """Crawl once more, at once or after the crawl that runs. On the trio thread."""
        self._wanted.set()

    async def run(self) -> None:
        """Crawl now and then until cancelled; by the time this has ended, nothing of it uses the index any more."""
        tries = 0
        try:
            while True:
                self._wanted = trio.Event()
                await trio.to_thread.run_sync(self.crawl, trio.from_thread.run_sync, abandon_on_cancel=True)
                tries = 0 if self._progress.failure is None else tries + 1
                with trio.move_on_after(_RETRY_S if 0 < tries < _TRIES else AGAIN_S):
                    await self._wanted.wait()
        finally:
            self.stop()
            # The thread ends with its process, but for one that waits for a disk that does not answer, and which will
            # not use the index either: it finds that it was stopped.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._idle.wait, _END_S)

    def stop(self) -> None:
        """End the crawl that runs, and let none begin. Thread-safe."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()

    def crawl(self, on_loop: Callable[..., Any] = lambda function, *arguments: function(*arguments)) -> None:
        """Go over the source once; how it went is in `status`. Whatever goes wrong, serving goes on.

        Blocks, in a thread; `on_loop(function, ...)` calls on the thread where the filesystem runs.
        """
        with self._lock:
            if self._ended:
                return
            self._progress = progress = Progress(crawls=self._progress.crawls)
            self._started = time.monotonic()
        try:
            with self._crawling() as wire:
                progress.failure = self._converse(wire, on_loop)
        except EOFError:
            progress.failure = "the crawl ended before it was done"
        except (OSError, IndexStoreError) as e:
            progress.failure = str(e)
        except Exception as e:
            log.debug("indexing", exc_info=True)
            progress.failure = repr(e)
        progress.seconds = round(time.monotonic() - self._started, 3)
        progress.crawls += progress.failure is None
        progress.done = True
        if progress.failure is not None and not self._ended:
            log.warning("indexing stopped: %s", progress.failure)
        else:
            log.info("indexed: %s", progress)

    @contextlib.contextmanager
    def _crawling(self) -> Iterator[Wire]:
        """A crawl's process, and the pipes to it; ended with the block."""
        root = self._source.descriptor
        with self._lock:
            if self._ended:
                raise EOFError
            process = subprocess.Popen(
                [sys.executable, "-m", "weightfs.crawl", str(root), self._source.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[root],
                cwd="/",
                start_new_session=True,
            )
            self._process = process
            self._idle.clear()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Wire(process.stdout, process.stdin, FromCrawl)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            with self._lock:
                self._process = None
            self._idle.set()

    def _converse(self, wire: Wire, on_loop: Callable[..., Any]) -> str | None:
        """Answer a crawl until it is done; gives why it gave up, or None."""
        wire.send(Start(prune=True))
        progress = self._progress
        while True:
            message = wire.receive()
            self._give_way()
            if self._ended:
                raise EOFError
            if isinstance(message, Listed):
                progress.folders += message.folders
                progress.files += message.files
                wire.send(Wanted(self._upkeep.unknown(message.slots)))
            elif isinstance(message, Found):
                self._upkeep.add_files(message.files)
                progress.headers += len(message.files)
            elif isinstance(message, NextPage):
                wire.send(Page(*self._upkeep.page(message.after)))
            elif isinstance(message, Dead):
                progress.dropped += on_loop(self._drop, message.rows)
                wire.send(Next())
            elif isinstance(message, Read):
                progress.failed, progress.young = message.failed, message.young
            else:
                assert isinstance(message, Done)
                on_loop(self._names.shed)
                return message.failure

    def _give_way(self) -> None:
        served = self._activity()
        if served != self._last_activity:
            self._last_activity = served
            time.sleep(_GIVE_WAY_S)

    def _drop(self, rows: list[bytes]) -> int:
        """No await, on the trio thread: whoever opens one of these files does so before or after."""
        count, numbers = self._upkeep.drop(rows, self._upkeep.with_folders(self._handles))
        self._names.drop(numbers)
        return count
