"""A loader as users write them, in a process of its own: `_cold_loader.py FOLDER HEAD_START`, one JSON line out.

HEAD_START: `none` and `sleep` import first, print `ready` and wait for a line; then `none` loads, and `sleep` opens
config.json and loads a second later. `imports` opens config.json, imports, loads. `transformers` is from_pretrained.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

_IMPORTS_S = 1.0


def main() -> None:
    """Run it."""
    folder, head_start = sys.argv[1:]
    if head_start in ("none", "sleep"):
        _import()
        print("ready", flush=True)
        sys.stdin.readline()
    started = time.perf_counter()
    if head_start != "none":
        with open(os.path.join(folder, "config.json")) as file:
            json.load(file)
    if head_start == "sleep":
        time.sleep(_IMPORTS_S)
    if head_start in ("imports", "transformers"):
        _import()
    imported = time.perf_counter()
    touch_all = _from_pretrained if head_start == "transformers" else _load_file
    nbytes = touch_all(folder)
    ended = time.perf_counter()
    print(json.dumps({"imports_s": imported - started, "load_s": ended - imported, "bytes": nbytes}), flush=True)


def _import() -> None:
    for name in ("torch", "safetensors.torch"):
        importlib.import_module(name)


def _load_file(folder: str) -> int:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)  # pages are faulted in one after the other
    nbytes = 0
    for tensor in load_file(os.path.join(folder, "model.safetensors")).values():
        tensor.view(torch.int16).reshape(-1).view(torch.int64).sum()
        nbytes += tensor.nbytes
    return nbytes


def _from_pretrained(folder: str) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    nbytes = 0
    for tensor in model.state_dict().values():
        tensor.view(torch.int16).reshape(-1).view(torch.int64).sum()
        nbytes += tensor.nbytes
    return nbytes


if __name__ == "__main__":
    main()
