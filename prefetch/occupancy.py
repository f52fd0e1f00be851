"""What prefetch holds in memory: room is made within the budget, pressure empties it, and some layers are locked.

Models that were wanted are known by name only; each is opened and measured when room is needed, so what is said of it
is what the kernel says at that moment. All of it blocks: for worker threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefetch.eviction import Resident, choose
from prefetch.pins import Pins
from prefetch.plan import Plan
from prefetch.residency import drop, resident_bytes
from prefetch.usage import files_in_use
from weightfs.errors import WeightfsError
from weightfs.formats.layout import WeightLayout

log = logging.getLogger(__name__)

Key = tuple[bytes, str]
"""Folder and set."""


class OpenedModel(Protocol):
    """A set of weights with its files open: see `weightfs.catalogue.OpenModel`."""

    folder: bytes
    name: str
    layout: WeightLayout
    fds: dict[str, int]
    sizes: dict[str, int]
    keys: set[tuple[int, int]]

    def close(self) -> None:
        """Close the descriptors."""


class Shelf(Protocol):
    """Finds and opens models; all of it may wait for the source. See `weightfs.catalogue.Catalogue`."""

    def names(self, path: bytes) -> list[Key]:
        """The models a path speaks of."""

    def open(self, folder: bytes, name: str) -> OpenedModel | None:
        """One of them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that was wanted.

    Attributes:
        key: folder and set.
        wanted_s: when last.
        reserved_bytes: of its plan while it is being read, else 0.
    """

    key: Key
    wanted_s: float
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class _Shown:
    """Models opened and measured.

    Attributes:
        opened, wanted: each model.
        held: the bytes that each has in memory, or will have.
    """

    opened: dict[str, OpenedModel] = field(default_factory=dict)
    wanted: dict[str, Wanted] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def _shown(shelf: Shelf, models: Iterable[Wanted]) -> Iterator[_Shown]:
    """Open models until the end of the block; those that can't be opened or measured are left out."""
    shown = _Shown()
    with contextlib.ExitStack() as stack:
        for one in models:
            name = repr(one.key)
            try:
                if (model := shelf.open(*one.key)) is None:
                    continue
                stack.callback(model.close)
                shown.held[name] = max(one.reserved_bytes, resident_of_model(model))
            except OSError as e:
                log.debug("can't measure %s: %s", one.key, e)
                continue
            shown.opened[name], shown.wanted[name] = model, one
        yield shown


class Occupancy:
    """The memory of one mount's models.

    Args:
        shelf: opens them.
        budget_bytes: what they may take together.
        pinned: labels of the layers that are locked once they were read.

    Attributes:
        on_evicted: told of each model that was dropped to make room; in the thread that makes it.
    """

    def __init__(self, shelf: Shelf, budget_bytes: int, pinned: Collection[str]) -> None:
        self._shelf = shelf
        self.budget_bytes = budget_bytes
        self._pinned = frozenset(pinned)
        self._pins = Pins()
        self._one = threading.Lock()
        self.on_evicted: Callable[[Key], None] = lambda key: None
        self.evicted_bytes = 0
        self.pin_failure: str | None = None

    def make_room(self, need_bytes: int, models: Iterable[Wanted]) -> int:
        """Evict until `need_bytes` fit into the budget beside what stays; gives the bytes that are left for them.

        Args:
            need_bytes: of the model to come.
            models: the others. One that is being read counts as what it will be, and stays.
        """
        with self._one, _shown(self._shelf, models) as shown:
            excess = sum(shown.held.values()) + need_bytes - self.budget_bytes
            if excess <= 0:
                return need_bytes
            self._evict(shown, excess)
            return max(0, min(need_bytes, self.budget_bytes - sum(shown.held.values())))

    def give_back(self, need_bytes: int, models: Iterable[Wanted]) -> int:
        """Evict models that nobody uses, one at least, until `need_bytes` are free; gives how many that were.

        Args:
            need_bytes: what is missing, as far as anybody knows.
            models: all there are. One that is being read stays.
        """
        with self._one, _shown(self._shelf, models) as shown:
            return self._evict(shown, max(1, need_bytes))

    def _evict(self, shown: _Shown, need_bytes: int) -> int:
        usage = files_in_use({key for model in shown.opened.values() for key in model.keys})
        pinned = self._pins.keys()
        choice = choose(
            (
                Resident(
                    key=name,
                    nbytes=shown.held[name],
                    last_wanted_s=shown.wanted[name].wanted_s,
                    in_use=shown.wanted[name].reserved_bytes > 0 or bool(model.keys & usage.in_use),
                    pinned=name in pinned,
                )
                for name, model in shown.opened.items()
            ),
            need_bytes,
        )
        evicted = 0
        for chosen in choice:
            freed = chosen.nbytes - drop_model(shown.opened[chosen.key])
            shown.held[chosen.key] -= freed
            evicted += freed
            self.evicted_bytes += freed
            self.on_evicted(shown.wanted[chosen.key].key)
            log.info("evicted %s: %d bytes", chosen.key, freed)
        return evicted

    def pin(self, key: Key, plan: Plan, opened: OpenedModel) -> None:
        """Lock the layers that are to be locked; a failure is logged and kept for the status."""
        name, locked = repr(key), self._pins.keys()
        if not self._pinned or name in locked:
            return
        need = sum(layer.nbytes for layer in plan.layers if layer.label in self._pinned)
        if self._pins.total_bytes + need > self.budget_bytes:
            self._not_pinned(key, f"{need} bytes beside {self._pins.total_bytes} are more than the budget"
                                  f" of {self.budget_bytes}")  # fmt: skip
            return
        for file, fd in opened.fds.items():
            parts = [
                (extent.offset, extent.nbytes)
                for layer in plan.layers
                if layer.label in self._pinned
                for extent in layer.extents
                if extent.file == file
            ]
            try:
                if parts:
                    self._pins.pin(name, fd, parts)
            except (OSError, WeightfsError) as e:
                self._pins.release(name)
                self._not_pinned(key, str(e))
                return

    def _not_pinned(self, key: Key, why: str) -> None:
        self.pin_failure = f"{os.path.join(os.fsdecode(key[0]), key[1])}: {why}"
        log.warning("can't lock layers of %s", self.pin_failure)

    def release(self, key: Key) -> None:
        """Unlock what is locked of a model."""
        self._pins.release(repr(key))

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        return {
            "budget_bytes": self.budget_bytes,
            "evicted_bytes": self.evicted_bytes,
            "locked_bytes": self._pins.total_bytes,
            "lock_failure": self.pin_failure,
        }


def resident_of_model(opened: OpenedModel) -> int:
    """Bytes of a model's files that are in memory."""
    return sum(resident_bytes(fd, 0, opened.sizes[file]) for file, fd in opened.fds.items())


def drop_model(opened: OpenedModel) -> int:
    """Drop a model's files from memory; gives the bytes that stay."""
    for fd in opened.fds.values():
        drop(fd)
    return resident_of_model(opened)
