"""Whatever a model's files look like, a plan reads each byte once and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefetch.plan import Extent, plan_of, whole_file_plan
from weightfs.formats.layout import TensorExtent, WeightLayout
from weightfs.formats.roles import classify

NAMES = st.sampled_from(
    ["model.embed_tokens.weight", "model.layers.0.a", "model.layers.7.b", "encoder.layers.1.a", "decoder.layers.0.a",
     "vision_tower.blocks.3.a", "model.norm.weight", "lm_head.weight", "what.ever", ""]
)  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> tuple[WeightLayout, dict[str, int]]:
    tensors, sizes = [], {}
    for number in range(draw(st.integers(1, 3))):
        file, at = f"f{number}", draw(st.integers(0, 9000))
        for name in draw(st.lists(NAMES, max_size=8)):
            at += draw(st.integers(0, 5000))  # a gap
            nbytes = draw(st.integers(0, 20_000))
            role, layer = classify(name)
            tensors.append(TensorExtent(name, "U8", (nbytes,), file, at, nbytes, layer, role))
            at += nbytes
        sizes[file] = at + draw(st.integers(0, 9000))
    return WeightLayout("safetensors", tuple(sizes), tuple(tensors)), sizes


LEARNED = st.lists(
    st.builds(Extent, st.sampled_from(["f0", "f1", "f2", "gone"]), st.integers(-9000, 200_000), st.integers(0, 70_000)),
    max_size=12,
)


@given(models(), LEARNED)
def test_each_byte_is_read_once(model: tuple[WeightLayout, dict[str, int]], learned: list[Extent]) -> None:
    layout, sizes = model
    for made in (plan_of(layout, sizes), plan_of(layout, sizes, learned), whole_file_plan(layout, sizes)):
        for file, size in sizes.items():
            spans = sorted((one.offset, one.end) for one in made.extents() if one.file == file)
            assert all(start < end for start, end in spans)
            assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), size]
        assert made.nbytes == sum(sizes.values())


@given(models(), LEARNED)
def test_learned_or_not_a_layer_is_the_same_bytes(
    model: tuple[WeightLayout, dict[str, int]], learned: list[Extent]
) -> None:
    made, plain = plan_of(*model, learned), plan_of(*model)
    assert made.layers == plain.layers
    for layer in made.layers:
        assert sum(one.nbytes for one in made.extents({layer.label})) == layer.nbytes
        assert all(one.offset % 4096 == 0 for one in layer.extents)


@given(models(), LEARNED)
def test_what_was_learned_is_read_before_anything_else(
    model: tuple[WeightLayout, dict[str, int]], learned: list[Extent]
) -> None:
    layout, sizes = model
    there = {(one.file, page) for one in learned for page in range(max(one.offset, 0) // 4096, -(-one.end // 4096))
             if one.nbytes and page * 4096 < sizes.get(one.file, 0)}  # fmt: skip
    wanted = [(one.file, page) for one in plan_of(layout, sizes, learned).extents()
              for page in range(one.offset // 4096, -(-one.end // 4096))]  # fmt: skip
    # Gaps within one layer are read along.
    last = max((position for position, page in enumerate(wanted) if page in there), default=-1)
    between = {page for page in wanted[: last + 1] if page not in there}
    for file, page in between:
        assert any((file, other) in there for other in range(page - 256, page))
        assert any((file, other) in there for other in range(page + 1, page + 257))


@given(models())
def test_embeddings_come_before_the_blocks_of_their_part(model: tuple[WeightLayout, dict[str, int]]) -> None:
    found = [layer.label for layer in plan_of(*model).layers]
    assert len(found) == len(set(found))
    if "embedding" in found:
        assert all(found.index("embedding") < found.index(label) for label in found if label.isdecimal())
    blocks = [int(label) for label in found if label.isdecimal()]
    assert blocks == sorted(blocks)
