"""Which models will be opened soon, and which of them the memory is best spent on. Pure: no clock, no I/O.

Of every model two explanations of its past are kept, and each is believed as far as it foretold the opens that came
(Bayesian model averaging):

- *time of day*: opens come at a rate that follows the hours (inhomogeneous Poisson). The day has 48 bins, in UTC; their
  shape is drawn towards a flat one as long as there are few opens.
- *gaps*: what passes between two opens is drawn from the gaps seen so far, in quarter octaves (a renewal process): a
  job that runs every hour, or a burst that is not over. It is drawn towards chance at the same mean rate.

Everything decays by half within `half_life_s`. The same calls give the same answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

_VERSION: Final = 1
_DAY_S: Final = 86400.0
_BINS: Final = 48
_BIN_S: Final = _DAY_S / _BINS
_KERNEL: Final = (1, 2, 3, 4, 3, 2, 1)
"""How far an open speaks for the bins around its own: opens are fewer than bins."""
_GAPS_PER_OCTAVE: Final = 4
_GAP_BINS: Final = 25 * _GAPS_PER_OCTAVE  # from a second to a year
_PRIOR: Final = 2.0
"""As many opens, or gaps, as chance is worth beside those that were seen."""
_YOUNGEST_S: Final = 3600.0
"""A history shorter than this says nothing of a rate."""
_MOST_EVIDENCE: Final = 6.0
"""Log odds: what was right for long can be found wrong within a few opens."""
_STAY: Final = 1.15
"""What is in memory stays unless another is so much likelier: to swap equals is to read for nothing."""
_WORTH: Final = 0.01
"""A model less likely than this to be opened in the window is not read."""
_MOST_MODELS: Final = 1024
_HALF_LIFE_S: Final = 14 * _DAY_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A model that could be in memory.

    Attributes:
        nbytes: of all its files.
        resident_bytes: of these, those in memory now.
    """

    nbytes: int
    resident_bytes: int = 0


class _Past(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What is kept of one model. Weights have decayed until `last_s`.

    Attributes:
        last_s: its last open, in seconds since 1970.
        weight: of its opens.
        hours: weight by bin of the day.
        gaps: weight by bin of the gap before an open.
        evidence: log odds of the gaps against the time of day.
    """

    last_s: float
    weight: float
    hours: list[float]
    gaps: dict[int, float]
    evidence: float


class _State(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What `Predictor.state` stores; names as bytes, since those of files need not be UTF-8."""

    version: int
    start_s: float | None
    models: list[tuple[bytes, _Past]]


class Predictor:
    """Statistics of at most `most_models` models; the least likely is forgotten for one more. Not thread-safe."""

    def __init__(self, *, most_models: int = _MOST_MODELS, half_life_s: float = _HALF_LIFE_S) -> None:
        """Begin without a past.

        Args:
            most_models: 1 or more.
            half_life_s: after so many seconds an open counts half.
        """
        self._most_models = most_models
        self._half_life_s = half_life_s
        self._start_s: float | None = None  # the first open of all
        self._pasts: dict[str, _Past] = {}
        self._shapes: dict[str, list[float]] = {}  # `hours`, smoothed and summed up to each bin; made when asked for

    def __len__(self) -> int:
        """How many models have a past."""
        return len(self._pasts)

    def models(self) -> list[str]:
        """Those that have a past."""
        return list(self._pasts)

    def last_open_s(self, model: str) -> float | None:
        """When a model was last opened, in seconds since 1970; None for one without a past."""
        past = self._pasts.get(model)
        return None if past is None else past.last_s

    def observe(self, model: str, at_s: float) -> None:
        """A model was opened.

        Args:
            model: any name that stays the same.
            at_s: seconds since 1970, finite. One before the last (a clock that was set back) leaves no gap behind.
        """
        at_s = float(at_s)
        self._start_s = at_s if self._start_s is None else min(self._start_s, at_s)
        past = self._pasts.get(model)
        if past is None:
            if len(self._pasts) >= self._most_models:
                self._forget(at_s)
            past = self._pasts[model] = _Past(at_s, 0.0, [0.0] * _BINS, {}, 0.0)
        elif at_s > past.last_s:
            self._weigh_explanations(model, past, at_s)
            fading = self._fading(past, at_s)
            past.weight *= fading
            past.hours = [weight * fading for weight in past.hours]
            past.gaps = {gap: weight * fading for gap, weight in past.gaps.items()}
            gap = _gap_bin(at_s - past.last_s)
            past.gaps[gap] = past.gaps.get(gap, 0.0) + 1
        past.last_s = at_s
        past.weight += 1
        past.hours[int(at_s % _DAY_S / _BIN_S) % _BINS] += 1
        self._shapes.pop(model, None)

    def probability(self, model: str, now_s: float, window_s: float) -> float:
        """How likely a model is opened in `(now_s, now_s + window_s]`; 0 for one that never was."""
        past = self._pasts.get(model)
        if past is None or window_s <= 0:
            return 0.0
        now_s = max(now_s, past.last_s)
        by_hour = 1 - math.exp(-self._expected(model, past, now_s, now_s + window_s))
        elapsed = now_s - past.last_s
        rate = self._rate(past, now_s)
        waiting, still = _longer(past.gaps, rate, elapsed, elapsed + window_s)
        by_gap = 1 - still / waiting if waiting > 0 else by_hour
        trust = 1 / (1 + math.exp(-past.evidence))
        return min(1.0, max(0.0, trust * by_gap + (1 - trust) * by_hour))

    def choose(
        self,
        now_s: float,
        window_s: float,
        candidates: Mapping[str, Candidate],
        budget_bytes: int,
        bandwidth_bytes_s: float,
    ) -> list[str]:
        """The models to have in memory, whole, best first: what is there and not named may go.

        A byte in memory saves its model's probability by the bandwidth, whether it is there already or has to be read
        first; but of what is missing, only what can be read within the window saves anything in it.

        Args:
            now_s: seconds since 1970.
            window_s: how far to look ahead.
            candidates: every model there is to choose from, by name.
            budget_bytes: those named never have more bytes than this together, resident ones included.
            bandwidth_bytes_s: of the device; at most this times `window_s` is read.
        """
        readable = bandwidth_bytes_s * window_s
        ranked: list[tuple[float, str, Candidate]] = []
        for name, candidate in candidates.items():
            missing = max(0, candidate.nbytes - candidate.resident_bytes)
            probability = self.probability(name, now_s, window_s)
            if missing and (probability < _WORTH or readable <= 0):
                continue
            resident = candidate.nbytes - missing
            useful = resident * _STAY + min(missing, readable)
            ranked.append((probability * useful / max(1, candidate.nbytes), name, candidate))
        ranked.sort(key=lambda entry: (-entry[0], entry[1]))
        chosen: list[str] = []
        left = budget_bytes
        for _, name, candidate in ranked:
            missing = max(0, candidate.nbytes - candidate.resident_bytes)
            if candidate.nbytes > left or (missing and readable <= 0):
                continue
            chosen.append(name)
            left -= candidate.nbytes
            readable -= missing
        return chosen

    # What is known of one model

    def _fading(self, past: _Past, now_s: float) -> float:
        return math.exp2(-max(0.0, now_s - past.last_s) / self._half_life_s)

    def _rate(self, past: _Past, now_s: float) -> float:
        """Opens a second: their weight by that of the time since the history began."""
        assert self._start_s is not None, "set by the first open"
        mean_life_s = self._half_life_s / math.log(2)
        age_s = max(_YOUNGEST_S, now_s - self._start_s)
        return past.weight * self._fading(past, now_s) / (mean_life_s * -math.expm1(-age_s / mean_life_s))

    def _expected(self, model: str, past: _Past, from_s: float, until_s: float) -> float:
        """Opens to expect between two times by the time of day."""
        if (shape := self._shapes.get(model)) is None:
            shape = self._shapes[model] = _shape(past.hours)
        fading = self._fading(past, from_s)
        days = (until_s - from_s) / _DAY_S
        seen = fading * (_up_to(shape, until_s) - _up_to(shape, from_s))
        return self._rate(past, from_s) * _DAY_S * (seen + _PRIOR * days) / (fading * shape[-1] + _PRIOR)

    def _weigh_explanations(self, model: str, past: _Past, at_s: float) -> None:
        """Move the evidence by how likely each explanation made the open that came."""
        gap = at_s - past.last_s
        rate = self._rate(past, past.last_s)
        low, high = _gap_edges(_gap_bin(gap))
        longer, still = _longer(past.gaps, rate, low, high)
        by_gap = (longer - still) / (sum(past.gaps.values()) + _PRIOR)
        before = past.last_s + low
        by_hour = math.exp(-self._expected(model, past, past.last_s, before)) * -math.expm1(
            -self._expected(model, past, before, past.last_s + high)
        )
        if by_gap > 0 and by_hour > 0:
            moved = past.evidence + math.log(by_gap) - math.log(by_hour)
            past.evidence = max(-_MOST_EVIDENCE, min(_MOST_EVIDENCE, moved))

    def _forget(self, now_s: float) -> None:
        least = min(self._pasts, key=lambda name: self._pasts[name].weight * self._fading(self._pasts[name], now_s))
        del self._pasts[least]
        self._shapes.pop(least, None)

    # Between processes

    def state(self) -> bytes:
        """Everything it knows, for `from_state`: below 1 KiB a model and its name."""
        models = [(name.encode(errors="surrogateescape"), past) for name, past in self._pasts.items()]
        return msgspec.msgpack.encode(_State(_VERSION, self._start_s, models))

    @classmethod
    def from_state(
        cls, state: bytes, *, most_models: int = _MOST_MODELS, half_life_s: float = _HALF_LIFE_S
    ) -> tuple[Predictor, str | None]:
        """What `state` gave, and None; or, for anything else, a predictor without a past and what is wrong."""
        predictor = cls(most_models=most_models, half_life_s=half_life_s)
        try:
            found = msgspec.msgpack.decode(state, type=_State)
            if found.version != _VERSION:
                return predictor, f"its version is {found.version}, this one reads {_VERSION}"
            if (wrong := _wrong(found)) is not None:
                return predictor, wrong
            models = {name.decode(errors="surrogateescape"): past for name, past in found.models}
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            return predictor, str(e)
        predictor._start_s = found.start_s
        predictor._pasts = models
        while len(models) > most_models:
            predictor._forget(max(past.last_s for past in models.values()))
        return predictor, None


def _wrong(state: _State) -> str | None:
    """What of a state can't be, or None."""
    if bool(state.models) != (state.start_s is not None) or not math.isfinite(state.start_s or 0):
        return "its beginning is not a time"
    for name, past in state.models:
        weights = (past.weight, *past.hours, *past.gaps.values())
        if not all(math.isfinite(number) for number in (past.last_s, past.evidence, *weights)):
            return f"model {name!r} has a number that is not finite"
        if min(weights) < 0 or max(weights) > 1e12 or abs(past.evidence) > _MOST_EVIDENCE or abs(past.last_s) > 1e12:
            return f"model {name!r} has a number out of bounds"
        if len(past.hours) != _BINS or not all(0 <= gap < _GAP_BINS for gap in past.gaps):
            return f"model {name!r} has bins that are none"
    return None


# The day


def _shape(hours: Sequence[float]) -> list[float]:
    """The bins' weights, each spread over its neighbours, summed up to each edge: 0 first, the whole weight last."""
    reach, whole = len(_KERNEL) // 2, sum(_KERNEL)
    spread = (
        sum(hours[(at + by - reach) % _BINS] * share for by, share in enumerate(_KERNEL)) / whole for at in range(_BINS)
    )
    return list(itertools.accumulate(spread, initial=0.0))


def _up_to(shape: Sequence[float], at_s: float) -> float:
    """The weight of all days up to a time."""
    days, second = divmod(at_s, _DAY_S)
    at = min(int(second / _BIN_S), _BINS - 1)
    return days * shape[-1] + shape[at] + (shape[at + 1] - shape[at]) * (second / _BIN_S - at)


# The gaps


def _gap_bin(gap_s: float) -> int:
    return min(_GAP_BINS - 1, int(math.log2(max(1.0, gap_s)) * _GAPS_PER_OCTAVE))


def _gap_edges(gap: int) -> tuple[float, float]:
    """The bin's gaps in seconds, the second exclusive; what is shorter than a second is in the first."""
    return (_EDGES[gap] if gap else 0.0), _EDGES[gap + 1]


_EDGES: Final = [2.0 ** (at / _GAPS_PER_OCTAVE) for at in range(_GAP_BINS + 1)]


def _longer(gaps: Mapping[int, float], rate: float, from_s: float, until_s: float) -> tuple[float, float]:
    """The weight of gaps longer than each of two lengths, chance's part included."""
    first, second = _PRIOR * math.exp(-rate * from_s), _PRIOR * math.exp(-rate * until_s)
    for gap, weight in gaps.items():
        high = _EDGES[gap + 1]
        if from_s < high:
            low = _EDGES[gap] if gap else 0.0
            first += weight if from_s <= low else weight * (high - from_s) / (high - low)
            if until_s < high:
                second += weight if until_s <= low else weight * (high - until_s) / (high - low)
    return first, second
