"""Which GPU takes the place of which: nothing moves without need, and what moves is told to the driver in full."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import MisfitError, RetryError
from checkpoint.nvml import Device
from checkpoint.placement import Left, place

GIB = 1 << 30


def left(uuid: str, used: int, name: str = "H100") -> Left:
    return Left(uuid=uuid, name=name, used_bytes=used * GIB)


def device(uuid: str, free: int, name: str = "H100") -> Device:
    return Device(uuid=uuid, name=name, total_bytes=80 * GIB, free_bytes=free * GIB, used_bytes={}, mig=False)


def test_its_own_gpu_with_room_needs_no_pairs() -> None:
    assert place([left("a", 20), left("b", 0)], [device("a", 20), device("b", 80)]) == ()


def test_nothing_used_needs_no_pairs_on_whatever_machine() -> None:
    assert place([left("a", 0)], []) == ()


def test_a_full_gpu_is_swapped_with_the_fullest_that_has_room() -> None:
    here = [device("a", 10), device("b", 80), device("c", 30)]
    assert place([left("a", 20), left("b", 0), left("c", 0)], here) == (("a", "c"), ("b", "b"), ("c", "a"))


def test_another_machine_with_one_gpu_of_the_model() -> None:
    assert place([left("a", 20)], [device("x", 10, "L4"), device("y", 40)]) == (("a", "y"),)


def test_who_needs_most_chooses_first() -> None:
    pairs = place([left("a", 10), left("b", 50)], [device("x", 60), device("y", 20)])
    assert dict(pairs) == {"a": "y", "b": "x"}


def test_no_gpu_of_the_model() -> None:
    with pytest.raises(MisfitError, match="no H100 is left for a"):
        place([left("a", 20)], [device("x", 80, "L4")])


def test_too_little_free_is_worth_another_try() -> None:
    with pytest.raises(RetryError, match="no H100 has the 20480 MiB free that are needed, 15360 MiB at most"):
        place([left("a", 20)], [device("a", 10), device("b", 15)])


def test_fewer_gpus_than_the_driver_must_be_told_of() -> None:
    with pytest.raises(MisfitError, match="a machine with 2 GPUs"):
        place([left("a", 20), left("b", 0)], [device("x", 80)])


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["H100", "L4"])), max_size=6),
    st.lists(st.tuples(st.integers(0, 80), st.sampled_from(["H100", "L4"]), st.booleans()), max_size=6),
)
def test_pairs_are_complete_of_one_model_and_have_room(
    snapshot: list[tuple[int, str]], machine: list[tuple[int, str, bool]]
) -> None:
    before = [left(f"gpu{number}", used, name) for number, (used, name) in enumerate(snapshot)]
    here = [
        device(
            f"gpu{number}" if same and number < len(before) and before[number].name == name else f"new{number}",
            free,
            name,
        )
        for number, (free, name, same) in enumerate(machine)
    ]
    try:
        pairs = place(before, here)
    except (MisfitError, RetryError):
        return
    found = {one.uuid: one for one in here}
    if not pairs:
        for one in before:
            assert not one.used_bytes or found[one.uuid].free_bytes >= one.used_bytes
        return
    assert [old for old, _ in pairs] == [one.uuid for one in before]
    assert len({new for _, new in pairs}) == len(pairs)
    for one, (_, new) in zip(before, pairs, strict=True):
        assert found[new].name == one.name
        assert not one.used_bytes or found[new].free_bytes >= one.used_bytes
