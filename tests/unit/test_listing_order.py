"""`weightfs ls --order`: what is read ahead, in which order, of a folder that nobody mounted."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.models import tensor, write_safetensors
from tests.helpers.mounting import weightfs


def write_shards(folder: Path) -> str:
    """Two shards of a model: its last block lies in the first, its embedding in the second."""
    shards = {
        1: {"model.layers.1.w": tensor("U8", (20_000,), 1), "model.layers.0.w": tensor("U8", (20_000,), 2)},
        2: {"model.embed_tokens.weight": tensor("U8", (30_000,), 3), "model.layers.0.v": tensor("U8", (20_000,), 4)},
    }
    for number, tensors in shards.items():
        write_safetensors(f"{folder}/model-{number:05}-of-00002.safetensors", tensors)
    return str(folder)


def test_a_folder_is_read_layer_by_layer(tmp_path: Path) -> None:
    done = weightfs("ls", write_shards(tmp_path), "--order", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["tensors"]) == 4
    order = document["order"]
    assert [step["layer"] for step in order] == ["header", "embedding", "0", "1"]
    assert [len(step["extents"]) for step in order] == [2, 1, 2, 1]
    assert all(step["bytes"] == sum(one["nbytes"] for one in step["extents"]) for step in order)
    assert sum(step["bytes"] for step in order) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {"file", "offset", "nbytes"} == set(order[0]["extents"][0])


def test_one_file_and_without_the_option(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    done = weightfs("ls", f"{folder}/model-00001-of-00002.safetensors", "--order", "--json")
    assert [step["layer"] for step in json.loads(done.stdout)["order"]] == ["header", "0", "1"]
    assert "order" not in json.loads(weightfs("ls", folder, "--json").stdout)
