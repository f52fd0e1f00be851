"""The order of a plan, and that it reads every byte once."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefetch.plan import Extent, Plan, plan_of, whole_file_plan
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


def sizes_of(layout: WeightLayout) -> dict[str, int]:
    ends = dict.fromkeys(layout.files, HEADER)
    for tensor in layout.tensors:
        ends[tensor.file] = tensor.offset + tensor.nbytes
    return ends


def plan(layout: WeightLayout, learned: Sequence[Extent] | None = None) -> Plan:
    return plan_of(layout, sizes_of(layout), learned)


def reads(made: Plan) -> list[tuple[str, str, int, int]]:
    return [(read.label, read.extent.file, read.extent.offset, read.extent.end) for read in made.reads]


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


def test_a_page_that_many_layers_share_goes_with_the_one_needed_first_of_all() -> None:
    layout = layout_of([f"model.layers.{number}.a" for number in (3, 5, 1, 4, 2)], nbytes=600)
    made = plan_of(layout, {"f0": 9000})
    assert [(layer.label, [(one.offset, one.end) for one in layer.extents]) for layer in made.layers] == [
        ("header", [(0, 4096)]), ("2", [(4096, 9000)]),
    ]  # fmt: skip


def test_files_whose_names_say_nothing_are_read_one_after_another() -> None:
    made = plan(layout_of(["zeta", "alpha"], ["mu"]))
    assert reads(made) == [
        ("header", "f0", 0, 4096), ("other", "f0", 4096, 21_000),
        ("header", "f1", 0, 4096), ("other", "f1", 4096, 11_000),
    ]  # fmt: skip
    assert list(made.extents()) == [read.extent for read in made.reads]


def test_what_was_learned_is_read_first_and_the_rest_in_the_order_of_layers() -> None:
    layout = layout_of(["model.embed_tokens.weight", "model.layers.0.a", "model.layers.1.a"], nbytes=8192 * 1000)
    made = plan(layout, [Extent("f0", 17_000_000, 10), Extent("f0", 9_000_000, 5000)])
    start, middle = 8192 * 1000 + HEADER, 8192 * 2000 + HEADER
    assert reads(made) == [
        ("1", "f0", 17_000_000 // 4096 * 4096, 17_000_000 // 4096 * 4096 + 4096),
        ("0", "f0", 9_000_000 // 4096 * 4096, -(-9_005_000 // 4096) * 4096),
        ("header", "f0", 0, 4096),
        ("embedding", "f0", 4096, -(-start // 4096) * 4096),
        ("0", "f0", -(-start // 4096) * 4096, 9_000_000 // 4096 * 4096),
        ("0", "f0", -(-9_005_000 // 4096) * 4096, -(-middle // 4096) * 4096),
        ("1", "f0", -(-middle // 4096) * 4096, 17_000_000 // 4096 * 4096),
        ("1", "f0", 17_000_000 // 4096 * 4096 + 4096, 24_577_000),
    ]
    assert made.layers == plan(layout).layers
    assert list(made.extents({"0"})) == [read.extent for read in made.reads if read.label == "0"]


def test_what_was_learned_may_be_stale() -> None:
    layout = layout_of(["model.layers.0.a"])
    stale = [Extent("gone", 0, 100), Extent("f0", -5000, 10), Extent("f0", 1 << 40, 100), Extent("f0", 8192, 0),
             Extent("f0", 8192, 1 << 40)]  # fmt: skip
    assert reads(plan(layout, stale)) == [
        ("0", "f0", 8192, 11_000), ("header", "f0", 0, 4096), ("0", "f0", 4096, 8192),
    ]  # fmt: skip


def test_a_small_gap_of_the_same_layer_is_read_along() -> None:
    layout = layout_of(["model.layers.0.a", "model.layers.1.a"], nbytes=4 << 20)
    near = [Extent("f0", 1 << 20, 4096), Extent("f0", 2 << 20, 4096)]
    assert reads(plan(layout, near))[0] == ("0", "f0", 1 << 20, (2 << 20) + 4096)
    far = [Extent("f0", 1 << 20, 4096), Extent("f0", (2 << 20) + 4096, 4096)]
    assert reads(plan(layout, far))[0] == ("0", "f0", 1 << 20, (1 << 20) + 4096)
    another = [Extent("f0", (4 << 20) - 4096, 4096), Extent("f0", (4 << 20) + 40_960, 4096)]
    assert [read[0] for read in reads(plan(layout, another))][:2] == ["0", "1"]


def test_a_plan_takes_time_in_proportion() -> None:
    """Ten times the tensors take ten times as long (0.5 ms for 1,000), and not a hundred times."""
    least = []
    for count in (1000, 10_000):
        layout = layout_of([f"model.layers.{n * 60 // count}.mlp.experts.{n}.w.weight" for n in range(count)])
        took = []
        for _ in range(5):
            started = time.thread_time()
            plan(layout)
            took.append(time.thread_time() - started)
        least.append(min(took))
    assert least[1] < 40 * least[0]
