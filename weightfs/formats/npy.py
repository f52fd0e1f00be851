"""The header that turns a tensor's bytes into a `.npy` file.

Source: NumPy's `numpy.lib.format` and NEP 1.
"""

from __future__ import annotations

from weightfs.formats.layout import ByteOrder

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64
_MAX_RANK = 32
"""What NumPy 1.x can load; NumPy 2 takes 64."""

_TYPES = {
    "BOOL": "b1",
    "U8": "u1",
    "I8": "i1",
    "U16": "u2",
    "I16": "i2",
    "U32": "u4",
    "I32": "i4",
    "U64": "u8",
    "I64": "i8",
    "F16": "f2",
    "F32": "f4",
    "F64": "f8",
    "C64": "c8",
}
"""NumPy's name for each dtype that it has; the names of safetensors and GGUF agree where both have one."""


def npy_header(dtype: str, shape: tuple[int, ...], byte_order: ByteOrder = "little") -> bytes | None:
    """Makes the header to put before a tensor's bytes.

    Always format version 1.0: 2.0 is for headers over 64 KiB, and one of 32 dimensions takes less than 1 KiB.

    Args:
        dtype: as in `TensorExtent.dtype`, in the spelling of either format.
        shape: outermost dimension first, each below 2**63.
        byte_order: of the elements, as in `WeightLayout.byte_order`.

    Returns:
        The header, a multiple of 64 bytes; None if NumPy has no such dtype (BF16, F8, F4, the quantised ggml types) or
        can't hold that many dimensions.
    """
    kind = _TYPES.get(dtype)
    if kind is None or len(shape) > _MAX_RANK:
        return None
    order = "|" if kind.endswith("1") else "<" if byte_order == "little" else ">"
    text = f"{{'descr': '{order}{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    fixed = len(_MAGIC) + 2
    padding = -(fixed + len(text) + 1) % _ALIGNMENT
    body = text.encode("ascii") + b" " * padding + b"\n"
    return _MAGIC + len(body).to_bytes(2, "little") + body
