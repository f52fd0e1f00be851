"""Images made by hand: what of them is found in weight files, what is zeros, and what becomes chunks."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import blake3
import numpy as np
import pytest

from checkpoint.errors import CheckpointError, RetryError
from checkpoint.extents import ChunkBytes, Extent, Recipe, WeightBytes, Zero
from checkpoint.ingest import MOST_CHUNK_BYTES, ingest
from checkpoint.weightfinding import SHORTEST_BYTES, Anchors, WeightFile, opened

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
rng = np.random.default_rng(3)


class Chunks:
    """Takes chunks as a store would."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.threads: set[int] = set()

    def add(self, content: memoryview) -> bytes:
        found = bytes(content)
        self.threads.add(threading.get_ident())
        identifier = blake3.blake3(found).digest()
        self.held[identifier] = found
        return identifier


def noise(nbytes: int) -> bytes:
    return rng.bytes(nbytes)


def bfloats(count: int) -> bytes:
    """Weights as they are: few different values of the upper byte."""
    return (rng.normal(0, 0.02, count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def safetensors(path: Path, tensors: Mapping[str, bytes], *, padding: int = 0) -> dict[str, int]:
    """Write a file of BF16 tensors; gives their offsets."""
    at, entries = 0, {}
    for name, content in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": [len(content) // 2], "data_offsets": [at, at + len(content)]}
        at += len(content)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 16 + 8 + padding)  # so that data begins at a multiple of 16, and some
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(tensors.values()))
    offsets, at = {}, 8 + len(header)
    for name, content in tensors.items():
        offsets[name] = at
        at += len(content)
    return offsets


def taken_in(image: bytes, weights: list[Path], tmp_path: Path, *, threads: int = 2) -> Recipe:
    """The recipe, after everything that must hold of any recipe."""
    path = tmp_path / "pages-1.img"
    path.write_bytes(image)
    chunks = Chunks()
    with opened(map(str, weights)) as files:
        recipe = ingest(str(path), Anchors(files, threads=threads), chunks.add, threads=threads)
    assert again(recipe, weights, chunks) == image
    for extent in recipe.extents:
        if isinstance(extent, ChunkBytes):
            assert extent.at == 0
            assert extent.nbytes == len(chunks.held[extent.id]) <= MOST_CHUNK_BYTES
        else:
            assert extent.nbytes % PAGE == 0
        if isinstance(extent, WeightBytes):
            assert extent.nbytes >= SHORTEST_BYTES
    return recipe


def again(recipe: Recipe, weights: list[Path], chunks: Chunks) -> bytes:
    def content(extent: Extent) -> bytes:
        if isinstance(extent, Zero):
            return bytes(extent.nbytes)
        if isinstance(extent, WeightBytes):
            with open(weights[extent.file], "rb") as file:
                return os.pread(file.fileno(), extent.nbytes, extent.offset)
        return chunks.held[extent.id][extent.at : extent.at + extent.nbytes]

    return b"".join(map(content, recipe.extents))


def found(recipe: Recipe) -> list[tuple[int, int, int, int]]:
    """Weights: place in the image, file, offset, length."""
    at, matches = 0, []
    for extent in recipe.extents:
        if isinstance(extent, WeightBytes):
            matches.append((at, extent.file, extent.offset, extent.nbytes))
        at += extent.nbytes
    return matches


def weight_bytes(recipe: Recipe) -> int:
    return sum(length for _, _, _, length in found(recipe))


def test_tensors_at_pages_are_found_whole(tmp_path: Path) -> None:
    tensors = {"a": bfloats(300 * KIB), "b": bfloats(64 * KIB), "c": bfloats(3 * MIB)}
    offsets = safetensors(tmp_path / "m.safetensors", tensors)
    image = noise(5 * PAGE) + tensors["c"] + noise(PAGE) + tensors["a"] + tensors["b"] + noise(3 * PAGE)
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    c, a = 5 * PAGE, 6 * PAGE + len(tensors["c"])
    # a and b lie side by side here as there, so they are one.
    assert found(recipe) == [
        (c, 0, offsets["c"], len(tensors["c"])),
        (a, 0, offsets["a"], len(tensors["a"] + tensors["b"])),
    ]


@pytest.mark.parametrize("shift", [8, 16, 32, 64, 512, 4088])
@pytest.mark.parametrize("padding", [0, 8])
def test_tensors_within_pages_are_found_but_for_their_first_and_last(tmp_path: Path, shift: int, padding: int) -> None:
    """As malloc places them: behind its own 16 bytes, or at a multiple of 64."""
    tensor = bfloats(500 * KIB)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": noise(MIB), "b": tensor}, padding=padding)
    image = noise(3 * PAGE + shift) + tensor + noise(2 * PAGE - shift)
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    assert found(recipe) == [(4 * PAGE, 0, offsets["b"] + PAGE - shift, len(tensor) - PAGE)]


@pytest.mark.parametrize("shift", [1, 2, 4, 12])
def test_what_no_allocator_does_stays_chunks(tmp_path: Path, shift: int) -> None:
    tensor = bfloats(500 * KIB)
    safetensors(tmp_path / "m.safetensors", {"b": tensor})
    image = noise(3 * PAGE + shift) + tensor + noise(2 * PAGE - shift)
    assert found(taken_in(image, [tmp_path / "m.safetensors"], tmp_path)) == []


@pytest.mark.parametrize("padding", [0, 2, 3, 8])
def test_a_whole_file_is_found(tmp_path: Path, padding: int) -> None:
    """Read into one buffer: header, small tensors and all."""
    tensors = {f"t{number}": bfloats(int(size)) for number, size in enumerate(rng.integers(1, 90_000, 100) // 8 * 8)}
    file = tmp_path / "m.safetensors"
    safetensors(file, tensors, padding=padding)
    content = file.read_bytes()
    image = noise(PAGE) + noise(16) + content + noise(-(len(content) + 16) % PAGE) + noise(PAGE)
    recipe = taken_in(image, [file], tmp_path)
    assert found(recipe) == [(2 * PAGE, 0, PAGE - 16, (len(content) - PAGE + 16) // PAGE * PAGE)]


def test_slices_are_found_from_their_first_byte(tmp_path: Path) -> None:
    """Rows of a tensor, as tensor parallelism shares them out; no slice begins at an anchor."""
    tensor = bfloats(4 * MIB)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": tensor})
    start, nbytes = 123 * 1040, 900 * 1040
    image = noise(PAGE) + tensor[start : start + nbytes] + noise(-nbytes % PAGE)
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    assert found(recipe) == [(PAGE, 0, offsets["a"] + start, nbytes // PAGE * PAGE)]


def test_a_tensor_split_over_mappings_is_found_in_each(tmp_path: Path) -> None:
    tensor = bfloats(2 * MIB)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": tensor})
    image = tensor[2 * MIB :] + noise(7 * PAGE) + tensor[: 2 * MIB]
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    second = 2 * MIB + 7 * PAGE
    assert found(recipe) == [(0, 0, offsets["a"] + 2 * MIB, 2 * MIB), (second, 0, offsets["a"], 2 * MIB)]


def test_fused_tensors_are_several(tmp_path: Path) -> None:
    """QKV: each is where it was not, beside what it was not beside of; of a page with two, one chunk."""
    names = ("q", "k", "v")
    sizes = (200 * KIB, 100 * KIB + 32, 100 * KIB)
    tensors = dict(zip(names, map(bfloats, sizes), strict=True))
    laid = {"k": tensors["k"], "x": bfloats(KIB), "v": tensors["v"], "y": bfloats(MIB), "q": tensors["q"]}
    offsets = safetensors(tmp_path / "m.safetensors", laid)
    fused = b"".join(tensors[name] for name in names)
    recipe = taken_in(fused + noise(-len(fused) % PAGE), [tmp_path / "m.safetensors"], tmp_path)
    q, k = len(tensors["q"]), len(tensors["k"])
    assert found(recipe) == [
        (0, 0, offsets["q"], q),
        (q, 0, offsets["k"], k // PAGE * PAGE),
        (q + k // PAGE * PAGE + PAGE, 0, offsets["v"] + PAGE - k % PAGE, len(tensors["v"]) - PAGE),
    ]


def test_what_was_changed_stays_chunks(tmp_path: Path) -> None:
    """Another dtype, columns, a transposed tensor, what is short."""
    tensor = bfloats(MIB)
    safetensors(tmp_path / "m.safetensors", {"a": tensor})
    as_bf16 = np.frombuffer(tensor, dtype=np.uint16)
    cast = (as_bf16.astype(np.uint32) << 16).view(np.float32).astype(np.float16).tobytes()
    table = as_bf16.reshape(1024, 1024)
    columns, transposed = table[:, :512].tobytes(), table.T.tobytes()
    short = tensor[: SHORTEST_BYTES - PAGE]
    image = cast + noise(PAGE) + columns + noise(PAGE) + transposed + noise(PAGE) + short + noise(PAGE)
    assert found(taken_in(image, [tmp_path / "m.safetensors"], tmp_path)) == []


def test_a_page_written_to_splits_a_run(tmp_path: Path) -> None:
    tensor = bfloats(2 * MIB)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": tensor})
    image = bytearray(tensor)
    image[777 * PAGE + 5] ^= 1
    recipe = taken_in(bytes(image), [tmp_path / "m.safetensors"], tmp_path)
    assert found(recipe) == [
        (0, 0, offsets["a"], 777 * PAGE),
        (778 * PAGE, 0, offsets["a"] + 778 * PAGE, len(tensor) - 778 * PAGE),
    ]


def test_weights_that_repeat_are_found_where_they_differ(tmp_path: Path) -> None:
    """Rows of zeros, of ones, and of one pattern: bytes that many places have lead nowhere, and nothing astray."""
    ones, pattern = b"\x80\x3f" * (100 * KIB), noise(64) * (4 * KIB)
    tensor = bfloats(MIB) + bytes(200 * KIB) + ones + bfloats(MIB) + pattern + bfloats(MIB)
    offsets = safetensors(tmp_path / "m.safetensors", {"ones": ones, "a": tensor, "pattern": pattern})
    image = noise(PAGE) + ones + noise(PAGE) + tensor + noise(-(len(ones) + len(tensor)) % PAGE)
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    assert (2 * PAGE + len(ones), 0, offsets["a"], len(tensor) // PAGE * PAGE) in found(recipe)


def test_a_file_that_two_names_have_is_found(tmp_path: Path) -> None:
    tensor = bfloats(6 * MIB)
    for name in ("a.safetensors", "b.safetensors"):
        offsets = safetensors(tmp_path / name, {"a": tensor, "tied": tensor})
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    recipe = taken_in(noise(PAGE) + tensor + noise(PAGE), paths, tmp_path)
    assert found(recipe) == [(PAGE, 0, offsets["a"], len(tensor))]


def test_files_are_numbered_as_given(tmp_path: Path) -> None:
    one, other = bfloats(MIB), bfloats(MIB)
    safetensors(tmp_path / "a.safetensors", {"a": one})
    offsets = safetensors(tmp_path / "b.safetensors", {"b": other})
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert found(taken_in(other, paths, tmp_path)) == [(0, 1, offsets["b"], len(other))]


@pytest.mark.parametrize("name", ["m.bin", "broken.safetensors", "broken.gguf"])
def test_a_file_without_a_header_is_found_all_the_same(tmp_path: Path, name: str) -> None:
    content = noise(MIB)
    (tmp_path / name).write_bytes(content)
    assert found(taken_in(content, [tmp_path / name], tmp_path)) == [(0, 0, 0, MIB)]


@pytest.mark.parametrize("at", range(0, 5 * MIB, 7 * 13 * PAGE + PAGE))
def test_runs_are_whole_wherever_pieces_end(tmp_path: Path, at: int) -> None:
    """Pieces of 4 MiB are looked through apart; a run of 64 KiB across their edge is one."""
    tensor, short = bfloats(4 * MIB), bfloats(SHORTEST_BYTES // 2)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": tensor, "gap": noise(64), "short": short})
    image = noise(at) + tensor + noise(PAGE) + short + noise(4 * MIB - at % (4 * MIB)) + short + noise(PAGE)
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    last = at + len(tensor) + PAGE + len(short) + 4 * MIB - at % (4 * MIB)
    assert found(recipe) == [
        (at, 0, offsets["a"], len(tensor)),
        (at + len(tensor) + PAGE, 0, offsets["short"], len(short)),
        (last, 0, offsets["short"], len(short)),
    ]


@pytest.mark.parametrize("before", [1, 8, 15, 16, 17])
def test_a_run_of_the_least_length_across_an_edge_is_found(tmp_path: Path, before: int) -> None:
    tensor = bfloats(SHORTEST_BYTES // 2)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": tensor, "b": noise(8 * MIB)})
    image = noise(4 * MIB - before * PAGE) + tensor + noise(PAGE)
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    assert found(recipe) == [(4 * MIB - before * PAGE, 0, offsets["a"], len(tensor))]


def test_zeros_are_zeros(tmp_path: Path) -> None:
    image = bytes(9 * MIB) + noise(20 * PAGE) + bytes(3 * PAGE) + noise(PAGE) + bytes(4 * PAGE)
    recipe = taken_in(image, [], tmp_path)
    assert recipe.extents[0] == Zero(9 * MIB)
    assert recipe.extents[-1] == Zero(4 * PAGE)
    assert all(isinstance(extent, ChunkBytes) for extent in recipe.extents[1:-1])


def test_zeros_that_are_nearly_some_are_not(tmp_path: Path) -> None:
    image = bytearray(64 * PAGE)
    for page in range(0, 64, 8):
        image[page * PAGE + 17 * page] = 1
    recipe = taken_in(bytes(image), [], tmp_path)
    assert sum(extent.nbytes for extent in recipe.extents if isinstance(extent, Zero)) == 56 * PAGE


@pytest.mark.parametrize("nbytes", [0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * MIB + 77])
def test_any_file_has_a_recipe(tmp_path: Path, nbytes: int) -> None:
    assert taken_in(noise(nbytes), [], tmp_path).nbytes == nbytes
    taken_in(bytes(nbytes), [], tmp_path)


def test_chunks_are_the_same_behind_a_page_more(tmp_path: Path) -> None:
    heap = noise(16 * MIB)
    before = set(taken_in(heap, [], tmp_path).chunks())
    changed = bytearray(noise(3 * PAGE) + heap)
    changed[9 * MIB] ^= 1
    recipe = taken_in(bytes(changed), [], tmp_path)
    new = sum(extent.nbytes for extent in recipe.extents if isinstance(extent, ChunkBytes) and extent.id not in before)
    assert new <= 6 * MOST_CHUNK_BYTES
    assert len(before) > 16 * MIB // MOST_CHUNK_BYTES


def test_threads_give_one_recipe(tmp_path: Path) -> None:
    tensor = bfloats(5 * MIB)
    safetensors(tmp_path / "m.safetensors", {"a": tensor})
    image = noise(3 * MIB) + tensor + bytes(MIB) + noise(6 * MIB) + tensor
    recipes = [taken_in(image, [tmp_path / "m.safetensors"], tmp_path, threads=threads) for threads in (1, 2, 7)]
    assert recipes[0] == recipes[1] == recipes[2]


def test_an_image_of_nothing_but_misleading_bytes_takes_no_longer(tmp_path: Path) -> None:
    """Each place looks like an anchor: so many are compared, and no more."""
    tensor = bfloats(4 * MIB)
    safetensors(tmp_path / "m.safetensors", {"a": tensor})
    words = [tensor[at : at + 8] for at in range(0, len(tensor), 64 * KIB)]
    image = b"".join(words[number % len(words)] + bytes(56) for number in range(8 * MIB // 64))
    assert found(taken_in(image, [tmp_path / "m.safetensors"], tmp_path)) == []


def misbehaves(tmp_path: Path, change: Callable[[Path], None]) -> None:
    tensor = bfloats(4 * MIB)
    safetensors(tmp_path / "m.safetensors", {"a": tensor})
    (tmp_path / "pages").write_bytes(tensor)
    with opened([str(tmp_path / "m.safetensors")]) as files:
        anchors = Anchors(files, threads=1)
        change(tmp_path / "m.safetensors")
        ingest(str(tmp_path / "pages"), anchors, Chunks().add, threads=2)


def test_weights_that_become_shorter_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RetryError, match="shorter") as raised:
        misbehaves(tmp_path, lambda path: os.truncate(path, 3 * MIB))
    assert raised.value.path == str(tmp_path / "m.safetensors")


def test_weights_that_change_are_what_they_were_when_compared(tmp_path: Path) -> None:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), noise(PAGE), 2 * MIB)

    misbehaves(tmp_path, change)


def test_weights_that_are_short_already_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(noise(MIB))
    with open(path, "rb") as file:
        one = WeightFile(path=str(path), fd=file.fileno(), nbytes=2 * MIB, tensors=((0, 2 * MIB),))
        with pytest.raises(RetryError, match="shorter"):
            Anchors([one], threads=2)


def test_a_header_that_becomes_shorter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors(tmp_path / "m.safetensors", {"a": noise(MIB)})
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: b"")
    with pytest.raises(RetryError, match="shorter"), opened([str(tmp_path / "m.safetensors")]):
        pass


def test_what_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for number in range(200):  # so that it has a size
        (tmp_path / "folder" / f"{number}").touch()
    folder = str(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="Is a directory") as raised:
        ingest(folder, Anchors([], threads=1), Chunks().add, threads=1)
    assert raised.value.path == folder
    with pytest.raises(CheckpointError, match="Is a directory") as raised, opened([folder]) as files:
        Anchors(files, threads=1)
    assert raised.value.path == folder


def test_weights_that_can_no_longer_be_read_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = noise(MIB)
    safetensors(tmp_path / "m.safetensors", {"a": tensor})
    (tmp_path / "pages").write_bytes(tensor)
    really = os.preadv
    with opened([str(tmp_path / "m.safetensors")]) as files:

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            if fd == files[0].fd:
                raise OSError(5, "Input/output error")
            return really(fd, buffers, offset)

        anchors = Anchors(files, threads=1)
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError, match="Input/output error") as raised:
            ingest(str(tmp_path / "pages"), anchors, Chunks().add, threads=2)
    assert raised.value.path == str(tmp_path / "m.safetensors")


def test_an_image_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(noise(9 * MIB))

    def add(content: memoryview) -> bytes:
        os.truncate(path, 8 * MIB)
        return bytes(32)

    with pytest.raises(CheckpointError, match="shorter"):
        ingest(str(path), Anchors([], threads=1), add, threads=1)


def test_many_weights_have_anchors_further_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = bfloats(4 * MIB)
    offsets = safetensors(tmp_path / "m.safetensors", {"a": tensor})
    with opened([str(tmp_path / "m.safetensors")]) as files:
        near = len(Anchors(files, threads=1))
    monkeypatch.setattr("checkpoint.weightfinding._MOST_WINDOWS", 20)
    with opened([str(tmp_path / "m.safetensors")]) as files:
        assert len(Anchors(files, threads=1)) * 7 < near
    image = noise(PAGE) + tensor[9 * PAGE :]
    recipe = taken_in(image, [tmp_path / "m.safetensors"], tmp_path)
    assert found(recipe) == [(PAGE, 0, offsets["a"] + 9 * PAGE, len(tensor) - 9 * PAGE)]


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="No such file") as raised, opened([missing]):
        pass
    assert raised.value.path == missing
    with pytest.raises(CheckpointError, match="No such file") as raised:
        ingest(missing, Anchors([], threads=1), Chunks().add, threads=1)
    assert raised.value.path == missing


def test_what_the_store_says_stops_all_threads(tmp_path: Path) -> None:
    (tmp_path / "pages").write_bytes(noise(32 * MIB))
    calls: list[int] = []

    def full(content: memoryview) -> bytes:
        calls.append(len(content))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ingest(str(tmp_path / "pages"), Anchors([], threads=1), full, threads=3)
    assert len(calls) <= 3
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]


def test_chunks_come_from_several_threads(tmp_path: Path) -> None:
    (tmp_path / "pages").write_bytes(noise(8 * MIB))
    barrier = threading.Barrier(2, timeout=20)
    chunks = Chunks()

    def add(content: memoryview) -> bytes:
        if len(chunks.threads) < 2:
            chunks.threads.add(threading.get_ident())
            barrier.wait()
        return chunks.add(content)

    ingest(str(tmp_path / "pages"), Anchors([], threads=1), add, threads=2)
    assert len(chunks.threads) == 2
