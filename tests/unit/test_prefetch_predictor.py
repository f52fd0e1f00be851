from __future__ import annotations

import random

import msgspec
import pytest

from prefetch.predictor import Candidate, Predictor

HOUR = 3600.0
DAY = 24 * HOUR
MONDAY = 20_000 * DAY  # midnight, UTC
GB = 10**9


def test_what_was_never_opened_has_no_probability() -> None:
    predictor = Predictor()
    assert predictor.probability("a", MONDAY, DAY) == 0
    predictor.observe("a", MONDAY)
    assert predictor.probability("b", MONDAY, DAY) == 0
    assert predictor.probability("a", MONDAY, 0) == 0
    assert 0 < predictor.probability("a", MONDAY, HOUR) < 1


def test_a_model_that_is_opened_every_90_minutes_is_expected_then_and_not_before() -> None:
    predictor = Predictor()
    rng = random.Random(1)
    for turn in range(200):
        predictor.observe("job", MONDAY + turn * 1.5 * HOUR + rng.uniform(-60, 60))
    last = MONDAY + 199 * 1.5 * HOUR
    early = predictor.probability("job", last + 0.25 * HOUR, HOUR / 3)
    due = predictor.probability("job", last + 1.45 * HOUR, HOUR / 3)
    assert early < 0.05
    assert due > 0.8


def test_a_burst_that_goes_on_is_likelier_than_one_that_is_over() -> None:
    predictor = Predictor()
    at = MONDAY
    for _ in range(40):
        for _ in range(10):
            at += 60
            predictor.observe("burst", at)
        at += 17 * HOUR
    last = at - 17 * HOUR
    assert predictor.probability("burst", last + 30, 300) > 0.7
    assert predictor.probability("burst", last + 2 * HOUR, 300) < 0.1


def test_the_time_of_day_matters() -> None:
    predictor = Predictor()
    rng = random.Random(2)
    for day in range(28):
        for _ in range(rng.randrange(2, 7)):  # in the office, at no fixed times
            predictor.observe("office", MONDAY + day * DAY + rng.uniform(9, 17) * HOUR)
    today = MONDAY + 28 * DAY
    morning = predictor.probability("office", today + 10 * HOUR, HOUR)
    night = predictor.probability("office", today + 27 * HOUR, HOUR)
    assert morning > 0.3
    assert night < 0.05


def test_decay_forgets_what_is_over() -> None:
    predictor = Predictor(half_life_s=7 * DAY)
    rng = random.Random(3)
    for hour in range(24 * 14):
        predictor.observe("old", MONDAY + (hour + rng.random()) * HOUR)
    then = MONDAY + 14 * DAY
    for hour in range(24 * 28):
        predictor.observe("new", then + (hour + rng.random()) * HOUR)
    now = then + 28 * DAY
    assert predictor.probability("old", then, HOUR) > 0.4
    assert predictor.probability("old", now, HOUR) < 0.05
    assert predictor.probability("new", now, HOUR) > 0.4


def test_two_chances_are_more_than_one_and_a_longer_window_is_no_less() -> None:
    predictor = Predictor()
    rng = random.Random(4)
    at = MONDAY
    for _ in range(300):
        at += rng.expovariate(1 / (3 * HOUR))
        predictor.observe("a", at)
    chances = [predictor.probability("a", at + HOUR, window) for window in (60, HOUR, 3 * HOUR, DAY, 30 * DAY)]
    assert chances == sorted(chances)
    assert chances[2] == pytest.approx(1 - 2.718281828**-1, abs=0.15), "Poisson: one gap's mean"
    assert chances[-1] > 0.99


def test_a_clock_that_goes_back_is_survived() -> None:
    predictor = Predictor()
    for at in (MONDAY, MONDAY + HOUR, 100 * MONDAY, MONDAY + 2 * HOUR, 0.0, MONDAY + 3 * HOUR):
        predictor.observe("a", at)
        assert 0 <= predictor.probability("a", MONDAY, HOUR) <= 1
    for hour in range(4, 100):
        predictor.observe("a", MONDAY + hour * HOUR)
    assert predictor.probability("a", MONDAY + 99.9 * HOUR, HOUR) > 0.5


# What it forgets, what it keeps


def test_the_number_of_models_is_bounded_and_the_least_likely_goes() -> None:
    predictor = Predictor(most_models=3)
    for turn in range(10):
        for name in ("a", "b"):
            predictor.observe(name, MONDAY + turn * HOUR)
    predictor.observe("c", MONDAY)
    predictor.observe("d", MONDAY + DAY)
    assert len(predictor) == 3
    assert predictor.probability("c", MONDAY + DAY, DAY) == 0
    assert predictor.probability("d", MONDAY + DAY, DAY) > 0


def test_a_state_comes_back_and_goes_on_alike() -> None:
    predictor = Predictor()
    rng = random.Random(5)
    names = ["a", "b", "müller", "\udcff"]  # the last as a file's name that is not UTF-8
    for turn in range(300):
        predictor.observe(rng.choice(names), MONDAY + turn * 0.3 * HOUR)
    again, wrong = Predictor.from_state(predictor.state())
    assert wrong is None
    for one in (predictor, again):
        one.observe("a", MONDAY + 100 * HOUR)
    now = MONDAY + 101 * HOUR
    assert [again.probability(name, now, HOUR) for name in names] == [
        predictor.probability(name, now, HOUR) for name in names
    ]
    assert again.state() == predictor.state()


def test_a_state_of_more_models_is_cut_to_the_likeliest() -> None:
    predictor = Predictor()
    for number in range(20):
        for _ in range(number + 1):
            predictor.observe(f"m{number}", MONDAY)
    again, wrong = Predictor.from_state(predictor.state(), most_models=5)
    assert wrong is None
    assert [number for number in range(20) if again.probability(f"m{number}", MONDAY, DAY)] == [15, 16, 17, 18, 19]


def test_a_full_state_is_below_a_kibibyte_a_model() -> None:
    predictor = Predictor()
    for turn in range(48):
        for number in range(100):
            at = MONDAY + turn * HOUR / 2 + turn % 7 * 600 + 2 ** (turn / 4)
            predictor.observe(f"models--organisation--name-{number}", at)
    assert len(predictor.state()) < 100 * 1024


PAST = [float(MONDAY), 1.0, [0.0] * 48, {3: 1.0}, 0.0]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (b"", "truncated"),
        (b"\xc1", "invalid"),
        (msgspec.msgpack.encode([2, None, []]), "version is 2"),
        (msgspec.msgpack.encode([1, None, [[b"a", PAST]]]), "beginning"),
        (msgspec.msgpack.encode([1, float("nan"), [[b"a", PAST]]]), "beginning"),
        (msgspec.msgpack.encode([1, 0.0, [[b"a", [float("inf"), *PAST[1:]]]]]), "not finite"),
        (msgspec.msgpack.encode([1, 0.0, [[b"a", [*PAST[:1], -1.0, *PAST[2:]]]]]), "out of bounds"),
        (msgspec.msgpack.encode([1, 0.0, [[b"a", [*PAST[:4], 99.0]]]]), "out of bounds"),
        (msgspec.msgpack.encode([1, 0.0, [[b"a", [*PAST[:2], [0.0] * 47, *PAST[3:]]]]]), "bins"),
        (msgspec.msgpack.encode([1, 0.0, [[b"a", [*PAST[:3], {100: 1.0}, 0.0]]]]), "bins"),
        (b"\x91" * 100_000, ""),
    ],
)
def test_bad_bytes_are_an_empty_predictor_and_a_reason(state: bytes, reason: str) -> None:
    predictor, wrong = Predictor.from_state(state)
    assert len(predictor) == 0
    assert wrong is not None
    assert reason in wrong


# What memory is spent on


def test_the_likeliest_are_chosen_within_the_budget() -> None:
    predictor = Predictor()
    for turn in range(100):
        predictor.observe("often", MONDAY + turn * 0.1 * HOUR)
        if turn % 10 == 0:
            predictor.observe("seldom", MONDAY + turn * 0.1 * HOUR)
    now = MONDAY + 10 * HOUR
    candidates = {name: Candidate(nbytes=4 * GB) for name in ("seldom", "never", "often")}
    assert predictor.choose(now, HOUR, candidates, 4 * GB, GB) == ["often"]
    assert predictor.choose(now, HOUR, candidates, 12 * GB, GB) == ["often", "seldom"], "never opened, never read"
    assert predictor.choose(now, HOUR, candidates, 3 * GB, GB) == []
    assert predictor.choose(now, HOUR, {**candidates, "often": Candidate(nbytes=5 * GB)}, 4 * GB, GB) == ["seldom"]


def test_what_is_resident_stays_beside_its_equals_and_goes_for_its_betters() -> None:
    predictor = Predictor()
    rng = random.Random(7)
    for at in sorted(MONDAY + rng.uniform(0, 100) * HOUR for _ in range(100)):
        predictor.observe("a", at)
        predictor.observe("b", at)
    for at in sorted(rng.uniform(0, 100) for _ in range(600)):
        predictor.observe("better", MONDAY + at * HOUR)
    now = MONDAY + 100 * HOUR
    candidates = {"a": Candidate(nbytes=GB), "b": Candidate(nbytes=GB, resident_bytes=GB)}
    assert predictor.choose(now, 0.2 * HOUR, candidates, GB, GB) == ["b"]
    candidates["better"] = Candidate(nbytes=GB)
    assert predictor.choose(now, 0.2 * HOUR, candidates, GB, GB) == ["better"]


def test_what_is_resident_and_unlikely_stays_where_there_is_room_only() -> None:
    predictor = Predictor()
    predictor.observe("a", MONDAY)
    candidates = {"a": Candidate(nbytes=GB), "stranger": Candidate(nbytes=GB, resident_bytes=GB)}
    assert predictor.choose(MONDAY + 60, HOUR, candidates, 2 * GB, GB) == ["a", "stranger"]
    assert predictor.choose(MONDAY + 60, HOUR, candidates, GB, GB) == ["a"]


def test_no_more_is_read_than_the_bandwidth_lets_through() -> None:
    predictor = Predictor()
    for turn in range(30):
        for number in range(10):
            predictor.observe(f"m{number}", MONDAY + turn * 60 + number)
    candidates = {f"m{number}": Candidate(nbytes=GB) for number in range(10)}
    now = MONDAY + 30 * 60
    assert len(predictor.choose(now, 60, candidates, 10 * GB, 1.0 * GB)) == 10
    assert len(predictor.choose(now, 60, candidates, 10 * GB, GB / 20)) == 3
    assert predictor.choose(now, 60, candidates, 10 * GB, 0) == []


def test_it_beats_the_most_recent_on_a_small_trace() -> None:
    """Two models in turn, by day and by night, and passers-by: memory for two."""
    rng = random.Random(6)
    trace: list[tuple[float, str]] = []
    for day in range(20):
        for _ in range(12):
            trace.append((MONDAY + day * DAY + rng.uniform(8, 18) * HOUR, rng.choice("ab")))
            trace.append((MONDAY + day * DAY + rng.uniform(20, 30) * HOUR, rng.choice("cd")))
            trace.append((MONDAY + (day + rng.random()) * DAY, f"passer-by {rng.randrange(50)}"))
    trace.sort()
    predictor = Predictor()
    recent: list[str] = []
    kept: list[str] = []
    hits = {"recent": 0, "predictor": 0}
    for number, (at, model) in enumerate(trace):
        names = {name for _, name in trace[:number]}
        kept = predictor.choose(
            at - 1, HOUR, {name: Candidate(nbytes=GB, resident_bytes=GB * (name in kept)) for name in names}, 2 * GB, GB
        )
        hits["predictor"] += model in kept
        hits["recent"] += model in recent[-2:]
        predictor.observe(model, at)
        recent = [name for name in recent if name != model] + [model]
    assert hits["predictor"] > 1.3 * hits["recent"], hits
