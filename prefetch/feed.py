"""The jobs of one copy, handed to its threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from prefetch.errors import CopyCancelledError
from prefetch.pieces import PAGE_BYTES, Job, cut


class Feed:
    """Jobs in order, from any thread: whole ones to lanes of windows, cut to buffers to those of the ring.

    The first error ends it for all of them.

    Args:
        jobs: what to hand out, each of a window at most.
        buffer_bytes: what `buffers` hands out at most, a multiple of the page size.
        kept: so many of the last jobs are for `buffers` only. A window takes long before its copy begins: with the last
            ones all others would wait for it.
        cancelled: asked before each job, in any of the threads, several at a time; must not block.
    """

    def __init__(
        self,
        jobs: Iterable[Job] = (),
        *,
        buffer_bytes: int = PAGE_BYTES,
        kept: int = 0,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self._jobs = deque(jobs)
        self._cut: deque[Job] = deque()
        self._buffer_bytes = buffer_bytes
        self._kept = kept
        self._cancelled = cancelled
        self._turn = threading.Lock()
        self.error: BaseException | None = None

    def windows(self) -> Iterator[Job]:
        """Jobs as they are, for one of the threads."""
        while not self._ends():
            with self._turn:
                if len(self._jobs) <= self._kept:
                    return
                job = self._jobs.popleft()
            yield job

    def buffers(self) -> Iterator[Job]:
        """Jobs of a buffer each, for one of the threads."""
        # No lock for each of them: a dozen threads that wait for one give the GIL away and have to wait for that, too.
        while not self._ends():
            try:
                job = self._cut.popleft()
            except IndexError:
                if not self._cut_next():
                    return
                continue
            yield job

    def fail(self, error: BaseException) -> None:
        """Hand out nothing more. The first error is the one that whoever asked for the copy sees."""
        with self._turn:
            self.error = self.error or error

    def _cut_next(self) -> bool:
        """Cut one more job to buffers, if there is one."""
        with self._turn:
            if not self._cut and not self._jobs:
                return False
            if not self._cut:
                self._cut.extend(cut(self._jobs.popleft(), self._buffer_bytes))
            return True

    def _ends(self) -> bool:
        if self.error is None and self._cancelled is not None and self._cancelled():
            self.fail(CopyCancelledError("the copy was called off"))
        return self.error is not None


def together(work: Callable[[int], None], threads: int, feed: Feed) -> None:
    """Have threads work and wait for all of them, whatever comes; the first error goes to the feed.

    Ctrl-C ends the feed as an error does and is raised once no thread works any more: until then the GPU may read.

    Args:
        work: called in each of them with its number.
        threads: how many.
        feed: what `work` takes its jobs from.
    """

    def one(number: int) -> None:
        try:
            if feed.error is None:
                work(number)
        except BaseException as error:  # noqa: BLE001  handed on by the feed
            feed.fail(error)

    started: list[threading.Thread] = []
    interruption: BaseException | None = None
    try:
        for number in range(threads):
            thread = threading.Thread(target=one, args=(number,), name=f"staging-{number}", daemon=True)
            started.append(thread)
            thread.start()
    except BaseException as error:  # noqa: BLE001  raised below
        feed.fail(error)
        interruption = error
    while started:
        try:
            if started[-1].ident is not None:
                started[-1].join()
            started.pop()
        except BaseException as error:  # noqa: BLE001  raised below
            feed.fail(error)
            interruption = interruption or error
    if interruption is not None:
        raise interruption
