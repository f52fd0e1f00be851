from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.formats.samples import entry, library_tensors, reader, safetensors
from weightfs.errors import FormatError, ShortReadError
from weightfs.formats import Role, WeightLayout, parse_header
from weightfs.formats.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, MAX_TENSORS


def parse(data: bytes) -> WeightLayout:
    return parse_header("m.safetensors", len(data), reader(data))


def fault(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse(data)
    return caught.value


def test_the_layout_of_a_file_the_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "model.embed_tokens.weight": rng.random((5, 3)).astype(np.float16),
        "model.layers.11.mlp.up_proj.weight": rng.random((2, 3, 4)),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "a/../ü\n": rng.integers(0, 9, 7).astype(np.uint8),
    }
    path = tmp_path / "m.safetensors"
    save_file(arrays, str(path), metadata={"format": "np", "shape": "a key that is also a field"})
    data = path.read_bytes()
    layout = parse(data)
    assert layout.format == "safetensors"
    assert layout.files == ("m.safetensors",)
    assert layout.metadata == {"format": "np", "shape": "a key that is also a field"}
    assert {tensor.name for tensor in layout.tensors} == set(arrays)
    for tensor in layout.tensors:
        array = arrays[tensor.name]
        assert tensor.shape == array.shape
        assert tensor.file == "m.safetensors"
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()
    assert [tensor.offset for tensor in layout.tensors] == sorted(tensor.offset for tensor in layout.tensors)
    block = next(tensor for tensor in layout.tensors if "layers" in tensor.name)
    assert (block.role, block.layer) == (Role.BLOCK, 11)
    assert layout.nbytes == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_library_s_size(dtype: str) -> None:
    nbytes = DTYPE_BITS[dtype]
    data = safetensors({"a": entry(dtype, [2, 4], 0, nbytes)}, nbytes)
    [tensor] = parse(data).tensors
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, (2, 4), nbytes)
    assert library_tensors(data) == {"a": (dtype, [2, 4], bytes(nbytes))}


@pytest.mark.parametrize("dtype", ["U4", "I4", "F2", "C128", "F8_E3M4", "u8", ""])
def test_a_dtype_the_library_lacks(dtype: str) -> None:
    data = safetensors({"a": entry(dtype, [1], 0, 1)}, 1)
    assert library_tensors(data) is None
    assert fault(data).reason == "unknown-dtype"


@pytest.mark.parametrize(
    ("dtype", "elements", "nbytes"),
    [("F4", 3, 1), ("F4", 3, 2), ("F6_E2M3", 3, 2), ("F6_E2M3", 3, 3), ("F6_E3M2", 2, 1)],
)
def test_sub_byte_tensors_end_with_a_byte(dtype: str, elements: int, nbytes: int) -> None:
    data = safetensors({"a": entry(dtype, [elements], 0, nbytes)}, nbytes)
    assert library_tensors(data) is None
    assert fault(data).reason == "offsets"


@pytest.mark.parametrize("text", [b"{}", b"{}      ", b'{"__metadata__":{}}', b'{"__metadata__":null}', b"{}\n\t "])
def test_headers_without_tensors(text: bytes) -> None:
    layout = parse(safetensors(text))
    assert (layout.tensors, dict(layout.metadata)) == ((), {})


U8 = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
ESCAPED = U8.replace("dtype", "dt\\u0079pe")


@pytest.mark.parametrize(
    ("data", "reason", "offset"),
    [
        pytest.param(b"", "header-truncated", 0, id="empty file"),
        pytest.param(bytes(7), "header-truncated", 7, id="7 bytes"),
        pytest.param(struct.pack("<Q", MAX_HEADER_BYTES + 1), "header-length", 0, id="over the limit"),
        pytest.param(struct.pack("<Q", 1 << 63), "header-length", 0, id="2^63"),
        pytest.param(struct.pack("<Q", MAX_HEADER_BYTES), "header-truncated", 8, id="at the limit"),
        pytest.param(struct.pack("<Q", 3) + b"{}", "header-truncated", 10, id="one byte short"),
        pytest.param(safetensors(b""), "header-start", 8, id="no header"),
        pytest.param(safetensors(b" {}"), "header-start", 8, id="leading space"),
        pytest.param(safetensors(b"[]"), "header-start", 8, id="an array"),
        pytest.param(safetensors(b'{"\xff":{}}'), "header-utf8", 10, id="bad name"),
        pytest.param(safetensors(b'{"a":{"x":"\xc3"}}'), "header-utf8", 19, id="bad text in a field nobody reads"),
        pytest.param(safetensors(b"{"), "header-json", 9, id="ends early"),
        pytest.param(safetensors(b"{}\0"), "header-json", 11, id="NUL padding"),
        pytest.param(safetensors(b'{"a":{,}}'), "header-json", 14, id="stray comma"),
        pytest.param(safetensors(b'{"\\ud800":{}}'), "header-json", 21, id="lone surrogate"),
        pytest.param(safetensors(b'{"a":' + b"[" * 99999), "header-json", 8, id="an array as entry"),
        pytest.param(safetensors(b'{"a":{"x":' + b"[" * 99999), "header-json", 8, id="nested too deeply"),
        pytest.param(safetensors(b'{"a":null}'), "header-json", 9, id="null"),
        pytest.param(safetensors(b'{"b":1}'), "header-json", 8, id="a number as entry"),
        pytest.param(safetensors({"a": {"shape": [], "data_offsets": [0, 0]}}), "header-json", 9, id="no dtype"),
        pytest.param(safetensors({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "header-json", 9, id="no shape"),
        pytest.param(safetensors({"a": {"dtype": "U8", "shape": []}}), "header-json", 9, id="no offsets"),
        pytest.param(safetensors({"a": {**entry("U8", [], 0, 0), "shape": "x"}}), "header-json", 9, id="text shape"),
        pytest.param(safetensors({"a": {**entry("U8", [], 0, 0), "shape": [0.0]}}), "header-json", 8, id="float shape"),
        pytest.param(
            safetensors({"a": {**entry("U8", [], 0, 0), "data_offsets": [0]}}), "header-json", 8, id="one offset"
        ),
        pytest.param(safetensors({"__metadata__": {"a": 1}}), "header-json", 8, id="metadata that is not text"),
        pytest.param(
            safetensors(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
            "header-json",
            8,
            id="5000 digits",
        ),
        pytest.param(safetensors({"a": entry("U8", [-1], 0, 0)}), "shape", 9, id="negative"),
        pytest.param(safetensors({"a": entry("U8", [1 << 62, 2], 0, 0)}), "shape", 9, id="2^63 elements"),
        pytest.param(safetensors({"a": entry("U8", [1 << 62, 0, 2], 0, 0)}), "shape", 9, id="2^63, hidden by a zero"),
        pytest.param(safetensors({"a": entry("U8", [1] * 65, 0, 1)}, 1), "shape", 9, id="65 dimensions"),
        pytest.param(safetensors({"a": entry("U8", [1], 1, 0)}), "offsets", 9, id="begin after end"),
        pytest.param(safetensors({"a": entry("U8", [1], -1, 0)}), "offsets", 9, id="begin before 0"),
        pytest.param(safetensors({"a": entry("U8", [2], 0, 1)}, 1), "offsets", 9, id="too few bytes"),
        pytest.param(safetensors({"a": entry("F32", [1], 0, 5)}, 5), "offsets", 9, id="too many bytes"),
        pytest.param(
            safetensors(b'{"\\u0061":{"dtype":"X","shape":[],"data_offsets":[0,1]}}'),
            "unknown-dtype",
            8,
            id="a name spelled with escapes",
        ),
        pytest.param(safetensors(f'{{"a":{U8},"a":{U8}}}'.encode(), 1), "duplicate-tensor", 9, id="twice"),
        pytest.param(
            safetensors(f'{{"a":{U8},"\\u0061":{ESCAPED}}}'.encode(), 1),
            "duplicate-tensor",
            9,
            id="twice, with escapes",
        ),
        pytest.param(
            safetensors(b'{"a":{"dtype":"I8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
            "duplicate-tensor",
            9,
            id="a field twice",
        ),
        pytest.param(safetensors(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate-tensor", 9, id="metadata twice"),
        pytest.param(
            safetensors({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, 3),
            "tensor-overlap",
            8 + 120 + 1,
            id="overlap",
        ),
        pytest.param(
            safetensors({"a": entry("U8", [2], 0, 2), "z": entry("U8", [0], 1, 1)}, 2),
            "tensor-overlap",
            8 + 120 + 1,
            id="nothing, within another",
        ),
        pytest.param(
            safetensors({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, 5),
            "tensor-gap",
            8 + 120 + 2,
            id="gap",
        ),
        pytest.param(safetensors({"a": entry("U8", [2], 1, 3)}, 3), "tensor-gap", 8 + 60, id="gap at the start"),
        pytest.param(safetensors({"a": entry("U8", [2], 0, 2)}, 1), "data-truncated", 8 + 60 + 1, id="truncated"),
        pytest.param(safetensors({"a": entry("U8", [2], 0, 2)}, 3), "data-trailing", 8 + 60 + 2, id="trailing"),
        pytest.param(safetensors({}, 3), "data-trailing", 10, id="data without tensors"),
    ],
)
def test_faults(data: bytes, reason: str, offset: int) -> None:
    error = fault(data)
    assert (error.reason, error.offset) == (reason, offset), error


def test_repetitions_that_mean_nothing_are_taken() -> None:
    # Each one costs the exact look for repetitions, and each one the library takes as well.
    for text in (
        f'{{"dtype":{U8}}}',
        f'{{"a":{ESCAPED}}}',
        '{"__metadata__":{"a":"b","a":"c","shape":"d"}}',
        '{"__metadata__":{"a":"\\u0001"}}',
        '{"__metadata__":null,"a":{"x":1e5,"x":2,"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0062":' + U8 + "}",
    ):
        data = safetensors(text.encode(), text.count("[1]"))
        assert {tensor.name for tensor in parse(data).tensors} == set(library_tensors(data) or {})


def test_ties_are_ordered_by_end_then_name() -> None:
    header = {name: entry("U8", [0], 1, 1) for name in "cb"} | {
        "a": entry("U8", [1], 0, 1),
        "z": entry("U8", [0], 0, 0),
    }
    assert [tensor.name for tensor in parse(safetensors(header, 1)).tensors] == ["z", "a", "b", "c"]


@pytest.mark.parametrize("key", ["data_offsets", "data_\\u006fffsets"])
def test_the_number_of_tensors_is_bounded(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("weightfs.formats.safetensors.MAX_TENSORS", 3)
    entries = [f'"{i}":{{"dtype":"U8","shape":[0],"{key}":[0,0]}}' for i in range(4)]
    assert len(parse(safetensors(f"{{{','.join(entries[:3])}}}".encode())).tensors) == 3
    assert fault(safetensors(f"{{{','.join(entries)}}}".encode())).reason == "too-many-tensors"
    assert MAX_TENSORS == 1 << 20


def test_a_short_read_is_passed_on() -> None:
    data = safetensors({"a": entry("U8", [1], 0, 1)}, 1)
    with pytest.raises(ShortReadError):
        parse_header("m.safetensors", len(data), reader(data[:20]))


def test_only_the_header_is_read() -> None:
    data = safetensors({"a": entry("U8", [1 << 40], 0, 1 << 40)})
    assert parse_header("m.safetensors", len(data) + (1 << 40), reader(data)).nbytes == 1 << 40


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"{" + b'"a":1,' * 300_000, id="entries of another form"),
        pytest.param(b'{"a":{"shape":[' + b"0," * 900_000, id="an endless shape"),
        pytest.param(b'{"a":{"x":' + b'{"a":' * 360_000, id="deep objects"),
        pytest.param(b'{"__metadata__":{' + b'"":"",' * 300_000, id="endless metadata"),
    ],
)
def test_memory_stays_proportional_to_the_header(text: bytes) -> None:
    data = safetensors(text)
    tracemalloc.start()
    try:
        assert fault(data).reason == "header-json"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(data)


def test_a_length_from_the_file_reserves_nothing() -> None:
    tracemalloc.start()
    try:
        for length in (MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1):
            fault(struct.pack("<Q", length) + b"{}")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_the_message_and_offset_reach_the_text() -> None:
    header: dict[str, Any] = {"a": entry("U8", [2], 0, 1)}
    text = str(fault(safetensors(header, 1)))
    assert text == "'a' takes 2 bytes, its data_offsets are [0, 1) (at byte 9)"
    assert len(json.dumps(header)) == 60
