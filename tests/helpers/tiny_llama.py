"""A llama of two layers with random weights and a byte vocabulary: all that llama.cpp needs to complete a prompt."""

from __future__ import annotations

import gguf
import numpy as np

WIDTH, HEADS, LAYERS, FEED_FORWARD = 64, 4, 2, 128


def write_tiny_llama(path: str) -> None:
    """The model as a GGUF file, some weights quantised; the same bytes each time."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    kinds, normal = gguf.TokenType, gguf.TokenType.NORMAL
    tokens = [(b"<unk>", kinds.UNKNOWN), (b"<s>", kinds.CONTROL), (b"</s>", kinds.CONTROL)]
    tokens += [(f"<0x{byte:02X}>".encode(), kinds.BYTE) for byte in range(256)]
    tokens += [("\u2581".encode(), normal)] + [(bytes([letter]), normal) for letter in range(ord("a"), ord("z") + 1)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_scores([-float(at) for at in range(len(tokens))])
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, *shape: int, quantised: bool = False) -> None:
        values = (random.standard_normal(shape) / 4).astype(np.float32)
        if quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        add(f"{block}attn_norm.weight", WIDTH)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}{part}.weight", WIDTH, WIDTH, quantised=True)
        add(f"{block}ffn_norm.weight", WIDTH)
        add(f"{block}ffn_gate.weight", FEED_FORWARD, WIDTH, quantised=True)
        add(f"{block}ffn_up.weight", FEED_FORWARD, WIDTH, quantised=True)
        add(f"{block}ffn_down.weight", WIDTH, FEED_FORWARD, quantised=True)
    add("output_norm.weight", WIDTH)
    add("output.weight", len(tokens), WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
