"""The log file: bounded, and shared by processes that know nothing of each other.

Supervisor, daemon and standby append to one file. Each line is one write(2) with O_APPEND, so lines never mix. Whoever
finds it too long renames it, under a lock on the folder's lock file; the others see at their next line that the name
means another file, and open that one. A logrotate that renames or truncates the file does no harm either.

Standard error, where the interpreter itself writes, follows along with `LogFile(..., also=2)`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

FORMAT: Final = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
LONGEST_BYTES: Final = 10 << 20
KEPT: Final = 3
_LONGEST_LINE_BYTES: Final = 64 << 10
_KINDS: Final = 256


class LogFile(logging.Handler):
    """Appends to a file that it and others keep short. Thread-safe, and safe to share with other processes.

    Args:
        path: the log; older ones are `path.1` (the newest) to `path.N`.
        longest_bytes: it is put aside when it has grown to this. A line more may be in it for each process.
        kept: how many older ones are kept.
        also: descriptor that is to point to the current file too, such as 2.

    Raises:
        OSError: it can't be written.
    """

    def __init__(
        self, path: str, *, longest_bytes: int = LONGEST_BYTES, kept: int = KEPT, also: int | None = None
    ) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._path = path
        self._longest_bytes = longest_bytes
        self._kept = kept
        self._also = also
        self._fd = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line, or as one piece where it carries a traceback. Never raises."""
        try:
            line = self.format(record).encode("utf-8", "backslashreplace")[:_LONGEST_LINE_BYTES] + b"\n"
            self._stay_current()
            os.write(self._fd, line)
            if os.fstat(self._fd).st_size >= self._longest_bytes:
                self._put_aside()
        except Exception:  # noqa: BLE001 - a full disk must not end the mount; logging's own way to say so
            self.handleError(record)

    def close(self) -> None:
        """Close the file; `also` stays as it is."""
        with self.lock or contextlib.nullcontext():
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        super().close()

    def _open(self) -> int:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._also is not None:
            os.dup2(fd, self._also)
        return fd

    def _stay_current(self) -> None:
        """Open the file anew when its name means another one by now, or none."""
        if not self._is_current():
            before, self._fd = self._fd, self._open()
            os.close(before)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _put_aside(self) -> None:
        with self._alone():
            # Somebody else may have done it while we waited: then the name means a short file.
            if self._is_current():
                for number in range(self._kept, 0, -1):
                    newer = f"{self._path}.{number - 1}" if number > 1 else self._path
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(newer, f"{self._path}.{number}")
                if not self._kept:
                    os.unlink(self._path)
            self._stay_current()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time. The lock goes with its holder, however that ends."""
        fd = os.open(f"{self._path}.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


class Sparing(logging.Filter):
    """Lets through the first few of the same message within a while, then one line that says how many were left out.

    The same is what comes from one logging call, whatever its arguments: a request that fails a million times fills no
    disk. What is CRITICAL always passes.

    Args:
        burst: how many pass within `per_s` seconds of the first.
        per_s: then as many pass again.
    """

    def __init__(self, *, burst: int = 10, per_s: float = 60.0) -> None:
        super().__init__()
        self._burst = burst
        self._per_s = per_s
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes; the first after a while says what was left out before it."""
        if record.levelno >= logging.CRITICAL:
            return True
        kind = (record.name, str(record.msg))
        now = time.monotonic()
        with self._lock:
            began, count = self._seen.pop(kind, (now, 0))
            left_out = 0
            if now - began >= self._per_s:
                left_out = max(0, count - self._burst)
                began, count = now, 0
            self._seen[kind] = began, count + 1
            if len(self._seen) > _KINDS:
                self._seen.popitem(last=False)
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more like it in the {self._per_s:g} s before)"
            record.args = None
        return count < self._burst


def log_to(path: str | None, level: str) -> logging.Handler:
    """Let everything this process logs go to a file, and stderr with it, or only there (None); gives the handler.

    Raises:
        OSError: it can't be written.
    """
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
    else:
        handler = LogFile(path, also=2)
    handler.addFilter(Sparing())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler
