"""What a fast start is worth: scale-to-zero simulated, with measured start times, against the article's claims.

    python tools/bench/economics.py --starts coldstart.json          start times as tools/bench/coldstart.py found them
    python tools/bench/economics.py --slow-s 31.2 --fast-s 0.72      or as given

One model; Poisson, bursty and diurnal arrivals of the same mean. For each start time the cheapest policy is looked for
that meets the goal (no more than --late of the requests wait longer than --goal-s for an instance that is ready):
how many instances are always there, and for how long others are kept once nobody wants them. An instance has a GPU of
its own, which counts as held while it is there, is being started, or is kept; a free one is always found at once, and
is paid for by the second, but in the table of owned ones. The same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import _queueing
from _economics_claims import Plan, Prices, Verdict, consistency, verdicts
from _queueing import DAY_S, Policy, Process, simulate

PROCESSES: Final[dict[str, Process]] = {
    "Poisson": _queueing.poisson,
    "bursty": _queueing.bursty,
    "diurnal": _queueing.diurnal,
}
ARTICLES: Final = (15.2, 0.38)
"""Its start times, before and after, which nobody has reproduced."""
KEEPS_S: Final = (0.0, 5.0, 30.0, 120.0, 600.0)
LADDER_S: Final = (1.0, 2.0, 5.0, 20.0)
GRID_SERVICES_S: Final = (2.0, 8.0, 20.0, 60.0)
GRID_GOALS_S: Final = (0.5, 1.0, 2.0, 5.0)
_GRID_DAYS: Final = 1.0
FLEETS: Final = (1, 10, 50)
_FLEET_DAYS: Final = 0.25
_LONGEST_START_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Requests, and what is wanted for them.

    Attributes:
        arrivals_s, services_s: of each.
        goal_s: the longest that one should wait for an instance that is ready.
        late: the share of requests that may wait longer.
        peak: most of them at the same time, had none to wait.
    """

    arrivals_s: Sequence[float]
    services_s: Sequence[float]
    goal_s: float
    late: float
    peak: int

    def run(self, start_s: float, policy: Policy) -> _queueing.Result:
        """Simulate it."""
        return simulate(self.arrivals_s, self.services_s, start_s, policy)

    def is_met(self, result: _queueing.Result) -> bool:
        """Whether that is good enough."""
        return result.late(self.goal_s) <= self.late


def demand(
    process: Process, *, seed: int, mean_s: float, service_s: float, days: float, goal_s: float, late: float
) -> Demand:
    """Requests by chance."""
    random_ = random.Random(seed)
    arrivals = process(random_, mean_s, days * DAY_S)
    services = _queueing.exponential(random_, service_s, len(arrivals))
    peak = simulate(arrivals, services, 0.0, Policy()).peak
    return Demand(arrivals_s=arrivals, services_s=services, goal_s=goal_s, late=late, peak=peak)


def cheapest(wanted: Demand, start_s: float) -> Plan:
    """The policy that meets the goal with the least GPU time.

    Where others are kept longer, fewer need always be there; as many as the peak always meet the goal.
    """
    found: list[Plan] = []

    def meets(always: int, keep_s: float) -> bool:
        policy = Policy(always=always, keep_s=keep_s)
        result = wanted.run(start_s, policy)
        if wanted.is_met(result):
            found.append(Plan(start_s=start_s, policy=policy, result=result, peak=wanted.peak))
            return True
        return False

    fewest = next(always for always in range(wanted.peak + 1) if meets(always, KEEPS_S[0]))
    for keep_s in KEEPS_S[1:]:
        while fewest and meets(fewest - 1, keep_s):
            fewest -= 1
    return min(found, key=lambda plan: plan.result.held_s)


def fixed(wanted: Demand) -> Plan:
    """The fewest instances that meet the goal and are always there, none being started."""
    for always in range(1, wanted.peak + 1):
        policy = Policy(always=always, most=always)
        result = wanted.run(0.0, policy)
        if wanted.is_met(result):
            break
    return Plan(start_s=0.0, policy=policy, result=result, peak=wanted.peak)


def longest_start(holds: Callable[[float], bool]) -> float:
    """The longest start, in seconds, of which something holds that holds of all shorter ones: by bisection, to 1 %."""
    low, high = 0.0, _LONGEST_START_S
    if holds(high):
        return high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# What is printed


def described(plan: Plan, prices: Prices) -> list[str]:
    """Cells of a table."""
    policy, result = plan.policy, plan.result
    return [
        f"{plan.start_s:g}",
        f"{policy.always} always, others kept {policy.keep_s:g} s",
        f"{plan.pool:.1%}",
        f"{result.utilisation:.0%}",
        f"{result.held_s / result.span_s:.2f}",
        f"{prices.of_million_tokens(result.utilisation):.2f}",
        f"{result.starts / len(result.waits_s):.0%}",
    ]


HEAD: Final = (
    "start, s", "cheapest policy that meets the goal", "idle pool, of peak", "utilisation", "GPUs held, mean",
    "$ a million tokens", "requests that start one",
)  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def report(given: argparse.Namespace, pairs: dict[str, tuple[float, float]]) -> tuple[list[str], dict[str, Any]]:
    """All of it: as text, and as a document."""
    prices = Prices(dollars_an_hour=given.price, tokens_per_s=given.tokens_per_second)
    out = [
        f"One model, requests every {given.mean_s:g} s in the mean, each served for {given.service_s:g} s "
        f"(exponential), {given.days:g} days, seed {given.seed}. Goal: {1 - given.late:.0%} of them wait "
        f"{given.goal_s:g} s at most for a ready instance. ${given.price:g} a GPU hour, "
        f"{given.tokens_per_second:g} tokens/s while serving.",
        "",
    ]
    document: dict[str, Any] = {"schema": 1, "options": vars(given), "arrivals": {}, "grid": []}
    for name, process in PROCESSES.items():
        wanted = demand(
            process, seed=given.seed, mean_s=given.mean_s, service_s=given.service_s, days=given.days,
            goal_s=given.goal_s, late=given.late,
        )  # fmt: skip
        plans = {start_s: cheapest(wanted, start_s) for start_s in sorted({*LADDER_S, *sum(pairs.values(), ())})}
        still = fixed(wanted)
        out += [f"### {name} arrivals: {len(wanted.arrivals_s)} requests, {wanted.peak} at once at most", ""]
        out += [*markdown(HEAD, [described(plan, prices) for plan in plans.values()]), ""]
        goal_s, cost_s = break_evens(wanted, still)
        out += [
            f"Break-even: with nothing kept the goal is met by starts of up to {goal_s:.2f} s. Starting one for each "
            f"request costs less GPU time than the {still.policy.always} always there that would meet the goal, by "
            f"starts of up to {cost_s:.0f} s (whatever the wait).",
            "",
        ]
        found: dict[str, Any] = {
            "plans": [_plain(plan, prices) for plan in plans.values()],
            "break_even_goal_s": goal_s,
            "break_even_cost_s": cost_s,
            "claims": {},
        }
        for what, (slow_s, fast_s) in pairs.items():
            said = verdicts(plans[slow_s], plans[fast_s], prices)
            out += [f"{name}, {what}: {slow_s:g} s to {fast_s:g} s", ""]
            out += [*markdown(("claim", "here", "verdict"), [(one.claim, one.ours, one.word) for one in said]), ""]
            found["claims"][what] = [asdict(one) | {"verdict": one.word} for one in said]
        document["arrivals"][name] = found
    first = next(iter(pairs.values()))
    text, document["fleet"] = fleet(given, first)
    out += text
    out += ["### The article's figures against each other", "", *(f"- {line}" for line in consistency()), ""]
    if not given.no_grid:
        text, document["grid"] = grid(given, first, prices)
        out += text
    return out, document


def break_evens(wanted: Demand, still: Plan) -> tuple[float, float]:
    """The longest starts with which nothing need be kept: for the goal, and for less GPU time than `still` takes."""
    share = still.result.held_s / still.result.span_s

    def is_cheaper(start_s: float) -> bool:
        result = wanted.run(start_s, Policy())
        return result.held_s / result.span_s < share

    return longest_start(lambda start_s: wanted.is_met(wanted.run(start_s, Policy()))), longest_start(is_cheaper)


def fleet(given: argparse.Namespace, pair: tuple[float, float]) -> tuple[list[str], list[dict[str, Any]]]:
    """Whose GPUs are owned: models that share them need as many as they hold at the worst moment, all paid for."""
    rows, found = [], []
    for start_s in pair:
        always, busy_s, span_s = 0, 0.0, 0.0
        others: list[tuple[float, float]] = []
        for count in range(1, max(FLEETS) + 1):
            wanted = demand(
                _queueing.poisson, seed=given.seed + count, mean_s=given.mean_s, service_s=given.service_s,
                days=_FLEET_DAYS, goal_s=given.goal_s, late=given.late,
            )  # fmt: skip
            plan = cheapest(wanted, start_s)
            always += plan.policy.always
            others += plan.result.others
            busy_s += plan.result.busy_s
            span_s = max(span_s, plan.result.span_s)
            if count in FLEETS:
                gpus = always + _queueing.most_at_once(others)
                utilisation = busy_s / (gpus * span_s)
                rows.append((f"{start_s:g}", f"{count}", f"{gpus}", f"{always}", f"{utilisation:.0%}"))
                found.append({"start_s": start_s, "models": count, "gpus": gpus, "utilisation": utilisation})
    head = ("start, s", "models", "GPUs owned", "of them never shared", "utilisation")
    return ["### GPUs that are owned, Poisson arrivals at each model", "", *markdown(head, rows), ""], found


def grid(
    given: argparse.Namespace, pair: tuple[float, float], prices: Prices
) -> tuple[list[str], list[dict[str, Any]]]:
    """Under which assumptions each claim holds: services and goals of other lengths, `pair` being the start times."""
    found: list[dict[str, Any]] = []
    held: dict[str, list[tuple[Verdict, str]]] = {}
    for name, process in PROCESSES.items():
        for service_s in GRID_SERVICES_S:
            for goal_s in GRID_GOALS_S:
                wanted = demand(
                    process, seed=given.seed, mean_s=given.mean_s, service_s=service_s, days=_GRID_DAYS,
                    goal_s=goal_s, late=given.late,
                )  # fmt: skip
                slow, fast = (cheapest(wanted, start_s) for start_s in pair)
                where = f"{name}, service {service_s:g} s, goal {goal_s:g} s"
                for one in verdicts(slow, fast, prices):
                    held.setdefault(one.claim, []).append((one, where))
                    found.append({"where": where} | asdict(one) | {"verdict": one.word})
    rows = []
    for claim, ones in held.items():
        whole = [where for one, where in ones if one.word == "reproduced"]
        after = sum(one.after for one, _ in ones)
        before = sum(one.before is not False for one, _ in ones)
        listed = "; ".join(whole[:4]) + ("; ..." if len(whole) > 4 else "")
        rows.append((claim, f"{len(whole)} of {len(ones)}", f"{before}", f"{after}", listed or "nowhere"))
    head = ("claim", "reproduced", "before as claimed", "after as claimed", "where it is reproduced")
    title = (
        f"### Under which assumptions: {pair[0]:g} s to {pair[1]:g} s, services of "
        f"{', '.join(f'{one:g}' for one in GRID_SERVICES_S)} s, goals of "
        f"{', '.join(f'{one:g}' for one in GRID_GOALS_S)} s, three arrivals, {_GRID_DAYS:g} day each"
    )
    return [title, "", *markdown(head, rows), ""], found


def _plain(plan: Plan, prices: Prices) -> dict[str, Any]:
    result = plan.result
    return {
        "start_s": plan.start_s,
        "always": plan.policy.always,
        "keep_s": plan.policy.keep_s,
        "peak": plan.peak,
        "pool_of_peak": plan.pool,
        "utilisation": result.utilisation,
        "gpus_held": result.held_s / result.span_s,
        "dollars_a_million_tokens": prices.of_million_tokens(result.utilisation),
        "starts": result.starts,
        "requests": len(result.waits_s),
    }


def measured(path: str, row: str) -> float:
    """The median of a row's samples in a document of tools/bench/coldstart.py.

    Raises:
        SystemExit: it has no such row, or several models.
    """
    with open(path, encoding="utf-8") as file:
        runs = json.load(file)["runs"]
    if len({run["model"]["parameters"] for run in runs}) != 1:
        raise SystemExit(f"{path}: has several models: join the runs of one only")
    totals = [one["total_s"] for run in runs for of in run["rows"] if of["row"] == row for one in of["samples"]]
    if not totals:
        raise SystemExit(f"{path}: has no row {row!r}: name another with --slow or --fast")
    return float(round(statistics.median(totals), 3))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--starts", default=None, metavar="FILE", help="the JSON of coldstart.py")
    options.add_argument("--slow", default="none cold", help="its row before (default: none cold)")
    options.add_argument("--fast", default="released plain warm", help="and after (default: released plain warm)")
    options.add_argument("--slow-s", type=float, default=None, help="a start before, instead")
    options.add_argument("--fast-s", type=float, default=None, help="a start after, instead")
    options.add_argument("--mean-s", type=float, default=30.0, help="between requests (default 30, the article's)")
    options.add_argument("--service-s", type=float, default=8.0, help="mean of a request's service (default 8)")
    options.add_argument("--goal-s", type=float, default=1.0, help="longest wait for a ready instance (default 1)")
    options.add_argument("--late", type=float, default=0.01, help="share that may wait longer (default 0.01)")
    options.add_argument("--days", type=float, default=4.0, help="simulated (default 4)")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--price", type=float, default=2.0, help="dollars a GPU hour (default 2)")
    options.add_argument("--tokens-per-second", type=float, default=2000.0, help="of a serving GPU (default 2000)")
    options.add_argument("--no-grid", action="store_true", help="leave out the other assumptions")
    options.add_argument("--json", default=None, metavar="FILE", help="write everything there")
    given = options.parse_args()
    if (given.starts is None) == (given.slow_s is None or given.fast_s is None):
        options.error("name either --starts, or --slow-s and --fast-s")
    if given.starts is not None:
        pair = measured(given.starts, given.slow), measured(given.starts, given.fast)
        what = f"measured (`{given.slow}`, `{given.fast}`, {os.path.basename(given.starts)})"
    else:
        pair, what = (given.slow_s, given.fast_s), "given"
    text, document = report(given, {what: pair, "the article's own, claimed, not reproduced": ARTICLES})
    print("\n".join(text))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)


if __name__ == "__main__":
    main()
