"""The order in which tensors are needed, by family of names."""

from __future__ import annotations

import random

import pytest

from prefetch.order import places
from weightfs.formats.layout import TensorExtent
from weightfs.formats.roles import classify


def tensor(name: str) -> TensorExtent:
    role, layer = classify(name)
    return TensorExtent(name, "F32", (1,), "f0", 0, 4, layer, role)


def ordered(names: list[str]) -> list[str]:
    """Labels in the order their tensors are needed, whatever order the names come in."""
    shuffled = list(names)
    random.Random(7).shuffle(shuffled)
    return [label for _, label in sorted(set(places(map(tensor, shuffled))))]


FAMILIES = {
    "llama": ("model.embed_tokens.weight model.layers.0.q.weight model.layers.10.q.weight model.norm.weight "
              "lm_head.weight", "embedding 0 10 norm head"),
    "rotary": ("model.rotary_emb.inv_freq model.layers.0.q.weight", "embedding 0"),
    "gpt-2": ("transformer.wte.weight transformer.wpe.weight transformer.h.0.a transformer.h.1.a "
              "transformer.ln_f.weight", "embedding 0 1 norm"),
    "gpt-neox": ("gpt_neox.embed_in.weight gpt_neox.layers.0.a gpt_neox.layers.1.a gpt_neox.final_layer_norm.weight "
                 "embed_out.weight", "embedding 0 1 norm head"),
    "opt": ("model.decoder.embed_tokens.weight model.decoder.layers.0.a model.decoder.final_layer_norm.weight "
            "lm_head.weight", "embedding 0 norm head"),
    "bert": ("embeddings.word_embeddings.weight encoder.layer.0.a encoder.layer.1.a pooler.dense.weight",
             "embedding 0 1 other"),
    "experts": ("model.embed_tokens.weight model.layers.0.mlp.experts.7.w1.weight model.layers.1.mlp.gate.weight",
                "embedding 0 1"),
    "gguf": ("token_embd.weight rope_freqs.weight blk.0.attn_q.weight blk.1.ffn_gate_exps.weight output_norm.weight "
             "output.weight", "embedding 0 1 norm head"),
    "gguf projector": ("v.patch_embd.weight v.pre_ln.weight v.blk.0.attn_q.weight v.blk.1.attn_q.weight "
                       "v.post_ln.weight mm.0.weight mm.input_projection.weight",
                       "vision.embedding vision.0 vision.1 vision.other projector"),
    "gguf t5": ("token_embd.weight enc.blk.0.attn_v.weight enc.output_norm.weight dec.blk.0.attn_v.weight "
                "dec.output_norm.weight output.weight", "embedding encoder.0 encoder.norm 0 norm head"),
    "vision": ("vision_tower.vision_model.embeddings.patch_embedding.weight "
               "vision_tower.vision_model.pre_layrnorm.weight vision_tower.vision_model.encoder.layers.0.a "
               "multi_modal_projector.linear_1.weight language_model.model.embed_tokens.weight "
               "language_model.model.layers.0.a language_model.model.norm.weight language_model.lm_head.weight",
               "vision.embedding vision.0 projector embedding 0 norm head"),
    "qwen-vl": ("model.visual.patch_embed.proj.weight model.visual.blocks.0.a model.visual.merger.mlp.0.weight "
                "model.language_model.embed_tokens.weight model.language_model.layers.0.a lm_head.weight",
                "vision.embedding vision.0 vision.other embedding 0 head"),
    "audio": ("audio_tower.conv1.weight audio_tower.layers.0.a audio_tower.layer_norm.weight "
              "language_model.model.layers.0.a", "audio.embedding audio.0 audio.norm 0"),
    "t5": ("shared.weight encoder.block.0.layer.0.SelfAttention.v.weight encoder.final_layer_norm.weight "
           "decoder.block.0.layer.1.EncDecAttention.v.weight decoder.final_layer_norm.weight lm_head.weight",
           "embedding encoder.0 encoder.norm 0 norm head"),
    "whisper": ("model.encoder.conv1.weight model.encoder.embed_positions.weight model.encoder.layers.0.a "
                "model.encoder.layer_norm.weight model.decoder.embed_tokens.weight model.decoder.layers.0.a "
                "model.decoder.layers.0.encoder_attn.q.weight model.decoder.layer_norm.weight proj_out.weight",
                "encoder.embedding encoder.0 encoder.norm embedding 0 norm head"),
    "bart": ("model.shared.weight model.encoder.layers.0.a model.decoder.embed_positions.weight "
             "model.decoder.layers.0.a", "embedding encoder.0 decoder.embedding 0"),
    "lora": ("base_model.model.model.layers.0.q.lora_A.weight base_model.model.model.layers.11.q.lora_B.weight "
             "base_model.model.lm_head.lora_A.weight", "0 11 head"),
    "u-net": ("conv_in.weight time_embedding.linear_1.weight down_blocks.0.a "
              "down_blocks.1.resnets.0.time_emb_proj.bias mid_block.attentions.0.a up_blocks.0.a "
              "conv_norm_out.weight conv_out.weight",
              "embedding down.0 down.1 mid up.0 norm head"),
    "latent diffusion": ("cond_stage_model.transformer.text_model.encoder.layers.0.a "
                         "model.diffusion_model.time_embed.0.weight model.diffusion_model.input_blocks.0.0.weight "
                         "model.diffusion_model.middle_block.0.a model.diffusion_model.output_blocks.0.a "
                         "model.diffusion_model.out.0.weight first_stage_model.decoder.mid.block_1.a",
                         "text.0 embedding down.0 mid up.0 head vae.other"),
    "flux": ("img_in.weight time_in.in_layer.weight double_blocks.0.a double_blocks.10.a single_blocks.0.a "
             "final_layer.linear.weight", "embedding 0 10 single.0 head"),
    "mamba": ("backbone.embeddings.weight backbone.layers.0.mixer.A_log backbone.layers.1.mixer.D "
              "backbone.norm_f.weight lm_head.weight", "embedding 0 1 norm head"),
    "further tokens": ("model.embed_tokens.weight model.layers.0.a model.norm.weight lm_head.weight "
                       "model.layers.1.eh_proj.weight model.layers.1.mlp.up_proj.weight",
                       "embedding 0 norm head mtp.1"),
    "further tokens, apart": ("model.embed_tokens.weight model.layers.0.a lm_head.weight mtp.layers.0.a "
                              "mtp.norm.weight",
                              "embedding 0 head mtp.0 mtp.norm"),
    "gguf further tokens": ("token_embd.weight blk.0.attn_q.weight output.weight blk.1.nextn.eh_proj.weight "
                            "blk.1.attn_q.weight", "embedding 0 head mtp.1"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_needed_in_the_order_it_runs(family: str) -> None:
    names, expected = FAMILIES[family]
    assert " ".join(ordered(names.split())) == expected


def test_names_that_say_nothing_share_one_place() -> None:
    assert len(set(places(map(tensor, ["zeta", "alpha", "", "x.y.z", "\ud800", "."])))) == 1


def test_more_than_a_hundred_blocks_stay_in_order() -> None:
    assert ordered([f"model.layers.{number}.a" for number in range(126)]) == [str(number) for number in range(126)]
