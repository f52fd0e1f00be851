"""Images of real processes that hold weights in private memory, as loaders leave them there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import blake3
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.criu import dump, options_for
from checkpoint.extents import Extent, Recipe, WeightBytes, Zero, decode, encode
from checkpoint.ingest import ingest
from checkpoint.processes import tree_of
from checkpoint.weightfinding import Anchors, opened
from tests.helpers.paged import dumped
from tests.helpers.targets import needs_criu, target, the_criu

pytestmark = needs_criu

MIB = 1 << 20
LOADERS = {
    "library": (
        """
from safetensors.numpy import load_file
held = load_file(sys.argv[2])
""",
        0.99,
    ),
    "whole file read": (
        """
with open(sys.argv[2], "rb") as file:
    held = file.read()
""",
        0.99,
    ),
    "private mapping written to": (
        """
with open(sys.argv[2], "r+b") as file:
    held = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
for at in range(0, len(held), mmap.PAGESIZE):
    held[at] = held[at]
""",
        0.99,
    ),
    "fused": (
        """
import numpy
from safetensors.numpy import load_file
tensors = load_file(sys.argv[2])
held = [numpy.concatenate([tensors.pop(f"layers.{n}.{part}.weight") for part in "qkv"]) for n in range(4)]
held.append(tensors)
""",
        0.99,
    ),
    "cut in two": (
        """
from safetensors.numpy import load_file
tensors = load_file(sys.argv[2])
held = [(one[: len(one) // 2].copy(), one[len(one) // 2 :].copy()) for one in tensors.values()]
del tensors
""",
        0.98,
    ),
    "as another dtype": (
        """
from safetensors.numpy import load_file
held = {name: one.astype("float64") for name, one in load_file(sys.argv[2]).items()}
""",
        0,
    ),
}
ON = """
tell("ready")
wait()
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(8)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    tensors = {f"layers.{n}.{part}.weight": rng.normal(0, 0.02, (512, 1024)) for n in range(4) for part in "qkvo"}
    tensors |= {f"layers.{n}.norm.weight": np.ones(1024) for n in range(4)}
    save_file({name: one.astype(np.float32) for name, one in tensors.items()}, path)
    return path


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_in_memory_are_found(tmp_path: Path, weights: Path, loader: str) -> None:
    program, expected = LOADERS[loader]
    with target(program + ON, tmp_path, str(weights)) as one:
        one.said()
        images = dumped(one, tmp_path).images
    chunks: dict[bytes, bytes] = {}

    def add(content: memoryview) -> bytes:
        found = blake3.blake3(content).digest()
        chunks[found] = bytes(content)
        return found

    names = sorted(name for name in os.listdir(images) if name.endswith(".img"))
    with opened([str(weights)]) as files:
        anchors = Anchors(files, threads=2)
        taken = {name: ingest(os.path.join(images, name), anchors, add, threads=2) for name in names}
    recipes = decode(encode(taken), "recipes", weights=[weights.stat().st_size])
    assert recipes == taken

    content = weights.read_bytes()
    for name, recipe in recipes.items():
        assert again(recipe, content, chunks) == Path(images, name).read_bytes(), name

    share = sum(_references(recipe) for recipe in recipes.values()) / len(content)
    assert share >= expected, f"{share:.3f} of the weights were found"
    assert share <= 1.05
    if not expected:
        assert share == 0
    assert any(isinstance(extent, Zero) for name in names for extent in recipes[name].extents)


def again(recipe: Recipe, weights: bytes, chunks: dict[bytes, bytes]) -> bytes:
    def content(extent: Extent) -> bytes:
        if isinstance(extent, Zero):
            return bytes(extent.nbytes)
        if isinstance(extent, WeightBytes):
            return weights[extent.offset : extent.offset + extent.nbytes]
        return chunks[extent.id][extent.at : extent.at + extent.nbytes]

    return b"".join(map(content, recipe.extents))


def _references(recipe: Recipe) -> int:
    return sum(extent.nbytes for extent in recipe.extents if isinstance(extent, WeightBytes))


GOES_ON = """
import json, random, pydoc, xml.dom.minidom, email.message, http.client
heap = [{"number": n, "text": str(n) * 9} for n in range(150_000)]
tell("ready")
wait()
heap += [{"number": n, "text": str(n) * 9} for n in range(9_000)]
heap[77_777]["text"] = "changed"
tell("changed")
wait()
"""


def test_a_second_dump_of_a_process_adds_little(tmp_path: Path) -> None:
    """Its heap grows between the two, so all that follows in the image lies elsewhere."""
    seen: dict[bytes, int] = {}

    def taken(folder: str) -> int:
        new = 0

        def add(content: memoryview) -> bytes:
            nonlocal new
            found = blake3.blake3(content).digest()
            new += 0 if found in seen else len(content)
            seen[found] = len(content)
            return found

        images = tmp_path / folder
        images.mkdir(mode=0o700)
        dump(the_criu(), one.pid, str(images), replace(options_for(tree_of(one.pid)), leave_running=True), 60)
        for name in os.listdir(images):
            ingest(str(images / name), Anchors([], threads=1), add, threads=1)
        return new

    with target(GOES_ON, tmp_path) as one:
        one.said()
        first = taken("first")
        assert one.ask() == "changed"
        second = taken("second")
    assert first > 40 * MIB
    assert second < first * 0.35
