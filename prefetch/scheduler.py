"""What is read ahead, and when: triggers in, fills out. Decisions are made on the trio thread, work is done in others.

A trigger costs its caller a dictionary look-up. One task takes triggers off a bounded queue, has the model found and
its plan made in a worker thread, and hands the plan to the filler. A source that does not answer holds up prefetch
alone: its threads come out of a limiter of their own, and nobody waits for them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import trio

from prefetch.filler import Fill, Filler, FillerConfig, cut
from prefetch.occupancy import Key, Occupancy, OpenedModel, Shelf, Wanted, drop_model, resident_of_model
from prefetch.plan import Extent, Layer, Plan, plan_of, whole_file_plan
from prefetch.pressure import Pressure, Reason
from prefetch.residency import resident_of
from prefetch.timeline import Load, Timeline
from prefetch.walkers import COPIERS, Walkers, process_of
from weightfs.formats import format_of

log = logging.getLogger(__name__)

T = TypeVar("T")

WARM: Final = "warm"
"""The trigger of what was asked for, not opened."""
_QUEUE: Final = 256
_THREADS: Final = 8
_AGAIN_S: Final = 1.0
"""A model whose plan began less than this ago is not planned again: a loader opens a dozen of its files."""
_REMEMBERED: Final = 4096
_PRESSURE_S: Final = 0.25
_SAMPLE_S: Final = 0.05
_RESIDENT_S: Final = 2.0
_LOOK_S: Final = 0.25
_SHOWN: Final = 32
_EVERYTHING: Final = 1 << 62
_TOKENIZERS: Final = ("tokenizer.", "tokenizer_config.", "vocab.", "spiece.", "sentencepiece.")
_CONFIGURATIONS: Final = frozenset({"config.json", "model_index.json", "generation_config.json", "params.json"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Settings of prefetch.

    Attributes:
        mode: `layers` reads in the order a loader needs, `whole` in the order of the files, `off` only on request.
        budget_bytes: what models may take of the page cache together.
        pinned: labels of the layers that are locked in memory once they were read.
        learned: the order in which a loader was seen to read a model, given its folder and its files; None: by layers.
        drafts: folder of a model -> folder of the one that drafts for it, which is read first.
        filler: see `FillerConfig`.
    """

    mode: str = "layers"
    budget_bytes: int = 1 << 62
    pinned: frozenset[str] = frozenset()
    learned: Callable[[bytes, Collection[str]], Sequence[Extent] | None] = lambda folder, files: None
    drafts: Mapping[str, str] = field(default_factory=dict)
    filler: FillerConfig = field(default_factory=FillerConfig)


@dataclass(eq=False, slots=True)
class Standing:
    """A model that was wanted.

    Attributes:
        key: (folder, set).
        wanted_s: when last (monotonic).
        trigger: what wanted it.
        process: who did, 0 for nobody in particular.
        plan: its last one, whole even where the budget let less be read.
        fill: of that plan; None before it began.
        load: what the timeline tells of it.
    """

    key: tuple[bytes, str]
    wanted_s: float
    trigger: str
    process: int
    plan: Plan
    fill: Fill | None
    load: Load

    @property
    def name(self) -> str:
        """As users know it: folder and set."""
        return name_of(self.key)

    @property
    def is_active(self) -> bool:
        """Whether it is being read, or about to be."""
        return self.fill is None or not self.fill.ended.is_set()

    def document(self) -> dict[str, Any]:
        """Its progress."""
        fill = self.fill
        return {
            "model": self.name,
            "trigger": self.trigger,
            "bytes": self.plan.nbytes,
            "filled_bytes": fill.filled_bytes if fill else 0,
            "found_bytes": fill.skipped_bytes if fill else 0,
            "active": self.is_active,
            "failure": fill.failure if fill else None,
        }


class Scheduler:
    """Prefetch of one mount.

    Args:
        shelf: where models are found.
        config: see there.
        demand: whether somebody waits for a read in user space; called in any thread.
    """

    def __init__(self, shelf: Shelf, config: SchedulerConfig, demand: Callable[[], bool] = lambda: False) -> None:
        self._shelf = shelf
        self._config = config
        self._filler = Filler(config.filler, demand)
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._send, self._receive = trio.open_memory_channel[tuple[bytes, int]](_QUEUE)
        self._walkers = Walkers()
        self._occupancy = Occupancy(shelf, config.budget_bytes, config.pinned)
        self._halted: Reason | None = None
        self._timeline = Timeline(time.time() - time.monotonic())
        self._measuring = threading.Lock()
        self._opened: dict[Standing, OpenedModel] = {}  # what is being read; under `_measuring`
        self._resident: tuple[float, list[dict[str, Any]]] = -_RESIDENT_S, []
        self._looking = threading.Lock()
        self._recent: OrderedDict[tuple[bytes, int], float] = OrderedDict()
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[bytes, str], Standing] = OrderedDict()
        self.triggers = 0
        self.coalesced = 0
        self.walks = 0

    async def run(self) -> None:
        """Work off triggers until cancelled."""
        try:
            async with trio.open_nursery() as nursery, self._receive:
                nursery.start_soon(self._yield_to_pressure, nursery)
                nursery.start_soon(self._sample)
                async for path, process in self._receive:
                    token = object()
                    await self._limiter.acquire_on_behalf_of(token)
                    nursery.start_soon(self._follow, path, process, token)
        finally:
            self._filler.close()

    async def _follow(self, path: bytes, process: int, token: object) -> None:
        try:
            await trio.to_thread.run_sync(
                self._trigger, path, process, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            self._limiter.release_on_behalf_of(token)

    async def _yield_to_pressure(self, nursery: trio.Nursery) -> None:
        """Halt while memory is short, and give back what nobody uses."""
        with Pressure() as pressure:
            while True:
                await trio.sleep(_PRESSURE_S)
                found = pressure.check()
                if found is not None and self._halted is None:
                    log.warning("prefetch halts: %s", found.detail)
                    self._filler.halt(True)
                    nursery.start_soon(self.in_thread, self._empty)
                elif found is None and self._halted is not None:
                    log.info("prefetch goes on")
                    self._filler.halt(False)
                self._halted = found

    def _empty(self) -> None:
        self._occupancy.make_room(_EVERYTHING, self._others(None))

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Do what may wait for the source, beside few others of its kind."""
        return await trio.to_thread.run_sync(function, limiter=self._limiter, abandon_on_cancel=True)

    async def _sample(self) -> None:
        """Tell the timeline how much of each layer there is, while models are read."""
        while True:
            await trio.sleep(_SAMPLE_S)
            if self._opened:
                await self.in_thread(self._measure)

    def _measure(self, only: Standing | None = None) -> None:
        with self._measuring:
            for standing, opened in self._opened.items():
                if only in (None, standing):
                    try:
                        found = [resident_of(layer.extents, opened.fds) for layer in standing.plan.layers]
                    except OSError as e:
                        log.debug("can't measure %s: %s", standing.name, e.strerror)
                        continue
                    standing.load.sample(time.monotonic(), found)
                    if standing.fill is not None and standing.fill.submitted_at is not None:
                        standing.load.submitted(standing.fill.submitted_at)

    # Triggers

    def opened(self, path: bytes, thread: int) -> None:
        """A file was opened, or the link of that name followed, by a thread. On the trio thread; never waits."""
        if self._config.mode == "off" or not is_trigger(path):
            return
        now = time.monotonic()
        self.triggers += 1
        key = path, thread
        if now - self._recent.get(key, -_AGAIN_S) < _AGAIN_S:
            self.coalesced += 1
            return
        # It waits for our answer, so it is still there to be looked at.
        process, program = process_of(thread)
        if program in COPIERS:
            self.walks += 1
            return
        try:
            self._send.send_nowait((path, process))
        except trio.WouldBlock:
            self.coalesced += 1
            return
        self._recent[key] = now
        self._recent.move_to_end(key)
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)

    def _trigger(self, path: bytes, process: int) -> None:
        """Find what a path speaks of and begin to read it. In a worker thread."""
        with self._lock:
            walks = self._walkers.is_walking(process, path, time.monotonic())
            begun = [one for one in self._models.values() if one.process == process and one.is_active] if walks else []
        for one in begun:
            if one.fill is not None:
                self._filler.cancel(one.fill, "whoever opened it goes through the whole library")
        if walks:
            self.walks += 1
            return
        self._begin_all(path, os.fsdecode(os.path.basename(path)), process, None)

    def _begin_all(self, path: bytes, trigger: str, process: int, layers: Collection[str] | None) -> list[Standing]:
        try:
            names = self._shelf.names(path)
            drafts = [os.fsencode(self._config.drafts[one]) for folder, _ in names
                      if (one := os.fsdecode(folder)) in self._config.drafts]  # fmt: skip
            names = [found for draft in drafts for found in self._shelf.names(draft)] + names
            begun = [self._begin(key, trigger, process, layers) for key in dict.fromkeys(names)]
        except OSError as e:
            log.debug("nothing to prefetch for %r: %s", path, e)
            return []
        return [one for one in begun if one is not None]

    def _begin(
        self, key: tuple[bytes, str], trigger: str, process: int, layers: Collection[str] | None
    ) -> Standing | None:
        now = time.monotonic()
        with self._lock:
            known = self._models.get(key)
            lately = trigger != WARM and known is not None and now - known.wanted_s < _AGAIN_S
            if known is not None and layers is None and (known.is_active or lately):
                known.wanted_s = now
                known.load.opened(now, trigger)
                return known
        opened = self._shelf.open(*key)
        if opened is None:
            return None
        try:
            return self._read(key, opened, trigger, process, layers)
        except BaseException:
            opened.close()
            with self._lock:
                if (left := self._models.get(key)) is not None and left.fill is None:
                    del self._models[key]
            raise

    def _read(
        self, key: Key, opened: OpenedModel, trigger: str, process: int, layers: Collection[str] | None
    ) -> Standing:
        """Plan an opened model, which is this method's from now on unless it raises, and begin to read it."""
        now = time.monotonic()
        if self._config.mode == "whole":
            plan = whole_file_plan(opened.layout, opened.sizes)
        else:
            learned = self._config.learned(key[0], opened.layout.files)
            plan = plan_of(opened.layout, opened.sizes, learned)
        wanted = [layer for layer in plan.layers if layers is None or layer.label in layers]
        with self._lock:
            again = self._models.get(key)
            if again is not None and layers is None and again.is_active:  # two triggers at once
                opened.close()
                return again
            load = self._timeline.begin(
                name_of(key), trigger, now, [(layer.label, layer.nbytes) for layer in plan.layers]
            )
            load.opened(now, trigger)
            standing = Standing(key, now, trigger, process, plan, None, load)
            self._models[key] = standing
            self._models.move_to_end(key)
            while len(self._models) > _REMEMBERED:
                self._models.popitem(last=False)
            planned = sum(one.plan.nbytes for one in self._models.values())
        need = sum(layer.nbytes for layer in wanted)
        left = need
        if planned > self._config.budget_bytes:  # only then are all measured: it takes longer than a trigger may
            left = self._occupancy.make_room(need, self._others(standing))
        affordable = _first_of(wanted, left)
        labels = {layer.label for layer in affordable}

        def end() -> None:
            try:
                self._measure(standing)
                self._occupancy.pin(key, plan, opened)
            finally:
                with self._measuring:
                    del self._opened[standing]
                    opened.close()
                failure = standing.fill.failure if standing.fill is not None else None
                load.finished(time.monotonic(), failure or "complete")

        with self._measuring:
            self._opened[standing] = opened
        fill = standing.fill = Fill(cut(plan.extents(labels)), opened.fds, end)
        if len(affordable) < len(wanted):
            fill.failure = f"the budget of {self._config.budget_bytes} bytes has room for {left} of {need}"
        self._filler.start(fill)
        self._measure(standing)
        return standing

    def _others(self, standing: Standing | None) -> list[Wanted]:
        with self._lock:
            return [
                Wanted(one.key, one.wanted_s, one.plan.nbytes if one.is_active else 0)
                for one in self._models.values()
                if one is not standing
            ]

    # On request; in worker threads

    def warm(self, path: bytes, layers: Collection[str] | None) -> list[dict[str, Any]]:
        """Begin to read the models below a path; gives the progress of each."""
        return [one.document() for one in self._begin_all(path, WARM, 0, layers)]

    def progress(self, names: Collection[str]) -> list[dict[str, Any]]:
        """How far models are that `warm` named."""
        with self._lock:
            return [one.document() for one in self._models.values() if one.name in names]

    def evict(self, path: bytes) -> list[dict[str, Any]]:
        """Drop the models below a path from memory; a page that is mapped stays."""
        found = []
        for key in self._shelf.names(path):
            with self._lock:
                known = self._models.get(key)
            if known is not None and known.fill is not None:
                self._filler.cancel(known.fill, "it was evicted")
                known.fill.ended.wait(1)
            opened = self._shelf.open(*key)
            if opened is None:
                continue
            self._occupancy.release(key)
            try:
                before = resident_of_model(opened)
                left = drop_model(opened)
            finally:
                opened.close()
            found.append({"model": name_of(key), "evicted_bytes": before - left, "resident_bytes": left})
        return found

    def residency(self, path: bytes) -> list[dict[str, Any]]:
        """How much of each layer of the models below a path is in memory."""
        return self._residency_of(self._shelf.names(path))

    def _residency_of(self, keys: Iterable[Key]) -> list[dict[str, Any]]:
        found = []
        for key in keys:
            opened = self._shelf.open(*key)
            if opened is None:
                continue
            try:
                layers: list[dict[str, Any]] = [
                    {"layer": one.label, "bytes": one.nbytes, "resident_bytes": resident_of(one.extents, opened.fds)}
                    for one in plan_of(opened.layout, opened.sizes).layers
                ]
            finally:
                opened.close()
            total = sum(opened.sizes.values())
            found.append({"model": name_of(key), "bytes": total, "layers": layers,
                          "resident_bytes": sum(layer["resident_bytes"] for layer in layers)})  # fmt: skip
        return found

    def timeline(self) -> dict[str, Any]:
        """The last loads. Callable from any thread."""
        return self._timeline.document()

    def resident(self) -> list[dict[str, Any]]:
        """`residency` of the models wanted last, older than a few seconds only where the source does not answer.

        Callable from any thread, and waits a moment at most: whoever asks how a mount is must hear of it even then.
        """
        at_s, _ = self._resident
        if time.monotonic() - at_s >= _RESIDENT_S and self._looking.acquire(blocking=False):
            looked = threading.Event()
            threading.Thread(target=self._look, args=(looked,), name="residency", daemon=True).start()
            looked.wait(_LOOK_S)
        return self._resident[1]

    def _look(self, looked: threading.Event) -> None:
        try:
            with self._lock:
                keys = [one.key for one in list(self._models.values())[-_SHOWN:]]
            self._resident = time.monotonic(), self._residency_of(keys)
        except OSError as e:
            log.debug("residency is not known: %s", e.strerror)
        finally:
            self._looking.release()
            looked.set()

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        with self._lock:
            standing = list(self._models.values())
        return {
            "mode": self._config.mode,
            **self._occupancy.status(),
            "halted": self._halted.detail if self._halted is not None else None,
            "triggers": self.triggers,
            "coalesced": self.coalesced,
            "walks": self.walks,
            "filled_bytes": self._filler.filled_bytes,
            "active": [one.document() for one in standing if one.is_active],
            "wanted": len(standing),
            "models": self.resident(),
        }


def name_of(key: Key) -> str:
    """A model as users know it: folder and set."""
    return os.path.join(os.fsdecode(key[0]), key[1])


def is_trigger(path: bytes) -> bool:
    """Whether a loader opens a file of that name before, or when, it loads weights."""
    name = os.fsdecode(os.path.basename(path))
    return (
        format_of(name) is not None
        or name in _CONFIGURATIONS
        or name.endswith(".index.json")
        or name.startswith(_TOKENIZERS)
    )


def _first_of(layers: Sequence[Layer], nbytes: int) -> list[Layer]:
    """The first layers that have room in `nbytes`."""
    found = []
    for layer in layers:
        nbytes -= layer.nbytes
        if nbytes < 0:
            break
        found.append(layer)
    return found
