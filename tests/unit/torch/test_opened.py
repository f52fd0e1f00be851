"""safe_open against safetensors' own: the same answers, and the same errors to the same questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.models import Tensor, every_quantisation, tensor, write, write_gguf, write_safetensors
from tests.unit.support import open_descriptors
from tests.unit.torch.conftest import same
from weightfs.torch import safe_open
from weightfs.torch.errors import BadHeaderError

BACKENDS: tuple[Any, ...] = ("mmap", "pread")
TENSORS = {
    "cube": tensor("F32", (3, 4, 5), 1),
    "rows": tensor("BF16", (7, 2), 2),
    "line": tensor("I64", (6,), 3),
    "scalar": tensor("F64", (), 5),
    "empty": Tensor("F32", (0, 4), b""),
}
INDICES: tuple[Any, ...] = (
    ..., slice(None), 0, -1, 3, -4, 99, slice(1, 2), slice(0, 9), slice(2, 1), slice(-2, None), slice(None, None, 2),
    slice(None, None, -1), slice(1, 3, 1), (0, 1), (0, 1, 2), (0, 1, 2, 3), (..., 0), (0, ...), (0, ..., 1), (..., ...),
    (..., slice(0, 2)), None, True, 1.5, "x", np.int64(1), torch.tensor(1), (slice(None), slice(1, 3)),
    slice(None, -1), slice(-100, 100), slice(1, 1), (), (None, 0), (slice(0, 2), [0, 1]), (slice(None), -1),
    (slice(1, 3), -1), slice(5, 9), slice(-1, -3), slice(0, 3, 0), slice(3, 9), slice(np.int64(1), np.int64(2)),
    slice(True, 2), slice(1.0, 2), (slice(1, 3), None), (slice(0, 2), ...), (slice(0, 1), slice(0, 1), slice(0, 1)),
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_safetensors(str(tmp_path_factory.mktemp("opened") / "model.safetensors"), TENSORS)


def outcome(work: Callable[[], Any]) -> Any:
    """What came of it: a tensor, or the error's kind and words."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  compared by the caller
        return error


def agree(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, Exception):
        return isinstance(mine, type(theirs)) and str(theirs) in str(mine)
    return isinstance(mine, torch.Tensor) and same(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TENSORS)
def test_slices_and_what_is_wrong_with_them(path: str, name: str, backend: Any) -> None:
    with safetensors.safe_open(path, "pt") as one, safe_open(path, "pt", backend=backend) as other:
        theirs, mine = one.get_slice(name), other.get_slice(name)
        assert (mine.get_shape(), mine.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
        for index in INDICES:
            found, wanted = outcome(lambda: mine[index]), outcome(lambda: theirs[index])
            assert agree(found, wanted), (index, found, wanted)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data(), backend=st.sampled_from(BACKENDS), name=st.sampled_from(sorted(TENSORS)))
def test_any_slices(path: str, data: st.DataObject, backend: Any, name: str) -> None:
    bound = st.none() | st.integers(-9, 9)
    part = st.builds(slice, bound, bound, st.none() | st.integers(1, 3)) | st.integers(-8, 8) | st.just(...) | st.none()
    index = data.draw(part | st.lists(part, max_size=4).map(tuple))
    with safetensors.safe_open(path, "pt") as one, safe_open(path, "pt", backend=backend) as other:
        found = outcome(lambda: other.get_slice(name)[index])
        assert agree(found, outcome(lambda: one.get_slice(name)[index]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_says_what_safetensors_says(path: str, every: str, backend: Any) -> None:
    for file in (path, every):
        with safetensors.safe_open(file, "pt") as one, safe_open(file, "pt", backend=backend) as other:
            assert other.keys() == one.keys()
            assert other.offset_keys() == one.offset_keys()
            assert other.metadata() == one.metadata()
            assert list(other.get_tensors()) == list(one.get_tensors())
            for name, tensor_ in other.get_tensors().items():
                assert same(tensor_, one.get_tensor(name))
                assert same(other.get_tensor(name), one.get_tensor(name))


def test_slices_of_two_to_a_byte(every: str) -> None:
    """Which safetensors 0.8 can't make: it takes the header's shape for torch's."""
    with safetensors.safe_open(every, "pt") as one, safe_open(every, backend="pread") as other:
        part = other.get_slice("t.F4")
        assert part.get_shape() == one.get_slice("t.F4").get_shape() == [8, 6]
        wanted = one.get_tensor("t.F4")
        assert same(part[2:5], wanted[2:5])


def test_metadata(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"format":"pt","x":""}}'
    path = write(str(tmp_path / "m.safetensors"), len(header).to_bytes(8, "little") + header)
    with safetensors.safe_open(path, "pt") as one, safe_open(path) as other:
        assert other.metadata() == one.metadata() == {"format": "pt", "x": ""}


def test_closed_and_absent_are_safetensors_errors(path: str) -> None:
    opened = (safetensors.safe_open(path, "pt"), safe_open(path, "pt"))
    questions: tuple[Callable[[Any], Any], ...] = (
        lambda file: file.keys(),
        lambda file: file.offset_keys(),
        lambda file: file.metadata(),
        lambda file: file.get_tensor("cube"),
        lambda file: file.get_slice("cube"),
        lambda file: file.get_tensors(),
    )
    for ask in (lambda file: file.get_tensor("absent"), lambda file: file.get_slice("absent")):
        theirs, mine = (outcome(lambda ask=ask, file=file: ask(file)) for file in opened)  # type: ignore[misc]
        assert type(theirs) is safetensors.SafetensorError
        assert agree(mine, theirs)
    parts = [file.get_slice("cube") for file in opened]
    for file in opened:
        file.__exit__(None, None, None)
    for ask in questions:
        theirs, mine = (outcome(lambda ask=ask, file=file: ask(file)) for file in opened)  # type: ignore[misc]
        assert type(theirs) is safetensors.SafetensorError
        assert agree(mine, theirs)
    assert same(parts[1][:2], parts[0][:2])


def test_a_file_is_closed_with_the_last_slice_of_it(path: str) -> None:
    before = open_descriptors()
    with safe_open(path, backend="pread") as file:
        part = file.get_slice("cube")
    assert part[1:].shape == (2, 4, 5)
    del part
    assert open_descriptors() == before


def test_what_can_not_be_opened(path: str, tmp_path: Path) -> None:
    bad = write(str(tmp_path / "bad.safetensors"), b"\xff" * 32)
    for arguments in ((str(tmp_path / "absent"), "pt"), (path, "xx"), (bad, "pt"), (str(tmp_path), "pt")):
        theirs = outcome(lambda arguments=arguments: safetensors.safe_open(*arguments))  # type: ignore[misc]
        mine = outcome(lambda arguments=arguments: safe_open(*arguments))  # type: ignore[misc]
        assert isinstance(mine, type(theirs)), (mine, theirs)
    with pytest.raises(safetensors.SafetensorError, match='backend "foo" is invalid'):
        safe_open(path, backend="foo")  # type: ignore[arg-type]
    with pytest.raises(BadHeaderError):
        safe_open(bad)


def test_only_wanted_rows_are_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = safe_open.__init__.__globals__["load_stored"]

    def noted(wanted: Any, device: Any) -> Any:
        read.extend((one.offset - one.extent.offset, one.nbytes) for one in wanted)
        return original(wanted, device)

    monkeypatch.setattr("weightfs.torch.opened.load_stored", noted)
    with safe_open(path, backend="pread") as file:
        part = file.get_slice("cube")
        for index in (slice(1, 2), (slice(2, 9), 0), slice(2, 1), 0):
            assert part[index].dim() in (2, 3)
    assert read == [(80, 80), (160, 80), (160, 0), (0, 240)]


def test_gguf_names_its_types(tmp_path: Path) -> None:
    with safe_open(write_gguf(str(tmp_path / "m.gguf"), every_quantisation())) as file:
        parts = [file.get_slice(name) for name in file.offset_keys()]
        assert {"Q4_K", "F16", "IQ2_XXS"} <= {part.get_dtype() for part in parts}
        assert file.get_tensor(next(name for name in file.offset_keys() if "Q4_K" in name)).dtype is torch.uint8
        assert (file.metadata() or {})["general.name"] == "test"
