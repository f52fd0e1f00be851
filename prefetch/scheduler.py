"""What is read ahead, and when: triggers in, fills out. Decisions are made on the trio thread, work is done in others.

A trigger costs its caller a dictionary look-up. One task takes triggers off a bounded queue, has the model found and
its plan made in a worker thread, and hands the plan to the filler. A source that does not answer holds up prefetch
alone: its threads come out of a limiter of their own, and nobody waits for them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import trio

from prefetch import underway
from prefetch.anticipation import AFTER_PRESSURE_S, Anticipation, Target
from prefetch.course import EARLY_BYTES, Course
from prefetch.filler import Fill, Filler, FillerConfig
from prefetch.foresight import Foresight, Past
from prefetch.giving import Giving
from prefetch.inventory import Inventory
from prefetch.occupancy import Key, Occupancy, OpenedModel, Shelf, Wanted, drop_model, resident_of_model
from prefetch.plan import Extent, Layer, plan_of, whole_file_plan
from prefetch.pressure import Pressure, Reason
from prefetch.standing import PREDICTED, WARM, Standing, name_of
from prefetch.timeline import Timeline
from prefetch.underway import Underway
from prefetch.walkers import COPIERS, Walkers, process_of
from prefetch.wishes import AGAIN_S, Wish, is_served, is_trigger

log = logging.getLogger(__name__)

T = TypeVar("T")

_QUEUE: Final = 256
_THREADS: Final = 8
_REMEMBERED: Final = 4096
_PRESSURE_S: Final = 0.25
_SAMPLE_S: Final = 0.05
_PREDICTED_EVERY: Final = 20  # samples
_LARGE_BYTES: Final = 64 << 20
_BANDWIDTH_BYTES_S: Final = 1e9  # until a model was read
_SHOWN: Final = 32


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


class Scheduler:
    """Prefetch of one mount.

    Args:
        shelf: where models are found.
        config: see there.
        demand: whether somebody waits for a read in user space; called in any thread.
        past: the history of opens, for reading what was not asked for yet; None for not doing that.

    Attributes:
        bandwidth_bytes_s: how fast the last large model was read.
    """

    def __init__(
        self,
        shelf: Shelf,
        config: SchedulerConfig,
        demand: Callable[[], bool] = lambda: False,
        past: Past | None = None,
    ) -> None:
        self._shelf = shelf
        self._config = config
        self._demand = demand
        self._filler = Filler(config.filler, demand)
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._send, self._receive = trio.open_memory_channel[tuple[bytes, int]](_QUEUE)
        self._walkers = Walkers()
        self._occupancy = Occupancy(shelf, config.budget_bytes, config.pinned)
        self._inventory = Inventory(shelf)
        self._foresight = Foresight(past) if past is not None and config.mode != "off" else None
        self._ahead: Anticipation | None = None
        if self._foresight is not None:
            self._ahead = Anticipation(self, shelf, self._foresight, config.budget_bytes, demand)
            self._occupancy.on_evicted = self._ahead.score.lost
        self.bandwidth_bytes_s = _BANDWIDTH_BYTES_S
        self._halted: Reason | None = None
        self._short_s: float | None = None  # when memory was short last; trio's clock
        self._timeline = Timeline(time.time() - time.monotonic())
        self._underway = Underway()
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
                if self._ahead is not None:
                    nursery.start_soon(self._ahead.run)
                async for path, process in self._receive:
                    token = object()
                    await self._limiter.acquire_on_behalf_of(token)
                    nursery.start_soon(self._follow, path, process, token)
        finally:
            self._filler.close()
            if self._ahead is not None:
                self._ahead.filler.close()
            self.remember()

    def remember(self) -> None:
        """Write down what was opened, before this daemon ends. A moment of the disk's time."""
        if self._foresight is not None:
            self._foresight.settle(everything=True)

    async def _follow(self, path: bytes, process: int, token: object) -> None:
        try:
            await trio.to_thread.run_sync(
                self._trigger, path, process, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            self._limiter.release_on_behalf_of(token)

    async def _yield_to_pressure(self, nursery: trio.Nursery) -> None:
        """Halt while memory is short, and give back what nobody uses: a model at a time, while it goes on."""
        giving = Giving()
        with Pressure() as pressure:
            while True:
                await trio.sleep(_PRESSURE_S)
                found = pressure.check()
                if found is not None:
                    self._short_s = trio.current_time()
                    if giving.is_due(pressure.told_s):
                        nursery.start_soon(self._give_back, found, giving)
                if found is not None and self._halted is None:
                    log.warning("prefetch halts: %s", found.detail)
                    self._filler.halt(True)
                    self._give_way()
                elif found is None and self._halted is not None:
                    log.info("prefetch goes on")
                    self._filler.halt(False)
                self._halted = found

    async def _give_back(self, found: Reason, giving: Giving) -> None:
        with giving:
            giving.freed_bytes = await self.in_thread(
                lambda: self._occupancy.give_back(found.short_bytes, self._others(None))
            )

    def busy(self) -> str | None:
        """Why nothing may be read without being asked for. On the trio thread."""
        if self._halted is not None:
            return f"memory is short: {self._halted.detail}"
        if self._short_s is not None and trio.current_time() - self._short_s < AFTER_PRESSURE_S:
            return "memory was short a moment ago"
        return next((f"{one.name} is being read" for one in self.standings() if one.is_active), None)

    def _give_way(self) -> None:
        if self._ahead is not None:
            self._ahead.give_way()

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Do what may wait for the source, beside few others of its kind."""
        return await trio.to_thread.run_sync(function, limiter=self._limiter, abandon_on_cancel=True)

    async def _sample(self) -> None:
        """Tell the timeline how much of each layer there is, while models are read."""
        for turn in itertools.count():
            await trio.sleep(_SAMPLE_S)
            if self._underway:
                every = turn % _PREDICTED_EVERY == 0
                await self.in_thread(functools.partial(self._look, every=every))
                for standing in self._underway.stalled(trio.current_time(), self._waits):
                    self._give_up(standing)

    def _look(self, *, every: bool) -> None:
        if self._filler.runs_ahead:
            for fill, place in self._underway.elsewhere():
                self._filler.lead(fill, place)
        self._underway.measure(lambda one: every or not one.is_predicted)

    def _waits(self, standing: Standing) -> bool:
        return self._halted is not None or (standing.is_predicted and self._demand())

    def _give_up(self, standing: Standing) -> None:
        """A model whose source stands still."""
        log.warning("prefetch of %s ends: no byte came for %g s", standing.name, underway.STALLED_S)
        if standing.fill is not None:
            why = f"no byte came for {underway.STALLED_S:g} s: the source does not answer"
            self._filler_of(standing).cancel(standing.fill, why)

    def _filler_of(self, standing: Standing) -> Filler:
        return self._ahead.filler if self._ahead is not None and standing.is_predicted else self._filler

    # Triggers

    def opened(self, path: bytes, thread: int) -> None:
        """A file was opened, or the link of that name followed, by a thread. On the trio thread; never waits."""
        if self._config.mode == "off" or not is_trigger(path):
            return
        now = time.monotonic()
        self.triggers += 1
        key = path, thread
        if now - self._recent.get(key, -AGAIN_S) < AGAIN_S:
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
        self._give_way()
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
            if self._foresight is not None:
                self._foresight.walked(process)
            return
        self._begin_all(path, Wish(trigger=os.fsdecode(os.path.basename(path)), process=process))

    def _begin_all(self, path: bytes, wish: Wish) -> list[Standing]:
        try:
            names = self._shelf.names(path)
            self._note(names, wish)
            drafts = [os.fsencode(self._config.drafts[one]) for folder, _ in names
                      if (one := os.fsdecode(folder)) in self._config.drafts]  # fmt: skip
            names = [found for draft in drafts for found in self._shelf.names(draft)] + names
            begun = [self._begin(key, wish) for key in dict.fromkeys(names)]
        except OSError as e:
            log.debug("nothing to prefetch for %r: %s", path, e)
            return []
        return [one for one in begun if one is not None]

    def _note(self, keys: Collection[Key], wish: Wish) -> None:
        """Have what is wanted remembered; what is warmed was not opened yet."""
        for key in keys:
            if self._foresight is not None and wish.trigger != WARM:
                self._foresight.opened(name_of(key), wish.process)
            if self._ahead is not None:
                self._ahead.wanted(key)

    def _joined(self, key: Key, wish: Wish) -> Standing | None:
        """What is read, or was just now, for others who wished for it."""
        now = time.monotonic()
        with self._lock:
            known = self._models.get(key)
            if known is None or not is_served(known, wish, now):
                return None
            if wish.target is None:
                known.wanted_s = now
                known.load.opened(now, wish.trigger)
            is_awaited_now = wish.opens_weights and not known.awaited
            if is_awaited_now:
                known.awaited = True
            if known.fill is not None:
                known.fill.awaited = known.awaited
        if is_awaited_now:
            self._underway.glance(known)
        return known

    def _begin(self, key: Key, wish: Wish) -> Standing | None:
        if (known := self._joined(key, wish)) is not None:
            return known
        opened = self._shelf.open(*key)
        if opened is None:
            return None
        try:
            return self._read(key, opened, wish)
        except BaseException:
            opened.close()
            with self._lock:
                if (left := self._models.get(key)) is not None and left.fill is None:
                    del self._models[key]
            raise

    def read_predicted(self, target: Target) -> Standing | None:
        """Begin to read a model that nobody asked for; None where it can't be. In a worker thread."""
        try:
            return self._begin(target.key, Wish(trigger=PREDICTED, target=target))
        except OSError as e:
            log.debug("%s is not read: %s", name_of(target.key), e)
            return None

    def _read(self, key: Key, opened: OpenedModel, wish: Wish) -> Standing:
        """Plan an opened model, which is this method's from now on unless it raises, and begin to read it."""
        now = time.monotonic()
        if self._config.mode == "whole":
            plan = whole_file_plan(opened.layout, opened.sizes)
        else:
            learned = self._config.learned(key[0], opened.layout.files)
            plan = plan_of(opened.layout, opened.sizes, learned)
        wanted = [layer for layer in plan.layers if wish.layers is None or layer.label in wish.layers]
        with self._lock:
            again = self._models.get(key)
            if again is not None and again.is_active and is_served(again, wish, now):  # two triggers at once
                opened.close()
                return again
            load = self._timeline.begin(
                name_of(key), wish.trigger, now, [(layer.label, layer.nbytes) for layer in plan.layers]
            )
            if wish.target is None:
                load.opened(now, wish.trigger)
            last_s = now if wish.target is None else max(wish.target.wanted_s, again.wanted_s if again else 0.0)
            standing = Standing(
                key, last_s, wish.trigger, wish.process, plan, len(wanted) < len(plan.layers), None, load,
                awaited=wish.opens_weights,
            )  # fmt: skip
            self._models[key] = standing
            self._models.move_to_end(key)
            while len(self._models) > _REMEMBERED:
                self._models.popitem(last=False)
            planned = sum(one.plan.nbytes for one in self._models.values())
        need = sum(layer.nbytes for layer in wanted)
        left = need
        planned += sum(one.reserved_bytes for one in self._found())
        if planned > self._config.budget_bytes:  # only then are all measured: it takes longer than a trigger may
            left = self._occupancy.make_room(need, self._others(standing, wish.target.kept if wish.target else ()))
        affordable = _first_of(wanted, left)
        labels = {layer.label for layer in affordable}
        before = self._known_bytes(standing, opened)
        end = functools.partial(self._end, standing, opened, before)
        course = Course(plan.extents(labels), 0 if standing.awaited else EARLY_BYTES)
        fill = standing.fill = Fill(course, opened.fds, end, standing.awaited)
        self._underway.add(standing, opened)
        if wish.opens_weights:
            self._underway.glance(standing)
        if len(affordable) < len(wanted):
            fill.failure = f"the budget of {self._config.budget_bytes} bytes has room for {left} of {need}"
        self._filler_of(standing).start(fill)
        self._underway.measure(lambda one: one is standing)
        return standing

    def _known_bytes(self, standing: Standing, opened: OpenedModel) -> int:
        """What of a model is in memory, where that says what becomes of reading ahead; 0 elsewhere."""
        if self._ahead is None or not (standing.is_predicted or self._ahead.score.is_open(standing.key)):
            return 0  # it takes longer than a trigger may
        found = resident_of_model(opened)
        if not standing.is_predicted:
            self._ahead.score.wanted(standing.key, found)
        return found

    def _end(self, standing: Standing, opened: OpenedModel, before_bytes: int) -> None:
        """Nothing of a model is being read any more, of which so much was in memory. In a thread of the filler."""
        fill = standing.fill
        assert fill is not None, "it has ended"
        try:
            self._underway.measure(lambda one: one is standing, afresh=True)
            if standing.is_predicted and self._ahead is not None:
                self._ahead.score.read(standing.key, resident_of_model(opened) - before_bytes)
            if not standing.is_predicted:  # what is locked can't leave for what is asked for
                self._occupancy.pin(standing.key, standing.plan, opened)
        finally:
            self._underway.remove(standing)
            now = time.monotonic()
            if fill.submitted_at is not None and fill.filled_bytes >= _LARGE_BYTES and not standing.is_predicted:
                self.bandwidth_bytes_s = fill.filled_bytes / max(now - fill.submitted_at, 1e-3)
            standing.load.finished(now, fill.failure or "complete")

    def standings(self) -> list[Standing]:
        """The models that were wanted, or read without being. From any thread."""
        with self._lock:
            return list(self._models.values())

    def _found(self) -> list[Wanted]:
        """Models in memory that a daemon before this one read."""
        if self._ahead is None:
            return []
        with self._lock:
            return [one for one in self._ahead.held() if one.key not in self._models]

    def _others(self, standing: Standing | None, kept: Collection[Key] = ()) -> list[Wanted]:
        """All models but one; those that are read, or to be kept, as what they will be."""
        reading = {one.key for one in self._underway}
        known = [
            Wanted(one.key, one.wanted_s, one.plan.nbytes if one.key in reading or one.key in kept else 0)
            for one in self.standings()
            if one is not standing
        ]
        return known + [
            Wanted(one.key, one.wanted_s, one.reserved_bytes if one.key in kept else 0)
            for one in self._found()
            if standing is None or one.key != standing.key
        ]

    # On request; in worker threads

    def warm(self, path: bytes, layers: Collection[str] | None) -> list[dict[str, Any]]:
        """Begin to read the models below a path; gives the progress of each."""
        self._give_way()
        return [one.document() for one in self._begin_all(path, Wish(trigger=WARM, layers=layers))]

    def progress(self, names: Collection[str]) -> list[dict[str, Any]]:
        """How far models are that `warm` named."""
        with self._lock:
            return [one.document() for one in self._models.values() if one.name in names]

    def evict(self, path: bytes) -> list[dict[str, Any]]:
        """Drop the models below a path from memory; a page that is mapped stays."""
        found = []
        for key in self._shelf.names(path):
            if self._ahead is not None:
                self._ahead.unwanted(key)
            for one in [one for one in self._underway if one.key == key]:
                if one.fill is not None:
                    self._filler_of(one).cancel(one.fill, "it was evicted")
                    one.fill.ended.wait(1)
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
        return self._inventory.of(self._shelf.names(path))

    def timeline(self) -> dict[str, Any]:
        """The last loads. Callable from any thread."""
        return self._timeline.document()

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        standing = self.standings()
        return {
            "mode": self._config.mode,
            **self._occupancy.status(),
            "halted": self._halted.detail if self._halted is not None else None,
            "triggers": self.triggers,
            "coalesced": self.coalesced,
            "walks": self.walks,
            "filled_bytes": self._filler.filled_bytes + (self._ahead.filler.filled_bytes if self._ahead else 0),
            "active": [said for one in standing if (said := one.document())["active"]],
            "failed": [one.document() for one in standing if one.has_failed][-_SHOWN:],
            "wanted": len(standing),
            "models": self._inventory.lately(lambda: [one.key for one in self.standings()[-_SHOWN:]]),
            "predicted": self._ahead.status() if self._ahead is not None else None,
        }


def _first_of(layers: Sequence[Layer], nbytes: int) -> list[Layer]:
    """The first layers that have room in `nbytes`."""
    found = []
    for layer in layers:
        nbytes -= layer.nbytes
        if nbytes < 0:
            break
        found.append(layer)
    return found
