"""What a tensor of a file is in torch: dtype and shape. No I/O.

Sources: the table in `safetensors.torch`; for GGUF what gguf-py's `GGUFReader` gives: values where a number is an
element, and else rows of bytes, each row's blocks as they are in the file.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch

from weightfs.formats import TensorExtent, WeightLayout
from weightfs.torch.errors import NotInTorchError

_SAFETENSORS: Final = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""Names in torch, since an older one lacks the latest: those are asked for when a file has them."""
_GGUF: Final = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
_TO_A_BYTE: Final = 2
"""Elements of float4_e2m1fn_x2 that torch counts as one."""


class Form(NamedTuple):
    """A contiguous tensor in torch."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def form_of(extent: TensorExtent, layout: WeightLayout) -> Form:
    """What torch makes of a tensor of a file.

    Returns:
        For a quantised tensor of GGUF `uint8`, and the bytes of a row as the last dimension.

    Raises:
        NotInTorchError: torch has no such dtype, or its numbers are of the other byte order.
    """
    name, shape = extent.dtype, extent.shape
    if layout.format == "gguf":
        if layout.byte_order != "little":
            raise NotInTorchError(f"{extent.name!r} is big-endian", mend="gguf-convert-endian FILE little")
        if name not in _GGUF:
            rows = math.prod(shape[:-1])
            return Form(torch.uint8, (*shape[:-1], extent.nbytes // rows if rows else 0))
        return Form(getattr(torch, _GGUF[name]), shape)
    dtype = getattr(torch, _SAFETENSORS.get(name, ""), None)
    if dtype is None:
        raise NotInTorchError(f"Dtype not understood: {name} (of {extent.name!r})", mend="a newer torch may have it")
    if name == "F4":
        if not shape or shape[-1] % _TO_A_BYTE:
            raise NotInTorchError(f"{extent.name!r} of F4 has the shape {list(shape)}, torch holds two to a byte")
        shape = (*shape[:-1], shape[-1] // _TO_A_BYTE)
    return Form(dtype, shape)
