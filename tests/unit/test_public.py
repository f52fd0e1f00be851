"""What the packages offer: each symbol once, nothing by accident."""

from __future__ import annotations

import pytest

import weightfs
from tests.unit.support import python
from weightfs import formats
from weightfs.errors import WeightfsError


def test_weightfs() -> None:
    assert weightfs.__all__ == ["Role", "TensorExtent", "WeightLayout", "open_model"]
    assert all(hasattr(weightfs, name) for name in weightfs.__all__)


def test_formats() -> None:
    assert formats.__all__ == [
        "ByteOrder", "ReadAt", "Role", "TensorExtent", "WeightLayout", "check_shards", "classify", "encode_name",
        "format_of", "group_shards", "merge_shards", "npy_header", "parse_header", "parse_weight_map",
    ]  # fmt: skip
    assert all(hasattr(formats, name) for name in formats.__all__)


def test_what_both_offer_is_one_thing() -> None:
    for name in set(weightfs.__all__) & set(formats.__all__):
        assert getattr(weightfs, name) is getattr(formats, name)


def test_importing_it_is_cheap() -> None:
    """No torch, no NumPy, no pyfuse3, no LMDB for whoever only wants a layout."""
    done = python(
        "import sys, weightfs; weightfs.open_model; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "gguf", "pyfuse3", "lmdb", "trio", "typer", "rich"} & set(done.stdout.split())


@pytest.mark.parametrize(("path", "text"), [(None, "message"), ("/p", "/p: message")])
def test_an_error_is_one_line(path: str | None, text: str) -> None:
    assert str(WeightfsError("message", path=path)) == text
