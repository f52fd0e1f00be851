"""How much of a file is in the page cache, as mincore(2) says."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def resident_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file that are resident, in whole pages."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, dtype=np.uint8)
        pages = -(-len(mapped) // mmap.PAGESIZE)
        answer = ctypes.create_string_buffer(pages)
        failed = _libc.mincore(array.ctypes.data, len(mapped), answer)
        del array
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(byte & 1 for byte in answer.raw) * mmap.PAGESIZE
