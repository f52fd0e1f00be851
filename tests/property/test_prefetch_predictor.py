"""Any bytes are a predictor or a reason; any history and any candidates give probabilities and a choice that fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefetch.predictor import Candidate, Predictor

TIMES = st.floats(0, 4e9)
OPENS = st.lists(st.tuples(st.sampled_from("abcdefgh"), TIMES), max_size=60)
CANDIDATES = st.dictionaries(
    st.sampled_from("abcdefghij"),
    st.builds(Candidate, nbytes=st.integers(0, 1 << 40), resident_bytes=st.integers(0, 1 << 40)),
)


def of(opens: list[tuple[str, float]]) -> Predictor:
    predictor = Predictor()
    for name, at in opens:
        predictor.observe(name, at)
    return predictor


def check(state: bytes) -> None:
    predictor, wrong = Predictor.from_state(state)
    assert wrong is None or (wrong and len(predictor) == 0)
    assert 0 <= predictor.probability("a", 1e9, 3600) <= 1
    predictor.observe("a", 1e9)
    assert Predictor.from_state(predictor.state())[1] is None


@given(st.binary(max_size=400))
def test_any_bytes(state: bytes) -> None:
    check(state)


@given(OPENS, st.data())
def test_damaged_states(opens: list[tuple[str, float]], data: st.DataObject) -> None:
    state = bytearray(of(opens).state())
    for _ in range(data.draw(st.integers(1, 4))):
        state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(state[: data.draw(st.integers(0, len(state)))]))
    check(bytes(state))


@given(OPENS)
def test_a_state_comes_back(opens: list[tuple[str, float]]) -> None:
    state = of(opens).state()
    again, wrong = Predictor.from_state(state)
    assert wrong is None
    assert again.state() == state


@given(OPENS, TIMES, st.floats(0, 1e8), st.floats(0, 1e8))
def test_a_probability_is_one_and_grows_with_the_window(
    opens: list[tuple[str, float]], now: float, window: float, more: float
) -> None:
    predictor = of(opens)
    for name in "abz":
        short, long = (predictor.probability(name, now, length) for length in (window, window + more))
        assert 0 <= short <= long + 1e-9 <= 1 + 1e-9


@given(OPENS, TIMES, st.floats(0, 1e8), CANDIDATES, st.integers(0, 1 << 42), st.floats(0, 1e12))
def test_a_choice_fits_the_budget_names_nothing_twice_and_is_repeatable(
    opens: list[tuple[str, float]],
    now: float,
    window: float,
    candidates: dict[str, Candidate],
    budget: int,
    bandwidth: float,
) -> None:
    predictor = of(opens)
    chosen = predictor.choose(now, window, candidates, budget, bandwidth)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(candidates)
    assert sum(candidates[name].nbytes for name in chosen) <= budget
    assert chosen == of(opens).choose(now, window, dict(reversed(candidates.items())), budget, bandwidth)
    for name in chosen:
        missing = candidates[name].nbytes - candidates[name].resident_bytes
        assert missing <= 0 or predictor.probability(name, now, window) > 0
