"""Any bytes give a layout or a FormatError; a layout's tensors are where it says; and the safetensors library agrees.

The headers on which we and the library (0.8) disagree, each of which `disagreement` recognises and a test below holds:

    it takes, we refuse
        a header that begins with white space       the format forbids it, and writers never do it
        a tensor twice                              the last one would win there, the first elsewhere
        a tensor as an array, a dtype as an object  quirks of its decoder; the format has neither
        more than 64 dimensions                     no loader can make such a tensor
        a dimension over 2^63, beside a zero        nor that
    it refuses, we take
        JSON faults in fields nobody reads          their bytes decide nothing (numbers over 1e308, nesting over 128,
                                                    control characters)
        `-0` in a shape or offset                   it is 0
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.formats.samples import ARRAY, STRING, UINT32, Gguf, entry, library_tensors, reader, safetensors
from weightfs.errors import FormatError
from weightfs.formats import WeightLayout, encode_name, group_shards, parse_header, parse_weight_map
from weightfs.formats.safetensors import DTYPE_BITS

NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
DTYPES = st.sampled_from([dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8])


def parse(file: str, data: bytes) -> WeightLayout | FormatError:
    try:
        layout = parse_header(file, len(data), reader(data))
    except FormatError as error:
        return error
    spans = [(tensor.offset, tensor.offset + tensor.nbytes) for tensor in layout.tensors]
    assert spans == sorted(spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(0 < begin <= end <= len(data) for begin, end in spans)
    assert len({tensor.name for tensor in layout.tensors}) == len(layout.tensors)
    return layout


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=3))
    end = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype, shape = draw(DTYPES), draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + DTYPE_BITS[dtype] // 8 * math.prod(shape)
        header[name] = entry(dtype, shape, begin, end)
    text = json.dumps(
        header, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    )
    return safetensors(text.encode() + b" " * draw(st.integers(0, 8)), end)


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    spell = Gguf(draw(st.sampled_from(["<", ">"])), draw(st.sampled_from([2, 3])))
    keys = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        kind = draw(st.sampled_from([UINT32, STRING, ARRAY]))
        value = {
            UINT32: spell.pack("I", 7),
            STRING: spell.string(draw(NAMES)),
            ARRAY: spell.array(STRING, 2, spell.string("a") * 2),
        }[kind]
        keys.append(spell.key(name, kind, value))
    tensors, offset = [], 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dims = draw(st.lists(st.integers(0, 9), max_size=4))
        tensors.append(spell.tensor(name, dims, 0, offset))
        offset += -(-4 * math.prod(dims) // 32) * 32
    return spell.file(keys, tensors, offset)


@st.composite
def mutated(draw: st.DrawFn, files: st.SearchStrategy[bytes]) -> bytes:
    data = bytearray(draw(files))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 4))
        data[at : at + cut] = draw(
            st.binary(max_size=4) | st.sampled_from([b'"a":', b"{}", b"-0", b"\\u", b"[[", b"1e9"])
        )
    return bytes(data)


@pytest.mark.parametrize("file", ["m.safetensors", "m.gguf"])
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes(file: str, data: bytes) -> None:
    parse(file, data)
    parse(file, b"GGUF\3\0\0\0" + data)
    parse(file, safetensors(data))


@given(safetensors_files())
def test_sound_safetensors(data: bytes) -> None:
    layout = parse("m.safetensors", data)
    assert isinstance(layout, WeightLayout), layout
    assert described(layout, data) == library_tensors(data)


@given(gguf_files())
def test_sound_gguf(data: bytes) -> None:
    layout = parse("m.gguf", data)
    assert isinstance(layout, WeightLayout), layout


@given(mutated(gguf_files()))
def test_mutated_gguf(data: bytes) -> None:
    parse("m.gguf", data)


def described(layout: WeightLayout, data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        tensor.name: (tensor.dtype, list(tensor.shape), data[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in layout.tensors
    }


def disagreement(ours: WeightLayout | FormatError, data: bytes) -> bool:
    """Tells whether one of the listed differences explains that only one side takes `data`."""
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if isinstance(ours, FormatError):
        return (
            (ours.reason == "header-start" and text.lstrip(b" \t\r\n").startswith(b"{"))
            or ours.reason == "duplicate-tensor"
            or (ours.reason == "header-json" and re.search(rb":\s*\[|dtype\"\s*:\s*\{", text) is not None)
            or ours.reason == "shape"
        )
    return b"-0" in text or has_other_fields(text)


def has_other_fields(text: bytes) -> bool:
    keys: set[str] = set()
    header = json.loads(text, strict=False)
    for name, fields in header.items():
        if name != "__metadata__":
            keys |= set(fields)
    return bool(keys - {"dtype", "shape", "data_offsets"})


@settings(max_examples=500)
@given(mutated(safetensors_files()))
@example(safetensors(b" {}"))
@example(safetensors(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'))
def test_mutated_safetensors_agree_with_the_library(data: bytes) -> None:
    ours = parse("m.safetensors", data)
    other = library_tensors(data)
    if isinstance(ours, WeightLayout) and other is not None:
        assert described(ours, data) == other
    elif isinstance(ours, WeightLayout) or other is not None:
        assert disagreement(ours, data), ours


FIELDS = '"shape":[0],"data_offsets":[0,0]'


@pytest.mark.parametrize(
    ("text", "we_take", "it_takes"),
    [
        (" {}", False, True),
        (f'{{"a":{{"dtype":"U8",{FIELDS}}},"a":{{"dtype":"I8",{FIELDS}}}}}', False, True),
        ('{"a":["U8",[0],[0,0]]}', False, True),
        (f'{{"a":{{"dtype":{{"U8":null}},{FIELDS}}}}}', False, True),
        (f'{{"a":{{"dtype":"U8","shape":{[0] * 65},"data_offsets":[0,0]}}}}', False, True),
        (f'{{"a":{{"dtype":"U8","shape":[{2**64 - 1},0],"data_offsets":[0,0]}}}}', False, True),
        (f'{{"a":{{"dtype":"U8",{FIELDS},"x":1e999}}}}', True, False),
        (f'{{"a":{{"dtype":"U8",{FIELDS},"x":{"[" * 130}{"]" * 130}}}}}', True, False),
        ('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', True, False),
    ],
)
def test_each_listed_difference(text: str, we_take: bool, it_takes: bool) -> None:
    data = safetensors(text.encode())
    assert isinstance(parse("m.safetensors", data), WeightLayout) == we_take
    assert (library_tensors(data) is not None) == it_takes


ANY_NAME = st.text(max_size=300) | st.text(st.sampled_from("./%~a\0\ud800ü2F"), max_size=400)


@given(st.lists(ANY_NAME, unique=True, min_size=2, max_size=6), st.sampled_from(["", ".npy"]))
@example(["", "%", ".", "..", "%2E", "%2E%2E", "/", "%2F"], "")
@example(["x" * 256, "x" * 257, encode_name("x" * 256)], "")
def test_encoded_names_are_unique_file_names(names: list[str], suffix: str) -> None:
    encoded = [encode_name(name, suffix) for name in names]
    assert len(set(encoded)) == len(names)
    for name in encoded:
        assert 1 <= len(name.encode()) <= 255
        assert name not in {".", ".."}
        assert not set(name) & {"/", "\0", "\n"}


FILE_NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["a", "a.gguf", "a-1-of-2", ""]),
    st.sampled_from(["", "-1-of-2", "-01-of-2", "-2-of-2", "-2-of-02", "-3-of-2", "-1-of-3"]),
    st.sampled_from([".safetensors", ".gguf", ".json"]),
)


@given(st.lists(FILE_NAMES, max_size=12), st.randoms())
def test_every_weight_file_is_in_one_set(names: list[str], random: Any) -> None:
    sets = group_shards(names)
    members = [file for files in sets.values() for file in files]
    assert sorted(members) == sorted(
        {n for n in names if not n.endswith(".json") and n not in {".gguf", ".safetensors"}}
    )
    shuffled = list(names)
    random.shuffle(shuffled)
    assert group_shards(shuffled) == sets


@given(
    st.binary(max_size=100) | st.builds(lambda value: json.dumps({"weight_map": value}).encode(), st.text() | st.none())
)
def test_arbitrary_weight_maps(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        parse_weight_map(data)
