"""Restored processes of which no thread runs but the one that carries out what the CUDA driver is asked.

So CUDA can be restored while memory is still filled in, and nothing of the process itself runs before all of it is
there. CRIU's own CUDA plugin does the same: threads are traced, and one of them is let go on. `PTRACE_O_EXITKILL` has
the kernel kill all of them if this process dies: then nobody fills in what is missing, and it would read as zeros.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from checkpoint.errors import CheckpointError

_CONT: Final = 7
_DETACH: Final = 17
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_GETSIGMASK: Final = 0x420A
_SETSIGMASK: Final = 0x420B
_EXITKILL: Final = 1 << 20
_EVENT_STOP: Final = 128
_WALL: Final = 0x40000000
_SIGSET_BYTES: Final = 8
_STOP_S: Final = 10.0
_NOTICE_S: Final = 0.5
_LOOK_S: Final = 0.0005

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class Holding:
    """Threads that are held, as a context manager; for one thread of this process, which is their tracer.

    Left by an exception, all processes are killed. Otherwise they are let go by `let_go`, which has to come first.

    Args:
        pids: of processes that are stopped (SIGSTOP), every thread of them.
        runners: by pid, the thread that runs within `run`.

    Raises:
        CheckpointError: they can't be traced. All are stopped as they were.
    """

    def __init__(self, pids: Sequence[int], runners: Mapping[int, int]) -> None:
        self._pids = tuple(pids)
        self._runners = dict(runners)
        self._threads: list[int] = []
        self._masks: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        try:
            for pid in self._pids:
                for name in os.listdir(f"/proc/{pid}/task"):
                    _ptrace(_SEIZE, int(name), 0, _EXITKILL)
                    self._threads.append(int(name))
            for thread in self._threads:
                _wait_for_stop(thread, _STOP_S)
        except OSError as e:
            self.let_go()
            raise CheckpointError(f"threads can't be traced: {os.strerror(e.errno or 0)}") from e
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self.kill()

    def begin(self) -> None:
        """Have the runners run, whatever signals come.

        Raises:
            CheckpointError: one has ended.
        """
        try:
            for pid, thread in self._runners.items():
                mask = ctypes.create_string_buffer(_SIGSET_BYTES)
                _ptrace(_GETSIGMASK, thread, _SIGSET_BYTES, ctypes.addressof(mask))
                self._masks[thread] = mask.raw
                every = ctypes.create_string_buffer(b"\xff" * _SIGSET_BYTES, _SIGSET_BYTES)
                _ptrace(_SETSIGMASK, thread, _SIGSET_BYTES, ctypes.addressof(every))
                os.kill(pid, signal.SIGCONT)  # or threads that it starts would be stopped
                _ptrace(_CONT, thread)
                # Each that is traced is told of the SIGCONT by another stop, at once where it runs.
                with contextlib.suppress(TimeoutError):
                    _wait_for_stop(thread, _NOTICE_S)
                    _ptrace(_CONT, thread)
        except OSError as e:
            raise _ended(e) from e

    def finish(self) -> None:
        """Have the runners stop again, as they were.

        Raises:
            CheckpointError: one has ended, or does not stop.
        """
        try:
            for thread, mask in self._masks.items():
                _ptrace(_INTERRUPT, thread)
                _wait_for_stop(thread, _STOP_S)
                buffer = ctypes.create_string_buffer(mask, _SIGSET_BYTES)
                _ptrace(_SETSIGMASK, thread, _SIGSET_BYTES, ctypes.addressof(buffer))
            self._masks.clear()
        except OSError as e:
            raise _ended(e) from e

    def let_go(self) -> None:
        """Trace them no more. Those that had a runner run; others are stopped as they were."""
        ending = set()
        while self._threads:
            thread = self._threads.pop()
            try:
                _ptrace(_DETACH, thread)
            except OSError:  # a signal that came meanwhile ends the process as soon as one thread runs
                ending.add(thread)
        _wait_for_ends(ending)

    def kill(self) -> None:
        """Kill all of them, and let those know whose children they are."""
        if not self._threads:
            return
        for pid in self._pids:  # which nobody else has: they are not gone before we have waited
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait_for_ends(set(self._threads))
        self._threads.clear()


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _wait_for_stop(thread: int, timeout_s: float) -> None:
    """Until it is stopped for its tracer.

    Raises:
        TimeoutError: it is not.
        OSError: it has ended.
    """
    until = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(thread, _WALL | os.WNOHANG)
        if found and not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if found:
            return
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        time.sleep(_LOOK_S)


def _wait_for_ends(threads: set[int]) -> None:
    """A process whose thread has ended is not gone before its tracer has waited for that."""
    until = time.monotonic() + _STOP_S
    while threads and time.monotonic() < until:
        threads = {thread for thread in threads if not _has_ended(thread)}
        if threads:
            time.sleep(_LOOK_S)


def _has_ended(thread: int) -> bool:
    try:
        found, status = os.waitpid(thread, _WALL | os.WNOHANG)
    except ChildProcessError:
        return True
    return bool(found) and not os.WIFSTOPPED(status)


def _ended(error: OSError) -> CheckpointError:
    return CheckpointError(f"a thread that restores CUDA can't be traced any more: {os.strerror(error.errno or 0)}")
