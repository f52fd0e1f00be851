"""Servers that are started when they are wanted, simulated: requests, instances, waits, and how long GPUs were held.

One model. A request takes a ready instance, one that is always there first, else it waits and has one started; whoever
is ready first takes who waits longest. An instance serves one request at a time, and one that is not always there is
given up when nobody wanted it for so long. Deterministic: whatever is random is in the arrivals and services handed in.

Known results that this must give (`tests/unit/test_bench_economics.py`): Erlang's C formula where nothing is started,
Welch's M/G/1 with set-up (P. D. Welch, "On a generalized M/G/1 queuing process in which the first customer of each busy
period receives exceptional service", Operations Research 12, 1964) where there is one instance, and M/G/infinity.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

Process = Callable[[random.Random, float, float], list[float]]
"""Arrivals: of a source of chance, their mean distance and how long they come, in seconds."""

DAY_S: Final = 86_400.0
_DEPARTS, _READY = 0, 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How many instances there are.

    Attributes:
        always: that are never given up.
        keep_s: how long another is kept when nobody wants it; 0 gives it up at once.
        most: at the same time, those always there and those being started included.
    """

    always: int = 0
    keep_s: float = 0.0
    most: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of it.

    Attributes:
        waits_s: of each request, from its arrival until it was served.
        busy_s: GPU time in which requests were served.
        held_s: GPU time in all: always there, being started, serving, kept.
        starts: how many instances were started.
        span_s: from 0 until the last was done with.
        peak: most requests served at the same time.
        others: from when to when each instance was held that was not always there.
    """

    waits_s: Sequence[float]
    busy_s: float
    held_s: float
    starts: int
    span_s: float
    peak: int
    others: Sequence[tuple[float, float]] = ()

    @property
    def utilisation(self) -> float:
        """The part of the time held in which requests were served."""
        return self.busy_s / self.held_s if self.held_s else 1.0

    def late(self, goal_s: float) -> float:
        """The share of requests that waited longer than that."""
        return sum(wait > goal_s for wait in self.waits_s) / len(self.waits_s)


def simulate(arrivals_s: Sequence[float], services_s: Sequence[float], start_s: float, policy: Policy) -> Result:
    """Let requests come.

    Args:
        arrivals_s: when each comes, ascending.
        services_s: how long each takes once it is served.
        start_s: how long an instance takes from nothing to its first token.
        policy: see there.
    """
    events: list[tuple[float, int, int, float]] = []  # when, what, a number that orders ties, and when it was started
    waiting: deque[int] = deque()
    waits = [0.0] * len(arrivals_s)
    always = policy.always  # of those always there, idle now
    kept: list[tuple[float, float]] = []  # of the others, idle: (idle since, started at), the latest last
    there, starting, busy, peak, starts, number = policy.always, 0, 0, 0, 0, 0
    others: list[tuple[float, float]] = []
    busy_s = end = 0.0
    # Those always there have minus infinity as the moment at which they were started.

    def let_go(now: float) -> None:
        """Give up those that nobody wanted for long enough."""
        nonlocal kept, there
        stay = [one for one in kept if one[0] + policy.keep_s >= now and policy.keep_s > 0]
        for since, began in kept[: len(kept) - len(stay)]:
            others.append((began, since + policy.keep_s))
            there -= 1
        kept = stay

    def serve(request: int, now: float, began: float) -> None:
        nonlocal busy, peak, busy_s, number
        waits[request] = now - arrivals_s[request]
        busy_s += services_s[request]
        busy += 1
        peak = max(peak, busy)
        number += 1
        heapq.heappush(events, (now + services_s[request], _DEPARTS, number, began))

    def free(now: float, began: float) -> None:
        """An instance has nothing to do: it takes who waits, or idles."""
        nonlocal always
        if waiting:
            serve(waiting.popleft(), now, began)
        elif began == -math.inf:
            always += 1
        else:
            kept.append((now, began))
            let_go(now)

    def happen(until: float) -> None:
        """All that happens before an arrival, and with it."""
        nonlocal busy, starting, end
        while events and events[0][0] <= until:
            now, what, _, began = heapq.heappop(events)
            end = max(end, now)
            if what == _DEPARTS:
                busy -= 1
            else:
                starting -= 1
            free(now, began)

    for request, now in enumerate(arrivals_s):
        happen(now)
        let_go(now)
        if always:
            always -= 1
            serve(request, now, -math.inf)
        elif kept:
            serve(request, now, kept.pop()[1])
        else:
            waiting.append(request)
            if starting < len(waiting) and there < policy.most:
                there, starting, starts, number = there + 1, starting + 1, starts + 1, number + 1
                heapq.heappush(events, (now + start_s, _READY, number, now))
    happen(math.inf)
    let_go(math.inf)
    span = max(end, arrivals_s[-1])
    return Result(
        waits_s=waits,
        busy_s=busy_s,
        held_s=sum(until - since for since, until in others) + policy.always * span,
        starts=starts,
        span_s=span,
        peak=peak,
        others=others,
    )


# Arrivals


def poisson(random_: random.Random, mean_s: float, span_s: float) -> list[float]:
    """Independent of each other."""
    found: list[float] = []
    now = 0.0
    while (now := now + random_.expovariate(1 / mean_s)) < span_s:
        found.append(now)
    return found


def bursty(
    random_: random.Random, mean_s: float, span_s: float, *, share: float = 0.1, on_s: float = 120.0
) -> list[float]:
    """An interrupted Poisson process: all come in a `share` of the time, in bursts that last `on_s` on average."""
    found: list[float] = []
    now = 0.0
    while now < span_s:
        now += random_.expovariate(share / (on_s * (1 - share)))
        ends = now + random_.expovariate(1 / on_s)
        while (now := now + random_.expovariate(1 / (mean_s * share))) < min(ends, span_s):
            found.append(now)
        now = ends
    return found


def diurnal(random_: random.Random, mean_s: float, span_s: float, *, swing: float = 0.9) -> list[float]:
    """Their rate is a sine over a day, from 1 - `swing` to 1 + `swing` times its mean."""
    found = []
    for now in poisson(random_, mean_s / (1 + swing), span_s):
        rate = 1 + swing * math.sin(2 * math.pi * now / DAY_S)
        if random_.random() * (1 + swing) < rate:
            found.append(now)
    return found


def exponential(random_: random.Random, mean_s: float, count: int) -> list[float]:
    """Services."""
    return [random_.expovariate(1 / mean_s) for _ in range(count)]


def most_at_once(intervals: Iterable[tuple[float, float]]) -> int:
    """How many of these half-open intervals have a moment in common at most."""
    now = most = 0
    for _, change in sorted(edge for since, until in intervals for edge in ((since, 1), (until, -1))):
        now += change
        most = max(most, now)
    return most


# Known results


def erlang_c(instances: int, load: float) -> float:
    """The probability of having to wait in M/M/c, `load` being the arrival rate by the service rate."""
    top = load**instances / math.factorial(instances) * instances / (instances - load)
    return top / (sum(load**n / math.factorial(n) for n in range(instances)) + top)


def mean_wait_with_setup(rate: float, service_s: float, service_square: float, start_s: float) -> float:
    """The mean wait in M/G/1 whose server is given up when it idles and takes `start_s` each time to come back."""
    queueing = rate * service_square / (2 * (1 - rate * service_s))
    return queueing + (2 * start_s + rate * start_s**2) / (2 * (1 + rate * start_s))
