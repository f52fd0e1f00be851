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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from prefetch.filler import Fill, Filler, FillerConfig, cut
from prefetch.plan import Layer, Plan, plan_of, whole_file_plan
from prefetch.residency import drop, resident_bytes, resident_of
from prefetch.walkers import COPIERS, Walkers, process_of
from weightfs.formats import format_of
from weightfs.formats.layout import WeightLayout

log = logging.getLogger(__name__)

WARM: Final = "warm"
"""The trigger of what was asked for, not opened."""
_QUEUE: Final = 256
_THREADS: Final = 8
_AGAIN_S: Final = 1.0
"""A model whose plan began less than this ago is not planned again: a loader opens a dozen of its files."""
_REMEMBERED: Final = 4096
_TOKENIZERS: Final = ("tokenizer.", "tokenizer_config.", "vocab.", "spiece.", "sentencepiece.")
_CONFIGURATIONS: Final = frozenset({"config.json", "model_index.json", "generation_config.json", "params.json"})


class OpenedModel(Protocol):
    """A set of weights with its files open: see `weightfs.catalogue.OpenModel`."""

    folder: bytes
    name: str
    layout: WeightLayout
    fds: dict[str, int]
    sizes: dict[str, int]
    keys: dict[str, tuple[int, int]]

    def close(self) -> None:
        """Close the descriptors."""


class Shelf(Protocol):
    """Finds and opens models; all of it may wait for the source. See `weightfs.catalogue.Catalogue`."""

    def names(self, path: bytes) -> list[tuple[bytes, str]]:
        """The models a path speaks of, as (folder, set)."""

    def open(self, folder: bytes, name: str) -> OpenedModel | None:
        """One of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Settings of prefetch.

    Attributes:
        mode: `layers` reads in the order a loader needs, `whole` in the order of the files, `off` only on request.
        budget_bytes: what models may take of the page cache together.
        drafts: folder of a model -> folder of the one that drafts for it, which is read first.
        filler: see `FillerConfig`.
    """

    mode: str = "layers"
    budget_bytes: int = 1 << 62
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
        fill: of that plan; None when nothing was to be read.
    """

    key: tuple[bytes, str]
    wanted_s: float
    trigger: str
    process: int
    plan: Plan
    fill: Fill | None

    @property
    def name(self) -> str:
        """As users know it: folder and set."""
        return os.path.join(os.fsdecode(self.key[0]), self.key[1])

    @property
    def is_active(self) -> bool:
        """Whether it is being read."""
        return self.fill is not None and not self.fill.ended.is_set()

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
            walks = self._walkers.is_walking(process, os.path.dirname(path), time.monotonic())
            begun = [one for one in self._models.values() if one.process == process and one.is_active] if walks else []
        for one in begun:
            assert one.fill is not None
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
                return known
        opened = self._shelf.open(*key)
        if opened is None:
            return None
        planner = whole_file_plan if self._config.mode == "whole" else plan_of
        plan = planner(opened.layout, opened.sizes)
        wanted = [layer for layer in plan.layers if layers is None or layer.label in layers]
        extents = [extent for layer in self._affordable(wanted) for extent in layer.extents]
        with self._lock:
            again = self._models.get(key)
            if again is not None and again is not known and again.is_active:  # two triggers at once
                opened.close()
                return again
            standing = Standing(key, now, trigger, process, plan, None)
            self._models[key] = standing
            self._models.move_to_end(key)
            while len(self._models) > _REMEMBERED:
                self._models.popitem(last=False)
            standing.fill = self._filler.start(cut(iter(extents)), opened.fds, opened.close, first=False)
        return standing

    def _affordable(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that the budget has room for, the first ones first."""
        left, found = self._config.budget_bytes, []
        for layer in layers:
            left -= layer.nbytes
            if left < 0:
                break
            found.append(layer)
        return found

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
            try:
                before = _resident(opened)
                for fd in opened.fds.values():
                    drop(fd)
                left = _resident(opened)
            finally:
                opened.close()
            name = os.path.join(os.fsdecode(key[0]), key[1])
            found.append({"model": name, "evicted_bytes": before - left, "resident_bytes": left})
        return found

    def residency(self, path: bytes) -> list[dict[str, Any]]:
        """How much of each layer of the models below a path is in memory."""
        found = []
        for key in self._shelf.names(path):
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
            name = os.path.join(os.fsdecode(key[0]), key[1])
            total = sum(opened.sizes.values())
            found.append({"model": name, "bytes": total, "layers": layers,
                          "resident_bytes": sum(layer["resident_bytes"] for layer in layers)})  # fmt: skip
        return found

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        with self._lock:
            standing = list(self._models.values())
        return {
            "mode": self._config.mode,
            "budget_bytes": self._config.budget_bytes,
            "halted": self._filler.halted,
            "triggers": self.triggers,
            "coalesced": self.coalesced,
            "walks": self.walks,
            "filled_bytes": self._filler.filled_bytes,
            "active": [one.document() for one in standing if one.is_active],
            "wanted": len(standing),
        }


def is_trigger(path: bytes) -> bool:
    """Whether a loader opens a file of that name before, or when, it loads weights."""
    name = os.fsdecode(os.path.basename(path))
    return (
        format_of(name) is not None
        or name in _CONFIGURATIONS
        or name.endswith(".index.json")
        or name.startswith(_TOKENIZERS)
    )


def _resident(opened: OpenedModel) -> int:
    return sum(resident_bytes(fd, 0, opened.sizes[file]) for file, fd in opened.fds.items())
