"""What is learned of a loader's reads, and how it is kept."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from prefetch.learning import MAX_EXTENTS, learn
from prefetch.orders import read_order, write_order
from prefetch.plan import Extent
from weightfs.errors import WeightfsError
from weightfs.formats.layout import Role, TensorExtent, WeightLayout

MIB = 1 << 20
HEADER = 4096


def layout_of(sizes: list[int], file: str = "m") -> tuple[WeightLayout, dict[str, int]]:
    at, tensors = HEADER, []
    for number, nbytes in enumerate(sizes):
        tensors.append(TensorExtent(f"t{number}", "U8", (nbytes,), file, at, nbytes, None, Role.OTHER))
        at += nbytes
    return WeightLayout("safetensors", (file,), tuple(tensors)), {file: at}


def chunks(layout: WeightLayout, *order: int) -> list[Extent]:
    """Tensors read one after the other, in pieces of 128 KiB, from 64 KiB before each to 128 KiB or more behind."""
    found = [Extent("m", 0, HEADER)]
    for number in order:
        tensor = layout.tensors[number]
        end = tensor.offset + tensor.nbytes
        found += [Extent("m", at, 1 << 17) for at in range(tensor.offset - (1 << 16), end, 1 << 17)]
        found[-1] = Extent("m", found[-1].offset, 1 << 18)
    return found


def test_tensors_come_in_the_order_of_their_first_touch() -> None:
    layout, sizes = layout_of([MIB] * 4)
    learned = learn(layout, sizes, chunks(layout, 3, 1, 0))
    assert learned == [
        Extent("m", 0, HEADER), Extent("m", HEADER + 3 * MIB, MIB), Extent("m", HEADER + MIB, MIB),
        Extent("m", HEADER, MIB),
    ]  # fmt: skip


def test_threads_change_the_order_of_pieces_not_of_tensors() -> None:
    layout, sizes = layout_of([MIB] * 6)
    reads = chunks(layout, 5, 0, 2, 1, 4, 3)
    shuffled = list(reads)
    rng = random.Random(3)
    for at in range(1, len(shuffled) - 4, 4):
        part = shuffled[at : at + 4]
        rng.shuffle(part)
        shuffled[at : at + 4] = part
    assert learn(layout, sizes, shuffled) == learn(layout, sizes, reads)


def test_a_file_read_from_its_beginning_is_one_extent() -> None:
    layout, sizes = layout_of([100, 5000, 3 * MIB, 7])
    reads = [Extent("m", at, 1 << 17) for at in range(0, sizes["m"], 1 << 17)]
    assert learn(layout, sizes, reads) == [Extent("m", 0, sizes["m"])]


def test_a_part_of_a_large_tensor_is_a_touch_and_a_graze_is_none() -> None:
    layout, sizes = layout_of([8 * MIB, 8 * MIB, 1000])
    part = [Extent("m", HEADER + 9 * MIB + (at << 17), 1 << 17) for at in range(4)]
    assert learn(layout, sizes, part[:3]) == []
    assert learn(layout, sizes, part) == [Extent("m", HEADER + 8 * MIB, 8 * MIB)]
    assert learn(layout, sizes, [Extent("m", sizes["m"] - 500, 500)]) == []


def test_what_is_none_of_the_models_is_passed_over() -> None:
    layout, sizes = layout_of([MIB])
    strange = [Extent("config.json", 0, 10), Extent("m", -5, 10), Extent("m", 1 << 40, 10), Extent("m", 0, 0)]
    assert learn(layout, sizes, strange) == []


def test_an_order_is_bounded() -> None:
    layout, sizes = layout_of([8192] * (3 * MAX_EXTENTS))
    reads = [Extent("m", HEADER + 8192 * number, 8192) for number in range(0, 3 * MAX_EXTENTS, 2)]
    assert len(learn(layout, sizes, reads)) == MAX_EXTENTS


def test_an_order_is_kept_by_family_and_the_newest_counts(tmp_path: Path) -> None:
    state, first, second = str(tmp_path), [Extent("m", 0, 10)], [Extent("m", 5, 1), Extent("m", 0, 2)]
    assert read_order(state, "llama") is None
    write_order(state, "llama", "safetensors", first)
    path = write_order(state, "llama", "transformers", second)
    assert read_order(state, "llama") == second
    assert read_order(state, "llama", family="safetensors") == first
    assert read_order(state, "llama", family="vllm") is None
    assert read_order(state, "another") is None
    write_order(state, "llama", "safetensors", second)
    assert read_order(state, "llama", family="safetensors") == second
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_orders_of_two_models_of_one_folder_stay_apart(tmp_path: Path) -> None:
    state = str(tmp_path)
    write_order(state, "", "llama.cpp", [Extent("a.gguf", 0, 10)])
    write_order(state, "", "llama.cpp", [Extent("b.gguf", 0, 10)])
    assert read_order(state, "", files=["a.gguf"]) == [Extent("a.gguf", 0, 10)]
    assert read_order(state, "", files=["b.gguf"]) == [Extent("b.gguf", 0, 10)]
    assert read_order(state, "", files=["c.gguf"]) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"schema":2,"folder":"m","orders":[]}'])
def test_a_damaged_document_is_as_good_as_none(tmp_path: Path, text: bytes) -> None:
    path = write_order(str(tmp_path), "m", "x", [Extent("m", 0, 10)])
    Path(path).write_bytes(text)
    assert read_order(str(tmp_path), "m") is None
    write_order(str(tmp_path), "m", "x", [Extent("m", 0, 10)])
    assert read_order(str(tmp_path), "m") == [Extent("m", 0, 10)]


def test_a_state_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightfsError, match="the order can't be kept"):
        write_order(f"{tmp_path}/file", "m", "x", [Extent("m", 0, 10)])
    assert read_order(f"{tmp_path}/file", "m") is None
