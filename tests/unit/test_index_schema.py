from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.formats.layout import Role, TensorExtent, WeightLayout
from weightfs.index import schema
from weightfs.index.schema import EntryRecord, FileRecord, Kind, inode_number, new_epoch, serial_of


@given(st.integers(1, (1 << 31) - 1), st.integers(0, (1 << 32) - 1))
def test_a_number_is_epoch_and_serial(epoch: int, serial: int) -> None:
    number = inode_number(epoch, serial)
    assert number >> 32 == epoch
    assert serial_of(number) == serial
    assert number < 1 << 63, "the highest bit is not ours"


def test_an_epoch_is_the_second_counted_from_2026() -> None:
    before = int(time.time())
    epoch = new_epoch()
    assert before <= epoch + schema._EPOCH_ZERO <= time.time()


def test_an_epoch_is_larger_than_its_predecessor_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    future = new_epoch() + 1_000_000
    assert new_epoch(future) == future + 1
    monkeypatch.setattr(time, "time", lambda: 0.0)  # no battery, 1970
    assert new_epoch() == 1
    assert new_epoch(7) == 8


LAYOUT = WeightLayout(
    "gguf",
    ("a.gguf",),
    (
        TensorExtent("blk.0.w", "Q4_K", (2, 256), "a.gguf", 128, 288, 0, Role.BLOCK),
        TensorExtent("odd/ü\x00", "F32", (), "a.gguf", 416, 4, None, Role.OTHER),
    ),
    {"general.name": "tiny"},
    "big",
)


@pytest.mark.parametrize("layout", [LAYOUT, WeightLayout("safetensors", ("a.gguf",), ())])
def test_a_layout_comes_back_from_its_record(layout: WeightLayout) -> None:
    record = FileRecord.of(77, layout)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=FileRecord)
    assert again == record
    assert again.base == 77
    assert again.layout("a.gguf") == layout
    assert {tensor.file for tensor in again.layout("b.gguf").tensors} <= {"b.gguf"}


@given(st.sampled_from(Kind), st.integers(0, (1 << 63) - 1), st.binary(max_size=300), st.binary(max_size=16))
def test_an_entry_comes_back_from_its_record(kind: Kind, parent: int, name: bytes, key: bytes) -> None:
    record = EntryRecord(kind, parent, name, key)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=EntryRecord) == record
