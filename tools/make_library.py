"""A library of model weights that takes no room: real safetensors headers, tensors that are holes.

    python tools/make_library.py FOLDER --folders 1000 --files 10000 --tensors 1000000

Each folder holds one sharded model, laid out as Hugging Face does it (shards, `model.safetensors.index.json`, a
`config.json` and a tokenizer's file are left out with `--bare`). Headers are what a loader meets; the tensors' bytes
read as zeros. A million tensors in 10,000 files take about 100 MB of disk and 2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass

_ROW_ELEMENTS = 1024
_ELEMENT_BYTES = 2
_PARTS = (*(f"self_attn.{one}_proj" for one in "qkvo"), "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be: its name, its header with the length in front, its size in bytes, its tensors' names."""

    name: str
    head: bytes
    nbytes: int
    tensors: tuple[str, ...]


def shard(name: str, first: int, tensors: int, rows: int) -> Shard:
    """A safetensors file of `tensors` BF16 tensors, numbered from `first` on, of `rows` rows each."""
    nbytes = rows * _ROW_ELEMENTS * _ELEMENT_BYTES
    entries, names = {}, []
    for number in range(tensors):
        layer, part = divmod(first + number, len(_PARTS))
        names.append(f"model.layers.{layer}.{_PARTS[part]}.weight")
        entries[names[-1]] = {
            "dtype": "BF16",
            "shape": [rows, _ROW_ELEMENTS],
            "data_offsets": [number * nbytes, (number + 1) * nbytes],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Shard(name, head, len(head) + tensors * nbytes, tuple(names))


def model(files: int, tensors: int, rows: int) -> list[Shard]:
    """The shards of one model, `tensors` spread over `files`."""
    shards, first = [], 0
    for number in range(files):
        count = tensors * (number + 1) // files - first
        name = "model.safetensors" if files == 1 else f"model-{number + 1:05}-of-{files:05}.safetensors"
        shards.append(shard(name, first, count, rows))
        first += count
    return shards


def write_file(path: str, one: Shard) -> None:
    """Lay one shard down, its tensors as a hole."""
    with open(path, "wb", buffering=0) as file:
        file.write(one.head)
        file.truncate(one.nbytes)


def write_model(folder: str, shards: list[Shard], *, bare: bool = False) -> None:
    """Make one folder."""
    os.makedirs(folder, exist_ok=True)
    for one in shards:
        write_file(os.path.join(folder, one.name), one)
    if bare:
        return
    weight_map = {name: one.name for one in shards for name in one.tensors}
    texts: dict[str, object] = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {}}
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w") as file:
            json.dump(text, file)


def make_library(root: str, *, folders: int, files: int, tensors: int, rows: int = 16, bare: bool = False) -> list[str]:
    """Make `folders` folders with `files` weight files and `tensors` tensors in all; gives the folders' names.

    Raises:
        ValueError: fewer files than folders, or fewer tensors than files.
    """
    if not 1 <= folders <= files <= tensors:
        raise ValueError("a folder needs a file, a file a tensor")
    names, kinds = [], {}
    for number in range(folders):
        of_this = files * (number + 1) // folders - files * number // folders
        tensors_here = tensors * (number + 1) // folders - tensors * number // folders
        kind = of_this, tensors_here
        if kind not in kinds:  # models of one size share their headers: making them costs more than writing them
            kinds[kind] = model(*kind, rows)
        names.append(f"org--model-{number:05}")
        write_model(os.path.join(root, names[-1]), kinds[kind], bare=bare)
    return names


def main() -> None:
    """Make one as the command line asks."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", help="where; made if missing")
    options.add_argument("--folders", type=int, default=1000)
    options.add_argument("--files", type=int, default=10_000, help="weight files in all (default 10000)")
    options.add_argument("--tensors", type=int, default=1_000_000, help="tensors in all (default 1000000)")
    options.add_argument("--rows", type=int, default=16, help="rows of 1,024 BF16 elements in each tensor (default 16)")
    options.add_argument("--bare", action="store_true", help="weight files only")
    chosen = options.parse_args()
    started = time.perf_counter()
    try:
        make_library(
            chosen.folder,
            folders=chosen.folders,
            files=chosen.files,
            tensors=chosen.tensors,
            rows=chosen.rows,
            bare=chosen.bare,
        )
    except ValueError as e:
        sys.exit(str(e))
    print(f"{chosen.files} files in {chosen.folders} folders, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
