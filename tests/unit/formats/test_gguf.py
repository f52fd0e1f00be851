from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf as library
import numpy as np
import pytest

from tests.unit.formats.samples import ARRAY, STRING, UINT32, Gguf, reader
from weightfs.errors import FormatError, ShortReadError
from weightfs.formats import Role, WeightLayout, parse_header
from weightfs.formats.gguf import MAX_DEPTH, MAX_HEADER_BYTES, MAX_KEYS, MAX_NAME_BYTES, MAX_TENSORS, MAX_VALUE_BYTES

F32, Q4_0, UINT8 = 0, 2, 0
LITTLE = Gguf()


def parse(data: bytes) -> WeightLayout:
    return parse_header("m.gguf", len(data), reader(data))


def fault(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse(data)
    return caught.value


def written(path: Path, writer: library.GGUFWriter) -> bytes:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("endianness", list(library.GGUFEndian))
@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_every_type_lies_where_the_library_says(tmp_path: Path, endianness: library.GGUFEndian, alignment: int) -> None:
    path = tmp_path / "m.gguf"
    writer = library.GGUFWriter(path, "llama", endianess=endianness)
    writer.add_custom_alignment(alignment)
    rng = np.random.default_rng(3)
    for kind, (block, nbytes) in library.GGML_QUANT_SIZES.items():
        raw = rng.integers(0, 255, (3, 2, 2 * nbytes), dtype=np.uint8)
        assert 2 * block % block == 0
        writer.add_tensor(f"blk.{int(kind)}.ffn_up.weight", raw, raw_dtype=kind)
    data = written(path, writer)
    layout = parse(data)
    theirs = {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}
    assert layout.byte_order == ("little" if endianness == library.GGUFEndian.LITTLE else "big")
    assert len(layout.tensors) == len(theirs) == len(library.GGMLQuantizationType)
    for tensor in layout.tensors:
        other = theirs[tensor.name]
        assert tensor.dtype == other.tensor_type.name
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert (tensor.offset, tensor.nbytes) == (other.data_offset, other.n_bytes)
        assert (tensor.role, tensor.layer) == (Role.BLOCK, int(other.tensor_type))


def test_metadata_holds_the_scalars(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = library.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 1 << 31)
    writer.add_int32("i32", -(1 << 31))
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-05)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "ünï\n")
    writer.add_chat_template("x" * (MAX_VALUE_BYTES + 1))
    writer.add_token_list([f"token {i}" for i in range(20_000)])
    writer.add_token_scores([1.0] * 100_000)
    writer.add_tensor("output.weight", np.ones((2, 3), dtype=np.float32))
    data = written(path, writer)
    layout = parse(data)
    assert layout.metadata == {
        "general.architecture": "llama",
        "u8": "200",
        "i8": "-3",
        "u16": "65535",
        "i16": "-300",
        "u32": str(1 << 31),
        "i32": str(-(1 << 31)),
        "u64": str((1 << 64) - 1),
        "i64": str(-(1 << 63)),
        "f32": "0.5",
        "f64": "1e-05",
        "yes": "true",
        "no": "false",
        "text": "ünï\n",
    }
    [tensor] = layout.tensors
    assert data[tensor.offset : tensor.offset + tensor.nbytes] == np.ones(6, dtype=np.float32).tobytes()


def test_text_that_is_not_utf8_is_replaced_in_values() -> None:
    assert parse(LITTLE.file([LITTLE.key("a", STRING, LITTLE.string(b"\xff"))])).metadata == {"a": "\ufffd"}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_byte_orders(order: str, version: int) -> None:
    spell = Gguf(">" if order == ">" else "<", version)
    data = spell.file([spell.key("k", UINT32, spell.pack("I", 7))], [spell.tensor("a", [3, 2], F32, 0)], 24)
    layout = parse(data)
    assert (layout.metadata, layout.tensors[0].shape) == ({"k": "7"}, (2, 3))
    assert layout.byte_order == ("little" if order == "<" else "big")


def test_ranks_gaps_order_empty_tensors_and_trailing_bytes() -> None:
    tensors = [
        LITTLE.tensor("late", [2, 1, 3, 1], F32, 96),
        LITTLE.tensor("scalar", [], F32, 32),
        LITTLE.tensor("empty", [32, 0], Q4_0, 32),
        LITTLE.tensor("first", [32], Q4_0, 0),
    ]
    layout = parse(LITTLE.file((), tensors, 200))
    start = layout.tensors[0].offset
    assert start % 32 == 0
    assert [(t.name, t.shape, t.offset - start, t.nbytes) for t in layout.tensors] == [
        ("first", (32,), 0, 18),
        ("empty", (0, 32), 32, 0),
        ("scalar", (), 32, 4),
        ("late", (1, 3, 1, 2), 96, 24),
    ]


def test_arrays_of_arrays_up_to_the_depth() -> None:
    value = LITTLE.array(UINT8, 3, b"abc")
    for _ in range(MAX_DEPTH - 1):
        value = LITTLE.array(ARRAY, 2, value * 2)
    assert parse(LITTLE.file([LITTLE.key("a", ARRAY, value)])).tensors == ()
    value = LITTLE.array(ARRAY, 1, value)
    assert fault(LITTLE.file([LITTLE.key("a", ARRAY, value)])).reason == "array-nesting"


def test_strings_across_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.formats.cursor._WINDOW_BYTES", 9)
    monkeypatch.setattr("weightfs.formats.cursor._LARGEST_WINDOW_BYTES", 64)
    strings = [b"x" * n for n in (0, 1, 7, 8, 9, 100, 0, 300, 5)]
    value = LITTLE.array(STRING, len(strings), b"".join(LITTLE.string(s) for s in strings))
    keys = [LITTLE.key("a", ARRAY, value), LITTLE.key("b", UINT32, LITTLE.pack("I", 5))]
    tensors = [LITTLE.tensor(f"blk.{i}.w", [8], F32, 32 * i) for i in range(9)]
    layout = parse(LITTLE.file(keys, tensors, 9 * 32))
    assert layout.metadata == {"b": "5"}
    assert [tensor.name for tensor in layout.tensors] == [f"blk.{i}.w" for i in range(9)]


def key(name: str | bytes, kind: int, value: bytes = b"") -> bytes:
    return LITTLE.file([LITTLE.key(name, kind, value)])


def tensors(*infos: bytes, data_bytes: int = 0) -> bytes:
    return LITTLE.file((), infos, data_bytes)


U32 = LITTLE.pack("I", 1)
ALIGN = "general.alignment"


@pytest.mark.parametrize(
    ("data", "reason", "offset"),
    [
        pytest.param(b"GGUF", "header-truncated", 4, id="short"),
        pytest.param(bytes(24), "magic", 0, id="magic"),
        pytest.param(Gguf(version=1).file(), "version", 4, id="version 1"),
        pytest.param(Gguf(version=4).file(), "version", 4, id="version 4"),
        pytest.param(Gguf(">", version=4).file(), "version", 4, id="version 4, big-endian"),
        pytest.param(LITTLE.file(tensor_count=1 << 63), "too-many-tensors", 8, id="2^63 tensors"),
        pytest.param(LITTLE.file(key_count=1 << 63), "too-many-keys", 16, id="2^63 keys"),
        pytest.param(LITTLE.file(tensor_count=MAX_TENSORS), "header-truncated", 24, id="more tensors than bytes"),
        pytest.param(LITTLE.file(key_count=MAX_KEYS), "header-truncated", 24, id="more keys than bytes"),
        pytest.param(LITTLE.file([LITTLE.pack("Q", 1 << 63) + bytes(9)]), "name-length", 24, id="key of 2^63 bytes"),
        pytest.param(
            LITTLE.file([LITTLE.pack("Q", MAX_NAME_BYTES) + bytes(9)]), "header-truncated", 32, id="key past the end"
        ),
        pytest.param(key(b"a\xff", UINT32, U32), "header-utf8", 33, id="key not UTF-8"),
        pytest.param(key("a", 13, U32), "value-type", 33, id="type 13"),
        pytest.param(key("a", 1 << 31, U32), "value-type", 33, id="type 2^31"),
        pytest.param(key("a", STRING, LITTLE.pack("Q", 4000)), "header-truncated", 45, id="text past the end"),
        pytest.param(key("a", STRING, LITTLE.pack("Q", 1 << 63)), "header-truncated", 45, id="text of 2^63 bytes"),
        pytest.param(key("a", ARRAY, LITTLE.array(13, 1, b"")), "value-type", 37, id="array of type 13"),
        pytest.param(key("a", ARRAY, LITTLE.array(UINT8, 1 << 63, b"")), "header-truncated", 49, id="2^63 numbers"),
        pytest.param(key("a", ARRAY, LITTLE.array(STRING, 1 << 63, b"")), "header-truncated", 49, id="2^63 strings"),
        pytest.param(key("a", ARRAY, LITTLE.array(ARRAY, 1 << 63, b"")), "header-truncated", 49, id="2^63 arrays"),
        pytest.param(
            key("a", ARRAY, LITTLE.array(STRING, 2, LITTLE.pack("QQ", 1 << 63, 0))),
            "header-truncated",
            49,
            id="string of 2^63 bytes",
        ),
        pytest.param(
            LITTLE.file([LITTLE.key("a", UINT32, U32), LITTLE.key("a", UINT32, U32)]),
            "duplicate-key",
            41,
            id="key twice",
        ),
        pytest.param(key(ALIGN, UINT32, LITTLE.pack("I", 0)), "alignment", 49, id="alignment 0"),
        pytest.param(key(ALIGN, UINT32, LITTLE.pack("I", 48)), "alignment", 49, id="alignment 48"),
        pytest.param(key(ALIGN, 10, LITTLE.pack("Q", 32)), "alignment", 49, id="alignment as u64"),
        pytest.param(key(ALIGN, ARRAY, LITTLE.array(UINT32, 1, U32)), "alignment", 49, id="alignment as array"),
        pytest.param(tensors(LITTLE.tensor(b"\xff", [1], F32, 0)), "header-utf8", 32, id="name not UTF-8"),
        pytest.param(tensors(LITTLE.tensor("a", [1] * 5, F32, 0)), "shape", 33, id="5 dimensions"),
        pytest.param(tensors(LITTLE.tensor("a", [1 << 62, 2], F32, 0)), "shape", 33, id="2^63 elements"),
        pytest.param(tensors(LITTLE.tensor("a", [33], Q4_0, 0)), "shape", 33, id="part of a block"),
        pytest.param(tensors(LITTLE.tensor("a", [], Q4_0, 0)), "shape", 33, id="a scalar in blocks"),
        pytest.param(tensors(LITTLE.tensor("a", [32], 4, 0)), "unknown-dtype", 45, id="retired type"),
        pytest.param(tensors(LITTLE.tensor("a", [32], 1 << 31, 0)), "unknown-dtype", 45, id="type 2^31"),
        pytest.param(tensors(LITTLE.tensor("a", [1], F32, 16), data_bytes=64), "offsets", 49, id="unaligned"),
        pytest.param(
            tensors(LITTLE.tensor("a", [0], F32, 0), LITTLE.tensor("a", [0], F32, 0)),
            "duplicate-tensor",
            57,
            id="twice",
        ),
        pytest.param(
            tensors(LITTLE.tensor("a", [16], F32, 0), LITTLE.tensor("b", [1], F32, 32), data_bytes=64),
            "tensor-overlap",
            96 + 32,
            id="overlap",
        ),
        pytest.param(tensors(LITTLE.tensor("a", [16], F32, 0), data_bytes=63), "data-truncated", 127, id="truncated"),
        pytest.param(tensors(LITTLE.tensor("a", [1], F32, (1 << 64) - 32)), "data-truncated", 64, id="far outside"),
        pytest.param(tensors(LITTLE.tensor("a", [0], F32, 0))[:-1], "data-truncated", 63, id="padding missing"),
    ],
)
def test_faults(data: bytes, reason: str, offset: int) -> None:
    error = fault(data)
    assert (error.reason, error.offset) == (reason, offset), error


@pytest.mark.parametrize("alignment", [1, 4, 8, 1 << 20])
def test_alignments_the_readers_take(alignment: int) -> None:
    data = LITTLE.file(
        [LITTLE.key(ALIGN, UINT32, LITTLE.pack("I", alignment))],
        [LITTLE.tensor("a", [1], F32, alignment)],
        2 * alignment + 4,
        alignment=alignment,
    )
    assert parse(data).tensors[0].offset % alignment == 0


def test_the_header_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = LITTLE.file([LITTLE.key("a", ARRAY, LITTLE.array(UINT8, 1000, bytes(1000)))])
    parse(data)
    monkeypatch.setattr("weightfs.formats.gguf.MAX_HEADER_BYTES", 500)
    assert fault(data).reason == "header-length"
    assert MAX_HEADER_BYTES == 256 << 20


def test_arrays_of_arrays_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.formats.gguf.MAX_ARRAYS", 5)
    inner = LITTLE.array(UINT8, 0, b"")
    pair = LITTLE.array(ARRAY, 3, inner * 3)
    parse(LITTLE.file([LITTLE.key("a", ARRAY, pair)]))
    assert fault(LITTLE.file([LITTLE.key("a", ARRAY, pair), LITTLE.key("b", ARRAY, pair)])).reason == "array-nesting"


def test_a_short_read_is_passed_on() -> None:
    data = LITTLE.file([LITTLE.key("a", UINT32, U32)])
    with pytest.raises(ShortReadError):
        parse_header("m.gguf", len(data), reader(data[:30]))


def test_long_arrays_of_numbers_are_not_read() -> None:
    head = LITTLE.file([LITTLE.key("a", ARRAY, LITTLE.array(UINT8, 100 << 20, b""))])
    asked = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal asked
        asked += length
        return head[offset : offset + length].ljust(length, b"\0")

    parse_header("m.gguf", len(head) + (100 << 20), read)
    assert asked < 1 << 20


def test_hostile_counts_reserve_nothing() -> None:
    huge = 1 << 63
    nested = LITTLE.array(ARRAY, 1, b"") * 10_000
    attacks = [
        LITTLE.file(tensor_count=huge, key_count=huge),
        LITTLE.file(tensor_count=MAX_TENSORS),
        key("a", ARRAY, LITTLE.array(STRING, huge, b"")),
        key("a", ARRAY, LITTLE.array(ARRAY, huge, b"")),
        key("a", ARRAY, nested),
        key("a", STRING, LITTLE.pack("Q", huge)),
        tensors(LITTLE.pack("Q", huge) + bytes(40)),
        tensors(LITTLE.tensor("a", [(1 << 63) - 1] * 4, F32, 0)),
    ]
    fault(attacks[-1])  # imports gguf, whose own memory is not the point
    tracemalloc.start()
    try:
        for attack in attacks:
            fault(attack)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
