"""Small models on disk, with the bytes of every tensor known."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from weightfs.formats.safetensors import DTYPE_BITS


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensor(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bytes of a safetensors dtype; booleans are 0 and 1."""
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    data = random.Random(seed).randbytes(nbytes)
    return Tensor(dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data)


def every_dtype() -> dict[str, Tensor]:
    """One tensor of each dtype of safetensors, an empty one and a scalar."""
    tensors = {f"t.{dtype}": tensor(dtype, (8, 6), seed) for seed, dtype in enumerate(DTYPE_BITS)}
    return {**tensors, "empty": Tensor("F32", (0, 4), b""), "scalar": tensor("I64", (), 99)}


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, parts = 0, []
    for name, one in tensors.items():
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [at, at + len(one.data)]}
        at += len(one.data)
        parts.append(one.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def write(path: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    return path


def write_safetensors(path: str, tensors: Mapping[str, Tensor]) -> str:
    return write(path, safetensors_bytes(tensors))


def model_tensors(layers: int, seed: int = 0, rows: int = 64) -> dict[str, Tensor]:
    """A model of a few layers, as transformers names them."""
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{n}.{part}.weight" for n in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    names += ["model.norm.weight", "lm_head.weight"]
    return {name: tensor("F32", (rows, 32), seed + number) for number, name in enumerate(names)}


def write_sharded(folder: str, tensors: Mapping[str, Tensor], shards: int) -> list[str]:
    """A sharded safetensors model with its index; gives the shards' paths."""
    weight_map, paths = {}, []
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        paths.append(write_safetensors(os.path.join(folder, file), part))
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(len(t.data) for t in tensors.values())}, "weight_map": weight_map}
    write(os.path.join(folder, "model.safetensors.index.json"), json.dumps(index).encode())
    return paths


def write_gguf(path: str, tensors: Mapping[str, Tensor], architecture: str = "llama") -> str:
    """A GGUF file; dtypes are ggml's names, data is in their blocks, shapes are bytes a row."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("test")
    for name, one in tensors.items():
        rows = np.frombuffer(one.data, np.uint8).reshape(one.shape)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[one.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def every_quantisation(rows: int = 3) -> dict[str, Tensor]:
    """One tensor of each ggml type, two blocks (or 32 elements) a row."""
    found = {}
    for seed, (kind, (block, nbytes)) in enumerate(gguf.GGML_QUANT_SIZES.items()):
        row_bytes = 2 * nbytes if block > 1 else 32 * nbytes
        data = random.Random(seed).randbytes(rows * row_bytes)
        found[f"blk.{seed}.{kind.name}.weight"] = Tensor(kind.name, (rows, row_bytes), data)
    return found


def write_hub_cache(root: str, tensors: Mapping[str, Tensor], revision: str = "a1b2c3") -> str:
    """A Hugging Face cache folder: names are symlinks into `blobs/`; gives the snapshot folder."""
    model = os.path.join(root, "models--org--tiny")
    snapshot = os.path.join(model, "snapshots", revision)
    os.makedirs(snapshot)
    write(os.path.join(model, "refs", "main"), revision.encode())
    files = {"model.safetensors": safetensors_bytes(tensors), "config.json": b'{"model_type": "bert"}'}
    for name, data in files.items():
        digest = f"{random.Random(name).getrandbits(256):064x}"
        write(os.path.join(model, "blobs", digest), data)
        os.symlink(os.path.join("..", "..", "blobs", digest), os.path.join(snapshot, name))
    return snapshot
