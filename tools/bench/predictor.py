"""The predictor against other ways to spend the same memory, on traces of model opens. Reads no file, mounts nothing.

What is modelled. One host with one disk: `--bandwidth` GB/s, one reader. Models have log-normal sizes (median 6 GB,
sigma 0.8); the budget is `--budget` of the bytes of all. An open of a model that is in memory is free; what is missing
is read at once (reads queue), and is in memory from then on, for which whatever the policy values least has to go: also
the model itself, once the next is opened. Between two opens, while no open is being served, the disk is the policy's:
it reads ahead, in its own order, until the next open, which cuts it off wherever it is; a model may be there in part.
Time saved is what of the opened model was in memory, by the bandwidth. Not modelled: how long a model stays in use,
bytes read twice by programs, page cache taken by others, reads that share the bandwidth.

Policies:
  predictor       `prefetch.predictor`, asked after each open and every 15 minutes, for the next `--window` minutes. It
                  knows the opens up to now and nothing else.
  LRU             keeps what was opened last; reads nothing ahead.
  keep recent     a model stays for 24 h after its open; while the budget is full of such, no newcomer is kept; what
                  was opened in the last 24 h and is not there is read again.
  oracle          knows every open to come, and has the same memory and disk: it reads in the order of next use, and
                  what is used furthest in the future goes (Belady's rule, with prefetch).
  true rates      knows the rates that the trace was drawn from, not the draw, and keeps the models with the highest.
                  Not for bursts, nor for CSV files.
The bound is what anything that is no oracle can expect to save at most with such rates: see `bound`.

Traces of 28 days, the first 14 of which are history: every policy runs through them, none is judged by them. `Poisson`:
40 models, constant rates. `diurnal`: the same with hours of their own. `bursty`: 40 models, sessions of about 12 opens
5 minutes apart. `Zipf + diurnal`: 200 models, popularity by rank^-1.1, each with its own busiest hour, around which
its rate falls off by a von Mises density (kappa 2: 12 hours later it is 2 % of the peak). 300 opens a day
each. Medians over `--seeds` seeds. A CSV file has lines `timestamp,model`, the timestamp in seconds; sizes are drawn.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import csv
import functools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from _harness import Report, parser

from prefetch.predictor import Candidate, Predictor

_HOUR: Final = 3600.0
_DAY: Final = 24 * _HOUR
_START: Final = 20_000 * _DAY
_DAYS: Final = 28
_OPENS_A_DAY: Final = 300
_TICK: Final = 900.0
_KAPPA: Final = 2.0
_BESSEL: Final = sum((_KAPPA / 2) ** (2 * k) / math.factorial(k) ** 2 for k in range(30))  # I0(kappa)


@dataclass(frozen=True)
class Trace:
    """Opens in order, sizes in bytes; mean rate and busiest second of the day of each, where it was drawn from such."""

    opens: list[tuple[float, str]]
    sizes: dict[str, int]
    drawn_from: dict[str, tuple[float, float | None]] | None = None


# Traces


def _sizes(names: Sequence[str], rng: random.Random) -> dict[str, int]:
    return {name: int(6e9 * math.exp(rng.gauss(0, 0.8))) for name in names}


def _hours(at: float, peak: float) -> float:
    return math.exp(_KAPPA * math.cos(2 * math.pi * (at % _DAY - peak) / _DAY)) / _BESSEL


def drawn(seed: int, models: int, exponent: float, *, diurnal: bool) -> Trace:
    """Independent Poisson processes, by thinning."""
    rng = random.Random(seed)
    names = [f"m{rank}" for rank in range(models)]
    weights = [(rank + 1) ** -exponent for rank in range(models)]
    mean = {name: weight / sum(weights) * _OPENS_A_DAY / _DAY for name, weight in zip(names, weights, strict=True)}
    peaks = {name: rng.uniform(0, _DAY) for name in names}
    most = math.exp(_KAPPA) / _BESSEL if diurnal else 1.0
    opens = []
    for name in names:
        at = _START
        while (at := at + rng.expovariate(mean[name] * most)) < _START + _DAYS * _DAY:
            if not diurnal or rng.random() * most < _hours(at, peaks[name]):
                opens.append((at, name))

    return Trace(
        sorted(opens), _sizes(names, rng), {name: (mean[name], peaks[name] if diurnal else None) for name in names}
    )


def bursty(seed: int, models: int) -> Trace:
    """Sessions at random times."""
    rng = random.Random(seed)
    names = [f"m{rank}" for rank in range(models)]
    weights = [1 / (rank + 1) for rank in range(models)]
    opens = []
    for name, weight in zip(names, weights, strict=True):
        at = _START
        while at < _START + _DAYS * _DAY:
            at += rng.expovariate(weight / sum(weights) * _OPENS_A_DAY / 12 / _DAY)
            for _ in range(max(1, round(rng.expovariate(1 / 12)))):
                at += rng.expovariate(1 / 300)
                opens.append((at, name))
    return Trace(sorted(one for one in opens if one[0] < _START + _DAYS * _DAY), _sizes(names, rng))


def from_csv(path: str, seed: int) -> Trace:
    """Lines `timestamp,model`; others, such as a heading, are left out."""
    opens = []
    with open(path, newline="") as file:
        for row in csv.reader(file):
            try:
                opens.append((float(row[0]), row[1]))
            except (ValueError, IndexError):
                continue
    if not opens:
        raise SystemExit(f"{path}: no line is `timestamp,model`")
    return Trace(sorted(opens), _sizes(sorted({name for _, name in opens}), random.Random(seed)))


# Policies


class Policy:
    """What to have in memory. What is not named goes first, the one opened longest ago before the others."""

    prefetches = True

    def opened(self, at: float, model: str) -> None:
        """It is told of every open."""

    def wanted(self, now: float, resident: Mapping[str, int]) -> list[str]:
        """Names, best first; called after each open and each quarter of an hour."""
        raise NotImplementedError


class Learned(Policy):
    """`prefetch.predictor`."""

    def __init__(self, trace: Trace, budget: int, bandwidth: float, window: float) -> None:
        self._predictor = Predictor()
        self._trace, self._budget, self._bandwidth, self._window = trace, budget, bandwidth, window

    def opened(self, at: float, model: str) -> None:
        self._predictor.observe(model, at)

    def wanted(self, now: float, resident: Mapping[str, int]) -> list[str]:
        candidates = {
            name: Candidate(nbytes=nbytes, resident_bytes=resident.get(name, 0))
            for name, nbytes in self._trace.sizes.items()
        }
        return self._predictor.choose(now, self._window, candidates, self._budget, self._bandwidth)


class Recent(Policy):
    """LRU."""

    prefetches = False

    def __init__(self) -> None:
        self._order: dict[str, None] = {}

    def opened(self, at: float, model: str) -> None:
        self._order.pop(model, None)
        self._order[model] = None

    def wanted(self, now: float, resident: Mapping[str, int]) -> list[str]:
        return [name for name in reversed(self._order) if name in resident]


class KeepRecent(Policy):
    """Everything of the last day, first come first kept."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def opened(self, at: float, model: str) -> None:
        if at - self._last.get(model, -math.inf) > _DAY:
            self._since[model] = at
        self._last[model] = at

    def wanted(self, now: float, resident: Mapping[str, int]) -> list[str]:
        return sorted((name for name, at in self._last.items() if now - at <= _DAY), key=self._since.__getitem__)


class Oracle(Policy):
    """Belady with prefetch."""

    def __init__(self, trace: Trace) -> None:
        self._times: dict[str, list[float]] = {}
        for at, name in trace.opens:
            self._times.setdefault(name, []).append(at)

    def wanted(self, now: float, resident: Mapping[str, int]) -> list[str]:
        following = []
        for name, times in self._times.items():
            if (at := bisect.bisect_right(times, now)) < len(times):
                following.append((times[at], name))
        return [name for _, name in sorted(following)]


def _rates(drawn_from: Mapping[str, tuple[float, float | None]], at: float) -> dict[str, float]:
    return {name: mean if peak is None else mean * _hours(at, peak) for name, (mean, peak) in drawn_from.items()}


class TrueRates(Policy):
    """The likeliest by the rates themselves, half an hour ahead: what is read now is for then."""

    def __init__(self, trace: Trace, budget: int) -> None:
        assert trace.drawn_from is not None
        self._drawn_from, self._sizes, self._budget = trace.drawn_from, trace.sizes, budget

    def wanted(self, now: float, resident: Mapping[str, int]) -> list[str]:
        rates = _rates(self._drawn_from, now + _HOUR / 2)
        chosen, left = [], self._budget
        for name in sorted(rates, key=rates.__getitem__, reverse=True):
            if self._sizes[name] <= left:
                chosen.append(name)
                left -= self._sizes[name]
        return chosen


# The host


@dataclass
class Outcome:
    """What a policy did in the judged part; `possible_s` is what it would have saved with everything in memory."""

    opens: int = 0
    hits: int = 0
    saved_s: float = 0.0
    possible_s: float = 0.0
    read_bytes: int = 0
    wasted_bytes: int = 0


class Host:
    """Memory and disk under one policy."""

    def __init__(self, trace: Trace, policy: Policy, budget: int, bandwidth: float, judged_from: float) -> None:
        self._trace, self._policy, self._budget, self._bandwidth = trace, policy, budget, bandwidth
        self._judged_from = judged_from
        self._resident: dict[str, int] = {}  # in the order of the last open, or of being read ahead
        self._unused: dict[str, int] = {}  # read ahead, and not opened since
        self._held = 0
        self._order: list[str] = []
        self._now = 0.0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Replay the trace."""
        free = self._trace.opens[0][0]  # when the disk is
        for at, model in self._trace.opens:
            while free < at:
                until = min(at, (free // _TICK + 1) * _TICK)
                if self._policy.prefetches:
                    self._now = free
                    self._ask(free)
                    self._read_ahead(int((until - free) * self._bandwidth))
                free = until
            free = max(free, at) + self._open(at, model)
            self._policy.opened(at, model)
            if not self._policy.prefetches:
                self._ask(at)
        for model in self._unused:
            self._waste(model)
        return self.outcome

    def _ask(self, now: float) -> None:
        self._order = self._policy.wanted(now, self._resident)

    def _open(self, at: float, model: str) -> float:
        """Serve an open; gives the seconds that the disk is busy with it."""
        self._now = at
        size, there = self._trace.sizes[model], self._resident.get(model, 0)
        if at >= self._judged_from:
            self.outcome.opens += 1
            self.outcome.hits += there == size
            self.outcome.saved_s += there / self._bandwidth
            self.outcome.possible_s += size / self._bandwidth
        self._unused.pop(model, None)
        self._resident[model] = self._resident.pop(model, 0)
        self._take(model, size - there, {name: rank for rank, name in enumerate(self._order)}, -1)
        return (size - there) / self._bandwidth

    def _read_ahead(self, readable: int) -> None:
        ranks = {name: rank for rank, name in enumerate(self._order)}
        for rank, model in enumerate(self._order):
            if readable <= 0:
                return
            missing = self._trace.sizes[model] - self._resident.get(model, 0)
            if missing <= 0:
                continue
            taken = self._take(model, min(missing, readable), ranks, rank)
            readable -= taken
            if taken:
                self._unused[model] = self._unused.get(model, 0) + taken
                if self._now >= self._judged_from:
                    self.outcome.read_bytes += taken

    def _take(self, model: str, nbytes: int, ranks: Mapping[str, int], rank: int) -> int:
        """Memory for bytes of a model, from models ranked below `rank`; gives how many there are."""
        if self._held + nbytes > self._budget:
            last = len(ranks)
            for other in sorted(self._resident, key=lambda name: -ranks.get(name, last)):
                if self._held + nbytes <= self._budget:
                    break
                if other != model and ranks.get(other, last) > rank:
                    self._held -= self._resident.pop(other)
                    self._waste(other)
                    self._unused.pop(other, None)
        taken = max(0, min(nbytes, self._budget - self._held))
        if taken:
            self._resident[model] = self._resident.get(model, 0) + taken
            self._held += taken
        return taken

    def _waste(self, model: str) -> None:
        if self._now >= self._judged_from:
            self.outcome.wasted_bytes += self._unused.get(model, 0)


def policies(trace: Trace, budget: int, bandwidth: float, window: float) -> dict[str, Policy]:
    """By name."""
    found: dict[str, Policy] = {
        "predictor": Learned(trace, budget, bandwidth, window),
        "LRU": Recent(),
        "keep recent": KeepRecent(),
        "oracle": Oracle(trace),
    }
    if trace.drawn_from is not None:
        found["true rates"] = TrueRates(trace, budget)
    return found


def bound(trace: Trace, budget: int) -> float | None:
    """The share of all time that any policy which does not know the draw can expect to save.

    The opens to come do not depend on those that came, so at any moment nothing beats memory that is full of the models
    with the highest rates at that moment, the last of them in part: the fractional knapsack, over a day.
    """
    if trace.drawn_from is None:
        return None
    saved = possible = 0.0
    for step in range(96):
        rates = _rates(trace.drawn_from, step * 900.0)
        left = budget
        for name in sorted(rates, key=rates.__getitem__, reverse=True):
            there = min(left, trace.sizes[name])
            left -= there
            saved += rates[name] * there
            possible += rates[name] * trace.sizes[name]
    return saved / possible


def replay(trace: Trace, share: float, bandwidth: float, window: float) -> dict[str, Outcome]:
    """Every policy on one trace."""
    budget = int(share * sum(trace.sizes.values()))
    first, last = trace.opens[0][0], trace.opens[-1][0]
    judged_from = (first + last) / 2
    return {
        name: Host(trace, policy, budget, bandwidth, judged_from).run()
        for name, policy in policies(trace, budget, bandwidth, window).items()
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=3, help="how many (default 3: 1 to 3)")
    options.add_argument("--budget", type=float, default=0.25, help="share of all models' bytes (default 0.25)")
    options.add_argument("--bandwidth", type=float, default=1.4, help="GB/s (default 1.4)")
    options.add_argument("--window", type=float, default=60, help="minutes (default 60)")
    options.add_argument("--csv", default=None, metavar="FILE", help="replay this trace, and no other")
    chosen = options.parse_args()
    report = Report("predictor", chosen)
    traces: dict[str, Callable[[int], Trace]] = {
        "Zipf + diurnal": lambda seed: drawn(seed, 200, 1.1, diurnal=True),
        "Poisson": lambda seed: drawn(seed, 40, 1.0, diurnal=False),
        "diurnal": lambda seed: drawn(seed, 40, 1.0, diurnal=True),
        "bursty": lambda seed: bursty(seed, 40),
    }
    if chosen.csv:
        traces = {chosen.csv: lambda seed: from_csv(chosen.csv, seed)}
    work = functools.partial(replay, share=chosen.budget, bandwidth=chosen.bandwidth * 1e9, window=chosen.window * 60)
    with concurrent.futures.ProcessPoolExecutor() as workers:
        for name, make in traces.items():
            made = [make(seed) for seed in range(1, chosen.seeds + 1)]
            _tell(report, name, list(workers.map(work, made)))
            limits = [bound(trace, int(chosen.budget * sum(trace.sizes.values()))) for trace in made]
            if known := [limit for limit in limits if limit is not None]:
                report.value(f"{name}: time saved by all, bound without foresight", statistics.median(known), "")
    report.finish()


def _tell(report: Report, trace: str, runs: list[dict[str, Outcome]]) -> None:
    table: dict[str, str] = {}
    for policy in runs[0]:
        outcomes = [run[policy] for run in runs]
        hit, saved, of_all, wasted, read = (
            statistics.median(figures)
            for figures in zip(
                *(
                    (o.hits / o.opens, o.saved_s, o.saved_s / o.possible_s, o.wasted_bytes, o.read_bytes)
                    for o in outcomes
                ),
                strict=True,
            )
        )
        table[policy] = (
            f"hit ratio {hit:.3f}, time saved {saved:.0f} s = {of_all:.3f} of all, "
            f"read ahead {read / 1e9:.0f} GB, wasted {wasted / 1e9:.0f} GB"
        )
    target = 0.8 if trace == "Zipf + diurnal" else None
    for policy in [name for name in runs[0] if name != "oracle"]:
        wanted = target if policy == "predictor" else None
        _compare(report, trace, runs, policy, "oracle", wanted)
    _compare(report, trace, runs, "predictor", "LRU", target and 1.0)
    report.extra[trace] = table
    report.settings.setdefault("outcomes", {})[trace] = [
        {policy: asdict(outcome) for policy, outcome in run.items()} for run in runs
    ]


def _compare(
    report: Report, trace: str, runs: list[dict[str, Outcome]], policy: str, other: str, target: float | None
) -> None:
    """A row, where the other saved anything."""
    shares = [run[policy].saved_s / run[other].saved_s for run in runs if run[other].saved_s]
    if shares:
        report.value(f"{trace}: time saved, {policy} by {other}", statistics.median(shares), "", target, "at least")


if __name__ == "__main__":
    main()
