"""Tensors that a framework joined from several of a file: which parts of them are which.

vLLM joins query, key and value, and gate and up; transformers stacks experts. Joined along the outermost dimension the
parts keep their bytes, so the first bytes of each tell where it lies, whatever it is called; the proof is for others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from weightfs.torch.origins import Origin

if TYPE_CHECKING:
    import torch

LEAST_BYTES: Final = 64 << 10
"""What is smaller is not looked for: the host keeps it at little cost."""
_HEAD_BYTES: Final = 64
_LEAST_STEP: Final = 1024


def parts_of(tensors: Sequence[torch.Tensor], origins: Sequence[Origin]) -> list[list[tuple[int, Origin]]]:
    """For each tensor where in it tensors of files may lie: by their offset, in order, without overlaps.

    Args:
        tensors: as bytes.
        origins: those of which it is not known where they went.

    Raises:
        OSError: a file can't be read.
    """
    wanted = [one for one in origins if one.nbytes >= LEAST_BYTES]
    step = math.gcd(*(one.nbytes for one in wanted))
    if step < _LEAST_STEP:
        return [[] for _ in tensors]
    heads: dict[bytes, list[Origin]] = {}
    for origin, head in zip(wanted, _heads(wanted), strict=True):
        heads.setdefault(head, []).append(origin)
    return [_parts(tensor, step, heads) for tensor in tensors]


def _parts(tensor: torch.Tensor, step: int, heads: dict[bytes, list[Origin]]) -> list[tuple[int, Origin]]:
    whole = tensor.numel() // step * step
    here = tensor[:whole].view(-1, step)[:, :_HEAD_BYTES].cpu().numpy()
    found: list[tuple[int, Origin]] = []
    at = 0
    while at < whole:
        left = tensor.numel() - at
        fitting = [one for one in heads.get(here[at // step].tobytes(), ()) if one.nbytes <= left]
        if fitting:
            found.append((at, fitting[0]))
        at += fitting[0].nbytes if fitting else step
    return found


def _heads(origins: Sequence[Origin]) -> list[bytes]:
    heads = []
    fds: dict[str, int] = {}
    try:
        for origin in origins:
            if origin.path not in fds:
                fds[origin.path] = os.open(origin.path, os.O_RDONLY | os.O_CLOEXEC)
            heads.append(os.pread(fds[origin.path], _HEAD_BYTES, origin.offset))
    finally:
        for fd in fds.values():
            os.close(fd)
    return heads
