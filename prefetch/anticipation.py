"""Reads what will likely be opened next, while nobody reads: the idle part of the budget and of the disk.

Once a minute, and again after each model that was read, it is asked which models are worth their memory (probability
of an open within the next hour, by bytes). The best of them that is missing is read, two reads at a time at idle
priority; for it leave only models that are not among those. It ends the moment anybody opens a model.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from prefetch.filler import Fill, Filler, FillerConfig
from prefetch.foresight import Foresight
from prefetch.occupancy import Key, Shelf, Wanted, resident_of_model
from prefetch.predictor import Candidate
from prefetch.standing import GAVE_WAY, WARM, Standing, key_of, name_of
from prefetch.usage import files_in_use

log = logging.getLogger(__name__)

WINDOW_S: Final = 3600.0
PERIOD_S: Final = 60.0
SOON_S: Final = 5.0
"""It looks again so long after somebody opened a model."""
AFTER_PRESSURE_S: Final = 300.0
AGAIN_S: Final = 600.0
"""A model that was read, or could not be, is left alone for so long: what the kernel drops again was not wanted."""
IDLE: Final = FillerConfig(depth=2, depth_beside_demand=0)
_MOST: Final = 128
_SHOWN: Final = 16
_SETTLE_S: Final = 2.0
_LEAST_BYTES: Final = 1 << 20
_LEAST_SHARE: Final = 0.02
"""Pages vanish by themselves, and a tail or two is no reason to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to read next.

    Attributes:
        key: folder and set.
        probability: of an open within the window.
        wanted_s: when it was opened last (monotonic).
        kept: models that must not leave for it.
    """

    key: Key
    probability: float
    wanted_s: float
    kept: frozenset[Key]


class Reader(Protocol):
    """Who reads models: see `prefetch.scheduler.Scheduler`."""

    @property
    def bandwidth_bytes_s(self) -> float:
        """How fast the last large model was read."""

    def busy(self) -> str | None:
        """Why nothing may be read without being asked for, or None. On the trio thread."""

    def standings(self) -> list[Standing]:
        """The models that were wanted. From any thread."""

    def read_predicted(self, target: Target) -> Standing | None:
        """Begin to read a model; None where that is not possible. In a worker thread."""

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Do what may wait for the source."""


class Score:
    """What became of the bytes that were read without being asked for. Thread-safe.

    Attributes:
        read_bytes: of all.
        used_bytes: of these, in memory when somebody opened or warmed the model.
        wasted_bytes: of these, gone before that.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Key, int] = {}
        self.read_bytes = self.used_bytes = self.wasted_bytes = 0

    def read(self, key: Key, nbytes: int) -> None:
        """Bytes of a model were read."""
        with self._lock:
            if nbytes <= 0:
                return
            self.read_bytes += nbytes
            self._open[key] = self._open.get(key, 0) + nbytes

    def is_open(self, key: Key) -> bool:
        """Whether it is still to be seen what became of bytes of a model."""
        return key in self._open

    def wanted(self, key: Key, found_bytes: int) -> None:
        """Somebody wants a model, of which so much is in memory."""
        with self._lock:
            pending = self._open.pop(key, 0)
            used = min(pending, found_bytes)
            self.used_bytes += used
            self.wasted_bytes += pending - used

    def lost(self, key: Key) -> None:
        """A model was evicted."""
        with self._lock:
            self.wasted_bytes += self._open.pop(key, 0)


class Anticipation:
    """The idle time of one mount.

    Args:
        reader: who reads.
        shelf: opens models, to measure them.
        foresight: says which are likely.
        budget_bytes: what models may take of memory together.
        demand: whether somebody waits for a read in user space; called in any thread.
    """

    def __init__(
        self, reader: Reader, shelf: Shelf, foresight: Foresight, budget_bytes: int, demand: Callable[[], bool]
    ) -> None:
        self._reader = reader
        self._shelf = shelf
        self._foresight = foresight
        self._budget_bytes = budget_bytes
        self.filler = Filler(IDLE, demand)
        self.score = Score()
        self._waiter, self._writer = trio.CapacityLimiter(1), trio.CapacityLimiter(1)
        self._current: Fill | None = None
        self._calls = 0  # for the disk, by others
        self._not_before: dict[Key, float] = {}  # of trio's clock
        self._unwanted: set[Key] = set()
        self._held: list[Wanted] = []
        self._waits_for: str | None = "the first look"
        self._shown: list[dict[str, Any]] = []
        self._looked_at: float | None = None

    async def run(self) -> None:
        """Look and read until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._settle)
            while True:
                calls = self._calls
                self._waits_for = self._reader.busy()
                if self._waits_for is None:
                    now = trio.current_time()
                    barred = self._unwanted | {key for key, at_s in self._not_before.items() if now < at_s}
                    target = await self._reader.in_thread(functools.partial(self._look, barred))
                    if target is not None and await self._read(target, calls):
                        continue
                soon = self._calls != calls or self._reader.busy() is not None
                await trio.sleep(SOON_S if soon else PERIOD_S)

    async def _settle(self) -> None:
        while True:
            await trio.sleep(_SETTLE_S)
            if self._foresight.has_news:
                # Not left behind when the daemon ends: the index is closed next, and a write would open it again.
                await trio.to_thread.run_sync(self._foresight.settle, limiter=self._writer)

    async def _read(self, target: Target, calls: int) -> bool:
        """Read one model; False when somebody came in between, after as many had as `calls` says."""
        if self._calls != calls or self._reader.busy() is not None:
            return False
        standing = await self._reader.in_thread(functools.partial(self._reader.read_predicted, target))
        self._not_before[target.key] = trio.current_time() + AGAIN_S
        if standing is None or (fill := standing.fill) is None:
            return True
        self._current = fill
        if self._calls != calls:
            self.filler.cancel(fill, GAVE_WAY)
        await trio.to_thread.run_sync(fill.ended.wait, limiter=self._waiter, abandon_on_cancel=True)
        self._current = None
        if self._calls != calls:
            self._not_before.pop(target.key, None)
        return self._calls == calls

    def give_way(self) -> None:
        """End what is being read: somebody wants the disk. From any thread; waits for nothing."""
        self._calls += 1
        if (current := self._current) is not None:
            self.filler.cancel(current, GAVE_WAY)

    def wanted(self, key: Key) -> None:
        """Somebody opened or warmed a model: it may be foretold again. From any thread."""
        self._unwanted.discard(key)
        self._not_before.pop(key, None)

    def unwanted(self, key: Key) -> None:
        """Somebody had a model evicted: it is not read until it is wanted again. From any thread."""
        self._unwanted.add(key)
        self.score.lost(key)

    def held(self) -> list[Wanted]:
        """Models that nobody wanted since this daemon began, and that were in memory at the last look, in full."""
        return list(self._held)

    # In a worker thread

    def _look(self, barred: Collection[Key]) -> Target | None:
        """What is worth reading now, but for what is barred."""
        self._foresight.refresh()
        likely = self._foresight.likely(WINDOW_S, _MOST)
        standings = {one.key: one for one in self._reader.standings()}
        candidates: dict[str, Candidate] = {}
        files: dict[Key, set[tuple[int, int]]] = {}
        for key in {**dict.fromkeys(map(key_of, likely)), **standings}:
            if (measured := self._measure(key)) is not None and (measured[0].resident_bytes or name_of(key) in likely):
                candidates[name_of(key)], files[key] = measured
        now, unix = time.monotonic(), time.time()
        wanted_s = {key: now - max(0.0, unix - (self._foresight.last_open_s(name_of(key)) or 0.0)) for key in files}
        self._held = [
            Wanted(key, wanted_s[key], candidates[name_of(key)].nbytes)
            for key in files
            if key not in standings and candidates[name_of(key)].resident_bytes
        ]
        staying = {key for key, one in standings.items() if one.trigger == WARM and now - one.wanted_s < WINDOW_S}
        if sum(one.nbytes for one in candidates.values()) > self._budget_bytes:
            in_use = files_in_use({file for its in files.values() for file in its}).in_use
            staying |= {key for key, its in files.items() if its & in_use}
        room = self._budget_bytes - sum(candidates.pop(name_of(key)).resident_bytes for key in staying & files.keys())
        chosen = self._foresight.choose(WINDOW_S, candidates, max(0, room), self._reader.bandwidth_bytes_s)
        self._shown = [self._row(name, likely.get(name, 0.0), candidates[name]) for name in chosen if name in likely]
        self._looked_at = unix
        kept = frozenset({key_of(name) for name in chosen} | staying)
        for name in chosen:
            key, candidate = key_of(name), candidates[name]
            missing = candidate.nbytes - candidate.resident_bytes
            if missing > max(_LEAST_BYTES, candidate.nbytes * _LEAST_SHARE) and key not in barred:
                return Target(key=key, probability=likely.get(name, 0.0), wanted_s=wanted_s[key], kept=kept)
        return None

    def _measure(self, key: Key) -> tuple[Candidate, set[tuple[int, int]]] | None:
        """Its size and what of it is in memory, and its files; None for what is no model any more."""
        try:
            opened = self._shelf.open(*key)
        except OSError as e:
            log.debug("%s is not foretold: %s", name_of(key), e)
            return None
        if opened is None:
            return None
        try:
            nbytes = sum(opened.sizes.values())
            return Candidate(nbytes=nbytes, resident_bytes=resident_of_model(opened)), set(opened.keys)
        except OSError as e:
            log.debug("can't measure %s: %s", name_of(key), e.strerror)
            return None
        finally:
            opened.close()

    def _row(self, name: str, probability: float, candidate: Candidate) -> dict[str, Any]:
        missing = candidate.nbytes - candidate.resident_bytes
        return {
            "model": name,
            "probability": round(probability, 4),
            "bytes": candidate.nbytes,
            "resident_bytes": candidate.resident_bytes,
            "saves_s": round(probability * missing / self._reader.bandwidth_bytes_s, 3),
        }

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        return {
            "window_s": WINDOW_S,
            "looked_at": self._looked_at,
            "waits_for": self._waits_for,
            "known": len(self._foresight),
            "noted": self._foresight.noted,
            "models": self._shown[:_SHOWN],
            "read_bytes": self.score.read_bytes,
            "used_bytes": self.score.used_bytes,
            "wasted_bytes": self.score.wasted_bytes,
        }
