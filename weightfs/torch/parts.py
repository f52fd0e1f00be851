"""Which part of a file's tensors a process has, of several that share a model (tensor parallelism). No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from weightfs.errors import UsageError
from weightfs.torch.files import Stored
from weightfs.torch.forms import Form


class Shard(NamedTuple):
    """What one process of several has.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        dims: by a pattern of names (`*.q_proj.weight`, as `fnmatch` has them; the first that fits counts) the dimension
            that is divided evenly. Tensors that none fits are whole in each.
    """

    rank: int
    size: int
    dims: Mapping[str, int]


class Part(NamedTuple):
    """A part of a tensor, or all of it.

    Attributes:
        source: the bytes to be read.
        dim: along which they are to be cut once they are read; None where they are what is wanted.
        start: where the part begins there.
        shape: of the part.
    """

    source: Stored
    dim: int | None
    start: int
    shape: tuple[int, ...]

    def cut(self, read: torch.Tensor) -> torch.Tensor:
        """The part, of what was read."""
        return read if self.dim is None else read.narrow(self.dim, self.start, self.shape[self.dim])


def part_of(source: Stored, shard: Shard | None) -> Part:
    """The part that a process has; of rows only those that it has are read.

    Raises:
        UsageError: the tensor has no such dimension, or that can't be divided evenly; or there is no such rank.
    """
    name, shape = source.extent.name, source.form.shape
    dim = None if shard is None else next((d for pattern, d in shard.dims.items() if fnmatchcase(name, pattern)), None)
    if shard is None or dim is None:
        return Part(source, None, 0, shape)
    if not 0 <= shard.rank < shard.size:
        raise UsageError(f"there is no rank {shard.rank} of {shard.size}")
    if not -len(shape) <= dim < len(shape) or shape[dim] % shard.size:
        what = f"{name!r} of shape {list(shape)} can't be divided by {shard.size} along dimension {dim}"
        raise UsageError(what, path=source.file.path)
    dim %= len(shape)
    length = shape[dim] // shard.size
    part = (*shape[:dim], length, *shape[dim + 1 :])
    if dim:
        return Part(source, dim, shard.rank * length, part)
    nbytes = source.nbytes // shard.size
    rows = Form(source.form.dtype, part)
    return Part(source._replace(offset=source.offset + shard.rank * nbytes, form=rows, nbytes=nbytes), None, 0, part)
