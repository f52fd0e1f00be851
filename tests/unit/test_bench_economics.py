"""The simulation of scale-to-zero against known results of queueing theory, and the article's claims by it."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tools", "bench"))

import _economics_claims as claims
import _queueing
import economics
from _queueing import DAY_S, Policy, simulate

MEAN_S = 30.0
COUNT = 40_000


def requests(service_s: float, *, seed: int = 7, span_s: float = COUNT * MEAN_S) -> tuple[list[float], list[float]]:
    random_ = random.Random(seed)
    arrivals = _queueing.poisson(random_, MEAN_S, span_s)
    return arrivals, _queueing.exponential(random_, service_s, len(arrivals))


@pytest.mark.parametrize(("instances", "service_s"), [(1, 18.0), (2, 42.0), (5, 120.0)])
def test_without_starts_it_is_erlangs(instances: int, service_s: float) -> None:
    load = service_s / MEAN_S
    result = simulate(*requests(service_s), 1e9, Policy(always=instances, most=instances))
    waited = _queueing.erlang_c(instances, load)
    assert result.starts == 0
    assert result.late(0.0) == pytest.approx(waited, rel=0.06)
    assert statistics.fmean(result.waits_s) == pytest.approx(waited * service_s / (instances - load), rel=0.15)
    assert result.utilisation == pytest.approx(load / instances, rel=0.03)


@pytest.mark.parametrize("start_s", [0.7, 15.0, 60.0])
def test_one_instance_that_is_given_up_at_once_is_welchs(start_s: float) -> None:
    service_s = 12.0
    result = simulate(*requests(service_s), start_s, Policy(most=1))
    known = _queueing.mean_wait_with_setup(1 / MEAN_S, service_s, 2 * service_s**2, start_s)
    assert statistics.fmean(result.waits_s) == pytest.approx(known, rel=0.05)
    # Renewal: a busy period's requests come to 1 / (1 - load), each of them preceded by one start.
    periods = len(result.waits_s) * (1 - service_s / MEAN_S) / (1 + start_s / MEAN_S)
    assert result.starts == pytest.approx(periods, rel=0.03)
    assert result.held_s == pytest.approx(result.busy_s + result.starts * start_s)


def test_starts_that_take_no_time_make_it_an_infinite_server() -> None:
    arrivals, services = requests(45.0)
    result = simulate(arrivals, services, 0.0, Policy())
    assert max(result.waits_s) == 0.0
    assert result.starts == len(arrivals)
    assert result.utilisation == pytest.approx(1.0)
    assert result.busy_s / result.span_s == pytest.approx(45.0 / MEAN_S, rel=0.03)


def test_nobody_waits_longer_than_a_start() -> None:
    result = simulate(*requests(45.0), 15.0, Policy())
    assert max(result.waits_s) <= 15.0 + 1e-6
    assert result.late(15.0 + 1e-6) == 0.0
    assert result.late(1.0) > 0.3


@pytest.mark.parametrize("keep_s", [10.0, 60.0])
def test_an_instance_is_started_anew_only_after_it_was_kept_in_vain(keep_s: float) -> None:
    service_s = 6.0
    arrivals, services = requests(service_s)
    result = simulate(arrivals, services, 0.0, Policy(keep_s=keep_s, most=1))
    idle_periods = len(arrivals) * (1 - service_s / MEAN_S)
    assert result.starts == pytest.approx(idle_periods * math.exp(-keep_s / MEAN_S), rel=0.05)
    # It idles min(gap, keep) each time: in the mean (1 - exp(-keep / mean)) * mean.
    idled = idle_periods * MEAN_S * (1 - math.exp(-keep_s / MEAN_S))
    assert result.held_s == pytest.approx(result.busy_s + idled, rel=0.03)


def test_more_instances_always_there_never_make_more_requests_wait() -> None:
    wanted = requests(60.0, span_s=DAY_S)
    late = [simulate(*wanted, 31.2, Policy(always=n)).late(1.0) for n in range(8)]
    assert late == sorted(late, reverse=True)
    assert late[0] > 0.5
    assert late[7] < 0.01


@pytest.mark.parametrize("process", [_queueing.poisson, _queueing.bursty, _queueing.diurnal])
def test_arrivals_have_the_mean_they_are_told_and_are_the_same_again(process: _queueing.Process) -> None:
    span_s = 30 * DAY_S
    arrivals = process(random.Random(3), MEAN_S, span_s)
    assert len(arrivals) == pytest.approx(span_s / MEAN_S, rel=0.05)
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert arrivals[-1] < span_s
    assert arrivals == process(random.Random(3), MEAN_S, span_s)


def test_bursts_and_days_vary_more_than_poisson() -> None:
    def dispersion(process: _queueing.Process, window_s: float) -> float:
        counts = [0] * int(30 * DAY_S / window_s)
        for at in process(random.Random(3), MEAN_S, 30 * DAY_S):
            counts[int(at / window_s)] += 1
        return statistics.pvariance(counts) / statistics.fmean(counts)

    assert dispersion(_queueing.poisson, 600) == pytest.approx(1.0, rel=0.1)
    assert dispersion(_queueing.bursty, 600) > 5
    assert dispersion(_queueing.diurnal, 3600) > 5


def test_most_at_once_counts_what_overlaps() -> None:
    assert _queueing.most_at_once([]) == 0
    assert _queueing.most_at_once([(0.0, 1.0), (1.0, 2.0)]) == 1
    assert _queueing.most_at_once([(0.0, 3.0), (1.0, 2.0), (1.5, 4.0), (5.0, 6.0)]) == 3


def test_what_was_held_is_what_was_always_there_and_every_other_instance() -> None:
    result = simulate(*requests(45.0, span_s=DAY_S), 15.0, Policy(always=1, keep_s=20.0))
    others = sum(until - since for since, until in result.others)
    assert len(result.others) == result.starts
    assert result.held_s == pytest.approx(others + result.span_s)
    assert result.held_s > result.busy_s + result.starts * 15.0


# Policies and claims


def wanted(service_s: float = 8.0, goal_s: float = 1.0) -> economics.Demand:
    return economics.demand(
        _queueing.poisson, seed=1, mean_s=MEAN_S, service_s=service_s, days=0.5, goal_s=goal_s, late=0.01
    )


def test_a_start_shorter_than_the_goal_needs_no_pool_and_a_longer_one_does() -> None:
    here = wanted()
    fast, slow = economics.cheapest(here, 0.7), economics.cheapest(here, 31.2)
    assert fast.policy == Policy()
    assert fast.pool == 0.0
    assert slow.policy.always > 0
    assert slow.pool > 0.3
    assert here.is_met(slow.result)
    assert not here.is_met(here.run(31.2, Policy(always=slow.policy.always - 1)))


def test_the_cheapest_policy_is_what_trying_all_of_them_finds() -> None:
    here = wanted(service_s=30.0, goal_s=2.0)
    tried = [
        result.held_s
        for keep_s in economics.KEEPS_S
        for always in range(here.peak + 1)
        if here.is_met(result := here.run(15.2, Policy(always=always, keep_s=keep_s)))
    ]
    assert economics.cheapest(here, 15.2).result.held_s == pytest.approx(min(tried), rel=0.01)


def test_break_evens_are_where_arithmetic_has_them() -> None:
    here = wanted()
    goal_s, cost_s = economics.break_evens(here, economics.fixed(here))
    assert goal_s == pytest.approx(here.goal_s, rel=0.03)
    # Each request holds a GPU for a start and a service, those always there all the time.
    always = economics.fixed(here).policy.always
    assert cost_s < always * MEAN_S * 2
    starts = here.run(cost_s, Policy())
    assert starts.held_s / starts.span_s == pytest.approx(always, rel=0.05)


def test_the_same_seed_gives_the_same_figures() -> None:
    assert wanted() == wanted()


def plan(held_s: float, *, idle_s: float = 0.0, busy_s: float = 100.0) -> claims.Plan:
    starts = int(held_s - busy_s - idle_s)
    result = _queueing.Result(waits_s=[0.0], busy_s=busy_s, held_s=held_s, starts=starts, span_s=100.0, peak=10)
    return claims.Plan(start_s=1.0, policy=Policy(), result=result, peak=10)


def test_claims_are_reproduced_only_if_both_sides_are() -> None:
    prices = claims.Prices(dollars_an_hour=2.0, tokens_per_s=7937)
    pool, use, cost, dollars, factor = claims.verdicts(plan(600, idle_s=500), plan(150, idle_s=0), prices)
    assert (pool.ours, pool.word) == ("50% to 0.0%", "reproduced")
    assert (use.ours, use.word) == ("17% to 67%", "reproduced")
    assert (cost.ours, cost.word) == ("75% lower", "reproduced")
    assert (dollars.ours, dollars.word) == ("$0.42 to $0.10", "reproduced")
    assert factor.word == "reproduced"
    words = [one.word for one in claims.verdicts(plan(150), plan(600, idle_s=500), prices)]
    assert words == ["not reproduced"] * 5


def test_half_a_claim_is_told_as_half() -> None:
    prices = claims.Prices(dollars_an_hour=2.0, tokens_per_s=2000)
    pool, use, *_ = claims.verdicts(plan(1100, idle_s=1000), plan(150), prices)
    assert pool.word == "after: reproduced; before: not"
    assert use.word == "after: reproduced; before: not"


def test_the_articles_figures_do_not_agree_with_each_other() -> None:
    said = " ".join(claims.consistency())
    assert "66% lower" in said
    assert "69% lower" in said


def test_the_script_says_the_same_twice_and_gives_all_of_it_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(economics, "FLEETS", (1, 3))
    given = ["--slow-s", "31.2", "--fast-s", "0.7", "--days", "0.2", "--no-grid", "--json", str(tmp_path / "out.json")]
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["economics.py", *given])
        economics.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document["arrivals"]) == {"Poisson", "bursty", "diurnal"}
    for name in document["arrivals"]:
        assert f"{name}, the article's own, claimed, not reproduced: 15.2 s to 0.38 s" in said[0]
        assert [one["claim"] in said[0] for one in document["arrivals"][name]["claims"]["given"]] == [True] * 5
    owned = {(one["start_s"], one["models"]): one["gpus"] for one in document["fleet"]}
    assert owned[0.7, 3] < owned[31.2, 3]


def test_start_times_are_the_medians_of_the_bench(tmp_path: Path) -> None:
    runs = [
        {"model": {"parameters": 7}, "rows": [{"row": "none cold", "samples": [{"total_s": s} for s in totals]}]}
        for totals in ([30.0, 20.0], [40.0])
    ]
    path = tmp_path / "coldstart.json"
    path.write_text(json.dumps({"runs": runs}))
    assert economics.measured(str(path), "none cold") == 30.0
    with pytest.raises(SystemExit, match="released warm"):
        economics.measured(str(path), "released warm")
