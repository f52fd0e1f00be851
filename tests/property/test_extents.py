"""Recipes come back as they were coded, parts of them are the bytes they cover, and other bytes are a CorruptError."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import CorruptError
from checkpoint.extents import ChunkBytes, Extent, Recipe, WeightBytes, Zero, decode, encode

WEIGHTS = (1 << 40, 70_000, 5)
IDS = [bytes([number]) * 32 for number in range(5)]
lengths = st.one_of(st.integers(1, 20_000), st.integers(1, 40).map(lambda pages: pages * 4096))


@st.composite
def weight_bytes(draw: st.DrawFn) -> WeightBytes:
    file = draw(st.integers(0, len(WEIGHTS) - 1))
    nbytes = min(draw(lengths), WEIGHTS[file])
    return WeightBytes(file, draw(st.integers(0, WEIGHTS[file] - nbytes)), nbytes)


extents: st.SearchStrategy[Extent] = st.one_of(
    st.builds(Zero, lengths),
    weight_bytes(),
    st.builds(ChunkBytes, st.sampled_from(IDS), lengths, st.integers(0, 1 << 20)),
)
names = st.from_regex(r"\A[a-z][a-z0-9.-]{0,8}\Z")
recipes = st.dictionaries(names, st.lists(extents, max_size=12).map(Recipe), max_size=4)


@given(recipes)
def test_what_was_coded_comes_back(given_recipes: dict[str, Recipe]) -> None:
    coded = encode(given_recipes)
    found = decode(coded, "recipes", weights=WEIGHTS)
    assert found == given_recipes
    assert list(found) == list(given_recipes)
    assert encode(found) == coded


def small(extent: Extent) -> bytes:
    """Bytes that differ wherever extents differ."""
    if isinstance(extent, Zero):
        return bytes(extent.nbytes)
    if isinstance(extent, WeightBytes):
        return bytes((extent.file * 50 + at) % 251 + 1 for at in range(extent.offset, extent.offset + extent.nbytes))
    return bytes((extent.id[0] * 7 + at) % 241 + 10 for at in range(extent.at, extent.at + extent.nbytes))


tiny = st.one_of(
    st.builds(Zero, st.integers(1, 9)),
    st.builds(WeightBytes, st.integers(0, 2), st.integers(0, 90), st.integers(1, 9)),
    st.builds(ChunkBytes, st.sampled_from(IDS), st.integers(1, 9), st.integers(0, 9)),
)


@given(st.lists(tiny, max_size=9).map(Recipe), st.integers(0, 80), st.integers(0, 80))
def test_a_part_is_the_bytes_it_covers(recipe: Recipe, one: int, other: int) -> None:
    whole = b"".join(map(small, recipe.extents))
    assert recipe.nbytes == len(whole)
    start, end = sorted((one, other))
    if end > len(whole):
        with pytest.raises(ValueError, match="of a file of"):
            recipe.part(start, end)
    else:
        part = recipe.part(start, end)
        assert b"".join(map(small, part)) == whole[start:end]
        assert Recipe(part).nbytes == end - start


@given(recipes, st.data())
def test_damage_is_told_or_makes_other_recipes_that_are_sound(
    given_recipes: dict[str, Recipe], data: st.DataObject
) -> None:
    coded = bytearray(encode(given_recipes))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(coded) - 1))
        coded[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not coded:
            break
    sound_or_corrupt(bytes(coded))


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: b"wfrcp\x01" + tail)))
def test_any_bytes_are_recipes_or_corrupt(content: bytes) -> None:
    sound_or_corrupt(content)


def sound_or_corrupt(content: bytes) -> None:
    try:
        found = decode(content, "recipes", weights=WEIGHTS)
    except CorruptError as e:
        assert e.path == "recipes"
        assert e.mend
        return
    assert decode(encode(found), "recipes", weights=WEIGHTS) == found
    for recipe in found.values():
        for extent in recipe.extents:
            assert extent.nbytes > 0
            if isinstance(extent, WeightBytes):
                assert 0 <= extent.offset <= extent.offset + extent.nbytes <= WEIGHTS[extent.file]
            if isinstance(extent, ChunkBytes):
                assert len(extent.id) == 32
                assert extent.at >= 0


@given(recipes)
def test_every_shorter_one_is_corrupt(given_recipes: dict[str, Recipe]) -> None:
    coded = encode(given_recipes)
    for end in range(0, len(coded), max(1, len(coded) // 50)):
        with pytest.raises(CorruptError):
            decode(coded[:end], "recipes", weights=WEIGHTS)
    with pytest.raises(CorruptError, match="goes on"):
        decode(coded + b"\0", "recipes", weights=WEIGHTS)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"wfrcp\x02", "no recipes that this version reads"),
        (b"wfrcp\x01" + b"\xff\xff\xff\xff\x0f", "ends before"),
        (b"wfrcp\x01\x02" + bytes(64) + b"\0", "twice"),
        (b"wfrcp\x01\0\xff\xff\x03", "ends before"),
        (b"wfrcp\x01\0\x01\x04core\x00\x00", "goes on"),
        (b"wfrcp\x01\0\x01\x03../\x00", "no image's name"),
        (b"wfrcp\x01\0\x02\x01a\x00\x01a\x00", "no image's name or has one"),
        (b"wfrcp\x01\0\x01\x01a\x01\x00", "an extent of 0 bytes"),
        (b"wfrcp\x01\0\x01\x01a\x01\x0b", "no known kind"),
        (b"wfrcp\x01\0\x01\x01a\x01\x09\x07\x00", "weight file 7 of 3"),
        (b"wfrcp\x01\0\x01\x01a\x01\x31\x02\x00", "needs 6 bytes from 0 on of a weight file of 5"),
        (b"wfrcp\x01\0\x01\x01a\x01\x09\x02\x01", "from -1 on"),
        (b"wfrcp\x01\0\x01\x01a\x01\x0a\x00\x00", "chunk 0 of 0"),
        (b"wfrcp\x01\0\x01\x01a\x01" + b"\xff" * 10 + b"\x01", "does not end"),
        (b"wfrcp\x01\0\x01\x01a\x01" + b"\xf8" + b"\xff" * 8 + b"\x01", "an extent of"),
        (b"wfrcp\x01\0\x01\x01a\x01" + b"\xff" * 9 + b"\x02", "does not end"),
        (b"wfrcp\x01\0\x01\x01a\x03" + (b"\x80" * 8 + b"\x40") * 3, "a recipe for"),
        (b"wfrcp\x01\x01" + bytes(32) + b"\x01\x01a\x01\x0a\x00" + b"\xff" * 8 + b"\x7f", "a chunk from"),
    ],
)
def test_what_is_wrong_is_said(content: bytes, what: str) -> None:
    with pytest.raises(CorruptError, match=what):
        decode(content, "recipes", weights=WEIGHTS)


def test_promises_cost_no_memory() -> None:
    content = b"wfrcp\x01\0\x01\x01a" + b"\xff\xff\xff\xff\x7f" + bytes(100)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="ends before"):
            decode(content, "recipes", weights=WEIGHTS)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_what_goes_on_where_it_stopped_takes_few_bytes() -> None:
    ids = [number.to_bytes(32, "big") for number in range(3000)]
    chunks = [ChunkBytes(one, 256 << 10) for one in ids]
    weights = [WeightBytes(0, number << 21, 2 << 20) for number in range(3000)]
    mixed: list[Extent] = [extent for pair in zip(chunks, weights, strict=True) for extent in pair]
    coded = encode({"pages-1.img": Recipe(mixed)})
    assert len(coded) < 3000 * (32 + 4 + 4) + 100


def test_what_is_no_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="no bytes"):
        Recipe([Zero(4), Zero(0)])
    with pytest.raises(ValueError, match="32 bytes"):
        encode({"a": Recipe([ChunkBytes(b"short", 1)])})
    with pytest.raises(ValueError, match="no image's name"):
        encode({"../a": Recipe()})


def test_chunks_come_once_in_order() -> None:
    recipe = Recipe([ChunkBytes(IDS[2], 5), Zero(1), ChunkBytes(IDS[0], 5), ChunkBytes(IDS[2], 5, 9)])
    assert list(recipe.chunks()) == [IDS[2], IDS[0]]
    assert hash(recipe) == hash(Recipe(recipe.extents))
    assert recipe != Recipe()
    assert recipe != 3
    assert repr(Recipe([Zero(1)])) == "Recipe([Zero(nbytes=1)])"
