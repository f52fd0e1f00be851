from __future__ import annotations

import pytest

from prefetch.giving import NOTHING_S, Giving


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_step_at_a_time(clock: Clock) -> None:
    giving = Giving(clock)
    assert giving.is_due(100.0)
    assert not giving.is_due(100.0), "one is under way"
    with giving:
        giving.freed_bytes = 5
        clock.now += 3
    assert not giving.is_due(102.0), "that sign came before the step had its effect"
    assert giving.is_due(103.5)


def test_when_nothing_could_leave_it_waits(clock: Clock) -> None:
    giving = Giving(clock)
    assert giving.is_due(100.0)
    with giving:
        pass
    clock.now += NOTHING_S - 1
    assert not giving.is_due(clock.now)
    clock.now += 1
    assert giving.is_due(clock.now)


def test_a_step_that_fails_is_no_step_for_ever(clock: Clock) -> None:
    giving = Giving(clock)
    assert giving.is_due(100.0)
    with pytest.raises(ZeroDivisionError), giving:
        raise ZeroDivisionError
    clock.now += NOTHING_S
    assert giving.is_due(clock.now)
