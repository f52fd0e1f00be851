"""What weightfs.torch loads without a GPU, beside what safetensors makes of the same files."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import Tensor, every_dtype, write_safetensors

MISSING = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []
"""This machine lacks torch or safetensors: the extra `weightfs[torch]` brings them."""


def known_to_torch() -> dict[str, Tensor]:
    """A tensor of every dtype that torch has, an empty one and a scalar."""
    return {name: one for name, one in every_dtype().items() if not one.dtype.startswith("F6_")}


def same(one: Any, other: Any) -> bool:
    """Whether two tensors have one dtype, shape and the same bytes: a NaN is no other NaN."""
    import torch

    def raw(tensor: Any) -> Any:
        # A new one has strides of its own: `contiguous` leaves those of dimensions of one element as they are.
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        whole.copy_(tensor)
        return ctypes.string_at(whole.data_ptr(), whole.nbytes)

    return bool(one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other))


@pytest.fixture
def every(tmp_path: Path) -> str:
    return write_safetensors(str(tmp_path / "every.safetensors"), known_to_torch())
