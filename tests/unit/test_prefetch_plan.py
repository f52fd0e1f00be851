"""The order of a plan, and that it reads every byte once."""

from __future__ import annotations

import random
import time

import pytest

from prefetch.plan import Plan, plan_of, whole_file_plan
from weightfs.formats.layout import TensorExtent, WeightLayout
from weightfs.formats.roles import classify

HEADER = 1000


def layout_of(*files: list[str], nbytes: int = 10_000) -> WeightLayout:
    tensors = []
    for number, names in enumerate(files):
        for position, name in enumerate(names):
            role, layer = classify(name)
            offset = HEADER + position * nbytes
            tensors.append(TensorExtent(name, "F32", (nbytes // 4,), f"f{number}", offset, nbytes, layer, role))
    return WeightLayout("safetensors", tuple(f"f{n}" for n in range(len(files))), tuple(tensors))


def plan(layout: WeightLayout) -> Plan:
    ends = dict.fromkeys(layout.files, HEADER)
    for tensor in layout.tensors:
        ends[tensor.file] = tensor.offset + tensor.nbytes
    return plan_of(layout, ends)


def labels(*names: str) -> list[str]:
    """The layers of a model whose file has its tensors in a shuffled order."""
    shuffled = list(names)
    random.Random(7).shuffle(shuffled)
    return [layer.label for layer in plan(layout_of(shuffled)).layers if layer.label != "header"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.embed_tokens.weight", "model.layers.0.q.weight", "model.layers.10.q.weight", "model.norm.weight",
          "lm_head.weight"], ["embedding", "0", "10", "norm", "head"]),
        (["transformer.wte.weight", "transformer.h.0.a", "transformer.h.1.a", "transformer.ln_f.weight"],
         ["embedding", "0", "1", "norm"]),
        (["gpt_neox.embed_in.weight", "gpt_neox.layers.0.a", "gpt_neox.layers.1.a", "embed_out.weight"],
         ["embedding", "0", "1", "head"]),
        (["token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight", "output_norm.weight", "output.weight"],
         ["embedding", "0", "1", "norm", "head"]),
        (["embeddings.word_embeddings.weight", "encoder.layer.0.a", "encoder.layer.1.a", "pooler.dense.weight"],
         ["embedding", "0", "1", "other"]),
        (["model.embed_tokens.weight", "model.layers.0.mlp.experts.7.w1.weight", "model.layers.1.mlp.gate.weight"],
         ["embedding", "0", "1"]),
        (["vision_tower.blocks.0.a", "vision_tower.blocks.1.a", "model.embed_tokens.weight", "model.layers.0.a",
          "lm_head.weight"], ["tower.0", "tower.1", "embedding", "0", "head"]),
        (["model.encoder.layers.0.a", "model.encoder.layers.1.a", "model.decoder.layers.0.a", "proj_out.weight"],
         ["encoder.0", "encoder.1", "0", "head"]),
        (["base_model.model.model.layers.0.q.lora_A.weight", "base_model.model.model.layers.1.q.lora_A.weight"],
         ["0", "1"]),
        (["down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.0.a"], ["0", "1", "100", "101"]),
    ],
)  # fmt: skip
def test_each_family_is_read_in_the_order_it_runs(names: list[str], expected: list[str]) -> None:
    assert labels(*names) == expected


def test_names_that_say_nothing_keep_the_order_of_the_file() -> None:
    (header, rest) = plan(layout_of(["zeta", "alpha", "mu"])).layers
    assert (header.label, rest.label) == ("header", "other")
    assert [extent.offset for extent in rest.extents] == [4096]


def test_layers_are_gathered_across_shards() -> None:
    made = plan(layout_of(["model.layers.0.a", "model.layers.1.a"], ["model.layers.0.b", "model.embed_tokens.weight"]))
    files = {layer.label: [extent.file for extent in layer.extents] for layer in made.layers}
    assert files == {"header": ["f0", "f1"], "embedding": ["f1"], "0": ["f0", "f1"], "1": ["f0"]}


def test_a_page_that_two_layers_share_goes_with_the_one_needed_first() -> None:
    made = plan(layout_of(["model.layers.1.a", "model.layers.0.a"]))
    first, second = (layer.extents[0] for layer in made.layers if layer.label in ("0", "1"))
    assert first.offset == 11_000 // 4096 * 4096
    assert second.offset + second.nbytes == first.offset


def test_whole_files_are_one_layer_each() -> None:
    layout = layout_of(["a"], ["b"])
    made = whole_file_plan(layout, {"f0": 11_000, "f1": 0})
    assert [(layer.label, layer.nbytes) for layer in made.layers] == [("f0", 11_000)]


def test_a_plan_of_a_thousand_tensors_takes_milliseconds() -> None:
    layout = layout_of([f"model.layers.{n // 10}.w{n % 10}" for n in range(1000)])
    took = []
    for _ in range(5):
        started = time.perf_counter()
        plan(layout)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.02
