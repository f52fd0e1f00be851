"""Recipes in a store: bound to their snapshot, read through page images, and what else a restore looks at."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoint import scratch
from checkpoint.ahead import weight_runs
from checkpoint.chunks.keys import MasterKey
from checkpoint.contents import Contents, Vault, key_id
from checkpoint.digests import Identity
from checkpoint.errors import CheckpointError, CorruptError, MisfitError
from checkpoint.extents import ChunkBytes, Extent, Recipe, WeightBytes, Zero
from checkpoint.generations import Generations
from checkpoint.laying import LaidOut
from checkpoint.pages import BATCH_BYTES, LEAST_ZERO_BYTES, RecipePages, Sources
from checkpoint.scratch import Scratch
from checkpoint.shelf import CHUNKS, CHUNKS_OPEN
from checkpoint.store import Store
from tests.helpers.snapshots import IMAGES, add, add_chunked

PAGE = 4096
KEY = MasterKey(secret=bytes(range(32)))
OTHER = MasterKey(secret=bytes(32))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("master", [None, KEY])
def test_recipes_come_back_as_they_were_stored(store: Store, master: MasterKey | None) -> None:
    made = add_chunked(store, "warm", master=master, serial=7)
    assert sorted(os.listdir(made.folder)) == ["manifest.json", "recipes"]
    assert os.path.isdir(os.path.join(store.path, CHUNKS if master else CHUNKS_OPEN))
    found = Vault(store.path, master).open(store.open("warm"))
    assert found.generation == 7
    assert {name: recipe.nbytes for name, recipe in found.recipes.items()} == {
        name: len(content) for name, content in IMAGES.items()
    }
    assert made.bytes_stored > made.manifest.bytes_added > 0
    assert store.verify("warm", master).manifest == made.manifest
    assert store.list()[0].fault is None
    assert key_id(made) == (master.id.hex() if master else "")


def test_the_key_must_be_the_one(store: Store) -> None:
    add_chunked(store, "sealed", master=KEY)
    add_chunked(store, "open")
    add(store, "plain")
    for name, master in (("sealed", None), ("sealed", OTHER), ("open", KEY), ("plain", KEY)):
        with pytest.raises(CorruptError, match="encrypted"):
            store.verify(name, master)
    with pytest.raises(CorruptError):
        Vault(store.path, OTHER).require_fit()
    Vault(store.path, KEY).require_fit()
    Vault(str(Path(store.path).parent / "none"), KEY).require_fit()


@pytest.mark.parametrize("name", ["manifest.json", "recipes"])
@pytest.mark.parametrize("master", [None, KEY])
def test_what_is_bound_together_is_not_mixed(store: Store, master: MasterKey | None, name: str) -> None:
    one, other = (add_chunked(store, each, master=master) for each in ("one", "other"))
    shutil.copy(os.path.join(other.folder, name), os.path.join(one.folder, name))
    with pytest.raises(CorruptError):
        store.verify("one", master)
    shutil.rmtree(one.folder)
    os.rename(other.folder, one.folder)
    with pytest.raises(CorruptError):
        store.verify("one", master)


def test_what_no_snapshot_needs_is_collected(store: Store) -> None:
    generator = random.Random(5)
    shared = generator.randbytes(1 << 18)
    for name in ("one", "other"):
        add_chunked(store, name, master=KEY, images={"pages-1.img": shared + generator.randbytes(1 << 19)})
    add(store, "plain")
    assert store.collect(KEY).freed_nbytes == 0
    store.remove("one")
    assert store.collect(KEY).freed_nbytes >= 1 << 19
    store.verify("other", KEY)
    with pytest.raises(CorruptError):
        store.collect(OTHER)
    store.verify("other", KEY)
    assert store.collect(None).freed_nbytes == 0, "there are none"


def test_nothing_is_collected_while_it_is_not_known_what_is_needed(store: Store) -> None:
    made = add_chunked(store, "one", master=KEY)
    add_chunked(store, "other", master=KEY)
    store.remove("other")
    path = Path(made.recipes)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptError):
        store.collect(KEY)
    path.write_bytes(content)
    store.verify("one", KEY)


class Chunks:
    """Chunks in memory."""

    def __init__(self, **content: bytes) -> None:
        self.content = {name.encode().ljust(32): each for name, each in content.items()}
        self.asked: list[bytes] = []

    def get(self, id_: bytes, /) -> bytes:
        self.asked.append(id_)
        return self.content[id_]

    @contextlib.contextmanager
    def opened(self, ids: Sequence[bytes], /) -> Iterator[list[Any]]:
        yield [self.get(id_) for id_ in ids]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "w.safetensors"
    path.write_bytes(random.Random(1).randbytes(1 << 20))
    return str(path)


def test_a_recipe_is_read_anywhere(weights: str) -> None:
    generator = random.Random(2)
    chunks = Chunks(a=generator.randbytes(100_000), b=generator.randbytes(5000))
    a, b = chunks.content
    extents: list[Extent] = [
        Zero(PAGE),
        ChunkBytes(a, 60_000, 7),
        WeightBytes(0, 12_345, 300_000),
        ChunkBytes(b, 5000),
        Zero(123),
    ]
    whole = b"".join(
        (
            bytes(PAGE),
            chunks.content[a][7:60_007],
            Path(weights).read_bytes()[12_345:312_345],
            chunks.content[b],
            bytes(123),
        )
    )
    with Sources({weights: Identity.of(os.stat(weights))}, chunks) as sources:
        image = RecipePages("pages-1.img", Recipe(extents), sources)
        for _ in range(200):
            start = generator.randrange(len(whole))
            end = generator.randrange(start, len(whole)) + 1
            view = memoryview(bytearray(b"x" * (end - start)))
            image.read(view, start)
            assert view == whole[start:end]
        with pytest.raises(CorruptError):
            image.read(memoryview(bytearray(2)), len(whole) - 1)
        chunks.asked.clear()
        for at in range(PAGE, PAGE + 10_000, 1000):
            image.read(memoryview(bytearray(1000)), at)
        assert len(chunks.asked) <= 1, "a thread remembers its last chunk"


def test_parts_are_the_same_bytes(weights: str) -> None:
    """Each where it lies: weights in their file's mapping, chunks as they were opened; zeros nowhere."""
    generator = random.Random(4)
    chunks = Chunks(a=generator.randbytes(3 * PAGE), b=generator.randbytes(BATCH_BYTES))
    a, b = chunks.content
    extents: list[Extent] = [
        ChunkBytes(a, 2 * PAGE, PAGE),
        Zero(PAGE),
        ChunkBytes(b, BATCH_BYTES),
        ChunkBytes(a, PAGE),
        WeightBytes(0, 77, 9 * PAGE),
        WeightBytes(0, 5, 3 * PAGE),
        Zero(5 * PAGE),
        ChunkBytes(a, 3 * PAGE),
        ChunkBytes(a, 3),
    ]
    with Sources({weights: Identity.of(os.stat(weights))}, chunks) as sources:
        image = RecipePages("pages-1.img", Recipe(extents), sources)
        whole = memoryview(bytearray(sum(one.nbytes for one in extents)))
        image.read(whole, 0)
        pages = len(whole) // PAGE
        for _ in range(100):
            start = generator.randrange(pages) * PAGE
            end = generator.randrange(start // PAGE, pages) * PAGE + PAGE
            at = start
            for part in image.parts(start, end - start):
                wanted = whole[at : at + part.nbytes]
                assert part.nbytes % PAGE == 0
                if part.is_zero:
                    assert not any(wanted)
                elif part.address is not None:
                    assert ctypes.string_at(part.address, part.nbytes) == wanted
                at += part.nbytes
            assert at == end
        assert [part.address for part in image.parts(0, len(whole))][-1] is None, "has to be read: it is no whole page"
        with pytest.raises(CorruptError):
            list(image.parts(0, len(whole) + PAGE))


def test_parts_of_a_chunk_that_is_too_short() -> None:
    chunks = Chunks(a=bytes(range(200)) * 21)
    (a,) = chunks.content
    image = RecipePages("pages-1.img", Recipe([ChunkBytes(a, 2 * PAGE)]), Sources({}, chunks))
    with pytest.raises(CorruptError):
        list(image.parts(0, 2 * PAGE))


def test_parts_of_weights_that_changed(weights: str) -> None:
    identity = Identity.of(os.stat(weights))
    os.utime(weights, ns=(1, 1))
    with Sources({weights: identity}, Chunks()) as sources:
        image = RecipePages("pages-1.img", Recipe([WeightBytes(0, 0, PAGE)]), sources)
        with pytest.raises(CorruptError, match="changed"):
            list(image.parts(0, PAGE))


def test_long_zeros_are_told_of() -> None:
    id_ = b"i" * 32
    recipe = Recipe(
        [Zero(LEAST_ZERO_BYTES), ChunkBytes(id_, PAGE), Zero(PAGE), ChunkBytes(id_, PAGE), Zero(2 * LEAST_ZERO_BYTES)]
    )
    image = RecipePages("pages-1.img", recipe, Sources({}, Chunks()))
    assert image.zeros(0, recipe.nbytes) == (True, LEAST_ZERO_BYTES)
    assert image.zeros(LEAST_ZERO_BYTES, 3 * PAGE) == (False, 3 * PAGE)
    assert image.zeros(LEAST_ZERO_BYTES, recipe.nbytes - LEAST_ZERO_BYTES) == (False, 3 * PAGE)
    assert image.zeros(LEAST_ZERO_BYTES + 3 * PAGE, LEAST_ZERO_BYTES) == (True, LEAST_ZERO_BYTES)
    odd = RecipePages("pages-1.img", Recipe([Zero(LEAST_ZERO_BYTES + 1), Zero(PAGE - 1)]), Sources({}, Chunks()))
    assert odd.zeros(0, LEAST_ZERO_BYTES + PAGE) == (False, LEAST_ZERO_BYTES + PAGE)


def test_a_chunk_that_is_too_short(weights: str) -> None:
    chunks = Chunks(a=b"short")
    (a,) = chunks.content
    image = RecipePages("pages-1.img", Recipe([ChunkBytes(a, PAGE)]), Sources({}, chunks))
    with pytest.raises(CorruptError):
        image.read(memoryview(bytearray(PAGE)), 0)


def test_weights_that_changed_are_not_read(weights: str) -> None:
    identity = Identity.of(os.stat(weights))
    os.utime(weights, ns=(1, 1))
    image = RecipePages("pages-1.img", Recipe([WeightBytes(0, 0, PAGE)]), Sources({weights: identity}, Chunks()))
    with pytest.raises(CorruptError, match="changed"):
        image.read(memoryview(bytearray(PAGE)), 0)
    os.unlink(weights)
    image = RecipePages("pages-1.img", Recipe([WeightBytes(0, 0, PAGE)]), Sources({weights: identity}, Chunks()))
    with pytest.raises(CorruptError):
        image.read(memoryview(bytearray(PAGE)), 0)


def test_the_parts_of_weights_that_are_needed() -> None:
    recipes = {
        "pages-1.img": Recipe([WeightBytes(1, 100, 50), Zero(4), WeightBytes(0, 0, 10), WeightBytes(1, 10, 20)]),
        "pages-2.img": Recipe([WeightBytes(1, 150, 5), WeightBytes(1, 28, 10)]),
    }
    assert weight_runs(recipes) == {0: [(0, 10)], 1: [(10, 38), (100, 155)]}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Scratch]:
    if os.geteuid():
        pytest.skip("this machine lacks root for the tests")
    with Scratch(str(tmp_path / "images"), nbytes=16 << 20, must_not_swap=False) as made:
        yield made


def test_a_scratch_folder_is_nobody_elses(folder: Scratch) -> None:
    path = os.path.join(folder.path, "core-1.img")
    Path(path).write_bytes(b"registers")
    assert os.listdir(folder.fd) == ["core-1.img"]
    assert os.stat(folder.fd).st_mode & 0o777 == 0o700
    mounted = Path("/proc/self/mountinfo").read_text()
    assert f":{os.minor(os.fstat(folder.fd).st_dev)} " not in mounted or "weightfs-images" not in mounted
    folder.close()
    assert not os.path.exists(path)
    folder.close()


def test_a_scratch_folder_has_bounds(folder: Scratch) -> None:
    with pytest.raises(OSError, match="No space"):
        Path(folder.path, "pages-1.img").write_bytes(bytes(17 << 20))


def test_what_must_not_swap_where_that_can_not_be_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("this machine lacks root for the tests")
    call = scratch._call

    def old_kernel(number: int, *arguments: object) -> int:
        if b"noswap" in arguments:
            raise OSError(22, "Invalid argument")
        return call(number, *arguments)

    monkeypatch.setattr(scratch, "_call", old_kernel)
    monkeypatch.setattr(scratch, "has_swap", lambda: False)
    Scratch(str(tmp_path / "without"), nbytes=1 << 20, must_not_swap=True).close()
    monkeypatch.setattr(scratch, "has_swap", lambda: True)
    with pytest.raises(MisfitError, match="swap"):
        Scratch(str(tmp_path / "with"), nbytes=1 << 20, must_not_swap=True)
    Scratch(str(tmp_path / "open"), nbytes=1 << 20, must_not_swap=False).close()


def test_swap_is_seen(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n")
    assert not scratch.has_swap(str(swaps))
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/vda2 partition 1 0 -2\n")
    assert scratch.has_swap(str(swaps))
    assert scratch.has_swap(str(tmp_path / "none")), "where it can't be told, there is some"


def test_what_is_filled_in_later_is_not_laid_out(folder: Scratch, weights: str) -> None:
    generator = random.Random(3)
    chunks = Chunks(a=generator.randbytes(16 * PAGE))
    (a,) = chunks.content
    recipes = {
        "core-1.img": Recipe([ChunkBytes(a, 100)]),
        "pages-1.img": Recipe([ChunkBytes(a, 16 * PAGE), Zero(LEAST_ZERO_BYTES), WeightBytes(0, 5, 16 * PAGE)]),
    }
    with Sources({weights: Identity.of(os.stat(weights))}, chunks) as sources:
        laid = LaidOut(Contents(generation=1, recipes=recipes), sources, folder, threads=2)
        pages = Path(laid.images, "pages-1.img")
        assert Path(laid.images, "core-1.img").read_bytes() == chunks.content[a][:100]
        assert pages.read_bytes() == bytes(recipes["pages-1.img"].nbytes), "it is there, and sparse"
        lazy = [(0, 2 * PAGE), (4 * PAGE, 48 * PAGE)]
        laid.complete({str(pages): lazy})
        expected = chunks.content[a] + bytes(LEAST_ZERO_BYTES) + Path(weights).read_bytes()[5 : 5 + 16 * PAGE]
        content = bytearray(expected)
        for start, end in lazy:
            content[start:end] = bytes(end - start)
        assert pages.read_bytes() == content[: len(expected)]
        laid.complete({})
        assert pages.read_bytes() == expected


def test_generations(tmp_path: Path) -> None:
    seen = Generations(str(tmp_path), b"k" * 32)
    first = seen.next("warm")
    seen.note("warm", first)
    assert seen.next("warm") > first
    seen.require_newest("warm", first, "/store/warm")
    seen.note("warm", first + 5)
    with pytest.raises(CorruptError, match="older") as caught:
        seen.require_newest("warm", first, "/store/warm")
    seen.note("warm", first)
    assert seen.next("warm") > first + 5
    seen.require_newest("other", 1, "/store/other")
    Generations(str(tmp_path), b"o" * 32).require_newest("warm", 1, "/another")
    noted = Path(str(caught.value.mend).rpartition(" ")[2])
    noted.write_text("nonsense")
    with pytest.raises(CheckpointError):
        seen.next("warm")
    noted.unlink()
    seen.require_newest("warm", first, "/store/warm")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        Generations(str(tmp_path / "file"), b"k" * 32).note("warm", 1)
