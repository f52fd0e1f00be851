"""Bounded arithmetic on shapes, shared by every header parser."""

from __future__ import annotations

import math

MAX_RANK = 64
"""Dimensions a tensor may have: what NumPy 2 and PyTorch allow. It also bounds the product of a hostile shape."""

MAX_ELEMENTS = (1 << 63) - 1
"""Elements a tensor may have: loaders count them in a signed 64-bit integer."""


def element_count(shape: tuple[int, ...]) -> int | None:
    """Counts the elements of a shape.

    Args:
        shape: any integers, in any order.

    Returns:
        The product, 1 for `()`; None if the rank exceeds `MAX_RANK`, a dimension is negative, or the product of the
        dimensions other than 0 exceeds `MAX_ELEMENTS`. Zeros do not excuse the others, since NumPy and PyTorch compute
        strides from them and refuse an overflow there.
    """
    if len(shape) > MAX_RANK or min(shape, default=0) < 0:
        return None
    count = math.prod(shape)
    if count > MAX_ELEMENTS or (count == 0 and math.prod(n for n in shape if n) > MAX_ELEMENTS):
        return None
    return count
