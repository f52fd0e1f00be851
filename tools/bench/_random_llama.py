"""A Llama of random weights, of about the size asked for, as safetensors shards that transformers loads.

    python _random_llama.py FOLDER GIGABYTES DEVICE

From 2 GB on with the shapes of a 3B-parameter model and as many layers as fit (7.2 GB: 28, 3.6 billion parameters), so
that what a loader does is what it does with a real one; below, small shapes for a trial without a GPU.
"""

from __future__ import annotations

import json
import sys

BYTES_A_WEIGHT = 2


def config(nbytes: float) -> dict[str, int]:
    """The shapes whose weights take about so many bytes."""
    large = nbytes >= 2e9
    hidden, inner, heads, groups, words = (3072, 8192, 24, 8, 128256) if large else (256, 704, 8, 4, 4096)
    key_value = 2 * hidden * (hidden // heads * groups)
    layer = 2 * hidden * hidden + key_value + 3 * hidden * inner
    layers = max(1, round((nbytes / BYTES_A_WEIGHT - 2 * words * hidden) / layer))
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
        "num_hidden_layers": layers,
    }


def main() -> None:
    folder, gigabytes, device = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(device)
    shapes = config(gigabytes * 1e9)
    model = LlamaForCausalLM(LlamaConfig(**shapes, tie_word_embeddings=False))
    count = sum(one.numel() for one in model.parameters())
    model.save_pretrained(folder, max_shard_size="3GB")
    print(json.dumps({"parameters": count, "nbytes": count * BYTES_A_WEIGHT, "layers": shapes["num_hidden_layers"]}))


if __name__ == "__main__":
    main()
