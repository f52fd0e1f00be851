"""Which models were opened, and which will be: the history that outlives this daemon, and what a predictor makes of it.

An open is written down once it has stood for a while, so that whoever goes through the library is known as such by
then. The predictor learns from the history alone, also what other daemons of the same state folder wrote into it, so
all of them foretell the same. Everything here may wait for the disk: for worker threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Final, Protocol

from prefetch.predictor import Candidate, Predictor
from prefetch.walkers import WINDOW_S
from weightfs.errors import WeightfsError

log = logging.getLogger(__name__)

SETTLES_S: Final = WINDOW_S
"""An open is written down after that, if its process was not found to go through the library."""
SAME_S: Final = 60.0
"""Opens of a model that follow its last one within that are the same: a loader's files, or its other processes."""
SAME_PROCESS_S: Final = 600.0
"""The same for opens by one process, counted from its last one: large models take minutes."""
WORTH: Final = 0.01
"""A model less likely than this is not looked at."""
COMPACT_AT: Final = 4000
KEPT: Final = 3500
_REMEMBERED: Final = 1024


class Past(Protocol):
    """Where opens are kept: see `weightfs.index.history.History`."""

    def note(self, model: str, at_s: float) -> int:
        """Add an open; gives how many there are."""

    def since(self, position: int) -> tuple[bytes | None, list[tuple[str, int]], int]:
        """A state to begin anew from, or None; the opens behind the position; the new position."""

    def compact(self, fold: Callable[[bytes, list[tuple[str, int]]], bytes], *, keep: int) -> int:
        """Fold all but the last `keep` opens into the state."""


class Foresight:
    """What is known of the opens of one source. Thread-safe.

    Args:
        past: the history.
        clock: seconds since 1970.
    """

    def __init__(self, past: Past, clock: Callable[[], float] = time.time) -> None:
        self._past = past
        self._clock = clock
        self._lock = threading.Lock()  # of the predictor
        self._predictor = Predictor()
        self._position = 0
        self._fresh = threading.Lock()  # of what is not written down yet
        self._waiting: list[tuple[float, str, int]] = []
        self._last: OrderedDict[str, tuple[float, float, int]] = OrderedDict()  # first and last open, process
        self.noted = 0

    def opened(self, model: str, process: int) -> None:
        """A process opened a file of a model. Waits for nothing."""
        now = self._clock()
        with self._fresh:
            first, last, by = self._last.get(model, (-SAME_S, -SAME_S, 0))
            same = 0 <= now - first < SAME_S or (by == process and 0 <= now - last < SAME_PROCESS_S)
            self._last[model] = (first if same else now, now, process)
            self._last.move_to_end(model)
            if len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
            if not same and len(self._waiting) < _REMEMBERED:
                self._waiting.append((now, model, process))

    def walked(self, process: int) -> None:
        """A process goes through the library: it opened nothing that counts. Waits for nothing."""
        with self._fresh:
            for at_s, model, by in self._waiting:
                if by == process and self._last.get(model, (0.0, 0.0, 0))[0] == at_s:
                    del self._last[model]
            self._waiting = [one for one in self._waiting if one[2] != process]

    @property
    def has_news(self) -> bool:
        """Whether opens wait for being written down."""
        return bool(self._waiting)

    def settle(self, *, everything: bool = False) -> None:
        """Write down the opens that have stood for long enough, or all of them; none is worth an error."""
        now = self._clock()
        with self._fresh:
            due = [one for one in self._waiting if everything or not 0 <= now - one[0] < SETTLES_S]
            self._waiting = [one for one in self._waiting if one not in due]
        held = 0
        try:
            for at_s, model, _ in due:
                held = self._past.note(model, at_s)
                self.noted += 1
            if held >= COMPACT_AT:
                log.info("history: %d opens folded", self._past.compact(_fold, keep=KEPT))
        except WeightfsError as e:
            log.warning("opens are not remembered: %s", e)

    def refresh(self) -> None:
        """Learn what is new in the history."""
        with self._lock:
            state, opens, self._position = self._past.since(self._position)
            if state is not None:
                self._predictor = _from_state(state)
            for model, at_s in opens:
                self._predictor.observe(model, at_s)

    def likely(self, window_s: float, most: int) -> dict[str, float]:
        """The models likeliest to be opened within a window, likeliest first, with the probability of each."""
        now = self._clock()
        with self._lock:
            found = [(self._predictor.probability(model, now, window_s), model) for model in self._predictor.models()]
        found.sort(key=lambda one: (-one[0], one[1]))
        return {model: probability for probability, model in found[:most] if probability >= WORTH}

    def last_open_s(self, model: str) -> float | None:
        """When a model was last opened, as far as the history says; seconds since 1970."""
        with self._lock:
            return self._predictor.last_open_s(model)

    def choose(
        self, window_s: float, candidates: Mapping[str, Candidate], budget_bytes: int, bandwidth_bytes_s: float
    ) -> list[str]:
        """The models to have in memory, best first: `Predictor.choose`, now."""
        with self._lock:
            return self._predictor.choose(self._clock(), window_s, candidates, budget_bytes, bandwidth_bytes_s)

    def __len__(self) -> int:
        """How many models have a past."""
        return len(self._predictor)


def _from_state(state: bytes) -> Predictor:
    if not state:
        return Predictor()
    predictor, wrong = Predictor.from_state(state)
    if wrong is not None:
        log.warning("history: what was learned of older opens is dropped: %s", wrong)
    return predictor


def _fold(state: bytes, opens: Collection[tuple[str, int]]) -> bytes:
    predictor = _from_state(state)
    for model, at_s in opens:
        predictor.observe(model, at_s)
    return predictor.state()
