"""What `weightfs demo` runs as a program of its own: stock safetensors and transformers, which know no weightfs.

python demo_loader.py make FOLDER      makes a small model
python demo_loader.py load FOLDER      loads it both ways; prints JSON: seconds, bytes, a digest of the outputs
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def make(folder: str) -> None:
    """Save a random Llama of about 200 MB in three shards."""
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="80MB")


def load(folder: str) -> None:
    """Load it with safetensors, then with transformers, and run it once."""
    started = time.perf_counter()
    digest, nbytes = hashlib.sha256(), 0
    for name in sorted(file for file in os.listdir(folder) if file.endswith(".safetensors")):
        with safe_open(os.path.join(folder, name), "pt") as weights:
            for key in sorted(weights.keys()):
                tensor = weights.get_tensor(key)
                nbytes += tensor.numel() * tensor.element_size()
                digest.update(tensor.view(torch.uint8).numpy())
    safetensors_s = time.perf_counter() - started
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    transformers_s = time.perf_counter() - started
    with torch.inference_mode():
        logits = model(torch.arange(16)[None]).logits.float().numpy()
    print(  # noqa: T201 - its one output
        json.dumps(
            {
                "nbytes": nbytes,
                "tensors_sha256": digest.hexdigest(),
                "logits_sha256": hashlib.sha256(logits.tobytes()).hexdigest(),
                "safetensors_s": safetensors_s,
                "transformers_s": transformers_s,
            }
        )
    )


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](sys.argv[2])
