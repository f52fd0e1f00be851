from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest

from weightfs.formats import ByteOrder, Role, classify, encode_name, npy_header
from weightfs.formats.names import MAX_NAME_BYTES


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("...", "..."),
        ("a/../b", "a%2F..%2Fb"),
        ("100%", "100%25"),
        ("%2F", "%252F"),
        ("a\0\n\x7f\x85", "a%00%0A%7F%C2%85"),
        ("\ud800", "%ED%A0%80"),
        ("größe", "größe"),
        ("x" * 255, "x" * 255),
        ("ü" * 127, "ü" * 127),
    ],
)
def test_encoded_names(name: str, encoded: str) -> None:
    assert encode_name(name) == encoded


@pytest.mark.parametrize(
    "name", ["x" * 256, "ü" * 128, "/" * 86, "\ud800" * 60, "x" * 219 + "/" * 20, "\U0001f600" * 99]
)
@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_long_names_are_cut_between_characters_and_hashed(name: str, suffix: str) -> None:
    encoded = encode_name(name, suffix)
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    assert MAX_NAME_BYTES - 9 <= len(encoded.encode()) <= MAX_NAME_BYTES
    assert encoded.endswith("%~" + digest + suffix)
    kept = encoded.removesuffix("%~" + digest + suffix)
    assert any(kept == encode_name(name[:count]) for count in range(len(name)))


def test_the_suffix_counts_in_the_limit() -> None:
    assert encode_name("x" * 251, ".npy") == "x" * 251 + ".npy"
    assert encode_name("x" * 252, ".npy") != "x" * 252 + ".npy"
    assert encode_name("", ".npy") == "%.npy"


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", Role.BLOCK, 12),
        ("model.layers.12.input_layernorm.weight", Role.BLOCK, 12),
        ("model.layers.3.mlp.experts.61.down_proj.weight", Role.BLOCK, 3),
        ("model.language_model.layers.7.mlp.gate.weight", Role.BLOCK, 7),
        ("transformer.h.4.attn.c_attn.weight", Role.BLOCK, 4),
        ("h.4.ln_1.weight", Role.BLOCK, 4),
        ("bert.encoder.layer.11.output.LayerNorm.bias", Role.BLOCK, 11),
        ("gpt_neox.layers.2.attention.dense.weight", Role.BLOCK, 2),
        ("model.decoder.layers.5.fc1.weight", Role.BLOCK, 5),
        ("encoder.block.3.layer.1.DenseReluDense.wi.weight", Role.BLOCK, 3),
        ("transformer.blocks.9.ffn.up_proj.weight", Role.BLOCK, 9),
        ("vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias", Role.BLOCK, 22),
        ("visual.transformer.resblocks.6.ln_1.weight", Role.BLOCK, 6),
        ("visual.blocks.6.norm1.weight", Role.BLOCK, 6),
        ("base_model.model.model.layers.8.self_attn.q_proj.lora_A.weight", Role.BLOCK, 8),
        ("backbone.layers.40.mixer.A_log", Role.BLOCK, 40),
        ("layers.1", Role.BLOCK, 1),
        ("down_blocks.1.resnets.0.conv1.weight", Role.BLOCK, 1),
        ("mid_block.attentions.0.proj_in.weight", Role.BLOCK, 100),
        ("unet.up_blocks.2.resnets.0.norm1.weight", Role.BLOCK, 103),
        ("model.diffusion_model.input_blocks.4.0.in_layers.0.weight", Role.BLOCK, 4),
        ("model.diffusion_model.middle_block.1.norm.weight", Role.BLOCK, 100),
        ("model.diffusion_model.output_blocks.4.0.in_layers.0.weight", Role.BLOCK, 105),
        ("transformer_blocks.18.attn.to_q.weight", Role.BLOCK, 18),
        ("single_transformer_blocks.0.attn.to_q.weight", Role.BLOCK, 101),
        ("double_blocks.3.img_attn.qkv.weight", Role.BLOCK, 3),
        ("single_blocks.3.linear1.weight", Role.BLOCK, 104),
        ("blk.31.ffn_gate_exps.weight", Role.BLOCK, 31),
        ("blk.0.attn_norm.weight", Role.BLOCK, 0),
        ("model.embed_tokens.weight", Role.EMBEDDING, None),
        ("transformer.wte.weight", Role.EMBEDDING, None),
        ("wpe.weight", Role.EMBEDDING, None),
        ("bert.embeddings.word_embeddings.weight", Role.EMBEDDING, None),
        ("bert.embeddings.LayerNorm.weight", Role.EMBEDDING, None),
        ("transformer.word_embeddings_layernorm.weight", Role.EMBEDDING, None),
        ("gpt_neox.embed_in.weight", Role.EMBEDDING, None),
        ("tok_embeddings.weight", Role.EMBEDDING, None),
        ("shared.weight", Role.EMBEDDING, None),
        ("token_embd.weight", Role.EMBEDDING, None),
        ("token_embd_norm.weight", Role.EMBEDDING, None),
        ("base_model.model.model.embed_tokens.lora_embedding_A", Role.EMBEDDING, None),
        ("lm_head.weight", Role.HEAD, None),
        ("base_model.model.lm_head.lora_A.weight", Role.HEAD, None),
        ("embed_out.weight", Role.HEAD, None),
        ("score.weight", Role.HEAD, None),
        ("cls.predictions.transform.LayerNorm.weight", Role.HEAD, None),
        ("output.weight", Role.HEAD, None),
        ("output", Role.HEAD, None),
        ("head.weight", Role.HEAD, None),
        ("model.norm.weight", Role.NORM, None),
        ("norm.weight", Role.NORM, None),
        ("transformer.ln_f.bias", Role.NORM, None),
        ("model.decoder.final_layer_norm.weight", Role.NORM, None),
        ("output_norm.weight", Role.NORM, None),
        ("conv_norm_out.weight", Role.NORM, None),
        ("rope_freqs.weight", Role.OTHER, None),
        ("conv_in.weight", Role.OTHER, None),
        ("pooler.output.weight", Role.OTHER, None),
        ("layers.weight", Role.OTHER, None),
        ("layers.1234567.weight", Role.OTHER, None),
        ("layers.\u0661.weight", Role.OTHER, None),
        ("graph.3.weight", Role.OTHER, None),
        ("", Role.OTHER, None),
    ],
)
def test_roles(name: str, role: Role, layer: int | None) -> None:
    assert classify(name) == (role, layer)


@pytest.mark.parametrize("name", ["a_" * 200_000, "." * 400_000, "h." * 200_000, "layers." * 60_000, "embed" * 80_000])
def test_long_names_take_linear_time(name: str) -> None:
    # Quadratic time would take minutes here, far over the run's own limit.
    classify(name)
    encode_name(name)


DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (1, 2, 1, 3, 1), (1,) * 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_numpy_reads_the_header(dtype: str, shape: tuple[int, ...], byte_order: ByteOrder) -> None:
    numpy_dtype = np.dtype(DTYPES[dtype]).newbyteorder("<" if byte_order == "little" else ">")
    array = np.arange(int(np.prod(shape))).astype(numpy_dtype).reshape(shape)
    header = npy_header(dtype, shape, byte_order)
    assert header is not None
    assert len(header) % 64 == 0
    back = np.load(io.BytesIO(header + array.tobytes()), allow_pickle=False)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_the_largest_header_is_version_1() -> None:
    header = npy_header("F32", ((1 << 63) - 1,) * 32)
    assert header is not None
    assert len(header) < 1024


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4", "Q4_K", "MXFP4", "", "f32"])
def test_no_header_for_what_numpy_lacks(dtype: str) -> None:
    assert npy_header(dtype, (1,)) is None


def test_no_header_for_more_dimensions_than_numpy_has() -> None:
    assert npy_header("U8", (1,) * 33) is None


def test_importing_the_formats_does_not_import_numpy() -> None:
    code = "import sys, weightfs.formats; print(sorted({'numpy', 'requests', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
