from __future__ import annotations

import pytest

from tests.unit.formats.samples import Gguf, entry, reader, safetensors
from weightfs.errors import FormatError
from weightfs.formats import (
    WeightLayout,
    check_shards,
    format_of,
    group_shards,
    merge_shards,
    parse_header,
    parse_weight_map,
)
from weightfs.formats.shards import MAX_INDEX_BYTES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "safetensors"),
        ("a.gguf", "gguf"),
        ("dir/a.gguf", "gguf"),
        ("model.SAFETENSORS", None),
        ("model.safetensors.index.json", None),
        (".gguf", None),
        ("dir/.safetensors", None),
        ("gguf", None),
        ("", None),
    ],
)
def test_format_by_suffix(name: str, kind: str | None) -> None:
    assert format_of(name) == kind


def test_parse_header_refuses_other_files() -> None:
    with pytest.raises(ValueError, match="not a weight file"):
        parse_header("config.json", 2, reader(b"{}"))


@pytest.mark.parametrize(
    ("names", "sets"),
    [
        ([], {}),
        (["config.json", "model.safetensors"], {"model": ("model.safetensors",)}),
        (
            ["m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors", "m.safetensors.index.json"],
            {"m": ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")},
        ),
        (
            [f"m-{i}-of-11.gguf" for i in range(1, 12)],
            {"m": tuple(f"m-{i}-of-11.gguf" for i in range(1, 12))},
        ),
        (["m-00002-of-00003.gguf"], {"m": ("m-00002-of-00003.gguf",)}),
        # Not shards, whatever they look like.
        (["m-00000-of-00002.gguf"], {"m-00000-of-00002": ("m-00000-of-00002.gguf",)}),
        (["m-00003-of-00002.gguf"], {"m-00003-of-00002": ("m-00003-of-00002.gguf",)}),
        (["-1-of-2.gguf"], {"-1-of-2": ("-1-of-2.gguf",)}),
        (
            ["m-1-of-2.gguf", "m-01-of-2.gguf", "m-2-of-2.gguf"],
            {"m": ("m-01-of-2.gguf", "m-2-of-2.gguf"), "m-1-of-2": ("m-1-of-2.gguf",)},
        ),
        # Stems that collide.
        (["m.gguf", "m.safetensors"], {"m": ("m.safetensors",), "m.gguf": ("m.gguf",)}),
        (
            ["m.gguf", "m-1-of-1.safetensors"],
            {"m": ("m.gguf",), "m-1-of-1.safetensors": ("m-1-of-1.safetensors",)},
        ),
        (
            ["m-1-of-3.gguf", "m-1-of-2.gguf", "m-1-of-2.safetensors"],
            {
                "m": ("m-1-of-2.safetensors",),
                "m-1-of-2.gguf": ("m-1-of-2.gguf",),
                "m-1-of-3.gguf": ("m-1-of-3.gguf",),
            },
        ),
        (
            ["a.gguf", "a.safetensors", "a.gguf.safetensors"],
            {"a": ("a.safetensors",), "a.gguf": ("a.gguf",), "a.gguf.safetensors": ("a.gguf.safetensors",)},
        ),
    ],
)
def test_groups(names: list[str], sets: dict[str, tuple[str, ...]]) -> None:
    assert group_shards(names) == sets
    assert group_shards(reversed(names)) == sets
    assert list(group_shards(names)) == sorted(sets)


@pytest.mark.parametrize(
    "files", [(), ("m.gguf",), ("m-9-of-2.gguf",), ("m-1-of-1.gguf",), ("m-1-of-2.gguf", "m-2-of-2.gguf")]
)
def test_whole_sets(files: tuple[str, ...]) -> None:
    check_shards(files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("m-2-of-3.gguf", "m-3-of-3.gguf"), "1 of 3 shards of m.gguf are missing, the first is number 1"),
        (("m-1-of-3.gguf", "m-3-of-3.gguf"), "1 of 3 shards of m.gguf are missing, the first is number 2"),
        (("m-1-of-999999999.gguf",), "999999998 of 999999999 shards of m.gguf are missing, the first is number 2"),
    ],
)
def test_missing_shards(files: tuple[str, ...], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        check_shards(files)
    assert (caught.value.reason, caught.value.message) == ("missing-shard", message)


def test_the_weight_map() -> None:
    assert parse_weight_map(b'{"metadata":{"total_size":8},"weight_map":{"a":"x","b":"y"}}') == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "index-json"),
        (b"[]", "index-json"),
        (b"{}", "index-json"),
        (b'{"weight_map":{"a":1}}', "index-json"),
        (b'{"weight_map":{"a":"\xff"}}', "index-json"),
        (b'{"x":' + b"[" * 99999, "index-json"),
        (bytes(MAX_INDEX_BYTES + 1), "index-length"),
    ],
)
def test_bad_weight_maps(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_weight_map(data)
    assert caught.value.reason == reason


def shard(file: str, *names: str, metadata: dict[str, str] | None = None) -> WeightLayout:
    tensors = {name: entry("U8", [1], index, index + 1) for index, name in enumerate(names)}
    data = safetensors({"__metadata__": metadata or {}, **tensors}, len(names))
    return parse_header(file, len(data), reader(data))


A, B = "m-1-of-2.safetensors", "m-2-of-2.safetensors"


def test_merging() -> None:
    merged = merge_shards(
        [shard(A, "z", "y", metadata={"format": "pt", "x": "1"}), shard(B, "a", metadata={"x": "2", "w": "3"})], None
    )
    assert (merged.format, merged.files, merged.nbytes) == ("safetensors", (A, B), 3)
    assert [(tensor.name, tensor.file) for tensor in merged.tensors] == [("z", A), ("y", A), ("a", B)]
    assert merged.metadata == {"format": "pt", "x": "1", "w": "3"}


def test_the_weight_map_decides_between_duplicates() -> None:
    layouts = [shard(A, "a", "b"), shard(B, "b", "c", "a")]
    merged = merge_shards(layouts, {"a": A, "b": B, "c": B, "d": "m-3-of-3.safetensors"})
    assert [(tensor.name, tensor.file) for tensor in merged.tensors] == [("a", A), ("b", B), ("c", B)]


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (None, "duplicate-tensor"),
        ({}, "duplicate-tensor"),
        ({"b": "elsewhere"}, "duplicate-tensor"),
        ({"b": A, "x": B}, "missing-tensor"),
        ({"b": A, "c": A}, "missing-tensor"),
    ],
)
def test_what_the_weight_map_can_not_mend(weight_map: dict[str, str] | None, reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        merge_shards([shard(A, "a", "b"), shard(B, "b", "c")], weight_map)
    assert caught.value.reason == reason


def test_sets_are_of_one_format_and_byte_order() -> None:
    little, big = (parse_header("m.gguf", len(data), reader(data)) for data in (Gguf().file(), Gguf(">").file()))
    assert merge_shards([big, big], None).byte_order == "big"
    for pair in ([little, big], [little, shard(A)]):
        with pytest.raises(FormatError) as caught:
            merge_shards(pair, None)
        assert caught.value.reason == "mixed-set"
