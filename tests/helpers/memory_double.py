"""A GPU for `weightfs.torch.released` that is this machine's memory: addresses are reserved, and have pages or not.

What has none can't be touched: a use of weights that are away ends the process, as it ends a CUDA context. It keeps
books, so that a test can tell what is mapped, reserved, and was copied.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from typing import Any, Final

import torch

from prefetch.staging import Piece
from weightfs.errors import ShortReadError, WeightfsError

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED: Final = 0x10
_PROT_NONE: Final = 0
GARBAGE: Final = 0xA5


class MemoryDouble:
    """See `arena.Memory`.

    Attributes:
        reserved: length by address.
        mapped: the same of what has memory.
        pieces: all that were copied.
        refusals: so many of the next maps find no room.
        captured: how many CUDA graphs there are.
        astray: the next copy leaves out the last byte.
        failing: the next copy fails.
    """

    granularity = 64 << 10

    def __init__(self) -> None:
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.pieces: list[Piece] = []
        self.refusals = 0
        self.captured = 0
        self.astray = False
        self.failing = False
        self.settled = 0

    def reserve(self, nbytes: int) -> int:
        address = self._mmap(0, nbytes, _PROT_NONE, 0)
        self.reserved[address] = nbytes
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        assert address not in self.mapped
        assert self.reserved.pop(address) == nbytes
        assert _LIBC.munmap(address, nbytes) == 0

    def map(self, address: int, nbytes: int) -> None:
        assert self.reserved[address] == nbytes
        assert address not in self.mapped
        if self.refusals:
            self.refusals -= 1
            raise WeightfsError("out of memory")
        self._mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, _MAP_FIXED)
        ctypes.memset(address, GARBAGE, nbytes)
        self.mapped[address] = nbytes

    def unmap(self, address: int, nbytes: int) -> None:
        assert self.mapped.pop(address) == nbytes
        self._mmap(address, nbytes, _PROT_NONE, _MAP_FIXED)

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        kind: Any = type("Range", (ctypes.c_ubyte * nbytes,), {})
        content = kind.from_address(address)
        content.owner = owner
        return torch.frombuffer(content, dtype=torch.uint8)

    def scratch(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def copy(self, pieces: Sequence[Piece]) -> None:
        if self.failing:
            self.failing = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for piece in pieces:
            self.pieces.append(piece)
            content = os.pread(piece.fd, piece.nbytes, piece.offset)
            if len(content) < piece.nbytes:
                raise ShortReadError(f"ends {piece.nbytes - len(content)} bytes early")
            if self.astray:
                content, self.astray = content[:-1], False
            ctypes.memmove(piece.address, content, len(content))

    def wait(self) -> None:
        pass

    def settle(self) -> int:
        self.settled += 1
        return 0

    def graphs(self) -> int:
        return self.captured

    @staticmethod
    def _mmap(address: int, nbytes: int, protection: int, flags: int) -> int:
        flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        got: int | None = _LIBC.mmap(address or None, nbytes, protection, flags, -1, 0)
        if got is None or got == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        return got
