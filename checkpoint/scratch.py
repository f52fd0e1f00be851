"""A folder in memory for CRIU's images: seen by nobody else, never swapped where that matters, gone with its users.

It is a tmpfs that is mounted nowhere: CRIU inherits a descriptor of it, and finds it through a symlink to
`/proc/self/fd/N`. So there is nothing to unmount: when the last process that has it open ends, however it ends, the
kernel frees it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final, Self

from checkpoint.errors import CheckpointError, MisfitError

_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
"""The same on every architecture (Linux 5.2)."""
_CLOEXEC: Final = 1
_SET_FLAG: Final = 0
_SET_STRING: Final = 1
_CREATE: Final = 6
_NOSUID_NODEV_NOEXEC: Final = 0x2 | 0x4 | 0x8
_SWAPS: Final = "/proc/swaps"
_syscall: Final = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class Scratch:
    """The folder, as a context manager; closed it is gone, unless a child still has it open.

    Args:
        link: a path that does not exist; a symlink to the folder, for this process and those that inherit `fd`.
        nbytes: it holds at most.
        must_not_swap: what is in it must never reach a disk.

    Attributes:
        path: `link`.
        fd: what children must inherit.

    Raises:
        MisfitError: this kernel can't promise that it is not swapped, or gives us no such folder.
        CheckpointError: the link can't be made.
    """

    def __init__(self, link: str, *, nbytes: int, must_not_swap: bool) -> None:
        self.path: Final = link
        self.fd = _mounted(nbytes, must_not_swap=must_not_swap)
        try:
            os.symlink(f"/proc/self/fd/{self.fd}", link)
        except OSError as e:
            self.close()
            raise CheckpointError(f"can't be made: {os.strerror(e.errno or 0)}", path=link) from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. Harmless when called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _mounted(nbytes: int, *, must_not_swap: bool) -> int:
    """A descriptor of a new tmpfs, mode 0700."""
    try:
        context = _call(_FSOPEN, b"tmpfs", ctypes.c_long(_CLOEXEC))
    except OSError as e:
        raise _refused(e) from e
    try:
        for key, value in ((b"size", str(nbytes).encode()), (b"mode", b"0700")):
            _call(_FSCONFIG, ctypes.c_long(context), ctypes.c_long(_SET_STRING), key, value, ctypes.c_long(0))
        try:
            _call(_FSCONFIG, ctypes.c_long(context), ctypes.c_long(_SET_FLAG), b"noswap", None, ctypes.c_long(0))
        except OSError as e:
            if must_not_swap and (e.errno != errno.EINVAL or has_swap()):
                raise MisfitError(
                    "what is to be encrypted could be swapped to a disk: this kernel has no tmpfs that can't be"
                    f" ({os.strerror(e.errno or 0)})",
                    mend="use Linux 6.4 or later, or turn swap off (swapoff -a), or use --no-encrypt",
                ) from e
        _call(_FSCONFIG, ctypes.c_long(context), ctypes.c_long(_CREATE), None, None, ctypes.c_long(0))
        flags = ctypes.c_long(_CLOEXEC), ctypes.c_long(_NOSUID_NODEV_NOEXEC)
        mounted = _call(_FSMOUNT, ctypes.c_long(context), *flags)
    except OSError as e:
        raise _refused(e) from e
    finally:
        os.close(context)
    try:  # that one is O_PATH
        return os.open(f"/proc/self/fd/{mounted}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(mounted)


def has_swap(path: str = _SWAPS) -> bool:
    """Whether memory may be swapped to something; where that can't be told, it may."""
    try:
        with open(path) as file:
            return len(file.read().splitlines()) > 1
    except OSError:
        return True


def _call(number: int, *arguments: object) -> int:
    done: int = _syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done


def _refused(error: OSError) -> MisfitError:
    return MisfitError(
        f"CRIU's images need a folder in memory, and the kernel gives none: {os.strerror(error.errno or 0)}",
        mend="use --plain",
    )
