"""The jobs of one copy, handed to its threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from prefetch.errors import CopyCancelledError
from prefetch.pieces import Job


class Feed:
    """Jobs in order, from any thread; the first error ends it for all of them.

    Args:
        jobs: what to hand out.
        cancelled: asked before each job, in any of the threads, one at a time; must not block.
    """

    def __init__(self, jobs: Sequence[Job], cancelled: Callable[[], bool] | None) -> None:
        self._jobs = iter(jobs)
        self._cancelled = cancelled
        self._turn = threading.Lock()
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[Job]:
        while (job := self._next()) is not None:
            yield job

    def fail(self, error: BaseException) -> None:
        """Hand out nothing more. The first error is the one that whoever asked for the copy sees."""
        with self._turn:
            self.error = self.error or error

    def _next(self) -> Job | None:
        with self._turn:
            if self.error is not None:
                return None
            if self._cancelled is not None and self._cancelled():
                self.error = CopyCancelledError("the copy was called off")
                return None
            return next(self._jobs, None)


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
