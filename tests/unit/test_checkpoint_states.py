"""The state table: every way is legal step by step, and the shortest there is."""

from __future__ import annotations

from itertools import product

import pytest

from checkpoint.states import State, Step, way

REACHABLE = (State.RUNNING, State.LOCKED, State.CHECKPOINTED)


@pytest.mark.parametrize(("now", "wanted"), list(product(REACHABLE, REACHABLE)))
def test_a_way_starts_here_ends_there_and_each_step_is_legal(now: State, wanted: State) -> None:
    steps = way(now, wanted)
    assert steps is not None
    at = now
    for step in steps:
        assert step.before is at
        at = step.after
    assert at is wanted
    assert len(steps) == abs(REACHABLE.index(now) - REACHABLE.index(wanted))


@pytest.mark.parametrize("dead_end", [State.FAILED, State.CHECKPOINTING, State.RESTORING])
def test_no_way_leads_out_of_or_into_a_state_that_is_not_ours(dead_end: State) -> None:
    for other in State:
        expected = () if other is dead_end else None
        assert way(dead_end, other) == expected
        assert way(other, dead_end) == expected


def test_the_way_of_a_snapshot_and_back() -> None:
    assert way(State.RUNNING, State.CHECKPOINTED) == (Step.LOCK, Step.CHECKPOINT)
    assert way(State.CHECKPOINTED, State.RUNNING) == (Step.RESTORE, Step.UNLOCK)


def test_numbers_are_those_of_the_driver() -> None:
    assert [state.value for state in State] == [0, 1, 2, 3, 4, 5]
    assert State(2).word == "checkpointed"
