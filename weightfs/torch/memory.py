"""Memory for tensors, and bytes of files into it.

On a GPU a tensor of its own costs a cudaMalloc, 0.1 to 0.3 ms for each of the hundreds that a model has. So tensors
share allocations of `ARENA_BYTES` at most, in the order in which they are given; each has a storage of its own size
within it, as a tensor of safetensors has within its mapping, so `torch.save` of one writes one. An allocation stays
until the last tensor in it is gone: one that survives its model keeps `ARENA_BYTES` at most. (One allocation a file, as
other loaders make, would keep gigabytes.) What torch can't do for such a tensor is `record_stream`; who frees weights
while another stream still uses them must wait for that stream.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from weightfs.errors import ShortReadError, UnfitError
from weightfs.torch.files import Stored

ARENA_BYTES: Final = 512 << 20
ALIGNMENT_BYTES: Final = 512
"""Of every tensor, as torch's own allocator gives."""
_READ_BYTES: Final = 16 << 20
_THREADS: Final = 16
"""Readers into main memory, at most: copying from the page cache is bound by memory long before."""

log = logging.getLogger(__name__)


def placed(wanted: Sequence[Stored], device: torch.device) -> list[torch.Tensor]:
    """Tensors for what is wanted, in its order, contiguous and not filled yet.

    Raises:
        RuntimeError: from torch, where the device or its memory is not there.
    """
    tensors: list[torch.Tensor] = []
    for run in arenas([one.nbytes for one in wanted]):
        group = wanted[run]
        nbytes = sum(_aligned(one.nbytes) for one in group)
        arena = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
        at = 0
        for one in group:
            dtype, shape = one.form
            tensor = torch.empty(0, dtype=dtype, device=device)
            # An empty tensor takes no part of an arena, and so keeps none.
            tensors.append(tensor.set_(arena[at : at + one.nbytes], 0, shape) if one.nbytes else tensor.reshape(shape))
            at += _aligned(one.nbytes)
    return tensors


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def arenas(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of tensors of these sizes in bytes that share `ARENA_BYTES`; one that is larger is by itself."""
    begun, taken = 0, 0
    for number, nbytes in enumerate(sizes):
        if number > begun and taken + _aligned(nbytes) > ARENA_BYTES:
            yield slice(begun, number)
            begun, taken = number, 0
        taken += _aligned(nbytes)
    if begun < len(sizes):
        yield slice(begun, len(sizes))


def fill(wanted: Sequence[Stored], tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """Read what is wanted into contiguous tensors of its size; all of it is there on return, for every stream.

    Args:
        wanted: in the order in which it is to be read.
        tensors: one for each.
        device: where all of them are.

    Raises:
        ShortReadError: a file ends before its tensor does.
        OSError: a file can't be read.
        WeightfsError: the GPU's driver failed.
    """
    if device.type == "cuda" and _staged(wanted, tensors, device):
        return
    if device.type == "cpu":
        _read(wanted, tensors)
        return
    for one, tensor in zip(wanted, tensors, strict=True):
        here = placed([one], torch.device("cpu"))
        _read([one], here)
        tensor.copy_(here[0])


def _staged(wanted: Sequence[Stored], tensors: Sequence[torch.Tensor], device: torch.device) -> bool:
    """Copy through pinned memory; False where there can be none, and torch copies by itself."""
    from prefetch.staging import Piece, shared

    if torch.version.hip is not None:
        return False
    try:
        staging = shared(device.index if device.index is not None else torch.cuda.current_device())
    except UnfitError as error:
        log.warning("copies to %s take the slow way: %s (%s)", device, error, error.mend)
        return False
    # What torch has under way there may still use the memory that it gave.
    torch.cuda.current_stream(device).synchronize()
    staging.copy(
        Piece(one.file.fileno(), one.offset, one.nbytes, tensor.data_ptr())
        for one, tensor in zip(wanted, tensors, strict=True)
        if one.nbytes
    )
    return True


def _read(wanted: Iterable[Stored], tensors: Iterable[torch.Tensor]) -> None:
    parts = [
        (one.file, one.offset + at, tensor.data_ptr() + at, min(_READ_BYTES, one.nbytes - at))
        for one, tensor in zip(wanted, tensors, strict=True)
        for at in range(0, one.nbytes, _READ_BYTES)
    ]
    threads = max(1, min(_THREADS, len(os.sched_getaffinity(0)), len(parts)))
    with ThreadPoolExecutor(threads, thread_name_prefix="weightfs-read") as pool:
        # The first error is raised; what has not begun by then is not begun.
        for done in [pool.submit(_read_part, *part) for part in parts]:
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _read_part(file: Any, offset: int, address: int, nbytes: int) -> None:
    memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
    done = 0
    while done < nbytes:
        got = os.preadv(file.fileno(), [memory[done:]], offset + done)
        if not got:
            raise ShortReadError(f"ends at byte {offset + done}, {nbytes - done} bytes early", path=file.path)
        done += got
