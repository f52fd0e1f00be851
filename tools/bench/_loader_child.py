"""One loader in a process of its own, that loads when it is told to; `loaders.py` starts it.

    python _loader_child.py LOADER DEVICE

A line on stdin is a JSON list of a word and its arguments, a line on stdout the answer: `load FOLDER DIGEST?` gives the
seconds and, where asked, a digest of every tensor; `digest FOLDER` the same digests without any loader; `ceiling BYTES`
how fast pinned memory is copied. Between loads all memory of the device is given back, as if the program were new; what
a loader keeps for the next time, such as pinned buffers, it keeps.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

Loaded = Mapping[str, Any]
Load = Callable[[], Loaded]
CHUNK_WORDS: Final = 16 << 20
PINNED_BYTES: Final = 256 << 20


def files_of(folder: str) -> list[str]:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))


# Each prepares what is not loading, and gives what loads


def weightfs_files(folder: str, device: str) -> Load:
    from weightfs.torch import load_files

    return lambda: load_files(files_of(folder), device)


def weightfs_model(folder: str, device: str) -> Load:
    from transformers import AutoConfig, AutoModelForCausalLM

    from weightfs.torch import load_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)

    def load() -> Loaded:
        load_model(model, folder, device=device)
        return dict(model.state_dict())

    return load


def from_pretrained(folder: str, device: str) -> Load:
    from transformers import AutoModelForCausalLM

    where = {} if device == "cpu" else {"device_map": device}  # which needs the package accelerate
    return lambda: dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **where).state_dict())


def accelerated(folder: str, device: str) -> Load:
    from weightfs.torch import accelerate

    load = from_pretrained(folder, device)

    def within() -> Loaded:
        with accelerate():
            return load()

    return within


def safetensors_files(folder: str, device: str) -> Load:
    from safetensors.torch import load_file

    return lambda: {name: one for file in files_of(folder) for name, one in load_file(file, device=device).items()}


def runai(folder: str, device: str) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Loaded:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files_of(folder), device=device)
            return {name: one.to(device) for name, one in streamer.get_tensors()}

    return load


def fastsafetensors(folder: str, device: str) -> Load:
    from fastsafetensors import fastsafe_open

    def load() -> Loaded:
        where = "cuda:0" if device == "cuda" else device
        with fastsafe_open(filenames=files_of(folder), framework="pt", device=where, nogds=True) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return load


def instanttensor(folder: str, device: str) -> Load:
    import instanttensor as peer

    def load() -> Loaded:
        with peer.safe_open(files_of(folder), framework="pt", device=0 if device == "cuda" else device) as file:
            return dict(file.tensors())

    return load


LOADERS: Final[dict[str, Callable[[str, str], Load]]] = {
    "weightfs.torch load_files": weightfs_files,
    "weightfs.torch load_model": weightfs_model,
    "weightfs.torch accelerate": accelerated,
    "safetensors": safetensors_files,
    "transformers": from_pretrained,
    "runai-model-streamer": runai,
    "fastsafetensors": fastsafetensors,
    "instanttensor": instanttensor,
}


# What was loaded


def digests(tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Dtype, shape and a sum of all bytes, each weighted by where it is."""
    return {name: f"{one.dtype} {tuple(one.shape)} {weighted(one)}" for name, one in tensors}


def weighted(tensor: Any) -> int:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    total = int(flat[words.numel() * 8 :].sum())
    for at in range(0, words.numel(), CHUNK_WORDS):
        part = words[at : at + CHUNK_WORDS]
        total += int((part * torch.arange(2 * at + 1, 2 * (at + len(part)), 2, device=part.device)).sum())
    return total % (1 << 64)


def plainly(folder: str, device: str) -> Iterable[tuple[str, Any]]:
    """The tensors, by nothing but the format's description."""
    for path in files_of(folder):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
                raw = torch.frombuffer(memory, dtype=torch.uint8)
                for name, entry in header.items():
                    if name != "__metadata__":
                        begin, end = (8 + length + at for at in entry["data_offsets"])
                        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[entry["dtype"]]
                        yield name, raw[begin:end].to(device).clone().view(dtype).reshape(entry["shape"])
                del raw


def ceiling(nbytes: int) -> float:
    """GB/s from one pinned buffer, again and again."""
    source = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PINNED_BYTES, dtype=torch.uint8, device="cuda")
    times = max(1, nbytes // PINNED_BYTES)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return times * PINNED_BYTES / (time.perf_counter() - started) / 1e9


def settle(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def load(prepare: Callable[[str, str], Load], folder: str, device: str, digest: bool) -> dict[str, Any]:
    ready = prepare(folder, device)
    settle(device)
    started = time.perf_counter()
    found = ready()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    said = {
        "seconds": seconds,
        "bytes": sum(one.numel() * one.element_size() for one in found.values()),
        "on": sorted({one.device.type for one in found.values()}),
        "peak_device_bytes": peak,
        "digests": digests(found.items()) if digest else None,
    }
    del found, ready
    settle(device)
    return said


def main() -> None:
    name, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # loaders print
    if device == "cuda":
        torch.zeros(1, device=device)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            word, *arguments = json.loads(line)
            said: Any
            try:
                if word == "load":
                    said = load(LOADERS[name], arguments[0], device, arguments[1])
                elif word == "digest":
                    said = digests(plainly(arguments[0], device))
                    settle(device)
                else:
                    said = ceiling(arguments[0]) if device == "cuda" else None
            except Exception as error:  # noqa: BLE001  a row of the table, not its end
                said = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
