"""Tensors that a framework joined from several of a file, or cut: which parts of them are which.

vLLM joins query, key and value, and gate and up, and gives each GPU its part; transformers stacks experts. Joined and
cut along the outermost dimension, runs of bytes stay what they were. Files and tensors are looked at in steps, whose
length divides all of theirs, and the first bytes of a step tell where it is from, whatever it is called; the proof is
for others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from weightfs.torch.origins import Origin

if TYPE_CHECKING:
    import torch

LEAST_BYTES: Final = 64 << 10
"""What is smaller is not looked for: the host keeps it at little cost."""
_HEAD_BYTES: Final = 64
_LEAST_STEP: Final = 1024
_MOST_STEPS: Final = 1 << 18
"""Of files: as many reads of 64 bytes, which take some tenths of a second."""
_MOST_ALIKE: Final = 64
"""Steps that begin alike, as zeros do, and are tried."""


def parts_of(tensors: Sequence[torch.Tensor], origins: Sequence[Origin]) -> list[list[tuple[int, Origin]]]:
    """For each tensor where in it runs of files may lie: by their offset in it, in order, without overlaps.

    Args:
        tensors: as bytes.
        origins: those of which it is not known where they went.

    Raises:
        OSError: a file can't be read.
    """
    wanted = [one for one in origins if one.nbytes >= LEAST_BYTES]
    common = math.gcd(*(one.nbytes for one in wanted))
    total = sum(one.nbytes for one in wanted)
    steps: dict[int, _Steps] = {}
    found = []
    for tensor in tensors:
        divisors = (math.gcd(common, tensor.numel()), common)
        # A cut may be finer than both: of 8 GPUs each has an eighth of each part.
        finest_first = [whole // cut for whole in divisors for cut in (8, 4, 2, 1) if whole % cut == 0]
        step = next((one for one in finest_first if one >= _LEAST_STEP and total // one <= _MOST_STEPS), 0)
        if step and step not in steps:
            steps[step] = _Steps(wanted, step)
        found.append(steps[step].parts(tensor) if step else [])
    return found


class _Steps:
    """The first bytes of every step of some tensors of files."""

    def __init__(self, origins: Sequence[Origin], step: int) -> None:
        self._origins = origins
        self._step = step
        self._heads = _heads(origins, step)
        self._places: dict[bytes, list[tuple[int, int]]] = {}
        for number, heads in enumerate(self._heads):
            for at, head in enumerate(heads):
                self._places.setdefault(head, []).append((number, at))

    def parts(self, tensor: torch.Tensor) -> list[tuple[int, Origin]]:
        count = tensor.numel() // self._step
        rows = tensor[: count * self._step].view(-1, self._step)[:, :_HEAD_BYTES].cpu().numpy()
        here = [row.tobytes() for row in rows]
        found = []
        at = 0
        while at < count:
            places = self._places.get(here[at], ())[:_MOST_ALIKE]
            runs = [(self._run(here, at, *place), place) for place in places]
            length, place = max(runs, key=lambda run: run[0], default=(0, (0, 0)))
            if length:
                found.append((at * self._step, self._origin(*place, length)))
            at += length or 1
        return found

    def _run(self, here: Sequence[bytes], at: int, number: int, begin: int) -> int:
        """For how many steps they go on alike."""
        there = self._heads[number]
        most = min(len(here) - at, len(there) - begin)
        return next((n for n in range(1, most) if here[at + n] != there[begin + n]), most)

    def _origin(self, number: int, begin: int, length: int) -> Origin:
        whole = self._origins[number]
        return replace(whole, offset=whole.offset + begin * self._step, nbytes=length * self._step)


def _heads(origins: Sequence[Origin], step: int) -> list[list[bytes]]:
    heads = []
    fds: dict[str, int] = {}
    try:
        for origin in origins:
            if origin.path not in fds:
                fds[origin.path] = os.open(origin.path, os.O_RDONLY | os.O_CLOEXEC)
            begins = range(origin.offset, origin.offset + origin.nbytes, step)
            heads.append([os.pread(fds[origin.path], _HEAD_BYTES, begin) for begin in begins])
    finally:
        for fd in fds.values():
            os.close(fd)
    return heads
